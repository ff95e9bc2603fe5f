"""What plot_from_functorch.py says in a clause, and what it does without functorch."""

import copy
import inspect
import sys

import pytest
import torch
from pages import names_of, text_of
from torch import nn
from torch.func import functional_call, stack_module_state

PAGE = "basics/plot_from_functorch"
Net = names_of(PAGE, "Net")["Net"]
TRANSFORMS = ["vjp", "jvp", "jacrev", "jacfwd", "hessian", "functionalize"]

pytestmark = pytest.mark.filterwarnings("ignore:We've integrated functorch")


@pytest.fixture
def functorch():
    return pytest.importorskip("functorch")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().double().eval()


@pytest.fixture
def x():
    return torch.randn(32, 6, dtype=torch.float64)


def state_of(model):
    return dict(model.named_parameters()), dict(model.named_buffers())


def test_where_torch_has_dropped_functorch_the_page_says_so_and_goes_on(
    monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "functorch", None)
    before, _, after = text_of(PAGE).partition("# From JAX, Flax and")
    assert "from functorch import" not in after
    exec(compile(before, PAGE, "exec"), {"__name__": "page"})
    out = capsys.readouterr().out
    assert out.count("no longer runs this") == 2
    assert "torch.func equals the loop" in out
    assert "torch.func equals autograd" in out
    assert "functorch  equals" not in out


@pytest.mark.parametrize("name", ["vmap", "grad", "grad_and_value", *TRANSFORMS])
def test_the_other_names_have_kept_their_arguments(functorch, name):
    old, new = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (getattr(functorch, name), getattr(torch.func, name))
    )
    assert old == new


def test_the_old_function_kept_the_mode_and_functional_call_uses_that_of_the_call(
    functorch, model, x
):
    fmodel, *old = functorch.make_functional_with_buffers(model)
    state = state_of(copy.deepcopy(model))
    before = fmodel(*old, x)
    torch.testing.assert_close(functional_call(model, state, (x,)), before)
    model.train()
    assert torch.equal(fmodel(*old, x), before)
    assert not torch.allclose(functional_call(model, state, (x,)), before)


def test_a_tensor_left_out_was_an_error_and_is_now_that_of_the_module(
    functorch, model, x
):
    fmodel, old, old_buffers = functorch.make_functional_with_buffers(model)
    with pytest.raises(RuntimeError):
        fmodel(old[:-1], old_buffers, x)
    params, buffers = state_of(copy.deepcopy(model))
    del params["fc2.bias"]
    nn.init.zeros_(model.fc2.bias)
    found = functional_call(model, (params, buffers), (x,))
    torch.testing.assert_close(found, model(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        functional_call(model, (params, buffers), (x,), strict=True)


def test_only_the_new_stack_requires_gradients_as_the_models_do(functorch, model):
    model.fc1.requires_grad_(False)
    params, _ = stack_module_state([model])
    frozen = [name for name, p in params.items() if not p.requires_grad]
    assert frozen == ["fc1.weight", "fc1.bias"]
    _, old, _ = functorch.combine_state_for_ensemble([model])
    assert not any(p.requires_grad for p in old)


def test_what_is_written_in_place_reaches_the_model_unless_it_was_cloned(
    functorch, model, x
):
    model.train()
    before = copy.deepcopy(model.state_dict())
    params, buffers = state_of(model)
    cloned = [{k: t.detach().clone() for k, t in d.items()} for d in (params, buffers)]
    functional_call(model, tuple(cloned), (x,), strict=True)
    cloned[0]["fc2.bias"].add_(1)
    functorch.make_functional_with_buffers(model)[1][-1].detach().add_(1)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)

    functional_call(model, (params, buffers), (x,), strict=True)
    params["fc2.bias"].detach().add_(1)
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
    assert not torch.equal(model.fc2.bias, before["fc2.bias"])


def test_a_tuple_as_argument_is_taken_for_two_arguments():
    class First(nn.Module):
        def forward(self, pair, scale=1.0):
            return pair[0] * scale

    pair = torch.ones(2), 2 * torch.ones(2)
    assert torch.equal(functional_call(First(), {}, (pair,)), pair[0])
    assert torch.equal(functional_call(First(), {}, pair), pair[1])  # no error


def test_a_compiled_function_reads_a_tensor_from_outside_at_every_call():
    outside = {"scale": torch.tensor(2.0)}
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    scaled = torch.compile(lambda x: outside["scale"] * x, backend=backend)
    assert scaled(torch.tensor(1.0)) == 2
    outside["scale"] = torch.tensor(3.0)
    assert scaled(torch.tensor(1.0)) == 3
    assert compiled
