"""What plot_hyperparameter_sweep.py calls tested: which optimizers step in lr."""

import copy

import pytest
import torch
from pages import names_of
from torch.func import stack_module_state, vmap

NUM_MODELS, NUM_STEPS = 4, 25
RATES = torch.logspace(-4, -1, NUM_MODELS, dtype=torch.float64)
NO_DECAY = torch.zeros(NUM_MODELS, dtype=torch.float64)


def make_model():
    """Smaller than that of the page, in float64, and smooth."""
    layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    return torch.nn.Sequential(*layers).double()


PAGE = names_of("training/plot_hyperparameter_sweep", "loss_of", "step_each")
PAGE["skeleton"] = make_model().to("meta")
loss_of, step_each = PAGE["loss_of"], PAGE["step_each"]


def distance(make, decays=NO_DECAY, step=step_each):
    """Between members trained together and trained alone; make(params, **options)."""
    torch.manual_seed(0)
    models = [make_model() for _ in range(NUM_MODELS)]
    xs = torch.randn(NUM_STEPS, NUM_MODELS, 16, 6, dtype=torch.float64)
    ys = torch.randint(3, (NUM_STEPS, NUM_MODELS, 16))

    params, _ = stack_module_state(copy.deepcopy(models))
    optimizer = make(params.values(), lr=1.0)
    for x, y in zip(xs, ys, strict=True):
        optimizer.zero_grad()
        vmap(loss_of)(params, x, y).sum().backward()
        step(params, optimizer, RATES, decays)

    gaps = []
    for i, model in enumerate(models):
        own = {"weight_decay": decays[i].item()} if decays.any() else {}
        optimizer = make(model.parameters(), lr=RATES[i].item(), **own)
        for x, y in zip(xs[:, i], ys[:, i], strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        named = model.named_parameters()
        gaps += [(p - params[name][i]).abs().max() for name, p in named]
    return torch.stack(gaps).max().item()


def with_options(kind, **options):
    return lambda params, **more: kind(params, **{**options, **more})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {}),
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        ("SGD", {"momentum": 0.9, "fused": True}),
        ("Adam", {"weight_decay": 0.01, "amsgrad": True}),
        ("Adam", {"fused": True}),
        ("Adam", {"foreach": True}),
        ("AdamW", {"weight_decay": 0.1}),
        ("RMSprop", {"momentum": 0.9}),
        ("Adagrad", {}),
        ("Adagrad", {"fused": True}),
        ("Adadelta", {}),
        ("Adamax", {}),
        ("NAdam", {}),
        ("RAdam", {}),
    ],
)
def test_step_is_proportional_to_rate(name, options):
    assert distance(with_options(getattr(torch.optim, name), **options)) < 1e-10


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_with_a_decay_for_each_member(fused):
    decays = torch.linspace(0, 1, NUM_MODELS, dtype=torch.float64)
    make = with_options(torch.optim.AdamW, weight_decay=0, fused=fused)
    assert distance(make, decays) < 1e-10


@pytest.mark.parametrize("name", ["Rprop", "ASGD", "Adafactor"])
def test_step_is_not_proportional_to_rate(name):
    assert distance(getattr(torch.optim, name)) > 1e-7


# The compiler imports modules of PyTorch that use what PyTorch itself deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_step_each_compiles():
    # Without C++: the compiler's graph, run by PyTorch's own operators.
    step = torch.compile(step_each, backend="aot_eager")
    assert distance(with_options(torch.optim.Adam, fused=True), step=step) < 1e-10
    torch.compiler.reset()
