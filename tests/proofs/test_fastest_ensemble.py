"""What plot_fastest_ensemble.py says without showing it."""

import pytest
import torch
from pages import names_of
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

PAGE = names_of("speed/plot_fastest_ensemble", "call", "loop", "by_hand", "SimpleCNN")
call, loop, by_hand, SimpleCNN = map(PAGE.get, ["call", "loop", "by_hand", "SimpleCNN"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def count_compiled(function, calls):
    """How many forms torch.compile makes of a function for these calls."""
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph

    compiled = torch.compile(function, backend=backend)
    for call in calls:
        assert torch.allclose(compiled(*call), function(*call), atol=1e-6)
    return count


def test_batch_sizes_take_the_loop_three_forms_but_vmap_of_convolutions_one_each():
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    models = [nn.Sequential(*layers).requires_grad_(False) for _ in range(3)]
    minibatches = [torch.randn(3, size, 1, 8, 8) for size in (8, 4, 2, 5)]
    params, buffers = stack_module_state(models)

    def predict(params, buffers, x):
        return functional_call(models[0], (params, buffers), (x,), strict=True)

    loops = [pair for x in minibatches for pair in zip(models, x, strict=True)]
    assert count_compiled(call, loops[: len(models)]) == 1  # serves all models
    assert 2 <= count_compiled(call, loops) <= 3
    vmaps = [(params, buffers, x) for x in minibatches]
    assert count_compiled(vmap(predict), vmaps) == 4


def test_vmap_adds_biases_apart_and_copies_and_the_form_by_hand_does_not():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            names.append(operator.name())
            return operator(*args, **(kwargs or {}))

    models = [SimpleCNN().requires_grad_(False) for _ in range(3)]
    params, _ = stack_module_state(models)
    x, results, seen = torch.randn(3, 2, 1, 28, 28), [], []

    def predict(params, x):
        return functional_call(models[0], params, (x,), strict=True)

    for form in (vmap(predict), by_hand):
        names = []
        with Names():
            results.append(form(params, x))
        before_pooling = names[: names.index("aten::max_pool2d_with_indices")]
        seen.append(
            [before_pooling.count(f"aten::{n}") for n in ("add.Tensor", "clone")]
        )
    torch.testing.assert_close(*results)
    assert seen == [[2, 1], [0, 0]]


def test_a_dtype_a_layout_and_a_number_of_threads_take_a_form_each():
    x = torch.ones(4, 2, 3, 3)
    last = x.contiguous(memory_format=torch.channels_last)
    assert count_compiled(torch.sin, [(x,), (x.double(),), (last,), (x,)]) == 3
    before = torch.get_num_threads()

    def with_other_threads():
        yield (x,)
        torch.set_num_threads(before + 1)
        yield (x,)

    try:
        assert count_compiled(torch.cos, with_other_threads()) == 2
    finally:
        torch.set_num_threads(before)


# With gradients it converts a weight once; without, in every call.
@pytest.mark.parametrize(("grad", "second"), [(False, 3), (True, 1)])
def test_autocast_converts_weights_without_gradients_in_every_call(grad, second):
    class Count(TorchDispatchMode):
        conversions = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.conversions += function is torch.ops.aten._to_copy.default
            return function(*args, **(kwargs or {}))

    model, x = nn.Linear(3, 2).requires_grad_(grad), torch.ones(1, 3)
    with Count() as counter, torch.autocast("cpu", torch.bfloat16):
        model(x)
        assert counter.conversions == 3  # weight, bias, input
        model(x)
        assert counter.conversions == 3 + second


# The graphs of the compiler, run by PyTorch's own operators: no C++ is compiled.
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # torch's own
def test_compiled_loop_follows_its_weights():
    models = [nn.Linear(3, 2).requires_grad_(False) for _ in range(2)]
    x = torch.ones(1, 3)
    compiled = torch.compile(call, backend="aot_eager")
    before = loop(models, [x, x], compiled)
    models[1].weight += 1
    after = loop(models, [x, x], compiled)
    assert torch.equal(after[0], before[0])
    assert torch.allclose(after[1], before[1] + 3)
