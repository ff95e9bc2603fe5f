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
        names["skeleton"] = nn.Sequential(nn.Linear(6, 3))
    names["gradient"] = vmap(grad_and_value(names["member_loss"]))
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch._dynamo.reset()
    return names


def some_models():
    models = [nn.Sequential(nn.Linear(6, 3)).double() for _ in range(4)]
    x = torch.randn(4, 8, 6, dtype=torch.float64)
    return models, x, torch.randint(3, (4, 8))


@pytest.mark.parametrize("whole", [False, True])
def test_a_step_keeps_the_parameters_where_they_are_and_changes_all(page, whole):
    models, x, y = some_models()
    params, *rest = page["begin"](models)
    before = [(p, p.data_ptr(), p.clone()) for p in params.values()]
    if whole:
        page["whole_step"](params, *rest, x, y)
    else:
        update = torch.optim.Adam(params.values(), fused=True).step
        page["train_step"](page["gradient"], params, update, x, y)
    for p, place, values in before:
        assert p.data_ptr() == place
        assert not torch.equal(p, values)


def test_the_state_does_not_share_memory_with_the_models(page):
    models, *_ = some_models()
    params, means, _, count = page["begin"](models)
    params["0.weight"].zero_()
    assert all(model[0].weight.abs().sum() > 0 for model in models)
    assert means["0.weight"].eq(0).all()
    assert count == 0


def test_a_fused_optimizer_gets_gradients_in_the_order_of_its_parameters(page):
    grads = {"weight": torch.randn(4, 3, 6).mT}
    found = []
    for fused in [False, True]:
        params = {"weight": torch.zeros(4, 6, 3)}
        update = torch.optim.SGD(params.values(), lr=1.0, fused=fused).step
        page["train_step"](lambda *_: (grads, None), params, update, None, None)
        found.append(params["weight"])
    assert torch.equal(*found)


@pytest.mark.parametrize("cut", [(slice(None), slice(5)), (slice(3), slice(None))])
def test_other_minibatches_and_other_numbers_of_members_are_compiled_anew(page, cut):
    models, x, y = some_models()
    params, _ = stack_module_state(models)
    params = {name: p.detach() for name, p in params.items()}
    counter = CompileCounter()
    compiled = torch.compile(page["gradient"], backend=counter)
    for _ in range(2):
        compiled(params, x, y)
    assert counter.frame_count == 1
    compiled({name: p[cut[0]] for name, p in params.items()}, x[cut], y[cut])
    assert counter.frame_count == 2


class Called(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_vmap_adds_the_bias_after_the_product_and_takes_the_loss_apart(page):
    page["skeleton"] = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    models = [copy.deepcopy(page["skeleton"]) for _ in range(4)]
    params = page["begin"](models)[0]
    x, y = torch.randn(4, 8, 6), torch.randint(3, (4, 8))
    calls = {}
    for name in ["gradient", "gradient_by_hand"]:
        with Called() as called, torch.no_grad():
            page[name](params, x, y)
        calls[name] = called.names
    names = ["bmm", "baddbmm", "nll_loss2d_forward"]
    assert list(map(calls["gradient"].count, names)) == [5, 0, 0]
    assert list(map(calls["gradient_by_hand"].count, names)) == [3, 2, 1]
    assert len(calls["gradient"]) > len(calls["gradient_by_hand"])


def test_the_step_of_an_optimizer_breaks_the_graph_and_the_whole_step_does_not(page):
    models, x, y = some_models()
    params, _ = stack_module_state(models)
    update = torch.optim.Adam(params.values()).step
    counter = CompileCounter()
    compiled = torch.compile(page["train_step"], backend=counter)
    compiled(page["gradient"], params, update, x, y)
    assert counter.frame_count > 1
    counter = CompileCounter()
    compiled = torch.compile(page["whole_step"], backend=counter, fullgraph=True)
    for _ in range(3):
        compiled(*page["begin"](models), x, y)
    assert counter.frame_count == 1
