"""What plot_jacobians_and_hessians.py says and does not prove."""

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pages import names_of
from torch import nn
from torch.autograd import functional as older
from torch.func import functional_call as call
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's remarks on itself
hvp = names_of("beyond/plot_jacobians_and_hessians", "hvp")["hvp"]
X = torch.randn(4, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()


@pytest.fixture
def energy(net):
    return lambda x: net(x).square().sum()


@pytest.mark.parametrize("outputs", [8, 64, 512])
def test_multiplications_are_in_proportion_to_outputs_and_inputs(outputs):
    # Without modules, which the counter would follow backward.
    a, b, c = torch.randn(64, 256), torch.randn(256, 256), torch.randn(256, outputs)
    x, one_pass = torch.randn(1, 64), 2 * (a.numel() + b.numel() + c.numel())

    def net(x):
        return torch.tanh(torch.tanh(x @ a) @ b) @ c

    for way, passes in [(jacrev, outputs), (jacfwd, 64)]:
        with FlopCounterMode(display=False) as counter:
            vmap(way(net))(x)
        assert counter.get_total_flops() == pytest.approx(passes * one_pass, rel=0.15)


def test_forward_mode_calls_more_operators(net):
    x, counts = torch.randn(100, 4, dtype=torch.float64), []
    for way in jacfwd, jacrev:
        with torch.no_grad(), profile(acc_events=True) as profiler:
            vmap(way(net))(x)
        counts.append(sum(event.count for event in profiler.key_averages()))
    assert counts[0] > counts[1]


def test_without_vmap_the_jacobian_of_a_batch_is_mostly_zeros(net):
    whole = jacrev(net)(torch.randn(100, 4, dtype=torch.float64))
    assert (*whole.shape, (whole == 0).double().mean()) == (100, 3, 100, 4, 0.99)


def test_random_signs_give_the_trace(energy):
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 4)
    products = vmap(partial(hvp, energy, X))(signs)  # all 16 signs: no chance is left
    trace = (signs * products).sum(dim=1).mean()
    assert (trace - hessian(energy)(X).trace()).abs() < 1e-10


def test_products_take_dictionaries_of_parameters(net):
    params = dict(net.named_parameters())
    v = {name: torch.randn_like(p) for name, p in params.items()}

    def loss(*tensors):
        params = dict(zip(v, tensors, strict=True))
        return call(net, params, (X,)).square().sum()

    _, expected = older.hvp(loss, (*params.values(),), (*v.values(),))
    found = hvp(lambda params: loss(*params.values()), params, v)
    torch.testing.assert_close((*found.values(),), expected, atol=1e-10, rtol=0)


def test_linearize_goes_around_vmap_and_under_no_grad(energy):
    (points, v), slope = torch.randn(2, 5, 4, dtype=torch.float64), grad(energy)
    with torch.no_grad():
        found = linearize(vmap(slope), points)[1](v)
        expected = vmap(partial(hvp, energy))(points, v)
        assert (found - expected).abs().max() < 1e-10
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            vmap(lambda x, v: linearize(slope, x)[1](v))(points, v)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        linearize(slope, points[0])[1](v[0])


def test_linearize_of_the_gradient_of_mse_loss_ends_the_process():
    code = """import torch
x, y = torch.randn(2, 3)
slope = torch.func.grad(lambda x: torch.nn.functional.mse_loss(x, y))
torch.func.linearize(slope, x)[1](x)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode < 0  # by a signal


@pytest.mark.parametrize(
    ("loss", "message"),
    [(F.mse_loss, "ZeroTensors"), (F.huber_loss, "huber_loss_backward")],
)
def test_losses_that_forward_over_reverse_refuses(net, loss, message):
    # When a future PyTorch learns one of these, the page says so; then mend this test.
    y, v = torch.randn(3, dtype=torch.float64), torch.randn_like(X)
    net.requires_grad_(False)

    def f(x):
        return loss(net(x), y)

    with pytest.raises(RuntimeError, match=message):
        jvp(grad(f), (X,), (v,))
    expected = older.hessian(f, X)
    assert (hvp(f, X, v) - expected @ v).abs().max() < 1e-10
    assert (jacfwd(jacrev(f))(X) - expected).abs().max() < 1e-10
