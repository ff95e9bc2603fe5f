"""What plot_from_functorch.py says in a clause, and what it does without functorch."""

import copy
import inspect
import re
import sys
import types

import pytest
import torch
from pages import names_of, text_of
from torch import nn
from torch.func import functional_call, grad, grad_and_value, stack_module_state, vmap

PAGE = "basics/plot_from_functorch"
Net = names_of(PAGE, "Net")["Net"]
Tied = names_of("training/plot_state", "Tied")["Tied"]
N = 4

pytestmark = pytest.mark.filterwarnings("ignore:We've integrated functorch")


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, pair, scale=1.0):
        return self.w * pair[0] * scale


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def functorch():
    return pytest.importorskip("functorch")


@pytest.fixture
def models():
    return [Net().double().eval() for _ in range(N)]


@pytest.fixture
def x():
    return torch.randn(N, 32, 6, dtype=torch.float64)


def state_of(model):
    return dict(model.named_parameters()), dict(model.named_buffers())


def first_half():
    """The page's code up to the part on JAX; nothing behind it uses functorch."""
    before, heading, after = text_of(PAGE).partition("# From JAX, Flax and")
    assert heading
    assert "import functorch" not in after
    assert "from functorch import" not in after
    return compile(before, PAGE, "exec")


@pytest.mark.parametrize(
    ("fake", "reason"),
    [(None, "import of functorch halted"), (types.ModuleType("functorch"), "cannot")],
    ids=["the package", "its functions"],
)
def test_where_torch_has_dropped_functorch_the_page_says_so_and_goes_on(
    fake, reason, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "functorch", fake)
    exec(first_half(), {"__name__": "page"})
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if "no longer runs this" in line]
    assert len(said) == 2
    assert all(reason in line for line in said)
    assert sum(line.startswith("torch.func") for line in lines) == 2
    assert not any(line.startswith("functorch ") for line in lines)


def test_where_functorch_is_there_the_page_runs_it_and_shows_its_warnings(
    functorch, capsys
):
    exec(first_half(), {"__name__": "page"})
    out = capsys.readouterr().out
    assert "no longer runs this" not in out
    said = " ".join(out.split())
    assert "`functorch.combine_state_for_ensemble` is deprecated" in said
    assert "`functorch.vmap` is deprecated" in said
    assert "functorch  equals the loop" in out
    assert "functorch  equals autograd" in out
    far = float(re.search(r"skeleton in train mode: off by ([\d.]+)", out)[1])
    assert far > 0


def test_the_three_silent_changes_are_there_and_functorch_did_the_opposite(
    functorch, models, x
):
    model = models[0]
    assert stack_module_state([model])[0]["fc1.weight"].requires_grad
    assert not functorch.combine_state_for_ensemble([model])[1][0].requires_grad

    fmodel, old, old_buffers = functorch.make_functional_with_buffers(model)
    params, buffers = state_of(model)
    assert params["fc1.weight"] is model.fc1.weight
    assert old[0].data_ptr() != model.fc1.weight.data_ptr()

    buffers = {name: b.clone() for name, b in buffers.items()}
    old_logits = fmodel(old, old_buffers, x[0])
    logits = functional_call(model, (params, buffers), (x[0],))
    model.train()
    assert torch.equal(fmodel(old, old_buffers, x[0]), old_logits)
    assert not torch.equal(functional_call(model, (params, buffers), (x[0],)), logits)


@pytest.mark.parametrize(
    "name",
    [
        "vmap",
        "grad",
        "grad_and_value",
        "vjp",
        "jvp",
        "jacrev",
        "jacfwd",
        "hessian",
        "functionalize",
    ],
)
def test_the_other_names_have_kept_their_arguments(functorch, name):
    old, new = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (getattr(functorch, name), getattr(torch.func, name))
    )
    assert old == new


def test_only_the_new_stack_keeps_what_is_frozen(functorch, models):
    for model in models:
        model.fc1.requires_grad_(False)
    params, _ = stack_module_state(models)
    frozen = [name for name, p in params.items() if not p.requires_grad]
    assert frozen == ["fc1.weight", "fc1.bias"]
    _, old, _ = functorch.combine_state_for_ensemble(models)
    assert not any(p.requires_grad for p in old)


def test_disable_autograd_tracking_is_a_detach(functorch, models):
    options = {"disable_autograd_tracking": True}
    _, old, _ = functorch.make_functional_with_buffers(models[0], **options)
    assert not any(p.requires_grad for p in old)
    new = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    torch.testing.assert_close(list(new.values()), [p.detach() for p in old])


def test_an_update_in_place_and_statistics_reach_the_model_and_a_clone_keeps_them_away(
    models, x
):
    model = models[0].train()
    params, buffers = state_of(model)
    before = copy.deepcopy(model.state_dict())
    cloned = [{k: t.detach().clone() for k, t in d.items()} for d in (params, buffers)]
    functional_call(model, tuple(cloned), (x[0],), strict=True)
    cloned[0]["fc2.bias"].add_(1)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    functional_call(model, (params, buffers), (x[0],), strict=True)
    params["fc2.bias"].detach().add_(1)
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
    assert not torch.equal(model.fc2.bias, before["fc2.bias"])


def test_the_stack_of_an_ensemble_is_a_copy_then_as_now(functorch, models):
    before = copy.deepcopy(models[0].fc2.bias)
    new, _ = stack_module_state(models)
    new["fc2.bias"].detach().add_(1)
    functorch.combine_state_for_ensemble(models)[1][-1].add_(1)
    assert torch.equal(models[0].fc2.bias, before)


def test_a_skeleton_is_in_train_mode_and_the_old_function_in_that_of_the_models(
    functorch, models, x
):
    expected = torch.stack([m(rows) for m, rows in zip(models, x, strict=True)])
    skeleton = Net().to("meta")
    fmodel = names_of(PAGE, "fmodel", skeleton=skeleton)["fmodel"]
    old = functorch.vmap((combined := functorch.combine_state_for_ensemble(models))[0])
    torch.testing.assert_close(old(*combined[1:], x), expected.detach())
    assert (vmap(fmodel)(*stack_module_state(models), x) - expected).abs().max() > 1e-3
    skeleton.eval()
    torch.testing.assert_close(vmap(fmodel)(*stack_module_state(models), x), expected)


def test_a_tensor_left_out_was_an_error_and_is_now_that_of_the_module(
    functorch, models, x
):
    fmodel, old, old_buffers = functorch.make_functional_with_buffers(models[0])
    for missing in range(len(old)):
        with pytest.raises(RuntimeError):
            fmodel(old[:missing] + old[missing + 1 :], old_buffers, x[0])
    params, buffers = state_of(models[1])
    bias = params.pop("fc2.bias")
    found = functional_call(models[0], (params, buffers), (x[0],))
    expected = models[1](x[0]) - bias + models[0].fc2.bias
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="Missing key"):
        functional_call(models[0], (params, buffers), (x[0],), strict=True)


def test_both_keep_a_tie(functorch):
    """And a skeleton copied to meta loses it: test_state.py."""
    tied = [Tied() for _ in range(N)]
    tokens = torch.arange(5 * N).reshape(N, 5) % 11
    expected = torch.stack([m(row) for m, row in zip(tied, tokens, strict=True)])
    fmodel, *state = functorch.combine_state_for_ensemble(tied)
    assert len(state[0]) == 1
    torch.testing.assert_close(functorch.vmap(fmodel)(*state, tokens), expected.data)
    with torch.device("meta"):
        skeleton = Tied()
    new = names_of(PAGE, "fmodel", skeleton=skeleton)["fmodel"]
    torch.testing.assert_close(vmap(new)(*stack_module_state(tied), tokens), expected)


def test_a_tuple_as_argument_is_taken_for_two_arguments(functorch):
    pair = torch.ones(2), 2 * torch.ones(2)
    model = First()
    fmodel, old = functorch.make_functional(model)
    params, _ = state_of(model)
    assert torch.equal(fmodel(old, pair), pair[0])
    assert torch.equal(functional_call(model, params, (pair,)), pair[0])
    assert torch.equal(functional_call(model, params, pair), pair[1])  # no error


def test_an_old_tuple_gets_its_names_back(functorch, models, x):
    _, old, _ = functorch.combine_state_for_ensemble(models)
    params, _ = stack_module_state(models)
    named = dict(zip(params, old, strict=True))
    torch.testing.assert_close(named, {k: p.detach() for k, p in params.items()})


def test_grad_and_value_has_gradients_first_and_detach_stops_them():
    w = torch.tensor(3.0, dtype=torch.float64)
    gradient, value = grad_and_value(lambda w: w**2)(w)
    assert (gradient, value) == (6, 9)
    assert grad(lambda w: w * w.detach())(w) == 3


def test_in_dims_takes_a_dictionary_as_in_axes_takes_a_pytree(models, x):
    params, buffers = stack_module_state(models)
    params["fc2.bias"] = params["fc2.bias"][0]  # shared by all members
    in_dims = {name: 0 for name in params} | {"fc2.bias": None}

    fmodel = names_of(PAGE, "fmodel", skeleton=models[0])["fmodel"]
    found = vmap(fmodel, in_dims=(in_dims, 0, None))(params, buffers, x[0])
    shift = models[0].fc2.bias
    expected = torch.stack([m(x[0]) - m.fc2.bias + shift for m in models])
    torch.testing.assert_close(found, expected)


def test_a_compiled_function_reads_a_tensor_from_outside_at_every_call():
    outside = {"scale": torch.tensor(2.0)}
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    scaled = torch.compile(lambda x: outside["scale"] * x, backend=backend)
    assert scaled(torch.tensor(1.0)) == 2
    outside["scale"] = torch.tensor(3.0)
    assert scaled(torch.tensor(1.0)) == 3
    assert calls  # it was compiled
