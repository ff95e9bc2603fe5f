"""
Intervals that hold, from a bootstrap ensemble
==============================================

Turn a bootstrap ensemble of regression networks into prediction intervals that keep
their coverage however long the networks were trained, for new rows like the old ones.

**In short.** Train each member on a bootstrap sample, and keep which rows it has not
seen: the errors on these are honest (jackknife+ after bootstrap, a kind of conformal
prediction). Here the intervals held at every length of training, where the quantile of
training errors and the bars of an ensemble did not; bars that stop by unseen rows held,
too. The nearest proof promises less than is seen: 80 % for an interval of 90 %.

Before you start: ``plot_regression.py`` splits a variance into noise and ignorance.
"""

# %%
# Set-up
# ------

import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
print(f"{device.type}, torch {torch.__version__}, float32 but for the check")

# %%
# The interval of a bootstrap ensemble
# ------------------------------------
#
# The lines to copy; ``predict`` stands below, with the network. ``counts`` says how
# often each member trains on each row, so it is the weight of the row in the member's
# loss.


def bootstrap(num_models, num_rows):
    """How often each member has drawn each row: [member, row]."""
    shape = num_models, num_rows
    draws, ones = (torch.randint(num_rows, shape), torch.ones(shape))
    return torch.zeros(shape).scatter_add(1, draws, ones)


def member_loss(params, weight, x, y):
    """Mean squared error; a row of weight 0 is left out."""
    error = predict(params, x)[:, 0] - y
    return (weight * error**2).sum() / weight.sum()


# %%
# For each row, average the members that have not seen it: at the row, which gives an
# honest error, and at the new input. The ends of the interval are quantiles, over the
# rows, of the prediction minus and plus this error.


def smallest(values, level):
    """Of each column of n values, the ceil(level * (n + 1))-th smallest."""
    k = math.ceil(level * (len(values) + 1))
    return values.sort(0).values[k - 1] if k <= len(values) else values[0] + math.inf


def interval(at_rows, at_new, counts, y, level=0.9):
    """Lower and upper ends, of predictions [member, row] and [member, new]."""
    missed = (counts == 0).to(y)
    kept = missed.any(0)  # rows that some member has not seen
    share = (missed / missed.sum(0))[:, kept]  # [member, row]
    error = (y[kept] - (share * at_rows[:, kept]).sum(0)).abs()[:, None]
    center = share.T @ at_new  # [row, new]
    return -smallest(error - center, level), smallest(center + error, level)


# %%
# Fifty members, one call
# -----------------------
#
# The table has 442 patients with ten numbers each, and the progress of their diabetes a
# year later. We train on 60 of them, and predict the others. The inputs come scaled by
# all 442 patients, and 150 and 75 are near the mean and the spread of the target: old
# and new rows take part alike, so the proofs stand.

table = load_diabetes()
inputs = 20 * torch.tensor(table.data, dtype=torch.float32)
targets = (torch.tensor(table.target, dtype=torch.float32) - 150) / 75
num_splits, num_rows = 16, 60
order = torch.stack([torch.randperm(442) for _ in range(num_splits)])
x, y = inputs[order].to(device), targets[order].to(device)  # [split, patient, ...]
x_new, y_new = x[:, num_rows:], y[:, num_rows:]


def build(outputs=1):
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, outputs))


with torch.device("meta"):
    skeleton = build()


def predict(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


def train(params, loss, weight, x, y, stops):
    """Yield the parameters after each number of steps in ``stops``."""
    params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=0.01, fused=True)
    for step in range(1, stops[-1] + 1):
        optimizer.zero_grad()
        loss(params, weight, x, y).sum().backward()
        optimizer.step()
        if step in stops:
            yield {name: p.detach().clone() for name, p in params.items()}


counts = bootstrap(50, num_rows).to(device)
params, _ = stack_module_state([build().to(device) for _ in counts])
losses = vmap(member_loss, in_dims=(0, 0, None, None))  # one split
(params,) = train(params, losses, counts, x[0, :num_rows], y[0, :num_rows], [50])
outputs = vmap(predict, in_dims=(0, None))(params, x[0])[..., 0]  # [member, patient]
low, high = interval(*outputs.split([60, 382], 1), counts, y[0, :num_rows])
inside = ((low <= y_new[0]) & (y_new[0] <= high)).float().mean()
print(f"{inside:.1%} of {len(low)} new patients are in their interval of 90 %")

# %%
# Leave out one row: sixty members
# --------------------------------
#
# The jackknife+ (Barber 2021) trains a member for each row, on all the others. That is
# the same call with other weights, ``1 - torch.eye(60)``, and the same ``interval``.
# The check to keep, in float64 on the CPU: a weight of 0 trains what a loop trains
# without the row.

models = [build().cpu().double() for _ in range(10)]
few, _ = stack_module_state(models)
xs, ys = torch.randn(10, 10).cpu().double(), torch.randn(10).cpu().double()
without = (1 - torch.eye(10)).cpu().double()
(few,) = train(few, losses, without, xs, ys, [50])
together, far = vmap(predict, in_dims=(0, None))(few, xs), []
for i, model in enumerate(models):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    others = torch.arange(10) != i
    for _ in range(50):
        optimizer.zero_grad()
        (model(xs[others])[:, 0] - ys[others]).square().mean().backward()
        optimizer.step()
    far.append((model(xs) - together[i]).detach().abs().max())
far = torch.stack(far).max().item()
assert far < 1e-10, "weight 0 does not train what a loop trains without the row"
print(f"50 steps with weight 0, and without the row: {far:.0e} apart")

# %%
# Do they hold, however long the training is?
# -------------------------------------------
#
# Sixteen splits of the table, each with its own draw of 60 patients, and five lengths
# of training. **The rivals:**
#
# - training errors: the same quantile of the errors at the rows that ten members were
#   trained on;
# - Gaussian bars: fifty bootstrap members give a mean and a variance, and the bar is
#   1.645 standard deviations of noise and ignorance together (``plot_regression.py``);
# - split conformal: ten members train on 30 rows, the other 30 rows give the errors.
#
# **What should happen:** networks learn the rows that they see by heart, so errors at
# these shrink, and a variance fitted to them, too. Errors at unseen rows shrink only
# where new errors do.


def gaussian_loss(params, weight, x, y):
    """Negative log likelihood of a mean and of the log of a variance."""
    mean, log_variance = predict(params, x).T
    losses = log_variance / 2 + (y - mean) ** 2 / (2 * log_variance.exp())
    return (weight * losses).sum() / weight.sum()


def predictions(loss, weights, outputs=1):
    """For all patients, after each length: [split, member, patient, output]."""
    models = [build(outputs).to(device) for _ in range(weights[..., 0].numel())]
    params, _ = stack_module_state(models)
    params = {k: p.unflatten(0, weights.shape[:2]) for k, p in params.items()}
    each = vmap(vmap(loss, in_dims=(0, 0, None, None)))
    data = x[:, :num_rows], y[:, :num_rows]
    ask = vmap(vmap(predict, in_dims=(0, None)))
    return [ask(p, x) for p in train(params, each, weights, *data, stops)]


# %%

stops = [6, 12, 25, 50, 200]
counts = torch.stack([bootstrap(50, num_rows) for _ in range(num_splits)]).to(device)
leave_one_out = 1 - torch.eye(num_rows, device=device)
half = (torch.arange(num_rows, device=device) < 30).float().expand(10, -1)
others = torch.cat([leave_one_out, half, torch.ones_like(half)])
others = others.expand(num_splits, -1, -1)
squared = predictions(member_loss, torch.cat([counts, others], 1))
gaussian = predictions(gaussian_loss, counts, outputs=2)

# %%
# **With a stop**: in each split, the Gaussian bars stop after the length at which rows
# that members have not seen are most likely, and the bootstrap where its errors at them
# are least. Who chooses a length by these rows has no proof any more.


def of_splits(outputs, counts):
    """The intervals of each split: lower ends and upper ends, [split, new]."""
    ends = [
        interval(out[:, :num_rows], out[:, num_rows:], c, target[:num_rows])
        for out, c, target in zip(outputs, counts, y, strict=True)
    ]
    return [torch.stack(end) for end in zip(*ends, strict=True)]


def conformal(center, rows):
    """Center plus and minus a quantile of the errors at some rows."""
    size = smallest((center - y)[:, rows].abs().T, 0.9)[:, None]
    return center[:, num_rows:] - size, center[:, num_rows:] + size


def normal(outputs, share):
    """Mean and variance, [split, row]; ``share``: weights of members for each row."""
    mean, noise = outputs[..., 0], outputs[..., 1].exp()
    center = (share * mean).sum(1)
    return center, (share * (noise + mean**2)).sum(1) - center**2


# %%

ends, unseen = {}, {"Gaussian bars": [], "bootstrap, 50": []}  # losses at unseen rows
missed = (counts == 0).float()  # [split, member, row]
for stop, out, bars in zip(stops, squared, gaussian, strict=True):
    boot, single, split, whole = out[..., 0].split([50, num_rows, 10, 10], 1)
    center, variance = normal(bars, torch.full_like(bars[..., 0], 1 / 50))
    bar = 1.645 * variance.sqrt()
    ends[stop] = {
        "training errors": conformal(whole.mean(1), slice(num_rows)),
        "Gaussian bars": [(center + sign * bar)[:, num_rows:] for sign in (-1, 1)],
        "split conformal": conformal(split.mean(1), slice(30, num_rows)),
        "leave one out": of_splits(single, leave_one_out.expand(num_splits, -1, -1)),
        "bootstrap, 20": of_splits(boot[:, :20], counts[:, :20]),
        "bootstrap, 50": of_splits(boot, counts),
    }
    share = missed / missed.sum(1, keepdim=True)
    center, variance = normal(bars[:, :, :num_rows], share)
    loss = variance.log() / 2 + (y[:, :num_rows] - center) ** 2 / (2 * variance)
    unseen["Gaussian bars"].append(loss.mean(1))
    error = (share * boot[:, :, :num_rows]).sum(1) - y[:, :num_rows]
    unseen["bootstrap, 50"].append(error.square().mean(1))

# %%

for name, losses_of in unseen.items():
    choice = torch.stack(losses_of).argmin(0).tolist()  # of each split
    chosen = ", ".join(f"{choice.count(k)} after {n}" for k, n in enumerate(stops))
    print(f"{name}: splits that stop {chosen} steps")
    sides = [
        torch.stack([ends[stops[k]][name][side][i] for i, k in enumerate(choice)])
        for side in (0, 1)
    ]
    for stop in stops:
        ends[stop][name.split(",")[0].removesuffix(" bars") + ", stopped"] = sides
found = {}  # coverage in % and width, [length, split]
for name in ends[stops[0]]:
    pairs = [ends[stop][name] for stop in stops]
    held = [((low <= y_new) & (y_new <= high)).float().mean(1) for low, high in pairs]
    wide = [(high - low).mean(1) for low, high in pairs]
    found[name] = 100 * torch.stack(held).cpu(), torch.stack(wide).cpu()
print("new rows inside in %, mean (lowest split), after", *stops, "steps")
for name, (held, _) in found.items():
    cells = zip(held.mean(1), held.amin(1), strict=True)
    print(f"{name:18}", *(f"{mean:5.1f} ({low:2.0f})" for mean, low in cells))
print("\nwidth, in units of 75")
for name, (_, wide) in found.items():
    print(f"{name:18}", *(f"{mean:10.2f}" for mean in wide.mean(1)))

# %%

fig, (top, bottom) = plt.subplots(2, sharex=True, figsize=(6, 7), layout="constrained")
styles = "o:", "s--", "v-.", "D-", None, "^-", "k--", None
for (name, parts), style in zip(found.items(), styles, strict=True):
    for ax, part in zip((top, bottom), parts if style else (), strict=False):
        ax.plot(stops, part.mean(1), style, label=name)
        low, high = part.mean(1) - part.std(1), part.mean(1) + part.std(1)
        ax.fill_between(stops, low, high, alpha=0.15, color=ax.lines[-1].get_color())
top.axhline(90, color="0.5")
top.set(ylabel="new rows inside [%]", ylim=(0, 101))
bottom.set(xlabel="training steps", ylabel="mean width", ylim=(0, None), xscale="log")
bottom.set_xticks(stops, stops)
bottom.minorticks_off()
top.set_title(f"Intervals of 90 %, 60 rows: mean and spread of splits, {device.type}")
top.legend(loc="lower left")
last = [
    f"{name} {held[-1].mean():.0f} %, width {wide[-1].mean():.1f}"
    for name, (held, wide) in found.items()
]
fig.set_label(
    f"New rows inside, and width, after {stops[-1]} steps: {'; '.join(last)}."
)

# %%
# A line that falls far below 90 % belongs to a method whose coverage depends on when
# one stops. Where coverage stays near 90 %, a width that grows says that errors at
# unseen rows grew, or that members disagree more.

for name in ("leave one out", "split conformal"):
    for k in (0, 2, -1):
        ours, theirs = found["bootstrap, 50"][1][k], found[name][1][k]
        count = (ours < theirs).sum().item()
        means = f"mean width {ours.mean():.2f} against {theirs.mean():.2f}"
        print(f"after {stops[k]} steps, fifty members against {name}: {means},")
        print(f"    narrower in {count} of {num_splits} splits")

# %%
# Splits share patients, so counts of splits are no proof. The proven 80 % are a mean
# over draws of the rows, too: one split may lie below. Barber (2021) proves them for
# leave one out, Kim (2020) for a bootstrap with a random number of members: fifty,
# fixed before, are not covered to the letter. All proofs ask for rows whose order tells
# nothing (exchangeable ones): an interval need not hold for patients of another kind.
# All new rows share quantiles of the same errors, so the width need not tell which
# patient is doubtful, unlike the bars of ``plot_regression.py``.
#
# Compare the two that stop with each other, as both have chosen their length: bars that
# hold at the same width are no worse. Split conformal is proven for the full 90 %, but
# gives away half of the rows, and has ten members here, not fifty: compare its widths.
#
# The mistake: ``torch.quantile``
# -------------------------------
#
# A new error is as likely to be the smallest as the largest of n + 1.
# ``torch.quantile`` takes no account of the new one, and is too small, most with few
# rows:

for n in (10, 20, 60):
    errors, new = torch.rand(n, 100_000), torch.rand(100_000)
    ends = {"smallest": smallest(errors, 0.9), "quantile": errors.quantile(0.9, 0)}
    shares = [f"{name} {(new <= end).float().mean():.1%}" for name, end in ends.items()]
    print(f"{n} rows, new errors below 90 %:", ", ".join(shares))

# %%
# With fewer than nine rows, ``smallest`` is infinite: so few rows bound nothing at 90
# %. Two mistakes are silent: scale by a mean of the training rows, the one left out
# among them, or stop a member by the one row that it leaves out. Both let that row in
# again. The stop above does so a little, for all members at once.
#
# Remember
# --------
#
# **Judge each row by the members that have not seen it**: a bootstrap ensemble that you
# have anyway gives intervals. Where you use its bars instead, stop the training by such
# rows.
#
# Next
# ----
#
# - ``plot_chains.py``: chains over the weights, and how near an ensemble comes.
# - ``plot_more_members.py``: how many members, or one larger network.
# - ``plot_data.py``: own subsets and folds for each member, in minibatches.
#
# References
# ----------
#
# - Barber and others (2021), jackknife+ and CV+, `arXiv:1905.02928
#   <https://arxiv.org/abs/1905.02928>`_.
# - Kim and others (2020), jackknife+ after bootstrap, `arXiv:2002.09025
#   <https://arxiv.org/abs/2002.09025>`_.
# - Lei and others (2018), split conformal, `arXiv:1604.04173
#   <https://arxiv.org/abs/1604.04173>`_.
