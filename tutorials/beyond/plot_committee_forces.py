"""
Forces of a committee
=====================

Compute the energies and forces of a committee of small networks in one call, train it
on both, and see whether its disagreement tells which configurations to label next.

**In short.** The force is minus the slope of the energy by the positions. Write it for
one member at one place, by ``grad_and_value`` with ``argnums=1``, map it over places
and over members by ``vmap``, and train through it by ``backward``. On the test surface
of this page, labels far apart beat random ones, and the fifteen largest disagreements
of a pool, which lie side by side, do not.

Before you start: ``plot_training.py`` explains the stack, its optimizer and the sum of
the losses.
"""

# %%
# Set-up
# ------

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")

# %%
# Energies and forces in one call
# -------------------------------


def build():
    hidden = [nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()]
    return nn.Sequential(*hidden, nn.Linear(32, 1))


with torch.device("meta"):
    skeleton = build()


def energy(params, x):  # of one member at one place, [2] -> []
    return functional_call(skeleton, params, (x,), strict=True).squeeze(0)


def energy_and_force(params, x):
    slope, value = grad_and_value(energy, argnums=1)(params, x)
    return value, -slope


at_places = vmap(energy_and_force, in_dims=(None, 0))  # of one member
committee = vmap(at_places, in_dims=(0, None))  # all members at the same places

params, _ = stack_module_state([build().to(device) for _ in range(4)])
x = torch.rand(15, 2, device=device)
energies, forces = committee(params, x)  # [4, 15], [4, 15, 2]
print(f"energies {list(energies.shape)}, forces {list(forces.shape)}")

# %%
# ``argnums=1`` asks for the slope by the second argument, the positions. They may have
# any shape, such as ``[atoms, 3]`` for a molecule, and the force has the shape of its
# positions (tested). Take a smooth activation, such as ``Tanh``: with ``ReLU``, the
# force changes only by jumps (tested).
#
# **To train on energies and forces, write the loss of one member**, and map it with
# places and labels of its own for each member:


def member_loss(params, x, energies, forces):
    value, force = at_places(params, x)
    off = (force - forces).square().sum(dim=-1)
    return (value - energies).square().mean() + 0.1 * off.mean()


def train_step(params, optimizer, *data):
    losses = vmap(member_loss)(params, *data)  # [members]
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()


# %%
# The same with a loop
# --------------------
#
# Without ``torch.func``, the slope comes from ``torch.autograd.grad`` of the summed
# energies, and ``create_graph=True`` lets ``backward`` go through it. One backward pass
# of the summed losses serves all members of the loop, too. ``plot_when_vmap_pays.py``
# measures when one call is faster.


def loop_losses(models, *data):
    losses = []
    for model, x, energies, forces in zip(models, *data, strict=True):
        x = x.clone().requires_grad_()
        value = model(x).squeeze(1)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        off = (-slope - forces).square().sum(dim=-1)
        losses.append((value - energies).square().mean() + 0.1 * off.mean())
    return torch.stack(losses)


# %%
# The check, in float64 on the CPU, on random places and labels: both ways must give the
# same gradients of all weights.

models64 = [build().cpu().double() for _ in range(4)]
params64, _ = stack_module_state(models64)
shapes = [4, 15, 2], [4, 15], [4, 15, 2]
data64 = [torch.randn(shape, device="cpu", dtype=torch.float64) for shape in shapes]
vmap(member_loss)(params64, *data64).sum().backward()
loop_losses(models64, *data64).sum().backward()
apart = [
    (params64[key].grad[i] - p.grad).abs().max()
    for i, model in enumerate(models64)
    for key, p in model.named_parameters()
]
off = torch.stack(apart).max().item()
assert off < 1e-10, f"the committee does not train as its members alone: {off:.1e}"
print(f"gradients of the training loss: {off:.0e} from those of the loop")

# %%
# Which configurations to label next?
# -----------------------------------
#
# A label is the energy and the force of a configuration, from a calculation that is too
# expensive for all configurations of a pool. Here, the calculation is the Müller-Brown
# potential, a test surface of two coordinates with three wells, divided by 100, and a
# configuration is a place where it is below 0.5.

strength = torch.tensor([-2, -1, -1.7, 0.15], device=device)
xx, xy, yy = torch.tensor(
    [[-1, -1, -6.5, 0.7], [0, 0, 11, 0.6], [-10, -10, -6.5, 0.7]], device=device
)
center = torch.tensor([[1, 0], [0, 0.5], [-0.5, 1.5], [-1, 1]], device=device)


def true_energy(x):  # [2] -> []
    dx, dy = (x - center).T
    return (strength * (xx * dx**2 + xy * dx * dy + yy * dy**2).exp()).sum()


def label(x):  # [..., 2] -> [...], [..., 2]
    slopes, values = vmap(grad_and_value(true_energy))(x.reshape(-1, 2))
    return values.view(x.shape[:-1]), -slopes.view(x.shape)


num_repeats, size, num_steps = 12, 1500, 400
low, high = torch.tensor([[-1.5, -0.2], [1.2, 2.0]])
x = (low + (high - low) * torch.rand(5 * num_repeats * size, 2)).to(device)
x = x[label(x)[0] < 0.5]
x_test, pools = x[:500], x[500 : 500 + num_repeats * size].view(num_repeats, size, 2)

# %%
# Five ways to choose
# -------------------
#
# Each of twelve repeats has a pool of 1,500 configurations, 15 of them labeled, and a
# committee of four members. Twice, 15 more are chosen and the committee is trained
# anew. ``spread`` is the **disagreement** at each configuration, the standard deviation
# of the four forces there; ``taken`` are the rows of the pool that have a label.


def largest(taken, score):  # [12, 15 or 30], [12, 1500] -> [12, 15]
    return score.scatter(1, taken, -1).topk(15).indices


def spread_out(pool, taken, weight):  # of one repeat: [1500, 2], [15], [1500]
    distance = (pool[:, None] - pool[taken]).norm(dim=-1).amin(dim=1)
    picks = []
    for _ in range(15):
        picks.append((weight * distance).argmax(dim=0, keepdim=True))
        distance = distance.minimum((pool - pool[picks[-1]]).norm(dim=-1))
    return torch.cat(picks)


def chance():  # a random number for each configuration
    return torch.rand(num_repeats, size).to(device)


def most_of_some(taken, spread):
    return largest(taken, spread.where(chance() < 0.03, 0))


def far_apart(taken, spread):
    return vmap(spread_out)(pools, taken, torch.ones_like(spread))


def far_and_disagreeing(taken, spread):
    return vmap(spread_out)(pools, taken, spread)


ways = {
    "random": lambda taken, spread: largest(taken, chance()),
    "most disagreement": largest,
    "most of 3 %": most_of_some,
    "far apart": far_apart,
    "far and disagreeing": far_and_disagreeing,
}

# %%
# - **most disagreement** takes the 15 largest of the whole pool.
# - **most of 3 %** takes the 15 largest among some 45 rows, drawn at random.
# - **far apart** takes, one after the other, the row whose nearest labeled or chosen
#   row is farthest away. It needs no committee.
# - **far and disagreeing** does the same with the distance times the disagreement.
#
# One stack for all committees
# ----------------------------
#
# The committees of all ways and repeats train together: 240 networks in one stack (48
# where all ways still have the same labels). In a repeat, all ways begin with the same
# labels and the same initial weights. The learning rate, the steps, the factor 0.1 of
# the loss and the 3 % were set by hand.

starts, _ = stack_module_state([build().to(device) for _ in range(4 * num_repeats)])


def train(x):  # [committees, labels, 2]
    data = [part.repeat_interleave(4, dim=0) for part in (x, *label(x))]
    copies = len(x) // num_repeats
    params = {k: torch.cat(copies * [p.detach()]) for k, p in starts.items()}
    leaves = [p.requires_grad_() for p in params.values()]
    optimizer = torch.optim.Adam(leaves, lr=0.01, fused=True)
    for _ in range(num_steps):
        train_step(params, optimizer, *data)
    return params


@torch.no_grad()  # chunk_size bounds the memory
def forces_of(params, x):  # [committees, places, 2] -> [committees, 4, places, 2]
    forces = vmap(at_places, chunk_size=48)(params, x.repeat_interleave(4, dim=0))[1]
    return forces.unflatten(0, (-1, 4))


# %%

repeats = torch.arange(num_repeats, device=device)[:, None]
chosen = chance()[None].topk(15).indices  # [1, 12, 15]: the same for all ways
true_forces, errors, counts = label(x_test)[1], [], [15, 30, 45]
for count in counts:
    x = pools[repeats, chosen].flatten(0, 1)  # [12 or 60, count, 2]
    params = train(x)
    off = forces_of(params, x_test.expand(len(x), -1, -1)).mean(dim=1) - true_forces
    error = off.square().sum(dim=-1).mean(dim=-1).sqrt()
    errors.append(error.view(-1, num_repeats).expand(5, -1))
    if count < counts[-1]:
        spread = forces_of(params, pools.repeat(len(chosen), 1, 1)).var(dim=1)
        spread = spread.sum(dim=-1).sqrt().view(-1, num_repeats, size).expand(5, -1, -1)
        tasks = zip(ways.values(), chosen.expand(5, -1, -1), spread, strict=True)
        chosen = torch.stack([torch.cat([c, way(c, s)], 1) for way, c, s in tasks])
errors = torch.stack(errors).cpu()  # [3, 5, 12]
x = pools[repeats, chosen]  # [5, 12, 45, 2]
apart = (x[..., None, :] - x[..., None, :, :]).norm(dim=-1).topk(2, largest=False)
apart = apart.values[..., 15:, 1].mean(dim=(1, 2)).tolist()  # to the nearest label

# %%
# Far apart, or in disagreement?
# ------------------------------
#
# **What should happen:** where the members disagree, they do not know the forces, so a
# label there should help. But they disagree nearly as much right beside it, so the
# largest values of a pool should lie side by side, where one label might do for all.
#
# The error is that of the committee's mean force, as a root mean square over 500 other
# configurations. The ratio of two ways is a geometric mean over 30 and 45 labels and
# over the repeats. A verdict needs three standard errors (the bracket) over the
# repeats, which chance alone reaches in about one of a hundred comparisons; here are
# six.


def compare(way, rival):
    row, base = list(ways).index(way), list(ways).index(rival)
    gap = (errors[1:, row] / errors[1:, base]).log().mean(dim=0)  # [12]
    reach = 3 * gap.std() / num_repeats**0.5
    low, mid, high = (gap.mean() + reach * torch.tensor([-1, 0, 1])).exp().tolist()
    told = "better than" if high < 1 else "worse than" if low > 1 else "not told from"
    print(f"{way}: {told} {rival}, {mid:.2f} times its error", end=" ")
    print(f"({low:.2f} to {high:.2f}), smaller in {(gap < 0).sum()} of {num_repeats}")
    return f"{way} is {told} {rival}"


verdicts = [compare(way, "random") for way in list(ways)[1:]]
verdicts.append(compare("far and disagreeing", "far apart"))
verdicts.append(compare("far and disagreeing", "most disagreement"))
for way, distance in zip(ways, apart, strict=True):
    print(f"{way}: from a choice to the nearest label {distance:.3f} on average")

# %%

fig, ax = plt.subplots(layout="constrained")
logs = errors.log()
reach = logs.std(dim=2) / num_repeats**0.5
for row, (way, marker) in enumerate(zip(ways, "os^vD", strict=True)):
    middle = logs[:, row].mean(dim=1).exp()
    bars = middle * reach[:, row]
    where = [count + 0.4 * (row - 2) for count in counts]
    ax.errorbar(where, middle, yerr=bars, marker=marker, capsize=3, label=way)
ax.set_yscale("log")
ax.set_xticks(counts)
ax.set_yticks([0.2, 0.4, 0.8, 1.6], labels=[0.2, 0.4, 0.8, 1.6])
ax.minorticks_off()
ax.set_xlabel("labeled configurations")
ax.set_ylabel("error of the force, bars: standard error")
ax.set_title(f"Five ways to choose labels: mean of {num_repeats}, float32\n{name}")
ax.legend()
fig.set_label(
    f"Error of a committee's force against labels, {counts[0]} to {counts[-1]}, for "
    f"five ways to choose them. Result: {'; '.join(verdicts)}."
)

# %%
# **Where far apart is better than random, no committee was needed to choose.** Where
# *far and disagreeing* is not told from *far apart*, no gain from the disagreement was
# seen. Where *far and disagreeing* is better than *most disagreement*, the distance
# makes the difference: the two ways differ by nothing else. *Most of 3 %* thins the
# pool first. Where it is better than random, this does not tell whether the
# disagreement helped, or that it is large far from the labels. The last lines printed
# above show how far a choice lies, in the end, from the nearest other label.
#
# All this is about one surface of two coordinates, about pools and test places that
# cover it evenly, and about 15 labels at a time. On organic molecules, labels chosen by
# disagreement did as well as ten times as many without it (Smith and others). They
# labeled in many rounds. There, a distance has to be chosen, and it probably tells
# less. So compare on your own pool, and let both random labels and labels far apart
# take part.

fig, axes = plt.subplots(1, 2, sharey=True, layout="constrained")
for ax, row in zip(axes, [1, 3], strict=True):
    ax.plot(*pools[0, :600].T.cpu(), ".", color="gray", ms=2)
    ax.plot(*x[row, 0, :15].T.cpu(), "C0s", fillstyle="none", label="first")
    ax.plot(*x[row, 0, 15:].T.cpu(), "C1o", ms=5, label="chosen")
    ax.set_title(list(ways)[row])
    ax.set_xlabel("first coordinate")
    ax.set_aspect("equal")
axes[0].set_ylabel("second coordinate")
axes[0].legend()
fig.set_label(
    "600 rows of a pool, its first labels and those chosen: by most disagreement "
    f"{apart[1]:.3f} from the nearest label on average, far apart {apart[3]:.3f}."
)

# %%
# The mistake: an energy of shape ``[1]``
# ---------------------------------------
#
# A network returns one number as a tensor of shape ``[1]``. Without ``squeeze``:


def unsqueezed(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


member = {key: p[0] for key, p in starts.items()}
try:
    grad_and_value(unsqueezed, argnums=1)(member, x_test[0])
except RuntimeError as error:
    print(error)
slope, _ = grad_and_value(energy)(member, x_test[0])
print(f"without argnums=1: slopes by {', '.join(slope)}")

# %%
# Without ``argnums=1`` the slope is that by the weights, a dictionary: in
# ``energy_and_force``, only the minus raises an error. The wrong order of the two
# ``vmap`` raises none, and gives ``[15, 4]`` and ``[15, 4, 2]`` (tested).
#
# Remember
# --------
#
# Write the energy of one member at one place. ``grad_and_value`` by the positions gives
# the force, two ``vmap`` give all forces of the committee, and the sum of the losses
# trains it on both. Before you trust disagreement to choose labels, compare it with
# labels far apart.
#
# Next
# ----
#
# - ``plot_transformers.py``: models that people build, attention first.
# - ``plot_derivatives_in_the_loss.py``: slopes of slopes in the loss.
#
# References
# ----------
#
# - K. Müller and L. D. Brown: Location of saddle points and minimum energy paths, 1979,
#   `doi:10.1007/BF00547608 <https://doi.org/10.1007/BF00547608>`_.
# - C. Schran, K. Brezina, O. Marsalek: Committee neural network potentials control
#   generalization errors and enable active learning, 2020, `doi:10.1063/5.0016004
#   <https://doi.org/10.1063/5.0016004>`_.
# - J. S. Smith and others: Less is more: sampling chemical space with active learning,
#   2018, `doi:10.1063/1.5023802 <https://doi.org/10.1063/1.5023802>`_.
# - O. Sener and S. Savarese: Active learning for convolutional neural networks, a
#   core-set approach, 2018, `arXiv:1708.00489 <https://arxiv.org/abs/1708.00489>`_: the
#   farthest first.
