"""What plot_faster_training.py says of its steps, and of what the compiler sees."""

import copy
import sys
from types import ModuleType

import pytest
import torch
from pages import names_of
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import grad_and_value, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

# Of torch itself, while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def page(monkeypatch):
    module = ModuleType("faster_training")  # where the compiler looks names up
    names = names_of("training/plot_faster_training", __name__=module.__name__)
    with torch.device("meta"):
        names["skeleton"] = network()
    names["member_gradient"] = grad_and_value(names["member_loss"])
    names["gradient"] = vmap(names["member_gradient"])
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch._dynamo.reset()
    return names


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def some(number=4):
    """Models, stacked parameters, inputs, labels."""
    models = [network() for _ in range(number)]
    params, _ = stack_module_state(models)
    return models, params, torch.randn(number, 8, 6), torch.randint(3, (number, 8))


def test_gradients_by_hand_are_those_of_vmap_and_lie_in_another_order(page):
    _, params, x, y = some()
    params = {name: p.detach().double() for name, p in params.items()}
    found = [page[f](params, x.double(), y) for f in ["gradient", "gradient_by_hand"]]
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)
    strides = [grads["0.weight"].stride() for grads, _ in found]
    assert strides[0] == params["0.weight"].stride() != strides[1]


@pytest.mark.parametrize("cut", [(slice(None), slice(5)), (slice(3), slice(None))])
def test_other_minibatches_and_other_numbers_of_members_are_compiled_anew(page, cut):
    _, params, x, y = some()
    counter = CompileCounter()
    compiled = torch.compile(page["gradient"], backend=counter)
    for _ in range(2):
        compiled(params, x, y)
    assert counter.frame_count == 1
    few = {name: p.detach()[cut[0]].requires_grad_() for name, p in params.items()}
    compiled(few, x[cut], y[cut])
    assert counter.frame_count == 2


def test_the_compiled_loop_compiles_once_for_all_members_and_trains_alike(page):
    models, _, x, y = some()
    others = copy.deepcopy(models)
    counter = CompileCounter()
    page["compiled_member"] = torch.compile(page["member_gradient"], backend=counter)
    rows = [dict(model.named_parameters()) for model in others]
    adams = [torch.optim.Adam(nn.ModuleList(m).parameters()) for m in [models, others]]
    for _ in range(3):
        losses = page["better_loop_step"](models, adams[:1], x, y)
        found = page["compiled_loop_step"](rows, adams[1].step, x, y)
        torch.testing.assert_close(found, losses)
    assert counter.frame_count == 1


class Called(TorchDispatchMode):
    """Names of the operators that a function calls."""

    def __init__(self, function, *args):
        super().__init__()
        self.names = []
        with self:
            function(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_vmap_calls_more_operators_than_by_hand_as_many_for_any_number(page):
    calls = {}
    for name in ["gradient", "gradient_by_hand"]:
        calls[name], more = (Called(page[name], *some(n)[1:]).names for n in [4, 8])
        assert calls[name] == more
    names = ["bmm", "baddbmm", "nll_loss2d_forward"]
    assert list(map(calls["gradient"].count, names)) == [5, 0, 0]
    assert list(map(calls["gradient_by_hand"].count, names)) == [3, 2, 1]
    assert len(calls["gradient"]) > len(calls["gradient_by_hand"])


@pytest.mark.parametrize("fused", [True, False])
def test_a_fused_adam_is_one_operator_for_all_members_an_unfused_one_many(page, fused):
    models, _, *data = some()
    adam = torch.optim.Adam(nn.ModuleList(models).parameters(), fused=fused)
    names = Called(page["better_loop_step"], models, [adam], *data).names
    calls = map(names.count, ["addmm", "_fused_adam_", "lerp_", "addcdiv_"])
    assert list(calls) == ([8, 1, 0, 0] if fused else [8, 0, 16, 16])


@pytest.mark.parametrize("adam", [True, False])
def test_the_step_of_an_optimizer_breaks_the_graph(page, adam):
    _, params, x, y = some()
    update = torch.optim.Adam(params.values()).step if adam else lambda: None
    step = torch.compile(page["train_step"], backend=(counter := CompileCounter()))
    step(page["gradient"], params, update, x, y)
    assert counter.frame_count > 1 if adam else counter.frame_count == 1
