"""
An ensemble that knows where it has no data
===========================================

Train networks that predict a mean and a variance, all in one call of
``torch.func.vmap``, and split the variance of their ensemble into noise and ignorance.

**In short.** Each member minimizes the Gaussian negative log likelihood; the variance
of the ensemble is the mean of the members' variances (**noise**, aleatoric) plus the
variance of their means (**ignorance**, epistemic). Members agree where the data tell
them what to predict and are free to disagree elsewhere, but nothing promises that they
disagree enough.

Before you start, read ``plot_training.py``: it explains the loop that trains a stack.
"""

# %%
# Set-up
# ------

import copy
from math import comb

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal
from torch.func import functional_call, stack_module_state, vmap

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
device_name = f"{device.type.upper()} ({torch.get_num_threads()} threads)"
if device.type == "cuda":
    device_name = torch.cuda.get_device_name(device)
print(f"{device_name}, torch {torch.__version__}, float32")

# %%
# The data are those of a well-known figure (Lakshminarayanan 2017): a cubic with noise
# of standard deviation 3, seen between -4 and 4 only. One data set proves nothing, so
# there are twenty, each with an ensemble of ten. All 200 networks train together.

num_sets, num_members = 20, 10
x = (8 * torch.rand(num_sets, 40) - 4).to(device)  # the paper has 20 points, not 40
y = x**3 + 3 * torch.randn(num_sets, 40).to(device)
whose = torch.arange(num_sets).repeat_interleave(num_members)  # [200]: 0, 0, ..., 19

# %%
# Train all members in one call
# -----------------------------


class GaussianNet(nn.Module):
    def __init__(self, width=50):
        super().__init__()
        hidden = [nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x):  # [40]; 2.3 and 24 are the standard deviations of x and y
        mean, raw = self.layers(x[:, None] / 2.3).unbind(dim=1)
        var = F.softplus(raw) + 1e-3  # positive, with a floor
        return 24 * mean, 24**2 * var


def member_loss(params, x, y):  # of one member, without the constant
    mean, var = functional_call(skeleton, params, (x,), strict=True)
    return 0.5 * (var.log() + (y - mean) ** 2 / var).mean()


def train(params, x, y, steps=200):
    optimizer = torch.optim.Adam(params.values(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        vmap(member_loss)(params, x, y).sum().backward()
        optimizer.step()


with torch.device("meta"):
    skeleton = GaussianNet()
models = [GaussianNet().to(device) for _ in whose]
params, _ = stack_module_state(models)
train(params, x[whose], y[whose])  # own data for each network: [200, 40]

# %%
# Then ask all members about the same points, from -6 to 6, beyond the data:


@torch.no_grad()
def predict(params, x):
    """Means and variances of all members, each [member, point]."""
    call = vmap(lambda p: functional_call(skeleton, p, (x,), strict=True))
    return call(params)


x_test = torch.linspace(-6, 6, 241, device=device)
means, variances = (t.unflatten(0, (num_sets, -1)) for t in predict(params, x_test))
print("means and variances [set, member, point]:", list(means.shape))

# %%
# Noise and ignorance
# -------------------
#
# An ensemble of :math:`M` Gaussians is a mixture. Its mean is the mean of the means,
# and its variance is a sum (the law of total variance):
#
# .. math::
#
#    \sigma^2 = \underbrace{\frac1M \sum_m \sigma_m^2}_\text{noise}
#    + \underbrace{\frac1M \sum_m (\mu_m - \mu)^2}_\text{ignorance}
#
# The first part is what the members believe to be noise: more data will not remove it.
# The second is what they disagree about: more data would settle it.


def mixture(means, variances):
    """Mean, noise and ignorance of equal members, which dimension -2 counts."""
    return means.mean(-2), variances.mean(-2), means.var(-2, correction=0)


mean, noise, ignorance = mixture(means, variances)  # each [set, point]
inside = x_test.abs() <= 4
for name, where in [("inside", inside), ("outside", ~inside)]:
    stds = [v[:, where].mean(1).sqrt().median() for v in (noise, ignorance)]
    print(f"{name:7} the data: noise {stds[0]:5.2f}, ignorance {stds[1]:5.2f}")
print("Standard deviations, medians over the data sets; the true noise has 3.")

# %%
# If ignorance is much larger outside than inside, **the ensemble tells the two apart**.
# Outside, not even "noise" is noise: no data have taught the members that number. The
# figure shows the first data set, without the cubic, so that the bands can be seen.

fig, axes = plt.subplots(1, 2, sharey=True, figsize=(7, 4), layout="constrained")
at, at_data = x_test.cpu(), x[0].cpu()
for ax, title, middle, parts in [
    (axes[0], f"Ensemble of {num_members}", mean[0], [noise[0], ignorance[0]]),
    (axes[1], "One member", means[0, 0], [variances[0, 0]]),
]:
    middle = middle.cpu() - at**3
    for count, color, label in [(2, "C1", "noise and ignorance"), (1, "C0", "noise")]:
        if count <= len(parts):
            wide = 2 * sum(parts[:count]).sqrt().cpu()
            band = {"color": color, "alpha": 0.35, "label": f"{label}, 2 std"}
            ax.fill_between(at, middle - wide, middle + wide, **band)
    ax.plot(at, middle, "C0", label="mean")
    ax.axhline(0, color="C2", linestyle="--", label="truth")
    ax.plot(at_data, y[0].cpu() - at_data**3, "C5.", label="data")
    ax.set(title=f"{title}\n{device_name}, float32", xlabel="x", ylim=(-40, 40))
axes[0].set_ylabel("y minus the true cubic")
handles = axes[0].get_legend_handles_labels()
_ = fig.legend(*handles, loc="outside lower center", ncols=5)
fig.set_label(
    "Predictions minus the true cubic from -6 to 6; the data end at -4 and 4, where "
    "the means leave the truth. Left the ensemble's mean with a band for noise, and "
    "around it one for noise and ignorance. Right one member, with a band for noise."
)

# %%
# Each member trains as if it were alone
# --------------------------------------
#
# Keep this check in your own project: four of the networks in one call and one by one,
# in float64. Alone they use PyTorch's own ``F.gaussian_nll_loss``. The mixture is
# checked against ``torch.distributions``, which knows it as ``MixtureSameFamily``.

few = [copy.deepcopy(model).double() for model in models[::50]]  # of four data sets
x64, y64, at64 = (t.double() for t in (x[whose[::50]], y[whose[::50]], x_test))
stack, _ = stack_module_state(few)
train(stack, x64, y64, steps=20)
for model, own_x, own_y in zip(few, x64, y64, strict=True):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        center, var = model(own_x)
        F.gaussian_nll_loss(center, own_y, var).backward()
        optimizer.step()

together = torch.stack(predict(stack, at64))  # [2, 4, 241]: means, variances
with torch.no_grad():
    alone = torch.stack([torch.stack(model(at64)) for model in few], dim=1)
off = (together - alone).abs().max() / alone.abs().max()
assert off < 1e-10, f"members do not train as if they were alone: {off:.1e} apart"

center, *parts = mixture(*together)
weights = Categorical(torch.ones_like(together[0].T))  # equal ones, [241, 4]
theirs = MixtureSameFamily(weights, Normal(together[0].T, together[1].T.sqrt()))
gap = (sum(parts) / theirs.variance - 1).abs().max()
assert gap < 1e-10, f"noise and ignorance do not add up to the mixture: {gap:.1e} off"
print(f"20 steps in float64: together and alone are {off:.0e} apart")

# %%
# Does it know where, and how much?
# ---------------------------------
#
# - *Where*: raise an alarm when a signal exceeds its 95 % quantile inside. The signal
#   is ignorance; one network has only its variance. Which share of the points outside
#   is found?
# - *How much*: the negative log likelihood (NLL) of new observations, and the share of
#   them that lies in the interval of 95 % (coverage).
#
# To be fair to single networks, a wider one with the parameters of ten members takes
# part. We expect the ensemble to find most points outside: members leave the data with
# different slopes. But beyond its last kink a ReLU network is a straight line, and the
# truth is a cubic, so all members may be wrong together.


def gaussian_nll(mean, var, y):
    """Negative log likelihood of each y, in nats; all of one shape, var > 0."""
    return 0.5 * ((2 * torch.pi * var).log() + (y - mean) ** 2 / var)


def covered(mean, var, y):
    """Whether each y is in the central 95 % of its Gaussian, as 0 or 1."""
    return ((y - mean).abs() < 1.96 * var.sqrt()).float()


def found(signal):
    """Share of points outside above the 95 % quantile inside; one for each set."""
    limit = signal[:, inside].quantile(0.95, dim=1, keepdim=True)
    return (signal[:, ~inside] > limit).float().mean(1)


wide, _ = stack_module_state([GaussianNet(164).to(device) for _ in range(num_sets)])
train(wide, x, y)  # all wide networks in one call; the parameters bring their sizes
wide_mean, wide_var = predict(wide, x_test)
sizes = [sum(p[0].numel() for p in stack.values()) for stack in (params, wide)]
print(f"{num_members} members: {num_members * sizes[0]} parameters, wide: {sizes[1]}")

# %%
# Each way is scored on each data set. As in the paper, the mixture counts as one
# Gaussian with its mean and variance.

y_test = x_test**3 + 3 * torch.randn(num_sets, len(x_test)).to(device)
ways = {  # mean, variance, signal
    "one member": (means[:, 0], variances[:, 0], variances[:, 0]),
    "wide network": (wide_mean, wide_var, wide_var),
    "ensemble": (mean, noise + ignorance, ignorance),
}
scores = {("points outside found", 1): {k: found(s) for k, (_, _, s) in ways.items()}}
for metric, name, ideal in [(gaussian_nll, "NLL", 0), (covered, "coverage", 0.95)]:
    for place, where in [("inside", inside), ("outside", ~inside)]:
        scores[f"{name} {place}", ideal] = {
            way: metric(center, var, y_test)[:, where].mean(1)
            for way, (center, var, _) in ways.items()
        }

# %%
# Medians over the data sets, with quartiles in brackets. Comparisons are paired, set by
# set, and closer to the ideal is better: 1 for the share found, 0.95 for coverage, an
# NLL as low as can be. A sign test decides, without ties: where chance alone would lead
# as far in more than one comparison of 20, the verdict is "undecided".

shares = scores["points outside found", 1].items()
shares = ", ".join(f"{way} {value.quantile(0.5):.0%}" for way, value in shares)
print(f"Alarms find of the points outside: {shares}. All scores:")
for (measure, ideal), values in scores.items():
    print(measure)
    for way, value in values.items():
        low, mid, high = (value.quantile(q) for q in (0.25, 0.5, 0.75))
        theirs, ours = ((v - ideal).abs() for v in (value, values["ensemble"]))
        wins, losses = (ours < theirs).sum(), (ours > theirs).sum()
        verdict = "better" if wins > losses else "worse"
        n, k = int(wins + losses), int(max(wins, losses))
        chance = 2 * sum(comb(n, i) for i in range(k, n + 1)) / 2**n
        verdict = verdict if chance < 0.05 else "undecided"
        end = f"; ensemble: {verdict} ({wins} to {losses})"
        end = "" if way == "ensemble" else end
        print(f"  {way:12} {mid:6.2f} ({low:.2f} to {high:.2f}){end}")

# %%
# **Where ignorance finds more than a variance does**, disagreement is a signal that one
# network lacks. **Where coverage outside stays far below 0.95**, the ensemble knows
# that it has no data, but not how wrong it is: use ignorance as an alarm, not as an
# error bar. Inside there is less to gain. Members that train for longer fit the noise,
# and their variances become too small (tested).

fig, ax = plt.subplots(layout="constrained")
for name, value, look in [
    ("error of the ensemble's mean", (mean - x_test**3).abs(), "C2:"),
    ("ignorance of the ensemble", ignorance.sqrt(), "C1-"),
    ("std of one member", variances[:, 0].sqrt(), "C0--"),
]:
    low, middle, high = (value.quantile(q, dim=0).cpu() for q in (0.25, 0.5, 0.75))
    ax.semilogy(at, middle, look, label=name)
    ax.fill_between(at, low, high, color=look[:2], alpha=0.2)
for edge in (-4, 4):
    ax.axvline(edge, color="C5", linewidth=0.8)
ax.set_title(f"{num_sets} data sets between -4 and 4\n{device_name}, float32")
ax.set_xlabel("x")
ax.set_ylabel("in units of y; median and quartiles")
ax.legend(loc="upper center")
fig.set_label(
    "Against x from -6 to 6, on a logarithmic axis: the error of the ensemble's mean, "
    "the ensemble's ignorance and one member's standard deviation. Lines at -4 and 4 "
    "mark where the data end."
)

# %%
# Training decides how much members differ. Another rate, activation or number of points
# changes the likelihoods and the coverage a lot; it changes little about *where*
# (tested: ``tanh``, three times the rate, five members on half the points).
#
# The mistake: averaging standard deviations
# ------------------------------------------
#
# The average of the members' standard deviations looks like the ensemble's. It leaves
# out ignorance: ten members that are sure of ten different things come out sure.

averaged = variances.sqrt().mean(1) ** 2  # [20, 241]
for name, var in [("averaged", averaged), ("mixture", noise + ignorance)]:
    loss = gaussian_nll(mean, var, y_test)[:, ~inside].mean(1)
    print(f"{name:8}: NLL outside {loss.quantile(0.5):6.2f} (median of the data sets)")

# %%
# The mistake: PyTorch's loss inside ``vmap``
# -------------------------------------------
#
# ``F.gaussian_nll_loss`` looks at the values of the variances, to refuse negative ones:

try:
    vmap(F.gaussian_nll_loss)(means[0], mean[:num_members], variances[0])
except RuntimeError as error:
    print(error)

# %%
# Write the loss out, as above, or call theirs outside ``vmap`` on all members, with
# ``reduction="none"`` and then ``.mean(dim=1).sum()`` (tested). Keep a floor under the
# variance: without one, a member that passes through a point gains without end by
# shrinking its variance there. ``softplus`` alone is no floor.
#
# Remember
# --------
#
# Average means and variances, and **add the variance of the means**. The first part is
# noise where there are data; the second is large where members were never told what to
# predict. It says where not to trust the ensemble, not how wrong it is.
#
# **Next**: ``plot_unknown_inputs.py`` asks the same of images, ``plot_more_members.py``
# says what each further member buys, ``plot_saving.py`` keeps the stack.
#
# References
# ----------
#
# - B. Lakshminarayanan, A. Pritzel, C. Blundell (2017), *Simple and scalable predictive
#   uncertainty estimation using deep ensembles*, `arXiv:1612.01474
#   <https://arxiv.org/abs/1612.01474>`_. The figure is in section 3.2.
# - J. M. Hernández-Lobato, R. P. Adams (2015), *Probabilistic backpropagation for
#   scalable learning of Bayesian neural networks*, `arXiv:1502.05336
#   <https://arxiv.org/abs/1502.05336>`_: the source of the cubic.
