"""
The fastest way to run ten CNNs
===============================

Find the fastest way to predict with an ensemble of CNNs on your own machine: from the
plain loop over the models to compiled code in bfloat16, each change with its number.

**In short.** Compile two forms, a loop over models in ``channels_last`` and ``vmap``,
in the lowest precision that your results can bear, and keep the one that is faster on
your machine. Layers that keep the device busy favor the loop, as convolutions on CPUs
do; many small layers favor ``vmap``.

Read ``plot_ensembling.py`` before; if you train, ``plot_training.py`` instead. The
compiled ways need a C++ compiler, such as g++; on a GPU, Triton and a C compiler.
"""

# %%
# Set-up
# ------

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import Timer, timer
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
conv.fp32_precision = matmul.fp32_precision = "ieee"
threads = torch.get_num_threads()
where = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} threads"
print(f"{device.type}, {where}; float32 without TF32; prediction, so no gradients")
warnings.filterwarnings("ignore", module="torch")  # of torch.compile; not to copy

# %%
# Ten networks that only predict, and a minibatch for each of them:


class SimpleCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):  # [32, 1, 28, 28]
        x = F.relu(self.conv1(x))  # [32, 32, 26, 26]
        x = F.relu(self.conv2(x))  # [32, 64, 24, 24]
        x = torch.flatten(F.max_pool2d(x, 2), 1)  # [32, 9216]
        return self.fc2(F.relu(self.fc1(x)))  # [32, 10]


models = [SimpleCNN().requires_grad_(False).to(device) for _ in range(10)]
minibatches = torch.randn(10, 32, 1, 28, 28).to(device)

# %%
# The two forms to copy
# ---------------------

# First form: one model after the other, in the layout that convolutions want.
last = torch.channels_last
models_last = [copy.deepcopy(model).to(memory_format=last) for model in models]
minibatches_last = [x.contiguous(memory_format=last) for x in minibatches]


def loop(models, minibatches):
    return torch.stack([m(x) for m, x in zip(models, minibatches, strict=True)])


compiled_loop = torch.compile(loop)

# Second form: all models in one call.
params, buffers = stack_module_state(models)
with torch.device("meta"):
    skeleton = SimpleCNN()


def predict(params, buffers, x):
    return functional_call(skeleton, (params, buffers), (x,), strict=True)


compiled_vmap = torch.compile(vmap(predict))

# %%
# The first calls compile:

start, compiler = timer(), True  # this timer waits for a GPU
try:
    logits = compiled_loop(models_last, minibatches_last)  # [10, 32, 10]
    logits = compiled_vmap(params, buffers, minibatches)  # [10, 32, 10]
    print(f"compiling both took {timer() - start:.1f} s")
except RuntimeError as problem:
    compiler = False
    print("No C++ compiler was found, or none works:", str(problem).splitlines()[0])
    print("The compiled ways are left out.")

# %%
# If compiling fails, call ``loop`` and ``vmap(predict)`` with the same arguments. For
# bfloat16, convert first: ``model.to(torch.bfloat16)``, and the minibatches too. The
# rest of this page is the ladder from the plain loop to these forms.
#
# How each step gets its number
# -----------------------------
#
# Its logits must be those of float64 on the CPU. Then it takes turns with the step that
# it changes and with the plain loop. Compare the ratios, which come from within a turn;
# the milliseconds drift with the processor's clock.

models64 = [copy.deepcopy(model).to("cpu", torch.float64) for model in models]
exact = loop(models64, minibatches.to("cpu", torch.float64))


def in_turns(*functions, rounds=5):
    """Seconds of one call, a row for each function; columns are turns."""
    timers = [Timer("f()", globals={"f": f}, num_threads=threads) for f in functions]
    turns = [
        [t.blocked_autorange(min_run_time=0.02).median for t in timers]
        for _ in range(rounds)
    ]
    return torch.tensor(turns).T


# %%


def step(name, function, after="loop", tolerance=1e-5):
    """Check a way; time it beside the step that it changes and the loop."""
    if "compiled" in name and not compiler:
        return
    error = (function().to("cpu", torch.float64) - exact).abs().max().item()
    assert error < tolerance, f"{name}: a logit is {error:.0e} off from float64"
    functions[name] = function
    beside = list(dict.fromkeys([name, after, "loop"]))
    seconds = in_turns(*map(functions.get, beside))
    gains = seconds / seconds[0]
    ways[name] = *(f(gains[-1]).item() for f in (torch.median, min, max)), error
    text = f"{name}: {seconds[0].median() * 1e3:.2f} ms"
    for other, gain in zip(beside[1:], gains.median(1).values[1:], strict=True):
        word = "fast" if gain > 1 else "slow"
        text += f", {max(gain, 1 / gain):.2f}x as {word} as {other}"
    print(text)


# %%
# Step 0: the plain loop
# ----------------------


def plain_loop():
    return loop(models, minibatches)


functions, ways = {}, {}
step("loop", plain_loop)

# %%
# Step 1 (on step 0): all models in one call
# ------------------------------------------
#
# ``vmap`` starts each layer once instead of ten times. That wins where starting a layer
# takes longer than running it. It loses where the work decides: the ten convolutions
# become one with ten groups, and the activations of ten models no longer fit a cache.

step("vmap", lambda: vmap(predict)(params, buffers, minibatches))

# %%
# Step 2 (on step 0): channels last
# ---------------------------------
#
# The plain loop, but the channels of a pixel lie side by side in memory. Most libraries
# compute in this layout, and rearrange activations that have another.

step("loop in channels_last", lambda: loop(models_last, minibatches_last))

# %%
# Step 3 (on step 2): compile the loop
# ------------------------------------
#
# The compiler joins activations and pooling, which saves passes over the memory. It
# also writes the loop out, so its time grows with the number of models; for hundreds,
# compile ``predict`` and call it for each model. Weights are not frozen, here or in any
# way below: what you change in them counts in the next call.

before = "loop in channels_last"
step("compiled loop", lambda: compiled_loop(models_last, minibatches_last), before)

# %%
# Step 4 (on step 1): compile vmap
# --------------------------------
#
# The convolution with groups stays; what stands around it is joined. So this gains most
# where biases, activations and fresh memory took the time.

step("compiled vmap", lambda: compiled_vmap(params, buffers, minibatches), "vmap")

# %%
# Two side steps (on step 2): threads, or a CUDA graph
# ----------------------------------------------------
#
# One for each kind of device. On a CPU, each core takes a model of its own, where
# before all cores shared each layer; this needs at least as many models as cores. On an
# NVIDIA GPU, a CUDA graph records the whole loop and starts it as one. It works in
# fixed memory: copy new inputs into the old ones, and copy the logits before the next
# call. ``torch.compile(loop, mode="reduce-overhead")`` compiles and records, but is for
# modules: it copies stacked parameters in every call (pytorch#121861).


def threaded_loop():
    return torch.stack(list(pool.map(lambda m, x: m(x), models_last, minibatches_last)))


def replay():
    graph.replay()
    return recorded


if device.type == "cpu":
    one_each = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ThreadPoolExecutor(threads, **one_each) as pool:
        step("loop in threads", threaded_loop, before)
if device.type == "cuda":
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = loop(models_last, minibatches_last)
    step("loop as CUDA graph", replay, before)

# %%
# Step 5 (on steps 2 to 4): fewer bits
# ------------------------------------
#
# bfloat16 stores 7 bits of fraction: a gain where the processor has instructions for
# it, a loss where it has none. Convert the models once: ``torch.autocast`` would
# convert weights without gradients in every call (tested). TF32, on NVIDIA GPUs,
# shortens the factors of products to 10 bits; it stays out of the compiled ways, as its
# new switches stopped ``torch.compile`` in torch 2.9 and 2.10 (pytorch#166387). Whether
# your results bear either, ``plot_how_equal.py`` finds out.


def tf32_loop():
    conv.fp32_precision = matmul.fp32_precision = "tf32"
    logits = loop(models_last, minibatches_last)
    conv.fp32_precision = matmul.fp32_precision = "ieee"
    return logits


short = torch.bfloat16
models16 = [copy.deepcopy(model).to(short) for model in models_last]
minibatches16 = [x.to(short) for x in minibatches_last]
loop16 = "compiled loop in bfloat16"
step(loop16, lambda: compiled_loop(models16, minibatches16), "compiled loop", 1e-2)
if device.type == "cuda":
    params16 = {name: p.to(short) for name, p in params.items()}
    x16, vmap16 = minibatches.to(short), "compiled vmap in bfloat16"
    step(vmap16, lambda: compiled_vmap(params16, buffers, x16), "compiled vmap", 1e-2)
    step("loop in TF32", tf32_loop, before, 1e-2)

# %%
# How fast could it be?
# ---------------------
#
# A library's easiest work is a wide convolution with kernels of one pixel. The
# **ceiling** is the speed of a loop that does all its arithmetic at that rate, in
# float32.

with FlopCounterMode(display=False) as counter:
    plain_loop()
flops = counter.get_total_flops()

rows = 16 if device.type == "cpu" else 256
wide = torch.randn(rows, 1024, 16, 16, device=device).contiguous(memory_format=last)
kernels = torch.randn(1024, 1024, 1, 1, device=device)
wide_flops = 2 * rows * 16 * 16 * 1024**2
plain, easiest = in_turns(plain_loop, lambda: F.conv2d(wide, kernels))
ceiling = (plain / flops * wide_flops / easiest).median().item()
print(f"{flops / 1e9:.2f}e9 operations; ceiling: {ceiling:.2f}x as fast as the loop")

# %%
# Which way is the fastest here?
# ------------------------------
#
# Sorted by the median ratio to the loop, with the range of five turns. Differences
# within these ranges mean nothing.

ranked = sorted(ways, key=ways.get, reverse=True)
print(f"{'':26}as fast as the loop   largest error")
for name in ranked:
    gain, low, high, error = ways[name]
    print(f"{name:26}{gain:5.2f}x ({low:.2f} to {high:.2f}){error:13.0e}")

print(f"\nFastest here: {ranked[0]}, {ways[ranked[0]][0]:.1f}x as fast as the loop.")
best = next(name for name in ranked if not name.endswith(("bfloat16", "TF32")))
print(f"In float32: {best}, {ways[best][0]:.1f}x; the ceiling is {ceiling:.1f}x.")

# %%
fig, ax = plt.subplots(layout="constrained")
for name in reversed(ranked):
    gain, low, high, _ = ways[name]
    color, bar = "C1" if "vmap" in name else "C0", f"{name}  {gain:.2f}x"
    hatch = {"hatch": "//", "fill": False} if "compiled" in name else {}
    ax.barh(bar, gain, color=color, edgecolor=color, **hatch)
    ax.plot([low, high], [bar, bar], color="C5", linewidth=3)
ax.axvline(1, color="C5", linestyle=":", label="the loop")
ax.axvline(ceiling, color="C2", linestyle="--", label="ceiling in float32")
ax.set_xlabel("times as fast as the loop (gray: range)")
title = f"Ten CNNs, float32 unless named; {device.type}, {where}"
fig.suptitle(f"{title}\nvmap in orange, compiled ways hatched", fontsize="medium")
fig.legend(loc="outside lower center", ncols=2)
listing = ", ".join(f"{name} {ways[name][0]:.2f}" for name in ranked)
fig.set_label(
    f"Bars for how many times as fast as the loop each way is: {listing}. A line at 1 "
    f"is the loop, one at {ceiling:.2f} the ceiling in float32."
)

# %%
# **A loop that wins** has layers large enough to fill the device and activations small
# enough for its caches. What helps one model then helps all: layout, compiler, fewer
# bits. **A vmap that wins** says that single layers were too small for the device. More
# models, or smaller minibatches, move you towards it; ``plot_when_vmap_pays.py`` finds
# the point.
#
# **Below the ceiling** you pay for what is no wide convolution: a first layer with one
# input channel, pooling, weights of ``fc1`` that only 32 images share. If the best way
# in float32 stays below half of it, look for what is missing. **Above it** are fewer
# bits, or another algorithm: Winograd's needs 2.25 to 4 times fewer multiplications for
# kernels of 3 by 3.
#
# Ask for the layout inside vmap
# ------------------------------
#
# The mistake that suggests itself after step 2, and what PyTorch says to it:


def predict_last(params, buffers, x):
    return predict(params, buffers, x.contiguous(memory_format=last))


try:
    vmap(predict_last)(params, buffers, minibatches)
except RuntimeError as problem:
    print(f"RuntimeError: {problem}")
else:
    raise AssertionError("vmap took a layout that this page says it refuses")

# %%
# Under ``vmap`` a tensor has a dimension that the function cannot see, so it cannot
# order them all. Leave the layout to the loop.
#
# Remember
# --------
#
# - Settle precision and layout first: they help the loop on every kind of device.
# - For convolutions on a CPU take the loop in ``channels_last``, compiled if you can;
#   on a GPU compile the loop and ``vmap``, and time both.
# - A compiled function keeps eight compiled forms, then runs uncompiled. A new dtype or
#   number of threads takes one. Varying batch sizes take the loop two or three in all,
#   but ``vmap`` over convolutions one each (tested): pad them to a few sizes.
#
# Next
# ----
#
# - ``plot_how_equal.py``: what fewer bits do to your results.
# - ``plot_memory.py``: what ``vmap`` costs in memory, and how chunks help.
#
# References
# ----------
#
# - S. Boehm: How to optimize a CUDA matmul kernel for cuBLAS-like performance, a
#   worklog, 2022, `siboehm.com <https://siboehm.com/articles/22/CUDA-MMM>`_.
# - A. Lavin, S. Gray: Fast algorithms for convolutional neural networks (Winograd),
#   2016, `arXiv:1509.09308 <https://arxiv.org/abs/1509.09308>`_.
# - Grouped convolutions slower than many single ones:
#   `pytorch#73764 <https://github.com/pytorch/pytorch/issues/73764>`_.
# - The compiler, TF32's new switches:
#   `pytorch#166387 <https://github.com/pytorch/pytorch/issues/166387>`_; eight forms:
#   `pytorch#124269 <https://github.com/pytorch/pytorch/issues/124269>`_; inputs copied:
#   `pytorch#121861 <https://github.com/pytorch/pytorch/issues/121861>`_.
