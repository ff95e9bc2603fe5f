"""
One training loop for a whole ensemble
======================================

Train many small networks at once, each from its own seed and in its own order of the
data, and keep each at its best epoch, with one optimizer of ``torch.optim`` and one
backward pass a step.

**In short.** Stack the parameters once, give the stack to the optimizer, let ``vmap``
compute one loss for each member, and call ``backward`` on the **sum** of the losses:
with SGD or Adam, each member then trains as if it were alone, up to rounding. Compute
what needs a whole member (its best epoch, its gradient norm) for each row of the stack.

Before you start, read ``plot_ensembling.py``: it explains the stack and ``vmap``.
"""

# %%
# Set-up
# ------

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
name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")

digits = load_digits()  # 1,797 handwritten digits of 8 by 8 pixels
order = torch.randperm(1797)
x = torch.tensor(digits.data / 16, dtype=torch.float32)[order].to(device)  # [1797, 64]
y = torch.tensor(digits.target)[order].to(device)  # [1797]
sizes = [500, 500, 797]  # to train, to choose the best epoch, to test once, at the end
(x_train, x_val, x_test), (y_train, y_val, y_test) = x.split(sizes), y.split(sizes)

# %%
# The loop to copy
# ----------------


def build(seed):
    torch.manual_seed(seed)
    first = nn.Linear(64, 32, bias=False)  # batch norm adds a bias
    return nn.Sequential(first, nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


num_models, num_epochs = 64, 20
models = [build(seed).to(device) for seed in range(num_models)]
params, buffers = stack_module_state(models)  # "0.weight": [64, 32, 64], ...
state = params | buffers  # the same tensors, in one dictionary
with torch.device("meta"):
    skeleton = build(0)
optimizer = torch.optim.Adam(params.values(), lr=0.01)
generators = [torch.Generator().manual_seed(seed) for seed in range(num_models)]


def predict(state, x):  # of one member
    return functional_call(skeleton, state, (x,), strict=True)


def member_loss(state, x, y):  # of one member
    return F.cross_entropy(predict(state, x), y)


def shuffled(generators):  # the rows of the training digits, in an order for each
    orders = [torch.randperm(len(x_train), generator=g) for g in generators]
    return torch.stack(orders).to(device)  # [64, 500]


def train_step(state, optimizer, x, y):
    losses = vmap(member_loss)(state, x, y)  # [64]
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    return losses.detach()


# %%

validate = vmap(member_loss, in_dims=(0, None, None))  # the same digits for all
best = {key: tensor.detach().clone() for key, tensor in state.items()}
best_loss = torch.full([num_models], torch.inf, device=device)
best_epoch = torch.zeros(num_models, dtype=torch.long, device=device)
curves = []

for epoch in range(1, num_epochs + 1):
    skeleton.train()
    for rows in shuffled(generators).split(32, dim=1):  # [64, 32]
        train_step(state, optimizer, x_train[rows], y_train[rows])
    skeleton.eval()
    with torch.no_grad():
        losses = validate(state, x_val, y_val)  # [64]
        better = losses < best_loss  # [64], False where a loss is NaN
        best_loss[better], best_epoch[better] = losses[better], epoch
        for key, tensor in state.items():
            best[key][better] = tensor[better]
    curves.append(losses)

print(f"best epochs: {best_epoch.min()} to {best_epoch.max()}, of {num_epochs}")

# %%
# What differs from the loop that trains one model:
#
# - **The optimizer gets the stack**, which is made once, before the loop. Stacking in
#   every step, or giving the optimizer the old modules, raises no error and trains
#   nothing (`pytorch#120581 <https://github.com/pytorch/pytorch/issues/120581>`_).
# - **Rows for each member.** ``x_train[rows]`` is ``[64, 32, 64]`` (20 digits in the
#   last one of an epoch), in each member's own order. Data from a loader:
#   ``plot_data.py``.
# - **The sum.** No member's parameters touch another's loss, so the gradient of the sum
#   with respect to a member's parameters is the gradient of its own loss.
# - **The mode** is that of the skeleton, for all members. With dropout in the network,
#   write ``vmap(member_loss, randomness="different")``: ``plot_state.py``.
#
# SGD, momentum, Adam, AdamW and weight decay treat each number by itself, so they do
# not mix members (tested). Adafactor mixes members. Muon refuses stacked matrices, and
# takes a stack of vectors for one matrix, which mixes members (both tested); LBFGS
# mixes them, too (tested). Groups of layers are made by name, as for one model; a rule
# such as ``p.ndim < 2`` for biases becomes ``p.ndim < 3``. A scheduler changes the rate
# of all members at once, as it does for one model.
#
# Keep the best state of each member
# ----------------------------------
#
# The last lines of the loop copy the rows of those members that have improved, of
# **parameters and buffers**: the running statistics of batch norm belong to the
# weights. To stop early, leave the loop when ``epoch - best_epoch.max()`` exceeds your
# patience: a member then trains on while any other still improves. A best epoch that is
# the last one tried asks for a longer training. **A member whose loss was never a
# number keeps its first weights and** ``best_epoch`` **0**: leave it out of the
# ensemble. The kept states give these losses again:

with torch.no_grad():
    again = validate(best, x_val, y_val)  # the skeleton is still in eval mode
torch.testing.assert_close(again, best_loss, msg="kept states have other losses")

# %%

lines = torch.stack(curves).cpu()  # [20, 64]
epochs, lowest = best_epoch.cpu(), best_loss.cpu()
above = lines[-1].div(lowest).median() - 1
fig, ax = plt.subplots(layout="constrained")
ax.plot(range(1, num_epochs + 1), lines.tolist(), color="gray", lw=0.5, alpha=0.5)
ax.plot(epochs.tolist(), lowest.tolist(), "C0o", ms=4, label="best epoch of a member")
ax.set_title(f"{num_models} members trained together\n{name}, float32")
ax.set_xticks(range(0, num_epochs + 1, 5))
ax.set_xlabel("epoch")
ax.set_ylabel("validation loss (cross entropy)")
ax.set_yscale("log")
ax.legend()
print(f"last epoch: validation loss {above:.0%} above the best (median of members)")
fig.set_label(
    f"Validation loss against epoch, {num_models} thin lines, one a member, and a dot "
    f"where each is lowest: epochs {epochs.min()} to {epochs.max()}. The last loss is "
    f"{above:.0%} above the best one (median of members)."
)

# %%
# Test the members and the ensemble
# ---------------------------------
#
# The ensemble averages the probabilities of the best states. The test digits took no
# part in training, nor in the choice of epochs.

with torch.no_grad():
    logits = vmap(predict, in_dims=(0, None))(best, x_test)  # [64, 797, 10]
mean = logits.softmax(dim=-1).mean(dim=0)  # [797, 10]
ensemble = (mean.argmax(dim=-1) == y_test).float()  # [797], 1 where it is right
members = (logits.argmax(dim=-1) == y_test).float()  # [64, 797]
rivals = {
    "mean member": members.mean(dim=0),
    "lowest validation loss": members[best_loss.argmin()],
}
print(f"right on {len(y_test)} test digits: the ensemble {ensemble.mean():.1%}")
for rival, right in rivals.items():
    gain = 100 * (ensemble - right)
    error = gain.std() / len(gain) ** 0.5
    print(f"{rival} {right.mean():.1%}: the ensemble has", end=" ")
    print(f"{gain.mean():+.1f} points (standard error {error:.1f})")

# %%
# The standard error is that over test digits, for these members: a difference of less
# than two standard errors may be chance. ``plot_more_members.py`` asks what each
# further member buys.
#
# Each member trains as if it were alone
# --------------------------------------
#
# The check to keep in a project of your own. Four seeds train together and, in the
# usual way, one by one, in float64 on the CPU: rounding is far below such a mistake as
# the mean of the losses.


def train_alone(seed, x, y):
    model, generator = build(seed).to(x), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        for rows in torch.randperm(len(x), generator=generator).split(32):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


x64, labels = x_train.cpu().double(), y_train.cpu()
p64, b64 = stack_module_state([build(seed).cpu().double() for seed in range(4)])
adam64 = torch.optim.Adam(p64.values(), lr=0.01)
few = [torch.Generator().manual_seed(seed) for seed in range(4)]
skeleton.train()
for _ in range(2):
    for rows in shuffled(few).cpu().split(32, dim=1):
        train_step(p64 | b64, adam64, x64[rows], labels[rows])

alone = stack_module_state([train_alone(seed, x64, labels) for seed in range(4)])
pairs = zip((p64 | b64).values(), (alone[0] | alone[1]).values(), strict=True)
off = max((a - b).abs().max().item() for a, b in pairs)
assert off < 1e-10, f"members do not train as if they were alone: {off:.1e} apart"
print(f"two epochs, together and alone: states {off:.0e} apart in float64")

# %%
# So **member 3 is the model that seed 3 gives alone**, up to rounding: the seed sets
# its first weights and its orders, whatever other members there are. In float32,
# training amplifies rounding: ``plot_how_equal.py`` measures by how much.
#
# A member that diverges harms no other
# -------------------------------------
#
# Member 7 now has NaN among its weights. The sum of the losses is NaN as well, but
# ``backward`` does not use its value, and the gradients of the others do not contain
# the loss of member 7.

with torch.no_grad():
    params["3.weight"][7] = torch.nan
batch = x_train[:32].expand(num_models, -1, -1), y_train[:32].expand(num_models, -1)
losses = train_step(state, optimizer, *batch)
finite = params["0.weight"].grad.isfinite().all(dim=(1, 2))  # [64]
print(f"sum of losses {losses.sum():.2f}, finite losses {losses.isfinite().sum()}")
print(f"members with finite gradients: {finite.sum()} of {num_models}")

# %%
# Clip the gradient of each model
# -------------------------------
#
# ``clip_grad_norm_`` on a stack takes **one norm over all members**: a large gradient
# of one shrinks everybody's gradient, and a NaN ends everybody's training. Between
# ``backward`` and ``step``, clip each member by its own norm:


def clip_each(tensors, max_norm):
    norms = [p.grad.reshape(len(p), -1).norm(dim=1) for p in tensors]  # each [64]
    norms = torch.stack(norms).norm(dim=0)  # [64], over all tensors of a member
    factors = (max_norm / (norms + 1e-6)).clamp(max=1)
    for p in tensors:
        p.grad.mul_(factors.view(-1, *[1] * (p.ndim - 1)))


for clip in [nn.utils.clip_grad_norm_, clip_each]:
    optimizer.zero_grad()
    vmap(member_loss)(state, *batch).sum().backward()
    clip(params.values(), max_norm=1.0)
    finite = params["0.weight"].grad.isfinite().all(dim=(1, 2))  # [64]
    print(f"{clip.__name__} leaves {finite.sum()} of {num_models} gradients finite")

# %%
# What one more member costs
# --------------------------
#
# ``vmap`` adds some time to each call of an operator, so one member should be slower
# than in a loop. But a loop calls every operator again for each member, so from some
# number of members on, one call should win. The loop, too, gets one optimizer for all
# members and one backward pass, from the sum of their losses:


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
# A whole step in float32, with gradients and a fused Adam on both sides, warm. The
# loop's time is a median of at least seven turns; the other is that, divided by the
# median ratio, whose 95 % interval is in brackets.

adam = partial(torch.optim.Adam, fused=True)
costs = []
for size in [1, 3, 10, 100]:
    members = [build(seed).to(device) for seed in range(size)]
    rows = torch.randint(500, (size, 32))
    data = x_train[rows], y_train[rows]
    weights = [p for m in members for p in m.parameters()]
    params, buffers = stack_module_state(members)
    loop, together = in_turns(
        partial(train_step_loop, members, adam(weights), *data),
        partial(train_step, params | buffers, adam(params.values()), *data),
    )
    ms = [loop[0] * 1e3, together[0] * 1e3]
    costs.append([size, *ms])
    print(f"members {size}: loop {ms[0]:.2f} ms, together {ms[1]:.2f} ms:", end=" ")
    print(said(*together[1:]))
(few, *fast), (many, *slow) = costs[-2:]
each = [(late - early) / (many - few) for early, late in zip(fast, slow, strict=True)]
print("one more member: loop {:.2f} ms, together {:.2f} ms".format(*each))

# %%
# Both do the same arithmetic. **Where one call wins by much**, the loop probably spends
# the rest of its time on calling operators. Larger networks may gain less, or lose:
# ``plot_when_vmap_pays.py``. Compiled steps: ``plot_faster_training.py``.
#
# The mistake: the mean in place of the sum
# -----------------------------------------
#
# ``losses.mean().backward()`` divides every gradient by the number of members, and
# raises no error. For SGD without decay, this is a learning rate that is 64 times too
# small. Adam almost cancels the division. Both add ``weight_decay`` to the divided
# gradient, so that the decay weighs 64 times as much (tested for Adam). AdamW adds no
# decay to the gradient. ``plot_silent_mistakes.py`` runs this mistake and others.
#
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
# - ``plot_data.py`` feeds the members: a loader, own subsets, weights, half precision.
# - ``plot_state.py``: batch norm, dropout, frozen layers.
# - ``plot_saving.py`` saves the stack and takes one member out.
# - ``plot_hyperparameter_sweep.py`` gives each member its own learning rate.
#
# References
# ----------
#
# - W. Whitney (2021), `Parallelizing neural networks on one GPU with JAX
#   <http://willwhitney.com/parallel-training-jax.html>`_.
