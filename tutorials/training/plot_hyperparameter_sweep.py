"""
A hyperparameter sweep in one call
==================================

Train hundreds of small networks side by side, one ``vmap`` call a step, every one with
its own learning rate, weight decay and initialization: write Adam as a pure function,
prove in float64 that it is that of ``torch.optim``, sweep 64 rates by 4 seeds on real
handwritten digits, and let populations tune themselves while they train.

**What you will learn**

- what ``torch.optim`` says when you ask it for one learning rate per member;
- how to write Adam as a pure function of a few lines, and how to prove that it is Adam;
- how a nested ``vmap`` makes a grid of rates by seeds, and what one more rate costs;
- how to choose a rate on validation data and report it on test data, with diverged
  members counted;
- how population-based training works on stacked state, and whether it wins here.

**Before you start**, read ``plot_ensembling.py``. If all your members share one
learning rate, you do not need this page: see ``plot_training.py``. The digits come with
the package `scikit-learn <https://scikit-learn.org>`_.
"""

# %%
# Set-up
# ------
#
# The data are the handwritten digits that come with scikit-learn, so there is nothing
# to download. The page compares results, so it asks for IEEE float32 where the default
# may be shorter, and puts that back at the end. It needs float64 as well.

import math
import platform

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parameters_to_vector
from torch.utils.benchmark import Timer

torch.manual_seed(0)

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
if device.type == "mps":  # has no float64
    device = cpu
num_threads = torch.get_num_threads()
device_name = device.type
if device == cpu:
    device_name = f"CPU ({platform.machine()}, {num_threads} threads)"
elif device.type == "cuda":
    device_name = torch.cuda.get_device_name(device)

matmul = torch.backends.cuda.matmul
default_precision = matmul.fp32_precision
matmul.fp32_precision = "ieee"

print(
    f"{device_name}, torch {torch.__version__}, {torch.get_default_dtype()}, "
    f"matrix products in {matmul.fp32_precision}"
)

# %%
# Three parts of the data, three jobs: the models learn from the training images, the
# validation images choose among models, and the test images say how good the choice
# is. A loss that has chosen is too good to be reported: among many members, some look
# good by luck.

digits = load_digits()
shuffled = torch.randperm(len(digits.target))
images = torch.tensor(digits.data / 16, dtype=torch.float32)[shuffled].to(device)
targets = torch.tensor(digits.target)[shuffled].to(device)
x_train, x_val, x_test = images.split([897, 450, 450])  # [897, 64], ...
y_train, y_val, y_test = targets.split([897, 450, 450])


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


weights = sum(p.numel() for p in MLP().parameters())
print(f"{len(x_train)} training, {len(x_val)} validation and {len(x_test)} test images")
print(f"{weights:,} parameters a model; a guess has loss log 10 = {math.log(10):.2f}")

# %%
# The plain way: one optimizer for each model
# -------------------------------------------
#
# Here is one run alone, as you know it. Its rate and its decay may change from step to
# step, which the last part of this page needs.


def one_step(model, optimizer, x, labels):
    optimizer.zero_grad()
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()


def alone(params, schedule, xs, labels):
    """Parameters of one model after each step of torch.optim.AdamW, [steps, 2410]."""
    model = MLP().to(xs)
    model.load_state_dict(params)
    optimizer = torch.optim.AdamW(model.parameters())
    trace = []
    for step, (lr, weight_decay) in enumerate(schedule):
        optimizer.param_groups[0].update(lr=lr, weight_decay=weight_decay)
        one_step(model, optimizer, xs[step], labels[step])
        trace.append(parameters_to_vector(model.parameters()).detach())
    return torch.stack(trace)


# %%
# What torch.optim refuses
# ------------------------
#
# With stacked parameters there is one optimizer for all members. Can it take one rate
# for each? Two attempts suggest themselves: a tensor of rates, and one parameter group
# for each member, made of slices of the stack.

num_models = 6
learning_rates = torch.logspace(-4, 0, num_models).to(device)
stacked, _ = stack_module_state([MLP().to(device) for _ in range(num_models)])
groups = [
    {"params": [p[i] for p in stacked.values()], "lr": learning_rates[i].item()}
    for i in range(num_models)
]


def refusal(params, **options):
    """Message with which torch.optim.AdamW refuses these arguments."""
    try:
        torch.optim.AdamW(params, **options)
    except ValueError as problem:
        return f"{type(problem).__name__}: {problem}"
    raise AssertionError("torch.optim takes what this page says it refuses")


print("tensor of rates:     ", refusal(stacked.values(), lr=learning_rates))
print("slices of the stack: ", refusal(groups))

# %%
# The optimizer uses one number for all the elements of its parameters. And it wants
# leaves of autograd; a slice is the result of an operation on one. Separate leaves for
# each member would do, but then there is no stack, and the optimizer updates group
# after group, as in the loop.
#
# Adam as a pure function
# -----------------------
#
# Write the optimizer in terms of one member, then map it. State goes in, new state
# comes out, and nothing is changed in place. This is Adam with *decoupled* weight
# decay, which is ``torch.optim.AdamW``: the decay shrinks the weights and stays out of
# the gradients.

beta1, beta2, eps = 0.9, 0.999, 1e-8  # the defaults of torch.optim

with torch.device("meta"):
    skeleton = MLP()


def loss_of(params, x, labels):
    logits = functional_call(skeleton, params, (x,), strict=True)
    return F.cross_entropy(logits, labels)


def train_step(state, setting, step, x, labels):
    """State of one member after one more step of Adam."""
    params, lr = state["params"], setting["lr"]
    keep = 1 - lr * setting["weight_decay"]
    rate = lr / (1 - beta1**step)
    new = {"params": {}, "first": {}, "second": {}}
    for name, g in grad(loss_of)(params, x, labels).items():
        first = beta1 * state["first"][name] + (1 - beta1) * g
        second = beta2 * state["second"][name] + (1 - beta2) * g**2
        root = (second / (1 - beta2**step)).sqrt()
        new["params"][name] = keep * params[name] - rate * first / (root + eps)
        new["first"][name], new["second"][name] = first, second
    return new


# %%
# Two details. Inside ``vmap``, ``lr`` is a tensor without dimensions, so all of this
# must be arithmetic of tensors: no ``float(lr)``, no ``if lr > 1``. And ``step`` stays
# a Python number, shared by all: ``1 - 0.999`` in float32 would lose three of its seven
# digits.
#
# Rates by seeds: a vmap in a vmap
# --------------------------------
#
# A grid has two dimensions, so map twice. A *seed* is an initialization and an order
# of the data, the same for all rates. Read the two ``in_dims`` together: seeds differ
# in state and minibatch and share the setting; rates differ in state and setting and
# share the minibatches. With ``in_dims=(0, 0, None, None, None)``, one ``vmap`` would
# be a list of members with a setting each, on the same minibatch.

each_seed = vmap(train_step, in_dims=(0, None, None, 0, 0))
each_rate = vmap(each_seed, in_dims=(0, 0, None, None, None))


def score(params, x, labels):
    """Loss of one member, and the share of the images that it names rightly."""
    logits = functional_call(skeleton, params, (x,), strict=True)
    hits = logits.argmax(dim=-1) == labels
    return F.cross_entropy(logits, labels), hits.to(x.dtype).mean()


scores = vmap(vmap(score, in_dims=(0, None, None)), in_dims=(0, None, None))


def fresh(*shape):
    """State of new members, stacked in this shape."""
    params, _ = stack_module_state([MLP() for _ in range(math.prod(shape))])
    params = {n: p.detach().unflatten(0, shape).to(device) for n, p in params.items()}
    zeros = {n: torch.zeros_like(p) for n, p in params.items()}
    return {"params": params, "first": zeros, "second": zeros}


def each_tensor(function, state):
    return {
        part: {name: function(p) for name, p in tensors.items()}
        for part, tensors in state.items()
    }


def vectors(params):
    """The parameters of each member in one row, [..., ..., 2410]."""
    return torch.cat([p.flatten(2) for p in params.values()], dim=2)


# %%
# Check: it is the same optimizer
# -------------------------------
#
# Six settings, with rates from 1e-4 to 1, by two seeds, against twelve runs of
# ``torch.optim`` on the same minibatches, in float64 and in float32.
#
# **How equal should they be?** Adam divides a gradient by its own size plus ``eps``.
# Where a gradient is small, that is steep: a change of the gradient can come out as
# ``lr / eps`` times that change. The gradients here are averages of numbers around one
# or less, so rounding changes them by about one unit of the precision, and the bound in
# float64 is ``lr * 2.2e-16 / eps`` for each step. It is an estimate: it takes every
# gradient as small as ``eps``, which few are, and leaves out that training amplifies
# earlier errors. The printed share of the bound says how much room there is.
#
# **In float32** the same bound is larger than the steps that Adam takes, so it says
# nothing. What can be asked is that ``vmap`` is not farther from float64 than the
# separate runs are. We compare root mean squares over seeds and parameters, for the
# median rate, and allow a factor of 3, because chance decides which small gradient
# rounds where.

steps = 20
decays = torch.tensor([1, 0.3, 0.1, 0.03, 0.01, 0]).to(device)
setting = {"lr": learning_rates, "weight_decay": decays}
start = each_tensor(lambda p: p.expand(num_models, *p.shape), fresh(2))
rows = torch.randint(len(x_train), (steps, 2, 64)).to(device)  # step, seed, image
xs, labels = x_train[rows], y_train[rows]

traces = {}  # (who, dtype) -> [rates, seeds, steps, parameters]
for dtype in (torch.float32, torch.float64):
    state, typed = each_tensor(lambda p, dtype=dtype: p.to(dtype), start), []
    typed_setting = {name: s.to(dtype) for name, s in setting.items()}
    for t in range(steps):
        x = xs[t].to(dtype)
        state = each_rate(state, typed_setting, t + 1, x, labels[t])
        typed.append(vectors(state["params"]))
    traces["vmap", dtype] = torch.stack(typed, dim=2).double()
    runs = []
    for r, pair in enumerate(zip(*[s.tolist() for s in setting.values()], strict=True)):
        for s in range(2):
            params = {name: p[r, s] for name, p in start["params"].items()}
            runs.append(alone(params, [pair] * steps, xs[:, s].to(dtype), labels[:, s]))
    traces["separate", dtype] = torch.stack(runs).unflatten(0, (num_models, 2)).double()


def check(what, found, expected, total_lr):
    """Compare members in float64; total_lr: sum of the rates of all their steps."""
    distance = (found - expected).abs().amax(dim=-1)
    allowed = total_lr * torch.finfo(torch.float64).eps / eps
    worst = (distance / allowed).max().item()
    assert worst <= 1, f"{what}: {worst:.1e} times the distance that rounding explains"
    print(f"{what}: at most {distance.max():.0e} apart, {worst:.0e} of the bound")


exact = traces["separate", torch.float64]
check(
    f"vmap and torch.optim after {steps} steps",
    traces["vmap", torch.float64][:, :, -1],
    exact[:, :, -1],
    steps * learning_rates[:, None].double(),
)

errors = {
    who: (traces[who, torch.float32] - exact).square().mean(dim=(1, 3)).sqrt()
    for who in ("separate", "vmap")
}
print("\nfloat32, distance from float64: separate runs / vmap")
print("learning rate", *[f"{f'step {n}':>16}" for n in (1, 5, steps)])
for i, lr in enumerate(learning_rates.tolist()):
    pairs = [[errors[who][i, n - 1] for who in errors] for n in (1, 5, steps)]
    print(f"{lr:13.1e}", *[f"{a:7.0e} /{b:7.0e}" for a, b in pairs])
ratio = (errors["vmap"] / errors["separate"])[:, -1].median().item()
assert ratio <= 3, (
    f"float32: vmap is {ratio:.1f} times as far from float64 as torch.optim"
)
print(f"vmap / separate runs after {steps} steps, median: {ratio:.2f}")

found = scores(state["params"], x_val.double(), y_val)  # two of [6, 2]
for r in range(num_models):
    params = {name: p[r, 0] for name, p in state["params"].items()}
    expected = torch.stack(score(params, x_val.double(), y_val))
    distance = (torch.stack(found)[:, r, 0] - expected).abs().max().item()
    assert distance <= 1e-12 * max(1, expected[0].item()), (
        f"scores: member {r} alone has another score, {distance:.0e} apart"
    )

# %%
# It is the same optimizer. (The last lines compare ``scores`` with one member at a
# time: a mean of 450 losses in float64 is good for twelve digits.)
#
# The table shows why you cannot compare whole trainings in float32: each step starts
# from weights that are already off, so the distance grows, and most at large rates.
# After enough steps, two correct programs have different weights. So prove an
# optimizer in float64, on few steps.
#
# The price of one more rate
# --------------------------
#
# A step of this network is a few thousand multiplications an image: nothing, next to
# the cost of starting its operators. The loop starts them once for each model, the
# nested ``vmap`` once for all. So the first members should be nearly free, until the
# arithmetic of Adam, about a dozen passes over all parameters, fills the device. Both
# sides compute gradients and an update.

num_rates, num_seeds = 64, 4


def grid(rates, seeds):
    """Arguments of one step of each_rate."""
    setting = {"lr": torch.full((rates,), 1e-3).to(device)}
    setting["weight_decay"] = 0.1 * torch.ones_like(setting["lr"])
    rows = torch.randint(len(x_train), (seeds, 64)).to(device)
    return fresh(rates, seeds), setting, 1, x_train[rows], y_train[rows]


model = MLP().to(device)
optimizer = torch.optim.AdamW(model.parameters())
calls = {
    "torch.optim, 1 model": (one_step, (model, optimizer, x_train[:64], y_train[:64])),
    "vmap, 1 rate, 1 seed": (each_rate, grid(1, 1)),
    f"vmap, 1 rate, {num_seeds} seeds": (each_rate, grid(1, num_seeds)),
    f"vmap, {num_rates} rates, {num_seeds} seeds": (
        each_rate,
        grid(num_rates, num_seeds),
    ),
}
print(f"One training step, {device_name}, batch 64, float32, ieee")
print("milliseconds, median (interquartile range, values); the first call is left out")
medians = []
for label, (function, args) in calls.items():
    scope = {"function": function, "args": args}
    timer = Timer("function(*args)", globals=scope, num_threads=num_threads)
    times = 1e3 * torch.tensor(timer.blocked_autorange(min_run_time=1).times)
    low, median, high = times.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    medians.append(median)
    print(f"{label:24} {median:8.2f} ({high - low:.2f}, {len(times)})")

single, _, one_rate, all_rates = medians
looped = num_rates * num_seeds * single
more = (all_rates - one_rate) / (num_rates - 1)
cost = f"{more:.3f} ms" if more > 0 else "nothing that this timer can see"
print(
    f"\n{num_rates * num_seeds} separate steps would take {looped:.0f} ms, one call "
    f"takes {all_rates:.1f} ms,\nas long as {all_rates / single:.0f} of them: "
    f"{max(looped / all_rates, all_rates / looped):.1f}x "
    f"{'faster' if looped > all_rates else 'slower'}.\n"
    f"One more rate with {num_seeds} seeds costs {cost} in the call and "
    f"{num_seeds * single:.2f} ms in separate runs."
)

# %%
# If the call is faster, the sweep costs as much as the printed number of runs. If it is
# slower, one model fills the device alone, and separate runs are the better sweep. For
# a single member, the pure function may well lose against ``torch.optim``: it makes new
# tensors where the optimizer writes in place, and ``vmap`` adds its own time to each
# operator.
#
# The sweep
# ---------
#
# 64 rates from 1e-4 to 100, far wider than you would choose, to see both ends; a decay
# of 0.1; 4 seeds. **What should happen:** a small rate has not arrived after 200 steps.
# Adam moves a weight by up to about ``lr`` in a step, however small its gradient, so a
# large rate soon pushes every ReLU below zero for all images. Such a network has no
# gradient left in its first layer and can only guess. And the decay multiplies every
# weight by ``1 - lr * weight_decay``, which is below -1 from a rate of
# ``2 / weight_decay`` on: from there the weights grow exponentially, until float32
# cannot hold them.

num_steps, weight_decay = 200, 0.1
rates = torch.logspace(-4, 2, num_rates).to(device)
setting = {"lr": rates, "weight_decay": torch.full_like(rates, weight_decay)}
state = each_tensor(lambda p: p.expand(num_rates, *p.shape), fresh(num_seeds))
rows = torch.randint(len(x_train), (num_steps, num_seeds, 64)).to(device)
for step, row in enumerate(rows, 1):
    state = each_rate(state, setting, step, x_train[row], y_train[row])

val, _ = scores(state["params"], x_val, y_val)  # [64, 4]
test, test_accuracy = scores(state["params"], x_test, y_test)
no_number = ~val.isfinite()
val = torch.where(no_number, torch.inf, val)  # nan is worse than any number
lost = val > 10  # far worse than a guess
means = val.mean(dim=1)
best = means.argmin().item()
best_rate = rates[best].item()

members = num_rates * num_seeds
print(
    f"{members} members, {num_steps} steps, decay {weight_decay}: "
    f"{no_number.sum()} end with nan or inf, "
    f"{(lost & ~no_number).sum()} more with a loss above 10"
)
print(f"smallest rate with such a member: {rates[lost.any(dim=1)].min():.1f}", end="")
print(f"; the decay predicts {2 / weight_decay:.1f}")
print(f"lowest mean validation loss: {val[best].mean():.3f}, at rate {best_rate:.3f}")
print(f"its members on test data: loss {test[best].mean():.3f} (mean), ", end="")
print(f"right {test_accuracy[best].min():.1%} to {test_accuracy[best].max():.1%}")
first = {name: state["params"][name] for name in ("0.weight", "0.bias")}
sums = torch.einsum("rshi,ni->rsnh", first["0.weight"], x_train)  # [64, 4, 897, 32]
firing = (sums + first["0.bias"][:, :, None] > 0).any(dim=2).double().mean(dim=(1, 2))
one = (rates - 1).abs().argmin()
print(
    f"hidden units that fire for any image: {firing[best]:.0%} at the chosen rate, "
    f"{firing[one]:.0%} at rate {rates[one]:.1f}"
)
good = means <= 1.1 * means[best]
between = means[good].max() - means[best]
print(
    f"within 10% of the best: {good.sum()} rates from {rates[good].min():.3f} to "
    f"{rates[good].max():.3f}; their means differ by {between:.3f},\n"
    f"the seeds of the chosen rate by {val[best].max() - val[best].min():.3f}"
)

# %%
# Diverged members stay in the count. A mean over the seeds that survived would make a
# dangerous rate look good, so a rate with one lost seed has an infinite mean.
#
# Look
# ----

x = rates.tolist()
shown = torch.where(lost, torch.nan, val)
low, median, high = shown.quantile(torch.tensor([0, 0.5, 1]).to(device), dim=1).tolist()

fig, ax = plt.subplots(figsize=(5.6, 4), layout="constrained")
ax.fill_between(x, low, high, color="C0", alpha=0.3, label=f"all {num_seeds} seeds")
ax.loglog(x, median, color="C0", label="median over seeds")
where = rates[lost.any(dim=1)].tolist()
ax.plot(where, [10] * len(where), "x", color="C1", label="lost: nan, inf, > 10")
ink = plt.rcParams["text.color"]
ax.axhline(math.log(10), color=ink, linestyle=":", linewidth=1)
ax.text(x[-1], 0.95 * math.log(10), "a guess", ha="right", va="top")
ax.axvline(
    best_rate, ymax=0.6, color="C2", linestyle="--", label=f"chosen: {best_rate:.3f}"
)
ax.set_title(
    f"Digits, MLP 64-32-10, {num_steps} steps of Adam, float32\n"
    f"{num_rates} rates by {num_seeds} seeds, {device_name}"
)
ax.set_xlabel("learning rate")
ax.set_ylabel("final validation loss")
ax.set_ylim(top=13)
ax.minorticks_off()
ax.grid(True, alpha=0.3)
_ = ax.legend(loc="upper left")
fig.set_label(
    "Final validation loss against learning rate, both axes logarithmic, median and "
    f"range over {num_seeds} seeds. The mean loss is {val[0].mean():.1f} at rate "
    f"{x[0]:g} and {val[best].mean():.2f} at the chosen rate {best_rate:.3f}; a guess "
    f"has {math.log(10):.1f}. {lost.sum()} of {members} members are lost, the first at "
    f"rate {where[0]:.0f}."
)

# %%
# The left slope is training that has not finished; more steps would move it to the
# left. Where the curve lies on the dotted line, the printed shares say whether the
# networks are dead. The right edge is the decay. The rates printed as "within 10% of
# the best" say how fine a grid has to be. All rates share their seeds, so compare two
# rates seed by seed: where the order changes from seed to seed, one run of each cannot
# tell them apart, and the "best" rate is partly luck.
#
# Population-based training
# -------------------------
#
# Most rates of a sweep are bad, and get as many steps as the good ones. In
# population-based training (PBT), the members train for a while; then the worst copy
# the best, state and setting, change the copied setting at random, and all train on.
# On stacked state, that is an index: ``p[rows]`` copies the parameters and both moments
# of Adam. Here, a changed rate or decay is between a quarter and four times the copied
# one.
#
# Sixteen populations of 16 train in one call, nested again: members of one population
# differ in state and setting and share its minibatches, populations differ in all.

num_populations, size, generations = 16, 16, 10
each_member = vmap(train_step, in_dims=(0, 0, None, None, None))
each_population = vmap(each_member, in_dims=(0, 0, None, 0, 0))


def exchange(state, setting, losses):
    """The worst quarter of each population copies its best quarter."""
    losses = torch.where(losses.isfinite(), losses, torch.inf)  # nan is the worst
    order = losses.argsort(dim=1)  # best first
    quarter = losses.shape[1] // 4
    itself = torch.arange(losses.shape[1], device=device).expand(losses.shape)
    source = itself.scatter(1, order.flip(1)[:, :quarter], order[:, :quarter])
    rows = torch.arange(len(losses), device=device)[:, None], source
    assert (losses[rows] <= losses).all(), "PBT: a member copied a worse one"
    changed = {}
    for name, values in setting.items():
        factor = 4 ** (2 * torch.rand(losses.shape) - 1).to(values)
        changed[name] = values[rows] * torch.where(source == itself, 1, factor)
    return each_tensor(lambda p: p[rows], state), changed, source


def evolve(state, setting, rows, generations):
    """Train populations; exchange members after each generation but the last."""
    x, length = x_train.to(setting["lr"].dtype), len(rows) // generations
    settings, sources = [setting], []
    for step, row in enumerate(rows, 1):
        state = each_population(state, setting, step, x[row], y_train[row])
        if step % length == 0 and step < len(rows):
            losses, _ = scores(state["params"], x_val.to(x.dtype), y_val)
            state, setting, source = exchange(state, setting, losses)
            settings.append(setting)
            sources.append(source)
    return state, settings, sources


def ancestors(sources, population, member):
    """Position of a final member's ancestor in each generation, first to last."""
    path = [member]
    for source in reversed(sources):
        path.insert(0, source[population, path[0]].item())
    return path


# %%
# The first settings are rates in even steps over the range of the sweep and random
# decays from 0.001 to 1.
#
# **Check.** With all its copying, every final member is still one training run, whose
# setting changed when it was copied. So replay it: follow its ancestors, and let
# ``torch.optim`` train one model alone with their settings. If a copy lost a moment or
# mixed up two settings, this fails. Two populations, without their six largest rates,
# four generations of 5 steps, float64:

start = fresh(num_populations, size)
lr = torch.logspace(-4, 2, size).expand(num_populations, size)
decay = 10 ** (3 * torch.rand(num_populations, size) - 3)
first_setting = {"lr": lr.to(device), "weight_decay": decay.to(device)}

few = each_tensor(lambda p: p[:2, :10].double(), start)
setting = {name: s[:2, :10].double() for name, s in first_setting.items()}
rows = torch.randint(len(x_train), (20, 2, 64)).to(device)
state, settings, sources = evolve(few, setting, rows, generations=4)

replays, total_lr = [], []
for k in range(2):
    xs, labels = x_train[rows[:, k]].double(), y_train[rows[:, k]]
    for i in range(10):
        path = ancestors(sources, k, i)
        schedule = [
            (s["lr"][k, j].item(), s["weight_decay"][k, j].item())
            for s, j in zip(settings, path, strict=True)
            for _ in range(5)
        ]
        params = {name: p[k, path[0]] for name, p in few["params"].items()}
        replays.append(alone(params, schedule, xs, labels)[-1])
        total_lr.append(sum(lr for lr, _ in schedule))
check(
    "PBT and its replay by torch.optim",
    vectors(state["params"]).flatten(0, 1),
    torch.stack(replays),
    torch.tensor(total_lr, dtype=torch.float64).to(device),
)

# %%
# The comparison
# --------------
#
# Three ways to spend the same number of member-steps, from the same initial members and
# with the same minibatches (PBT also pays for a validation before each exchange):
#
# - **PBT**, with 10 generations;
# - **fixed**: the same first settings, never exchanged, so a plain sweep of 16 rates;
# - **best rate**: all 16 members at the rate and decay that the sweep above chose. This
#   one had help: 256 runs that are not counted.
#
# Each picks its best member by validation loss and is judged by the test loss of that
# one. Sixteen populations give sixteen paired comparisons. We call a way better when it
# wins at least 13 of them. How often fair coins do that, for one side or the other, is
# printed below; there are two such comparisons. All populations share one split of the
# data, so this says nothing of other splits.

rows = torch.randint(len(x_train), (num_steps, num_populations, 64)).to(device)
best_setting = {
    "lr": torch.full_like(first_setting["lr"], best_rate),
    "weight_decay": torch.full_like(first_setting["lr"], weight_decay),
}
ways = {
    "PBT": (first_setting, generations),
    "fixed": (first_setting, 1),
    "best rate": (best_setting, 1),
}
picked, results = {}, {}
print(f"{num_populations} populations of {size}, {num_steps} steps; mean (range)")
print(f"{'':10} {'validation loss':>22} {'test loss':>22} {'right':>7}  nan or inf")
everyone = torch.arange(num_populations, device=device)
for way, (setting, count) in ways.items():
    state, *history = evolve(start, setting, rows, count)
    if way == "PBT":
        settings, sources = history
    val, _ = scores(state["params"], x_val, y_val)  # [16, 16]
    test, right = scores(state["params"], x_test, y_test)
    no_number = (~val.isfinite()).sum().item()
    picked[way] = torch.where(val.isfinite(), val, torch.inf).argmin(dim=1)
    pick = everyone, picked[way]
    results[way] = test[pick]
    columns = [
        f"{t[pick].mean():.3f} ({t[pick].min():.3f} to {t[pick].max():.3f})"
        for t in (val, test)
    ]
    columns.append(f"{right[pick].mean():7.1%}  {no_number} of {val.numel()}")
    print(f"{way:10} {columns[0]:>22} {columns[1]:>22} {columns[2]}")

enough = 13
coins = 2 * sum(
    math.comb(num_populations, k) for k in range(enough, num_populations + 1)
)
print(f"fair coins: {enough} or more of one side in {coins / 2**num_populations:.1%}")
for rival in ("fixed", "best rate"):
    wins = (results["PBT"] < results[rival]).sum().item()
    losses = (results["PBT"] > results[rival]).sum().item()
    verdict = "no clear difference"
    if max(wins, losses) >= enough:
        verdict = f"{'PBT' if wins > losses else rival} is better"
    print(
        f"PBT has the lower test loss in {wins} of {num_populations}, against {rival}: "
        f"{verdict}"
    )

# %%
# The validation loss of a picked member is too good on average, because it was picked
# for it, and PBT picks at every exchange. Compare the three by the test loss.
#
# **Against the fixed settings**, which cost the same, PBT can win for three reasons:
# members that start at hopeless rates are put to use, their copies search near good
# settings, and a rate may change during training. If it does not win, the fixed grid
# already held a good setting, and chance decides.
#
# **Against the best rate** it depends on the bottom of the sweep. Where the bottom is
# flat, 16 members at a good rate, which differ in their initialization only, are hard
# to beat. But you know that rate only after a sweep. Where the best rate changes in the
# course of the training, PBT can find a schedule that no fixed rate has.
#
# The lineage
# -----------
#
# Here is the first population, picked before looking: each horizontal line is a member
# at its learning rate, a cross is where it was replaced, and a slanted line leads from
# the copied member to its copy. The thick line leads to the winner.

length, gap = num_steps // generations, (math.nan, math.nan)
lr = torch.stack([s["lr"][0] for s in settings]).tolist()  # [10][16]
parents = [source[0].tolist() for source in sources]  # [9][16]
path = ancestors(sources, 0, picked["PBT"][0].item())

lives, copies, ends, winner = [], [], [], []
for i in range(size):
    birth = 0
    for g in range(1, generations + 1):
        replaced = g < generations and parents[g - 1][i] != i
        if replaced:
            parent = parents[g - 1][i]
            copies += [(g * length - 8, lr[g - 1][parent]), (g * length, lr[g][i]), gap]
            ends.append((g * length, lr[g - 1][i]))
        if replaced or g == generations:
            lives += [(birth, lr[g - 1][i]), (g * length, lr[g - 1][i]), gap]
            birth = g * length
for g, i in enumerate(path):
    leaves = g + 1 < generations and path[g + 1] != i
    winner += [(g * length, lr[g][i]), ((g + 1) * length - 8 * leaves, lr[g][i])]

fig, ax = plt.subplots(figsize=(5.6, 4.4), layout="constrained")
ax.semilogy(*zip(*lives, strict=True), color="C0", linewidth=1, label="a member")
ax.plot(*zip(*copies, strict=True), "--", color="C1", linewidth=1, label="a copy")
ax.plot(*zip(*ends, strict=True), "x", color="C0", markersize=4, label="replaced")
label = "ancestors of the winner"
ax.plot(*zip(*winner, strict=True), color=ink, linewidth=2.5, label=label)
ax.set_title(f"PBT, lineage of one population of {size}, float32\n{device_name}")
ax.set_xlabel("training step")
ax.set_ylabel("learning rate")
ax.set_xticks(range(0, num_steps + 1, 2 * length))
ax.minorticks_off()
ax.grid(True, alpha=0.3)
_ = ax.legend(loc="upper right")

founders = {ancestors(sources, 0, i)[0] for i in range(size)}
story = [
    f"{len(ends)} copies were made. The {size} final members descend from "
    f"{len(founders)} of the {size} first ones.",
    f"Rates went from {min(lr[0]):g} to {max(lr[0]):g} at first and go from "
    f"{min(lr[-1]):.1g} to {max(lr[-1]):.1g} at last.",
    "Rates of the winner's ancestors: "
    f"{', '.join(f'{lr[g][i]:.2g}' for g, i in enumerate(path))}.",
]
print(*story, sep="\n")
fig.set_label(
    f"Family tree of {size} members over {num_steps} training steps, each a line at "
    f"its learning rate, with copies as branches. {' '.join(story)}"
)

# %%
# If few of the first members have descendants, PBT has narrowed the ensemble: where you
# want the members' *disagreement*, as in ``plot_ensembling.py``, members that descend
# from one ancestor are worth less than independent ones.
#
# Last, the switch goes back to where it was.

matmul.fp32_precision = default_precision

# %%
# Remember
# --------
#
# ``torch.optim`` takes one learning rate for a stack, so a rate for each member needs
# an optimizer that is a **pure function**: Adam is ten lines, and float64 proves it.
# **Nest** ``vmap`` for grids, and let ``in_dims`` say what differs along which
# dimension. Choose on validation data, report on test data, count the diverged.
# Population-based training is an index into the stacked state; compare it with fixed
# rates **at equal cost**, over several populations.
#
# Next
# ----
#
# - ``plot_training.py``: one optimizer for all members, and which settings are shared.
# - ``plot_saving.py``: keep the winner as an ordinary module.
#
# References
# ----------
#
# - D. P. Kingma, J. Ba: Adam: a method for stochastic optimization, 2014,
#   `arXiv:1412.6980 <https://arxiv.org/abs/1412.6980>`_.
# - I. Loshchilov, F. Hutter: Decoupled weight decay regularization, 2017,
#   `arXiv:1711.05101 <https://arxiv.org/abs/1711.05101>`_.
# - M. Jaderberg and others: Population based training of neural networks, 2017,
#   `arXiv:1711.09846 <https://arxiv.org/abs/1711.09846>`_.
# - Asked for in `functorch#782 <https://github.com/pytorch/functorch/issues/782>`_ and
#   `meta-pytorch/data#1507 <https://github.com/meta-pytorch/data/issues/1507>`_;
#   learning rates as tensors of one element:
#   `pytorch#106802 <https://github.com/pytorch/pytorch/issues/106802>`_.
