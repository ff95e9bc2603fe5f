"""What plot_state.py says in a clause about state under vmap."""

import copy

import pytest
import torch
from pages import names_of, text_of
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
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
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
    separate = [p for m in models for p in m.parameters()]
    loop_optimizer = torch.optim.SGD(separate, lr=0.1)
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    for x in torch.randn(5, N, 32, 6, dtype=torch.float64):
        looped = torch.stack([m(rows) for m, rows in zip(models, x, strict=True)])
        stacked = ensemble(on_meta(Net))(params, buffers, x)
        for outputs, way in [(looped, loop_optimizer), (stacked, optimizer)]:
            way.zero_grad()
            outputs.exp().mean(dim=(1, 2)).sum().backward()
            way.step()
    expected = stack_module_state(models)
    torch.testing.assert_close((params, buffers), expected, atol=1e-10, rtol=0)


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


def test_a_tensor_that_takes_the_place_of_a_buffer_is_lost(x):
    _, buffers = stack_module_state([Centered().double() for _ in range(N)])
    ensemble(on_meta(Centered))({}, buffers, x)
    assert not buffers["mean"].any()


def test_different_masks_repeat_with_the_seed_and_are_not_those_of_a_loop():
    drop, ones = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)), torch.ones(N, 16)
    masks = []
    for _ in range(2):
        torch.manual_seed(1)
        masks.append(vmap(drop, randomness="different")(ones))
    assert torch.equal(*masks)
    torch.manual_seed(1)
    assert not torch.equal(masks[0], torch.stack([drop(row) for row in ones]))


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


def test_a_layer_frozen_in_some_models_is_refused(models):
    models[1].fc1.requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires_grad"):
        stack_module_state(models)


def test_a_copied_skeleton_computes_from_unwritten_memory_without_strict():
    tied = [Tied() for _ in range(N)]
    state, tokens = stack_module_state(tied), torch.randint(11, (N, 5))
    copied = copy.deepcopy(tied[0]).to("meta")
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        wrong = careless(copied)(*state, tokens)
    finally:
        torch.use_deterministic_algorithms(False)
    assert wrong.isnan().any()


def test_dropout_with_a_rate_for_each_member():
    names = {"torch": torch}
    text = text_of("training/plot_state").split("def dropout(x, p):")[1]
    body = text.split("return ")[1].split("\n")[0]
    exec(f"def dropout(x, p): return {body}", names)
    rates, ones = torch.tensor([0.0, 0.25, 0.75]), torch.ones(3, 100_000)
    dropped = vmap(names["dropout"], randomness="different")(ones, rates)
    assert torch.allclose((dropped == 0).float().mean(1), rates, atol=0.01)
    assert torch.allclose(dropped.mean(1), torch.ones(3), atol=0.02)
