"""What plot_hyperparameter_sweep.py calls tested: steps in lr, kept rows, own betas."""

import pytest
import torch
from pages import names_of
from torch.func import stack_module_state, vmap

NUM_MODELS, NUM_STEPS = 4, 25
RATES = torch.logspace(-4, -1, NUM_MODELS, dtype=torch.float64)
NO_DECAY = torch.zeros(NUM_MODELS, dtype=torch.float64)
NAMES = "loss_of", "step_each", "train", "keep", "adam_step"


def make_model():
    """Smaller than that of the page, in float64, and smooth."""
    layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    return torch.nn.Sequential(*layers).double()


PAGE = names_of("training/plot_hyperparameter_sweep", *NAMES)
PAGE["skeleton"] = make_model().to("meta")
loss_of, step_each, train, keep, adam_step = (PAGE[name] for name in NAMES)


def problem():
    torch.manual_seed(0)
    models = [make_model() for _ in range(NUM_MODELS)]
    xs = torch.randn(NUM_STEPS, NUM_MODELS, 16, 6, dtype=torch.float64)
    ys = torch.randint(3, (NUM_STEPS, NUM_MODELS, 16))
    return models, stack_module_state(models)[0], xs, ys


def gap_to_alone(make, models, params, xs, ys):
    """From members trained together to those trained alone; make(i, params)."""
    gaps = []
    for i, model in enumerate(models):
        optimizer = make(i, model.parameters())
        for x, y in zip(xs[:, i], ys[:, i], strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        for name, p in model.named_parameters():
            gaps.append((p - params[name][i]).abs().max())
    return torch.stack(gaps).max().item()


def distance(kind, decays=NO_DECAY, step=step_each, **options):
    """Between members trained together and trained alone by this optimizer."""
    models, params, xs, ys = problem()
    together = {**options, "weight_decay": 0} if decays.any() else options
    optimizer = kind(params.values(), lr=1.0, **together)
    for x, y in zip(xs, ys, strict=True):
        optimizer.zero_grad()
        vmap(loss_of)(params, x, y).sum().backward()
        step(params, optimizer, RATES, decays)

    def make(i, parameters):
        own = {"weight_decay": decays[i].item()} if decays.any() else {}
        return kind(parameters, lr=RATES[i].item(), **{**options, **own})

    return gap_to_alone(make, models, params, xs, ys)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        ("SGD", {"momentum": 0.9, "fused": True}),
        ("Adam", {"weight_decay": 0.01, "amsgrad": True}),
        *((name, {"fused": True}) for name in ("Adam", "Adagrad")),
        ("AdamW", {"weight_decay": 0.1}),
        *((name, {}) for name in ("Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop")),
    ],
)
def test_step_is_proportional_to_rate(name, options):
    assert distance(getattr(torch.optim, name), **options) < 1e-10


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_with_a_decay_for_each_member(fused):
    decays = torch.linspace(0, 1, NUM_MODELS, dtype=torch.float64)
    assert distance(torch.optim.AdamW, decays, fused=fused) < 1e-10


def test_some_steps_are_not_proportional_to_rate():
    for name in ("Rprop", "ASGD", "Adafactor"):
        assert distance(getattr(torch.optim, name)) > 1e-7


# The compiler imports modules of PyTorch that use what PyTorch itself deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_step_each_compiles():
    # Without C++: the compiler's graph, run by PyTorch's own operators.
    step = torch.compile(step_each, backend="aot_eager")
    assert distance(torch.optim.Adam, step=step, fused=True) < 1e-10
    torch.compiler.reset()


def test_kept_members_train_on_as_in_the_full_stack():
    _, params, xs, ys = problem()
    x, y = xs[0, 0].repeat(3, 1), ys[0, 0].repeat(3)
    rows, best = torch.randint(len(y), (20, NUM_MODELS, 16)), torch.tensor([3, 1])
    optimizer = torch.optim.AdamW(params.values(), lr=1, weight_decay=0, fused=True)
    schedule, decays = RATES.expand(20, -1), torch.arange(NUM_MODELS) / 10
    train(params, optimizer, schedule[:10], decays, rows[:10], x, y)
    kept = keep(params, optimizer, best)
    train(params, optimizer, schedule[10:], decays, rows[10:], x, y)
    train(*kept, schedule[10:, best], decays[best], rows[10:, best], x, y)
    for name, p in kept[0].items():
        torch.testing.assert_close(p, params[name][best], rtol=0, atol=1e-10)


def test_adam_with_betas_for_each_member():
    betas = torch.tensor([[0, 0.9], [0.5, 0.99], [0.9, 0.999], [0.95, 0.9999]]).double()
    models, params, xs, ys = problem()
    params = {name: p.detach() for name, p in params.items()}
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    state, settings = (params, zeros, zeros), (RATES, *betas.T)
    for t, (x, y) in enumerate(zip(xs, ys, strict=True), start=1):
        state = vmap(adam_step, (0, 0, 0, 0, None, 0, 0))(*state, settings, t, x, y)

    def make(i, parameters):
        return torch.optim.Adam(parameters, lr=RATES[i].item(), betas=betas[i].tolist())

    assert gap_to_alone(make, models, state[0], xs, ys) < 1e-10
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        torch.optim.Adam(zeros.values(), lr=RATES)
