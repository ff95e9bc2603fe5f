"""What plot_fastest_ensemble.py says without showing it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pages import names_of
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

loop = names_of("speed/plot_fastest_ensemble", "loop")["loop"]


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


SIZES = [8, 4, 2, 5]


def test_batch_sizes_take_the_loop_three_forms_but_vmap_of_convolutions_one_each():
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    models = [nn.Sequential(*layers).requires_grad_(False) for _ in range(3)]
    minibatches = [torch.randn(3, size, 1, 8, 8) for size in SIZES]
    params, buffers = stack_module_state(models)

    def predict(params, buffers, x):
        return functional_call(models[0], (params, buffers), (x,), strict=True)

    loops = [(models, list(x)) for x in minibatches]
    assert 2 <= count_compiled(loop, loops) <= 3
    vmaps = [(params, buffers, x) for x in minibatches]
    assert count_compiled(vmap(predict), vmaps) == len(SIZES)


def test_a_dtype_and_a_number_of_threads_take_a_form_each():
    x = torch.ones(4, 2)
    assert count_compiled(torch.sin, [(x,), (x.double(),), (x,)]) == 2
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
    compiled = torch.compile(loop, backend="aot_eager")
    before = compiled(models, [x, x])
    models[1].weight += 1
    after = compiled(models, [x, x])
    assert torch.equal(after[0], before[0])
    assert torch.allclose(after[1], before[1] + 3)


def test_threads_of_a_pool_leave_the_main_thread_its_number():
    before = torch.get_num_threads()
    with ThreadPoolExecutor(2, None, torch.set_num_threads, (1,)) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == before
