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


def test_a_backward_pass_never_reaches_models_that_are_stacked_in_the_call():
    models, minibatches, predict = make(5, 3)
    vmap(predict)(*stack_module_state(models), minibatches).sum().backward()
    assert all(p.grad is None for model in models for p in model.parameters())


class Count(TorchDispatchMode):
    """Counts the operators that reach the backends."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        return func(*args, **(kwargs or {}))


def counts_of(step, optimizer, losses):
    """Operators of the forward pass, of the backward pass and of the optimizer."""
    with Count() as whole:
        step(optimizer, losses)
    with Count() as clear:
        optimizer.zero_grad()
    with Count() as forward:
        outputs = losses()
    with Count() as backward:
        outputs.sum().backward()
    with Count() as update:
        optimizer.step()
    counts = [forward.total, backward.total, clear.total + update.total]
    assert whole.total == sum(counts)
    return counts


def test_most_operators_that_vmap_adds_are_in_the_forward_pass():
    # Which is why training should pay from no more models than prediction.
    seen = []
    wanted = ["compare_training", "step"]
    given = {"device": torch.device("cpu"), "in_turns": lambda *ways, **_: ways}
    page = names_of("speed/plot_when_vmap_pays", *wanted, **given)
    ways = page["compare_training"](mlp, 1, 3, [16])  # as the page builds them
    step, page["step"] = page["step"], lambda *args: seen.append(counts_of(step, *args))
    for way in ways:
        way()
    forward, backward, update = (b - a for a, b in zip(*seen, strict=True))
    assert forward > backward >= 0
    assert update == 0
