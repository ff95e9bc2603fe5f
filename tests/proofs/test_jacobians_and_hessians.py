"""What plot_jacobians_and_hessians.py says and does not prove."""

import itertools
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pages import names_of
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

with warnings.catch_warnings(action="ignore"):  # PyTorch's remark on itself, once
    jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))


def mlp(*sizes, act=nn.Tanh):
    """As the page's ``net``; ``energy`` and the losses below are of such networks."""
    layers = [nn.Linear(sizes[0], sizes[1])]
    for a, b in itertools.pairwise(sizes[1:]):
        layers += [act(), nn.Linear(a, b)]
    return nn.Sequential(*layers).double().requires_grad_(False)


hvp = names_of("beyond/plot_jacobians_and_hessians", "hvp")["hvp"]


def forward_hvp(f, x, v):
    return jvp(grad(f), (x,), (v,))[1]


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(4, dtype=torch.float64)


def energy(net):
    return lambda x: net(x).square().sum()


def test_hessians_agree_in_any_order_of_modes(x):
    f = energy(mlp(4, 16, 3))
    expected = torch.autograd.functional.hessian(f, x)
    for way in [
        hessian,
        lambda f: jacrev(jacrev(f)),
        lambda f: jacfwd(jacfwd(f)),
        lambda f: jacrev(jacfwd(f)),
    ]:
        assert (way(f)(x) - expected).abs().max() < 1e-10
    v = torch.randn_like(x)
    for product in [hvp(f, x, v), forward_hvp(f, x, v)]:
        assert (product - expected @ v).abs().max() < 1e-10


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
    """How often operators were called, by name."""
    with profile(acc_events=True) as profiler:
        function(*arguments)
    return {event.key: event.count for event in profiler.key_averages()}


def test_forward_over_reverse_calls_more_operators_and_copies():
    torch.manual_seed(0)
    a, b = torch.randn(16, 8).double(), torch.randn(8, 10).double()
    x, y = torch.randn(100, 16).double(), torch.randn(100, 10).double()

    def loss(a):
        outputs = torch.tanh(x @ a.view(16, 8)) @ b
        return F.mse_loss(outputs, y, reduction="sum")

    members, v = a.flatten().repeat(16, 1), torch.randn(128).double()
    pairs = [
        (jacfwd(jacrev(loss)), jacrev(jacrev(loss))),
        (lambda a: forward_hvp(loss, a, v), lambda a: hvp(loss, a, v)),
    ]
    for forward, backward in pairs:
        more, fewer = calls(vmap(forward), members), calls(vmap(backward), members)
        assert more["aten::copy_"] > fewer["aten::copy_"]
        assert sum(more.values()) > sum(fewer.values())


def test_splitting_jacrev_changes_nothing(x):
    net = mlp(4, 16, 3)
    whole, split = jacrev(net)(x), jacrev(net, chunk_size=2)(x)
    assert (whole - split).abs().max() < 1e-10


def test_without_vmap_the_jacobian_of_a_batch_is_mostly_zeros():
    torch.manual_seed(0)
    net, points = mlp(4, 16, 3), torch.randn(100, 4, dtype=torch.float64)
    whole = jacrev(net)(points)
    assert list(whole.shape) == [100, 3, 100, 4]
    assert (whole == 0).double().mean() == 0.99
    blocks = whole.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    assert (blocks - vmap(jacrev(net))(points)).abs().max() < 1e-10


def test_relu_has_no_curvature_and_tanh_has(x):
    for act, curved in [(nn.ReLU, False), (nn.Tanh, True)]:
        net = mlp(4, 16, 16, 1, act=act)
        assert bool(hessian(lambda x, net=net: net(x)[0])(x).any()) is curved


def test_random_signs_give_the_trace(x):
    f = energy(mlp(4, 16, 3))
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 4)
    products = vmap(partial(hvp, f, x))(signs)  # all 16 signs: no chance is left
    trace = (signs * products).sum(dim=1).mean()
    assert (trace - hessian(f)(x).trace()).abs() < 1e-10


def test_products_take_dictionaries_of_parameters(x):
    net = mlp(4, 16, 3)
    params = {name: p.detach() for name, p in net.named_parameters()}
    shapes = {name: p.shape for name, p in params.items()}

    def loss(params):
        return functional_call(net, params, (x,)).square().sum()

    def flat_loss(theta):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        named = zip(shapes.items(), parts, strict=True)
        return loss({name: part.view(shape) for (name, shape), part in named})

    v = {name: torch.randn_like(p) for name, p in params.items()}
    theta, w = (torch.cat([t.flatten() for t in d.values()]) for d in (params, v))
    product = hvp(loss, params, v)
    expected = torch.autograd.functional.hvp(flat_loss, theta, w)[1]
    found = torch.cat([product[name].flatten() for name in params])
    assert (found - expected).abs().max() < 1e-10


def test_which_losses_forward_over_reverse_refuses(x):
    # When a future PyTorch learns one of these, the page says so; then mend this test.
    net, y, v = mlp(4, 16, 3), torch.randn(3, dtype=torch.float64), torch.randn_like(x)
    refused = {F.mse_loss: "ZeroTensors", F.huber_loss: "huber_loss_backward"}
    for loss, message in refused.items():
        with pytest.raises(RuntimeError, match=message):
            forward_hvp(lambda x, loss=loss: loss(net(x), y), x, v)
        f = lambda x, loss=loss: loss(net(x), y)  # noqa: E731
        expected = torch.autograd.functional.hessian(f, x)
        assert (hvp(f, x, v) - expected @ v).abs().max() < 1e-10
        for way in [jacrev(jacrev(f)), jacfwd(jacrev(f))]:
            assert (way(x) - expected).abs().max() < 1e-10
    summed = partial(F.mse_loss, reduction="sum")
    for loss in [summed, F.smooth_l1_loss, F.binary_cross_entropy_with_logits]:
        f = lambda x, loss=loss: loss(net(x), y.sigmoid())  # noqa: E731
        expected = torch.autograd.functional.hvp(f, x, v)[1]
        assert (forward_hvp(f, x, v) - expected).abs().max() < 1e-10


def test_gradient_descent_leaves_a_minimum_sharper_than_2_over_its_rate():
    curvature = torch.tensor([1.0, 10.0], dtype=torch.float64)
    for rate, settles in [(0.199, True), (0.201, False)]:
        theta = torch.ones(2, dtype=torch.float64)
        for _ in range(1000):
            theta -= rate * grad(lambda t: (curvature * t**2).sum() / 2)(theta)
        assert bool(theta[1].abs() < 1) is settles
