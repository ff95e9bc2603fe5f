"""What plot_fastest_ensemble.py says without showing it."""

import copy
from functools import partial

import pytest
import torch
from pages import cells_of, names_of
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

NAME = "speed/plot_fastest_ensemble"
PAGE = names_of(NAME, *(NAMES := ["call", "loop", "by_hand", "SimpleCNN"]))
call, loop, by_hand, SimpleCNN = map(PAGE.get, NAMES)
LAST = {"memory_format": torch.channels_last}


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield torch.compiler.reset()
    torch.compiler.reset()


def predict_with(model):  # in this file, so that the compiler finds its globals
    return lambda params, buffers, x: functional_call(model, (params, buffers), (x,))


def count_compiled(functions, calls):
    counter = CompileCounter()
    for function, inputs in zip(functions, calls, strict=True):
        logits = torch.compile(function, backend=counter)(*inputs)
        assert torch.allclose(logits, function(*inputs), atol=1e-6)
    return counter.frame_count


def test_batch_sizes_take_the_loop_three_forms_but_vmap_of_convolutions_one_each():
    layers = nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 5)
    models = [nn.Sequential(*layers).requires_grad_(False) for _ in range(3)]
    minibatches = [torch.randn(3, size, 1, 8, 8) for size in (8, 4, 2, 5)]
    loops = [pair for x in minibatches for pair in zip(models, x, strict=True)]
    assert count_compiled([call] * 3, loops[:3]) == 1  # serves all models
    assert 2 <= count_compiled([call] * 12, loops) <= 3
    calls = [(*stack_module_state(models), x) for x in minibatches]
    assert count_compiled([vmap(predict_with(models[0]))] * 4, calls) == 4


def test_all_compiled_vmaps_share_eight_forms_but_functions_around_one_do_not():
    names, calls = "sin cos tan exp log sqrt abs neg ceil", [[torch.ones(2)]] * 9
    ones = [{"vmap": vmap, "one": getattr(torch, name)} for name in names.split()]
    assert count_compiled([vmap(each["one"]) for each in ones], calls) == 8
    assert count_compiled([eval("lambda x: vmap(one)(x)", e) for e in ones], calls) == 9
    sizes = [[torch.ones([2] * dims)] for dims in range(9)]
    assert count_compiled([torch.sin] * 9, sizes) == 8


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
    exec(next(c.code for c in cells_of(NAME) if "moved = {" in c.code), said)
    x, state = torch.randn(10, 4, 1, 28, 28), stack_module_state(models)
    others = [copy.deepcopy(model).to(**LAST) for model in models]
    forms = {
        "loop": partial(loop, models, x),
        "loop in channels_last": partial(loop, others, [a.to(**LAST) for a in x]),
        "vmap": partial(vmap(predict_with(models[0])), *state, x),
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
    assert count_compiled([torch.sin] * 3, [[x], [x.double()], [x.to(**LAST)]]) == 3
    calls = ((torch.set_num_threads(before + more), x)[1:] for more in (0, 1))
    assert count_compiled([torch.cos] * 2, calls) == 2
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
