"""
A population of flat vectors
============================

Hold each network of a population as a row of one matrix, evaluate all rows in one call
of ``torch.func.vmap``, and train by evolution strategies what has no gradient.

**In short.** ``split`` and ``view_as`` turn a row into named parameters,
``functional_call`` runs a skeleton with them, and ``vmap`` maps that over the rows.
Evolution strategies need nothing but a score of each row. Before you use them, try two
simpler rivals: a gradient with a surrogate, and keeping the best row. The page compares
all three.

Before you start: ``plot_ensembling.py`` explains skeletons and ``functional_call``.
"""

# %%
# Set-up
# ------

import math
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils import parameters_to_vector
from torch.utils.benchmark import timer

torch.manual_seed(0)
torch.backends.fp32_precision = "ieee"  # no TF32
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
where = f"{device.type.upper()}, {torch.get_num_threads()} threads"
if device.type == "cuda":
    where = torch.cuda.get_device_name()
print(f"{where}, torch {torch.__version__}, float32, IEEE")

# %%
# Call the rows of a matrix as networks
# -------------------------------------


class Step(nn.Module):
    def forward(self, x):
        return (x > 0).to(x.dtype)  # no gradient passes


def make_model(activation=Step):
    return nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 10))


with torch.device("meta"):
    skeleton = make_model()


def outputs(vector, x, skeleton):  # [2410], [64, 64] -> [64, 10]
    named = dict(skeleton.named_parameters())
    parts = vector.split([p.numel() for p in named.values()])
    pairs = zip(named.items(), parts, strict=True)
    params = {name: part.view_as(p) for (name, p), part in pairs}
    return functional_call(skeleton, params, (x,), strict=True)


everyone = vmap(outputs, in_dims=(0, None, None))


def new_rows(make, number):  # in the order of parameters_to_vector
    rows = [parameters_to_vector(make().parameters()) for _ in range(number)]
    return torch.stack(rows).detach().to(device)


population = new_rows(make_model, 128)  # [128, 2410]
x = torch.randn(64, 64, device=device)
out = everyone(population, x, skeleton)  # [128, 64, 10]
print(f"{list(population.shape)} -> {list(out.shape)}")

# %%
# A loop of modules gives the same, here in float64 on the CPU:

models = [make_model().cpu().double() for _ in range(5)]
rows = torch.stack([parameters_to_vector(m.parameters()) for m in models]).detach()
x = torch.randn(128, 64, device="cpu", dtype=torch.float64)
loop = torch.stack([model(x) for model in models])
far = (everyone(rows, x, skeleton) - loop).abs().max().item()
assert far < 1e-10, f"the rows are not the modules: {far:.0e} apart"
print(f"largest difference from a loop of modules: {far:.0e}")

# %%
# Evolution strategies
# --------------------
#
# From a center, draw members in antithetic pairs, ``center + noise`` and ``center -
# noise``, and score them. The mean of the noises, each weighted by how many members its
# own beats, points to higher scores on average [1]. Its negative becomes the center's
# ``grad``, and a stock optimizer makes the step. The first dimension holds
# **independent runs**, so that repeats need no further calls:


@torch.no_grad()
def evolve(score, center, num_steps, size, sigma, rate):
    """Yield the centers, [runs, numbers], after each step."""
    center = center.clone()
    optimizer = torch.optim.Adam([center], lr=rate)
    for _ in range(num_steps):
        noise = center.new_empty(len(center), size // 2, center.shape[1]).normal_()
        noise = torch.cat([noise, -noise], dim=1)  # [runs, size, numbers]
        scores = score(center[:, None] + sigma * noise)  # [runs, size]
        beaten = (scores[:, :, None] > scores[:, None]).float().mean(2)
        weight = beaten - beaten.mean(1, keepdim=True)  # equal where scores are
        center.grad = -(weight[:, None] @ noise)[:, 0] / (size * sigma)
        optimizer.step()
        yield center.clone()


# %%
# **Keep the best** is the simplest rival: a random search around the best member of the
# last step. It draws as many members, without pairs, and needs no optimizer:


@torch.no_grad()
def keep_best(score, center, num_steps, size, sigma):
    """Yield the best members, [runs, numbers], of each step."""
    for _ in range(num_steps):
        noise = center.new_empty(len(center), size, center.shape[1]).normal_()
        noise[:, 0] = 0  # the center stays where nobody is better
        members = center[:, None] + sigma * noise
        best = score(members).argmax(1)
        center = members[torch.arange(len(center)), best]
        yield center


# %%
# Train what has no gradient
# --------------------------
#
# The task: digits, a hidden layer of steps, and as score the accuracy itself on a
# minibatch. Eight runs, each with its own split of the images, train in one call.

num_runs, num_steps, size = 8, 80, 128
digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)
images = images - images.mean(0)
labels = torch.tensor(digits.target, device=device)
order = torch.rand(num_runs, len(images)).argsort(dim=1).to(device)
train_rows, test_rows = order[:, :897], order[:, 1347:]  # between: to validate


def accuracy(members, rows):  # [8, size, 2410], [8, images] -> [8, size]
    logits = vmap(everyone, in_dims=(0, 0, None))(members, images[rows], skeleton)
    return (logits.argmax(-1) == labels[rows][:, None]).float().mean(-1)


def minibatch():
    return train_rows[:, torch.randint(897, (64,))]  # [8, 64]


def score(members):
    return accuracy(members, minibatch())


start = new_rows(make_model, num_runs)
*_, evolved = evolve(score, start, num_steps, size, sigma=0.2, rate=0.05)
*_, kept = keep_best(score, start, num_steps, size, sigma=0.2)

# %%
# A surrogate exists for this network: the step forward, and the slope of a sigmoid
# backward, called straight-through [2]. It trains for as many steps, on minibatches of
# as many images, with the cross-entropy as loss:


class Through(Step):
    def forward(self, x):
        soft = x.sigmoid()
        return super().forward(x) + soft - soft.detach()


with torch.device("meta"):
    through = make_model(Through)

center = start.clone().requires_grad_()
optimizer = torch.optim.Adam([center], lr=0.1)
for _ in range(num_steps):
    rows = minibatch()
    logits = vmap(outputs, in_dims=(0, 0, None))(center, images[rows], through)
    optimizer.zero_grad()
    F.cross_entropy(logits.mT, labels[rows]).mul(num_runs).backward()
    optimizer.step()

# %%
# A verdict needs a mean difference, over the eight runs, of more than three standard
# errors. (Normal differences without any true one reach that in 2 % of comparisons.)
# All runs use the same images, or carts, so a verdict is about these.


def verdict(rival, gap):  # gap: a number for each run
    mean, error = gap.mean().item(), gap.std().item() / len(gap) ** 0.5
    word = "better than" if mean > 0 else "worse than"
    if abs(mean) <= 3 * error:
        word = "not clearly apart from"
    return f"evolution is {word} {rival}: {mean:+.3g}, standard error {error:.2g}"


right = {"straight-through": center.detach()}
right |= {"keep the best": kept, "evolution": evolved}
for name, rows in right.items():
    r = right[name] = accuracy(rows[:, None], test_rows)[:, 0].cpu()
    print(f"{name}: test accuracy {r.mean():.3f} ({r.min():.3f} to {r.max():.3f})")
for rival in ("straight-through", "keep the best"):
    print(verdict(rival, right["evolution"] - right[rival]))

# %%
# **If evolution is worse than straight-through**, take the gradient: each of its steps
# also called one network, forward and backward, instead of 128. **If evolution is
# better than keep the best**, it got more out of as many scores.
#
# Settings are not chosen in this run. On both tasks each way has the best of at least
# four (evolution: pairs of ``sigma`` and ``rate``) from runs with other random numbers,
# judged on validation images and on fresh carts.
#
# Balance a pole
# --------------
#
# The second task is CartPole: carts that a network of 97 numbers pushes to the right or
# to the left. The score of a member is the mean number of steps until its four carts
# fall, at most 500. ``plot_agents.py`` trains on the same carts (tested) by policy
# gradients.


def play(act, state, num_steps=500):  # [..., 4] -> [...]
    alive = state[..., 0] < torch.inf
    length = torch.zeros_like(state[..., 0])
    for _ in range(num_steps):
        length += alive
        x, v, a, w = state.unbind(-1)
        push = (20.0 * (act(state) > 0) - 10 + 0.05 * w**2 * a.sin()) / 1.1
        turn = (9.8 * a.sin() - a.cos() * push) / (2 / 3 - 0.05 * a.cos() ** 2 / 1.1)
        push = push - 0.05 * turn * a.cos() / 1.1
        state = state + 0.02 * torch.stack([v, push, w, turn], dim=-1)
        x, _, a, _ = state.unbind(-1)
        alive = alive & (x.abs() <= 2.4) & (a.abs() <= math.pi / 15)
    return length


def make_driver():
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))


with torch.device("meta"):
    driver = make_driver()
scale = torch.tensor([1.0, 1, 5, 1], device=device)  # angles are small


def lengths(members, carts, num_steps=500):  # [members, 97], [carts, 4]
    def act(state):  # each member has its own carts
        call = vmap(outputs, in_dims=(0, 0, None))
        return call(members, state * scale, driver).squeeze(-1)

    return play(act, carts.expand(len(members), -1, -1), num_steps)


def new_carts(number):
    return torch.rand(number, 4, device=device) / 10 - 0.05


def balance(members):  # [8, 64, 97] -> [8, 64]
    return lengths(members.flatten(0, 1), new_carts(4)).mean(1).view(members.shape[:2])


# %%

generations, size = 6, 64
drivers = new_rows(make_driver, num_runs)
ways = {
    "evolution": evolve(balance, drivers, generations, size, sigma=1.0, rate=1.0),
    "keep the best": keep_best(balance, drivers, generations, size, sigma=0.3),
}
fresh, curves = new_carts(64), {}
for name, way in ways.items():
    centers = torch.stack(list(way), dim=1)  # [8, generations, 97]
    found = lengths(centers.flatten(0, 1), fresh).mean(1).cpu()
    curves[name] = found.view(num_runs, -1)  # [8, generations]
    print(f"{name}, steps on fresh carts, median of the runs by generation:")
    print("   ", *[f"{m:.0f}" for m in curves[name].median(0).values])
gap = (curves["evolution"] - curves["keep the best"]).mean(1)
print("mean over the generations:", verdict("keep the best", gap))

# %%
# **If evolution is worse here**, the simpler way is enough for this task, and it needs
# no rate. The two tasks differ in more than the number of parameters, so try both ways
# on yours.
#
# Is one call faster than a loop?
# -------------------------------
#
# The steps of a cart come one after the other, each made of small operators. One call
# starts each operator once for all members, so we expect its time to grow slowly with
# the population, while that of a loop is proportional to it. The loop calls a plain
# module, one member after the other, with the same result (tested in float64). Both run
# eagerly, in one process.


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
# Measured are 50 steps of four carts a member, warm, without autograd, in at least
# seven turns; brackets are 95 % intervals. A loop's time is that of one module times
# the population. That is fair where **all stand** to the end. But a loop can stop each
# member when its last cart has fallen, and one call goes on until the last cart of all
# has. For **untrained** networks the run counts the steps that each way needs, up to
# 500, and scales the gain:

numbers = [1, 4, 16, 64, 256, 1024]
model, carts = make_driver().to(device), new_carts(4)
untrained = new_rows(make_driver, numbers[-1])


@torch.no_grad()
def alone():
    return play(lambda state: model(state * scale).squeeze(-1), carts, 50)


populations = [partial(lengths, untrained[:n], carts, 50) for n in numbers]
(one, *_), *calls = in_turns(alone, *populations)
last_fall = lengths(untrained, carts).amax(1).cpu()  # [members]
gains = {"all stand": [], "untrained": []}
for n, (time, *gain) in zip(numbers, calls, strict=True):
    fewer = (last_fall[:n].sum() / last_fall[:n].max()).item()  # steps: loop / one call
    for name, factor in zip(gains, (n, fewer), strict=True):
        gains[name].append([factor * g for g in gain])
    print(f"{n}: loop {n * one:.3f} s, one call {time:.3f} s", end=": ")
    print("; ".join(f"{name}, {said(*gain[-1])}" for name, gain in gains.items()))

# %%

fig, ax = plt.subplots(layout="constrained")
for (name, rows), marker in zip(gains.items(), "os", strict=True):
    middle, low, high = torch.tensor(rows).T
    ax.loglog(numbers, middle, marker=marker, label=name)
    ax.fill_between(numbers, low, high, alpha=0.2)
ax.axhline(1, color="gray")
ax.set(xlabel="members, each with four carts", ylabel="time of loop / time of one call")
ax.set_title(f"CartPole, above 1 one call is faster, float32\n{where}")
ax.legend(title="members")
fig.set_label(
    "Gain of one call over a loop against the size of the population, where all carts "
    f"stand to the end and for untrained networks. {numbers[3]} members: all stand, "
    f"{said(*gains['all stand'][3])}; untrained, {said(*gains['untrained'][3])}."
)

# %%
# While a population trains, its members stand longer, so it moves from the lower curve
# toward the upper one. Where one call is slower, run the loop.
#
# The mistake: a copy cuts the gradient
# -------------------------------------
#
# A **hypernetwork** computes the vector of another network, and the same lines train
# it. ``nn.Parameter`` copies the numbers without their history, and so does
# ``vector_to_parameters`` (tested). Neither raises an error:

hyper = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 97)).to(device)
task, states = torch.randn(8, 2, device=device), torch.randn(5, 4, device=device)
vectors = hyper(task)  # [8, 97]
everyone(vectors, states, driver).square().mean().backward()
print(f"norm of the gradient: {hyper[0].weight.grad.norm():.2g}")

hyper.zero_grad()
everyone(nn.Parameter(hyper(task)), states, driver).square().mean().backward()
print("through nn.Parameter:", hyper[0].weight.grad)

# %%
# Remember
# --------
#
# A population is a matrix, and a row becomes a network by ``split`` and ``view_as``
# inside ``vmap``. Put repeats into one more dimension. **Compare evolution with a
# surrogate gradient and with keeping the best**, each with settings of its own.
#
# Next
# ----
#
# - ``plot_learn_to_learn.py``: an inner step for each task (MAML), in one call.
# - ``plot_population.py``: a population that trains by gradients.
#
# References
# ----------
#
# - [1] T. Salimans et al.: Evolution strategies as a scalable alternative to
#   reinforcement learning, 2017, `arXiv:1703.03864
#   <https://arxiv.org/abs/1703.03864>`_.
# - [2] Y. Bengio, N. Léonard, A. Courville: Estimating or propagating gradients through
#   stochastic neurons, 2013, `arXiv:1308.3432 <https://arxiv.org/abs/1308.3432>`_.
