"""What plot_memory.py says about memory, and does not prove for itself."""

import pytest
import torch
from pages import names_of, peak_bytes
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

NUM_MODELS, WIDTH, ROWS = 6, 64, 256
PAGE = names_of("speed/plot_memory", device=torch.device("cpu"))
stack_one_at_a_time = PAGE["stack_one_at_a_time"]


def make_model():
    """Smaller than that of the page; its functions below, too, without buffers."""
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()
    )


def make_model_with_buffers():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    model[0].weight.requires_grad_(False)  # a frozen layer
    return model


skeleton = make_model().to("meta")
one_model = sum(p.nbytes for p in skeleton.parameters())


def predict(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


def loss(params, x):
    return predict(params, x).square().mean()


@pytest.fixture
def params():
    torch.manual_seed(0)
    return stack_one_at_a_time(make_model, NUM_MODELS)[0]


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(NUM_MODELS, ROWS, WIDTH)


def test_the_ruler_sees_two_tensors_where_two_are_needed():
    # Four results, two forward and two back, each freed after its last use.
    leaf = torch.zeros(4, 2**20, requires_grad=True)

    def call():
        mapped = vmap(lambda row: row.neg().exp().sum())(leaf)
        return torch.autograd.grad(mapped.sum(), leaf)

    assert 2 * leaf.nbytes <= peak_bytes(call) <= 2 * leaf.nbytes + 4096


def test_stacking_one_at_a_time_gives_what_stack_module_state_gives():
    torch.manual_seed(2)
    expected = stack_module_state([make_model_with_buffers() for _ in range(3)])
    torch.manual_seed(2)
    found = stack_one_at_a_time(make_model_with_buffers, 3)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    for name, p in found[0].items():
        assert p.requires_grad == expected[0][name].requires_grad


def test_a_chunk_size_chosen_by_the_rule_stays_within_the_budget():
    @torch.no_grad()
    def everything(size, chunk_size):
        params, _ = stack_one_at_a_time(make_model, size)
        return vmap(grad(loss), chunk_size=chunk_size)(
            params, torch.randn(size, ROWS, WIDTH)
        )

    def peak(size, chunk_size=None):
        return peak_bytes(lambda: everything(size, chunk_size))

    per_member, ones = (peak(6) - peak(3)) / 3, peak(12, 1)
    for budget in torch.linspace(ones, peak(12), 3).tolist():
        assert peak(12, 1 + int((budget - ones) / per_member)) <= budget * 1.01


def test_the_largest_result_of_chunks_exists_twice_at_the_end(params, x):
    def call():
        with torch.no_grad():
            return vmap(grad(loss), chunk_size=1)(params, x[:, :1])

    largest = max(p.nbytes for p in skeleton.parameters())
    expected = NUM_MODELS * (one_model + largest)
    assert peak_bytes(call) == pytest.approx(expected, rel=0.02)


def test_checkpointing_around_vmap_saves_memory(params, x):
    wide = x.repeat(1, 4, 1)
    block = vmap(predict)

    def deep(checkpointed):
        h = wide
        for _ in range(4):
            if checkpointed:
                h = checkpoint(block, params, h, use_reentrant=False)
            else:
                h = block(params, h)
        return torch.autograd.grad(h.square().sum(), list(params.values()))

    for found, expected in zip(deep(True), deep(False), strict=True):
        torch.testing.assert_close(found, expected)
    assert peak_bytes(lambda: deep(True)) < 0.8 * peak_bytes(lambda: deep(False))
