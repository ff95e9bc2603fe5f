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
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
device_name = f"{device.type.upper()} ({torch.get_num_threads()} threads)"
if device.type == "cuda":
    device_name = torch.cuda.get_device_name(device)
print(f"{device_name}, torch {torch.__version__}, float32")

# %%
# The data follow a well-known figure (Lakshminarayanan 2017): a cubic with noise of
# standard deviation 3, seen between -4 and 4 only. The paper has one data set of 20
# points and five members with one hidden layer; here are twenty sets of 40 points with
# ten members each. All 200 networks train together.

num_sets, num_members = 20, 10
x = (8 * torch.rand(num_sets, 40) - 4).to(device)  # [set, point]
y = x**3 + 3 * torch.randn(num_sets, 40).to(device)
x_std, y_std = x.std().item(), y.std().item()
whose = torch.arange(num_sets).repeat_interleave(num_members)  # [200]: 0, 0, ..., 19

# %%
# Train all members in one call
# -----------------------------


class GaussianNet(nn.Module):
    def __init__(self, x_std, y_std, width=50):
        super().__init__()
        self.x_std, self.y_std = x_std, y_std
        hidden = [nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x):  # [point]
        mean, raw = self.layers(x[:, None] / self.x_std).unbind(dim=1)
        var = F.softplus(raw) + 1e-3  # positive, with a floor
        return self.y_std * mean, self.y_std**2 * var


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
    skeleton = GaussianNet(x_std, y_std)
models = [GaussianNet(x_std, y_std).to(device) for _ in whose]
params, _ = stack_module_state(models)
train(params, x[whose], y[whose])  # own data for each network: [200, 40]

# %%
# With one data set, write ``vmap(member_loss, in_dims=(0, None, None))`` and no
# ``whose``; below, ``mixture(*predict(params, x_test))``.
#
# Then ask all members about the same points, from -6 to 6, beyond the data:


@torch.no_grad()
def predict(params, x):
    """Means and variances of all members, each [member, point]."""
    call = vmap(lambda p: functional_call(skeleton, p, (x,), strict=True))
    return call(params)


x_test = torch.linspace(-6, 6, 121, device=device)
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
# The first part is what the members believe to be noise, which more data would not
# remove. The second is what they disagree about: more data would settle it.


def mixture(means, variances):
    """Mean, noise and ignorance, each [..., point], of [..., member, point]."""
    return means.mean(-2), variances.mean(-2), means.var(-2, correction=0)


# %%
# For each data set, and how often the truth is where the ensemble's ignorance says:

mean, noise, ignorance = mixture(means, variances)  # each [set, point]
inside, truth = x_test.abs() <= 4, x_test**3
held = (truth - mean).abs() < 2 * ignorance.sqrt()
for name, where in [("inside", inside), ("outside", ~inside)]:
    stds = [v[:, where].mean(1).sqrt().median() for v in (noise, ignorance)]
    print(f"{name:7}: noise {stds[0]:.2f}, ignorance {stds[1]:.2f}", end="; ")
    print(f"truth within 2 std of ignorance: {held[:, where].float().mean():.0%}")
print("Standard deviations, medians over the data sets; the true noise has 3.")

# %%
# If ignorance is much larger outside than inside, **the ensemble knows that it is
# outside**. Where the share is far below 95 %, **it does not know how far it is
# wrong**: members share an error that their disagreement does not show. Outside, not
# even "noise" is noise: no data have taught the members that number. The figure shows
# the first data set.

fig, axes = plt.subplots(1, 2, sharey=True, figsize=(7, 4), layout="constrained")
at = x_test.cpu()
for ax, title, middle, parts in [
    (axes[0], f"Ensemble of {num_members}", mean[0], [noise[0], ignorance[0]]),
    (axes[1], "One member", means[0, 0], [variances[0, 0]]),
]:
    middle, inner = middle.cpu(), 2 * parts[0].sqrt().cpu()
    outer = 2 * sum(parts).sqrt().cpu()  # one member has only noise
    ax.fill_between(at, middle - inner, middle + inner, color="C0", alpha=0.4, lw=0)
    for sign in (-1, 1):  # what ignorance adds, between the two edges
        edges = (middle + sign * inner, middle + sign * outer)
        ax.fill_between(at, *edges, color="C1", alpha=0.8, lw=0)
    ax.plot(at, middle, "C0", linewidth=1)
    ax.plot(at, at**3, "C2--")
    ax.plot(x[0].cpu(), y[0].cpu(), "C5.", markersize=4)
    ax.set(title=f"{title}\n{device_name}, float32", xlabel="x")
axes[0].set_ylabel("y")
names = ["noise, 2 std", "added by ignorance", "mean", "truth", "data"]
handles = [*axes[0].collections[:2], *axes[0].lines]
_ = fig.legend(handles, names, loc="outside lower center", ncols=5)
fig.set_label(
    "y against x from -6 to 6; data between -4 and 4. Left the ensemble's mean with a "
    "band for noise, which ignorance widens at both edges outside the data. Right one "
    "member with a band for noise. Beyond the data the true cubic leaves all bands."
)

# %%
# Each member trains as if it were alone
# --------------------------------------
#
# Keep this check in your own project: four of the networks in one call and one by one,
# in float64 on the CPU. Alone they use ``F.gaussian_nll_loss``.

# of four data sets
few = [copy.deepcopy(model).cpu().double() for model in models[::50]]
data = x[whose[::50]], y[whose[::50]], x_test
x64, y64, at64 = (t.cpu().double() for t in data)
stack, _ = stack_module_state(few)
train(stack, x64, y64, steps=20)
for model, own_x, own_y in zip(few, x64, y64, strict=True):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        center, var = model(own_x)
        F.gaussian_nll_loss(center, own_y, var).backward()
        optimizer.step()

together = torch.stack(predict(stack, at64))  # [2, 4, 121]: means, variances
with torch.no_grad():
    alone = torch.stack([torch.stack(model(at64)) for model in few], dim=1)
off = (together - alone).abs().max() / alone.abs().max()
assert off < 1e-10, f"members do not train as if they were alone: {off:.1e} apart"

print(f"20 steps in float64: together and alone are {off:.0e} apart")

# %%
# Does it know where, and how much?
# ---------------------------------
#
# - *Where*: raise an alarm when a signal exceeds its 95 % quantile inside. Which share
#   of the points outside is found? The signal is a variance or the ignorance, and, as
#   a rival without a network, the distance to the nearest training point.
# - *How much*: the negative log likelihood (NLL) of new observations, and the share of
#   them that lies in the interval of 95 % (coverage).
#
# A wide network with the parameters of ten members (tested) takes part; its learning
# rate is theirs, not tuned for it. Members leave the data with different slopes, so
# ignorance should find the outside. But beyond its last kink a ReLU network is a
# straight line, and the truth is a cubic: all members may be wrong together.


def gaussian_nll(mean, var, y):
    """NLL of each y in nats (Lakshminarayanan 2017, eq. 1); all of one shape."""
    if not mean.shape == var.shape == y.shape:
        raise ValueError(f"shapes differ: {mean.shape}, {var.shape}, {y.shape}")
    if not (var > 0).all():
        raise ValueError("var must be positive: give it a floor")
    return 0.5 * ((2 * torch.pi * var).log() + (y - mean) ** 2 / var)


def covered(mean, var, y):
    """Is each y in its Gaussian's central 95 % (1.96 std)? 0 or 1, in y's shape."""
    return ((y - mean).abs() < 1.96 * var.sqrt()).float()


def found(signal):
    """[set, point] to [set]: share outside above the 95 % quantile inside (ours)."""
    limit = signal[:, inside].quantile(0.95, dim=1, keepdim=True)
    return (signal[:, ~inside] > limit).float().mean(1)


# %%
# All wide networks train in one call, too, with the same skeleton:

wides = [GaussianNet(x_std, y_std, width=164).to(device) for _ in range(num_sets)]
wide, _ = stack_module_state(wides)
train(wide, x, y)
wide_mean, wide_var = predict(wide, x_test)

total = noise + ignorance
signals = {
    "variance, one member": variances[:, 0],
    "variance, wide network": wide_var,
    "variance, ensemble": total,
    "nearest training point": (x_test[:, None] - x[:, None]).abs().amin(2),
    "ignorance, ensemble": ignorance,
}
print("Share of the points outside that an alarm finds: median (quartiles) of the sets")
for name, signal in signals.items():
    low, mid, high = (found(signal).quantile(q) for q in (0.25, 0.5, 0.75))
    lead = found(ignorance) - found(signal)
    end = f"; ignorance: {(lead > 0).sum():2} wins, {(lead < 0).sum():2} losses"
    end = "" if signal is ignorance else end
    print(f"  {name:22} {mid:.2f} ({low:.2f} to {high:.2f}){end}")

# %%
# Comparisons are paired, set by set. Chance alone gives 15 wins of 20 or more, to
# either side, once in 24 comparisons, and there are eight here: read 15 or 16 as a
# hint, 17 as a result (tested). As in the paper, the mixture counts as one Gaussian. A
# lower NLL is better; coverage should be 0.95.

yardstick = 0.5 * math.log(2 * math.pi * math.e * 3**2)  # the entropy of the noise
y_test = truth + 3 * torch.randn(num_sets, len(x_test)).to(device)
ways = {
    "one member": (means[:, 0], variances[:, 0]),
    "wide network": (wide_mean, wide_var),
    "ensemble": (mean, total),
}
for place, where in [("inside", inside), ("outside", ~inside)]:
    print(f"{place}, median of the sets (NLL of the truth itself: {yardstick:.2f})")
    ours = gaussian_nll(mean, total, y_test)[:, where].mean(1)
    for way, (center, var) in ways.items():
        nll = gaussian_nll(center, var, y_test)[:, where].mean(1)
        share = covered(center, var, y_test)[:, where].mean(1).quantile(0.5)
        end = f"; ensemble lower on {(ours < nll).sum()} of {num_sets} sets"
        end = "" if way == "ensemble" else end
        print(f"  {way:12} coverage {share:.2f}, NLL {nll.quantile(0.5):6.2f}{end}")

# %%
# **Where ignorance finds more than a variance does**, disagreement is a signal that one
# network lacks. In one dimension a ruler, the nearest training point, may do as well;
# ignorance is for inputs between which you know no good distance. **Where coverage
# outside stays far below 0.95**, a way fails as error bar, even if it comes closest.
# **When the alarm rings**, do not use the prediction: fall back on a safe default or a
# person, and collect data there. Inside there is less to gain. Members that train for
# longer fit the noise, and their variances become too small (tested).

fig, ax = plt.subplots(layout="constrained")
for name, value, look in [
    ("error of the ensemble's mean", (mean - truth).abs(), "C2:"),
    ("ignorance of the ensemble", ignorance.sqrt(), "C1-"),
    ("std of one member", variances[:, 0].sqrt(), "C0--"),
]:
    low, middle, high = (value.quantile(q, dim=0).cpu() for q in (0.25, 0.5, 0.75))
    ax.semilogy(at, middle, look, label=name)
    ax.fill_between(at, low, high, color=look[:2], alpha=0.2)
for edge in (-4, 4):
    ax.axvline(edge, color="C5", linewidth=0.8)
ax.set_title(f"Error and what predicts it, {num_sets} sets\n{device_name}, float32")
ax.set_xlabel("x")
ax.set_ylabel("in units of y; median and quartiles")
ax.legend(loc="upper center")
fig.set_label(
    "Against x from -6 to 6, on a logarithmic axis: the error of the ensemble's mean, "
    "the ensemble's ignorance and one member's standard deviation. Lines at -4 and 4 "
    "mark where the data end."
)

# %%
# Where the dotted line lies above the solid one, ignorance understates the error.
#
# Training decides how much members differ. Another rate, activation or number of points
# changes likelihoods and coverage; it changes little about *where*
# (tested: ``tanh``, three times the rate, five members on half the points).
#
# The mistake: leaving out the variance of the means
# --------------------------------------------------
#
# The average of the members' standard deviations, or of their variances, looks like the
# ensemble's. But ten members that are sure of ten different things come out sure.

averaged = variances.sqrt().mean(1) ** 2  # [20, 121]
ways = {"standard deviations averaged": averaged, "variances averaged": noise}
for name, var in (ways | {"mixture": total}).items():
    loss = gaussian_nll(mean, var, y_test)[:, ~inside].mean(1).quantile(0.5)
    print(f"{name:28}: NLL outside {loss:6.2f} (median of the sets)")

# %%
# Two more mistakes:
#
# - **A loss that looks at values.** ``vmap`` refuses ``F.gaussian_nll_loss``, and
#   ``gaussian_nll`` above, since they test the variances. Write the loss out, as in
#   ``member_loss``, or call theirs outside on all members, with ``reduction="none"``
#   and then ``.mean(dim=1).sum()`` (tested).
# - **A variance without a floor** (``softplus`` is none): a member that passes through
#   a point lowers its loss for ever by shrinking the variance there.
#
# Remember
# --------
#
# Average means and variances, and **add the variance of the means**. The first part is
# noise where there are data; the second is large where members were never told what to
# predict. It says where not to trust the ensemble, not how wrong it is.
#
# Next
# ----
#
# - ``plot_more_members.py``: how many members are enough, and a fair rival.
# - ``plot_unknown_inputs.py``: the same question for images.
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
