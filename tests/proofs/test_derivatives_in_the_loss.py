"""What plot_derivatives_in_the_loss.py says and does not prove."""

import warnings
from functools import partial

import pytest
import torch
from pages import names_of
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

with warnings.catch_warnings(action="ignore"):  # PyTorch's remark on itself, once
    jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))


@pytest.fixture
def page():
    """The page's functions, and slope and second, which are no functions there."""
    names = names_of("beyond/plot_derivatives_in_the_loss", damping=2.0)
    names["slope"] = grad(names["u"], argnums=1)
    names["second"] = jacrev(names["slope"], argnums=1)
    return names


@pytest.fixture
def members(page):
    torch.manual_seed(0)
    models = [page["make_model"](3).double() for _ in range(2)]
    page["skeleton"] = page["make_model"](3).to("meta")
    params, _ = stack_module_state(models)
    return models, params, torch.randn(2, 5, 3, dtype=torch.float64)


@pytest.mark.parametrize("way", ["forward_over_reverse", "forward_twice", "sums"])
def test_all_ways_train_the_same(page, members, way):
    _, params, x = members
    expected = page["nested_loss"](page["laplacian"], params, x)
    nested = page["nested_loss"]
    found = page["summed_loss"] if way == "sums" else partial(nested, page[way])
    tensors = list(params.values())
    pair = [
        torch.autograd.grad(loss, tensors, allow_unused=True)[:-1]
        for loss in (expected, found(params, x))
    ]
    torch.testing.assert_close(*pair, atol=1e-10, rtol=0)


def test_the_solution_solves_the_equation(page):
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    for omega in 6.0, 12.0:
        page["u"] = lambda params, t, omega=omega: page["solution"](omega, t[0])
        page["slope"] = grad(page["u"], argnums=1)
        page["second"] = jacrev(page["slope"], argnums=1)
        left = page["loss"]({}, omega, times[:, None])
        assert left < 1e-20


def test_frozen_parameters_do_not_train(page, members):
    _, params, x = members
    frozen = {name: p.detach() for name, p in params.items()}
    loss = page["nested_loss"](page["laplacian"], frozen, x)
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


def test_without_argnums_gradients_by_the_parameters(page, members):
    _, params, x = members
    found = vmap(vmap(grad(page["u"]), in_dims=(None, 0)))(params, x)
    assert {name: list(g.shape) for name, g in found.items()} == {
        name: [2, 5, *p.shape[1:]] for name, p in params.items()
    }


def test_no_grad_inside_makes_every_slope_zero(page, members):
    _, params, x = members

    def quiet(params, x):
        with torch.no_grad():
            return page["u"](params, x)

    assert (vmap(vmap(grad(quiet, argnums=1), in_dims=(None, 0)))(params, x) == 0).all()


def test_swapped_vmaps_swap_the_result(page, members):
    _, params, x = members
    swapped = vmap(vmap(page["slope"], in_dims=(0, None)), in_dims=(None, 0))
    assert list(swapped(params, x[0]).shape) == [5, 2, 3]


def test_the_second_derivative_of_relu_is_zero():
    net = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1))
    params = dict(net.named_parameters())
    seconds = jacrev(grad(lambda t: functional_call(net, params, (t,)).squeeze(0)))
    assert (vmap(seconds)(torch.randn(50, 1)) == 0).all()
