"""
The fastest way to run ten CNNs
===============================

Find the fastest way to predict with an ensemble of CNNs on your own machine, from the
plain loop over the models, step by step, to compiled code in bfloat16.

**In short.** Write two forms, a loop over the models, each in ``channels_last``, and
one call with ``vmap``. Compile both and time both, first in float32, then in bfloat16
if your results bear it. Which one wins depends on the machine: the figure shows what
this run found, and each step on the way changes one thing and prints what it gained.

Read ``plot_ensembling.py`` before; if you train, ``plot_training.py`` instead. The
compiled ways need a C++ compiler, such as g++; on a GPU, Triton and a C compiler.
"""

# %%
# Set-up
# ------

import copy
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
conv.fp32_precision = matmul.fp32_precision = "ieee"
threads = torch.get_num_threads()
where = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} threads"
where, batch = f"{device.type}, {where}", 16 if device == cpu else 64
print(f"{where}; ten models, {batch} images each")

# %%
# Ten networks that only predict, and a minibatch for each of them:


class SimpleCNN(nn.Module):
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


models = [SimpleCNN().requires_grad_(False).to(device) for _ in range(10)]
minibatches = torch.randn(10, batch, 1, 28, 28).to(device)

# %%
# The two forms to copy
# ---------------------

# First form: one model after the other, in the layout that convolutions want.
last = torch.channels_last
models_last = [copy.deepcopy(model).to(memory_format=last) for model in models]
minibatches_last = [x.contiguous(memory_format=last) for x in minibatches]


def call(model, x):
    return model(x)


def loop(models, minibatches, call=call):
    return torch.stack([call(m, x) for m, x in zip(models, minibatches, strict=True)])


compiled_call = torch.compile(call)  # once for all models

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
    with warnings.catch_warnings(action="ignore"):  # torch's remarks on itself
        logits = loop(models_last, minibatches_last, compiled_call)  # [10, batch, 10]
        logits = compiled_vmap(params, buffers, minibatches)  # [10, batch, 10]
    print(f"compiling both took {timer() - start:.1f} s")
except RuntimeError as problem:
    compiler = False
    print("No C++ compiler was found, or none works:", str(problem).splitlines()[0])
    print("The compiled ways are left out.")

# %%
# Divide that time by what a call saves below: after so many calls it is earned back. If
# compiling fails, call ``loop`` without ``compiled_call``, and ``vmap(predict)``. For
# bfloat16, convert first: ``model.to(torch.bfloat16)``, and the minibatches too. The
# compiled code of the loop serves every model, and weights are not frozen into it: what
# you change in them counts in the next call (both tested). The rest of this page is the
# ladder from the plain loop to these forms.
#
# How each step gets its number
# -----------------------------
#
# The ways that are compared take turns, so that drift and other programs meet all of
# them alike. A difference counts if its whole interval lies more than 2 % from 1; of
# twenty such intervals one may mislead. **"No difference seen" says that two ways are
# alike only if its interval is narrow**: one such as (0.6 to 1.2) decides nothing, so
# repeat the run on a quiet machine.


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
# All forms do the same work, but move different numbers of bytes. You can skip this
# cell at first: it gives the megabytes that each step prints. It counts the operations
# of four forms, and the bytes that their operators read and write, as if no cache kept
# any. The fourth form is ``vmap`` by hand: the channels of all members stand side by
# side, and a convolution with groups keeps them apart.


def by_hand(params, x):  # [10, batch, 1, 28, 28]
    (w1, b1, w2, b2, w3, b3, w4, b4), n = params.values(), len(x)
    x = x.transpose(0, 1).flatten(1, 2)  # [batch, 10, 28, 28]
    x = F.relu(F.conv2d(x, w1.flatten(0, 1), b1.flatten(), groups=n))
    x = F.relu(F.conv2d(x, w2.flatten(0, 1), b2.flatten(), groups=n))
    x = F.max_pool2d(x, 2).unflatten(1, (n, 64)).flatten(2)  # [batch, 10, 9216]
    x = F.relu(torch.baddbmm(b3[:, None], x.transpose(0, 1), w3.mT))
    return torch.baddbmm(b4[:, None], x, w4.mT)  # [10, batch, 10]


class Traffic(TorchDispatchMode):
    every = products = 0  # bytes

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result, name = operator(*args, **(kwargs or {})), str(operator)
        if not (operator.is_view or "_unsafe_view" in name):
            tensors = [t for t in tree_leaves((args, result)) if torch.is_tensor(t)]
            size = sum(t.nbytes for t in tensors)
            self.every += size
            self.products += size * ("conv" in name or "mm" in name)
        return result


ways = {
    "loop": partial(loop, models, minibatches),
    "loop in channels_last": partial(loop, models_last, minibatches_last),
    "vmap": partial(vmap(predict), params, buffers, minibatches),
    "vmap by hand": partial(by_hand, params, minibatches),
}
moved = {}
for name, way in ways.items():
    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        way()
    flops, moved[name] = counter.get_total_flops(), traffic.every
    print(f"{name:21} {flops / 1e9:.2f}e9 operations, {traffic.every / 1e6:4.0f} MB")
moved["products"] = traffic.products
print(f"convolutions and products alone: {traffic.products / 1e6:.0f} MB in each form")

# %%
# ``vmap`` moves more than the same by hand: it adds biases in passes of their own, and
# copies activations before it pools (tested). PyTorch's compiler joins such passes, but
# leaves convolutions and products to libraries, so a compiled way still moves at least
# what these move.
#
# How fast could it be?
# ---------------------
#
# Libraries are at their best in a wide matrix product. Its speed in float32 is called
# the **roof** here, and each step prints its share of it. A way that does little work
# for each byte may meet another limit first, the speed of a copy (the sloping part of
# the figure), unless a cache holds what it moves.

rows = 4 if device == cpu else 256
wide = torch.randn(rows, 1024, 16, 16, device=device).contiguous(memory_format=last)
kernels = torch.randn(1024, 1024, 1, 1, device=device)
source = torch.randn(10, batch, 64, 24, 24, device=device)  # what conv2 returns
target = torch.empty_like(source)


def product(x, w):  # on a CPU by the library that convolves
    if device == cpu:
        return F.conv2d(x, w)
    return F.linear(x.movedim(1, -1), w.flatten(1))


easiest, half = partial(product, wide, kernels), torch.bfloat16
easiest16 = partial(product, wide.to(half), kernels.to(half))
easy, easy16, copied = in_turns(easiest, easiest16, partial(target.copy_, source))
easy_flops = 2 * rows * 16 * 16 * 1024**2
peak, bandwidth = easy_flops / easy[0], 2 * source.nbytes / copied[0]
print(
    f"product {peak / 1e9:.0f}e9 operations a second, copy {bandwidth / 1e9:.1f} GB/s"
)
print(f"the copy bounds what has less than {peak / bandwidth:.1f} operations a byte")
print(f"the product in bfloat16 against float32: {said(*easy16[1:])}")

# %%
# Each step below has to return the logits that float64 gives on the CPU, to within
# 1e-5, in bfloat16 to within 1e-2, which only catches mistakes. Then it takes turns, in
# a call of its own, with the step before, perhaps with others, and with the product: a
# share of the roof compares times of the same seconds. Compare ratios, not milliseconds
# of two calls. Two branches grow from the plain loop: steps 2, 3 and 5 keep the loop,
# steps 1 and 4 use ``vmap``.

models64 = [copy.deepcopy(model).cpu().double() for model in models]
exact = loop(models64, minibatches.cpu().double())
steps = {}


def step(name, way, *before, tolerance=1e-5):
    """Check a way; compare it with others and with the roof."""
    if "compiled" in name and not compiler:
        return
    with warnings.catch_warnings(action="ignore"):  # torch's remarks on itself
        off = (way().cpu().double() - exact).abs().max().item()
    assert off < tolerance, f"{name}: a logit is {off:.0e} off from float64"
    ways[name] = way
    (time, *_), *others = in_turns(way, *map(ways.get, before), easiest)
    *gains, easy = [(1 / gain, 1 / high, 1 / low) for _, gain, low, high in others]
    share = [flops / easy_flops * gain for gain in easy]
    least, form = "compiled" in name, max((f for f in moved if f in name), key=len)
    size = moved["products" if least else form] / (2 if "16" in name else 1)
    steps[name] = size, share, dict(zip(before, gains, strict=True))
    roof = "{:.0%} of the roof ({:.0%} to {:.0%})".format(*share)
    bound = "at least " if least else ""
    print(f"{name}: {time * 1e3:.1f} ms, {roof}, {bound}{size / 1e6:.0f} MB")
    for other, gain in steps[name][-1].items():
        print(f"    against {other}: {said(*gain)}")


print(f"{where}; float32 without TF32, unless named; no gradients; after four calls:")
print(
    f"median of seven turns or more (its 95 % interval); {flops / 1e9:.2f}e9 operations"
)

# %%
# Step 0: the plain loop
# ----------------------

step("loop", ways["loop"])

# %%
# Step 1 (on step 0): all models in one call
# ------------------------------------------
#
# ``vmap`` starts each layer once instead of ten times, which gains where starting takes
# longer than the work. It loses where its further bytes cost time, or where the library
# is slower with ten groups than with ten calls, as reported for CUDA (pytorch#73764).

step("vmap", ways["vmap"], "loop")

# %%
# Step 2 (on step 0): channels last
# ---------------------------------
#
# The plain loop, but the channels of a pixel lie side by side in memory. This gains
# where the library has its fastest code for this layout, and loses where it has not.

step("loop in channels_last", ways["loop in channels_last"], "loop")

# %%
# Step 3 (on step 2): compile the loop
# ------------------------------------
#
# The compiler joins activations and pooling, which saves passes over memory, and it may
# change the layout by itself. So only the comparison with step 2 shows what joining
# gains. First without step 2, then on it:

step("compiled loop", partial(loop, models, minibatches, compiled_call), "loop")
best = "compiled loop in channels_last"
way = partial(loop, models_last, minibatches_last, compiled_call)
step(best, way, "loop in channels_last", "compiled loop", "loop")

# %%
# **If the interval of the second against the first is narrow around 1,** you need not
# care for the layout: the compiler may choose one itself. **If it is wide, or the
# second is faster,** keep ``channels_last``: it costs one line.
#
# Step 4 (on step 1): compile vmap
# --------------------------------
#
# The same is joined around convolutions with groups. Then by hand, with a bias inside
# its convolution:

way = partial(compiled_vmap, params, buffers, minibatches)
step("compiled vmap", way, "vmap", best, "loop")
way = partial(torch.compile(by_hand), params, minibatches)
step("compiled vmap by hand", way, "compiled vmap", best)

# %%
# Both call convolutions with the same groups. **If the one by hand is faster,** the
# passes around them probably cost the difference. To rewrite a model in this way pays
# only if it also beats the compiled loop. **If even this is slower than the compiled
# loop,** groups or large tensors probably cost the rest.
#
# Step 5 (on steps 2 to 4): fewer bits
# ------------------------------------
#
# bfloat16 stores 7 bits of fraction in half of the bytes. Some processors multiply in
# it faster than in float32 (AMX on CPUs, tensor cores on GPUs). **If the product above
# gained,** yours does, and this step can gain much. **If not,** only the bytes can
# gain, and this step may lose. Convert the models once: ``torch.autocast`` would
# convert weights without gradients in every call (tested). ``plot_how_equal.py`` tests
# what your results bear. The roof stays that of float32, so a share above 100 % is
# possible: divide it by the product's gain for the share of bfloat16's own roof.

models16 = [copy.deepcopy(model).to(half) for model in models_last]
way = partial(loop, models16, [x.to(half) for x in minibatches_last], compiled_call)
step("compiled loop in bfloat16", way, best, "loop", tolerance=1e-2)

# %%
# Two side steps (on step 2): threads, or a CUDA graph
# ----------------------------------------------------
#
# With threads, each core takes a model of its own, where before all cores shared each
# layer and waited for the slowest. This can gain where cores wait long, as beside other
# programs; a gain that is seen there may vanish on a quiet machine.


def in_threads():
    return torch.stack([*pool.map(call, models_last, minibatches_last)])


with ThreadPoolExecutor(threads, "", torch.set_num_threads, (1,)) as pool:
    step("loop in channels_last, threads", in_threads, "loop in channels_last")

# %%
# The next cell is for NVIDIA GPUs and prints nothing elsewhere. A CUDA graph records
# all that a way starts, and starts it as one. It works in fixed memory: copy new inputs
# into the old ones, and copy the logits before the next call.
# ``mode="reduce-overhead"`` compiles and records, but copies the stacked parameters in
# every call (pytorch#121861). ``cudnn.benchmark`` lets cuDNN try its algorithms.


def recorded(way):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = way()
    return lambda: (graph.replay(), logits)[1]


def benchmarked():
    torch.backends.cudnn.benchmark = True
    logits = ways["loop in channels_last"]()
    torch.backends.cudnn.benchmark = False
    return logits


if device.type == "cuda":
    step("loop in channels_last, benchmark", benchmarked, "loop in channels_last")
    reduced = torch.compile(vmap(predict), mode="reduce-overhead")
    way = partial(reduced, params, buffers, minibatches)
    step("compiled vmap, reduce-overhead", way, "compiled vmap")
    params16 = {name: p.to(half) for name, p in params.items()}
    way = partial(compiled_vmap, params16, buffers, minibatches.to(half))
    step("compiled vmap in bfloat16", way, "compiled vmap", tolerance=1e-2)
    for name in [name for name in steps if "," not in name]:
        bound = 1e-2 if "bfloat16" in name else 1e-5
        step(f"{name}, graph", recorded(ways[name]), name, tolerance=bound)

# %%
# Which way is the fastest here?
# ------------------------------
#
# The first line compares the two forms to copy, in float32. If your results bear fewer
# bits, step 5 says what they gain over the loop. The other lines name the steps that
# gained nothing over the step before.

pair = ("compiled vmap", best) if compiler else ("vmap", "loop")
verdict = (
    f"{pair[0].capitalize()} against {pair[1]}: {said(*steps[pair[0]][-1][pair[1]])}."
)
print(verdict)
for name, (*_, gains) in steps.items():
    for before, gain in [*gains.items()][:1]:
        if gain[1] <= 1.02:
            print(f"no gain: {name} against {before}: {said(*gain)}")

# %%
fig, ax = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
x = torch.logspace(math.log10(5), math.log10(200), 50)
ax.loglog(x, (x * bandwidth / peak).clamp(max=1), color="C5", label="roof")
markers = "osD^v<>pPXhH8d*1234+x"
for marker, (name, (size, share, _)) in zip(markers, steps.items(), strict=False):
    mid, low, high = share
    color, fill = "C1" if "vmap" in name else "C0", "full" if "comp" in name else "none"
    look = {"fmt": marker, "color": color, "fillstyle": fill, "label": name}
    ax.errorbar(flops / size, mid, [[mid - low], [high - mid]], **look)
ax.set_xlabel("operations for each byte (compiled, filled: at most)")
ax.set_ylabel("share of the roof, float32")
ax.set_title(f"Ten CNNs under one roof, {where}")
fig.legend(loc="outside lower center", ncols=2, fontsize="small")
listing = ", ".join(f"{name} {share[0]:.0%}" for name, (_, share, _) in steps.items())
fig.set_label(
    "Shares of the roof against operations for each byte; the roof rises with the "
    f"speed of a copy and is flat at that of a product: {listing}. {verdict}"
)

# %%
# **If the loop is faster,** what helps one model helps all: layout, compiler, fewer
# bits. **If vmap is faster,** to start single layers probably took long: their work is
# small, or cores wait for each other at each start, as they do beside other programs.
# **If no difference was seen and the interval is narrow,** keep the form that is easier
# to read; if it is wide, this run does not say which is faster.
# ``plot_when_vmap_pays.py`` finds from how many models on ``vmap`` wins.
#
# **Below the roof,** a way probably pays for what is no wide product: a first layer
# with one input channel, pooling, the large weights of ``fc1`` that are read for only a
# few images. **Above it** are fewer bits, an algorithm with fewer multiplications, or
# code better than this product, which is measured and no limit of the hardware.
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
# "NYI" means that it is not yet implemented. Ask for the layout in the loop, and leave
# that of ``vmap`` to the compiler.
#
# Remember
# --------
#
# - Compile the loop and ``vmap``, and time both in turns: which one wins depends on the
#   device and on the size of the layers.
# - Time bfloat16 before you take it: where its product is not faster, expect little.
# - A compiled function keeps eight compiled forms, then runs uncompiled. A new dtype,
#   layout or number of threads takes one. Varying batch sizes take the loop two or
#   three in all, but ``vmap`` over convolutions one each (tested): pad them to a few
#   sizes.
#
# Next
# ----
#
# - ``plot_how_equal.py``: what fewer bits do to your results.
# - ``plot_what_vmap_runs.py``: where the milliseconds of ``vmap`` go.
# - ``plot_memory.py``: what ``vmap`` costs in memory, and how chunks help.
#
# References
# ----------
#
# - Williams, Waterman and Patterson: Roofline, 2009,
#   `doi:10.1145/1498765.1498785 <https://doi.org/10.1145/1498765.1498785>`_.
# - Grouped convolutions slower than many single ones:
#   `pytorch#73764 <https://github.com/pytorch/pytorch/issues/73764>`_.
# - The compiler's eight forms:
#   `pytorch#124269 <https://github.com/pytorch/pytorch/issues/124269>`_; inputs copied:
#   `pytorch#121861 <https://github.com/pytorch/pytorch/issues/121861>`_.
