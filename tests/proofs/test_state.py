"""What plot_state.py says in a clause about state under vmap."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pages import names_of
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

N = 4


PAGE = names_of("training/plot_state", "Net", "Tied", "ensemble")
Tied, ensemble = PAGE["Tied"], PAGE["ensemble"]


class Net(PAGE["Net"]):
    """That of the page without dropout."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Identity()


class Centered(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        new = 0.9 * self.mean + 0.1 * x.mean(0)
        if self.in_place:
            self.mean.copy_(new)
        else:
            self.mean = new
        return x - self.mean


def careless(skeleton):
    """That of the page without strict=True: what is missing is the skeleton's."""
    return vmap(
        lambda params, buffers, x: functional_call(skeleton, (params, buffers), (x,))
    )


def on_meta(cls, *args):
    with torch.device("meta"):
        return cls(*args)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def models():
    return [Net().double() for _ in range(N)]


@pytest.fixture
def x():
    return torch.randn(N, 32, 6, dtype=torch.float64)


def test_training_with_batch_norm_equals_the_loop(models):
    params, buffers = stack_module_state(models)
    loop_optimizer = torch.optim.SGD(
        [p for m in models for p in m.parameters()], lr=0.1
    )
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    for _ in range(20):
        x = 2 * torch.randn(N, 32, 6, dtype=torch.float64) + 1
        y = (x.sum(-1) > 6).long()
        looped = torch.stack([m(rows) for m, rows in zip(models, x, strict=True)])
        stacked = ensemble(on_meta(Net))(params, buffers, x)
        for logits, way in [(looped, loop_optimizer), (stacked, optimizer)]:
            losses = F.cross_entropy(logits.mT, y, reduction="none").mean(-1)
            way.zero_grad()
            losses.sum().backward()
            way.step()
    expected = stack_module_state(models)
    for found, wanted in zip((params, buffers), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


def test_batch_norm_refuses_all_rows_for_every_member(models, x):
    params, buffers = stack_module_state(models)
    with pytest.raises(RuntimeError, match="should contain 16 elements not 64"):
        ensemble(on_meta(Net), in_dims=(0, None, 0))(params, buffers, x)


def test_forgotten_buffers_in_eval_mode_are_those_of_the_skeleton(models, x):
    models[0](x[0])  # its statistics differ from those of the others
    for model in models:
        model.eval()
    params, _ = stack_module_state(models)
    found = careless(models[0])(params, {}, x)
    expected = torch.stack([m(rows) for m, rows in zip(models, x, strict=True)])
    torch.testing.assert_close(found[0], expected[0], atol=1e-10, rtol=0)
    assert (found[1] - expected[1]).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="Missing key"):
        ensemble(models[0])(params, {}, x)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_buffer_changed_in_place_is_kept_and_a_replaced_one_is_lost(in_place, x):
    members = [Centered(in_place).double() for _ in range(N)]
    _, buffers = stack_module_state(members)
    ensemble(on_meta(Centered, in_place))({}, buffers, x)
    expected = 0.1 * x.mean(1) if in_place else torch.zeros(N, 6, dtype=torch.float64)
    torch.testing.assert_close(buffers["mean"], expected, atol=1e-10, rtol=0)


def seeded(function, *inputs):
    torch.manual_seed(1)
    return function(*inputs)


def test_same_masks_are_those_of_a_loop_that_seeds_every_model():
    drop, ones = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)), torch.ones(N, 16)
    same = seeded(vmap(drop, randomness="same"), ones)
    assert torch.equal(same, torch.stack([seeded(drop, row) for row in ones]))


def test_different_masks_repeat_with_the_seed_and_are_not_those_of_a_loop():
    drop, ones = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)), torch.ones(N, 16)
    different = vmap(drop, randomness="different")
    masks = seeded(different, ones)
    assert len(masks.unique(dim=0)) == N
    assert torch.equal(masks, seeded(different, ones))
    looped = seeded(lambda: torch.stack([drop(row) for row in ones]))
    assert not torch.equal(masks, looped)


def test_a_masked_gradient_freezes_some_members_from_the_first_step_on(models, x):
    params, buffers = stack_module_state(models)
    before = params["fc1.weight"].detach().clone()
    mask = torch.tensor([0.0, 1, 1, 0], dtype=torch.float64)[:, None, None]
    params["fc1.weight"].register_hook(lambda grad: grad * mask)
    optimizer = torch.optim.Adam(params.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ensemble(on_meta(Net))(params, buffers, x).square().sum().backward()
        optimizer.step()
    moved = (params["fc1.weight"] != before).flatten(1).any(1)
    assert moved.tolist() == [False, True, True, False]


def test_parameters_frozen_in_all_models_are_frozen_in_the_stack(models):
    for model in models:
        model.fc1.requires_grad_(False)
    params, _ = stack_module_state(models)
    frozen = [name for name, p in params.items() if not p.requires_grad]
    assert frozen == ["fc1.weight", "fc1.bias"]
    models[1].fc1.requires_grad_(True)
    with pytest.raises(RuntimeError, match="requires_grad"):
        stack_module_state(models)


def test_a_copied_skeleton_forgets_the_tie_and_computes_from_unwritten_memory():
    tied = [Tied() for _ in range(N)]
    state, tokens = stack_module_state(tied), torch.randint(11, (N, 5))
    expected = torch.stack([m(row) for m, row in zip(tied, tokens, strict=True)])
    torch.testing.assert_close(ensemble(on_meta(Tied))(*state, tokens), expected)
    copied = copy.deepcopy(tied[0]).to("meta")
    with pytest.raises(RuntimeError, match=r"Missing key.*'head.weight'"):
        ensemble(copied)(*state, tokens)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        wrong = careless(copied)(*state, tokens)
    finally:
        torch.use_deterministic_algorithms(False)
    assert wrong.isnan().any()


def sequence(activation=nn.ReLU, p=0.5, **options):
    return nn.Sequential(nn.Linear(6, 8, **options), activation(), nn.Dropout(p))


def half_eval():
    model = sequence()
    model[2].eval()
    return model


@pytest.mark.parametrize(
    "members",
    [
        [sequence(), sequence(nn.Tanh)],
        [sequence(), sequence(p=0.1)],
        [sequence(), half_eval()],
        [sequence(bias=False), sequence()],
        [sequence(), sequence(dtype=torch.float64)],
    ],
    ids=["activation", "attribute", "mode of a submodule", "a bias more", "dtype"],
)
def test_stack_module_state_accepts_models_that_one_call_cannot_stand_for(members):
    stack_module_state(members)


@pytest.mark.parametrize(
    "members",
    [[], [sequence(), Net()], [sequence(), sequence().eval()]],
    ids=["no model", "class", "mode"],
)
def test_stack_module_state_refuses_other_classes_and_modes(members):
    with pytest.raises(RuntimeError):
        stack_module_state(members)
