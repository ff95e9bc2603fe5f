"""
Training an ensemble in one call
================================

Train many small networks at once, each on its own resampled data, with one optimizer
and one backward pass a step, and prove in float64 that every member ends, up to
rounding, where it ends when it is trained alone.

**What you will learn**

- which tensors the optimizer gets, and why the losses of members are summed and never
  averaged;
- how to check that training together is training alone, although rounding errors grow
  with every step;
- what one more member costs, from one to thousands;
- what resampled data do to an ensemble: where it becomes unsure;
- four mistakes that raise no error, and how to notice each.

**Before you start**, read ``plot_ensembling.py``: stacked state, ``functional_call``
and ``vmap`` are explained there.
"""

# %%
# Set-up
# ------
#
# Autograd is on. Everything runs in float32 but the proofs, which need float64.

import copy
import math
import platform
import shutil
import time
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import LogLocator
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.utils.benchmark import Timer

torch.manual_seed(0)

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
num_threads = torch.get_num_threads()
device_names = {cpu: f"CPU ({platform.machine()}, {num_threads} threads)"}
if device.type == "cuda":
    device_names[device] = torch.cuda.get_device_name(device)
elif device != cpu:
    device_names[device] = device.type

usual = {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
compiler = usual if shutil.which(usual) else None
print(
    f"{' and '.join(device_names.values())}, torch {torch.__version__}, "
    f"{torch.get_default_dtype()}, precision {torch.get_float32_matmul_precision()} "
    f"(matrix products), autograd {'on' if torch.is_grad_enabled() else 'off'}, "
    f"C++ compiler: {compiler}"
)

# %%
# A problem that you can look at
# ------------------------------
#
# Two spirals, a hundred points with a little noise: which arm does a point belong to?
# The network has two inputs, so its answer can be drawn as a map. The members differ
# in their initialization and, by **bootstrapping**, in their data: each draws a
# hundred points *with replacement*, so it sees about two thirds of them.


def spirals(num_points):
    """Points [num_points, 2] on two noisy spirals and their labels [num_points]."""
    labels = torch.arange(num_points) % 2
    radius = torch.rand(num_points).sqrt()
    angle = 3 * math.pi * radius + math.pi * labels
    points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return points + 0.05 * torch.randn(num_points, 2), labels.float()


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(2, 32)
        self.fc2 = nn.Linear(32, 32)
        self.fc3 = nn.Linear(32, 1)

    def forward(self, x):  # [points, 2]
        x = torch.tanh(self.fc1(x))  # [points, 32]
        x = torch.tanh(self.fc2(x))  # [points, 32]
        return self.fc3(x).squeeze(-1)  # [points]: logits of the second arm


num_points = 100
num_models = 8
points, labels = (x.to(device) for x in spirals(num_points))
models = [MLP().to(device) for _ in range(num_models)]
rows = torch.randint(num_points, (num_models, num_points))  # [8, 100], with replacement
own_points, own_labels = points[rows], labels[rows]  # [8, 100, 2], [8, 100]

seen = [len(row.unique()) for row in rows]
print(f"different points that each of the {num_models} members sees:", *seen)

# %%
# The plain way: one after the other
# ----------------------------------
#
# This is the loop that everybody has written. It trains one model with one optimizer,
# on all points of its sample in every step, and we call it once for each member.


def train_alone(model, make_optimizer, points, labels, num_steps):
    """Train one model in place."""
    optimizer = make_optimizer(model.parameters())
    for _ in range(num_steps):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(points), labels).backward()
        optimizer.step()


# %%
# The vectorized way: one optimizer on the stacked state
# ------------------------------------------------------
#
# Write the loss of **one** member as a function of its parameters and its data.
# ``vmap`` of it returns one loss for each member. Three lines differ from the loop
# above:
#
# - The optimizer gets the *stacked* tensors. ``stack_module_state`` made them new
#   leaves of autograd, so it can update them.
# - ``vmap`` computes all losses, ``[num_models]``.
# - ``torch.sum`` makes one number of them, which ``backward`` needs. No member's
#   parameters touch another member's loss, so the gradient of the sum with respect to
#   one row is the gradient of that row's own loss.
#
# An optimizer whose rule works on each number by itself cannot tell a stacked tensor
# from a single one. SGD, momentum, Adam, AdamW and weight decay are such rules.

with torch.device("meta"):
    skeleton = MLP()


def member_loss(params, points, labels):
    """Loss of one member, a pure function of its parameters and its data."""
    logits = functional_call(skeleton, params, (points,), strict=True)
    return F.binary_cross_entropy_with_logits(logits, labels)


ensemble_loss = vmap(member_loss)  # losses: [num_models]


def train_together(
    params,
    make_optimizer,
    points,
    labels,
    num_steps,
    loss=ensemble_loss,
    total=torch.sum,
):
    """Train all members in place: the rows of params."""
    optimizer = make_optimizer(params.values())
    for _ in range(num_steps):
        optimizer.zero_grad()
        total(loss(params, points, labels)).backward()
        optimizer.step()


params, _ = stack_module_state(models)  # this network has no buffers
for name, p in params.items():
    print(f"{name:10} {list(p.shape)!s:12} a leaf of autograd: {p.is_leaf}")

# %%
# Check: the gradients of one step
# --------------------------------
#
# Losses and gradients of the one call, against the loop. The reference is the loop in
# float64. Both sides round: the error of ``vmap`` may be three times that of the loop,
# or three millionths of the largest value, whichever is more.
#
# The second form of the one call is ``vmap(grad_and_value(member_loss))``. It returns
# the gradients as tensors, one row for each member, and leaves ``.grad`` alone.


def alone_losses_and_grads(models, points, labels):
    """Losses and stacked gradients of the loop over models."""
    losses, grads = [], []
    for model, x, y in zip(models, points, labels, strict=True):
        losses.append(F.binary_cross_entropy_with_logits(model(x), y))
        grads.append(torch.autograd.grad(losses[-1], model.parameters()))
    stacked = [torch.stack(rows) for rows in zip(*grads, strict=True)]
    return dict(zip(params, stacked, strict=True)) | {"losses": torch.stack(losses)}


def distances(state, reference):
    """Largest distance of each member's tensors, in float64: [num_models]."""
    differences = [
        (state[name].cpu().double() - x.cpu().double()).abs().reshape(len(x), -1)
        for name, x in reference.items()
    ]
    return torch.cat(differences, dim=1).amax(dim=1)


losses = ensemble_loss(params, own_points, own_labels)
losses.sum().backward()
by_backward = {name: p.grad for name, p in params.items()} | {"losses": losses}

frozen = {name: p.detach() for name, p in params.items()}  # no second graph
grads, losses = vmap(grad_and_value(member_loss))(frozen, own_points, own_labels)
by_transform = grads | {"losses": losses}

models64 = [copy.deepcopy(model).cpu().double() for model in models]
points64, labels64 = own_points.cpu().double(), own_labels.cpu().double()
exact = alone_losses_and_grads(models64, points64, labels64)
looped = alone_losses_and_grads(models, own_points, own_labels)
largest = max(x.abs().max().item() for x in exact.values())

loop_error = distances(looped, exact).max().item()
print(f"distance from float64, loop: {loop_error:.1e}")
for name, ours in [("sum().backward()", by_backward), ("grad_and_value", by_transform)]:
    error = distances(ours, exact).max().item()
    assert error <= 3 * max(loop_error, 1e-6 * largest), (
        f"{name}: losses or gradients are not those of the models alone; distance "
        f"from float64: loop {loop_error:.1e}, vmap {error:.1e}"
    )
    print(f"distance from float64, {name}: {error:.1e}")

# %%
# **When to prefer which.** ``sum().backward()`` works with every optimizer of
# ``torch.optim`` and adds to ``.grad`` as usual: it is the smallest change to a program
# that trains one model. ``grad_and_value`` gives you the gradients as values: take it
# when a rule for *one* member (its own clipping, its own learning rate, its own
# optimizer) is to run under ``vmap`` as well, as below and in
# ``plot_hyperparameter_sweep.py``. Detach the parameters first, as above: otherwise
# autograd records a second graph around the first.
#
# Check: some hundred steps
# -------------------------
#
# A first step proves little. Momentum, Adam's averages and every mistake below show
# only later. But after many steps you cannot expect equal bits: a batched matrix
# product adds in another order, each step rounds, and **training amplifies** what
# earlier steps rounded. A bound has to know by how much. The amplification can be
# measured without ``vmap``: train the same models alone once more, from weights that
# are moved by a tiny :math:`\delta`, and see how far apart the two runs end.
#
# .. math::
#
#    A = \frac{\max |w'_T - w_T|}{\delta}, \qquad
#    \text{bound} = T \cdot A \cdot u \cdot \max |w_T|
#
# Each of the :math:`T` steps rounds weights to a relative :math:`u` (:math:`2^{-24}` in
# float32, :math:`2^{-53}` in float64), and each of these roundings grows by about
# :math:`A` until the end. Every member has an :math:`A` of its own: :math:`\delta`
# times a normal random number moves each weight, three times, and the largest growth
# counts. It is an order of magnitude, and other draws give others. It takes for granted
# that an error made later grows no more than one made at the start, and that gradients
# are rounded no worse than weights. A mistake is many orders of magnitude away from it.

num_steps = 200
delta = 1e-9
optimizers = {
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
}


def train_each_alone(models, make_optimizer, points, labels, num_steps, moved_by=0.0):
    """Train copies of all models, one after the other; return their stacked state."""
    trained = [copy.deepcopy(model) for model in models]
    for model, x, y in zip(trained, points, labels, strict=True):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(moved_by * torch.randn_like(p))
        train_alone(model, make_optimizer, x, y, num_steps)
    return {name: p.detach() for name, p in stack_module_state(trained)[0].items()}


def equal_bits(state, other):
    """Number of members whose tensors are equal bit by bit in both states."""
    return sum(
        all(torch.equal(state[name][member], x[member]) for name, x in other.items())
        for member in range(num_models)
    )


print(f"{num_models} members, {num_steps} steps. Largest distance of trained weights")
print("from those trained alone in float64")
print("optimizer          dtype    alone  together  equal bits      A  members proved")
bounds, exact_ends = {}, {}
for name, make_optimizer in optimizers.items():
    task64 = make_optimizer, points64, labels64, num_steps
    exact = train_each_alone(models64, *task64)
    growth = torch.zeros(num_models)
    for _ in range(3):
        moved = train_each_alone(models64, *task64, moved_by=delta)
        growth = torch.maximum(growth, distances(moved, exact) / delta)
    zeros = {key: torch.zeros_like(p) for key, p in exact.items()}
    heaviest = distances(exact, zeros)  # [8]: the largest weight of each member
    room = num_steps * growth * heaviest  # the bound is this times u
    bounds[name], exact_ends[name] = room * 2**-53, exact

    task32 = make_optimizer, own_points, own_labels, num_steps
    looped32 = train_each_alone(models, *task32)
    for dtype, u, started, task, alone in [
        ("float64", 2**-53, models64, task64, exact),
        ("float32", 2**-24, models, task32, looped32),
    ]:
        params, _ = stack_module_state(started)
        train_together(params, *task)
        error, bound = distances(params, exact), room * u
        sharp = bound < 0.01 * heaviest  # a wider bound would prove nothing
        assert (error[sharp] <= bound[sharp]).all(), (
            f"{name}, {dtype}: a weight trained together is {error.max():.1e} from the "
            f"weight trained alone, more than rounding explains"
        )
        assert sharp.all() or dtype == "float32", f"{name}: float64 proves nothing"
        equal = f"{equal_bits(params, alone)} of {num_models}"
        proved = f"{sharp.sum()} of {num_models}"
        print(
            f"{name:18} {dtype} {distances(alone, exact).max():.1e}   {error.max():.1e}"
            f"  {equal:>10}  {growth.max():.0e}  {proved:>14}"
        )

# %%
# The float64 rows are the proof: all members are within their bounds, at distances in
# the last digits, while a mistake changes the first ones, as you see further down.
# Equal bits are more than you can ask for; some machines and layers give them. The
# float32 rows say how much of a training survives in float32 at all: the loop itself is
# that far from its own float64 run, so this is the price of float32 and not of
# ``vmap``. Where the bound is more than a hundredth of the weights it proves nothing,
# and that member is not counted: compare in float64, or after fewer steps.
#
# Look: what the members learned
# ------------------------------
#
# Now 64 members, twice, with Adam: once all on the same points, so that they differ in
# their initialization only, and once each on its own sample. The first case changes one
# argument: ``in_dims=(0, None, None)`` shares the data. A map of the square shows what
# a member thinks of every place.

num_members = 64
make_adam = optimizers["Adam"]
models = [MLP().to(device) for _ in range(num_members)]
rows = torch.randint(num_points, (num_members, num_points))

shared_loss = vmap(member_loss, in_dims=(0, None, None))
same, _ = stack_module_state(models)
train_together(same, make_adam, points, labels, 300, loss=shared_loss)
own, _ = stack_module_state(models)  # the same initial weights
train_together(own, make_adam, points[rows], labels[rows], 300)


def member_logits(params, points):
    """Logits of one member."""
    return functional_call(skeleton, params, (points,), strict=True)


side = 60
axis = torch.linspace(-1.5, 1.5, side, device=device)
grid = torch.cartesian_prod(axis, axis)  # [3600, 2]
predict = vmap(member_logits, in_dims=(0, None))
ensembles = {"same data": same, "bootstrapped": own}
with torch.no_grad():
    maps = {
        name: predict(state, grid).sigmoid().view(num_members, side, side).cpu()
        for name, state in ensembles.items()
    }  # [64, 60, 60]: member, x, y

ink = plt.rcParams["text.color"]
# Two colors that fade to nothing where a member is undecided.
colors = [("C0", 0.8), ("C0", 0), ("C1", 0), ("C1", 0.8)]
certain = LinearSegmentedColormap.from_list("certain", colors)
square = {"origin": "lower", "extent": [-1.5, 1.5, -1.5, 1.5], "interpolation": "none"}
drawn = 4
every = torch.arange(num_points, device=device)
fig, axes = plt.subplots(2, drawn, figsize=(5.6, 3.5), layout="constrained")
for panels, (name, probabilities) in zip(axes, maps.items(), strict=True):
    for member, ax in enumerate(panels):
        surface = probabilities[member].T.tolist()
        ax.imshow(surface, cmap=certain, vmin=0, vmax=1, **square)
        kept = rows[member].unique() if name == "bootstrapped" else every
        for label, dot in [(0, "o"), (1, "^")]:
            x, y = points[kept][labels[kept] == label].T.tolist()
            ax.plot(x, y, dot, color=ink, markersize=1.5)
        ax.set(xticks=[], yticks=[], title=f"member {member}")
    panels[0].set_ylabel(name)
fig.suptitle(
    f"Decision surfaces of four members and the points that each has seen\n"
    f"{device_names[device]}, float32",
    fontsize=10,
)


def disagreement(named):
    """Share of places to which two members, of all pairs, give different classes."""
    first = named.double().mean(dim=0)  # share of members that name the second class
    pairs = num_members / (num_members - 1)
    return (2 * first * (1 - first)).mean().item() * pairs


on_map = {name: disagreement(p > 0.5) for name, p in maps.items()}
print("two members name different classes         on the map  on the training points")
for name, state in ensembles.items():
    with torch.no_grad():
        on_points = disagreement((predict(state, points) > 0).cpu())
    print(f"{name:42} {on_map[name]:10.1%}  {on_points:22.1%}")
fig.set_label(
    f"Maps of the square around the two spirals, colored by the class that a member "
    f"gives to each place, for {drawn} members trained on the same points (top) and "
    f"{drawn} members trained on bootstrapped points (bottom). Two of all members name "
    f"different classes on {on_map['same data']:.0%} of the map if trained on the same "
    f"points, on {on_map['bootstrapped']:.0%} if bootstrapped."
)

# %%
# Members with the same data have seen the same points, so they differ mostly between
# them. A bootstrapped member missed some points, and there it may differ as well: the
# last column says how much more.
#
# Where the ensemble is unsure
# ----------------------------
#
# The spread of the members' probabilities shows it on one map. New points from the
# same spirals say how good the two ensembles are.

doubt = {name: p.std(dim=0) for name, p in maps.items()}  # [60, 60]
fade = LinearSegmentedColormap.from_list("fade", [("C3", 0), "C3"])
fig, axes = plt.subplots(1, 2, figsize=(5.6, 3.2), layout="constrained", sharey=True)
for ax, (name, spread) in zip(axes, doubt.items(), strict=True):
    image = ax.imshow(spread.T.tolist(), cmap=fade, vmin=0, vmax=0.5, **square)
    for label, dot in [(0, "o"), (1, "^")]:
        x, y = points[labels == label].T.tolist()
        ax.plot(x, y, dot, color=ink, markersize=2)
    ax.set(title=name, xlabel="first input")
axes[0].set_ylabel("second input")
fig.colorbar(image, ax=axes, label="standard deviation\nof the probability")
fig.suptitle(
    f"Where {num_members} members disagree\n{device_names[device]}, float32",
    fontsize=10,
)

unsure = {name: (spread > 0.2).double().mean().item() for name, spread in doubt.items()}
fig.set_label(
    f"Two maps of the disagreement of {num_members} members. Members with the same "
    f"data disagree by more than 0.2 on {unsure['same data']:.0%} of the square, "
    f"bootstrapped members on {unsure['bootstrapped']:.0%}."
)

new_points, new_labels = spirals(2000)
print("2,000 new points      unsure   accuracy            log loss")
print("                   on the map  ensemble (member)   ensemble (member)")
log_loss = {}
for name, state in ensembles.items():
    with torch.no_grad():
        logits = predict(state, new_points.to(device))  # [64, 2000]
    probability = logits.cpu().double().sigmoid()
    right = [
        ((p > 0.5) == (new_labels > 0.5)).double().mean(dim=-1).mean().item()
        for p in (probability.mean(dim=0), probability)
    ]
    lost = [
        F.binary_cross_entropy(p, new_labels.double().expand_as(p)).item()
        for p in (probability.mean(dim=0), probability)
    ]
    log_loss[name] = lost[0]
    print(
        f"{name:17} {unsure[name]:10.0%}  {right[0]:8.1%} ({right[1]:6.1%})   "
        f"{lost[0]:8.3f} ({lost[1]:6.3f})"
    )
better = min(log_loss, key=log_loss.get)
print(f"The ensemble with the lower log loss here: {better}.")

# %%
# The log loss of the mean probability can never exceed the mean of the members' log
# losses (Jensen's inequality). Which of the two ensembles is better is not settled by a
# theorem: resampling makes members more different *and* each of them worse, since it
# sees fewer points. For deep networks Lakshminarayanan et al. (2017) found that
# resampling made the ensemble worse. Resample when you want to know how much the *data*
# decide.
#
# Measure: the price of one more member
# -------------------------------------
#
# One step is: losses, backward, Adam. The loop does it model by model, each with its
# own Adam. Together, the number of kernels and of Python calls does not depend on the
# number of members, so small ensembles should cost what one model costs, until the
# arithmetic takes longer than the calls. From there on each further member has a price.


largest_loop = 1000  # models


def build(size, where):
    """What one step needs: models, stacked state, data and both kinds of optimizer."""
    models = [MLP().to(where) for _ in range(size)]
    params, _ = stack_module_state(models)
    rows = torch.randint(num_points, (size, num_points), device=where)
    return {
        "models": models,
        "params": params,
        "points": points.to(where)[rows],
        "labels": labels.to(where)[rows],
        "optimizers": [make_adam(m.parameters()) for m in models[:largest_loop]],
        "optimizer": make_adam(params.values()),
    }


def step_alone(models, optimizers, points, labels):
    for model, optimizer, x, y in zip(models, optimizers, points, labels, strict=True):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x), y).backward()
        optimizer.step()


def step_together(loss, params, optimizer, points, labels):
    optimizer.zero_grad()
    loss(params, points, labels).sum().backward()
    optimizer.step()


def measure(statement, scope, seconds=0.5):
    """Quartiles of the time of one call [ms] and the number of values."""
    timer = Timer(statement, globals=scope, num_threads=num_threads)
    runs = timer.blocked_autorange(min_run_time=seconds).times
    return *(1e3 * torch.tensor(runs).quantile(quartiles)).tolist(), len(runs)


quartiles = torch.tensor([0.25, 0.5, 0.75])
sizes = {where: [1, 3, 10, 30, 100, 300, 1000, 3000] for where in device_names}
if device != cpu:
    sizes[device] = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000]
statements = {
    "loop": "step_alone(models, optimizers, points, labels)",
    "vmap": "step_together(loss, params, optimizer, points, labels)",
}

times = {}  # (device, statement, size) -> first quartile, median, third quartile [ms]
print("One step of Adam on 100 points a member, float32, autograd on")
for where, device_name in device_names.items():
    print(f"{device_name}: milliseconds, median (interquartile range, values)")
    print("models                 loop                 vmap")
    for size in sizes[where]:
        scope = build(size, where) | {"loss": ensemble_loss}
        scope |= {"step_alone": step_alone, "step_together": step_together}
        print(f"{size:6}", end="")
        for name, statement in statements.items():
            if name == "loop" and size > largest_loop:
                print(f"{'not measured':>21}", end="")
                continue
            seconds = 0.5 if size < 1000 else 2.5
            *times[where, name, size], count = measure(statement, scope, seconds)
            low, median, high = times[where, name, size]
            print(f"{f'{median:.2f} ({high - low:.2f}, {count})':>21}", end="")
        print()

# %%
# Look
# ----

panels = len(device_names)
fig, _ = plt.subplots(panels, 1, figsize=(5.6, 4 * panels), layout="constrained")
findings = []
for ax, (where, device_name) in zip(fig.axes, device_names.items(), strict=True):
    for name, color, marker in [("loop", "C0", "o"), ("vmap", "C1", "^")]:
        reached = [size for size in sizes[where] if (where, name, size) in times]
        curve = torch.tensor([times[where, name, size] for size in reached])
        low, median, high = curve.T.tolist()
        ax.loglog(reached, median, color=color, marker=marker, label=name)
        ax.fill_between(reached, low, high, color=color, alpha=0.2)
    ax.set_title(f"One training step of an ensemble of MLPs, float32\n{device_name}")
    ax.set_xlabel("number of models")
    ax.set_ylabel("time of one step [ms]")
    ax.set_xticks(sizes[where], labels=[f"{size:,}" for size in sizes[where]])
    ax.yaxis.set_major_locator(LogLocator())
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.grid(True, alpha=0.3)
    one = times[where, "vmap", 1][1]
    steep = [size for size in sizes[where] if times[where, "vmap", size][1] > 2 * one]
    flat = max(size for size in sizes[where] if size < min(steep, default=math.inf))
    first, last = sizes[where][-2:]
    rise = times[where, "vmap", last][1] - times[where, "vmap", first][1]
    price = 1e3 * rise / (last - first)
    alone = 1e3 * times[where, "loop", largest_loop][1] / largest_loop
    ratio = (
        times[where, "loop", largest_loop][1] / times[where, "vmap", largest_loop][1]
    )
    findings.append(
        f"{device_name}: up to {flat:,} models a step takes no more than twice "
        f"the time of one; from {first:,} to {last:,} models each further model costs "
        f"{price:.1f} microseconds, in the loop {alone:.0f}; {largest_loop:,} models "
        f"train {max(ratio, 1 / ratio):.1f}x "
        f"{'faster' if ratio > 1 else 'slower'} in one call."
    )
fig.axes[0].legend()
fig.set_label(
    "Time of one training step against the number of models, loop and vmap, both axes "
    f"logarithmic, one panel for each device. {' '.join(findings)}"
)

# %%
# Reading the figure
# ------------------

print(*findings, sep="\n")

# %%
# The loop rises from the start: it pays its calls for every model. **Where vmap is
# flat**, its calls take longer than its arithmetic, and a further model costs next to
# nothing. **Where vmap rises as well**, its arithmetic takes longer; the distance of
# the lines compares calls and arithmetic of one model alone with its share in the one
# call. Where it gets steeper still, its tensors have usually outgrown the cache. For
# networks with more work in each call the lines come closer, and ``vmap`` can lose:
# ``plot_when_vmap_pays.py`` shows where.
#
# Four mistakes that raise no error
# ---------------------------------
#
# **The mean over members.** ``.mean()`` in place of ``.sum()`` divides every member's
# gradient by the number of members. For SGD that is a learning rate ``num_models``
# times smaller. Adam divides each gradient by its own size, so the factor cancels, all
# but its ``eps``: the mistake is the same as an ``eps`` that is ``num_models`` times
# larger. Both can be checked in float64: run the changed rule with the sum. (With eight
# members the distance may be zero, because a division by eight does not round.)
# This is why the mistake lives on in code that uses Adam, until somebody tries SGD,
# clips gradients, or trains until gradients are as small as ``eps``.

equivalents = {
    "SGD with momentum": lambda params: torch.optim.SGD(
        params, lr=0.3 / num_models, momentum=0.9
    ),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01, eps=num_models * 1e-8),
}
print("distance of weights  from training alone  from the changed rule")
for name, make_optimizer in optimizers.items():
    task = points64, labels64, num_steps
    wrong, _ = stack_module_state(models64)
    train_together(wrong, make_optimizer, *task, total=torch.mean)
    equivalent, _ = stack_module_state(models64)
    train_together(equivalent, equivalents[name], *task)
    off = distances(wrong, exact_ends[name]).min().item()
    left = distances(wrong, equivalent).max().item()
    assert left <= bounds[name].max() < off, (
        f"{name}: the mean of the losses does not change the rule as this page says: "
        f"{off:.1e} from training alone, {left:.1e} from the changed rule"
    )
    print(f"{name:20} {f'at least {off:.1e}':>20} {f'at most {left:.1e}':>22}")

# %%
# **One clip for all.** ``clip_grad_norm_`` over stacked parameters takes *one* norm
# over all members. Here one member has gone astray: the weights of its last layer are a
# hundred times too large. Its gradient decides for all, and everybody's step shrinks.
# Clipping for each member is a rule for one member, so write it for one and let
# ``vmap`` do the rest.

max_norm = 1.0


def clip(grads):
    """Gradients of one member, scaled as clip_grad_norm_ scales those of one model."""
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    return {name: g * factor for name, g in grads.items()}


def member_norms(grads):
    """Norm of each member's gradient: [num_models]."""
    return torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)


astray = [copy.deepcopy(model) for model in models64]
with torch.no_grad():
    astray[0].fc3.weight *= 100
params, _ = stack_module_state(astray)
frozen = {name: p.detach() for name, p in params.items()}
grads, _ = vmap(grad_and_value(member_loss))(frozen, points64, labels64)
for name, p in params.items():
    p.grad = grads[name].clone()
nn.utils.clip_grad_norm_(params.values(), max_norm)
for_all = {name: p.grad for name, p in params.items()}
left = (member_norms(for_all) / member_norms(grads))[1:].max()
assert left < 0.1, f"one clip for all leaves {left:.0%} of another member's gradient"

clipped = vmap(clip)(grads)

alone = []
for model, x, y in zip(astray, points64, labels64, strict=True):
    model.zero_grad()
    F.binary_cross_entropy_with_logits(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    alone.append([p.grad for p in model.parameters()])
alone = [torch.stack(rows) for rows in zip(*alone, strict=True)]
alone = dict(zip(params, alone, strict=True))
error = distances(clipped, alone).max().item()
assert error <= 1e-12, (  # some thousand roundings of float64
    f"clipping under vmap is not clipping each model alone: {error:.1e} apart"
)

stages = {"no clip": grads, "one clip for all": for_all, "a clip for each": clipped}
print("norm of each member's gradient; member 0 has gone astray")
for name, state in stages.items():
    print(f"{name:17}", *[f"{norm:7.4f}" for norm in member_norms(state).tolist()])

# %%
# **Stacking inside the loop.** ``stack_module_state`` copies. Called in every step, it
# makes new tensors from the old models each time: the gradients land there, and the
# tensors of the optimizer never get any.
#
# **Giving the optimizer the old modules.** The same from the other side: the stacked
# copies get gradients, the modules' own parameters none.
#
# An optimizer skips what has no gradient, so both run without a word, and the losses
# stay where they were. The check to lift out stands after ``backward``: does every
# tensor of the optimizer have a gradient?


def count_without_grad(optimizer):
    """Number of the optimizer's tensors that got no gradient."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    return sum(p.grad is None for p in tensors)


def losses_of_run(params, optimizer, restack):
    """Sum of losses before the first and after the tenth step."""
    losses = []
    for _ in range(11):
        if restack:
            params, _ = stack_module_state(models64)
        optimizer.zero_grad()
        loss = vmap(member_loss)(params, points64, labels64).sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses[0], losses[-1]


old_parameters = [p for model in models64 for p in model.parameters()]
stacked = [stack_module_state(models64)[0] for _ in range(3)]
runs = {
    "right": (stacked[0], make_adam(stacked[0].values()), False),
    "stacking in the loop": (stacked[1], make_adam(stacked[1].values()), True),
    "the old modules": (stacked[2], make_adam(old_parameters), False),
}
print("10 steps                sum of losses        tensors without gradient")
for name, (params, optimizer, restack) in runs.items():
    before, after = losses_of_run(params, optimizer, restack)
    missing = count_without_grad(optimizer)
    total = sum(len(group["params"]) for group in optimizer.param_groups)
    moved = before != after
    assert moved == (missing == 0) == (name == "right"), (
        f"{name}: the losses {'move' if moved else 'stay'}, but {missing} of {total} "
        f"tensors of the optimizer have no gradient"
    )
    print(f"{name:22} {before:.4f} -> {after:.4f}     {missing:3} of {total}")

# %%
# Compiled
# --------
#
# The step above calls its kernels one by one. ``torch.compile`` makes fewer of them,
# forward and backward, and the change is one line. ``fused=True`` does the same
# for Adam. A compiler may round differently, so its gradients pass the check of the
# first step. It compiles for one size: a new number of members, or of points, compiles
# again. It needs a C++ compiler; without one this part says so and measures the rest.

compiled_sizes = [10, 1000]
compiled_loss = None
if compiler:
    with warnings.catch_warnings():  # torch uses deprecated parts of itself
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled_loss = torch.compile(vmap(member_loss), dynamic=False)
else:
    print("No C++ compiler was found: the compiled variants are left out.")

print(f"One step, {device_names[device]}, float32, autograd on")
print("milliseconds: median (interquartile range, values); distance from float64")
print("way                    models                time  distance")
medians = {}
for size in compiled_sizes:
    scope = build(size, device) | {"step_together": step_together}
    data = scope["points"], scope["labels"]
    looped = alone_losses_and_grads(scope["models"], *data)
    exact = alone_losses_and_grads(
        [copy.deepcopy(model).cpu().double() for model in scope["models"]],
        *[x.cpu().double() for x in data],
    )
    loop_error = distances(looped, exact).max().item()
    largest = max(x.abs().max().item() for x in exact.values())
    for name, loss in {"eager": ensemble_loss, "compiled": compiled_loss}.items():
        if loss is None:
            continue
        params, _ = stack_module_state(scope["models"])
        start = time.perf_counter()
        losses = loss(params, *data)
        losses.sum().backward()
        got = {key: p.grad for key, p in params.items()} | {"losses": losses.detach()}
        error = distances(got, exact).max().item()
        first = time.perf_counter() - start
        assert error <= 3 * max(loop_error, 1e-6 * largest), (
            f"{name}, {size} models: a gradient is {error:.1e} off from float64"
        )
        for adam, options in {"Adam": {}, "fused Adam": {"fused": True}}.items():
            scope |= {"params": params, "loss": loss}
            scope["optimizer"] = torch.optim.Adam(params.values(), lr=0.01, **options)
            low, median, high, count = measure(statements["vmap"], scope)
            medians[f"{name}, {adam}", size] = median
            shown = f"{median:.2f} ({high - low:.2f}, {count})"
            print(f"{name + ', ' + adam:22} {size:6} {shown:>19}  {error:8.1e}")
        if name == "compiled":
            print(
                f"{'':22} {size:6} the first call, which compiles, took {first:.1f} s"
            )

for size in compiled_sizes:
    plain, *others = [name for name, n in medians if n == size]
    fastest = min(others, key=lambda name: medians[name, size])
    ratio = medians[plain, size] / medians[fastest, size]
    print(
        f"{size} models: the best other way is {fastest}, {max(ratio, 1 / ratio):.2f}x "
        f"{'faster' if ratio > 1 else 'slower'} than {plain}"
    )

# %%
# **Where the compiled step gains much**, the eager step spent its time between the
# kernels: small ensembles, and fast devices. **Where it gains little**, matrix products
# fill the time, and those are the same library calls in both. The time of the first
# call is the price, which a short training may not earn back.
#
# Remember
# --------
#
# - Write the loss of one member, ``vmap`` it, ``.sum()`` the losses, and give the
#   optimizer the stacked tensors: that trains every member as if it were alone.
# - Rules that look at one number at a time (SGD, momentum, Adam, weight decay) need no
#   change. Rules that look at a whole gradient, such as clipping its norm, mix members:
#   write them for one member, under ``vmap``.
# - Prove it in float64, with a bound that knows how much training amplifies rounding.
#   In float32 even the loop drifts away from its own float64 run.
# - After the first ``backward``, check that every tensor of the optimizer has a
#   gradient.
#
# **Next**: ``plot_hyperparameter_sweep.py`` gives every member its own learning rate;
# ``plot_state.py`` adds batch normalization and dropout; ``plot_saving.py`` keeps what
# you trained.
#
# References
# ----------
#
# - W. Whitney (2021), `Parallelizing neural networks on one GPU with JAX
#   <http://willwhitney.com/parallel-training-jax.html>`_: spirals, bootstrapped
#   ensembles, and the idea that one changed argument gives every network its own data.
# - B. Lakshminarayanan, A. Pritzel, C. Blundell (2017), *Simple and Scalable Predictive
#   Uncertainty Estimation using Deep Ensembles*,
#   `arXiv:1612.01474 <https://arxiv.org/abs/1612.01474>`_.
# - D. P. Kingma, J. Ba (2014), *Adam: A Method for Stochastic Optimization*,
#   `arXiv:1412.6980 <https://arxiv.org/abs/1412.6980>`_.
# - Questions that this page answers: "models are not optimizing",
#   `pytorch#120581 <https://github.com/pytorch/pytorch/issues/120581>`_; can one train
#   with vmap, `functorch#782 <https://github.com/pytorch/functorch/issues/782>`_;
#   truly parallel ensemble layers,
#   `pytorch#54147 <https://github.com/pytorch/pytorch/issues/54147>`_.
