"""What plot_recipes.py says: each recipe needs the set-up alone, and other clauses."""

import pytest
import torch
from pages import cells_of, names_of
from torch.func import stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode

CODE = [cell for cell in cells_of("basics/plot_recipes") if cell.code]
SETUP = [cell.code for cell in CODE if cell.heading == CODE[0].heading]
RECIPES = {cell.heading: cell.code for cell in CODE if cell.code not in SETUP}


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    # The page itself compiles; here it is enough that the names are there.
    monkeypatch.setattr(torch, "compile", lambda function: function)


@pytest.fixture
def ensemble():
    """The names that the set-up defines."""
    names = {"__name__": "recipes"}
    for code in SETUP:
        exec(code, names)
    return names


def recipe(start):
    (code,) = (code for title, code in RECIPES.items() if title.startswith(start))
    return code


@pytest.mark.parametrize("heading", RECIPES)
def test_it_needs_the_setup_alone_and_runs_twice(ensemble, heading, capsys):
    exec(RECIPES[heading], ensemble)
    first = capsys.readouterr().out
    assert first.count("\n") in (1, 2)
    exec(RECIPES[heading], ensemble)
    assert capsys.readouterr().out == first
    assert not any(module.training for module in ensemble["skeleton"].modules())
    assert all(p.requires_grad for p in ensemble["params"].values())


def test_they_run_in_any_order(ensemble):
    for heading in reversed(RECIPES):
        exec(RECIPES[heading], ensemble)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
def test_the_learning_rates_are_those_of_the_sweep(ensemble, optimizer):
    params = {k: p.detach().clone() for k, p in ensemble["params"].items()}
    code, *_ = recipe("A learning rate").partition("by_hand")
    options = "lr=1, weight_decay=0"
    exec(code.replace("SGD(", f"{optimizer}(").replace("lr=1", options), ensemble)
    step_each = names_of("training/plot_hyperparameter_sweep", "step_each")["step_each"]
    for name, p in params.items():
        p.requires_grad_().grad = ensemble["params"][name].grad
    again = getattr(torch.optim, optimizer)(params.values(), lr=1, weight_decay=0)
    rates = ensemble["rates"]
    step_each(params, again, rates, torch.zeros_like(rates))
    for name, p in params.items():
        assert torch.equal(p, ensemble["params"][name]), name


def test_the_stack_without_every_model_twice_is_that_of_stack_module_state(ensemble):
    torch.manual_seed(1)
    exec(recipe("Stack without"), ensemble)
    torch.manual_seed(1)
    models = [ensemble["Net"]().to(ensemble["device"]) for _ in range(10)]
    expected = stack_module_state(models)
    found = ensemble["params"], ensemble["buffers"]
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert all(p.is_leaf and p.requires_grad for p in ensemble["params"].values())


def test_disagreement_is_the_mutual_information_of_the_page(ensemble):
    exec(recipe("Mean and"), ensemble)
    expected = names_of("uncertainty/plot_unknown_inputs")["mutual_information"](
        ensemble["probs"]
    )
    torch.testing.assert_close(ensemble["disagreement"], expected)


def test_three_devices_compute_what_one_computes(ensemble):
    code = recipe("Members on several").replace("[device]", "[device] * 3")
    exec(code, ensemble)
    assert len(ensemble["parts"]) == 3
    state = [ensemble[name] for name in ("params", "buffers", "minibatches")]
    expected = vmap(ensemble["predict"])(*state)
    torch.testing.assert_close(ensemble["logits"], expected)


def test_a_backbone_of_all_runs_once_on_a_minibatch_of_all(ensemble):
    head, body = 2 * 16 * 32 * 5, 2 * 16 * 20 * 32
    code, *_ = recipe("Freeze the").partition("optimizer =")
    exec(code, ensemble)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        state = ensemble["shared"] | ensemble["own"], ensemble["fixed"]
        data = ensemble["minibatches"][0], ensemble["labels"][0]
        ensemble["heads_loss"](*state, *data)
    assert counter.get_total_flops() == body + 10 * head


def test_members_may_be_dimension_1_of_the_data(ensemble):
    state = ensemble["params"], ensemble["buffers"]
    data = ensemble["minibatches"]
    dims = {"in_dims": (0, 0, 1), "out_dims": 1}
    found = vmap(ensemble["predict"], **dims)(*state, data.transpose(0, 1))
    torch.testing.assert_close(
        found.transpose(0, 1), vmap(ensemble["predict"])(*state, data)
    )
