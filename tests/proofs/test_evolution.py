"""What plot_evolution.py says in a clause."""

import torch
from pages import names_of
from torch import nn
from torch.func import vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

PAGE = names_of("uses/plot_evolution", skeleton=None)
outputs, evolve, keep_best = map(PAGE.get, ["outputs", "evolve", "keep_best"])
everyone = vmap(outputs, in_dims=(0, None, None))


def small():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def score(members):  # a smooth hill, its top at 1
    return -(members - 1).square().sum(-1)


def test_both_ways_climb_and_leave_the_start_as_it_is():
    torch.manual_seed(0)
    start = torch.zeros(3, 20)
    *_, evolved = evolve(score, start, 60, 16, sigma=0.1, rate=0.1)
    *_, kept = keep_best(score, start, 60, 16, sigma=0.1)
    assert (start == 0).all()
    for center in (evolved, kept):
        assert (score(center) > 0.5 * score(start)).all()


def test_keep_the_best_never_falls_behind():
    torch.manual_seed(0)
    centers = torch.stack(list(keep_best(score, torch.randn(3, 20), 30, 8, 1.0)))
    assert (score(centers).diff(dim=0) >= 0).all()


def test_ties_move_nothing():
    start = torch.randn(3, 20)
    flat = evolve(lambda members: members[..., 0] * 0, start, 5, 8, sigma=1, rate=1)
    assert all(torch.equal(center, start) for center in flat)


def test_the_direction_is_that_of_the_gradient_in_the_mean():
    torch.manual_seed(0)
    weight = torch.tensor([3.0, -1.0, 0.5, 0.0])

    lines = evolve(lambda m: m @ weight, torch.zeros(2000, 4), 1, 16, 0.1, 1)
    steps = torch.stack(list(lines))[0].mean(0)  # Adam's first step has length 1
    assert (steps * weight.sign() > 0.1)[:3].all()
    assert steps[3].abs() < 0.1


def test_runs_do_not_mix():
    torch.manual_seed(0)
    both = list(evolve(score, torch.zeros(2, 5), 3, 8, sigma=0.1, rate=0.1))

    def only_first(members):  # the second run gets no information
        return torch.stack([score(members[0]), members[1, :, 0] * 0])

    torch.manual_seed(0)
    one = list(evolve(only_first, torch.zeros(2, 5), 3, 8, sigma=0.1, rate=0.1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(both, one, strict=True))
    assert all((b[1] == 0).all() for b in one)


def test_the_gradient_reaches_a_hypernetwork_unless_it_is_cut():
    hyper = nn.Linear(2, 19).double()
    task, x = torch.randn(4, 2).double(), torch.randn(5, 4).double()
    with torch.device("meta"):
        skeleton = small()
    everyone(hyper(task), x, skeleton).square().mean().backward()
    found, hyper.weight.grad = hyper.weight.grad, None
    w, b, v, c = hyper(task).split([12, 3, 3, 1], dim=1)
    hidden = (torch.einsum("nhi,bi->nbh", w.view(-1, 3, 4), x) + b[:, None]).tanh()
    (torch.einsum("nh,nbh->nb", v, hidden) + c).square().mean().backward()
    torch.testing.assert_close(found, hyper.weight.grad, atol=1e-12, rtol=0)

    hyper.weight.grad, model = None, small()
    vector_to_parameters(hyper(task)[0], model.parameters())
    model(x).square().mean().backward()
    everyone(nn.Parameter(hyper(task)), x, skeleton).square().mean().backward()
    assert hyper.weight.grad is None


def test_the_carts_are_those_of_the_agents():
    torch.manual_seed(0)
    other = names_of("uses/plot_agents", "move", "fallen")
    state = 0.1 * torch.rand(50, 4).double() - 0.05
    weight = torch.tensor([0.1, 0.3, 3.0, 1.0]).double() * torch.rand(50, 4)
    length, alive, at = torch.zeros(50), torch.ones(50, dtype=torch.bool), state
    for _ in range(500):
        length += alive
        at = other["move"](at, (at * weight).sum(-1) > 0)
        alive &= ~other["fallen"](at)
    found = PAGE["play"](lambda s: (s * weight).sum(-1), state)
    assert (found == length).all()
    assert length.min() < 100
    assert length.max() == 500


def test_a_loop_of_modules_plays_the_same():
    torch.manual_seed(0)
    PAGE["vmap"], PAGE["scale"] = vmap, torch.tensor([1.0, 1, 5, 1]).double()
    with torch.device("meta"):
        PAGE["driver"] = PAGE["make_driver"]()
    models = [PAGE["make_driver"]().double() for _ in range(20)]
    rows = torch.stack([parameters_to_vector(m.parameters()) for m in models])
    carts = torch.rand(4, 4).double() / 10 - 0.05
    with torch.no_grad():
        together = PAGE["lengths"](rows, carts)
        for model, length in zip(models, together, strict=True):
            alone = PAGE["play"](lambda s, m=model: m(s * PAGE["scale"])[..., 0], carts)
            assert (alone == length).all()
