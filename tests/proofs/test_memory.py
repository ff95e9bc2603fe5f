"""What plot_memory.py says about memory, and does not prove for itself."""

import sys

import pytest
import torch
from pages import names_of, peak_bytes
from torch import nn
from torch.func import grad, stack_module_state, vmap

NUM_MODELS, WIDTH, ROWS = 6, 64, 256
PAGE = names_of("speed/plot_memory", device=torch.device("cpu"), images=2)


def make_model():
    """Smaller than that of the page, which has its functions call this one."""
    layers = nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()
    return nn.Sequential(*layers)


PAGE |= {"make_model": make_model, "skeleton": make_model().to("meta")}
one_model = sum(p.nbytes for p in PAGE["skeleton"].parameters())
x = torch.randn(NUM_MODELS, ROWS, WIDTH)
y = torch.randint(WIDTH, (NUM_MODELS, ROWS))


def groups_of(size):
    return PAGE["in_groups"]((make_model() for _ in x), x, y, size)


def test_the_ruler_sees_two_tensors_where_two_are_needed():
    # Four results, two forward and two back, each freed after its last use.
    leaf = torch.zeros(4, 2**20, requires_grad=True)

    def call():
        mapped = vmap(lambda row: row.neg().exp().sum())(leaf)
        return torch.autograd.grad(mapped.sum(), leaf)

    assert 2 * leaf.nbytes <= peak_bytes(call) <= 2 * leaf.nbytes + 4096


def test_beside_the_stacks_the_models_of_one_group_exist():
    stacks = NUM_MODELS * one_model
    assert peak_bytes(lambda: groups_of(2)) <= stacks + 3 * one_model
    assert peak_bytes(lambda: groups_of(NUM_MODELS)) >= 2 * stacks


@pytest.mark.parametrize("size", [2, NUM_MODELS])
def test_the_timeline_names_what_is_held(size):
    stack = stack_module_state([make_model() for _ in x])[0]
    PAGE.update(x=x, y=y, params=stack)
    _, mb = PAGE["timeline"](size)
    held = NUM_MODELS * one_model / 1e6
    expected = torch.tensor([held, 2 * held])
    torch.testing.assert_close(mb[:2, -1], expected)
    assert mb[2].max() <= size * one_model / 1e6 + 1e-3
    assert mb[2:, -1].abs().max() < 0.01 * held, "something is left after the step"


def test_chunk_size_bounds_the_memory_under_no_grad_only():
    params, buffers = stack_module_state([make_model() for _ in x])

    def chunks(size):
        return vmap(grad(PAGE["loss"]), chunk_size=size)(params, buffers, x, y)

    def one_backward(size):
        losses = vmap(PAGE["loss"], chunk_size=size)(params, buffers, x, y)
        return torch.autograd.grad(losses.sum(), list(params.values()))

    bounded = peak_bytes(lambda: torch.no_grad()(chunks)(1))
    assert bounded < 0.5 * peak_bytes(lambda: torch.no_grad()(chunks)(None))
    assert peak_bytes(lambda: chunks(1)) > 2 * bounded
    assert peak_bytes(lambda: one_backward(1)) > 1.5 * bounded


@pytest.mark.skipif(sys.platform != "linux", reason="there is no limit to set")
def test_the_limit_is_taken_back():
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    error = PAGE["error_within"](100, lambda: torch.empty(10**8))
    assert "can't allocate memory" in error
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert PAGE["error_within"](1000, lambda: torch.empty(10**7)) is None
