"""What plot_learn_to_learn.py says in a clause."""

from functools import partial
from itertools import product

import pytest
import torch
from pages import names_of, peak_bytes
from torch import nn
from torch.func import grad, stack_module_state, vmap


def page(*shape, build=None):
    """Functions of the page, a model, its parameters and data of tasks."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    names = names_of("uses/plot_learn_to_learn", device=cpu, slope=None)
    build = build or names["build"]
    with torch.device("meta"):
        names["skeleton"] = build()
    names["slope"] = grad(names["loss"])
    names["adapt"].__defaults__ = 0.03, 1, names["slope"]
    model = build().double()
    data = [[t.double() for t in pair] for pair in names["draw"](*shape)]
    return names, model, dict(model.named_parameters()), data


def of_row(data, row):
    return [[t[row] for t in pair] for pair in data]


def over_tasks(function, params, support, query):
    return vmap(function, in_dims=(None, 0, 0))(params, support, query)


def same(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", [1, 3])
def test_first_order_is_a_loop_with_detached_slopes(steps):
    names, _, params, data = page(5)
    slope = torch.no_grad()(names["slope"])
    way = partial(names["task_loss"], slope=slope, steps=steps)
    once = over_tasks(way, params, *data).mean()
    grad_of, leaves = torch.autograd.grad, list(params.values())

    def detached(error, weights, create_graph):
        return [s.detach() for s in grad_of(error, weights, retain_graph=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", detached)
        loop = names["loop_losses"](params, *data, steps=steps).mean()
    same(grad_of(once, leaves), grad_of(loop, leaves))


@pytest.mark.parametrize("way", ["task_loss", "pooled"])
def test_seeds_and_rates_in_one_call_are_those_of_each_alone(way):
    names, _, _, data = page(3, 4)
    params, _ = stack_module_state([names["build"]().double() for _ in range(6)])
    params = {k: p.detach().unflatten(0, (2, 3)) for k, p in params.items()}
    rates = torch.tensor([0.01, 0.04]).double()
    losses = names["nest"](names[way])(params, *data, rates)
    for rate, seed in product(range(2), range(3)):
        own = {k: p[rate, seed] for k, p in params.items()}
        one = partial(names[way], rate=rates[rate])
        same([losses[rate, seed]], [over_tasks(one, own, *of_row(data, seed))])


def test_batch_norm_takes_the_statistics_of_the_points_of_a_task():
    def build(**track):
        return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8, **track), nn.Tanh())

    names, _, params, data = page(4, build=partial(build, track_running_stats=False))
    losses = over_tasks(names["task_loss"], params, *data)
    same(losses, [names["task_loss"](params, *of_row(data, i)) for i in range(4)])
    names, _, params, _ = page(4, build=build)
    names["skeleton"] = build()
    with pytest.raises(RuntimeError, match="running_mean"):
        over_tasks(names["task_loss"], params, *data)


def test_a_loss_that_uses_the_model_trains_as_pre_training():
    names, model, params, (support, query) = page(5)
    closed = grad(lambda params, x, y: (model(x) - y).square().mean())
    way = partial(names["task_loss"], slope=closed, steps=3)
    once = over_tasks(way, params, support, query).mean()
    pooled = vmap(names["loss"], in_dims=(None, 0, 0))(params, *query).mean()
    leaves = list(params.values())
    same(*[torch.autograd.grad(error, leaves) for error in (once, pooled)])


def test_mistakes_with_a_message():
    names, _, params, data = page(5)

    def by_autograd(params, x, y):
        return torch.autograd.grad(names["loss"](params, x, y), [*params.values()])

    with pytest.raises(RuntimeError, match="does not require grad"):
        over_tasks(partial(names["task_loss"], slope=by_autograd), params, *data)
    adapt = vmap(names["adapt"], in_dims=(None, 0, 0))
    with torch.no_grad():
        adapted = adapt(params, *data[0])
    with pytest.raises(RuntimeError, match="does not require grad"):
        vmap(names["loss"])(adapted, *data[1]).mean().backward()
    with pytest.raises(RuntimeError, match="3D"):
        adapt(adapted, *data[0])


def test_memory_grows_with_inner_steps_but_for_first_order():
    names, _, params, data = page(20)

    def peak(slope, steps):
        way = partial(names["task_loss"], slope=slope, steps=steps)
        return peak_bytes(lambda: over_tasks(way, params, *data).mean().backward())

    slope, first_order = names["slope"], torch.no_grad()(names["slope"])
    assert 1.7 < peak(slope, 10) / peak(slope, 5) < 2
    assert peak(first_order, 10) < 1.1 * peak(first_order, 5)
