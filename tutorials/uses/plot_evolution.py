"""
Evolution strategies with a population in one call
==================================================

Train networks without their gradients (neuroevolution): each network of a population is
a row of one matrix, and one call of ``torch.func.vmap`` scores all rows.

**In short.** ``split`` and ``view_as`` turn a row into named parameters,
``functional_call`` runs a skeleton with them, and ``vmap`` maps that over the rows.
Where you have a loss, let it be the score: evolution learned digits better by the
cross-entropy than by the accuracy. Try two simpler ways first: a surrogate gradient did
better on the digits, and keeping the best row balanced CartPole sooner.

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
out = everyone(population, torch.randn(64, 64, device=device), skeleton)
print(f"{list(population.shape)} -> {list(out.shape)}")

# %%
# A loop of modules gives the same outputs, here in float64 on the CPU:

models = [make_model().cpu().double() for _ in range(5)]
rows = torch.stack([parameters_to_vector(m.parameters()) for m in models]).detach()
x = torch.randn(128, 64, device="cpu", dtype=torch.float64)
loop = torch.stack([model(x) for model in models])
far = (everyone(rows, x, skeleton) - loop).abs().max().item()
assert far < 1e-10, f"the rows are not the modules: {far:.0e} apart"
print(f"largest difference from a loop of modules: {far:.0e}")

# %%
# A **hypernetwork** computes such rows, and ``everyone(hyper(task), x, skeleton)``
# passes the gradient on to it (tested). ``nn.Parameter(hyper(task))`` and
# ``vector_to_parameters`` take the numbers without their history: the hypernetwork gets
# no gradient, and no error says so (tested).
#
# Evolution strategies
# --------------------
#
# From a center, draw members in antithetic pairs, ``center + sigma * noise`` and
# ``center - sigma * noise``, and score them. Weight each noise by how many members its
# member beats; the weighted mean estimates a direction of higher scores [1]. Its
# negative becomes the center's ``grad``, and a stock optimizer makes the step. The
# first dimension holds **separate runs**, all in one call:


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
        weight = beaten - beaten.mean(1, keepdim=True)  # ties weigh the same
        center.grad = -(weight[:, None] @ noise)[:, 0] / (size * sigma)
        optimizer.step()
        yield center.clone()


# %%
# The simplest rival **keeps the best**: it searches at random around the best member of
# the last step. It draws as many members, without pairs, and needs no optimizer:


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
# The task is digits, and the hidden layer is made of steps, so no gradient reaches its
# weights. Write the score of one member: its accuracy on a minibatch, or minus its
# cross-entropy. One ``vmap`` maps it over members, and a second one over eight runs,
# each with its own split:

num_runs, num_steps, size = 8, 80, 64
pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
images = (pixels / 16 - pixels.mean(0) / 16).float().to(device)
labels = labels.to(device)
order = torch.rand(num_runs, len(images)).argsort(dim=1).to(device)
train_rows, test_rows = order[:, :897], order[:, 1347:]  # between: to validate


def accuracy(vector, x, y):  # of one member
    return (outputs(vector, x, skeleton).argmax(-1) == y).float().mean()


def minus_loss(vector, x, y, skeleton=skeleton):
    return -F.cross_entropy(outputs(vector, x, skeleton), y)


def minibatch():  # [8, 64, 64] and [8, 64]
    rows = train_rows[:, torch.randint(897, (64,))]
    return images[rows], labels[rows]


def score(of_one, members):  # [8, 64, 2410] -> [8, 64]
    return vmap(vmap(of_one, in_dims=(0, None, None)))(members, *minibatch())


by_loss, by_accuracy = partial(score, minus_loss), partial(score, accuracy)
start = new_rows(make_model, num_runs)
ways = {
    "evolution by loss": evolve(by_loss, start, num_steps, size, sigma=0.1, rate=0.05),
    "evolution by accuracy": evolve(by_accuracy, start, num_steps, size, 0.2, 0.05),
    "keep the best": keep_best(by_loss, start, num_steps, size, sigma=0.05),
}
found = {name: list(way)[-1] for name, way in ways.items()}

# %%
# A surrogate exists for this network: the step forward, and the slope of a sigmoid
# backward, a variant of straight-through [2]. It trains for as many steps, on
# minibatches of as many images, with the same loss:


class Through(Step):
    def forward(self, x):
        return super().forward(x) + x.sigmoid() - x.sigmoid().detach()


with torch.device("meta"):
    through = make_model(Through)

center = start.clone().requires_grad_()
optimizer = torch.optim.Adam([center], lr=0.1)
for _ in range(num_steps):
    losses = -vmap(partial(minus_loss, skeleton=through))(center, *minibatch())  # [8]
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
found["straight-through"] = center.detach()

# %%
# A verdict needs a mean difference, over the eight runs, of more than three standard
# errors: chance alone reaches that in about 2 of 100 comparisons. All runs share the
# images, or the carts, so a verdict is about these.


def verdict(way, rival, table):  # a row for each run
    gap = (table[way] - table[rival]).view(num_runs, -1).mean(1)
    mean, error = gap.mean().item(), gap.std().item() / len(gap) ** 0.5
    word = "better than" if mean > 0 else "worse than"
    if abs(mean) <= 3 * error:
        word = "not clearly apart from"
    return f"{way} is {word} {rival}: {mean:+.3g}, standard error {error:.2g}"


right = {}
for name, rows in found.items():
    r = right[name] = vmap(accuracy)(rows, images[test_rows], labels[test_rows]).cpu()
    print(f"{name}: test accuracy {r.mean():.3f} ({r.min():.3f} to {r.max():.3f})")
for rival in list(right)[1:]:
    print(verdict("evolution by loss", rival, right))

# %%
# **If evolution by loss is better than by accuracy**, let the loss be the score, even
# though no gradient passes. On 64 images the accuracy has 65 values, so many members
# tie; the loss orders them. **If straight-through is better still**, use the gradient:
# each of its steps called one network, forward and backward, evolution called 64.
#
# Not shown: the settings, sigma too, were chosen before this run, with other random
# numbers: for each way the best of at least four, on validation images and on fresh
# carts.
#
# Balance a pole
# --------------
#
# The second task is CartPole: a network of 97 numbers pushes a cart to the right or to
# the left, and this decision has no gradient. The score of a member is the mean number
# of steps until its four carts fall, at most 500. ``plot_agents.py`` trains on the same
# carts (tested) by policy gradients.


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
# Eight runs of six generations with 64 members:

drivers = new_rows(make_driver, num_runs)
ways = {
    "evolution": evolve(balance, drivers, 6, 64, sigma=0.5, rate=0.5),
    "keep the best": keep_best(balance, drivers, 6, 64, sigma=0.3),
}
fresh, steps = new_carts(64), {}
for name, way in ways.items():
    centers = torch.stack(list(way), dim=1)  # [8, 6, 97]
    steps[name] = lengths(centers.flatten(0, 1), fresh).mean(1).view(num_runs, -1).cpu()
    medians = ", ".join(f"{m:.0f}" for m in steps[name].median(0).values)
    print(f"{name}, median steps on fresh carts by generation: {medians}")
print("mean over the generations:", verdict("evolution", "keep the best", steps))

# %%
# **If keeping the best comes near 500 within three generations**, CartPole is too easy
# to judge evolution: a few random changes find a network that balances.
#
# Is one call faster than a loop?
# -------------------------------
#
# The steps of a cart come one after the other, each made of small operators. One call
# starts each operator once for all members, so we expect its time to grow slowly with
# the population, while that of a loop is proportional to it. The loop calls a plain
# module for one member after the other, with the same result (tested in float64).


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
# Measured are 50 steps of four carts a member, eagerly, without autograd, warm, in at
# least seven turns; brackets are 95 % intervals. A loop's time is that of one module
# times the population. **This is fair where no cart falls.** A loop can stop a member
# when its last cart has fallen, while one call could stop with the last cart of all,
# and here never stops. Where members fall early, multiply the gain by the share that is
# printed last, of one draw: the mean number of steps of a member over all 500.

numbers, gains = [1, 8, 64, 512], []
model, carts = make_driver().to(device).requires_grad_(False), new_carts(4)
untrained = new_rows(make_driver, numbers[-1])
alone = partial(play, lambda state: model(state * scale).squeeze(-1), carts, 50)
together = [partial(lengths, untrained[:n], carts, 50) for n in numbers]
(one, *_), *calls = in_turns(alone, *together, seconds=0.5)
for n, (time, *gain) in zip(numbers, calls, strict=True):
    gains.append([n * g for g in gain])
    print(f"{n}: loop {n * one:.3f} s, one call {time:.3f} s: {said(*gains[-1])}")
last_fall = lengths(untrained[:64], carts).amax(1)  # up to 500
print(f"share for 64 untrained members: {last_fall.mean() / 500:.2f}")

# %%

fig, ax = plt.subplots(layout="constrained")
ax.loglog(numbers, [gain for gain, _, _ in gains], marker="o")
ax.axhline(1, color="gray")
ax.set(xlabel="members, each with four carts", ylabel="time of loop / time of one call")
ax.set_title(f"CartPole, no cart falls: above 1 one call is faster, float32\n{where}")
fig.set_label(
    "Gain of one call over a loop against the size of the population, where no cart "
    f"falls. One member: {said(*gains[0])}; {numbers[-1]}: {said(*gains[-1])}."
)

# %%
# Remember
# --------
#
# A population is a matrix, and a row becomes a network by ``split`` and ``view_as``
# inside ``vmap``. Score by a loss where there is one. **Compare evolution with a
# surrogate gradient and with keeping the best**, each with settings of its own.
#
# Next
# ----
#
# - ``plot_learn_to_learn.py``: an inner step for each task (MAML), in one call.
# - ``plot_population.py``: a population that trains by gradients.
# - `EvoTorch <https://docs.evotorch.ai>`_: more strategies, such as CMA-ES; its
#   vectorized problems score such a matrix.
#
# References
# ----------
#
# - [1] T. Salimans et al.: Evolution strategies as a scalable alternative to
#   reinforcement learning, 2017, `arXiv:1703.03864
#   <https://arxiv.org/abs/1703.03864>`_.
# - [2] Y. Bengio, N. Léonard, A. Courville: Estimating or propagating gradients through
#   stochastic neurons, 2013, `arXiv:1308.3432 <https://arxiv.org/abs/1308.3432>`_.
