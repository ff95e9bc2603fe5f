"""What plot_committee_forces.py says of forces and of five ways to choose labels."""

import pytest
import torch
from pages import cells_of, names_of
from torch import nn
from torch.func import functional_call, jacrev, stack_module_state, vmap

PAGE = "beyond/plot_committee_forces"
SIZE, REPEATS = 60, 3


@pytest.fixture
def names():
    """A page's functions, with the globals that they use."""
    torch.manual_seed(0)
    pools = torch.rand(REPEATS, SIZE, 2)
    sizes = {"num_repeats": REPEATS, "size": SIZE, "device": torch.device("cpu")}
    return names_of(PAGE, **sizes, pools=pools)


LAYER = nn.Linear(10, 1, device="meta")


def pair_energy(params, x):  # a molecule: [5, 3] -> []
    first, second = torch.triu_indices(5, 5, 1)
    distances = (x[first] - x[second]).norm(dim=-1)
    return functional_call(LAYER, params, (distances,), strict=True).squeeze(0)


def test_a_force_has_the_shape_of_its_positions(names):
    names["energy"] = pair_energy
    models = [nn.Linear(10, 1).double() for _ in range(2)]
    params, _ = stack_module_state(models)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    at_places = vmap(names["energy_and_force"], in_dims=(None, 0))
    energies, forces = vmap(at_places, in_dims=(0, None))(params, x)
    assert list(energies.shape) == [2, 4]
    assert list(forces.shape) == [2, 4, 5, 3]
    x = x[2].clone().requires_grad_()
    alone = pair_energy({key: p[1] for key, p in params.items()}, x)
    (slope,) = torch.autograd.grad(alone, x)
    torch.testing.assert_close(forces[1, 2], -slope, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("activation", "smooth"), [(nn.Tanh, True), (nn.ReLU, False)])
def test_with_relu_a_force_changes_only_by_jumps(names, activation, smooth):
    def build():
        return nn.Sequential(nn.Linear(2, 32), activation(), nn.Linear(32, 1))

    names["skeleton"] = build().to("meta")

    def force(params, x):
        return names["energy_and_force"](params, x)[1]

    params = dict(build().double().named_parameters())
    slopes = jacrev(force, argnums=1)(params, torch.randn(2).double())
    assert bool(slopes.any()) == smooth


def test_vmaps_in_the_other_order_swap_places_and_members(names):
    names["skeleton"] = names["build"]().to("meta")
    params, _ = stack_module_state([names["build"]() for _ in range(4)])
    members = vmap(names["energy_and_force"], in_dims=(0, None))
    energies, forces = vmap(members, in_dims=(None, 0))(params, torch.rand(15, 2))
    assert list(energies.shape) == [15, 4]
    assert list(forces.shape) == [15, 4, 2]


@pytest.mark.parametrize(
    "way", ["largest", "most_of_some", "far_apart", "far_and_disagreeing"]
)
def test_every_way_chooses_rows_without_a_label(names, way):
    if way == "most_of_some":  # 3 % of the page's pool are enough
        names["size"] = 1500
    taken = torch.rand(REPEATS, names["size"]).topk(15).indices
    chosen = names[way](taken, torch.rand(REPEATS, names["size"]))
    for old, new in zip(taken.tolist(), chosen.tolist(), strict=True):
        assert len({*old, *new}) == 30


def test_far_apart_takes_the_farthest_one_after_the_other(names):
    pool, taken = names["pools"][0], [3, 5]
    chosen = names["spread_out"](pool, torch.tensor(taken), torch.ones(SIZE))
    for row in chosen.tolist():
        distances = torch.cdist(pool, pool[taken]).amin(dim=1)
        assert distances[row] == pytest.approx(distances.max().item(), abs=1e-5)
        taken.append(row)


def test_the_surface_has_its_three_wells():
    """Energies and places as in the literature, divided by 100."""
    (cell,) = [cell for cell in cells_of(PAGE) if "def true_energy" in cell.code]
    names = names_of(PAGE, "build") | {"device": torch.device("cpu")}
    exec(cell.code.partition("num_repeats")[0], names)
    wells = torch.tensor([[-0.558, 1.442], [0.623, 0.028], [-0.050, 0.467]])
    energies, forces = names["label"](wells)
    expected = torch.tensor([-1.467, -1.0817, -0.8077])
    torch.testing.assert_close(energies, expected, atol=1e-3, rtol=0)
    assert forces.abs().max() < 0.02
