"""
Error bars from an ensemble: noise and ignorance
================================================

Train networks that predict a mean and a variance, all in one call of
``torch.func.vmap``, and split the variance of their ensemble into noise and ignorance.

**In short.** Each member minimizes the Gaussian negative log likelihood and keeps its
best state on validation rows. The variance of the ensemble is the mean of the members'
variances (**noise**, aleatoric) plus the variance of their means (**ignorance**,
epistemic). For rows of a kind that was left out of the training, noise alone is far too
small here; ignorance widens the bars by much, and still not by enough.

Before you start, read ``plot_training.py``: it explains the loop that trains a stack.
"""

# %%
# Set-up
# ------

import copy

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from mlxtend.data import autompg_data
from torch import nn
from torch.distributions import Normal
from torch.func import functional_call, stack_module_state, vmap

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")

table, mpg = autompg_data()  # cars of 1970 to 1982; the last column is empty
x = torch.tensor(table[:, :7], dtype=torch.float32, device=device)  # [392, 7]
y = torch.tensor(mpg, dtype=torch.float32, device=device)  # [392], miles per gallon

# %%
# Train all members in one call
# -----------------------------
#
# Each network centers and scales its inputs and targets by its own training rows. It
# keeps these numbers as buffers, so they are stacked with the weights.


class GaussianNet(nn.Module):
    def __init__(self, x, y, width=50):  # training rows: [row, feature], [row]
        super().__init__()
        self.register_buffer("x_mean", x.mean(dim=0))
        self.register_buffer("x_std", x.std(dim=0))  # drop constant columns before
        self.register_buffer("y_mean", y.mean())
        self.register_buffer("y_std", y.std())
        first, second = nn.Linear(x.shape[1], width), nn.Linear(width, width)
        last = nn.Linear(width, 2)
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)

    def forward(self, x):  # [row, feature]
        mean, raw = self.layers((x - self.x_mean) / self.x_std).unbind(dim=1)
        var = F.softplus(raw) + 1e-3  # positive, with a floor
        return self.y_mean + self.y_std * mean, self.y_std**2 * var


with torch.device("meta"):
    skeleton = GaussianNet(torch.empty(2, 7), torch.empty(2))


def member(state, x):
    return functional_call(skeleton, state, (x,), strict=True)


def member_loss(state, x, y):  # without the constant
    mean, var = member(state, x)
    return 0.5 * (var.log() + (y - mean) ** 2 / var).mean()


# %%
# ``train_rows`` and ``val_rows`` hold row numbers for each member. Every 20 steps, the
# members that have improved on their validation rows copy their rows of the stack:


def train(models, x, y, train_rows, val_rows, rate=0.01, steps=300):
    """Return the best state of each member, and its validation loss."""
    params, buffers = stack_module_state(models)
    state = params | buffers
    optimizer = torch.optim.Adam(params.values())
    best = {key: tensor.detach().clone() for key, tensor in state.items()}
    lowest = y.new_full([len(models)], torch.inf)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        picks = torch.randint(train_rows.shape[1], (len(models), 32))
        rows = train_rows.gather(1, picks.to(train_rows.device))  # [member, 32]
        optimizer.zero_grad()
        vmap(member_loss)(state, x[rows], y[rows]).sum().backward()
        optimizer.step()
        if step % 20 == 19:
            with torch.no_grad():
                losses = vmap(member_loss)(state, x[val_rows], y[val_rows])
            better = losses < lowest
            lowest[better] = losses[better]
            for key, tensor in state.items():
                best[key][better] = tensor.detach()[better]
    return best, lowest


# %%
# No network trains on cars with eight cylinders, the kind that is left out. The others
# are split at random, sixteen times, and each split has an ensemble of ten: 160
# networks in one call. For one split, pass ``train_rows.expand(10, -1)``.

num_splits, num_members = 16, 10
eight = x[:, 0] == 8  # column 0: cylinders
others, unseen = (~eight).nonzero().flatten(), eight.nonzero().flatten()
orders = torch.stack([torch.randperm(len(others)) for _ in range(num_splits)])
train_rows, val_rows, test_rows = others[orders.to(device)].split([209, 40, 40], dim=1)
whose = torch.arange(num_splits).repeat_interleave(num_members)  # 0, 0, ..., 15


def build(split, width=50):
    rows = train_rows[split]
    return GaussianNet(x[rows], y[rows], width).to(device)


models = [build(split) for split in whose]
best, lowest = train(models, x, y, train_rows[whose], val_rows[whose])

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
# The first part is what the members believe to be noise. The second is what they
# disagree about.


@torch.no_grad()
def predict(state, x):  # x: [network, row, feature]
    return vmap(member)(state, x)  # means and variances, each [network, row]


def mixture(means, variances):
    """Mean, noise and ignorance, each [ensemble, row]."""
    means, variances = (t.unflatten(0, (-1, num_members)) for t in (means, variances))
    return means.mean(1), variances.mean(1), means.var(1, correction=0)


kinds = {
    "like those trained on": test_rows,
    "of the kind left out": unseen.expand(num_splits, -1),
}
print("In miles per gallon, root mean squares:")
for kind, rows in kinds.items():
    mean, noise, ignorance = mixture(*predict(best, x[rows[whose]]))  # [16, row]
    squares = (y[rows] - mean) ** 2, noise, ignorance
    stds = [square.mean().sqrt().item() for square in squares]
    print(f"cars {kind}:", end=" ")
    print("noise {1:.2f}, ignorance {2:.2f}; error {0:.2f}".format(*stds))

# %%
# **If ignorance is larger for the kind left out, the ensemble notices.** The whole bar
# may still be narrower: its "noise" there comes from other cars.
#
# Do the error bars hold?
# -----------------------
#
# The ensemble's rivals:
#
# - **noise alone**, the mistake that people make: the average of the members'
#   variances. Ten members can each be sure of a different value; this average stays
#   small although they contradict each other.
# - **best of ten**: the member with the lowest validation loss.
# - **wide**: one network with the parameters of ten members (tested), at the best of
#   three learning rates by 40 validation rows, a noisy choice. The ensemble has one
#   rate, not tuned.

splits = torch.arange(num_splits)
rates, trained = [0.003, 0.01, 0.03], []
for rate in rates:
    wides = [build(split, width=170) for split in splits]
    trained.append(train(wides, x, y, train_rows, val_rows, rate))
rate_of = torch.stack([loss for _, loss in trained]).argmin(0).cpu()  # [split]
member_of = lowest.view(num_splits, -1).argmin(1).cpu()
wide, single = {}, {}
for key, tensor in best.items():
    wide[key] = torch.stack([state[key] for state, _ in trained])[rate_of, splits]
    single[key] = tensor.unflatten(0, (num_splits, -1))[splits, member_of]
counts = rate_of.bincount(minlength=3).tolist()
print("splits that chose each rate:", dict(zip(rates, counts, strict=True)))

# %%
# **Coverage** is the share of values inside their bar of 95 %. The negative log
# likelihood (**NLL**, lower is better) judges the width of the bars, too. The mixture
# counts as one Gaussian, as in Lakshminarayanan (2017).
#
# A **lead** is the ensemble's coverage minus its rival's (wider bars tend to lead, so
# read the NLL, too), the mean over the splits (and its standard error). It is clear
# beyond three standard errors (before rounding; chance alone: about one in a hundred;
# over noise alone, a lead is never negative). All splits are of one table and share
# cars, so a clear lead is one on these cars: for new cars like those trained on, the
# standard error is about twice this.


def covered(mean, var, y):
    """Share of each row's values in their Gaussian's central 95 % (1.96 std)."""
    return ((y - mean).abs() < 1.96 * var.sqrt()).float().mean(1)


for kind, rows in kinds.items():
    mean, noise, ignorance = mixture(*predict(best, x[rows[whose]]))
    ways = {"ensemble": (mean, noise + ignorance), "noise alone": (mean, noise)}
    ways |= {"best of ten": predict(single, x[rows]), "wide": predict(wide, x[rows])}
    ours = covered(*ways["ensemble"], y[rows])  # [split]
    print(f"cars {kind}: coverage, NLL (median), error; lead in points")
    for way, (center, var) in ways.items():
        share = covered(center, var, y[rows])
        error = (y[rows] - center).square().mean().sqrt()
        nll = -Normal(center, var.sqrt()).log_prob(y[rows]).mean(1).median()
        lead = 100 * (ours - share)
        spread = lead.std() / num_splits**0.5
        clear = "clear" if lead.mean().abs() > 3 * spread else "not clear"
        line = f"  {way:11} {share.mean():.0%}, {nll:.2f}, {error:.2f}"
        if way != "ensemble":
            line += f"; lead {lead.mean():+.1f} ({spread:.1f}), {clear}"
        print(line)

# %%
# **If the ensemble clearly leads for the kind left out, and its NLL is the lowest, its
# disagreement beats these three rivals there.** If its coverage is below 95 %, the
# whole bar is too narrow: its noise comes from other cars, or members share an error. A
# short run with five members: with American cars left out, its coverage is above a wide
# network's, too; with Europe's or Japan's, at most 5 points below (tested).
#
# More data lower the ignorance where they lie
# --------------------------------------------
#
# In a well-known figure the truth is known: a cubic with noise of standard deviation 3,
# seen between -4 and 4. Each of ten data sets has three ensembles: of its first 40
# points, of its first 400, and of all 4,000; a fifth is for validation. If ignorance is
# what more data would settle, it should fall inside, with the error, and the noise
# should stay near 3. Outside, no size has data.

num_sets, sizes = 10, [40, 400, 4000]
points = 8 * torch.rand(num_sets * 4000, 1).to(device) - 4
values = points[:, 0] ** 3 + 3 * torch.randn(len(points)).to(device)
every = torch.arange(len(points), device=device).view(num_sets, -1)  # [set, 4000]
owner = torch.arange(num_sets).repeat_interleave(num_members)
at = torch.linspace(-6, 6, 121, device=device)
grid = at[:, None].expand(len(owner), -1, -1)
results = []
for size in sizes:
    fit, val = every[:, :size].split([size * 4 // 5, size // 5], dim=1)
    nets = [GaussianNet(points[fit[i]], values[fit[i]]).to(device) for i in owner]
    state, _ = train(nets, points, values, fit[owner], val[owner])
    results.append(torch.stack(mixture(*predict(state, grid))))

# %%

mean, noise, ignorance = torch.stack(results, dim=1)  # each [size, set, 121]
truth, inside = at**3, at.abs() <= 4
squares = torch.stack([(mean - truth) ** 2, ignorance, noise])
middle = {}
for place, where in [("inside", inside), ("outside", ~inside)]:
    stds = squares[..., where].mean(-1).sqrt()  # [3, size, set]
    held = (squares[0] < 4 * squares[1])[..., where].float().mean((1, 2))  # [size]
    middle[place] = stds.quantile(0.5, dim=-1).T.tolist()
    print(f"{place}, medians of the sets:")
    for size, numbers, share in zip(sizes, middle[place], held, strict=True):
        words = "error {:.2f}, ignorance {:.2f}, noise {:.2f}".format(*numbers)
        print(f"  {size:4} points: {words}; truth within 2 ignorances {share:.0%}")
    falls = (stds[1, 1:] < stds[1, :-1]).sum(1).tolist()
    print(f"  ignorance falls in {falls[0]} and then in {falls[1]} of {num_sets} sets")

# %%

signals = {"ignorance": ignorance.sqrt(), "error": (mean - truth).abs()}
fig, axes = plt.subplots(1, 2, sharey=True, figsize=(7, 3.8), layout="constrained")
for ax, (title, values) in zip(axes, signals.items(), strict=True):
    for k, (size, style) in enumerate(zip(sizes, [":", "--", "-"], strict=True)):
        low, mid, high = (values[k].quantile(q, dim=0).cpu() for q in (0.25, 0.5, 0.75))
        ax.semilogy(at.cpu(), mid, f"C{k}{style}", label=f"{size:,} points")
        ax.fill_between(at.cpu(), low, high, color=f"C{k}", alpha=0.2, linewidth=0)
    for edge in (-4, 4):  # where the data end
        ax.axvline(edge, color="gray", linewidth=0.8)
    ax.set(title=f"{title} of the ensemble", xlabel="x")
axes[0].set_ylabel("in units of y; median, quartiles")
axes[0].legend()
fig.suptitle(f"{num_sets} data sets, {name}, float32", fontsize=10)
inner, outer = (", ".join(f"{m[1]:.2f}" for m in middle[k]) for k in middle)
fig.set_label(
    "Ignorance (left) and error (right) against x from -6 to 6, for 40, 400 and 4,000 "
    "points between -4 and 4. Ignorance, medians of the sets: "
    f"inside {inner}; outside {outer}."
)

# %%
# **If ignorance inside falls in nine or ten sets of ten at a step, more data settle a
# part of it** (chance alone, at either step: once in about fifty); fewer sets show no
# clear change. **Outside, ignorance falls by a smaller factor, and the error is many
# times larger**: beyond its last kink a ReLU network is a straight line, and the truth
# is a cubic, so all members are wrong together. Large ignorance says not to trust the
# prediction, not how wrong it is.
#
# If clearly fewer than 90 % of the places inside have the truth within two standard
# deviations of ignorance ("2 ignorances"; a truth that is like an eleventh draw gives
# 90 %), it understates the error there, too.
#
# Each member trains as if it were alone
# --------------------------------------
#
# Keep this check in your own project: networks of four splits, together and one by one,
# with the same minibatches, in float64 on the CPU. Alone they use
# ``F.gaussian_nll_loss``; ``vmap`` refuses it, since it looks at values (tested), so
# ``member_loss`` writes it out.

few = [copy.deepcopy(model).cpu().double() for model in models[:40:10]]
own, val = train_rows[:4].cpu(), val_rows[:4].cpu()
x64, y64 = x.cpu().double(), y.cpu().double()
torch.manual_seed(1)
state, _ = train(few, x64, y64, own, val, steps=20)  # the best state is the last
together = torch.stack(predict(state, x64.expand(4, -1, -1)))  # [2, 4, 392]

for i, model in enumerate(few):
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 20)
        rows = own[i, torch.randint(own.shape[1], (4, 32))[i]]
        optimizer.zero_grad()
        center, var = model(x64[rows])
        F.gaussian_nll_loss(center, y64[rows], var).backward()
        optimizer.step()

with torch.no_grad():
    alone = torch.stack([torch.stack(model(x64)) for model in few], dim=1)
off = (together - alone).abs().max() / alone.abs().max()
assert off < 1e-10, f"members do not train as if they were alone: {off:.1e} apart"
print(f"20 steps in float64: together and alone are {off:.0e} apart")

# %%
# Remember
# --------
#
# Average means and variances, and **add the variance of the means**. Test the bars on
# rows of a kind that you left out. Where ignorance is large, fall back on a safe
# default or a person, and collect data.
#
# Next
# ----
#
# - ``plot_intervals.py``: intervals that hold, however long the members are trained.
# - ``plot_more_members.py``: how many members are enough, and a fair rival.
# - ``plot_unknown_inputs.py``: the same question for images.
#
# References
# ----------
#
# - Lakshminarayanan and others (2017), `arXiv:1612.01474
#   <https://arxiv.org/abs/1612.01474>`_; the figure with the cubic is in section 3.2.
# - The cars: R. Quinlan (1993), `Auto MPG <https://doi.org/10.24432/C5859H>`_.
