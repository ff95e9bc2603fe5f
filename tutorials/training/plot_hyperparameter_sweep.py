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

import copy
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parameters_to_vector
from torch.utils.benchmark import timer

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
# AdamW has a decay of 0.01 if you say nothing. ``step_each`` takes the place of
# ``optimizer.step()``. ``rates`` and ``decays`` have one number for each model, so a
# scheduler is a multiplication: ``schedule`` has a row of rates for each step.


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
# Six models, 50 steps of a cosine schedule on real handwritten digits, in float64 on
# the CPU:

digits = load_digits()
order = torch.randperm(len(digits.target))
images = torch.tensor(digits.data / 16, dtype=torch.float32)[order].to(device)
labels = torch.tensor(digits.target)[order].to(device)
x_train, x_val, x_test = images.split([897, 450, 450])  # [897, 64], ...
y_train, y_val, y_test = labels.split([897, 450, 450])

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
# **Why it works.** All of these optimizers compute an update :math:`u` from gradients
# and parameters, never from the rate :math:`\eta`, and end with
#
# .. math:: p \leftarrow p - \eta\, u - \eta\, \lambda\, p,
#
# where the last term is AdamW's decoupled weight decay. With :math:`\eta = 1`, the
# change ``p - before`` is :math:`-u`. Momentum and moments stay the optimizer's own
# business. Tested: SGD with momentum, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax,
# NAdam and RAdam; ``fused=True``; ``step_each`` in ``torch.compile``; coupled
# ``weight_decay``, the same for all. Rprop, ASGD and Adafactor do not have this form.
#
# The same as an optimizer for each model
# ---------------------------------------
#
# The plain way, for each of the six. In float64, all parameters and the last losses
# must agree to many digits.


def train_alone(model, optimizer, schedule, rows, x, y):
    for rate, row in zip(schedule.tolist(), rows, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        loss = F.cross_entropy(model(x[row]), y[row])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


def apart(model, params, i):
    """Largest distance between the parameters of a model and of member i."""
    member = parameters_to_vector([p[i] for p in params.values()])
    return (parameters_to_vector(model.parameters()) - member).abs().max().detach()


distances = []
for i, model in enumerate(copy.deepcopy(models)):
    single = torch.optim.AdamW(model.parameters(), weight_decay=decays[i].item())
    loss = train_alone(model, single, schedule[:, i], rows[:, i], x, y)
    distances += [apart(model, params, i), (loss - losses[i]).abs()]

worst = torch.stack(distances).max()
assert worst < 1e-10, f"trained together is not trained alone: {worst:.0e} apart"
print(f"together and alone, {num_steps} steps: at most {worst:.0e} apart")

# %%
# Sweep learning rate, weight decay and seed
# ------------------------------------------
#
# A grid needs no nested ``vmap``: list its members and train them as one stack. A seed
# is an initialization and an order of the minibatches, the same for all settings.
#
# **What should happen:** small rates do not arrive within 200 steps. Large ones push
# ReLUs below zero for good, and such a network can only guess, with a loss of
# log 10 = 2.3. And the decay multiplies every weight by :math:`1 - \eta\lambda` in each
# step, which is below -1 where :math:`\eta\lambda > 2`: there the weights grow
# exponentially, beyond what float32 can hold.

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

with torch.no_grad():
    evaluate = vmap(loss_of, in_dims=(0, None, None))
    val = evaluate(params, x_val, y_val).cpu().double().view(shape)
    test = evaluate(params, x_test, y_test).cpu().double().view(shape)

# %%
# **Lost members stay in the count.** Where weights overflow, the loss is no number
# (``nan`` or ``inf``). Then the mean over the seeds is none either, and the setting
# cannot win; leaving the member out would make a dangerous setting look good. A loss
# that is finite, however large, enters the mean as it is.

mean = val.mean(dim=2)  # [rates, decays]
best = divmod(mean.nan_to_num(nan=torch.inf).argmin().item(), shape[1])
chosen = f"rate {rate_grid[best[0]]:.2g}, decay {decay_grid[best[1]]:.2g}"
gone, huge = ~val.isfinite(), val.isfinite() & (val > 10)
lost = (gone | huge).any(dim=2)
beyond = rate_grid[:, None] * decay_grid > 2

low, high = val[best].aminmax()
print(f"chosen of {mean.numel()} settings: {chosen}")
print(f"validation loss {mean[best]:.3f}, seeds from {low:.3f} to {high:.3f}")
print(f"other settings with a mean in that range: {(mean <= high).sum() - 1}")
print(f"test loss of the chosen setting: {test[best].mean():.3f}")
print(f"{gone.sum()} of {val.numel()} members have no number, ", end="")
print(f"{huge.sum()} more a finite one above 10")
print(f"settings with such members: {lost[beyond].sum()} of {beyond.sum()} ", end="")
print(f"where rate * decay > 2, {lost[~beyond].sum()} of {(~beyond).sum()} elsewhere")

# %%
# Report the test loss: the validation loss has chosen, so it is too good. One run of
# each could not have told apart the settings within the range of the seeds.

fig, ax = plt.subplots(layout="constrained")
shown = mean.where(mean.isfinite(), torch.nan).numpy()
axes = decay_grid.numpy(), rate_grid.numpy()
mesh = ax.pcolormesh(*axes, shown, norm="log", cmap="viridis_r", shading="nearest")
mesh.set_clim(mean[best].item(), math.log(10))
ax.set_facecolor("0.6")
ax.plot(axes[0], 2 / axes[0], "--", color="C1", lw=2.5, label="rate x decay = 2")
ax.plot(axes[0][best[1]], axes[1][best[0]], "*", color="C1", ms=14, label="chosen")
ax.set(xscale="log", yscale="log", ylim=(6e-5, 15))
ax.set(xlabel="weight decay", ylabel="learning rate")
ax.set_title(
    f"Digits, MLP 64-32-10, 200 steps of AdamW, float32, {device.type}\n"
    f"mean of {shape[2]} seeds; gray: a seed has no number"
)
bar = fig.colorbar(mesh, extend="max", label="final validation loss")
bar.set_ticks([0.2, 0.5, 1, math.log(10)], labels=["0.2", "0.5", "1", "guess"])
bar.minorticks_off()
_ = fig.legend(loc="outside lower center", ncols=2)
fig.set_label(
    "Heat map of the final validation loss by weight decay and learning rate. "
    f"The lowest mean, {mean[best]:.2f}, is at {chosen}. "
    f"{gone.any(2).sum()} of {mean.numel()} settings are gray, without a number."
)

# %%
# If the gray cells lie above the dashed line, the decay blew up the weights, and not
# the gradient. Where a row has one color, the decay does not matter there. The mean
# hides the spread over seeds:

fig, ax = plt.subplots(layout="constrained")
curve, middle = val[:, best[1]].numpy(), mean[:, best[1]].numpy()
ax.fill_between(axes[1], curve.min(1), curve.max(1), alpha=0.3, label="all seeds")
ax.plot(axes[1], middle, "o-", ms=4, label="mean")
ax.axhline(math.log(10), color="C7", linestyle=":", label="a guess")
ax.loglog()
ax.set(xlabel="learning rate", ylabel="final validation loss")
ax.set_title(f"{shape[2]} seeds, decay {axes[0][best[1]]:.2g}, float32, {device.type}")
_ = ax.legend()
fig.set_label(
    f"Mean final validation loss and its range over {shape[2]} seeds: {middle[0]:.1f} "
    f"at rate 0.0001, {mean[best]:.2f} at the chosen rate, {middle[-1]:.1f} at rate 10."
)

# %%
# What does one more member cost?
# -------------------------------
#
# A step of one such network is mostly the overhead of starting operators. ``vmap``
# starts them once for all, so one call should cost far less than separate steps, until
# the arithmetic fills the device. Forward, backward and update, warm, in float32:


def in_turns(*ways, seconds=1.0):
    """For each way: seconds of a call, gain over the first way, the gain's interval."""

    def clock(way, calls=1):
        start = timer()  # waits for a GPU
        for _ in range(calls):
            way()
        return (timer() - start) / calls

    calls = math.ceil(5e-3 / min(clock(way) for way in 3 * ways))  # the same for all
    turns, end = [], timer() + seconds
    while timer() < end or len(turns) < 7 or len(turns) % 2 == 0:
        back = (-1) ** len(turns)  # every second turn runs backwards
        turns.append([clock(way, calls) for way in ways[::back]][::back])
    times, cut = torch.tensor(turns).T, int((len(turns) - 1) / 2 - len(turns) ** 0.5)
    gains = (times[0] / times).sort().values[:, [len(turns) // 2, cut, -1 - cut]]
    first = times[0].median().item()
    return [(first / gain, gain, low, high) for gain, low, high in gains.tolist()]


def said(gain, low, high):
    """A gain in words; what noise can explain, up to 2 percent, is no difference."""
    if low > 1.02:
        return f"{gain:.3g}x faster ({low:.3g} to {high:.3g})"
    if high < 0.98:
        return f"{1 / gain:.3g}x slower ({1 / high:.3g} to {1 / low:.3g})"
    return f"no difference seen ({low:.2f} to {high:.2f})"


model = make_model().to(device)
single = torch.optim.AdamW(model.parameters(), fused=True)
sweep, one = in_turns(
    lambda: train(params, optimizer, rates[None], decays, rows[:1], x_train, y_train),
    lambda: train_alone(model, single, rates[:1], rows[:1, 0], x_train, y_train),
)
print(f"a step: one model {one[0] * 1e3:.2f} ms, the sweep {sweep[0] * 1e3:.2f} ms")
print(f"{len(rates)} members in one call, against as many runs one after the other:")
print(said(*(len(rates) / gain for gain in (one[1], one[3], one[2]))))

# %%
# If it is slower, one model fills your device, and separate runs are the better sweep.
#
# Give each model its own betas: Adam as a pure function
# ------------------------------------------------------
#
# A step is *not* proportional to momentum, betas or epsilon. For these, write the
# optimizer for one member, state in and new state out, and map it. This form can be
# compiled as a whole, see ``plot_faster_training.py``.


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


# %%
# Four of them, and a ``torch.optim.Adam`` for each:

betas = [[0.0, 0.9], [0.5, 0.99], [0.9, 0.999], [0.95, 0.9999]]
beta1, beta2 = torch.tensor(betas, device="cpu", dtype=torch.float64).T
rates = torch.logspace(-4, -1, 4).to(beta1)
params, _ = stack_module_state(models[:4])
params = {name: p.detach() for name, p in params.items()}
zeros = {name: torch.zeros_like(p) for name, p in params.items()}
state = params, zeros, zeros
each_member = vmap(adam_step, in_dims=(0, 0, 0, 0, None, 0, 0))
rows = rows[:num_steps, :4].cpu()
for t, row in enumerate(rows, start=1):
    state = each_member(*state, (rates, beta1, beta2), t, x[row], y[row])

distances = []
for i, model in enumerate(copy.deepcopy(models[:4])):
    single = torch.optim.Adam(model.parameters(), betas=betas[i])
    train_alone(model, single, rates[i].expand(num_steps), rows[:, i], x, y)
    distances.append(apart(model, state[0], i))

worst = torch.stack(distances).max()
assert worst < 1e-10, f"the pure function is not Adam: {worst:.0e} apart"
print(f"own betas, {num_steps} steps: at most {worst:.0e} apart")

# %%
# The mistake: rates for the optimizer, or for the losses
# -------------------------------------------------------
#
# ``torch.optim`` refuses a tensor of rates. Scaling each loss by its rate raises no
# error, and is right for plain SGD; but Adam divides each gradient by its own size, so
# the rates cancel. How far a bias of the four members moves in one step:

try:
    torch.optim.AdamW(params.values(), lr=rates)
except ValueError as problem:
    print(f"ValueError: {problem}")

row = rows[0]
for kind in (torch.optim.SGD, torch.optim.Adam):
    params, _ = stack_module_state(models[:4])
    before = params["2.bias"].detach().clone()
    (rates * vmap(loss_of)(params, x[row], y[row])).sum().backward()
    kind(params.values(), lr=1).step()
    moved = (params["2.bias"] - before).abs().mean(dim=1)
    print(f"{kind.__name__:4}", *[f"{m:.1e}" for m in moved.tolist()])

# %%
# Remember
# --------
#
# Give the optimizer ``lr=1`` and ``weight_decay=0``, and multiply each member's change
# by its rate after the step. What a step is not proportional to needs a pure function.
# Choose on validation data, report on test data, and count the lost members.
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
# - I. Loshchilov, F. Hutter: Decoupled weight decay regularization, 2017,
#   `arXiv:1711.05101 <https://arxiv.org/abs/1711.05101>`_.
# - Asked in `functorch#782 <https://github.com/pytorch/functorch/issues/782>`_.
