"""
Many reinforcement learning agents in one call
==============================================

Train 64 agents at once with ``torch.func.vmap``, four learning rates with sixteen seeds
each, and see how often a few seeds put two rates in the same order as all of them.

**In short.** Stack the networks of the agents, keep all environments in one tensor
``[agents, environments, ...]``, and train on the sum of the agents' losses: each agent
learns what it would learn alone. One call can make the networks faster; it does nothing
for the environments. With few seeds, which of two settings looks better may be chance.

Before you start: ``plot_hyperparameter_sweep.py`` gives each model its own learning
rate.
"""

# %%
# Set-up
# ------

import math
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
where = f"{device.type.upper()}, {torch.get_num_threads()} threads"
if device.type == "cuda":
    where = torch.cuda.get_device_name()
print(f"{where}, torch {torch.__version__}, float32 but for the check")

# %%
# Act and learn with all agents in one call
# -----------------------------------------
#
# An agent sees a cart with a pole, and pushes it to the right or to the left. Its actor
# says how much it prefers the right, its critic how well the episode will go on.


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
        self.critic = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, state):  # [..., 4]
        x = state * scale.to(state)
        return self.actor(x).squeeze(-1), self.critic(x).squeeze(-1)


scale = torch.tensor([1.0, 1.0, 5.0, 1.0], device=device)  # the angle is small
num_agents, num_carts = 64, 16
params, _ = stack_module_state([Agent().to(device) for _ in range(num_agents)])
with torch.device("meta"):
    skeleton = Agent()


def call(params, states):  # of one agent
    return functional_call(skeleton, params, (states,), strict=True)


everyone = vmap(call)  # each agent sees its own carts
states = torch.zeros(num_agents, num_carts, 4, device=device)
logits, values = everyone(params, states)  # [64, 16], [64, 16]
right = torch.rand(logits.shape).to(device) < logits.sigmoid()  # actions, drawn outside
print(f"{num_agents} agents, {num_carts} carts each, actions {list(right.shape)}")

# %%
# To learn, write the loss of one agent, here that of PPO [1]: each mean in it is a mean
# over this agent's data. One optimizer with ``lr=1`` steps for all; then each agent
# keeps as much of its step as its own rate says.


def log_prob(logits, right):
    return F.logsigmoid(torch.where(right, logits, -logits))


def loss_of(agent, states, right, before, advantage, goal):
    logits, values = agent(states)
    advantage = (advantage - advantage.mean()) / advantage.std()
    ratio = (log_prob(logits, right) - before).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return (values - goal).square().mean() - gain.mean()


def learn(params, optimizer, rates, data):
    def loss(params, *data):
        return loss_of(partial(call, params), *data)

    losses = vmap(loss)(params, *data)  # [agents]
    optimizer.zero_grad()
    losses.sum().backward()
    old = [p.detach().clone() for p in params.values()]
    optimizer.step()  # lr=1
    with torch.no_grad():
        for p, start in zip(params.values(), old, strict=True):
            p.copy_(start.lerp(p, rates.view(-1, *[1] * (p.dim() - 1))))


# %%
# CartPole as tensors, for any number of carts
# --------------------------------------------
#
# Arithmetic on tensors of any shape needs no ``vmap``. States, falls and time limits
# are those of ``CartPole-v1`` of gymnasium 1.4.0 (tested).


def move(state, right):  # [..., 4], [...] -> [..., 4]
    _, speed, angle, turn = state.unbind(-1)
    sin, cos = angle.sin(), angle.cos()
    push = (torch.where(right, 10.0, -10.0) + 0.05 * turn**2 * sin) / 1.1
    spin = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    pull = push - 0.05 * spin * cos / 1.1
    return state + 0.02 * torch.stack([speed, pull, turn, spin], dim=-1)


def fallen(state):
    return (state[..., 0].abs() > 2.4) | (state[..., 2].abs() > math.radians(12))


# %%
# Play, and judge what was seen
# -----------------------------
#
# The random numbers come from outside, five for each cart and step: one for the action,
# four for a new start, which ``torch.where`` gives to the carts whose episode ends. A
# cart at its time limit did not fall and could have gone on, so its value after the
# last step counts (``~fell``), while the sum of the advantages ends (``~end``) [2, 3].


@torch.no_grad()
def play(agent, state, age, luck):
    """Play 16 steps: the carts at the end, and what was seen, [agents, 16, carts]."""
    seen = []
    for numbers in luck:
        right = numbers[..., 0] < agent(state)[0].sigmoid()
        after, age = move(state, right), age + 1
        fell = fallen(after)
        end = fell | (age >= 500)
        seen.append((state, right, after, fell, end))
        start = 0.1 * numbers[..., 1:] - 0.05
        state, age = torch.where(end[..., None], start, after), age * ~end
    return (state, age), [torch.stack(part, dim=1) for part in zip(*seen, strict=True)]


@torch.no_grad()
def judge(agent, states, right, after, fell, end):
    """The data of the loss; advantages with discount 0.99 and lambda 0.95."""
    logits, values = agent(states)
    advantage = 0.01 + 0.99 * agent(after)[1] * ~fell - values  # reward of a step: 0.01
    for t in reversed(range(15)):
        advantage[:, t] += 0.99 * 0.95 * advantage[:, t + 1] * ~end[:, t]
    return states, right, log_prob(logits, right), advantage, advantage + values


def train(agent, update, carts, luck):
    """Play 16 steps and learn four times from them, for each row of luck."""
    for numbers in luck:
        carts, seen = play(agent, *carts, numbers)
        data = judge(agent, *seen)
        for _ in range(4):
            update(data)
    return carts


# %%
# The same in a loop
# ------------------
#
# The loop at its best has a module for each agent, one stock Adam with a rate for each,
# and one backward pass of the summed losses.


def loop_act(models, states):
    outputs = [model(own) for model, own in zip(models, states, strict=True)]
    return [torch.stack(part) for part in zip(*outputs, strict=True)]


def loop_learn(models, optimizer, data):
    rows = zip(models, *data, strict=True)
    losses = torch.stack([loss_of(model, *row) for model, *row in rows])
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()


def both_ways(models, rates):
    """How to act and to learn in a loop and in one call; the stacked parameters."""
    pairs = zip(models, rates.tolist(), strict=True)
    groups = [{"params": m.parameters(), "lr": rate} for m, rate in pairs]
    adam = torch.optim.Adam(groups, fused=True)
    loop = partial(loop_act, models), partial(loop_learn, models, adam)
    params, _ = stack_module_state(models)  # copies
    adam = torch.optim.Adam(params.values(), lr=1, fused=True)
    once = partial(everyone, params), partial(learn, params, adam, rates)
    return loop, once, params


# %%
# The check, in float64 on the CPU: three agents with rates of their own play and learn
# ten times, in both ways, from the same random numbers. (Each trained alone, with an
# optimizer of its own, they become the same: tested.)

luck = torch.rand(10, 16, 3, 8, 5, device="cpu", dtype=torch.float64)
carts = luck[0, 0, ..., 1:] - 0.5, torch.zeros(3, 8)
models = [Agent().cpu().double() for _ in range(3)]
*ways, three = both_ways(models, torch.tensor([0.003, 0.01, 0.03]).cpu().double())
for way in ways:
    train(*way, carts, luck)
loop, _ = stack_module_state(models)
far = torch.stack([(three[name] - p).abs().max() for name, p in loop.items()]).max()
assert far < 1e-9, f"an agent does not learn what it learns in a loop: {far:.0e}"
print(f"parameters after 40 steps of Adam: at most {far:.0e} from those of the loop")

# %%
# In float32, a rounding may flip an action, and the agent goes another way from there.
#
# Train 64 agents, and evaluate them apart
# ----------------------------------------
#
# Each agent plays 256 steps and learns four times from them, a hundred times. After
# every ten, its greedy policy, which always takes the preferred action, plays eight new
# carts apart from the training: the mean number of their steps counts, at most 500.


@torch.no_grad()
def evaluate(agent, state):
    alive, length = ~fallen(state), 0
    for _ in range(500):
        length = length + alive
        state = move(state, agent(state)[0] > 0)
        alive = alive & ~fallen(state)
    return length.float().mean(dim=-1)  # [agents]


rates, num_seeds = [0.0003, 0.003, 0.03, 0.1], 16
own_rates = torch.tensor(rates, device=device).repeat_interleave(num_seeds)
adam = torch.optim.Adam(params.values(), lr=1, fused=True)
agent, update = partial(everyone, params), partial(learn, params, adam, own_rates)
carts, curves = (states, torch.zeros_like(states[..., 0])), []
for _ in range(10):
    luck = torch.rand(10, 16, num_agents, num_carts, 5).to(device)
    carts = train(agent, update, carts, luck)
    new = 0.1 * torch.rand(num_agents, 8, 4).to(device) - 0.05
    curves.append(evaluate(agent, new).view(-1, num_seeds))
curves = torch.stack(curves, dim=-1).cpu()  # [4 rates, 16 seeds, 10 evaluations]

# %%
# How many seeds does an order need?
# ----------------------------------
#
# Agents of one setting can differ much, so reports of reinforcement learning give
# intervals, and the interquartile mean (IQM), the mean of the middle half of the seeds
# [4, 5]. Here, an agent's **score** is the mean of its ten evaluations, and of two
# neighboring rates the one with the higher mean score comes first. From the sixteen
# seeds of each rate, *n* are drawn with repetition, 10,000 times: how often do they
# give the same order as all sixteen?


def iqm(values):  # [..., seeds]
    cut = values.shape[-1] // 4
    return values.sort(dim=-1).values[..., cut:-cut].mean(dim=-1)


def drawn(values, n):
    """Mean of n seeds, drawn 10,000 times: [rates, seeds] -> [rates, 10000]."""
    index = torch.randint(values.shape[1], (len(values), 10_000 * n))
    return values.gather(1, index).unflatten(1, (-1, n)).mean(dim=-1)


for rate, last in zip(rates, curves[..., -1], strict=True):
    solved = f"{(last >= 475).sum()} of {num_seeds} agents solve it (475 or more)"
    print(f"rate {rate}, last evaluation: IQM {iqm(last):.0f}, {solved}")
scores, numbers = curves.mean(dim=-1), torch.arange(1, num_seeds + 1)
whole = scores.mean(dim=1).diff()  # [3]
gaps = torch.stack([drawn(scores, n).diff(dim=0) for n in numbers.tolist()])
same = (gaps * whole[:, None] > 0).float().mean(dim=-1)  # [16 numbers, 3]
edges = gaps[-1].quantile(torch.tensor([0.025, 0.975]), dim=1).T
told = []
for i, (low, high) in enumerate(edges.tolist()):
    better = "better" if low > 0 else "worse" if high < 0 else "not told apart"
    pair = f"{rates[i + 1]} against {rates[i]}"
    print(f"{pair}: {better}, score {whole[i]:+.0f} ({low:+.0f} to {high:+.0f})")
    shares = ", ".join(f"{share:.0%}" for share in same[[2, 9, 15], i].tolist())
    print(f"    draws of 3, 10, 16 seeds in the order of all: {shares}")
    told.append(f"{pair} {shares}")

# %%
# In brackets: 95 % of the draws of sixteen. Where they hold 0, **even sixteen seeds do
# not tell the two rates apart**, and the right panel says how often an order comes out,
# not that it is right. The first three rates are a factor of ten apart each.

fig, (left, side) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
played = 2.56 * torch.arange(1, 1 + curves.shape[-1])
for i, (rate, marker) in enumerate(zip(rates, "os^D", strict=True)):
    left.plot(played, curves[i].T, color=f"C{i}", lw=0.5, alpha=0.4)
    left.plot(played, iqm(curves[i].T), color=f"C{i}", marker=marker, label=rate)
left.set(xlabel="steps of an agent, thousands", ylabel="greedy steps, at most 500")
left.set_title("Each thin line is a seed, bold: IQM")
left.legend(title="rate")
for i, marker in enumerate("os^"):
    name = f"{rates[i + 1]} against {rates[i]}"
    side.plot(numbers, same[:, i], color=f"C{i + 4}", marker=marker, label=name)
side.axhline(0.5, color="gray")
side.set(xlabel="seeds drawn", ylabel="share of draws", ylim=(0, 1.05))
side.set_title("How often they order two rates as all do")
side.legend()
fig.suptitle(f"PPO on CartPole, {num_seeds} seeds for each rate, float32, {where}")
fig.set_label(
    f"Left: greedy steps of {num_agents} agents during training, one thin line each, "
    "and the interquartile mean of each rate. Right: share of draws in which n seeds "
    f"order two rates as all do. With 3, 10 and 16 seeds: {'; '.join(told)}."
)

# %%
# The draws know these sixteen seeds only, so new seeds can be further off. The IQM
# leaves out the worst and the best four seeds; the thin lines show them. All this is
# one task and one short training.
#
# What is faster, and what is not
# -------------------------------
#
# The loop starts the same small operators once for each agent, so we expect one call to
# gain with many agents. Both ways move all carts as one tensor: the gain is none of
# theirs.


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
# An update of all agents: 16 steps, and learning four times. Medians of at least seven
# turns, warm; a gain is a median of ratios, in brackets its 95 % interval.

for n in [1, 8, 64] if device == cpu else [1, 64, 256]:
    luck = torch.rand(1, 16, n, num_carts, 5).to(device)
    carts = luck[0, 0, ..., 1:] / 10, torch.zeros(n, num_carts, device=device)
    models = [Agent().to(device) for _ in range(n)]
    *ways, _ = both_ways(models, torch.full((n,), 0.01, device=device))
    updates = [partial(train, *way, carts, luck) for way in ways]
    (loop, *_), (once, *gain) = in_turns(*updates, seconds=0.3)
    times = f"loop {loop * 1e3:.3g} ms, one call {once * 1e3:.3g} ms"
    print(f"agents: {n}, {times}, {said(*gain)}")

# %%
# Where one call is slower, run the loop.
#
# **The environments gain nothing from** ``vmap``: all carts are one tensor without it.
# Nor are these tensors the fastest carts on a CPU. On two cores of an Intel Xeon, timed
# apart from this page on 2026-11-30, a step of the vector environment of gymnasium
# 1.4.0, in NumPy, took 0.037 ms for 64 carts and 0.074 ms for 1,024; the tensors took
# 0.099 and 0.13 ms, with new starts. Tensors need no copy to a GPU and back; what that
# is worth was not measured.
#
# The mistake: an action drawn inside ``vmap``
# --------------------------------------------


def draws(params, states):
    logits, _ = call(params, states)
    return torch.distributions.Bernoulli(logits=logits).sample()


try:
    vmap(draws)(params, states)
except RuntimeError as error:
    print(error)

# %%
# Draw outside, from the logits of all agents, or pass ``randomness="different"``
# (tested). What else people meet (tested):
#
# - **A new start by a mask**: ``state[fallen(state)] = 0`` raises an error about
#   ``dynamic shape`` inside ``vmap``; ``torch.where``, as in ``play``, does not.
# - **Several actions**: draw from logits of any shape by ``(logits -
#   torch.empty_like(logits).exponential_().log()).argmax(-1)``, outside ``vmap``.
# - **An environment that returns** ``[environments, agents, ...]``: map with
#   ``in_dims=(0, 1)`` and ``out_dims=1``.
# - **The same seed, another number of agents** gives an agent other random
#   numbers. To run it again alone, keep ``luck``.
#
# Remember
# --------
#
# **Stack the networks; keep the environments in one tensor, the agents first.** Then a
# seed more is a row more. Evaluate apart from training, show all seeds, and give the
# interval of a difference before you call one setting better.
#
# Next
# ----
#
# - ``plot_critics.py``: ten critics, the minimum of a random pair, slow targets.
# - ``plot_population.py``: let the best agents replace the worst ones.
# - ``plot_saving.py``: take one agent out of the stack, as a module.
#
# References
# ----------
#
# - [1] J. Schulman and others: Proximal policy optimization algorithms, 2017,
#   `arXiv:1707.06347 <https://arxiv.org/abs/1707.06347>`_.
# - [2] J. Schulman and others: High-dimensional continuous control using generalized
#   advantage estimation, 2015, `arXiv:1506.02438 <https://arxiv.org/abs/1506.02438>`_.
# - [3] F. Pardo and others: Time limits in reinforcement learning, 2018,
#   `arXiv:1712.00378 <https://arxiv.org/abs/1712.00378>`_.
# - [4] P. Henderson and others: Deep reinforcement learning that matters, 2018,
#   `arXiv:1709.06560 <https://arxiv.org/abs/1709.06560>`_.
# - [5] R. Agarwal and others: Deep reinforcement learning at the edge of the
#   statistical precipice, 2021, `arXiv:2108.13264
#   <https://arxiv.org/abs/2108.13264>`_.
