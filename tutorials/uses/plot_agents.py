"""
Many reinforcement learning agents in one call
==============================================

Train 64 PPO agents on CartPole at once with ``torch.func.vmap``, sixteen random seeds
for each of four learning rates, and compare the rates by intervals over their seeds.

**In short.** Stack the agents with ``stack_module_state``, keep all environments in one
tensor ``[agents, environments, ...]``, draw the actions outside ``vmap``, and call
``backward`` on the sum of the agents' losses: each agent learns what it would learn
alone. Agents as small as these train much faster together than one after another.

This is not multi-agent learning: the agents never meet. Before you start:
``plot_hyperparameter_sweep.py`` gives each model its own learning rate.
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
# The actor gives the logit of a push to the right, the critic the value of the state.


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
right = torch.rand(logits.shape).to(device) < logits.sigmoid()  # drawn outside
print(f"{num_agents} agents, {num_carts} carts each, actions {list(right.shape)}")

# %%
# For learning, write the loss of one agent, here that of PPO [1] without entropy bonus
# and minibatches. Each mean in it is a mean over this agent's data, also the one that
# normalizes the advantages. Adam steps with ``lr=1``; then each agent keeps as much of
# its step as its own rate says. (With one rate for all, plain Adam is enough.)


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
# are those of ``CartPole-v1`` of gymnasium 1.4.0 (tested). A step brings a reward of
# 0.01 instead of 1, so that values stay below 1 at a discount of 0.99.


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
# and four for a new start, which ``torch.where`` gives to the carts whose episode ends.
# A cart that only meets its time limit has not fallen: its last value still counts
# (``~fell``), but the sum of the advantages ends there (``~end``) [2].


@torch.no_grad()
def play(agent, state, age, luck):
    """Carts after 16 steps, and what they went through, each [agents, 16, carts]."""
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


# %%
# The data of the loss, with a discount of 0.99 and a lambda of 0.95:


@torch.no_grad()
def judge(agent, states, right, after, fell, end):
    logits, values = agent(states)
    advantage = 0.01 + 0.99 * agent(after)[1] * ~fell - values  # reward of a step: 0.01
    for t in reversed(range(15)):
        advantage[:, t] += 0.99 * 0.95 * advantage[:, t + 1] * ~end[:, t]
    return states, right, log_prob(logits, right), advantage, advantage + values


def train(agent, update, carts, luck):
    """For each row of luck: play 16 steps and learn four times from them."""
    for numbers in luck:
        carts, seen = play(agent, *carts, numbers)
        data = judge(agent, *seen)
        for _ in range(4):
            update(data)
    return carts


# %%
# Each agent learns what it learns alone
# --------------------------------------
#
# Alone, an agent is a module with an optimizer of its own. The check, in float64 on the
# CPU: three agents with three rates learn in both ways, from the same random numbers.


def learn_alone(model, optimizer, data):
    optimizer.zero_grad()
    loss_of(model, *data).backward()
    optimizer.step()


own_rates = torch.tensor([0.003, 0.01, 0.03]).cpu().double()
luck = torch.rand(5, 16, 3, 8, 5, dtype=torch.float64, device="cpu")
carts = 0.1 * luck[0, 0, ..., 1:] - 0.05, torch.zeros(3, 8)
models = [Agent().cpu().double() for _ in range(3)]
three, _ = stack_module_state(models)  # copies
adam = torch.optim.Adam(three.values(), lr=1)
train(partial(everyone, three), partial(learn, three, adam, own_rates), carts, luck)
for i, model in enumerate(models):
    adam = torch.optim.Adam(model.parameters(), lr=own_rates[i].item())
    own = [part[i : i + 1] for part in carts]
    train(model, partial(learn_alone, model, adam), own, luck[:, :, i : i + 1])
alone, _ = stack_module_state(models)
far = [(three[name] - p).abs().max() for name, p in alone.items()]
far = torch.stack(far).max().item()
assert far < 1e-9, f"an agent does not learn what it learns alone: {far:.0e}"
print(f"parameters after 20 steps of Adam: at most {far:.0e} from those alone")

# %%
# In float32, a rounding error can change an action and all that follows from it.
#
# Train 64 agents, and evaluate them apart
# ----------------------------------------
#
# After each tenth of the training, the greedy policy, which takes the more likely
# action, plays eight new carts: the mean number of its steps counts, at most 500. (Of
# good agents, few training episodes end, so their lengths say little.)


@torch.no_grad()
def evaluate(agent, state):
    alive, length = ~fallen(state), 0
    for _ in range(500):
        length = length + alive
        state = move(state, agent(state)[0] > 0)
        alive = alive & ~fallen(state)
    return length.float().mean(dim=-1)  # [agents]


# %%
# For the clock, one agent trains alone, too, ten updates after each ten of the stack.

rates, num_seeds = [0.0003, 0.003, 0.03, 0.1], 16
own_rates = torch.tensor(rates, device=device).repeat_interleave(num_seeds)
adam = torch.optim.Adam(params.values(), lr=1, fused=True)
agent, update = partial(everyone, params), partial(learn, params, adam, own_rates)
single = Agent().to(device)
adam = torch.optim.Adam(single.parameters(), lr=0.01, fused=True)
update_single = partial(learn_alone, single, adam)
carts = states, torch.zeros_like(states[..., 0])
own, curves, times = [part[:1] for part in carts], [], []
for _ in range(10):
    luck = torch.rand(10, 16, num_agents, num_carts, 5).to(device)
    start = timer()  # waits for a GPU
    carts = train(agent, update, carts, luck)
    middle = timer()
    own = train(single, update_single, own, luck[:, :, :1])
    times.append([middle - start, timer() - middle])
    new = 0.1 * torch.rand(num_agents, 8, 4).to(device) - 0.05
    curves.append(evaluate(agent, new).view(-1, num_seeds))
curves = torch.stack(curves, dim=1).cpu()  # [4 rates, 10 evaluations, 16 seeds]

# %%
# What is faster, and what is not
# -------------------------------
#
# The stack starts each operator once for all agents, so 64 agents should take far less
# than 64 times as long as one alone:

times = 100 * torch.tensor(times)  # [10, 2]: ms of an update
together, one = times.median(dim=0).values.tolist()
ratios = (times[:, 0] / times[:, 1]).sort().values.tolist()
print(f"an update: {num_agents} agents {together:.3g} ms, one alone {one:.3g} ms")
print(f"{num_agents} take as long as {together / one:.2g} alone, one after another")
print(f"(ten measurements without the extremes: {ratios[1]:.2g} to {ratios[-2]:.2g})")

# %%
# The other way is a process for each core: on more cores than 64 / this number,
# processes may be faster. Nothing here is compiled; PureJaxRL [5] reports larger gains
# on a GPU, where JAX compiles the environment and the training, too.
#
# **The environments gain nothing from** ``vmap``: the carts are one tensor without it.
# On a CPU, gymnasium's vector environment, in NumPy, can be faster: time both.
#
# **Clipping**: ``clip_grad_norm_`` takes one norm of all agents; ``plot_training.py``
# clips each.
#
# How many seeds does an order need?
# ----------------------------------
#
# Agents that differ in the seed alone can end far apart, so compare settings by
# intervals over seeds [3, 4]. The interquartile mean (IQM) averages the middle half of
# the seeds (of three seeds, all); its bootstrap interval comes from 2,000 draws of
# sixteen seeds with repetition. Draws of fewer seeds tell how often a smaller study
# would find the order of all sixteen. An agent's **score** is the mean of its ten
# evaluations.


def iqm(values):  # [..., seeds]
    num, ordered = values.shape[-1], values.sort(dim=-1).values
    return ordered[..., num // 4 : num - num // 4].mean(dim=-1)


def bootstrap(values, n):
    """IQM of n seeds drawn with repetition, 2,000 times: [..., 2000]."""
    index = torch.randint(values.shape[-1], (*values.shape[:-1], 2000 * n))
    return iqm(values.gather(-1, index).unflatten(-1, (-1, n)))


edges, scores = torch.tensor([0.025, 0.975]), curves.mean(dim=1)  # [4, 16]
draws = [bootstrap(scores, n).diff(dim=0) for n in (num_seeds, 10, 3)]  # [3, 2000] each
for i, gap in enumerate(iqm(scores).diff().tolist()):
    low, high = draws[0][i].quantile(edges).tolist()
    word = "better" if low > 0 else "worse" if high < 0 else "not told apart"
    ten, three = [f"{(draw[i] * gap > 0).float().mean():.0%}" for draw in draws[1:]]
    pair = f"rate {rates[i + 1]} against {rates[i]}"
    print(f"{pair}: {word}, {gap:+.0f} ({low:+.0f} to {high:+.0f})")
    print(f"    the same order in draws of 10 seeds: {ten}, of 3 seeds: {three}")

# %%
# The difference of the scores, in brackets its 95 % interval. **Where it holds 0,
# sixteen seeds' scores do not tell the two rates apart**, and the shares say how often
# an order comes out, not that it is right. The IQM leaves out the best and the worst
# four seeds, so look at each (an agent solves the task if its last evaluation is 475 or
# more):

fig, axes = plt.subplots(1, 4, figsize=(9, 3), sharey=True, layout="constrained")
played, told = 2.56 * torch.arange(1, 1 + curves.shape[1]), []
bands = bootstrap(curves, num_seeds).quantile(edges, dim=-1)  # [2, 4, 10]
for ax, rate, curve, band in zip(axes, rates, curves, bands.unbind(1), strict=True):
    ax.plot(played, curve, color="gray", lw=0.5, alpha=0.5)
    ax.fill_between(played, *band, color="C0", alpha=0.3)
    ax.plot(played, iqm(curve), color="C0", lw=2)
    solved = f"{(curve[-1] >= 475).sum()} of {num_seeds} solve it"
    told.append(f"rate {rate}: IQM {iqm(curve[-1]):.0f}, {solved}")
    ax.set(title=f"rate {rate}\n{solved}", xlabel="steps, thousands")
axes[0].set_ylabel("greedy steps, at most 500")
fig.suptitle(f"PPO on CartPole; thin: a seed, bold: IQM; float32, {where}")
fig.set_label(
    "Greedy steps during training: a panel for each rate, a thin line for each seed, "
    f"the IQM and its 95 % band. In the end, {'; '.join(told)}."
)

# %%
# This is one task and one short training, and intervals from few seeds are often too
# narrow.
#
# The mistake: an action drawn inside ``vmap``
# --------------------------------------------


def act_inside(params, states):
    logits, _ = call(params, states)
    return torch.distributions.Bernoulli(logits=logits).sample()


try:
    vmap(act_inside)(params, states)
except RuntimeError as error:
    print(error)

# %%
# Draw outside, from the logits of all agents, or pass ``randomness="different"``
# (tested). What else people meet (tested):
#
# - **A new start by a mask**: ``state[fallen(state)] = 0`` raises an error about
#   ``dynamic shape`` inside ``vmap``; ``torch.where``, as in ``play``, does not.
# - **More than two actions**: draw from logits of any shape by ``(logits -
#   torch.empty_like(logits).exponential_().log()).argmax(-1)``, outside ``vmap``.
# - **Environments of gymnasium**: ``gymnasium.make_vec("CartPole-v1", 64 * 16)`` takes
#   ``right.flatten().int().cpu().numpy()``; ``reshape`` its states to ``[64, 16, 4]``.
#   By default, a new episode starts one step after an end; do not learn from that step.
#
# Remember
# --------
#
# **Stack the networks; keep the environments in one tensor, the agents first.** Show
# all seeds, and give the interval of a difference before you call one setting better.
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
# - [2] F. Pardo and others: Time limits in reinforcement learning, 2018,
#   `arXiv:1712.00378 <https://arxiv.org/abs/1712.00378>`_.
# - [3] P. Henderson and others: Deep reinforcement learning that matters, 2018,
#   `arXiv:1709.06560 <https://arxiv.org/abs/1709.06560>`_.
# - [4] R. Agarwal and others: Deep reinforcement learning at the edge of the
#   statistical precipice, 2021, `arXiv:2108.13264 <https://arxiv.org/abs/2108.13264>`_.
# - [5] C. Lu: PureJaxRL, 2023, `chrislu.page/blog/meta-disco
#   <https://chrislu.page/blog/meta-disco/>`_.
