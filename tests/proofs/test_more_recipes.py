"""What plot_more_recipes.py says: each recipe needs the set-up alone, and clauses."""

import sys
import types
import warnings

import pytest
import torch
from pages import cells_of, names_of
from torch.func import vmap

CODE = [cell for cell in cells_of("uses/plot_more_recipes") if cell.code]
RECIPES = {}
for cell in CODE:
    RECIPES[cell.heading] = RECIPES.get(cell.heading, "") + cell.code + "\n"
SETUP = RECIPES.pop(CODE[0].heading)
STACKS = {"params": "models", "graph_params": "nets", "tables": "bags"}
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture
def names(monkeypatch):
    """What the set-up defines, in a module that torch.compile finds."""
    module = types.ModuleType("recipes")
    monkeypatch.setitem(sys.modules, "recipes", module)
    exec(SETUP, vars(module))
    return vars(module)


@pytest.fixture
def double(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def recipe(start):
    (code,) = (code for title, code in RECIPES.items() if title.startswith(start))
    return code


@pytest.mark.parametrize("heading", RECIPES)
def test_it_needs_the_setup_alone_and_runs_twice(names, heading, capsys):
    exec(RECIPES[heading], names)
    first = capsys.readouterr().out
    assert first.count("\n") in (1, 2)
    exec(RECIPES[heading], names)
    assert capsys.readouterr().out == first


def test_they_run_in_any_order(names):
    for heading in reversed(RECIPES):
        exec(RECIPES[heading], names)


TRIED = {title: code for title, code in RECIPES.items() if "mistake" not in title}
TRIED |= {way: recipe("Gr").replace('"mean"', f'"{way}"') for way in ("sum", "amax")}


@pytest.mark.parametrize("code", TRIED.values(), ids=TRIED)
def test_it_is_its_loop_in_float64_and_so_are_gradients(double, names, code):
    checked = []

    def check(at_once, loop):
        loop = torch.stack([*loop])
        torch.testing.assert_close(at_once, loop, **EXACT)
        checked.append(at_once.dtype)
        weight = torch.randn_like(loop)
        for stack in STACKS.keys() & names.keys() if at_once.requires_grad else ():
            nets = [dict(net.named_parameters()) for net in names[STACKS[stack]]]
            for name, p in names[stack].items():
                alone = [net[name] for net in nets]
                options = {"retain_graph": True, "materialize_grads": True}
                (found,) = torch.autograd.grad(at_once, p, weight, **options)
                expected = torch.autograd.grad(loop, alone, weight, **options)
                torch.testing.assert_close(found, torch.stack(expected), **EXACT)

    names["check"] = check
    exec(code, names)
    assert set(checked) == {torch.float64}


def test_a_minibatch_of_graphs_is_one_graph_and_own_graphs_run_at_once(names):
    exec(recipe("Graph"), names)
    net, graphs = names["nets"][0], names["graphs"]
    before = torch.tensor([0, *[len(x) for x, _ in graphs]]).cumsum(0).tolist()
    pairs = zip(graphs, before[:-1], strict=True)
    edges = torch.cat([edges + first for (_, edges), first in pairs], dim=1)
    expected = torch.cat([net(*graph) for graph in graphs])
    torch.testing.assert_close(net(torch.cat([x for x, _ in graphs]), edges), expected)

    calls, own = [], (torch.stack(names["own"]), torch.stack(names["joined"]))
    with names_of("basics/plot_silent_mistakes", "Record", calls=calls)["Record"]():
        vmap(names["run"])(names["graph_params"], *own)
    assert calls.count("scatter_reduce") == 2  # of two layers


def test_what_loops(names):
    for start in "Multiply", "A bag":
        exec(recipe(start), names)
    A, tables, own = names["A"], names["tables"], torch.randn(10, 20, 8)
    whole, tokens = names["functional_call"], names["tokens"]
    with pytest.warns(UserWarning, match="performance drop"):
        vmap(torch.sparse.mm, (None, 0))(A, own)
    with pytest.warns(UserWarning, match="performance drop"):
        vmap(lambda state: whole(names["bags"][0], state, (tokens,)))(tables)
    with warnings.catch_warnings(action="ignore"):  # that CSR is in beta
        csr = names["multiply"](A.to_sparse_csr(), own)
    torch.testing.assert_close(csr, names["multiply"](A, own))


def test_a_registered_dataclass_is_an_argument_and_holds_no_number(names):
    exec(recipe("A model that returns"), names)
    out, kind = names["out"], names["Output"]
    torch.testing.assert_close(vmap(lambda out: 2 * out.mean)(out), 2 * out.mean)
    with pytest.raises(ValueError, match="must only return Tensors"):
        vmap(lambda x: kind(x, 3))(names["x"])


def test_inside_nothing_is_compiled_and_outside_one_graph(names, capsys):
    exec(recipe("The mistake"), names)
    found = capsys.readouterr().out.split("compiled")
    assert [part.split()[-1] for part in found[:-1] if ": " in part] == ["0", "1"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_makes_a_compiled_function_inside_of_vmap_an_error(names, backend):
    inside = torch.compile(names["predict"], backend=backend, fullgraph=True)
    with pytest.raises(Exception, match="functorch"):
        vmap(inside, (0, None))(names["params"], names["x"])


def test_readout_with_padding_is_wrong(names):
    exec(recipe("Graph"), names)
    graphs, run = names["graphs"], names["run"]
    own = torch.stack(names["own"]), torch.stack(names["joined"])
    everything = vmap(run)(names["graph_params"], *own).mean(dim=1)
    assert len(graphs) == len(everything)
    assert (everything - names["readout"]).abs().max() > 1e-3


def test_a_sparse_matrix_for_each_member():
    dense = torch.rand(3, 20, 20, dtype=torch.float64) * (torch.rand(3, 20, 20) < 0.1)
    xs = torch.randn(3, 20, 8, dtype=torch.float64, requires_grad=True)
    out = torch.stack([matrix.to_sparse() for matrix in dense]).bmm(xs)
    torch.testing.assert_close(out, dense @ xs, **EXACT)
    slope, expected = (torch.autograd.grad(v.sum(), xs)[0] for v in (out, dense @ xs))
    torch.testing.assert_close(slope, expected, **EXACT)


def test_the_gradient_of_a_hidden_layer(names, double):
    exec(recipe("Return a hidden"), names)
    params, call, x = (names[name] for name in ("params", "with_hidden", "x"))
    calls = []
    hook = names["skeleton"].body.register_full_backward_hook(
        lambda *_: calls.append(1)
    )
    out, hidden = vmap(call, in_dims=(0, None))(params, x)
    (slope,) = torch.autograd.grad(out.square().sum(), hidden, retain_graph=True)
    out.sum().backward()
    hook.remove()
    assert not calls
    for i, model in enumerate(names["models"]):
        kept = model.body(x)
        (alone,) = torch.autograd.grad(model.head(kept).square().sum(), kept)
        torch.testing.assert_close(slope[i], alone)
