"""
A hyperparameter sweep with a learning rate for each model
==========================================================

Train hundreds of small networks at once, each with its own learning rate and weight
decay, with an optimizer of ``torch.optim`` as it is.

**In short.** ``torch.optim`` takes one learning rate for a whole stack of models, but a
step of SGD, Adam or AdamW is proportional to the rate: give the optimizer ``lr=1``, and
after its step scale the change of each model by its own rate. A sweep over rates,
decays and seeds is then one stack of members, trained with one call a step.

Before: ``plot_training.py`` explains the training loop.
"""

# %%
# Set-up
# ------

import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parameters_to_vector
from torch.utils.benchmark import Timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu


def make_model():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


with torch.device("meta"):
    skeleton = make_model()


def loss_of(params, x, y):
    return F.cross_entropy(functional_call(skeleton, params, (x,), strict=True), y)


print(f"{device.type}, torch {torch.__version__}, float32 but for the checks")

# %%
# Give each model its own learning rate and weight decay
# ------------------------------------------------------
#
# Make one optimizer for the stacked parameters, with ``lr=1`` and ``weight_decay=0``:
# AdamW has a decay of 0.01 if you pass none. ``step_each`` takes the place of
# ``optimizer.step()``. ``rates`` and ``decays`` have a number for each model, and
# ``schedule`` a row of rates for each step.


def step_each(params, optimizer, rates, decays):
    """Step with lr=1, then give each member its own rate and decoupled decay."""
    old = [p.detach().clone() for p in params.values()]
    optimizer.step()
    with torch.no_grad():
        for p, before in zip(params.values(), old, strict=True):
            rate = rates.view(-1, *[1] * (p.dim() - 1))  # [num_models, 1, ...]
            decay = decays.view_as(rate)
            p.copy_(before + rate * (p - before) - rate * decay * before)


def train(params, optimizer, schedule, decays, rows, x, y):
    """Train all members, each on its own rows of the data; return their last losses."""
    for rates, row in zip(schedule, rows, strict=True):
        losses = vmap(loss_of)(params, x[row], y[row])  # [num_models]
        optimizer.zero_grad()
        losses.sum().backward()
        step_each(params, optimizer, rates, decays)
    return losses.detach()


# %%
# Six models, 50 steps of a cosine schedule, in float64 on the CPU:

digits = load_digits()
order = torch.randperm(len(digits.target))
images = torch.tensor(digits.data / 16, dtype=torch.float32)[order].to(device)
labels = torch.tensor(digits.target)[order].to(device)
x_train, x_val, _ = images.split([897, 450, 450])  # [897, 64], ...
y_train, y_val, _ = labels.split([897, 450, 450])

num_models, num_steps = 6, 50
rates = torch.logspace(-4, -1, num_models).cpu().double()
decays = torch.linspace(0, 1, num_models).cpu().double()
cosine = (1 + torch.linspace(0, math.pi, num_steps + 1)[:-1].cos()) / 2
schedule = cosine.to(rates)[:, None] * rates  # [50, 6]
rows = torch.randint(len(x_train), (num_steps, num_models, 64))

models = [make_model().cpu().double() for _ in range(num_models)]
params, _ = stack_module_state(models)  # copies; the models stay as they are
optimizer = torch.optim.AdamW(params.values(), lr=1, weight_decay=0)
x, y = x_train.cpu().double(), y_train.cpu()
losses = train(params, optimizer, schedule, decays, rows, x, y)
print("last losses:", *[f"{loss:.3f}" for loss in losses])

# %%
# **Why it works.** These optimizers compute an update :math:`u` from gradients and
# parameters, never from the rate :math:`\eta`, and end with
#
# .. math:: p \leftarrow p - \eta\, u - \eta\, \lambda\, p,
#
# where the last term is AdamW's decoupled weight decay. With :math:`\eta = 1`, the
# change ``p - before`` is :math:`-u`. Tested: SGD with momentum, Adam, AdamW, RMSprop,
# Adagrad, Adadelta, Adamax, NAdam and RAdam; ``fused=True``; ``step_each`` in
# ``torch.compile``; coupled ``weight_decay``, the same for all. Rprop, ASGD and
# Adafactor do not have this form.
#
# The same as an optimizer for each model
# ---------------------------------------
#
# In float64, all parameters must agree to many digits.

distances = []
for i, model in enumerate(models):
    single = torch.optim.AdamW(model.parameters(), weight_decay=decays[i].item())
    for rate, row in zip(schedule[:, i].tolist(), rows[:, i], strict=True):
        single.param_groups[0]["lr"] = rate
        single.zero_grad()
        F.cross_entropy(model(x[row]), y[row]).backward()
        single.step()
    member = parameters_to_vector([p[i] for p in params.values()])
    distances.append((parameters_to_vector(model.parameters()) - member).abs().max())

worst = torch.stack(distances).max().item()
assert worst < 1e-10, f"trained together is not trained alone: {worst:.0e} apart"
print(f"together and alone: at most {worst:.0e} apart")

# %%
# Sweep learning rate, weight decay and seed
# ------------------------------------------
#
# List the members of a grid. A seed is an initialization and an order of the
# minibatches, the same for all settings. A setting of the model, such as a dropout
# rate, becomes a buffer (``plot_state.py``); a width needs a stack for each. With
# Optuna, call ``study.ask()`` for each member, train the stack, then ``study.tell`` for
# each.
#
# **What should happen:** small rates do not arrive within 200 steps, and large ones do
# not settle. The decay multiplies every weight by :math:`1 - \eta\lambda` in each step,
# which is below -1 where :math:`\eta\lambda > 2`: there the weights grow exponentially.

shape = (16, 9, 4) if device == cpu else (31, 17, 4)  # rates, decays, seeds
rate_grid = torch.logspace(-4, 1, shape[0])
decay_grid = torch.logspace(-3, 1, shape[1])
r, d, seed = torch.cartesian_prod(*[torch.arange(n) for n in shape]).T  # of each member
rates, decays = rate_grid[r].to(device), decay_grid[d].to(device)
rows = torch.randint(len(x_train), (200, shape[2], 64))[:, seed].to(device)

starts, _ = stack_module_state([make_model().to(device) for _ in range(shape[2])])
params = {name: p.detach()[seed].requires_grad_() for name, p in starts.items()}
optimizer = torch.optim.AdamW(params.values(), lr=1, weight_decay=0, fused=True)
train(params, optimizer, rates.expand(200, -1), decays, rows, x_train, y_train)

evaluate = vmap(loss_of, in_dims=(0, None, None))
val = evaluate(params, x_val, y_val).detach().cpu().view(shape)

# %%
# Lost members stay in the count: where weights overflow, the mean over the seeds is no
# number, and the setting cannot win.

mean = val.mean(dim=2)  # [rates, decays]
best = divmod(mean.nan_to_num(nan=torch.inf).argmin().item(), shape[1])
chosen = f"rate {rate_grid[best[0]]:.2g}, decay {decay_grid[best[1]]:.2g}"
print(f"chosen of {mean.numel()} settings: {chosen}")
for name, i, size in zip(("rate", "decay"), best, shape[:2], strict=True):
    where = "WARNING: at the edge of" if i in (0, size - 1) else "inside"
    print(f"{name}: {where} the grid")

low, high = val[best].aminmax()
print(f"validation loss {mean[best]:.3f}, seeds from {low:.3f} to {high:.3f}")
print(f"other means in that range: {(mean <= high).sum() - 1}")

beyond, lost = rate_grid[:, None] * decay_grid > 2, ~(val < 10).all(dim=2)
print("settings with a loss above 10 or no number: ", end="")
print(f"{lost[beyond].sum()} of {beyond.sum()} where rate * decay > 2, ", end="")
print(f"{lost[~beyond].sum()} of {(~beyond).sum()} elsewhere")

# %%
# A value **at an edge** was tried on one side only: extend the grid there. At the lower
# edge of the decay, a smaller one changes nothing if steps, rate and decay multiply to
# far less than 1. **Other means in that range** are settings that these seeds cannot
# tell from the chosen one.

fig, ax = plt.subplots(layout="constrained")
shown = mean.where(mean.isfinite(), torch.nan).numpy()
axes = decay_grid.numpy(), rate_grid.numpy()
mesh = ax.pcolormesh(*axes, shown, norm="log", cmap="viridis_r", shading="nearest")
mesh.set_clim(mean[best].item(), 2)
ax.set_facecolor("0.6")
ax.plot(axes[0], 2 / axes[0], "C1--", lw=2.5, label="rate x decay = 2")
ax.plot(axes[0][best[1]], axes[1][best[0]], "C1*", ms=14, label="chosen")
ax.loglog()
ax.set(xlabel="weight decay", ylabel="learning rate", ylim=(6e-5, 15))
ax.set_title(
    f"Digits, MLP 64-32-10, 200 steps of AdamW, float32, {device.type}\n"
    f"mean of {shape[2]} seeds; gray: a seed has no number"
)
bar = fig.colorbar(mesh, extend="max", label="validation loss")
bar.set_ticks([0.2, 0.5, 1, 2], labels=["0.2", "0.5", "1", "2"])
bar.minorticks_off()
_ = fig.legend(loc="outside lower center", ncols=2)
fig.set_label(
    "Heat map of the validation loss by weight decay and learning rate. "
    f"The lowest mean of {shape[2]} seeds, {mean[best]:.2f}, is at {chosen}."
)

# %%
# Drop the worst early: successive halving
# ----------------------------------------
#
# Train many settings for a few steps, keep the better half, train those on, and so
# forth. To keep members of a stack is to index their rows in each parameter and in the
# optimizer's state. Tested: they train on as in the full stack.


def keep(params, optimizer, rows):
    """A smaller stack and its optimizer, which go on where these rows stand."""
    kept = {name: p.detach()[rows].requires_grad_() for name, p in params.items()}
    small = torch.optim.AdamW(kept.values(), lr=1, weight_decay=0, fused=True)
    for p, new in zip(params.values(), kept.values(), strict=True):
        state = optimizer.state[p].items()  # Adam's step is one number for all
        small.state[new] = {k: v[rows] if v.dim() else v.clone() for k, v in state}
    return kept, small


# %%
# The rival is random search: it trains the first 10 of the same 32 settings to the end.
# Each of 30 repeats has rates and decays between 0.001 and 10, weights, and a split of
# the images of its own. All repeats are one stack, all rates follow a cosine. The
# validation loss picks, the test loss judges.

halving, random_search = [(32, 25), (16, 25), (8, 50), (4, 100)], [(10, 200)]
order = torch.rand(30, len(labels)).argsort(dim=1).to(device)
for_train, for_val, for_test = order.split([897, 450, 450], dim=1)
batches = for_train[:, torch.randint(897, (200, 32))].transpose(0, 1)
batches = batches.repeat_interleave(32, dim=1)  # [200, 960, 32]
rates, decays = (10 ** (4 * torch.rand(2, 960) - 3)).to(device)
schedule = cosine.repeat_interleave(4).to(device)[:, None] * rates  # [200, 960]
starts, _ = stack_module_state([make_model().to(device) for _ in rates])


def score(params, rows):
    """Losses of the members of each repeat on its own rows: [repeats, members]."""
    grouped = {name: p.detach().unflatten(0, (30, -1)) for name, p in params.items()}
    return vmap(evaluate)(grouped, images[rows], labels[rows])


# %%


def search(rungs, schedule, decays, batches):
    """Test loss that each repeat finds; a rung is (members, steps)."""
    params, optimizer = starts, torch.optim.AdamW(starts.values())
    losses, step = torch.arange(960, device=device).view(30, 32), 0  # the first ones
    for count, steps in rungs:
        kept = losses.argsort(dim=1)[:, :count]
        kept += torch.arange(30, device=device)[:, None] * losses.shape[1]
        kept, now = kept.flatten(), slice(step, step + steps)
        params, optimizer = keep(params, optimizer, kept)
        schedule, decays, batches = schedule[:, kept], decays[kept], batches[:, kept]
        train(params, optimizer, schedule[now], decays, batches[now], images, labels)
        losses, step = score(params, for_val).nan_to_num(nan=torch.inf), now.stop
    return score(params, for_test).gather(1, losses.argmin(dim=1, keepdim=True))


halved = search(halving, schedule, decays, batches)
at_random = search(random_search, schedule, decays, batches)

# %%
# A verdict needs a mean difference of more than three standard errors, which chance
# alone reaches in less than one of a hundred comparisons. Differences are those of the
# logarithms, because the losses differ by factors.

gap = (at_random / halved).log()
middle, error = gap.mean(), gap.std() / len(gap) ** 0.5
verdict = "not clearly apart from"
if middle.abs() > 3 * error:
    verdict = "better than" if middle > 0 else "worse than"
print(f"halving is {verdict} random search of equal cost, whose test loss is")
print(
    f"{middle.exp():.2f} times that of halving (standard error {error:.0%}), ", end=""
)
print(f"higher in {(gap > 0).sum()} and lower in {(gap < 0).sum()} of {len(gap)}")

# %%
# Both train for 2,000 steps of one member; halving validates more, which costs about a
# tenth of that. **Halving is better** where a few steps show which settings are
# hopeless: it tries three times as many. **It is not** where ten settings hold a good
# one, or where good settings start slowly and are dropped. (In a tie both pick the same
# network.) On a device that the stack does not fill, a smaller stack probably saves no
# time: there, train all to the end.
#
# What does one more member cost?
# -------------------------------
#
# One call starts each operator once for all members, so a member should cost less in a
# larger stack. Forward, backward and update, warm, in float32, medians:

for num in (1, 576):
    first = [0] * num  # copies of one member
    params, optimizer = keep(starts, torch.optim.AdamW(starts.values()), first)
    plan = schedule[:1, first], decays[first], batches[:1, first], images, labels
    names = {"train": train, "plan": (params, optimizer, *plan)}
    clock = Timer("train(*plan)", globals=names, num_threads=torch.get_num_threads())
    ms = clock.blocked_autorange(min_run_time=0.5).median * 1e3
    print(f"a step of {num} in one call: {ms:.2f} ms, {ms / num:.3f} ms a member")

# %%
# A stack of one is slower than a plain model (``plot_training.py`` has both).
#
# Give each model its own betas: Adam as a pure function
# ------------------------------------------------------
#
# A step is *not* proportional to momentum, betas or epsilon. For these, write the
# optimizer for one member, state in and new state out, and map it. Tested, uncompiled:
# it is ``torch.optim.Adam``.


def adam_step(params, first, second, setting, t, x, y):
    rate, beta1, beta2 = setting
    new = {}, {}, {}
    for name, g in grad(loss_of)(params, x, y).items():
        m = beta1 * first[name] + (1 - beta1) * g
        v = beta2 * second[name] + (1 - beta2) * g**2
        root = (v / (1 - beta2**t)).sqrt() + 1e-8
        p = params[name] - rate * m / (1 - beta1**t) / root
        new[0][name], new[1][name], new[2][name] = p, m, v
    return new


each_member = vmap(adam_step, in_dims=(0, 0, 0, 0, None, 0, 0))

# %%
# The mistake: rates for the optimizer, or for the losses
# -------------------------------------------------------
#
# ``torch.optim`` refuses a tensor of rates: ``Tensor lr must be 1-element``. Scaling
# each loss by its rate raises no error, and is right for plain SGD; but Adam divides
# each gradient by its own size, so the rates cancel. How far a bias moves in one step:

rates = torch.logspace(-4, -1, num_models).to(device)
for kind in (torch.optim.SGD, torch.optim.Adam):
    params, _ = stack_module_state([make_model().to(device) for _ in rates])
    before = params["2.bias"].detach().clone()
    (rates * evaluate(params, x_val, y_val)).sum().backward()
    kind(params.values(), lr=1).step()
    moved = (params["2.bias"] - before).abs().mean(dim=1)
    print(f"{kind.__name__:4}", *[f"{m:.1e}" for m in moved.tolist()])

# %%
# Remember
# --------
#
# Give the optimizer ``lr=1`` and ``weight_decay=0``, and multiply each member's change
# by its rate after the step. Extend the grid where the choice lies at its edge.
#
# Next
# ----
#
# - ``plot_population.py``: let the members tune their rates while they train.
# - ``plot_memory.py``: when so many members do not fit.
#
# References
# ----------
#
# - K. Jamieson, A. Talwalkar: Non-stochastic best arm identification and hyperparameter
#   optimization, 2015, `arXiv:1502.07943 <https://arxiv.org/abs/1502.07943>`_.
