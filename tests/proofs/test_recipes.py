"""What plot_recipes.py says: each recipe stands alone, and says what its page says."""

import random
import re

import pytest
import torch
from pages import cells_of, names_of, text_of
from torch.func import vmap
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


def same_text(text, changes=()):
    """Code without comments and indentation, or code in prose; names as changed."""
    for old, new in changes:
        text = text.replace(old, new)
    stripped = (re.sub(r"^# +", "", line.strip()) for line in text.splitlines())
    return "\n".join(line.partition("  # ")[0] for line in stripped)


def recipe(start):
    (code,) = (code for title, code in RECIPES.items() if title.startswith(start))
    return code


# --- each stands alone ------------------------------------------------------------


def test_there_are_many_and_they_are_short():
    assert len(RECIPES) >= 16
    for heading, code in RECIPES.items():
        assert len([line for line in code.splitlines() if line.strip()]) <= 15, heading


@pytest.mark.parametrize("heading", RECIPES)
def test_it_needs_the_setup_alone_and_runs_twice(ensemble, heading, capsys):
    exec(RECIPES[heading], ensemble)
    first = capsys.readouterr().out
    assert first.count("\n") in (1, 2)
    exec(RECIPES[heading], ensemble)
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("seed", range(3))
def test_they_run_in_any_order(ensemble, seed):
    order = list(RECIPES)
    random.Random(seed).shuffle(order)
    for heading in order:
        exec(RECIPES[heading], ensemble)
    assert not ensemble["skeleton"].training
    assert all(p.requires_grad for p in ensemble["params"].values())


@pytest.mark.parametrize("heading", [h for h in RECIPES if "mistake" not in h])
def test_it_names_the_page_that_explains(heading):
    prose = "".join(cell.prose for cell in CODE if cell.heading == heading)
    assert re.search(r"``plot_\w+\.py``", prose)


# --- the same as on the page that explains ----------------------------------------

HERE = [("to(**float64)", "to(device)"), ("fc1.", "body.")]
SHARED = {
    "Train all": (
        "training/plot_training",
        "optimizer.zero_grad()\nlosses.sum().backward()\noptimizer.step()",
    ),
    "Clip the": (
        "training/plot_training",
        "def clip_each(tensors, max_norm):\n"
        "norms = [p.grad.reshape(len(p), -1).norm(dim=1) for p in tensors]\n"
        "norms = torch.stack(norms).norm(dim=0)\n"
        "factors = (max_norm / (norms + 1e-6)).clamp(max=1)\n"
        "for p in tensors:\n"
        "p.grad.mul_(factors.view(-1, *[1] * (p.ndim - 1)))",
    ),
    "Freeze some": (
        "training/plot_state",
        "for name, p in params.items():\n"
        'p.requires_grad_(not name.startswith("body."))',
    ),
    "Freeze the": (
        "training/plot_state",
        "shared = {name: p[0].detach() "
        'for name, p in params.items() if "body." in name}\n'
        "own = {name: p for name, p in params.items() if name not in shared}\n"
        "in_dims = dict.fromkeys(shared, None) | dict.fromkeys(own, 0)",
    ),
    "Take member 3": (
        "training/plot_saving",
        "member = Net().to(device)\n"
        "row = {name: tensor[3] for name, tensor in (params | buffers).items()}\n"
        "member.load_state_dict(row)",
    ),
    "Save the": (
        "training/plot_saving",
        "torch.save((params, buffers), path)\n"
        "params, buffers = torch.load(path, map_location=device)",
    ),
    "Load ten": (
        "training/plot_saving",
        "loaded = [Net().to(device) for _ in paths]\n"
        "for model, path in zip(loaded, paths, strict=True):\n"
        "model.load_state_dict(torch.load(path, map_location=device))",
    ),
    "Split": ("speed/plot_memory", "vmap(predict, chunk_size=2)(params, buffers, "),
    "Compile": ("speed/plot_fastest_ensemble", "= torch.compile(vmap(predict))"),
}


@pytest.mark.parametrize("heading", SHARED)
def test_it_has_the_lines_of_its_page(heading):
    where, lines = SHARED[heading]
    assert lines in same_text(recipe(heading))
    assert lines in same_text(text_of(where), HERE)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
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


def test_the_stack_is_that_of_the_memory_page(ensemble):
    torch.manual_seed(1)
    exec(recipe("Stack without"), ensemble)
    wanted = "stack_one_at_a_time"
    names = names_of("speed/plot_memory", wanted, device=ensemble["device"])
    torch.manual_seed(1)
    expected = names[wanted](ensemble["Net"], 10)
    found = ensemble["params"], ensemble["buffers"]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, t in mine.items():
            torch.testing.assert_close(t, theirs[name], atol=0, rtol=0)
            assert t.requires_grad == theirs[name].requires_grad
            assert t.is_leaf


def test_disagreement_is_the_mutual_information_of_the_page(ensemble):
    exec(recipe("Mean and"), ensemble)
    expected = names_of("uncertainty/plot_unknown_inputs")["mutual_information"](
        ensemble["probs"]
    )
    torch.testing.assert_close(ensemble["disagreement"], expected)


# --- what it says besides ---------------------------------------------------------


def test_three_devices_compute_what_one_computes(ensemble):
    code = recipe("Members on several").replace("[device]", "[device] * 3")
    exec(code, ensemble)
    assert len(ensemble["parts"]) == 3
    state = [ensemble[name] for name in ("params", "buffers", "minibatches")]
    expected = vmap(ensemble["predict"])(*state)
    torch.testing.assert_close(ensemble["logits"], expected)


def test_each_kind_computes_what_its_models_compute(ensemble):
    exec(recipe("Members of different"), ensemble)
    torch.testing.assert_close(ensemble["logits"], ensemble["loop"])


def test_a_backbone_of_all_runs_once_on_a_minibatch_of_all(ensemble):
    head, body = 2 * 16 * 32 * 5, 2 * 16 * 20 * 32
    code, *_ = recipe("Freeze the").partition("optimizer =")
    exec(code, ensemble)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        state = ensemble["shared"] | ensemble["own"], ensemble["fixed"]
        data = ensemble["minibatches"][0], ensemble["labels"][0]
        ensemble["heads_loss"](*state, *data)
    assert counter.get_total_flops() == body + 10 * head


def test_heads_learn_and_what_is_frozen_stays(ensemble):
    for heading in "Freeze some", "Freeze the":
        before = {k: p.detach().clone() for k, p in ensemble["params"].items()}
        exec(recipe(heading), ensemble)
        changed = [
            k for k, p in ensemble["params"].items() if not torch.equal(p, before[k])
        ]
        assert changed == ["head.weight", "head.bias"]


def test_no_member_is_above_the_norm_and_no_small_gradient_changes(ensemble):
    exec(recipe("Clip the"), ensemble)
    exec(
        "for p in params.values(): p.grad = torch.ones_like(p)\n"
        "for p in params.values(): p.grad[3] *= 1e-3\n"
        "clip_each(params.values(), 1.0)",
        ensemble,
    )
    grads = [p.grad.flatten(1) for p in ensemble["params"].values()]
    norms = torch.cat(grads, dim=1).norm(dim=1)
    assert norms.max() < 1 + 1e-5
    torch.testing.assert_close(grads[0][3], torch.full_like(grads[0][3], 1e-3))
