"""
One training loop for a whole ensemble
======================================

Train dozens to thousands of small networks at once, each on random minibatches of its
own, with one optimizer of ``torch.optim`` and one backward pass a step.

**In short.** Stack the parameters once, give the stack to the optimizer, let ``vmap``
compute one loss for each member, and call ``backward`` on the **sum** of the losses:
each member then trains as if it were alone, up to rounding. A step calls as many
operators for a thousand members as for one, so this pays for many small networks.

Before you start, read ``plot_ensembling.py``: it explains the stack and ``vmap``.
"""

# %%
# Set-up
# ------

import copy
import math
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
device_name = f"{device.type.upper()} ({torch.get_num_threads()} threads)"
if device.type == "cuda":
    device_name = torch.cuda.get_device_name()
print(f"{device_name}, torch {torch.__version__}, float32")

# %%
# Handwritten digits of 8 by 8 pixels; no ``DataLoader`` is needed. Only 500 are for
# training, so that the validation loss levels off early.

digits = load_digits()
x = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)  # [1797, 64]
y = torch.tensor(digits.target, device=device)  # [1797]
(x_train, x_val), (y_train, y_val) = x.split([500, 1297]), y.split([500, 1297])


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


# %%
# The loop to copy
# ----------------

num_models, num_steps = 64, 300
models = [MLP().to(device) for _ in range(num_models)]
params, _ = stack_module_state(models)  # "0.weight": [64, 32, 64], ...
optimizer = torch.optim.Adam(params.values(), lr=0.03)
with torch.device("meta"):
    skeleton = MLP()


def member_loss(params, x, y):  # of one member, on its minibatch
    return F.cross_entropy(functional_call(skeleton, params, (x,), strict=True), y)


def train_step(params, optimizer, x, y):
    losses = vmap(member_loss)(params, x, y)  # [64]
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    return losses.detach()


rows = torch.randint(500, (num_steps, num_models, 32), device=device)
for own in rows:  # [64, 32]: which digits each member sees in this step
    trained = train_step(params, optimizer, x_train[own], y_train[own])
print(f"losses after {num_steps} steps: {trained.min():.4f} to {trained.max():.4f}")

# %%
# What differs from the loop that trains one model:
#
# - **The optimizer gets the stack**, which is made once, before the loop. Stacking in
#   every step, or giving the optimizer the old modules, raises no error and trains
#   nothing (`pytorch#120581 <https://github.com/pytorch/pytorch/issues/120581>`_).
# - **Rows for each member.** ``x_train[own]`` is ``[64, 32, 64]``. An epoch without
#   repetition is ``torch.rand(num_models, 500).argsort(dim=1).split(32, dim=1)``.
# - **The sum.** No member's parameters touch another's loss, so the gradient of the sum
#   with respect to a member's parameters is the gradient of its own loss.
#
# SGD, momentum, Adam, AdamW and weight decay treat each number by itself, so a stack is
# a model to them (tested). Adafactor, LBFGS and Muon do not, and mix members or refuse.
#
# Each member trains as if it were alone
# --------------------------------------
#
# The check to keep in a project of your own: a few members train together and one by
# one, on the same rows, in float64 on the CPU: rounding is far below any mistake.


def train_step_alone(model, optimizer, x, y):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_step_each(models, optimizers, x, y):
    tasks = zip(models, optimizers, x, y, strict=True)
    return torch.stack([train_step_alone(*task) for task in tasks])


few = [copy.deepcopy(m).cpu().double() for m in models[:4]]
x64, labels = x_train.cpu().double(), y_train.cpu()
params, _ = stack_module_state(few)
optimizer = torch.optim.Adam(params.values(), lr=0.03)
optimizers = [torch.optim.Adam(m.parameters(), lr=0.03) for m in few]
for own in rows[:20, :4].cpu():
    together = train_step(params, optimizer, x64[own], labels[own])
    alone = train_step_each(few, optimizers, x64[own], labels[own])
    off = (together - alone).abs().max()
    assert off < 1e-10, f"members do not train as if they were alone: {off:.1e} apart"
print(f"losses of 20 steps, together and alone: {off:.0e} apart in float64")

# %%
# In float32 training amplifies rounding: ``plot_how_equal.py`` measures by how much.
#
# Keep the best state of each member
# ----------------------------------
#
# Each member has its best step elsewhere. Keep a second stack, and copy into it the
# rows of those members that have improved. A scheduler works as ever.

params, _ = stack_module_state(models)
optimizer = torch.optim.Adam(params.values(), lr=0.03)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
best = {name: p.detach().clone() for name, p in params.items()}
best_loss = torch.full([num_models], torch.inf, device=device)
best_step = torch.zeros(num_models, dtype=torch.long, device=device)
validate = vmap(member_loss, in_dims=(0, None, None))  # the same digits for all
curves = []

for step, own in enumerate(rows, 1):
    train_step(params, optimizer, x_train[own], y_train[own])
    scheduler.step()
    if step % 20 == 0:
        with torch.no_grad():
            val_loss = validate(params, x_val, y_val)  # [64]
            better = val_loss < best_loss  # [64], False where a loss is NaN
            best_loss = torch.where(better, val_loss, best_loss)
            best_step = torch.where(better, step, best_step)
            for name, p in params.items():
                rows_of = better.view(-1, *[1] * (p.ndim - 1))
                best[name] = torch.where(rows_of, p, best[name])
        curves.append(val_loss)

gain = (val_loss / best_loss).median() - 1
print(f"best steps: {best_step.min()} to {best_step.max()}, of {num_steps}")
print(f"validation loss at the end: {gain:.1%} above the best (median of members)")

# %%
# To stop early, leave the loop when ``step - best_step.max()`` exceeds your patience.
#
# The figure shows all members, and three of them trained once more, alone: if training
# together is training alone, the marks lie on the lines.

alone = {member: [] for member in [0, 20, 40]}
for member, losses in alone.items():
    model = copy.deepcopy(models[member])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for step, own in enumerate(rows[:, member], 1):
        train_step_alone(model, optimizer, x_train[own], y_train[own])
        scheduler.step()
        if step % 20 == 0:
            losses.append(F.cross_entropy(model(x_val), y_val).item())

# %%

lines = torch.stack(curves).cpu()  # [15, 64]
steps = range(20, num_steps + 1, 20)
fig, ax = plt.subplots(layout="constrained")
ax.plot(steps, lines.tolist(), color="gray", linewidth=0.5, alpha=0.5)
ax.plot(steps, lines[:, list(alone)].tolist())  # in C0 to C2
for style, (member, losses) in zip(["C0o", "C1^", "C2s"], alone.items(), strict=True):
    ax.plot(steps, losses, style, markersize=4, label=f"member {member}, alone")
ax.set_title(f"{num_models} members trained together\n{device_name}, float32")
ax.set_xlabel("step")
ax.set_ylabel("validation loss (cross entropy)")
ax.legend()
off = (lines[:, list(alone)].T / torch.tensor([*alone.values()]) - 1).abs().max()
print(f"The marks lie on the lines within {off:.0e} of their height.")
fig.set_label(
    f"Validation loss against step: {num_models} thin lines, one a member, fall and "
    "level out at different heights. On three lie marks: the same models, alone."
)

# %%
# A member that diverges harms no other
# -------------------------------------
#
# The weights of member 7 are so large that its loss is NaN. The sum is NaN as well, but
# nobody uses its value, and the gradients of the others do not contain it. (Not so with
# ``GradScaler``, which skips the step of all: use ``bfloat16``, which needs none.)

params, _ = stack_module_state(models)
with torch.no_grad():
    for p in params.values():
        p[7] *= 1e30
optimizer = torch.optim.Adam(params.values(), lr=0.03)
for own in rows:
    losses = train_step(params, optimizer, x_train[own], y_train[own])
off = (losses - trained).abs().nan_to_num(0)
print(f"member 7 has a loss of {losses[7]:.2f}; {losses.isfinite().sum()} members")
print(f"have a finite one, at most {off.max():.0e} from that of the first run")

# %%
# Clip the gradient of each model
# -------------------------------
#
# ``clip_grad_norm_`` on a stack takes **one norm over all members**: a large gradient
# of one shrinks everybody's step, and a NaN ends everybody's training. Between
# ``backward`` and ``step``, clip each member by its own norm:


def clip_each(tensors, max_norm):
    norms = [p.grad.reshape(len(p), -1).norm(dim=1) for p in tensors]  # each [64]
    norms = torch.stack(norms).norm(dim=0)  # [64], over all tensors of a member
    factors = (max_norm / (norms + 1e-6)).clamp(max=1)
    for p in tensors:
        p.grad.mul_(factors.view(-1, *[1] * (p.ndim - 1)))


for clip in [nn.utils.clip_grad_norm_, clip_each]:
    optimizer.zero_grad()
    vmap(member_loss)(params, x_train[own], y_train[own]).sum().backward()
    clip(params.values(), max_norm=1.0)
    finite = params["0.weight"].grad.isfinite().all(dim=(1, 2)).sum()
    print(f"{clip.__name__}: {finite} of {num_models} members have a finite gradient")

# %%
# What one more member costs
# --------------------------
#
# ``vmap`` adds some time to each call of an operator, so one member should be slower
# than in a loop. But a loop calls every operator again for each member, so a few
# members should make up for it. The loop at its best has one optimizer for all members
# and goes backward once, from the sum of their losses:


def train_step_loop(models, optimizer, x, y):
    tasks = zip(models, x, y, strict=True)
    losses = torch.stack([F.cross_entropy(m(inp), tgt) for m, inp, tgt in tasks])
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    return losses.detach()


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


# %%
# A whole step in float32, with gradients and a fused Adam on all sides, warm. Times are
# medians of at least seven turns, brackets hold the interval of the ratio.

adam = partial(torch.optim.Adam, fused=True)
for size in [1, 3, 10, 100]:
    members = [MLP().to(device) for _ in range(size)]
    own, params = torch.randint(500, (size, 32)), stack_module_state(members)[0]
    data = x_train[own], y_train[own]
    weights = [list(m.parameters()) for m in members]
    best, each, together = in_turns(
        partial(train_step_loop, members, adam(p for w in weights for p in w), *data),
        partial(train_step_each, members, list(map(adam, weights)), *data),
        partial(train_step, params, adam(params.values()), *data),
    )
    a, b, c = (f"{way[0] * 1e3:.2f}" for way in (each, best, together))
    print(f"{size:3} members: a loop {a} ms, at its best {b}, together {c}")
    print(f"    together, beside the loop at its best: {said(*together[1:])}")

# %%
# **Where one call wins by much**, a loop probably spends most of its time on calling
# operators. Larger networks gain less, or lose: ``plot_when_vmap_pays.py``. Fused and
# compiled steps: ``plot_faster_training.py``.
#
# The mistake: the mean in place of the sum
# -----------------------------------------
#
# ``losses.mean()`` divides every gradient by the number of members: for SGD, a smaller
# learning rate. Adam and AdamW hide it; but the ``weight_decay`` of Adam is added to
# the gradient after the division, and is then 64 times too strong.

for decay in [0, 1e-3]:
    for total in [torch.sum, torch.mean]:
        params, _ = stack_module_state(models)
        optimizer = torch.optim.Adam(params.values(), lr=0.03, weight_decay=decay)
        for own in rows[:200]:
            losses = vmap(member_loss)(params, x_train[own], y_train[own])
            optimizer.zero_grad()
            total(losses).backward()
            optimizer.step()
        print(f"decay {decay:5}, {total.__name__:4}: mean loss {losses.mean():.3f}")

# %%
# Remember
# --------
#
# Give the optimizer the stack, and call ``backward`` on the sum of the losses. What
# looks at more than one number (a norm, a best state) has to be done for each member.
# Compare a few members with their training alone, in float64.
#
# Next
# ----
#
# - ``plot_state.py`` adds batch normalization and dropout.
# - ``plot_saving.py`` saves the stack and takes one member out.
# - ``plot_hyperparameter_sweep.py`` gives each member its own learning rate.
#
# References
# ----------
#
# - W. Whitney (2021), `Parallelizing neural networks on one GPU with JAX
#   <http://willwhitney.com/parallel-training-jax.html>`_.
