"""What plot_when_vmap_pays.py says in a clause, on the networks of that page."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode


def mlp():
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 1))


def cnn():
    layers = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9216, 10))


NETWORKS = pytest.mark.parametrize(
    ("build", "shape"), [(mlp, [16]), (cnn, [1, 28, 28])], ids=["mlp", "cnn"]
)


def make(build, shape, num_models, batch, dtype=torch.float64):
    """Models, a minibatch for each, and the function for one member of the stack."""
    torch.manual_seed(0)
    models = [build().to(dtype) for _ in range(num_models)]
    minibatches = torch.randn(num_models, batch, *shape, dtype=dtype)
    with torch.device("meta"):
        skeleton = build()

    def predict(params, buffers, x):
        return functional_call(skeleton, (params, buffers), (x,), strict=True)

    return models, minibatches, predict


@NETWORKS
def test_gradient_of_the_sum_is_the_gradient_of_each_model(build, shape):
    models, minibatches, predict = make(build, shape, num_models=5, batch=3)
    params, buffers = stack_module_state(models)
    losses = vmap(lambda *args: predict(*args).square().mean())
    losses(params, buffers, minibatches).sum().backward()
    for i, (model, x) in enumerate(zip(models, minibatches, strict=True)):
        model(x).square().mean().backward()
        for name, alone in model.named_parameters():
            close = {"atol": 1e-10, "rtol": 1e-10}
            torch.testing.assert_close(params[name].grad[i], alone.grad, **close)


@NETWORKS
def test_stacking_in_the_call_changes_no_bit(build, shape):
    models, minibatches, predict = make(build, shape, 5, 3, torch.float32)
    inside = vmap(predict)(*stack_module_state(models), minibatches)
    params, buffers = stack_module_state(models)
    outside = vmap(predict)(params, buffers, minibatches)
    assert torch.equal(inside, outside)


def test_stacking_copies_every_parameter():
    models, _, _ = make(mlp, [16], num_models=3, batch=1)
    first, _ = stack_module_state(models)
    second, _ = stack_module_state(models)
    places = {
        p.untyped_storage().data_ptr() for model in models for p in model.parameters()
    }
    for name in first:
        new = {stack[name].untyped_storage().data_ptr() for stack in (first, second)}
        assert len(new) == 2
        assert not new & places


@NETWORKS
@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_chunks_compute_the_same(build, shape, chunk_size):
    models, minibatches, predict = make(build, shape, num_models=5, batch=3)
    stack = stack_module_state(models)
    whole = vmap(predict)(*stack, minibatches)
    chunks = vmap(predict, chunk_size=chunk_size)(*stack, minibatches)
    torch.testing.assert_close(chunks, whole, atol=1e-10, rtol=1e-10)


class Count(TorchDispatchMode):
    """Counts the operators that reach the backends."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        return func(*args, **(kwargs or {}))


@NETWORKS
def test_one_call_runs_as_many_operators_for_20_models_as_for_2(build, shape):
    # The overhead, which the page measures, is paid for each of them.
    loops, calls = [], []
    for num_models in (2, 20):
        models, minibatches, predict = make(build, shape, num_models, batch=1)
        stack = stack_module_state(models)
        with torch.no_grad(), Count() as count:
            for model, x in zip(models, minibatches, strict=True):
                model(x)
        loops.append(count.total)
        with torch.no_grad(), Count() as count:
            vmap(predict)(*stack, minibatches)
        calls.append(count.total)
    assert calls[0] == calls[1] < loops[1]
    assert loops[1] >= 9 * loops[0]


@NETWORKS
def test_most_operators_that_vmap_adds_are_in_the_forward_pass(build, shape):
    # Which is why training pays from fewer models on.
    models, minibatches, predict = make(build, shape, num_models=1, batch=3)
    params, buffers = stack_module_state(models)
    predictions = [
        (lambda: models[0](minibatches[0]), models[0].parameters()),
        (lambda: vmap(predict)(params, buffers, minibatches), params.values()),
    ]
    counts = []
    for forward, parameters in predictions:
        optimizer = torch.optim.SGD(parameters, lr=1e-3)
        with Count() as first:
            loss = forward().square().mean()
        with Count() as second:
            loss.backward()
        with Count() as third:
            optimizer.step()
        counts.append([first.total, second.total, third.total])
    forward, backward, step = (b - a for a, b in zip(*counts, strict=True))
    assert forward > backward >= 0
    assert step == 0


def test_costs_of_the_fit_are_the_costs():
    # Times made of known costs; one cost is zero.
    sizes = [[1, n, n * b] for n in (1, 4, 16, 64, 256) for b in (1, 8, 64, 512)]
    sizes = torch.tensor(sizes, dtype=torch.float64)
    for known in [(150e-6, 0.1e-6, 0.05e-6), (0.0, 25e-6, 0.03e-6)]:
        known = torch.tensor(known, dtype=torch.float64)
        one = torch.ones(len(sizes), 1, dtype=torch.float64)
        fit = torch.linalg.lstsq(sizes / (sizes @ known)[:, None], one).solution
        torch.testing.assert_close(fit[:, 0], known, rtol=1e-6, atol=1e-12)
