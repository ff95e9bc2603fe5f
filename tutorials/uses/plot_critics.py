"""
Ten critics with slow targets in one call
=========================================

Train ten Q-functions, the critics of REDQ (SAC and TD3 have two), in one call of
``torch.func.vmap``: each goal is the minimum of a random pair of target networks, which
follow slowly. See what this minimum does to overestimated values.

**In short.** Stack the critics and the targets; ``target[name][pair]`` picks two of
ten, so that only these are computed; one ``lerp_`` for each stacked tensor is the
Polyak average of all targets. The minimum lowers the values. Over how many targets it
makes them right depends on the task, here on the buffer.

Before you start: ``plot_training.py`` trains a stack with one optimizer.
"""

# %%
# Set-up
# ------

import copy
import math
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.benchmark import timer

torch.manual_seed(0)
torch.backends.fp32_precision = "ieee"  # no TF32
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
where = f"{device.type.upper()}, {torch.get_num_threads()} threads"
if device.type == "cuda":
    where = torch.cuda.get_device_name()
print(f"{where}, torch {torch.__version__}, float32 but for the check")

# %%
# A random pair, and targets that follow
# --------------------------------------
#
# A critic gets a state and an action, side by side in ``x``, and gives the value: the
# discounted reward that it expects. Its goal is the reward plus the discounted value of
# the next state and action, for which the lower one of two targets counts [1, 2]. An
# actor would choose the next action (and SAC take ``alpha * log_prob`` off the
# minimum).


def build(width=64):
    hidden = nn.Linear(23, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(width, 1))


def value(params, x):  # of one critic
    return functional_call(skeleton, params, (x,), strict=True).squeeze(-1)


def learn(params, target, optimizer, x, reward, done, x_next, pair):
    with torch.no_grad():
        two = {name: t[pair] for name, t in target.items()}  # only two are computed
        goal = reward + 0.99 * values(two, x_next).amin(0) * ~done
    losses = (values(params, x) - goal).square().mean(1)  # [critics]
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    with torch.no_grad():
        for t, p in zip(target.values(), params.values(), strict=True):
            t.lerp_(p, 0.005)


values = vmap(value, in_dims=(0, None))  # the same batch for all: [critics, batch]
params, _ = stack_module_state([build().to(device) for _ in range(10)])
target = {name: p.detach().clone() for name, p in params.items()}
with torch.device("meta"):
    skeleton = build()
optimizer = torch.optim.Adam(params.values(), lr=3e-4, fused=True)

# %%
# One update, on random numbers in place of a batch of a replay buffer:


def draw(batch=256, device=device):
    x, x_next = torch.randn(2, batch, 23, device=device)
    reward, done = torch.randn(batch, device=device), torch.rand(batch) < 0.1
    return x, reward, done.to(device), x_next, torch.randperm(10)[:2].to(device)


learn(params, target, optimizer, *draw())
print(f"{len(params)} stacked tensors, values {list(values(params, draw()[0]).shape)}")

# %%
# The same with ten modules
# -------------------------
#
# A strong loop has one optimizer, one backward pass of the summed losses, and PyTorch's
# own function for moving averages, which takes all tensors at once.

follow = get_ema_multi_avg_fn(0.995)


def loop_learn(models, slow, optimizer, x, reward, done, x_next, pair):
    with torch.no_grad():
        two = torch.stack([slow[i](x_next).squeeze(-1) for i in pair.tolist()])
        goal = reward + 0.99 * two.amin(0) * ~done
    loss = sum((m(x).squeeze(-1) - goal).square().mean() for m in models)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    lists = (
        [p.detach() for m in team for p in m.parameters()] for team in (slow, models)
    )
    follow(*lists, None)


# %%
# The check, in float64 on the CPU, over twenty updates:

models = [build().cpu().double() for _ in range(10)]
slow, (own, _) = copy.deepcopy(models), stack_module_state(models)
goals = {name: p.detach().clone() for name, p in own.items()}
adam = torch.optim.Adam(own.values(), lr=3e-4)
loop_adam = torch.optim.Adam([p for m in models for p in m.parameters()], lr=3e-4)
for _ in range(20):
    batch = [part.to(own["0.weight"]) for part in draw(32, cpu)]
    batch[2], batch[4] = batch[2].bool(), batch[4].long()
    learn(own, goals, adam, *batch)
    loop_learn(models, slow, loop_adam, *batch)
apart = []
for stacked, team in (own, models), (goals, slow):
    loop, _ = stack_module_state(team)
    apart += [(stacked[name] - p).abs().max() for name, p in loop.items()]
far = torch.stack(apart).max().item()
assert far < 1e-10, f"the critics do not learn what those of the loop learn: {far:.0e}"
print(f"critics and targets after 20 updates: at most {far:.0e} from those of the loop")

# %%
# What the minimum does to the values
# -----------------------------------
#
# Here the truth is known: states and rewards are random numbers of mean zero that no
# action changes, so each state and action has the value 0. A critic has an output for
# each of four actions, and the highest one counts, as in Q-learning: a maximum over
# errors is too high on average. We expect the minimum over more targets to give lower
# values; this does not say where they end up.
#
# Eight runs of ten critics learn with the minimum over 1, 2, 5 and 10 targets: 320
# critics in one stack, by two ``vmap``. A mask takes the place of the pair. A run draws
# batches of 64 from a replay buffer of its own, which holds 50,000 transitions in one
# experiment and 500 in the other. The believed value is the mean of the ten critics
# over all actions of 200 new states: a maximum would be too high by itself.

sizes, num_runs = [1, 2, 5, 10], 8
over = torch.tensor(sizes, device=device).repeat_interleave(num_runs)  # of 32 runs


def build_four():
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4))


def of_actions(params, states):  # of one critic
    return functional_call(four, params, (states,), strict=True)


def improve(params, target, optimizer, states, actions, reward, following):
    with torch.no_grad():
        rank = torch.rand(num_runs, 10).argsort(1).repeat(len(sizes), 1).to(device)
        left_out = (rank >= over[:, None])[..., None, None]  # [32, 10, 1, 1]
        low = every(target, following).masked_fill(left_out, torch.inf).amin(1)
        goal = reward + 0.9 * low.amax(-1)  # [32, 64]
    taken = actions[:, None, :, None].expand(-1, 10, -1, 1)
    out = every(params, states).gather(-1, taken).squeeze(-1)  # [32, 10, 64]
    optimizer.zero_grad()
    (out - goal[:, None]).square().mean(-1).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for t, p in zip(target.values(), params.values(), strict=True):
            t.lerp_(p, 0.01)


every = vmap(vmap(of_actions, in_dims=(0, None)))
with torch.device("meta"):
    four = build_four()

# %%
# The runs with another minimum begin with the same critics and see the same batches:


def repeated(x):
    return torch.cat(len(sizes) * [x])  # [8, ...] -> [32, ...]


def believe(buffer, num_steps=400):
    """Believed values after every ten steps: [evaluations, sizes, runs]."""
    start, _ = stack_module_state([build_four().to(device) for _ in range(80)])
    start = {name: p.detach().unflatten(0, (8, 10)) for name, p in start.items()}
    params = {name: repeated(p).requires_grad_() for name, p in start.items()}
    target = {name: repeated(p) for name, p in start.items()}
    optimizer = torch.optim.Adam(params.values(), lr=3e-3, fused=True)
    shape, believed = (num_runs, buffer), []
    stored = [torch.randn(*shape, 4), torch.randint(4, shape), torch.randn(shape)]
    stored = [part.to(device) for part in (*stored, torch.randn(*shape, 4))]
    new = torch.randn(len(over), 200, 4).to(device)
    runs = torch.arange(num_runs, device=device)[:, None]
    for step in range(num_steps):
        rows = torch.randint(buffer, (num_runs, 64)).to(device)
        batch = [repeated(part[runs, rows]) for part in stored]
        improve(params, target, optimizer, *batch)
        if step % 10 == 9:
            with torch.no_grad():
                believed.append(every(params, new).mean((1, 2, 3)))
    return torch.stack(believed).unflatten(1, (-1, num_runs)).cpu()


curves = {buffer: believe(buffer) for buffer in (50_000, 500)}

# %%
# The values after the last step against the truth, in brackets the 95 % interval of the
# mean of eight runs:

verdicts = []
for buffer, curve in curves.items():
    print(f"buffer of {buffer:,} transitions, values that are truly 0:")
    for size, last in zip(sizes, curve[-1], strict=True):
        middle, reach = last.mean().item(), 2.36 * last.std().item() / num_runs**0.5
        low, high = middle - reach, middle + reach
        word = "too high" if low > 0 else "too low" if high < 0 else "not told from 0"
        value = f"over {size} {middle:+.2f}, {word}"
        print(f"    minimum {value} ({low:+.2f} to {high:+.2f})")
        verdicts.append(f"buffer of {buffer:,}: {value}")

# %%

fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
steps = 10 * torch.arange(1, 1 + len(curve))
for ax, (buffer, curve) in zip(axes, curves.items(), strict=True):
    for i, (size, dash) in enumerate(zip(sizes, ["-", "--", "-.", ":"], strict=True)):
        ax.plot(steps, curve[:, i], color=f"C{i}", lw=0.5, alpha=0.4)
        ax.plot(steps, curve[:, i].mean(1), f"C{i}{dash}", label=f"over {size}")
    ax.axhline(0, color="gray")
    ax.set(xlabel="steps", ylabel="believed value", title=f"buffer of {buffer:,}")
axes[1].legend(title="minimum", loc="upper left")
fig.suptitle(
    f"The truth is 0; thin: {num_runs} runs, bold: their mean; float32, {where}"
)
fig.set_label(
    "Believed values against steps, for minima over 1, 2, 5 and 10 targets and a large "
    "and a small buffer, the truth being 0. In the end, "
    f"{'; '.join(verdicts)}."
)

# %%
# **The minimum lowers the values; how far is right depends on the task.** Where a
# minimum over many targets is too low, fewer would be better. The two experiments
# differ in the buffer and in random draws. Where the small one gives higher values, a
# guess at the reason: all ten critics share the error of its few rewards, and a minimum
# over critics cannot remove a shared error. Where a curve still rises at the end, its
# last value is not the final one.
#
# So choose the number for your own task: compare the values of the critics with the
# discounted returns that the agent gets, as the paper does [1].
#
# Is one call faster?
# -------------------


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


def said(gain, low, high):
    """A gain in words; what noise can explain, up to 2 percent, is no difference."""
    if low > 1.02:
        return f"{gain:.3g}x faster ({low:.3g} to {high:.3g})"
    if high < 0.98:
        return f"{1 / gain:.3g}x slower ({1 / high:.3g} to {1 / low:.3g})"
    return f"no difference seen ({low:.2f} to {high:.2f})"


# %%
# A loop starts each layer once for each critic; the wider the critics, the less this
# should matter. (Those of REDQ have 256.) A whole update with a batch of 256, medians
# of at least seven turns, warm; in brackets the gain's 95 % interval:

for width in (64, 256):
    models = [build(width).to(device) for _ in range(10)]
    slow, (params, _) = copy.deepcopy(models), stack_module_state(models)
    target = {name: p.detach().clone() for name, p in params.items()}
    weights = [p for m in models for p in m.parameters()]
    loop_adam = torch.optim.Adam(weights, lr=3e-4, fused=True)
    adam, batch = torch.optim.Adam(params.values(), lr=3e-4, fused=True), draw()
    loop_way = partial(loop_learn, models, slow, loop_adam, *batch)
    once_way = partial(learn, params, target, adam, *batch)
    (loop, *_), (once, *gain) = in_turns(loop_way, once_way)
    times = f"loop {loop * 1e3:.3g} ms, one call {once * 1e3:.3g} ms"
    print(f"width {width}: {times}, {said(*gain)}")

# %%
# The mistake: targets that are the critics
# -----------------------------------------
#
# A new dictionary holds the same tensors, and no error says so:

target = dict(params)
print("shared memory:", all(target[name] is p for name, p in params.items()))

# %%
# ``lerp_`` then moves each tensor to itself: the targets are the critics and no longer
# slow. Take ``.detach().clone()``.
#
# Remember
# --------
#
# A random pair is an index into the stack, and a slow copy is one ``lerp_`` for each
# stacked tensor. **A minimum lowers the values; how far it should is a setting.**
#
# Next
# ----
#
# - ``plot_evolution.py``: rows of a matrix as networks, trained without a gradient.
# - ``plot_when_vmap_pays.py``: when one call is faster than a loop.
#
# References
# ----------
#
# - [1] X. Chen and others: Randomized ensembled double Q-learning, 2021,
#   `arXiv:2101.05982 <https://arxiv.org/abs/2101.05982>`_.
# - [2] S. Fujimoto and others: Addressing function approximation error in actor-critic
#   methods, 2018, `arXiv:1802.09477 <https://arxiv.org/abs/1802.09477>`_.
