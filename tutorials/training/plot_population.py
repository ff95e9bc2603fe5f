"""
Population-based training on stacked models
===========================================

Let a population of small networks tune its own learning rates while it trains: the
worst members take over weights, optimizer state and settings of the best, by one
indexed copy of each stacked tensor.

**In short.** Train all members as one stack, each at its own rate; every few steps,
index each stacked tensor with the members to continue from, and change the settings of
the copies at random (with batch norm, the rows of ``buffers`` too). It spares you the
search for a learning rate; do not expect it to beat a rate that was chosen well.

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
# a while; then the worst take over the state of the best (*exploit*), change the
# settings that came with it (*explore*), and all train on. ``losses`` are those on
# validation data, one for each member. Many populations fit into one stack: the first
# ``size`` members are one, the next ``size`` another.


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
# ``stacked[source]`` reads all rows before ``copy_`` writes any, so a member may be
# copied and overwritten at once. ``settings`` has a row of learning rates and a row of
# weight decays. A loss that is no number sorts last.
#
# The members themselves train as in a sweep: one stock optimizer with ``lr=1``, and a
# rate and a decay for each member after its step.


def step_each(params, optimizer, rates, decays):
    """Step with lr=1, then give each member its own rate and decoupled decay."""
    old = [p.detach().clone() for p in params.values()]
    optimizer.step()
    with torch.no_grad():
        for p, before in zip(params.values(), old, strict=True):
            rate = rates.view(-1, *[1] * (p.dim() - 1))  # [num_models, 1, ...]
            decay = decays.view_as(rate)
            p.copy_(before + rate * (p - before) - rate * decay * before)


def evolve(params, optimizer, settings, rows, data, size, length):
    """Train; exchange after every ``length`` steps but the last; return settings."""
    x, y, x_val, y_val = data
    history = [(settings, None)]
    for step, row in enumerate(rows):
        if step and step % length == 0:
            losses = evaluate(params, x_val, y_val)
            settings, source = exchange(params, optimizer, settings, losses, size)
            history.append((settings, source))
        losses = vmap(loss_of)(params, x[row], y[row])
        optimizer.zero_grad()
        losses.sum().backward()
        step_each(params, optimizer, *settings)
    return history


# %%
# Data, the loss of one member, and the validation losses of all:

digits = load_digits()
order = torch.randperm(len(digits.target))
images = torch.tensor(digits.data / 16, dtype=torch.float32)[order].to(device)
labels = torch.tensor(digits.target)[order].to(device)
x_train, x_val, x_test = images.split([897, 450, 450])  # [897, 64], ...
y_train, y_val, y_test = labels.split([897, 450, 450])


def make_model():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


with torch.device("meta"):
    skeleton = make_model()


def loss_of(params, x, y):
    return F.cross_entropy(functional_call(skeleton, params, (x,), strict=True), y)


@torch.no_grad()
def evaluate(params, x, y):
    return vmap(loss_of, in_dims=(0, None, None))(params, x, y)  # [num_models]


# %%
# The same with separate models
# -----------------------------
#
# The plain way keeps a list of pairs, a model and its optimizer. It decides by itself
# who copies whom, with ``copy.deepcopy``, and takes over only the random settings. Two
# populations of eight, four generations of five steps, in float64 on the CPU:

num_models, size, length, num_steps = 16, 8, 5, 20
rates = torch.logspace(-4, -1, size).repeat(2)
settings = torch.stack([rates, torch.rand(num_models)]).cpu().double()
rows = torch.randint(len(x_train), (num_steps, num_models, 64))
models = [make_model().cpu().double() for _ in range(num_models)]
data64 = x_train.cpu().double(), y_train.cpu(), x_val.cpu().double(), y_val.cpu()

params, _ = stack_module_state(models)  # copies; the models stay as they are
optimizer = torch.optim.AdamW(params.values(), lr=1, weight_decay=0)
history = evolve(params, optimizer, settings, rows, data64, size, length)

# %%


def train_alone(model, optimizer, rate, decay, rows):
    optimizer.param_groups[0].update(lr=rate.item(), weight_decay=decay.item())
    for row in rows:
        optimizer.zero_grad()
        F.cross_entropy(model(data64[0][row]), data64[1][row]).backward()
        optimizer.step()


pairs = [(m, torch.optim.AdamW(m.parameters())) for m in copy.deepcopy(models)]
for generation, (settings, _) in enumerate(history):
    if generation:
        losses = [F.cross_entropy(m(data64[2]), data64[3]).item() for m, _ in pairs]
        for first in range(0, num_models, size):
            order = sorted(range(first, first + size), key=losses.__getitem__)
            for good, bad in zip(order[:2], order[-2:], strict=True):
                pairs[bad] = copy.deepcopy(pairs[good])
    for i, pair in enumerate(pairs):
        own_rows = rows[generation * length :, i][:length]
        train_alone(*pair, *settings[:, i], own_rows)

alone = torch.stack([parameters_to_vector(m.parameters()) for m, _ in pairs])
together = torch.cat([p.flatten(1) for p in params.values()], dim=1)
worst = (alone - together).abs().max().item()
assert worst < 1e-10, (
    f"the population is not that of separate models: {worst:.0e} apart"
)
print(f"{len(history) - 1} exchanges, {num_steps} steps: at most {worst:.0e} apart")

# %%
# Does it find better networks?
# -----------------------------
#
# Sixteen populations of 16 members train for 200 steps in three ways, from the same
# first members, with the same minibatches:
#
# - **PBT**: an exchange every 20 steps. The first rates are spread from 0.0001 to 10,
#   the first decays are random between 0.001 and 1.
# - **fixed**: the same first settings without exchange, which is a plain sweep.
# - **best rate**: all members at the rate with the lowest mean validation loss in all
#   sixteen fixed populations, with their first decays. PBT did not have that help.
#
# Each population picks its best member on validation data and is judged by the test
# loss of that one. **What should happen:** against *fixed*, PBT has three advantages:
# hopeless members are put to use, copies search near good settings, and a rate can
# change on the way. Against *best rate*, only the last one remains.

size, length, num_steps, num_models = 16, 20, 200, 256
rates = torch.logspace(-4, 1, size).repeat(num_models // size)
first = torch.stack([rates, 10 ** (-3 * torch.rand(num_models))]).to(device)
rows = torch.randint(len(x_train), (num_steps, num_models // size, 64)).to(device)
rows = rows.repeat_interleave(size, dim=1)  # a population shares its minibatches
starts, _ = stack_module_state([make_model().to(device) for _ in range(num_models)])
data = x_train, y_train, x_val, y_val


def compete(settings, length):
    """Test loss of each population's pick, all validation losses, and the history."""
    params = {name: p.detach().clone().requires_grad_() for name, p in starts.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=1, weight_decay=0, fused=True)
    history = evolve(params, optimizer, settings, rows, data, size, length)
    val = evaluate(params, x_val, y_val).nan_to_num(nan=torch.inf).view(-1, size)
    test = evaluate(params, x_test, y_test).view(-1, size)
    return test.gather(1, val.argmin(1, keepdim=True)).flatten().cpu(), val, history


pbt, _, history = compete(first, length)
fixed, val, _ = compete(first, num_steps)
best_rate = rates[val.mean(dim=0).argmin().item()].item()
best, _, _ = compete(
    torch.stack([torch.full_like(first[0], best_rate), first[1]]), num_steps
)

# %%
# A fair coin shows one side at least 13 times in 16 in 2 % of all cases. That is what
# we ask for before we call one way better.

verdicts = []
for name, rival in (("fixed", fixed), (f"best rate, {best_rate:.2g}", best)):
    wins = (pbt < rival).sum().item()
    verdict = "PBT is better" if wins >= 13 else "no clear difference"
    verdicts.append(f"against {name}: {'PBT is worse' if wins <= 3 else verdict}")
    print(f"{verdicts[-1]}, lower test loss in {wins} of {len(pbt)}")
    print(f"    mean test loss {pbt.mean():.3f} against {rival.mean():.3f}")

ancestor = torch.arange(num_models, device=device)
for _, source in history[1:]:
    ancestor = ancestor[source]
founders = torch.tensor([len(a.unique()) for a in ancestor.view(-1, size)])
medians = [settings[0].median().item() for settings, _ in history]
print("median rate by generation:", *[f"{rate:.2g}" for rate in medians])
print(f"first members with descendants: {founders.min()} to {founders.max()} of {size}")

# %%
# The test loss decides, because PBT has used the validation data at every exchange.
#
# **Against fixed settings**, a win is what the first two advantages promise; without
# one, the first settings already held one that is good enough. **Against the best
# rate**, no clear difference is a good result for PBT, which had to find that rate. A
# win would say that a rate that changes on the way beats any fixed one, a loss that
# sixteen initializations at a good rate are worth more than copies of a few.
#
# All populations share one split of the data. Another ``manual_seed`` draws another one
# and can move a count by several: run the page with a few before you trust a verdict.

fig, ax = plt.subplots(layout="constrained")
for label, rival, marker in zip(verdicts, (fixed, best), "ox", strict=True):
    ax.plot(rival.numpy(), pbt.numpy(), marker, label=label)
low, high = torch.cat([pbt, fixed, best]).aminmax()
ax.plot([low, high], [low, high], color="C7", linestyle=":")
ax.text(0.03, 0.95, "PBT is worse", transform=ax.transAxes, va="top")
ax.text(0.97, 0.05, "PBT is better", transform=ax.transAxes, ha="right")
ax.set(xlabel="test loss of the rival", ylabel="test loss of PBT")
ax.set_title(
    f"{len(pbt)} populations of {size}, each a mark for each rival\n"
    f"digits, MLP 64-32-10, {num_steps} steps, float32, {device.type}"
)
fig.legend(loc="outside lower center")
fig.set_label(
    f"Test loss of PBT against that of each rival, one mark for each of {len(pbt)} "
    f"populations, with the line where both are equal. Result {'; '.join(verdicts)}."
)

# %%
# The other price of a win is in the count of first members with descendants: members
# with a common ancestor disagree less. Where you want an ensemble, train independent
# ones at the rate that PBT has found.
#
# What does an exchange cost?
# ---------------------------
#
# A validation is a forward pass of 450 images, a step a forward and a backward pass of
# 64; a copy is one pass over the state. So an exchange should cost a few steps, nearly
# all of it validation. A step and an exchange of all 256 members, warm, in float32:


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
state = params, optimizer, first
step, swap = in_turns(
    lambda: evolve(*state, rows[:1], data, size, length),
    lambda: exchange(*state, evaluate(params, x_val, y_val), size),
)
print(f"a step {step[0] * 1e3:.2f} ms, an exchange {swap[0] * 1e3:.2f} ms")
low, share, high = (1 / (1 + length * swap[i]) for i in (3, 1, 2))  # gain: step / swap
print(f"An exchange every {length} steps takes {share:.0%} of the time", end=" ")
print(f"({low:.0%} to {high:.0%}).")

# %%
# That share is what a fixed population could spend on more steps. If it is large,
# validate on fewer images or exchange less often.
#
# The mistake: new tensors instead of new values
# ----------------------------------------------
#
# Copying into a leaf of autograd needs ``torch.no_grad()``. The way around that error
# is worse: new stacked tensors raise nothing, but the optimizer holds the old ones, and
# the population stops learning.

params, _ = stack_module_state(models)
optimizer = torch.optim.AdamW(params.values(), lr=1)
bias, source = params["2.bias"], torch.arange(len(models)).roll(1)
try:
    bias.copy_(bias[source])
except RuntimeError as problem:
    print(f"RuntimeError: {problem}")

params = {name: p.detach()[source].requires_grad_() for name, p in params.items()}
before = params["2.bias"].detach().clone()
vmap(loss_of, in_dims=(0, None, None))(params, *data64[:2]).sum().backward()
optimizer.step()
print(f"a step moves the new tensors by {(params['2.bias'] - before).abs().max():g}")

# %%
# Remember
# --------
#
# An exchange is one indexed copy, in place, of every stacked tensor: parameters,
# optimizer state, and the settings that go with them. Compare PBT with fixed settings,
# paired over several populations, by test loss. It tunes rates while it trains, and
# pays with diversity.
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
# - A. Flajolet and others: Fast population-based reinforcement learning on a single
#   machine, ICML 2022, `arXiv:2206.08888 <https://arxiv.org/abs/2206.08888>`_. Its
#   figure 2 times an update of vectorized populations by their size.
