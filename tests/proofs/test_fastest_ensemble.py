"""What plot_fastest_ensemble.py says without showing it."""

import copy
from functools import partial

import pytest
import torch
from pages import cells_of, names_of
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

NAME = "speed/plot_fastest_ensemble"
PAGE = names_of(NAME, "call", "loop", "by_hand", "SimpleCNN")
call, loop, by_hand, SimpleCNN = map(PAGE.get, ["call", "loop", "by_hand", "SimpleCNN"])
LAST = {"memory_format": torch.channels_last}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def predict_with(skeleton):
    def predict(params, buffers, x):
        return functional_call(skeleton, (params, buffers), (x,), strict=True)

    return predict


def count_compiled(function, calls):
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph

    compiled = torch.compile(function, backend=backend)
    assert all(torch.allclose(compiled(*c), function(*c), atol=1e-6) for c in calls)
    return count


def test_batch_sizes_take_the_loop_three_forms_but_vmap_of_convolutions_one_each():
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    models = [nn.Sequential(*layers).requires_grad_(False) for _ in range(3)]
    minibatches = [torch.randn(3, size, 1, 8, 8) for size in (8, 4, 2, 5)]
    loops = [pair for x in minibatches for pair in zip(models, x, strict=True)]
    assert count_compiled(call, loops[: len(models)]) == 1  # serves all models
    assert 2 <= count_compiled(call, loops) <= 3
    calls = [(*stack_module_state(models), x) for x in minibatches]
    assert count_compiled(vmap(predict_with(models[0])), calls) == 4


class Traffic(TorchDispatchMode):
    every = products = 0  # bytes

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results, name = operator(*args, **(kwargs or {})), str(operator)
        if not (operator.is_view or "_unsafe_view" in name):
            size = sum(getattr(t, "nbytes", 0) for t in tree_leaves((args, results)))
            self.every += size
            self.products += size * ("conv" in name or "mm" in name)
        return results


def test_operations_and_bytes_are_those_of_the_operators():
    models = [SimpleCNN().requires_grad_(False) for _ in range(10)]
    said = {"batch": 4, "models": models}
    (code,) = [cell.code for cell in cells_of(NAME) if "moved = {" in cell.code]
    exec(code, said)
    x, state = torch.randn(10, 4, 1, 28, 28), stack_module_state(models)
    others = [copy.deepcopy(model).to(**LAST) for model in models]
    forms = {
        "loop": partial(loop, models, x),
        "loop in channels_last": partial(loop, others, [a.to(**LAST) for a in x]),
        "vmap": partial(vmap(predict_with(SimpleCNN())), *state, x),
        "vmap by hand": partial(by_hand, state[0], x),
    }
    assert said["moved"].keys() == forms.keys()
    for name, form in forms.items():
        with FlopCounterMode(display=False) as counter, Traffic() as traffic:
            form()
        assert counter.get_total_flops() == said["flops"]
        assert traffic.every == pytest.approx(40 * said["moved"][name], rel=0.01)
        assert traffic.products == pytest.approx(40 * said["products"], rel=0.01)


@pytest.mark.parametrize("ask", [torch.Tensor.to, torch.Tensor.contiguous])
def test_vmap_refuses_to_ask_for_channels_last(ask):
    with pytest.raises(RuntimeError, match=r"memory_format|channels_last"):
        vmap(partial(ask, **LAST))(torch.ones(2, 3, 1, 4, 4))


def test_a_dtype_a_layout_and_a_number_of_threads_take_a_form_each():
    x, before = torch.ones(4, 2, 3, 3), torch.get_num_threads()
    assert count_compiled(torch.sin, [(x,), (x.double(),), (x.to(**LAST),)]) == 3
    calls = ((torch.set_num_threads(before + more), x)[1:] for more in (0, 1))
    assert count_compiled(torch.cos, calls) == 2
    torch.set_num_threads(before)


# The graphs of the compiler, run by PyTorch's own operators: no C++ is compiled.
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # torch's own
def test_compiled_forms_follow_their_weights():
    models = [nn.Linear(3, 2).requires_grad_(False) for _ in range(2)]
    (params, buffers), x = stack_module_state(models), torch.ones(2, 1, 3)
    compiled = torch.compile(call, backend="aot_eager")
    together = torch.compile(vmap(predict_with(models[0])), backend="aot_eager")
    before = loop(models, x, compiled), together(params, buffers, x)
    models[1].weight += 1
    params["weight"][1] += 1
    after = loop(models, x, compiled), together(params, buffers, x)
    for logits in before:
        logits[1] += 3
    torch.testing.assert_close(after, before)
