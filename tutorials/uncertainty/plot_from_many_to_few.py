"""
The best team of a sweep, and one network in its place
======================================================

Choose from all members of a hyperparameter sweep the five that predict best together,
measure what the choice is worth on data that it never saw, and train one network to
answer as the team does.

**In short.** Add to the team, one after another, the member with which the average of
the probabilities has the least validation loss; then report on test data, over several
splits. Keep simple rivals beside it: the best five, new seeds of the best setting, and
for a distilled network one that trains as long on the labels.

Before: ``plot_hyperparameter_sweep.py`` gives each member a learning rate of its own.
"""

# %%
# Set-up
# ------

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
print(f"{device.type}, torch {torch.__version__}, float32 but for the check")

# %%
# Pick a team greedily
# --------------------
#
# The lines to copy. ``probs`` holds the predictions of all members for the same
# validation images. A member may be picked again, and then counts twice.


def check(probs, labels):
    sums, num_classes = probs.sum(dim=-1), probs.shape[-1]
    if not (
        (probs >= 0).all() and torch.allclose(sums, torch.ones_like(sums), 0, 1e-3)
    ):
        raise ValueError("probs must be probabilities that sum to one, not logits")
    if (
        labels.shape != sums.shape
        or not 0 <= labels.min() <= labels.max() < num_classes
    ):
        raise ValueError(f"labels must be one of 0 to {num_classes - 1} for each image")


def nll(probs, labels):
    """Negative log likelihood, 0 (best) to infinity."""
    check(probs, labels)
    return F.nll_loss(probs.log(), labels)


def greedy(probs, labels, size):
    """Members of the team; probs ``[members, images, classes]`` (Caruana 2004)."""
    team, total = [], torch.zeros_like(probs[0])
    for count in range(1, size + 1):
        scores = [nll((total + p) / count, labels) for p in probs]
        team.append(torch.stack(scores).argmin().item())
        total = total + probs[team[-1]]
    return team


# %%
# Three members, four images, and the probability that each gives the right class:

right = torch.tensor([[9, 9, 9, 1], [9, 9, 9, 0.8], [4, 4, 4, 8]]) / 10
probs, zeros = torch.stack([right, 1 - right], dim=-1), torch.zeros(4, dtype=torch.long)
print("each alone:", *[f"{nll(p, zeros):.2f}" for p in probs])
for team in ([0, 1], greedy(probs, zeros, size=2)):
    print(f"members {team} together: {nll(probs[team].mean(dim=0), zeros):.2f}")

# %%
# Members 0 and 1 are the best two, but they fail on the same image. **The worst member
# is the best partner.** Whether that happens among real networks, we have to measure.
#
# A sweep in every split
# ----------------------
#
# We divide the 1,797 digits at random into 300 for training, 300 to choose by and 1,197
# to test, and draw 128 or more settings: rate, decay, and width of the noise on the
# images. This is done ten times or more, and all networks train in one call: the outer
# ``vmap`` counts splits, the inner one members; tensors begin with ``[split, member]``.
# Larger images, as of ``torchvision.datasets.MNIST``, go in as longer rows.

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)
labels = torch.tensor(digits.target, device=device)  # [1797]

num_splits, num_members = (10, 128) if device == cpu else (20, 256)
order = torch.stack([torch.randperm(len(labels)) for _ in range(num_splits)])
train_rows, val_rows, test_rows = order.to(device).split([300, 300, 1197], dim=1)

used = torch.cat([train_rows, val_rows, test_rows], dim=1).sort(dim=1).values
assert (used.diff(dim=1) > 0).all(), "a split uses the same image twice"

shape = num_splits, num_members
rates = (0.001 * 200 ** torch.rand(shape)).to(device)  # 0.001 to 0.2
decays = (0.001 * 1000 ** torch.rand(shape)).to(device)  # to 1
widths = (0.02 * 25 ** torch.rand(shape)).to(device)  # to 0.5

# %%
# One step of all members, with ``lr=1`` and each member's own rate and decay after it:


def make_model():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


with torch.device("meta"):
    skeleton = make_model()


def predict(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


def loss_of(params, x, target, temperature):
    return F.cross_entropy(predict(params, x) / temperature, target)


def train_step(params, optimizer, rates, decays, x, target, temperature=1.0):
    dims = (0, 0, 0, None)
    losses = vmap(vmap(loss_of, dims), dims)(params, x, target, temperature)
    optimizer.zero_grad()
    losses.sum().backward()
    old = [p.detach().clone() for p in params.values()]
    optimizer.step()
    with torch.no_grad():
        for p, before in zip(params.values(), old, strict=True):
            rate = rates.view(*rates.shape, *[1] * (p.dim() - 2))
            decay = decays.view_as(rate)
            p.copy_(before + rate * (p - before) - rate * decay * before)


def prepare(models, shape):
    """Stacked parameters ``[split, member, ...]`` and their optimizer."""
    params, _ = stack_module_state(models)
    params = {k: p.detach().unflatten(0, shape) for k, p in params.items()}
    params = {k: p.to(device).requires_grad_() for k, p in params.items()}
    return params, torch.optim.AdamW(params.values(), lr=1, weight_decay=0, fused=True)


# %%
# Each trains as if it were alone
# -------------------------------
#
# Two splits of three members, in float64, beside ``torch.optim.AdamW`` for each:

few = [make_model().double() for _ in range(6)]
params, optimizer = prepare(few, (2, 3))
some_rates, some_decays = rates[:2, :3].double(), decays[:2, :3].double()
x = torch.rand(20, 2, 3, 32, 64, dtype=torch.float64).to(device)
target = torch.randint(10, (20, 2, 3, 32)).to(device)
for step in range(20):
    train_step(params, optimizer, some_rates, some_decays, x[step], target[step])
together = vmap(vmap(predict))(params, x[0])  # [2, 3, 32, 10]

for i, model in enumerate(few):
    own = divmod(i, 3)  # split, member
    rate, decay = some_rates[own].item(), some_decays[own].item()
    single = torch.optim.AdamW(model.to(device).parameters(), rate, weight_decay=decay)
    for step in range(20):
        single.zero_grad()
        F.cross_entropy(model(x[step][own]), target[step][own]).backward()
        single.step()
    off = (model(x[0][own]) - together[own]).abs().max()
    assert off < 1e-10, f"members do not train as if they were alone: {off:.0e} apart"
print(f"20 steps in float64: logits together and alone are {off:.0e} apart")

# %%
# Train all members of all splits
# -------------------------------
#
# All share the noise of a step, scaled to the width of each; the rates fall to zero.


def train(rates, decays, widths, num_steps, teacher=None, temperature=1.0):
    models = [make_model() for _ in range(rates.numel())]
    params, optimizer = prepare(models, rates.shape)
    split = torch.arange(num_splits, device=device)[:, None, None]
    for step in range(num_steps):
        own = torch.randint(train_rows.shape[1], (*rates.shape, 32)).to(device)
        rows = train_rows[split, own]  # [split, member, 32]
        noise = torch.randn(32, 64).to(device)
        x = images[rows] + widths[..., None, None] * noise
        target = teacher(x, temperature) if teacher else labels[rows]
        now = rates * (1 - step / num_steps)
        train_step(params, optimizer, now, decays, x, target, temperature)
    return {k: p.detach() for k, p in params.items()}


members = train(rates, decays, widths, num_steps=400)
print(f"{rates.numel()} networks trained")

# %%
# Is the greedy team better?
# --------------------------
#
# Beside it: the best member, the best five, five new seeds of the best member's
# setting, and all. Each choice sees validation data only.
#
# **What should happen:** networks that start elsewhere err elsewhere, so any five good
# ones beat the best one. Greedy selection should gain from mixing settings, but 300
# images also reward luck. The average of all contains many bad ones.


def probs_of(params, rows):
    """Of all members, for images of their split: ``[split, member, image, class]``."""
    with torch.no_grad():
        one_split = vmap(predict, in_dims=(0, None))
        return vmap(one_split)(params, images[rows]).softmax(dim=-1)


val, test = probs_of(members, val_rows), probs_of(members, test_rows)
y_val, y_test = labels[val_rows], labels[test_rows]  # [split, image]
splits = torch.arange(num_splits, device=device)[:, None]

pairs = list(zip(val, y_val, strict=True))
ranking = torch.stack([torch.stack([nll(p, y) for p in v]) for v, y in pairs]).argsort()
best = ranking[:, :1]  # [split, 1]
teams = torch.tensor([greedy(v, y, size=5) for v, y in pairs], device=device)

five = best.expand(-1, 5)
setting = [v[splits, five] for v in (rates, decays, widths)]
seeds = probs_of(train(*setting, num_steps=400), test_rows)

# %%
# We compare in pairs, because a hard split is hard for all. The splits share images, so
# the standard error (in brackets) is too small: a difference counts from three of them.


def score(probs, labels=y_test):
    """Error in % and nll of probs ``[split, image, class]``: ``[split, 2]``."""
    wrong = (probs.argmax(dim=-1) != labels).double().mean(dim=1) * 100
    losses = [nll(p, y).double() for p, y in zip(probs, labels, strict=True)]
    return torch.stack([wrong, torch.stack(losses)], dim=1).cpu()


def verdict(difference):
    mean, spread = difference.mean(), difference.std() / len(difference) ** 0.5
    words = "unclear"
    if mean.abs() > 3 * spread:
        words = "worse" if mean > 0 else "better"
    return f"{mean:+.3f} ({spread:.3f}) {words}"


def report(name, scores, rival):
    (error, loss), apart = scores.mean(dim=0), scores - rival
    print(f"{name:24}{error:.2f} %, {verdict(apart[:, 0]):24}", end="")
    print(f"nll {loss:.3f}, {verdict(apart[:, 1])}")


# %%

choices = {
    "the best one": test[splits, best],
    "best five": test[splits, ranking[:, :5]],
    "five seeds of the best": seeds,
    f"all {num_members}": test,
}
team = score(test[splits, teams].mean(dim=1))
print("greedy five: error {:.2f} %, nll {:.3f}; against it:".format(*team.mean(dim=0)))
scores = {name: score(probs.mean(dim=1)) for name, probs in choices.items()}
for name, s in scores.items():
    report(name, s, team)

# %%
# **Against the best one:** where it is worse, a team pays; it costs five times as much
# to ask. **Against the best five and the five seeds:** where a row says "unclear"
# twice, it hardly matters how five good networks are chosen, and the simplest choice
# will do; where it says "worse", mixing settings helped. **All together** is no safe
# choice: if it is worse, the bad members of the sweep spoil the average.
#
# One network in place of the team
# --------------------------------
#
# Distillation: a new network learns to give the team's probabilities, which say more
# than a label: "a 3, but it could be an 8". Here the team answers for each noisy image
# as it comes. A *temperature* of 3 on both sides makes its small probabilities count.
# The loss needs no factor :math:`T^2` as in the paper: Adam divides it away.
#
# Students train three times as long as members, at the best member's setting. **The
# fair rival has the same setting, trains as long, and learns from the labels.** We
# train four of each in every split and average their scores, not their predictions.

chosen = {k: p[splits, teams] for k, p in members.items()}  # [split, 5, ...]


def ask_team(x, temperature):
    """Probabilities of the team for images ``[split, student, image, pixel]``."""
    one_split = vmap(predict, in_dims=(0, None))
    logits = vmap(one_split)(chosen, x.flatten(1, 2))  # [split, 5, images, 10]
    probs = logits.softmax(dim=-1).mean(dim=1)
    softer = (probs.log() / temperature).softmax(dim=-1)
    return softer.unflatten(1, x.shape[1:3])


def single(**how):
    params = train(*[v[:, :4] for v in setting], num_steps=1200, **how)
    each = probs_of(params, test_rows).unbind(dim=1)
    return torch.stack([score(probs) for probs in each]).mean(dim=0)


scores["labels, 3x as long"] = on_labels = single()
scores["student of the team"] = student = single(teacher=ask_team, temperature=3.0)
print("against the greedy five:")
for name in ("labels, 3x as long", "student of the team"):
    report(name, scores[name], team)
report("student against labels", student, on_labels)
error, loss = (student < on_labels).sum(dim=0)
print(
    f"student below labels in {error} (error) and {loss} (nll) of {num_splits} splits"
)

# %%

fig, axes = plt.subplots(1, 2, sharey=True, layout="constrained")
for column, unit in enumerate(["error [points of %]", "nll [nats]"]):
    ax = axes[column]
    for y, s in enumerate(scores.values()):
        d = (s - team)[:, column]
        ax.plot(d, [y] * num_splits, f"C{column}o", ms=4, alpha=0.4)
        ax.plot(d.mean(), y, "|", color="0.5", ms=16, mew=2)
    ax.axvline(0, color="0.5", linestyle="--")
    ax.set_xlabel(unit)
axes[0].set_yticks(range(len(scores)), labels=scores)
axes[0].invert_yaxis()
fig.suptitle(
    f"Test scores minus those of the greedy five; right is worse\n"
    f"dot: one of {num_splits} splits, bar: mean; float32, {device.type}"
)
nlls = [f"{k} {verdict((s - team)[:, 1])}" for k, s in scores.items()]
fig.set_label(
    "Differences to the greedy five in error and in likelihood, one dot a split. Means "
    f"of the latter: {'; '.join(nlls)}."
)

# %%
# **If the student is better than the labels**, the team's doubts have reached it, at
# the price of one network. Expect that for the likelihood first: labels make a network
# surer with every step, the team does not. **If it is worse or unclear**, longer
# training gave what the team could teach, and is the simpler way. The verdict holds for
# this size of network and this temperature. And a student has no members who disagree:
# for inputs of no class, keep the team (``plot_unknown_inputs.py``).
#
# The mistake: the score that chose
# ---------------------------------
#
# The best of many on 300 images is partly the luckiest, so its validation score
# flatters it. The median member was not chosen for its luck.

for name, member in {"best": best, "median": ranking[:, [num_members // 2]]}.items():
    before = score(val[splits, member].mean(dim=1), y_val)[:, 1]
    after = score(test[splits, member].mean(dim=1))[:, 1]
    print(f"{name:6} member: validation nll {before.mean():.3f}, ", end="")
    print(f"test {after.mean():.3f}: {verdict(after - before)}")

# %%
# "Unclear" is no proof of the opposite: report the test score, and never choose by it.
#
# Remember
# --------
#
# Greedy selection makes a team of a sweep's members in eight lines. Choose on
# validation data, and compare with simple rivals on test data, in pairs, over several
# splits. A distilled network costs a fifth of the team; its rival trains as long.
#
# Next
# ----
#
# - ``plot_more_members.py``: what each further member buys.
# - ``plot_unknown_inputs.py``: where a team is worth its price.
# - ``plot_saving.py``: take the chosen members out of the stack.
#
# References
# ----------
#
# - R. Caruana, A. Niculescu-Mizil, G. Crew, A. Ksikes: Ensemble selection from
#   libraries of models, 2004, `doi:10.1145/1015330.1015432
#   <https://doi.org/10.1145/1015330.1015432>`_.
# - F. Wenzel, J. Snoek, D. Tran, R. Jenatton: Hyperparameter ensembles for robustness
#   and uncertainty quantification, 2020,
#   `arXiv:2006.13570 <https://arxiv.org/abs/2006.13570>`_.
# - G. Hinton, O. Vinyals, J. Dean: Distilling the knowledge in a neural network, 2015,
#   `arXiv:1503.02531 <https://arxiv.org/abs/1503.02531>`_.
