"""What plot_jacobians_and_hessians.py says and does not prove."""

import itertools
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pages import names_of
from torch import nn
from torch.autograd import functional as older
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

with warnings.catch_warnings(action="ignore"):  # PyTorch's remark on itself, once
    jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))

hvp = names_of("beyond/plot_jacobians_and_hessians", "hvp")["hvp"]


def forward_hvp(f, x, v):
    return jvp(grad(f), (x,), (v,))[1]


@pytest.fixture
def net():
    """As that of the page."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)
    return nn.Sequential(*layers).double().requires_grad_(False)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(4, dtype=torch.float64)


@pytest.mark.parametrize("outputs", [8, 64, 512])
def test_multiplications_are_in_proportion_to_outputs_and_inputs(outputs):
    # The page's network, without modules, which the counter would follow backward.
    # Each side also computes the outputs once.
    sizes = [64, 256, 256, outputs]
    weights = [torch.randn(pair).double() for pair in itertools.pairwise(sizes)]

    def net(x):
        first, second, last = weights
        return torch.tanh(torch.tanh(x @ first) @ second) @ last

    x = torch.randn(1, 64, dtype=torch.float64)
    one_pass = 2 * sum(weight.numel() for weight in weights)
    for way, passes in [(jacrev, outputs), (jacfwd, 64)]:
        with FlopCounterMode(display=False) as counter:
            vmap(way(net))(x)
        assert counter.get_total_flops() == pytest.approx(passes * one_pass, rel=0.15)


def calls(function, *arguments):
    """How many operators were called."""
    with profile(acc_events=True) as profiler:
        function(*arguments)
    return sum(event.count for event in profiler.key_averages())


def test_forward_over_reverse_calls_more_operators(net):
    x, y, v = torch.randn(100, 4).double(), torch.randn(100, 3).double(), net[0].weight

    def loss(weight):
        outputs = functional_call(net, {"0.weight": weight}, (x,))
        return F.mse_loss(outputs, y, reduction="sum")

    members = torch.randn(16, 16, 4, dtype=torch.float64)
    pairs = [
        (jacfwd(jacrev(loss)), jacrev(jacrev(loss))),
        (lambda w: forward_hvp(loss, w, v), lambda w: hvp(loss, w, v)),
    ]
    for forward, backward in pairs:
        assert calls(vmap(forward), members) > calls(vmap(backward), members)


def test_without_vmap_the_jacobian_of_a_batch_is_mostly_zeros(net):
    whole = jacrev(net)(torch.randn(100, 4, dtype=torch.float64))
    assert list(whole.shape) == [100, 3, 100, 4]
    assert (whole == 0).double().mean() == 0.99


def test_random_signs_give_the_trace(net, x):
    def energy(x):
        return net(x).square().sum()

    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 4)
    products = vmap(partial(hvp, energy, x))(signs)  # all 16 signs: no chance is left
    trace = (signs * products).sum(dim=1).mean()
    assert (trace - hessian(energy)(x).trace()).abs() < 1e-10


def test_products_take_dictionaries_of_parameters(net, x):
    params = dict(net.named_parameters())
    v = {name: torch.randn_like(p) for name, p in params.items()}

    def loss(params):
        return functional_call(net, params, (x,)).square().sum()

    def loss_of_tuple(*tensors):
        return loss(dict(zip(params, tensors, strict=True)))

    _, expected = older.hvp(loss_of_tuple, (*params.values(),), (*v.values(),))
    found = tuple(hvp(loss, params, v).values())
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [(F.mse_loss, "ZeroTensors"), (F.huber_loss, "huber_loss_backward")],
)
def test_losses_that_forward_over_reverse_refuses(net, x, loss, message):
    # When a future PyTorch learns one of these, the page says so; then mend this test.
    y, v = torch.randn(3, dtype=torch.float64), torch.randn_like(x)

    def f(x):
        return loss(net(x), y)

    with pytest.raises(RuntimeError, match=message):
        forward_hvp(f, x, v)
    expected = older.hessian(f, x)
    assert (hvp(f, x, v) - expected @ v).abs().max() < 1e-10
    assert (jacfwd(jacrev(f))(x) - expected).abs().max() < 1e-10
