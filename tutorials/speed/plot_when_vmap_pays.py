"""
When vmap pays: one call or a for loop
======================================

Find out in a minute, for your own models and on your own machine, whether one call to
``torch.func.vmap`` is faster than a for loop over the models.

**In short.** A loop pays the overhead of every operator once for each model and one
call pays it once, so **many small models gain most, and one model alone loses**. Where
each model already keeps the machine busy there is little to gain, and the call can be
slower: the block below measures which case is yours.

To know before: how many models become one call, in ``plot_ensembling.py``.
"""

# %%
# Set-up
# ------
#
# A small perceptron stands for your network. ``in_turns`` times functions.

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import Measurement, Timer

torch.manual_seed(0)
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.backends.cuda.matmul.fp32_precision = "ieee"
device = torch.accelerator.current_accelerator(check_available=True)
device = device or torch.device("cpu")
name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")


def mlp(width=32):
    layers = [nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def in_turns(*functions):  # so that what slows the machine slows all; five values each
    threads = torch.get_num_threads()
    timers = [Timer("f()", globals={"f": f}, num_threads=threads) for f in functions]
    turns = [[t.blocked_autorange(min_run_time=0.01) for t in timers] for _ in range(5)]
    return [Measurement.merge(values)[0] for values in zip(*turns, strict=True)]


# %%
# Measure it for your own models
# ------------------------------
#
# Put your network in place of ``mlp``, and your number of models, batch size and shape
# of one input into the line above the verdict. Each model has its own minibatch.


def compare(build, num_models, batch, shape, chunk_size=None):
    models = [build().to(device).eval() for _ in range(num_models)]
    params, buffers = stack_module_state(models)  # once, outside of what is timed
    minibatches = torch.randn(num_models, batch, *shape, device=device)
    with torch.device("meta"):
        skeleton = build().eval()

    def predict(params, buffers, x):
        return functional_call(skeleton, (params, buffers), (x,), strict=True)

    @torch.no_grad()
    def loop():
        return torch.stack([m(x) for m, x in zip(models, minibatches, strict=True)])

    @torch.no_grad()
    def one_call():
        return vmap(predict, chunk_size=chunk_size)(params, buffers, minibatches)

    torch.testing.assert_close(one_call(), loop())
    return in_turns(loop, one_call)


num_models, batch, shape = 100, 32, [16]
loop_time, vmap_time = compare(mlp, num_models, batch, shape)
ratio = loop_time.median / vmap_time.median
print(f"vmap is {max(ratio, 1 / ratio):.1f}x {'faster' if ratio > 1 else 'slower'}")
print(f"loop {1e3 * loop_time.median:.2f} ms, vmap {1e3 * vmap_time.median:.2f} ms")

# %%
# That was a forward pass in evaluation mode, in IEEE float32, without autograd; the
# timer warms up itself. **If vmap is slower**, look for the reason among those below;
# networks that fill the machine run fastest in a compiled loop
# (``plot_fastest_ensemble.py``).
#
# **The rule of thumb**: divide the loop's time by the number of models and of layers.

us = 1e6 * loop_time.median / num_models
layers = sum(not list(m.children()) for m in mlp().modules())
print(f"loop: {us:.0f} us a model, {us / layers:.1f} us for each of {layers} layers")

# %%
# So tiny a layer is nearly all overhead. Near this time a layer, one call removes most
# of it; at ten times as much, the machine mostly computes, and little is left to gain.
#
# Why one call can win: it pays the overhead once
# -----------------------------------------------
#
# Before an operator computes, Python, PyTorch and, on a GPU, the start of a kernel take
# some microseconds. Small tensors are computed in less. Three costs describe both ways
# for :math:`N` models with :math:`B` samples each:
#
# .. math:: T = t_\text{call} + t_\text{model} \, N + t_\text{sample} \, N B
#
# The loop has the overhead of all operators in :math:`t_\text{model}`; the single call
# has it in :math:`t_\text{call}`, which is larger, but paid once. So one model should
# lose and many should win, and larger minibatches should leave less to gain. Training
# should pay from fewer models on: most of the operators that ``vmap`` adds are in the
# forward pass, few in the backward pass, none in the optimizer (tested).
#
# How many models before it pays, forward and in training
# --------------------------------------------------------
#
# A step of training is a forward pass, a backward pass and an update by SGD. The loop
# has an optimizer for each model, the single call one for the stack. The *sum* of the
# losses gives each model its own gradient: one step leaves the same parameters.


def compare_training(build, num_models, batch, shape):
    models = [build().to(device) for _ in range(num_models)]
    params, buffers = stack_module_state(models)
    minibatches = torch.randn(num_models, batch, *shape, device=device)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in models]
    stack_optimizer = torch.optim.SGD(params.values(), lr=1e-3)
    with torch.device("meta"):
        skeleton = build()

    def loss(params, buffers, x):
        output = functional_call(skeleton, (params, buffers), (x,), strict=True)
        return output.square().mean()

    def loop():
        for model, optimizer, x in zip(models, optimizers, minibatches, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    def one_call():
        stack_optimizer.zero_grad()
        vmap(loss)(params, buffers, minibatches).sum().backward()
        stack_optimizer.step()

    loop(), one_call()
    alone, _ = stack_module_state(models)
    message = f"{num_models} models: vmap does not train as the loop does"
    torch.testing.assert_close(params, alone, atol=1e-6, rtol=1e-6, msg=message)
    return in_turns(loop, one_call)


# %%
# Faster means: by more than both spreads (half an interquartile range each), and for
# all larger numbers of models too.

curves = {"forward pass": {}, "training step": {}}
for n in [1, 2, 3, 4, 6, 8, 16, 64, 256]:
    curves["forward pass"][n] = compare(mlp, n, batch, shape)
    curves["training step"][n] = compare_training(mlp, n, batch, shape)

for task, curve in curves.items():
    ratios = {n: a.median / b.median for n, (a, b) in curve.items()}
    lead = {n: a.median - b.median - (a.iqr + b.iqr) / 2 for n, (a, b) in curve.items()}
    last = max((n for n in curve if lead[n] <= 0), default=0)  # not faster here
    later = [n for n in curve if n > last]
    faster = f"faster from {later[0]} models on" if later else "not faster in the end"
    print(f"{task}: vmap is {faster}")
    print(f"  loop / vmap: {ratios[1]:.2f} with one model, {ratios[n]:.1f} with {n}")

# %%
# The loop pays for each model from the start. The call is flat as long as its overhead
# is most of its time: there **one more model is nearly free**.

fig, axes = plt.subplots(1, 2, figsize=(6.4, 3.6), sharey=True, layout="constrained")
for ax, (task, curve) in zip(axes, curves.items(), strict=True):
    for side, (way, marker) in enumerate([("loop", "o"), ("vmap", "^")]):
        runs = [pair[side] for pair in curve.values()]
        middle, spread = [1e3 * t.median for t in runs], [500 * t.iqr for t in runs]
        ax.errorbar(list(curve), middle, spread, marker=marker, label=way, capsize=3)
    ax.set(title=task, xlabel="number of models", xscale="log", yscale="log")
axes[0].set_ylabel("time [ms]")
axes[0].legend()
fig.suptitle(f"MLPs, batch {batch}, float32, {name}")
fig.set_label(
    "Two panels, forward pass and training step: time of the loop and of one vmap call "
    f"against the number of models, logarithmic axes, batch {batch}, on {name}. With "
    f"{n} models vmap trains {ratios[n]:.1f} times as fast as the loop."
)

# %%
# Does batch size matter?
# -----------------------
#
# The forward pass again, over a grid of both. An accelerator gets a larger one.

counts, batches = [1, 4, 16, 64, 256, 1024], [1, 8, 64, 512]
if device.type != "cpu":
    counts, batches = [*counts, 4096], [1, 16, 256, 4096]
grid = {(n, b): compare(mlp, n, b, shape) for n in counts for b in batches}

gains = torch.tensor([a.median / b.median for a, b in grid.values()])
gains = gains.view(len(counts), len(batches))
for b, column in zip(batches, gains.T, strict=True):
    faster = f"{(column > 1).sum()} of {len(counts)}"
    print(f"batch {b}: {column.max():.2g}x at best, vmap faster in {faster} rows")
spreads = torch.tensor([t.iqr / 2 / t.median for pair in grid.values() for t in pair])
print(f"typical spread: ±{spreads.median():.0%} of a time")

# %%
# Orange cells belong to ``vmap``, purple ones to the loop. Up, more models share the
# overhead, and ``vmap`` gains. To the right, each model has more work, and the gain
# shrinks. If the upper right corner is purple, the likely reason is memory: the second
# one below puts it to the test.

fig, ax = plt.subplots(figsize=(5, 4.2), layout="constrained")
limit = 1.6 * gains.log2().abs().max().item()  # pale colors, so that numbers show
colors = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit}
ax.imshow(gains.log2().tolist(), origin="lower", aspect="auto", **colors)
for row, values in enumerate(gains.tolist()):
    for column, gain in enumerate(values):
        ax.text(column, row, f"{gain:.2g}", color="black", ha="center", va="center")
ax.set_xticks(range(len(batches)), batches)
ax.set_yticks(range(len(counts)), counts)
ax.set(xlabel="batch size of each model", ylabel="number of models")
ax.set_title(f"Time of loop / time of vmap\nMLP, forward, float32, {name}")
fig.set_label(
    "Map of the time of the loop divided by the time of vmap over batch size and "
    f"number of models, from {gains.min():.2f} to {gains.max():.0f}, on {name}. vmap "
    f"is faster in {(gains > 1).sum()} of {gains.numel()} cells."
)

# %%
# Predict a size that you did not measure
# ---------------------------------------
#
# The three costs, from all cells of the map by least squares of the relative error; a
# negative cost becomes zero. The size at the top of this page is not in the map.

double = {"device": "cpu", "dtype": torch.float64}
sizes = torch.tensor([[1, n, n * b] for n, b in grid], **double)
size = torch.tensor([1, num_models, num_models * batch], **double)
for side, (way, new) in enumerate([("loop", loop_time), ("vmap", vmap_time)]):
    times = torch.tensor([pair[side].median for pair in grid.values()], **double)
    one = torch.ones(len(times), 1, **double)
    cost = torch.linalg.lstsq(sizes / times[:, None], one).solution[:, 0].clamp(min=0)
    call, model, sample = (1e6 * cost).tolist()
    print(f"{way}: {call:.1f} us a call, {model:.2f} a model, {sample:.3f} a sample")
    off = times / (sizes @ cost) - 1
    worst = off.abs().argmax()
    n, b = list(grid)[worst]
    print(f"  map: typically {off.abs().median():.0%} off, at worst", end=" ")
    print(f"{off[worst]:+.0%} ({n} models, batch {b})")
    then, now = 1e3 * (size @ cost).item(), 1e3 * new.median
    print(f"  new size: predicted {then:.2f} ms, measured {now:.2f} ms")

# %%
# **The worst cell shows where a cost is not constant.** On a CPU, hundreds of models
# probably leave the cache, so the loop pays more for each. The large tensors of one
# call leave it, too: the next section tries a cure. On a GPU, kernels run while Python
# prepares the next ones, so the larger of two times counts, not their sum.
#
# vmap slower than a for loop? Three reasons
# ------------------------------------------
#
# **Too few models**: the left ends of the curves.
#
# **Too large tensors.** The activations of the call are as many times larger as there
# are models. On a CPU they leave the cache, and the system hands out fresh memory for
# them in every call. ``chunk_size`` takes the models in pieces; here, in the upper
# right corner of the map:


def report(label, loop_time, vmap_time):
    ratio = loop_time.median / vmap_time.median
    verdict = f"{max(ratio, 1 / ratio):.1f}x {'faster' if ratio > 1 else 'slower'}"
    pair = [("loop", loop_time), ("vmap", vmap_time)]
    ms = [f"{w} {1e3 * t.median:.2f} ms ±{t.iqr / 2 / t.median:.0%}" for w, t in pair]
    print(f"{label}: vmap is {verdict}\n  {', '.join(ms)}")


n, b = counts[-1], batches[-1]
chunk_size = 32 if device.type == "cpu" else 1024
report("all at once", *grid[n, b])
report(f"in chunks of {chunk_size}", *compare(mlp, n, b, shape, chunk_size))

# %%
# If chunks are faster, memory was the reason, and ``plot_memory.py`` helps to choose
# their size. If not, keep one call.
#
# **Models that fill the machine.** Three networks, each with 16 models:


def cnn():
    layers = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9216, 10))


wide = 1024 if device.type == "cpu" else 4096
networks = {
    "MLP, width 32": (mlp, [16]),
    f"MLP, width {wide}": (lambda: mlp(wide), [16]),
    "CNN": (cnn, [1, 28, 28]),
}
for label, (build, one_input) in networks.items():
    times = compare(build, 16, 16, one_input)
    us = 1e6 * times[0].median / 16 / len(build())
    report(f"{label}, {us:.0f} us a layer", *times)

# %%
# The rule of thumb at work: far above the first network's time a layer, ``vmap`` gains
# only if one large operator runs faster than many small ones. For convolutions that is
# one with groups, which not every library does fast, and on a CPU the second reason
# adds to it: ``plot_fastest_ensemble.py`` has other ways. A fourth reason, an operator
# that ``vmap`` cannot batch, announces itself by a warning: ``plot_what_vmap_runs.py``.
#
# The mistake: stacking in every call
# -----------------------------------
#
# One line in the wrong place: the result is the same (tested), no message tells, and
# each call copies all parameters before it begins.

models = [mlp().to(device) for _ in range(num_models)]
(stacking,) = in_turns(lambda: stack_module_state(models))
share = stacking.median / vmap_time.median
print(f"stacking {num_models} models: {1e3 * stacking.median:.2f} ms", end=", ")
print(f"{share:.1f} times the call at the top of this page")

# %%
# Remember
# --------
#
# **A loop pays its overhead for every model, one call pays once.** Many small models
# gain most, and training usually pays from fewer models on than prediction. Where one
# model fills the machine, or where tensors get too large, measure before you choose.
#
# Next
# ----
#
# - ``plot_what_vmap_runs.py``: the operators of one call.
# - ``plot_fastest_ensemble.py``: where the work decides.
# - ``plot_memory.py``: what a call needs, and ``chunk_size``.
# - ``plot_training.py``: many models, each on its own data.
#
# References
# ----------
#
# - The question, for LeNet and for an MLP in JAX:
#   `functorch#1061 <https://github.com/pytorch/functorch/issues/1061>`_,
#   `jax#15339 <https://github.com/jax-ml/jax/issues/15339>`_.
# - Stacking in every call:
#   `pytorch#120581 <https://github.com/pytorch/pytorch/issues/120581>`_.
# - W. Whitney: `Parallelizing neural networks on one GPU with JAX
#   <http://willwhitney.com/parallel-training-jax.html>`_, 2021: a hundred
#   small networks in the time of one, on a Titan X.
