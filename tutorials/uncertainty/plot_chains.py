"""
Hamiltonian chains, and how near an ensemble comes
==================================================

Sample the posterior of a small Bayesian neural network with many Hamiltonian Monte
Carlo chains in one call, and compare the bands of ensembles with theirs.

**In short.** A chain is a row of a matrix: one call gives the gradients of all chains,
and ``torch.where`` accepts or refuses the move of each. Judge chains by the R-hat of
the function, not of the weights. For this network of 49 weights, an ensemble with
anchors and noise has, after 1,000 steps, about the chains' width at the data and
outside, and rather less in the gap; an ensemble of best fits is narrower on average:
the run says by how much.

Before you start: ``plot_ensembling.py`` says what ``vmap`` maps over.
"""

# %%
# Set-up
# ------

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call, vmap

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
print(f"{device.type}, torch {torch.__version__}, float32 but for the check")

# %%
# All chains in one call
# ----------------------
#
# The lines to copy. All weights of a chain are one vector, in units of the prior: each
# has a standard normal distribution before it sees data. The energy is minus the log of
# prior times likelihood, up to a constant: **a sum over the rows, not a mean**. A move
# draws a random momentum, follows the slope for 40 leapfrog steps, and is kept with
# probability exp(-rise of the total energy), at most 1.

sigma = 0.2  # standard deviation of the noise of the targets
widths = {"0.weight": 2.0, "0.bias": 2.0, "2.weight": 0.5, "2.bias": 0.5}  # the prior
with torch.device("meta"):
    skeleton = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
shapes = {name: p.shape for name, p in skeleton.named_parameters()}


def function(theta, x):
    """The network with the weights of one chain: [49], [row, 1] -> [row, 1]."""
    parts = theta.split([shape.numel() for shape in shapes.values()])
    named = zip(shapes.items(), parts, strict=True)
    params = {name: widths[name] * part.view(shape) for (name, shape), part in named}
    return functional_call(skeleton, params, (x,), strict=True)


def energy(theta, x, y):
    misfit = ((y - function(theta, x)) / sigma).square().sum()
    return (theta.square().sum() + misfit) / 2


# %%


def energies_and_slopes(energy, theta, x, y):
    """Of all chains: theta [chain, weight] -> [chain], [chain, weight]."""
    theta = theta.detach().requires_grad_()
    value = vmap(energy)(theta, x, y)
    return value.detach(), torch.autograd.grad(value.sum(), theta)[0]


def hmc(energy, theta, x, y, step, draws, leaps=40):
    """Draws [draw, chain, weight], and which moves were accepted [draw, chain].

    ``step`` [chain] varies by 20 percent from move to move (Neal 2011).
    """
    value, slope = energies_and_slopes(energy, theta, x, y)
    kept, accepted = [], []
    for _ in range(draws):
        size = (step * torch.empty_like(step).uniform_(0.8, 1.2))[:, None]
        momentum, new, new_slope = torch.randn_like(theta), theta, slope
        before = value + momentum.square().sum(1) / 2
        for _ in range(leaps):
            momentum = momentum - size / 2 * new_slope
            new = new + size * momentum
            new_value, new_slope = energies_and_slopes(energy, new, x, y)
            momentum = momentum - size / 2 * new_slope
        odds = (before - new_value - momentum.square().sum(1) / 2).exp()
        take = torch.rand_like(odds) < odds  # no, where the energy is NaN
        theta = torch.where(take[:, None], new, theta)
        slope = torch.where(take[:, None], new_slope, slope)
        value = torch.where(take, new_value, value)
        kept.append(theta)
        accepted.append(take)
    return torch.stack(kept), torch.stack(accepted).float()


# %%
# **Langevin dynamics** with acceptance is ``hmc(..., leaps=1)``. Without (SGLD, if on
# minibatches), a move is ``theta - step * slope + (2 * step) ** 0.5 *
# torch.randn_like(theta)`` (tested), with ``step`` half the square of that of ``hmc``.
# On minibatches, multiply ``misfit`` by the number of rows over that of the minibatch.
#
# Four data sets of thirty points come from a sine, with a gap in the middle. A chain
# has its own data in the same call, so that chains and ensembles are compared four
# times. The check to keep, in float64 on the CPU: the slopes of a loop over chains.

num_sets, num_chains = 4, 16
left, right = torch.rand(2, num_sets, 15)
x = torch.cat([0.8 * left - 1.5, 0.8 * right + 0.5], 1)[..., None]  # [set, 30, 1]
y = torch.sin(3 * x) + sigma * torch.randn_like(x)

theta, data = torch.randn(4, 49).cpu().double(), (x.cpu().double(), y.cpu().double())
_, slopes = energies_and_slopes(energy, theta, *data)
far = []
for row, points, target, slope in zip(theta, *data, slopes, strict=True):
    row.requires_grad_()
    seen = torch.distributions.Normal(function(row, points), sigma).log_prob(target)
    prior = torch.distributions.Normal(0, 1).log_prob(row)
    (alone,) = torch.autograd.grad(-seen.sum() - prior.sum(), row)
    far.append((alone - slope).abs().max())
far = torch.stack(far).max().item()
assert far < 1e-10, f"the slopes are not those of a loop: {far:.0e} apart"
print(f"slopes of four chains in one call and one by one: {far:.0e} apart")
x, y = x.to(device), y.to(device)

# %%
# Find a step size: eight in one call
# -----------------------------------
#
# Eight step sizes, four chains each, run in one call on the first data set.

sizes = 0.006 * 10 ** (torch.arange(8) / 7)
steps = sizes.repeat_interleave(4).to(device)
data = [part[:1].expand(32, -1, -1) for part in (x, y)]
start = torch.randn(32, 49, device=device)
_, taken = hmc(energy, start, *data, steps, draws=40)
shares = taken[10:].mean(0).view(8, 4).mean(1).cpu()
best = sizes[shares >= 0.8].max() if (shares >= 0.8).any() else sizes[0]
for size, share in zip(sizes.tolist(), shares.tolist(), strict=True):
    print(f"step {size:.4f}: {share:.0%} accepted")
print(f"the largest with 80 % or more: {best:.4f}")

# %%
# Do the chains agree? Ask the function
# -------------------------------------
#
# R-hat compares the spread of the chains' means with that inside the chains: 1 where
# the means agree (Gelman and Rubin 1992). Each chain counts as two halves; Vehtari
# (2021) asks for less than 1.01, of ranks, which are not taken here; up to 1.1, the
# older limit, will do for a band; it tests means, not widths. **What should happen:**
# hidden units can change places without a change of the function, so chains that agree
# on the function may still disagree on each weight.


def r_hat(values):
    """Of values [draw, chain, ...], for each of the others."""
    halves = torch.cat(values.chunk(2), 1)
    within, between = halves.var(0).mean(0), halves.mean(0).var(0)
    return ((len(halves) - 1) / len(halves) + between / within).sqrt()


def own(part, count):
    """The data of each set, for ``count`` chains or members of it."""
    return part.repeat_interleave(count, 0)


draws = 120
start = torch.randn(num_sets * num_chains, 49, device=device)
steps = best.to(device).expand(len(start))
data = own(x, num_chains), own(y, num_chains)
chains, taken = hmc(energy, start, *data, steps, draws)
chains = chains[draws // 4 :].unflatten(1, (num_sets, num_chains))  # warm-up dropped
grid = torch.linspace(-2.2, 2.2, 111, device=device)[:, None]


def curves(theta):
    """The function of each row of weights on the grid: [..., weight] -> [..., 111]."""
    outputs = vmap(function, in_dims=(0, None))(theta.flatten(0, -2), grid)
    return outputs[..., 0].unflatten(0, theta.shape[:-1])


drawn = curves(chains)  # [draw, set, chain, 111]
print(f"{taken.mean():.0%} accepted; largest R-hat of each data set")
for name, values in {"function": drawn, "weights": chains}.items():
    worst = [f"{r_hat(values[:, k]).max():.2f}" for k in range(num_sets)]
    print(f"    of the {name}: {', '.join(worst)}")

# %%
# How near does an ensemble come?
# -------------------------------
#
# Four ensembles of 32 members for each data set, all trained by one call, with the
# network, the prior and the data of the chains:
#
# - **likelihood**: each member minimizes the misfit, from its own start;
# - **MAP**: it minimizes the energy, so the prior pulls it to zero;
# - **anchor**: the prior pulls it to its own start, a draw of the prior (Pearce 2020);
# - **anchor and noise**: it also has its own noise on the targets (Oliver 1996). For a
#   model linear in its weights, both together draw from the posterior.
#
# 32 draws of the chains show how far 32 curves are off by chance alone. Columns: at the
# data (within 0.4 of -1.1 and 0.9), in the gap (within 0.4 of -0.1), outside (from 1.7
# on).

kinds = {  # pulled by the prior, to an anchor, with noise on the targets
    "likelihood": (0, 0, 0),
    "MAP": (1, 0, 0),
    "anchor": (1, 1, 0),
    "anchor and noise": (1, 1, 1),
}
num_members = 32
flags = torch.tensor(list(kinds.values()), device=device).float()
pulled, anchors, noisy = own(flags, num_sets * num_members).T


def member_loss(theta, anchor, pulled, x, y):
    misfit = ((y - function(theta, x)) / sigma).square().sum()
    return (pulled * (theta - anchor).square().sum() + misfit) / 2


# %%


first = torch.randn(num_sets * num_members, 49, device=device).repeat(len(kinds), 1)
data = [own(part, num_members).repeat(len(kinds), 1, 1) for part in (x, y)]
noise = sigma * torch.randn_like(data[1]) * noisy[:, None, None]


def ensembles(num_steps):
    """Curves [kind, set, member, 111]: Adam, the rate falls linearly to zero."""
    fixed = anchors[:, None] * first, pulled, data[0], data[1] + noise
    theta = first.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.03, fused=True)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        vmap(member_loss)(theta, *fixed).sum().backward()
        optimizer.step()
        rate.step()
    return curves(theta.detach().unflatten(0, (-1, num_sets, num_members)))


# %%

at = grid[:, 0]
near = (at + 1.1).abs() < 0.4, (at - 0.9).abs() < 0.4
regions = {
    "data": near[0] | near[1],
    "gap": (at + 0.1).abs() < 0.4,
    "outside": at > 1.7,
}


def spread(curves):
    """Standard deviation over members, [set, member, 111] -> [region, set]."""
    variance = curves.var(1)
    return torch.stack([variance[:, w].mean(1).sqrt() for w in regions.values()]).cpu()


# %%

drawn = drawn.transpose(0, 1).flatten(1, 2)  # [set, draw of all chains, 111]
chosen = torch.arange(32, device=device) * (drawn.shape[1] // 32)
bands = {"32 draws of the chains": drawn[:, chosen]}
for num_steps in (250, 1000):
    for kind, found in zip(kinds, ensembles(num_steps), strict=True):
        bands[f"{kind}, {num_steps} steps"] = found
reference = spread(drawn)
print("standard deviation of the chains, mean of four data sets:")
means = zip(regions, reference.mean(1), strict=True)
print("   ", ", ".join(f"{name} {value:.3f}" for name, value in means))
print("as a multiple of it (lowest and highest of the four):")
for name, found in bands.items():
    ratios = spread(found) / reference
    cells = [f"{r.mean():.2f} ({r.min():.2f} to {r.max():.2f})" for r in ratios]
    print(f"    {name:28}", "  ".join(cells))
print("distance of the mean from that of the chains, in their standard deviations:")
for name, found in bands.items():
    gap = (found.mean(1) - drawn.mean(1)).abs() / drawn.std(1)  # [set, 111]
    cells = [f"{gap[:, where].mean():.2f}" for where in regions.values()]
    print(f"    {name:28}", "  ".join(cells))

# %%
# The mistake: the mean of the losses
# -----------------------------------
#
# A training loop has the mean over the rows. In an energy it counts thirty rows as one
# (the first data set):


def mean_energy(theta, x, y):
    misfit = ((y - function(theta, x)) / sigma).square().mean()
    return (theta.square().sum() + misfit) / 2


few = [part[:1].expand(16, -1, -1) for part in (x, y)]
wrong, _ = hmc(mean_energy, start[:16], *few, steps[:16], draws=60)
wrong = curves(wrong[len(wrong) // 4 :]).flatten(0, 1)[None]  # of the first data set
print("with the mean of the losses, as a multiple of the chains' standard deviation:")
ratios = (spread(wrong) / reference[:, :1])[:, 0].tolist()
print("   ", ", ".join(f"{k} {r:.2f}" for k, r in zip(regions, ratios, strict=True)))

# %%

drawing = "anchor and noise", "likelihood"
shown = {
    "chains": drawn[0],
    **{f"{k}, {num_steps} steps": bands[f"{k}, {num_steps} steps"][0] for k in drawing},
    "chains, mean of the losses": wrong[0],
}
fig, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, sharey=True)
fig.set_layout_engine("constrained")
points, line = (x[0].cpu(), y[0].cpu()), at.cpu()
for ax, (name, part) in zip(axes.flat, shown.items(), strict=True):
    middle, wide = part.mean(0).cpu(), 2 * part.std(0).cpu()
    ax.fill_between(line, middle - wide, middle + wide, alpha=0.3)
    ax.plot(line, middle, label="mean, 2 standard deviations")
    ax.plot(line, (3 * line).sin(), "k--", lw=1, label="truth")
    ax.plot(*points, "k.", label="data")
    ax.set(title=name, ylim=(-3, 3))
fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
fig.supylabel("y")
for ax in axes[1]:
    ax.set_xlabel("x")
fig.suptitle(f"Bands of one data set, {device.type}, float32")
fig.set_label(
    "Four panels, the first data set: bands of two standard deviations around the mean."
    " Multiples of the chains' spread at the data, mean of four data sets: "
    + ", ".join(
        f"{k} {(spread(v) / reference)[0].mean():.2f}" for k, v in bands.items()
    )
    + "."
)

# %%
# Where the whole range of an ensemble lies below that of the 32 draws, the ensemble is
# too sure. **The widths also depend on how long one trains**: compare the two lengths.
# Compare the anchor with and without noise, too: noise on the targets keeps members
# apart at the data. The nearest width need not have the nearest mean: see the second
# table. Without the search of a step, 16 chains cost 76,800 gradients for each data
# set, 32 members of 1,000 steps 32,000; NUTS, in Pyro and NumPyro, finds the length of
# a move by itself.
#
# Nothing here speaks of large networks: 49 weights, 30 points and noise of a known
# size. Izmailov (2021) ran chains over up to millions of weights, on hundreds of
# accelerators.
#
# Remember
# --------
#
# **A sum over the rows, a row for each chain, and R-hat of the function.** Where you
# cannot run chains, noise on the targets and a pull to a draw of the prior make members
# whose spread comes near theirs after 1,000 steps, least in the gap, in this small
# case.
#
# Next
# ----
#
# - ``plot_more_members.py``: how many members, or one larger network.
# - ``plot_regression.py``: noise that is not known.
#
# References
# ----------
#
# - Neal (2011), MCMC using Hamiltonian dynamics, `arXiv:1206.1901
#   <https://arxiv.org/abs/1206.1901>`_.
# - Gelman and Rubin (1992), `doi:10.1214/ss/1177011136
#   <https://doi.org/10.1214/ss/1177011136>`_.
# - Vehtari and others (2021), rank-normalized R-hat, `arXiv:1903.08008
#   <https://arxiv.org/abs/1903.08008>`_.
# - Oliver and others (1996), anchor and noise for permeability fields,
#   `doi:10.3997/2214-4609.201406884 <https://doi.org/10.3997/2214-4609.201406884>`_.
# - Pearce and others (2020), anchored ensembles, `arXiv:1810.05546
#   <https://arxiv.org/abs/1810.05546>`_.
# - Izmailov and others (2021), what are Bayesian neural network posteriors really like,
#   `arXiv:2104.14421 <https://arxiv.org/abs/2104.14421>`_.
