"""
Population-based training on stacked models
===========================================

Let a population of small networks tune its own learning rates while it trains: the
worst members take over weights, optimizer state and settings of the best, by one
indexed copy of each stacked tensor.

**In short.** Train all members as one stack, each at its own rate. Every few steps,
index each stacked tensor (with batch norm, the ``buffers`` too) with the members to
continue from, and change the settings of the copies at random. Before you do so, try
the same sweep with a cosine schedule: the page compares both.

Before: ``plot_hyperparameter_sweep.py`` gives each model its own learning rate.
"""

# %%
# Set-up
# ------

import copy
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parameters_to_vector
from torch.utils.benchmark import timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
print(f"{device.type}, torch {torch.__version__}, float32 but for the check")

# %%
# Copy the best members over the worst
# ------------------------------------
#
# In population-based training (PBT, Jaderberg and others, 2017), the members train for
# a while; then the worst take over the state of the best, change the settings that came
# with it, and all train on. ``losses`` are those on validation data, one for each
# member. Many populations fit into one stack: the first ``size`` members are one, the
# next ``size`` another.


def exchange(params, optimizer, settings, losses, size):
    """The worst quarter of each population copies its best quarter."""
    members = torch.arange(len(losses), device=losses.device)
    order = losses.nan_to_num(nan=torch.inf).view(-1, size).argsort(dim=1)  # best first
    best, worst = order[:, : size // 4], order[:, -(size // 4) :]
    source = members.view(-1, size)
    source = source.scatter(1, worst, source.gather(1, best)).flatten()
    with torch.no_grad():
        for p in params.values():
            for stacked in (p, *optimizer.state[p].values()):
                if stacked.dim():  # Adam's step is one number for all
                    stacked.copy_(stacked[source])
    factor = 4 ** (2 * torch.rand(settings.shape) - 1).to(settings)  # 1/4 to 4
    return settings[:, source] * factor.where(source != members, 1), source


# %%
# ``settings`` has a row of learning rates and a row of weight decays. A loss that is no
# number sorts last. The members train as in a sweep: one stock optimizer with ``lr=1``,
# and a rate and a decay for each member after its step.


def step_each(params, optimizer, rates, decays):
    """Step with lr=1, then give each member its own rate and decoupled decay."""
    old = [p.detach().clone() for p in params.values()]
    optimizer.step()
    with torch.no_grad():
        for p, before in zip(params.values(), old, strict=True):
            rate = rates.view(-1, *[1] * (p.dim() - 1))  # [num_models, 1, ...]
            decay = decays.view_as(rate)
            p.copy_(before + rate * (p - before) - rate * decay * before)


def evolve(params, optimizer, settings, schedule, rows, val_rows, data, length):
    """Train, exchange after every ``length`` steps but the last; return settings."""
    history = [(settings, None)]
    for step, row in enumerate(rows):  # row: [num_models, 32]
        if step and step % length == 0:
            losses = evaluate(params, val_rows, data)
            size = len(losses) // len(val_rows)
            settings, source = exchange(params, optimizer, settings, losses, size)
            history.append((settings, source))
        losses = vmap(loss_of)(params, data[0][row], data[1][row])
        optimizer.zero_grad()
        losses.sum().backward()
        step_each(params, optimizer, schedule[step] * settings[0], settings[1])
    return history


# %%
# Each population has its own split of the images, so ``val_rows`` has a row of image
# numbers for each population:

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)
data = images, torch.tensor(digits.target, device=device)  # [1797, 64], [1797]


def split(num_populations):
    """Image numbers to train, validate and test: [num_populations, 897], ..."""
    order = torch.rand(num_populations, len(images)).argsort(dim=1).to(device)
    return order.split([897, 450, 450], dim=1)


def minibatches(train_rows, num_steps, size):
    """Image numbers, shared within a population: [num_steps, num_models, 32]."""
    rows = train_rows[:, torch.randint(897, (num_steps, 32))].transpose(0, 1)
    return rows.repeat_interleave(size, dim=1)


def make_model():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


with torch.device("meta"):
    skeleton = make_model()


def loss_of(params, x, y):
    return F.cross_entropy(functional_call(skeleton, params, (x,), strict=True), y)


@torch.no_grad()
def evaluate(params, rows, data):
    """Losses of all members, those of population i on the images ``rows[i]``."""
    grouped = {name: p.unflatten(0, (len(rows), -1)) for name, p in params.items()}
    losses = vmap(vmap(loss_of, (0, None, None)))(grouped, data[0][rows], data[1][rows])
    return losses.flatten()  # [num_models]


# %%
# The same with separate models
# -----------------------------
#
# The plain way keeps a list of pairs, a model and its optimizer. It decides by itself
# who copies whom, and takes over only the settings. Two populations of eight, in
# float64 on the CPU:

num_models, size, length, num_steps = 16, 8, 5, 20
rates = torch.logspace(-4, -1, size).repeat(2)
settings = torch.stack([rates, torch.rand(num_models)]).cpu().double()
schedule = torch.linspace(1, 0.5, num_steps).to(settings)
train_rows, val_rows, _ = (part.cpu() for part in split(2))
rows = minibatches(train_rows, num_steps, size)
models = [make_model().cpu().double() for _ in range(num_models)]
data64 = data[0].cpu().double(), data[1].cpu()

params, _ = stack_module_state(models)  # copies; the models stay as they are
optimizer = torch.optim.AdamW(params.values(), lr=1, weight_decay=0)
history = evolve(params, optimizer, settings, schedule, rows, val_rows, data64, length)

# %%

pairs = [(m, torch.optim.AdamW(m.parameters())) for m in copy.deepcopy(models)]
for step in range(num_steps):
    if step % length == 0:
        settings, _ = history[step // length]
        for first in range(0, num_models if step else 0, size):
            x, y = (part[val_rows[first // size]] for part in data64)
            losses = [F.cross_entropy(m(x), y).item() for m, _ in pairs]
            order = sorted(range(first, first + size), key=losses.__getitem__)
            for good, bad in zip(order[:2], order[-2:], strict=True):
                pairs[bad] = copy.deepcopy(pairs[good])
    for i, (model, optimizer) in enumerate(pairs):
        rate, decay = (schedule[step] * settings[0, i]).item(), settings[1, i].item()
        optimizer.param_groups[0].update(lr=rate, weight_decay=decay)
        x, y = (part[rows[step, i]] for part in data64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

alone = torch.stack([parameters_to_vector(m.parameters()) for m, _ in pairs])
together = torch.cat([p.flatten(1) for p in params.values()], dim=1)
worst = (alone - together).abs().max().item()
assert worst < 1e-10, f"not the population of separate models: {worst:.0e} apart"
print(f"{len(history) - 1} exchanges: at most {worst:.0e} apart")

# %%
# Does it find better networks?
# -----------------------------
#
# Sixteen populations of 32 members train for 200 steps in four ways, from the same
# first members, with the same minibatches, each on its own split of the images:
#
# - **PBT**: an exchange every 20 steps. The first settings are all pairs of eight rates
#   and four decays.
# - **constant**: the same pairs without exchange, which is a plain sweep.
# - **cosine**: the same pairs, and each rate falls along half a cosine.
# - **tuned cosine**: all members of a population have one rate and decay, those of its
#   best member of *cosine*. It uses twice the steps.
#
# Each population picks its best member on its validation images and is judged by the
# test loss of that one. **What should happen:** against *constant*, PBT puts the worst
# members to use, searches around good settings, and can change a rate on the way. A
# *cosine* has the last advantage without any search.

size, length, num_steps, num_populations = 32, 20, 200, 16
grid = torch.cartesian_prod(torch.logspace(-3, 0.5, 8), torch.logspace(-3, 0, 4)).T
first = grid.repeat(1, num_populations).to(device)  # [2, 512]
train_rows, val_rows, test_rows = split(num_populations)
rows = minibatches(train_rows, num_steps, size)
starts, _ = stack_module_state([make_model().to(device) for _ in range(first.shape[1])])
constant = torch.ones(num_steps)
cosine = (1 + torch.linspace(0, math.pi, num_steps + 1)[:-1].cos()) / 2


def compete(settings, schedule, length):
    """Test loss and number of each population's pick, and the history."""
    params = {name: p.detach().clone().requires_grad_() for name, p in starts.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=1, weight_decay=0, fused=True)
    history = evolve(
        params, optimizer, settings, schedule, rows, val_rows, data, length
    )
    val = evaluate(params, val_rows, data).nan_to_num(nan=torch.inf).view(-1, size)
    test = evaluate(params, test_rows, data).view(-1, size)
    pick = val.argmin(dim=1, keepdim=True)
    return test.gather(1, pick).flatten().cpu(), pick.flatten(), history


pbt, _, history = compete(first, constant, length)
fixed, _, _ = compete(first, constant, num_steps)
falling, pick, _ = compete(first, cosine, num_steps)
chosen = grid.to(device)[:, pick].repeat_interleave(size, dim=1)
tuned, _, _ = compete(chosen, cosine, num_steps)

# %%
# A verdict needs a mean difference, over the sixteen populations, of more than three
# standard errors; chance alone reaches that in about one of a hundred comparisons. The
# splits are of the same images, so a verdict is about these digits.

rivals = {"constant": fixed, "cosine": falling, "tuned cosine": tuned}
gaps = pbt - torch.stack(list(rivals.values()))  # [3, 16]
errors = gaps.std(dim=1) / gaps.shape[1] ** 0.5
verdicts = []
print(f"mean test loss of PBT {pbt.mean():.4f}")
for name, gap, error in zip(rivals, gaps.mean(dim=1), errors, strict=True):
    verdict = "not clearly apart from"
    if gap.abs() > 3 * error:
        verdict = "better than" if gap < 0 else "worse than"
    verdicts.append(f"PBT is {verdict} {name}")
    print(f"{verdicts[-1]} {rivals[name].mean():.4f}: ", end="")
    print(f"difference {gap:+.4f}, standard error {error:.4f}")

medians = [settings[0].median().item() for settings, _ in history]
print("median rate by generation:", *[f"{rate:.2g}" for rate in medians])
ancestor = torch.arange(first.shape[1], device=device)
for _, source in history[1:]:
    ancestor = ancestor[source]
founders = torch.tensor([len(a.unique()) for a in ancestor.view(-1, size)])
print(f"first members with descendants: {founders.min()} to {founders.max()} of {size}")

# %%
# **Where PBT is better than constant**, the exchanges help, at equal steps and not at
# equal time. **Where PBT is not clearly better than a cosine**, a sweep with a schedule
# is simpler; that it is as good is not shown. **Where PBT is better than both
# cosines**, exchanges give more than a falling rate.
#
# A cosine has to know the last step before the first one. PBT does not, and the same
# exchange tunes any setting that a step can read. So PBT remains of use where training
# has no fixed end, and for settings without a known schedule; Jaderberg and others show
# it on agents of reinforcement learning.
#
# The last line printed above counts the price: the last population descends from so few
# of its first members, and relatives probably disagree less. For an ensemble, train
# independent members.

fig, ax = plt.subplots(layout="constrained")
for height, gap in enumerate(gaps):
    ax.plot(gap, torch.full_like(gap, height), "o", alpha=0.4, color="C0")
ax.errorbar(gaps.mean(dim=1), range(3), xerr=3 * errors, fmt="D", color="C1", capsize=5)
ax.axvline(0, color="C7", linestyle=":")
ax.set_yticks(range(3), labels=rivals)
ax.set_xlabel("test loss of PBT minus that of the rival (left of 0: PBT is better)")
ax.set_ylabel("rival")
ax.set_title(
    f"{len(pbt)} populations of {size}; orange: mean, three standard errors\n"
    f"digits, MLP 64-32-10, {num_steps} steps, float32, {device.type}"
)
fig.set_label(
    f"Test loss of PBT minus that of its rivals in each of {len(pbt)} populations. "
    f"Result: {'; '.join(verdicts)}."
)

# %%
# What does an exchange cost?
# ---------------------------
#
# An exchange runs 450 images forward, a step 32 images forward and backward, so an
# exchange should cost several steps. Both for all members, warm, in float32:


def in_turns(*ways, seconds=1.0):
    """For each way: seconds of a call, gain over the first way, the gain's interval."""

    def clock(way, calls=1):
        start = timer()  # waits for a GPU
        for _ in range(calls):
            way()
        return (timer() - start) / calls

    calls = math.ceil(5e-3 / min(clock(way) for way in 3 * ways))  # the same for all
    turns, end = [], timer() + seconds
    while timer() < end or len(turns) < 7 or len(turns) % 2 == 0:
        back = (-1) ** len(turns)  # every second turn runs backwards
        turns.append([clock(way, calls) for way in ways[::back]][::back])
    times, cut = torch.tensor(turns).T, int((len(turns) - 1) / 2 - len(turns) ** 0.5)
    gains = (times[0] / times).sort().values[:, [len(turns) // 2, cut, -1 - cut]]
    first = times[0].median().item()
    return [(first / gain, gain, low, high) for gain, low, high in gains.tolist()]


params = {name: p.detach().clone().requires_grad_() for name, p in starts.items()}
optimizer = torch.optim.AdamW(params.values(), lr=1, weight_decay=0, fused=True)
one = first, constant, rows[:1], val_rows, data, length
step, swap = in_turns(
    lambda: evolve(params, optimizer, *one),
    lambda: exchange(params, optimizer, first, evaluate(params, *one[3:5]), size),
)
print(f"a step {step[0] * 1e3:.2f} ms, an exchange {swap[0] * 1e3:.2f} ms")
low, share, high = (1 / (1 + length * swap[i]) for i in (3, 1, 2))  # gain: step / swap
print(f"every {length} steps: {share:.0%} of the time ({low:.0%} to {high:.0%})")

# %%
# The rivals could spend that share on more steps. Where it is large, validate on fewer
# images.
#
# The mistake: new tensors instead of new values
# ----------------------------------------------
#
# ``exchange`` copies in place. New stacked tensors raise no error, but the optimizer
# holds the old ones, and the population stops learning:

params, _ = stack_module_state(models)
optimizer = torch.optim.AdamW(params.values(), lr=1)
params = {name: p.detach().flip(0).requires_grad_() for name, p in params.items()}
before = params["2.bias"].detach().clone()
vmap(loss_of, in_dims=(0, None, None))(params, *data64).sum().backward()
optimizer.step()
print(f"a step moves the new tensors by {(params['2.bias'] - before).abs().max():g}")

# %%
# Remember
# --------
#
# An exchange is one indexed copy, in place, of parameters and optimizer state (and of
# buffers, if there are any: ``b.copy_(b[source])``), with new settings for the copies.
# ``settings.clamp`` keeps them in a range. Compare PBT with a sweep under a schedule,
# by test loss, paired over several populations.
#
# Next
# ----
#
# - ``plot_faster_training.py``: shorter steps, fused and compiled.
# - ``plot_from_many_to_few.py``: keep a team of five instead of one winner.
#
# References
# ----------
#
# - M. Jaderberg and others: Population based training of neural networks, 2017,
#   `arXiv:1711.09846 <https://arxiv.org/abs/1711.09846>`_.
