"""
The fastest way to run ten CNNs
===============================

Compare eight ways to predict with an ensemble of CNNs on your machine, step by step
from the plain loop over the models to compiled code in bfloat16.

**In short.** Write two forms: a loop over the models, each in ``channels_last``, and
one call with ``vmap``. Compile both and time both, in float32 and, if your results bear
it, in bfloat16: only timing says which form wins on your machine.

Read ``plot_ensembling.py`` before. Compiling needs a C++ compiler; on a GPU, Triton and
a C compiler.
"""

# %%
# Set-up
# ------

import copy
import math
import warnings
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
conv.fp32_precision = matmul.fp32_precision = "ieee"  # no TF32
where = torch.cuda.get_device_name() if device.type == "cuda" else device.type
batch = 16 if device == cpu else 64
warnings.filterwarnings("ignore", module="torch")  # of torch.compile
print(f"{where}, {torch.get_num_threads()} threads; ten models, {batch} images each")

# %%
# Ten networks that only predict, and a minibatch for each:


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

# First form: a loop, in channels_last.
last = torch.channels_last
models_last = [copy.deepcopy(model).to(memory_format=last) for model in models]
minibatches_last = [x.contiguous(memory_format=last) for x in minibatches]


def call(model, x):
    return model(x)


def loop(models, minibatches, call=call):
    return torch.stack([call(m, x) for m, x in zip(models, minibatches, strict=True)])


compiled_call = torch.compile(call)

# Second form: one call.
params, buffers = stack_module_state(models)
with torch.device("meta"):
    skeleton = SimpleCNN()


def predict(params, buffers, x):
    return functional_call(skeleton, (params, buffers), (x,), strict=True)


compiled_vmap = torch.compile(vmap(predict))

# %%
# The first calls compile. If the compiler fails, call both forms uncompiled:

start, compiler = timer(), True
try:
    logits = loop(models_last, minibatches_last, compiled_call)
    logits = compiled_vmap(params, buffers, minibatches)  # [10, batch, 10]
    print(f"compiling both took {timer() - start:.1f} s")
except torch._dynamo.exc.TorchDynamoException as problem:
    compiler = False
    print("The compiler failed:", str(problem).split("\n\n")[0])

# %%
# The loop's compiled code serves every model. Changes of the weights of ``models_last``
# count in the loop's next call, changes of ``params`` in that of ``vmap`` (all tested).
#
# How each step gets its number
# -----------------------------
#
# Ways that are compared take turns, so that other programs meet them about alike. A
# difference counts if its whole interval lies more than 2 % from 1; if turns were
# independent, one of twenty such intervals might mislead. **"No difference seen" with a
# wide interval** decides nothing: repeat it on a quiet machine.


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
# How fast could it be?
# ---------------------
#
# The **roof** is the measured speed of a wide product in float32, here a 1 x 1
# convolution of 1,024 channels. Steps in bfloat16 can exceed it: their own roof is
# higher by the gain that is printed here. A step with few operations for each byte
# meets the speed of a copy first; large caches raise it.

rows, half = 4 if device == cpu else 256, torch.bfloat16
wide = torch.randn(rows, 1024, 16, 16, device=device).contiguous(memory_format=last)
kernels = torch.randn(1024, 1024, 1, 1, device=device)
source = torch.randn(10, batch, 64, 24, 24, device=device)  # what conv2 returns
roof = partial(F.conv2d, wide, kernels)
roof16 = partial(F.conv2d, wide.to(half), kernels.to(half))
copying = partial(torch.empty_like(source).copy_, source)
wide32, wide16, copied = in_turns(roof, roof16, copying)
wide_flops = 2 * rows * 16 * 16 * 1024**2
peak, bandwidth = wide_flops / wide32[0], 2 * source.nbytes / copied[0]
print(f"product {peak / 1e9:.0f}e9 operations/s, copy {bandwidth / 1e9:.1f} GB/s")
print(f"product in bfloat16 against float32: {said(*wide16[1:])}")

# %%
# All steps do the same operations, but not all move as many bytes, here counted as if
# no cache kept any (uncompiled: tested). The loop passes over its activations again for
# each ReLU, and its pooling writes indices. In ``channels_last``, ``flatten`` copies.
# ``vmap`` also adds biases in passes of their own, and copies activations before it
# pools. A compiled step moves at least what its convolutions and products do, which the
# compiler leaves to libraries.

conv1, conv2, pool = 32 * 26**2, 64 * 24**2, 64 * 12**2  # activations of an image
flops = 20 * batch * (9 * conv1 + 9 * 32 * conv2 + 128 * pool + 10 * 128)
weights = sum(p.numel() for p in models[0].parameters())
products = weights + batch * (28**2 + 2 * conv1 + conv2 + pool)  # floats of a model
moved = {"loop": products + batch * (2 * conv1 + 3 * conv2 + 3 * pool)}
moved["loop in channels_last"] = moved["loop"] + 2 * batch * pool
moved["vmap"] = moved["loop"] + batch * (2 * conv1 + 4 * conv2)
moved["vmap by hand"] = moved["loop"]

# %%
# Each step has to return what float64 gives on the CPU, to within 1e-5, in bfloat16
# 1e-2, which only catches mistakes. Then it takes turns with the steps that it builds
# on and with the wide product. A share is a median of ratios within turns, so that
# changes of the machine's speed cancel in it, but not in the milliseconds: do not
# compute one from the other, nor compare milliseconds of two steps.

models64 = [copy.deepcopy(model).cpu().double() for model in models]
exact = loop(models64, minibatches.cpu().double())
ways, steps = {}, {}


def step(name, way, *before):
    if "compiled" in name and not compiler:
        return
    bits16, bound = "bfloat16" in name, "at least " * ("compiled" in name)
    off = (way().cpu().double() - exact).abs().max().item()
    assert off < (1e-2 if bits16 else 1e-5), f"{name}: {off:.0e} off from float64"
    ways[name], floats = way, moved.get(name.split(",")[0], products)
    size = floats * (20e-6 if bits16 else 40e-6)  # megabytes of ten models
    (time, *_), *others = in_turns(way, *map(ways.get, before), roof, seconds=0.5)
    *gains, share = [(1 / gain, 1 / high, 1 / low) for _, gain, low, high in others]
    share = [flops / wide_flops * gain for gain in share]
    steps[name] = size, share
    roofed = "{:.0%} of the roof ({:.0%} to {:.0%})".format(*share)
    print(f"{name}: {time * 1e3:.1f} ms, {bound}{size:.0f} MB, {roofed}")
    for other, gain in zip(before, gains, strict=True):
        print(f"    against {other}: {said(*gain)}")


print(f"{flops / 1e9:.2f}e9 operations, float32 unless named, no gradients;")
print("after four calls, median of seven turns or more (interval):")

# %%
# Step 0: the plain loop
# ----------------------

step("loop", partial(loop, models, minibatches))

# %%
# Step 1 (on step 0): all models in one call
# ------------------------------------------
#
# ``vmap`` starts each layer once instead of ten times, which gains where starting takes
# longer than the work. It loses where its further passes, groups or ten times larger
# activations cost more. By hand, without such passes:


def by_hand(params, x):  # [10, batch, 1, 28, 28]
    (w1, b1, w2, b2, w3, b3, w4, b4), n = params.values(), len(x)
    x = x.transpose(0, 1).flatten(1, 2)  # [batch, 10, 28, 28]
    x = F.relu(F.conv2d(x, w1.flatten(0, 1), b1.flatten(), groups=n))
    x = F.relu(F.conv2d(x, w2.flatten(0, 1), b2.flatten(), groups=n))
    x = F.max_pool2d(x, 2).unflatten(1, (n, 64)).flatten(2)  # [batch, 10, 9216]
    x = F.relu(torch.baddbmm(b3[:, None], x.transpose(0, 1), w3.mT))
    return torch.baddbmm(b4[:, None], x, w4.mT)  # [10, batch, 10]


step("vmap", partial(vmap(predict), params, buffers, minibatches), "loop")
step("vmap by hand", partial(by_hand, params, minibatches), "vmap", "loop")

# %%
# What the form by hand gains over ``vmap`` is the cost of those passes, and of ``vmap``
# itself. If it loses to the loop, ten times larger activations may cost that, or on a
# GPU groups (pytorch#73764): ``plot_what_vmap_runs.py`` separates them.
#
# Step 2 (on step 0): channels last
# ---------------------------------
#
# The channels of a pixel lie side by side in memory, so libraries probably have less to
# rearrange. ``vmap`` refuses to ask for this layout (tested).

step("loop in channels_last", partial(loop, models_last, minibatches_last), "loop")

# %%
# Step 3 (on step 2): compile the loop
# ------------------------------------
#
# The compiler can join activations and pooling, which saves passes over memory.

way = partial(loop, models_last, minibatches_last, compiled_call)
step("compiled loop", way, "loop in channels_last")

# %%
# Step 4 (on step 1): compile vmap
# --------------------------------
#
# The compiler can join the same passes and the biases; on CPUs it also chooses
# ``channels_last``.

way = partial(compiled_vmap, params, buffers, minibatches)
step("compiled vmap", way, "vmap")

# %%
# Step 5 (on steps 3 and 4): fewer bits
# -------------------------------------
#
# bfloat16 stores 7 bits of fraction in half of the bytes, and some processors multiply
# in it faster: **if the wide product above gained,** yours does. ``plot_how_equal.py``
# tests what your results bear.

models16 = [copy.deepcopy(model).to(half) for model in models_last]
way = partial(loop, models16, [x.to(half) for x in minibatches_last], compiled_call)
step("compiled loop, bfloat16", way, "compiled loop")
params16 = {name: p.to(half) for name, p in params.items()}
way = partial(compiled_vmap, params16, buffers, minibatches.to(half))
step("compiled vmap, bfloat16", way, "compiled vmap")

# %%
# Side steps that need an NVIDIA GPU
# ----------------------------------
#
# A CUDA graph records all that a way starts, and starts it as one. It works in fixed
# memory: copy new inputs into the old ones, and copy the logits before the next call.
# ``mode="reduce-overhead"`` compiles and records, but copies the stacked parameters in
# every call (pytorch#121861). Elsewhere this prints nothing.


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
    for name in list(steps):
        step(f"{name}, graph", recorded(ways[name]), name)
    step("loop in channels_last, benchmark", benchmarked, "loop in channels_last")
    reduced = torch.compile(vmap(predict), mode="reduce-overhead")
    way = partial(reduced, params, buffers, minibatches)
    step("compiled vmap, reduce-overhead", way, "compiled vmap")

# %%
# Which way is the fastest here?
# ------------------------------
#
# The loop and all compiled ways take turns, first to find a candidate, then beside it.
# What could not be told from the candidate is named with it.

names = [n for n in steps if n == "loop" or "compiled" in n or not compiler]
races = {"all": names, "float32": [n for n in names if "bfloat16" not in n]}
verdicts = []
for which, race in races.items():
    times = [time for time, *_ in in_turns(*map(ways.get, race), seconds=0.3)]
    first = race.pop(times.index(min(times)))
    _, *found = in_turns(ways[first], *map(ways.get, race), seconds=1.5)
    gains = {name: gain for name, (_, *gain) in zip(race, found, strict=True)}
    near = [name for name, (*_, high) in gains.items() if high >= 0.98]
    told = "not decided between" if near else "fastest seen:"
    verdicts.append(f"{which}: {told} {' and '.join([first, *near])}")
    print(verdicts[-1])
    for name, gain in gains.items():
        print(f"    {name} against {first}: {said(*gain)}")

# %%
fig, ax = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
x = torch.logspace(0.7, 2.3, 50)
ax.semilogx(x, (x * bandwidth / peak).clamp(max=1), color="C5", label="roof")
markers = iter("osD^v<>pPXhH8d*1234+x")
for name, (size, (mid, low, high)) in steps.items():
    look = {"color": "C1" if "vmap" in name else "C0", "label": name}
    look |= {"fmt": next(markers), "fillstyle": "full" if "comp" in name else "none"}
    ax.errorbar(flops / size / 1e6, mid, [[mid - low], [high - mid]], **look)
ax.set_xlabel("operations for each byte (compiled: at most)")
ax.set_ylabel("share of the roof")
ax.yaxis.set_major_formatter("{x:.0%}")
ax.set_title(f"Ten CNNs beside the float32 roof, {where}")
fig.legend(loc="outside lower center", ncols=2, fontsize="small")
shares = [f"{name} {share[0]:.0%}" for name, (_, share) in steps.items()]
fig.set_label(
    "Share of the roof against operations for each byte; the roof rises with a copy's "
    f"speed and is flat at a product's. {'; '.join(shares + verdicts)}."
)

# %%
# **If the loop is faster,** keep it: it needs no stacking. **If vmap is faster,**
# starting single layers probably took long (``plot_when_vmap_pays.py``). **If no
# difference was seen in a narrow interval,** keep the form that is easier to read.
#
# Remember
# --------
#
# - Time bfloat16: where its product is not faster, only the bytes can gain.
# - A compiled function keeps eight compiled forms; further ones run uncompiled. All
#   ``torch.compile(vmap(...))`` share eight; a function that calls ``vmap`` inside has
#   its own. A new dtype, layout or number of threads takes one. Of many batch sizes,
#   the loop needs two or three forms, ``vmap`` over convolutions one for each (all
#   tested): pad batches to a few sizes.
#
# Next
# ----
#
# - ``plot_fastest_mlp.py``: the same for MLPs.
#
# References
# ----------
#
# - Williams, Waterman and Patterson (2009), `Roofline
#   <https://doi.org/10.1145/1498765.1498785>`_.
# - Groups: `pytorch#73764 <https://github.com/pytorch/pytorch/issues/73764>`_; copies:
#   `pytorch#121861 <https://github.com/pytorch/pytorch/issues/121861>`_; eight forms:
#   `pytorch#124269 <https://github.com/pytorch/pytorch/issues/124269>`_.
