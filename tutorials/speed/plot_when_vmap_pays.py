"""
When vmap pays: a map of the break-even
=======================================

Measure on your own machine for which numbers of models and which batch sizes one
call to ``torch.func.vmap`` beats a loop over the models, explain the result by an
overhead and a rate of work for each side, and predict sizes that you did not measure.

**What you will learn**

- how the gain from ``vmap`` changes with the number of models, the batch size, the
  network, and with the backward pass;
- how to read from two fitted numbers a side where the break-even lies;
- what one more model costs, in the loop and in the single call;
- how to notice that such a model of the time fails, and what that means.

**Before you start**, read ``plot_ensembling.py``: it explains the three functions
that turn ten models into one call. No GPU is needed.
"""

# %%
# Set-up
# ------
#
# The sizes are chosen for the device. A CPU with few cores reaches the end of its
# gains early and gets the small grid. On NVIDIA GPUs the default for convolutions is
# TF32; we ask for IEEE float32, because this page also compares results. The loop and
# ``vmap`` use the same setting.

import platform

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
num_threads = torch.get_num_threads()
device_names = {cpu: f"CPU ({platform.machine()}, {num_threads} threads)"}
if device.type == "cuda":
    device_names[device] = torch.cuda.get_device_name(device)
elif device != cpu:
    device_names[device] = device.type

conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
default_precision = conv.fp32_precision, matmul.fp32_precision
conv.fp32_precision = matmul.fp32_precision = "ieee"

# (network, kind of device) -> numbers of models, batch sizes
sizes = {
    ("MLP", "cpu"): ([1, 4, 16, 64, 256, 512], [1, 4, 16, 64, 256]),
    ("CNN", "cpu"): ([1, 2, 3, 4, 8, 16], [1, 2, 4, 8, 16]),
    ("MLP", "accelerator"): ([1, 4, 16, 64, 256, 1024, 4096], [1, 4, 16, 64, 256]),
    ("CNN", "accelerator"): ([1, 2, 5, 10, 20, 50, 100], [1, 4, 16, 64, 128]),
}
# network -> number of models and batch size to predict; in none of the grids
held_out = {"MLP": (100, 24), "CNN": (10, 6)}

print(
    f"{' and '.join(device_names.values())}, torch {torch.__version__}, "
    f"{torch.get_default_dtype()}, precision {conv.fp32_precision} (convolutions) and "
    f"{matmul.fp32_precision} (matrix products)"
)

# %%
# Two networks
# ------------
#
# A small perceptron, as in reinforcement learning or on tables, and the CNN of
# ``plot_ensembling.py``. They differ most in the arithmetic for one sample, which
# ``FlopCounterMode`` counts.


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 32)
        self.fc3 = nn.Linear(32, 1)

    def forward(self, x):  # [batch, 16]
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))  # [batch, 1]


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):  # [batch, 1, 28, 28]
        x = F.relu(self.conv1(x))  # [batch, 32, 26, 26]
        x = F.relu(self.conv2(x))  # [batch, 64, 24, 24]
        x = torch.flatten(F.max_pool2d(x, 2), 1)  # [batch, 9216]
        return self.fc2(F.relu(self.fc1(x)))  # [batch, 10]


networks = {"MLP": MLP, "CNN": CNN}
sample_shapes = {"MLP": [16], "CNN": [1, 28, 28]}

for name, network in networks.items():
    model = network()
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, *sample_shapes[name]))
    print(
        f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{counter.get_total_flops():,} floating-point operations a sample"
    )

# %%
# Four statements
# ---------------
#
# Every model gets a minibatch of its own. We compare two tasks: **forward**, the
# predictions with autograd off, and **forward and backward**, the loss and the
# gradient of every model. The loss is the mean square of the outputs; its form does
# not matter for the time.
#
# The backward pass of the single call starts from the *sum* of the losses. No loss
# depends on the parameters of another model, so each model receives its own
# gradient.


def set_up(name, num_models, batch, where):
    """Statements for one network and size, as functions without arguments.

    Returned are the four that we compare, a mistake for the end of this page, and the
    models with their minibatches.
    """
    models = [networks[name]().to(where) for _ in range(num_models)]
    minibatches = torch.randn(num_models, batch, *sample_shapes[name], device=where)
    weights = [list(model.parameters()) for model in models]
    params, buffers = stack_module_state(models)
    with torch.device("meta"):
        skeleton = networks[name]()

    def predict(params, buffers, x):
        return functional_call(skeleton, (params, buffers), (x,), strict=True)

    def loss(params, buffers, x):
        return predict(params, buffers, x).square().mean()

    ensemble, losses = vmap(predict), vmap(loss)

    def loop_forward():
        with torch.no_grad():
            pairs = zip(models, minibatches, strict=True)
            return torch.stack([model(x) for model, x in pairs])

    def vmap_forward():
        with torch.no_grad():
            return ensemble(params, buffers, minibatches)

    def loop_backward():
        return [
            torch.autograd.grad(model(x).square().mean(), weight)
            for model, weight, x in zip(models, weights, minibatches, strict=True)
        ]

    def vmap_backward():
        total = losses(params, buffers, minibatches).sum()
        return torch.autograd.grad(total, list(params.values()))

    def stack_and_call():
        with torch.no_grad():
            return ensemble(*stack_module_state(models), minibatches)

    statements = {
        ("forward", "loop"): loop_forward,
        ("forward", "vmap"): vmap_forward,
        ("forward and backward", "loop"): loop_backward,
        ("forward and backward", "vmap"): vmap_backward,
    }
    return statements, stack_and_call, (models, minibatches)


tasks = ["forward", "forward and backward"]

# %%
# Check: both sides compute the same
# ----------------------------------
#
# The judge is a loop in float64. Every tensor, the outputs and the gradient of every
# parameter, is compared by its largest error, in units of its largest exact value.
# ``vmap`` may be three times as far from float64 as the loop is, or as eight times the
# spacing of float32 numbers, if the loop happens to be nearer than that.
# ``plot_how_equal.py`` explains such bounds.


def errors(results, exact):
    """Largest error of each tensor, in units of its largest exact value."""
    pairs = zip(results, exact, strict=True)
    return torch.stack(
        [(x.cpu().double() - e).abs().max() / e.abs().max() for x, e in pairs]
    )


for where in device_names:
    for name, (num_models, batch) in held_out.items():
        statements, _, (models, minibatches) = set_up(name, num_models, batch, where)
        gradients = statements[tasks[1], "loop"]()
        looped = [torch.stack(members) for members in zip(*gradients, strict=True)]
        vectorized = statements[tasks[1], "vmap"]()
        looped = [statements[tasks[0], "loop"](), *looped]
        vectorized = [statements[tasks[0], "vmap"](), *vectorized]

        models = [model.cpu().double() for model in models]
        data = minibatches.cpu().double()
        outputs = [model(x) for model, x in zip(models, data, strict=True)]
        gradients = [
            torch.autograd.grad(output.square().mean(), list(model.parameters()))
            for output, model in zip(outputs, models, strict=True)
        ]
        exact = [torch.stack(outputs).detach()]
        exact += [torch.stack(members) for members in zip(*gradients, strict=True)]

        loop_errors, vmap_errors = errors(looped, exact), errors(vectorized, exact)
        allowed = 3 * loop_errors.clamp(min=8 * torch.finfo(torch.float32).eps)
        worst = (vmap_errors / allowed).argmax()
        assert (vmap_errors <= allowed).all(), (
            f"{name}: vmap does not compute what the loop computes; relative distance "
            f"from float64 of result {worst} (0: outputs, then gradients): "
            f"loop {loop_errors[worst]:.1e}, vmap {vmap_errors[worst]:.1e}"
        )
        print(
            f"{name}, {num_models} models, batch {batch}, {where.type}: largest "
            f"distance from float64, outputs and {len(exact) - 1} gradients: "
            f"loop {loop_errors.max():.1e}, vmap {vmap_errors.max():.1e}"
        )

# %%
# What should happen: two numbers for each side
# ---------------------------------------------
#
# Let :math:`N` be the number of models and :math:`B` the batch size. The loop calls
# every operator once a model. Each round costs an overhead :math:`o`, whatever the
# batch, and work :math:`w` for each sample:
#
# .. math:: T_\text{loop} = N \, (o_\text{loop} + w_\text{loop} \, B)
#
# The single call pays one overhead, a larger one, for all models:
#
# .. math:: T_\text{vmap} = o_\text{vmap} + w_\text{vmap} \, N B
#
# Set both equal, and the break-even is at
#
# .. math::
#
#    N^* = \frac{o_\text{vmap}}{o_\text{loop} - (w_\text{vmap} - w_\text{loop}) \, B}
#
# Three consequences can be read off before any measurement:
#
# - One more model costs the loop :math:`o_\text{loop} + w_\text{loop} B`, and ``vmap``
#   only :math:`w_\text{vmap} B`.
# - If a sample costs ``vmap`` no more than the loop, ``vmap`` wins for every batch
#   size, from some number of models on.
# - If a sample costs ``vmap`` more, the denominator reaches zero at a batch size
#   :math:`B^* = o_\text{loop} / (w_\text{vmap} - w_\text{loop})`. From there on no
#   number of models pays.
#
# For the MLP the overhead should decide: its arithmetic takes less time than starting
# it. For the CNN the work should decide from small batches on.
#
# Measure
# -------
#
# The timer uses all threads. A first short run warms up and finds how often to repeat;
# it is not counted. Every value is the mean of a block of calls; a cell of the table is
# the median of its values. The last line of each table says how much they scatter.

times = {}  # (device, network, task, side) -> medians [ms], [models, batches]
held_out_times = {}  # the same keys -> median [ms] of the size to predict


def measure(statement):
    """Median time of one call [ms], relative interquartile range, number of values."""
    timer = Timer(
        "statement()", globals={"statement": statement}, num_threads=num_threads
    )
    rough = timer.blocked_autorange(min_run_time=0).median
    runs = timer.blocked_autorange(min_run_time=max(0.06, 4 * rough))
    return 1e3 * runs.median, runs.iqr / runs.median, len(runs.times)


for where, device_name in device_names.items():
    for name in networks:
        kind = "cpu" if where == cpu else "accelerator"
        model_counts, batches = sizes[name, kind]
        measured = {}
        for num_models in model_counts:
            for batch in batches:
                statements, _, _ = set_up(name, num_models, batch, where)
                for key, statement in statements.items():
                    measured.setdefault(key, []).append(measure(statement))
        statements, _, _ = set_up(name, *held_out[name], where)
        for (task, side), statement in statements.items():
            held_out_times[where, name, task, side] = measure(statement)[0]
        for (task, side), values in measured.items():
            medians = torch.tensor([median for median, _, _ in values])
            times[where, name, task, side] = medians.view(-1, len(batches)).double()
        for task in tasks:
            ratio = times[where, name, task, "loop"] / times[where, name, task, "vmap"]
            print(f"{name}, {task}, {device_name}: time of loop / time of vmap")
            print("models \\ batch", *[f"{batch:7}" for batch in batches])
            for num_models, row in zip(model_counts, ratio.tolist(), strict=True):
                print(f"{num_models:14}", *[f"{value:7.2f}" for value in row])
            values = measured[task, "loop"] + measured[task, "vmap"]
            spreads = torch.tensor([spread for _, spread, _ in values])
            print(
                f"interquartile range: {spreads.median():.1%} of the median in the "
                f"typical cell, {spreads.max():.0%} at most; "
                f"{min(n for _, _, n in values)} or more values a cell\n"
            )

# %%
# Look: the map
# -------------
#
# Orange means that ``vmap`` is faster, purple that the loop is. The black line is the
# break-even. Each row has a scale of its own.

for where, device_name in device_names.items():
    kind = "cpu" if where == cpu else "accelerator"
    fig, axes = plt.subplots(2, 2, figsize=(5.6, 5.6), layout="constrained")
    summary = []
    for row, name in zip(axes, networks, strict=True):
        model_counts, batches = sizes[name, kind]
        ratios = [
            times[where, name, task, "loop"] / times[where, name, task, "vmap"]
            for task in tasks
        ]
        limit = torch.stack(ratios).log2().abs().max().ceil().item()
        for ax, task, ratio in zip(row, tasks, ratios, strict=True):
            image = ax.imshow(
                ratio.log2().tolist(),
                cmap="PuOr_r",
                vmin=-limit,
                vmax=limit,
                origin="lower",
                aspect="auto",
                interpolation="none",
            )
            if ratio.min() < 1 < ratio.max():
                ax.contour(ratio.log2().tolist(), levels=[0], colors="black")
            ax.set_title(f"{name}, {task}")
            ax.set_xticks(range(len(batches)), batches)
            ax.set_yticks(range(len(model_counts)), model_counts)
            ax.set_xlabel("batch size")
            ax.set_ylabel("number of models")
            summary.append(
                f"{name}, {task}: ratio from {ratio.min():.2f} to {ratio.max():.2f}, "
                f"vmap faster in {(ratio > 1).sum()} of {ratio.numel()} cells."
            )
        bar = fig.colorbar(image, ax=row, aspect=15, ticks=[-limit, 0, limit])
        bar.set_label("time of loop / time of vmap")
        bar.ax.set_yticklabels([f"1/{2**limit:g}", "1", f"{2**limit:g}"])
    fig.suptitle(
        f"Time of loop / time of vmap, float32\n{device_name}", fontsize="medium"
    )
    fig.set_label(
        "Four color maps, MLP and CNN, forward and forward with backward: time of the "
        "loop divided by time of vmap over batch size and number of models, with a "
        f"contour where both are equal, on {device_name}. {' '.join(summary)}"
    )
    print(*summary, sep="\n")

# %%
# Explain: fit the two numbers
# ----------------------------
#
# For each network, task and side, the overhead and the work are fitted to all cells of
# the grid by least squares of the *relative* error, so that microseconds count as much
# as seconds. Two numbers then stand for a whole grid. The table says how well.

fits = {}  # (device, network, task, side) -> overhead [ms], work [ms a sample]


def terms(side, model_counts, batches):
    """Factors of overhead and work in the formulas above, [models, batches, 2]."""
    n = torch.tensor(model_counts, dtype=torch.float64)[:, None]
    samples = n * torch.tensor(batches, dtype=torch.float64)
    rounds = n if side == "loop" else torch.ones_like(n)
    return torch.stack([rounds.expand_as(samples), samples], dim=-1)


for where, device_name in device_names.items():
    kind = "cpu" if where == cpu else "accelerator"
    print(device_name)
    print(f"{'':30} overhead [us]  work [us/sample]  error: typical  largest")
    for (there, name, task, side), medians in times.items():
        if there != where:
            continue
        factors = terms(side, *sizes[name, kind])
        relative = (factors / medians[..., None]).flatten(0, 1)
        ones = torch.ones(len(relative), 1, dtype=torch.float64)
        fit = torch.linalg.lstsq(relative, ones).solution[:, 0]
        fits[where, name, task, side] = fit
        miss = ((factors @ fit) / medians).log2().abs().exp2() - 1
        print(
            f"{name} {task:21} {side} {1e3 * fit[0]:13.1f} {1e3 * fit[1]:17.3f} "
            f"{miss.median():15.0%} {miss.max():8.0%}"
        )
    print()

# %%
# The break-even follows from the fit. Then comes the real test: a size that is in
# none of the grids, and had no part in the fit.

for where, device_name in device_names.items():
    print(device_name)
    for name in networks:
        for task in tasks:
            loop_overhead, loop_work = fits[where, name, task, "loop"].tolist()
            vmap_overhead, vmap_work = fits[where, name, task, "vmap"].tolist()
            gain = loop_overhead + loop_work - vmap_work  # a model, at batch size 1
            few = f"from {vmap_overhead / gain:.1f} models on" if gain > 0 else "never"
            limit = "at every batch size, with enough models"
            if vmap_work > loop_work and gain > 0:
                limit = f"below {loop_overhead / (vmap_work - loop_work):.0f} samples"
            elif gain <= 0:
                limit = "at no larger batch size"
            print(
                f"{name}, {task:20}: at batch size 1 vmap pays {few}; it pays {limit}"
            )
    print(f"\n{'held out: models x batch':37} predicted [ms]  measured [ms]  miss")
    for (there, name, task, side), fit in fits.items():
        if there == where:
            num_models, batch = held_out[name]
            predicted = (terms(side, [num_models], [batch])[0, 0] @ fit).item()
            measured = held_out_times[where, name, task, side]
            size = f"{num_models} x {batch}"
            print(
                f"{name} {size:8} {task:20} {side} {predicted:13.2f} {measured:14.2f}"
                f"  {measured / predicted - 1:+.0%}"
            )
    print()

# %%
# **Where the fit is good**, overhead and work are all there is to know, and you can
# compute the break-even of other sizes from four numbers. **Where it misses by much**,
# the misses tell you what the two numbers leave out:
#
# - The rate of work is not one number. Small matrices use the processor badly, larger
#   ones better: for the loop this depends on the batch size alone, for ``vmap`` also on
#   the number of models.
# - Every parameter is read once a call, whatever the batch size. At batch size 1 that
#   is most of the work.
# - Memory, on a CPU. The single call makes tensors that are ``num_models`` times
#   larger. When they leave the cache, each sample costs more than before. On Linux the
#   C library also returns the memory of very large tensors to the system after each use
#   and asks for it again. Look in the corner of the map with many models and large
#   batches.
#
# What one more model costs
# -------------------------
#
# The figure shows the forward times as curves, at the batch size in the middle of the
# grid. The dashed lines are the fitted formulas.

looks = {
    "loop": {"color": "C0", "marker": "o"},
    "vmap": {"color": "C1", "marker": "^"},
}
for where, device_name in device_names.items():
    kind = "cpu" if where == cpu else "accelerator"
    fig, axes = plt.subplots(1, 2, figsize=(5.6, 3.6), layout="constrained")
    prices = []
    for ax, name in zip(axes, networks, strict=True):
        model_counts, batches = sizes[name, kind]
        middle = len(batches) // 2
        for side, look in looks.items():
            curve = times[where, name, "forward", side][:, middle].tolist()
            factors = terms(side, model_counts, [batches[middle]])[:, 0]
            fitted = (factors @ fits[where, name, "forward", side]).tolist()
            ax.loglog(model_counts, curve, label=side, **look)
            ax.loglog(model_counts, fitted, linestyle="--", color=look["color"])
            more = (curve[-1] - curve[-2]) / (model_counts[-1] - model_counts[-2])
            prices.append(
                f"{name}, batch {batches[middle]}, {side}: the first model costs "
                f"{1e3 * curve[0]:.0f} us, each of the last ones {1e3 * more:.1f} us."
            )
        ax.set_title(f"{name}, batch {batches[middle]}")
        ax.set_xlabel("number of models")
        ax.set_ylabel("time [ms]")
        ticks = [*model_counts[:-2], model_counts[-1]]  # room for the labels
        ax.set_xticks(ticks, ticks)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3) if name == "CNN" else (1,)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.grid(True, alpha=0.3)
    axes[0].legend()
    fig.suptitle(
        f"Forward, float32, no grad: measured (solid), fitted (dashed)\n{device_name}",
        fontsize="medium",
    )
    fig.set_label(
        "Two panels, MLP and CNN: time of a forward pass against the number of models, "
        "loop and vmap, both axes logarithmic, with dashed lines for the fitted "
        f"formulas, on {device_name}. {' '.join(prices)}"
    )
    print(device_name, *prices, sep="\n")

# %%
# Reading the figures
# -------------------
#
# **In the curves**, the loop rises from the start: each model costs
# :math:`o_\text{loop} + w_\text{loop} B`. The curve of ``vmap`` is flat while its one
# overhead is most of the time; there one more model is nearly free. Where it rises in
# proportion, one more model costs :math:`w_\text{vmap} B`, and the distance of the
# lines tends to the ratio of these two prices.
#
# **In the map**, go up and the overhead is shared by more models: ``vmap`` gains. Go
# right and the work grows while the overhead stays: the gain shrinks to the ratio of
# the rates. Where a sample costs ``vmap`` less than the loop, the contour falls toward
# larger batches; where it costs more, the contour rises and the right side belongs to
# the loop.
#
# **On a CPU** a network as small as this MLP is governed by the overhead at small
# batches. The CNN leaves that part after a few samples. **On a GPU** an operator takes
# about as long to start, but a sample takes far less work, so the contour should lie at
# larger networks and batches, if the library has a good kernel for what ``vmap`` asks
# for; a map made on one shows whether it does. ``plot_what_vmap_runs.py`` shows which
# operators that are.
#
# **The backward pass** calls more operators than the forward pass, and the loop pays
# for each of them in each round. Where the overhead decides, this adds to the gain;
# where the work decides, it need not. The lines below the map count the cells.
#
# When it goes wrong
# ------------------
#
# The most common way to lose the gain is to stack the parameters in every call. It is
# one line in the wrong place, the results are right, and the time is not:

for where, device_name in device_names.items():
    num_models, batch = held_out["MLP"]
    statements, stack_and_call, _ = set_up("MLP", num_models, batch, where)
    comparison = {
        "loop": statements["forward", "loop"],
        "vmap, stacked once": statements["forward", "vmap"],
        "vmap, stacked in every call": stack_and_call,
    }
    outputs = [statement() for statement in comparison.values()]
    message = "stacked in every call: vmap does not compute what the loop computes"
    torch.testing.assert_close(outputs[2], outputs[0], msg=message)
    print(f"{device_name}: {num_models} MLPs, batch {batch}, forward, no grad")
    for label, statement in comparison.items():
        median, spread, values = measure(statement)
        print(
            f"  {label:28} {median:7.2f} ms, interquartile range {spread:.0%} of it, "
            f"{values} values"
        )

conv.fp32_precision, matmul.fp32_precision = default_precision

# %%
# Stack once, keep the stack, and train the stack. The last line of the cell puts the
# precision back to what it was.
#
# Remember
# --------
#
# The loop pays an overhead for every model, ``vmap`` one for all. **So many small
# models on small batches gain most**, and there the backward pass adds to the gain.
# Where the work decides, the gain is the ratio of two rates, and ``vmap`` can lose.
# **Four numbers give the break-even of your network on your machine**: measure a grid,
# fit them, look at the misses.
#
# Next
# ----
#
# - ``plot_what_vmap_runs.py``: which operators the single call is made of.
# - ``plot_fastest_ensemble.py``: what to do where the work decides.
# - ``plot_memory.py``: smaller pieces, by ``chunk_size``, where tensors get too large.
#
# References
# ----------
#
# - The question, with networks and no answer in numbers:
#   `functorch#1061 <https://github.com/pytorch/functorch/issues/1061>`_,
#   `jax#15339 <https://github.com/jax-ml/jax/issues/15339>`_.
# - Stacking in every call:
#   `pytorch#120581 <https://github.com/pytorch/pytorch/issues/120581>`_.
# - W. Whitney: Parallelizing neural networks on one GPU with JAX, 2021,
#   `willwhitney.com <http://willwhitney.com/parallel-training-jax.html>`_: a hundred
#   small networks in the time of one, on a Titan X.
