"""What plot_when_vmap_pays.py says in a clause, on the networks of that page."""

import torch
from pages import names_of
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

mlp = names_of("speed/plot_when_vmap_pays", "mlp")["mlp"]


def make(num_models, batch, dtype=torch.float64):
    """Models, a minibatch for each, and the function for one member of the stack."""
    torch.manual_seed(0)
    models = [mlp().to(dtype) for _ in range(num_models)]
    minibatches = torch.randn(num_models, batch, 16, dtype=dtype)
    with torch.device("meta"):
        skeleton = mlp()

    def predict(params, buffers, x):
        return functional_call(skeleton, (params, buffers), (x,), strict=True)

    return models, minibatches, predict


def test_stacking_in_the_call_changes_no_bit():
    models, minibatches, predict = make(5, 3, torch.float32)
    inside = vmap(predict)(*stack_module_state(models), minibatches)
    params, buffers = stack_module_state(models)
    outside = vmap(predict)(params, buffers, minibatches)
    assert torch.equal(inside, outside)


class Count(TorchDispatchMode):
    """Counts the operators that reach the backends."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        return func(*args, **(kwargs or {}))


def test_most_operators_that_vmap_adds_are_in_the_forward_pass():
    # Which is why training should pay from no more models than prediction.
    models, minibatches, predict = make(num_models=1, batch=3)
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
