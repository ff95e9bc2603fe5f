"""
Faster ways to run many MLPs
============================

Predict with an ensemble of MLPs in one batched matrix product for each layer, and see
what each step from a loop over the models to such products gains on your machine.

**In short.** Stack the weights, and write each layer as one ``torch.baddbmm``: this
computes what ``vmap`` computes, with fewer operators. What it gains over a loop depends
on the networks, so each step is timed twice: with 1,000 small ones and 16 larger ones.

Read ``plot_ensembling.py`` before. To train, see ``plot_faster_training.py``.
"""

# %%
# Set-up
# ------

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
where = f"{device.type.upper()}, {torch.get_num_threads()} threads"
if device.type == "cuda":
    where = torch.cuda.get_device_name()
print(f"{where}; float32 precision: {torch.get_float32_matmul_precision()}")

# %%
# The lines to copy
# -----------------
#
# Write one line for each layer. If all members share one input, the second function
# makes their first layers one wide product: step 5 says whether that gains.


def predict(params, x):  # [member, row, in]
    w1, b1, w2, b2 = params.values()
    x = torch.baddbmm(b1[:, None], x, w1.mT).relu_()  # [member, row, hidden]
    return torch.baddbmm(b2[:, None], x, w2.mT)  # [member, row, out]


def predict_shared(params, x):  # [row, in]
    w1, b1, w2, b2 = params.values()
    x = torch.addmm(b1.flatten()[:, None], w1.flatten(0, 1), x.mT).relu_()
    x = x.unflatten(0, b1.shape).mT  # [member, row, hidden]
    return torch.baddbmm(b2[:, None], x, w2.mT)  # [member, row, out]


def mlp(inputs, hidden, outputs):
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    ).requires_grad_(False)  # to predict only; or call under torch.no_grad()


models = [mlp(64, 32, 10).to(device) for _ in range(1000)]
x = torch.randn(1000, 16, 64, device=device)  # 16 rows for each member
params, _ = stack_module_state(models)  # "0.weight": [1000, 32, 64], ...
print("logits", [*predict(params, x).shape], [*predict_shared(params, x[0]).shape])

# %%
# The same with ``vmap``, and the check to keep, in float64 on the CPU:

with torch.device("meta"):
    skeleton = mlp(64, 32, 10)  # its code serves all sizes of weights


def one(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


params64 = {name: p.cpu().double() for name, p in params.items()}
x64 = x.cpu().double()
apart = predict(params64, x64) - vmap(one)(params64, x64)
together = vmap(one, in_dims=(0, None))(params64, x64[0])
apart = apart.abs() + (predict_shared(params64, x64[0]) - together).abs()
assert apart.max() < 1e-10, f"by hand is not what vmap computes: {apart.max():.0e}"
print(f"vmap and both functions: at most {apart.max():.0e} apart in float64")

# %%
# How each step gets its number
# -----------------------------
#
# Two ways take turns, and the gain is the median of the ratios within a turn. A way
# counts as faster or slower if the whole 95 % interval, in brackets, lies more than 2 %
# from 1. **"No difference seen" with a wide interval decides nothing**: repeat the run
# on a quiet machine. Compare the two times of a line only.


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
# Each step takes turns with the way that it changes, after four calls of each, at both
# sizes, in float32 unless named, without gradients. A rival's time is a median of seven
# turns or more; the way's is that, divided by the gain. Logits have to agree to within
# 1e-5, in bfloat16 to within 0.02.

rows = 64 if device == cpu else 1024
larger = [mlp(784, 1024, 10).to(device) for _ in range(16)]
ensembles = {"1,000 small": models, "16 larger": larger}
inputs = [x, torch.randn(16, rows, 784, device=device)]
stacks = [params, stack_module_state(larger)[0]]
ways, gains = {}, {}


def step(name, before, function, members, inputs=inputs, tolerance=1e-5):
    """Check a way, and time it beside the one that it changes."""
    pairs = zip(members, inputs, strict=True)
    ways[name] = [partial(function, *pair) for pair in pairs]
    both = zip(ensembles, ways[name], ways.get(before, []), strict=before is not None)
    for size, way, rival in both:
        off = (way().float() - rival().float()).abs().max().item()
        assert off < tolerance, f"{name}: logits are {off:.0e} off those of {before}"
        (was, *_), (now, *gain) = in_turns(rival, way, seconds=0.2)
        gains.setdefault((name, before), []).append(gain)
        print(f"{size}: {name} {now * 1e3:.3g} ms, {before} {was * 1e3:.3g} ms:")
        print(f"    {said(*gain)}")


# %%
# Step 1: a loop without modules
# ------------------------------
#
# The loop that people write calls modules. The better loop calls the functions of their
# layers, on rows of the stacked weights.


def alone(weights, x):  # of one member
    w1, b1, w2, b2 = weights
    return F.linear(F.linear(x, w1, b1).relu_(), w2, b2)


def loop(call, members, x):
    return torch.stack([call(m, a) for m, a in zip(members, x, strict=True)])


unstacked = [[*zip(*params.values(), strict=True)] for params in stacks]
step("loop", None, partial(loop, nn.Module.__call__), ensembles.values())
step("better loop", "loop", partial(loop, alone), unstacked)

# %%
# Step 2 (on step 1): all members in one call
# -------------------------------------------
#
# The better loop calls three operators for each member. ``vmap`` calls seven, apart
# from views, for all members together (tested).

step("vmap", "better loop", vmap(one), stacks)

# %%
# Step 3 (on step 2): by hand
# ---------------------------
#
# ``vmap`` scales each bias, adds it after the product in a pass of its own, and its
# ``relu`` writes a new tensor. ``baddbmm`` writes the bias first and lets the product
# add to it (tested on CPUs), and ``relu_`` works in place. Three operators remain
# (tested).

step("by hand", "vmap", predict, stacks)
step("by hand", "better loop", predict, stacks)

# %%
# **If by hand is faster,** that is what ``vmap`` and its further passes cost here.
#
# Step 4 (on steps 1 to 3): compile
# ---------------------------------
#
# The compiler can join what stands between the products. With ``dynamic=True`` it
# compiles once for all sizes above 1 if those of the first call differ; each size of 1
# takes a further form (both tested). The first calls:

warnings.filterwarnings("ignore", module="torch")  # of torch.compile
compiled_vmap = torch.compile(vmap(one), dynamic=True)
compiled_predict = torch.compile(predict, dynamic=True)
compiled_alone = torch.compile(alone, dynamic=True)
start, compiler = timer(), True
try:
    compiled_vmap(params, x)
    compiled_predict(params, x)
    compiled_alone(unstacked[0][0], x[0])
    print(f"compiling three functions took {timer() - start:.1f} s")
except torch._dynamo.exc.TorchDynamoException as problem:
    compiler = False
    print("The compiler failed:", str(problem).split("\n\n")[0])

# %%
# The better loop can call one compiled member, too.

if compiler:
    step("compiled vmap", "vmap", compiled_vmap, stacks)
    step("compiled vmap", "by hand", compiled_vmap, stacks)
    step("compiled by hand", "by hand", compiled_predict, stacks)
    step("compiled loop", "better loop", partial(loop, compiled_alone), unstacked)

# %%
# **If compiled vmap is as fast as by hand,** you need not write the layers yourself. By
# hand, only ``relu_`` stands between the products, so there is little to join. **If the
# compiled loop loses with small members,** the reason is probably that a compiled
# function checks its inputs in every call.
#
# Step 5 (on steps 2 and 3): one input for all members
# ----------------------------------------------------
#
# If all members see the same rows, ``vmap`` with ``in_dims=(0, None)`` still runs one
# product for each member (tested). By hand, first with a view of the input in the shape
# of a stack, which copies nothing, then by ``predict_shared``:

views = [x[0].expand_as(x) for x in inputs]
shared = [x[0] for x in inputs]
step("vmap, shared", None, vmap(one, in_dims=(0, None)), stacks, shared)
step("by hand, shared", "vmap, shared", predict, stacks, views)
step("wide product", "by hand, shared", predict_shared, stacks, shared)

# %%
# Between the last two, the operations are the same, so a difference is probably one of
# the library, between one large product and several smaller ones, or of the layout.
#
# Step 6 (on step 3): fewer bits
# ------------------------------
#
# bfloat16 stores 7 bits of fraction in half of the bytes, and some processors multiply
# faster in it. Convert the weights once.

half = torch.bfloat16
stacks16 = [{name: p.to(half) for name, p in params.items()} for params in stacks]
inputs16 = [x.to(half) for x in inputs]
step("by hand, bfloat16", "by hand", predict, stacks16, inputs16, tolerance=0.02)

# %%
# Step 7 (on NVIDIA GPUs): a CUDA graph
# -------------------------------------
#
# A CUDA graph records all that a way starts, and starts it as one, in fixed memory:
# copy new inputs into the old ones, and copy the logits before the next call.
# ``mode="reduce-overhead"`` compiles and records, but copies the stacked parameters in
# every call (pytorch#121861).


def recorded(way):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = way()
    return graph, logits


def replay(graph, logits):
    graph.replay()
    return logits


if device.type == "cuda":
    for name in ["better loop", "vmap", "by hand"]:
        graphs = zip(*map(recorded, ways[name]), strict=True)
        step(f"{name}, graph", name, replay, *graphs)
    if compiler:
        reduced = torch.compile(vmap(one), mode="reduce-overhead")
        step("vmap, reduce-overhead", "compiled vmap", reduced, stacks)

# %%
# Which steps gained here?
# ------------------------
#
# By hand beside the better loop; every step is in the figure:

best = zip(ensembles, gains["by hand", "better loop"], strict=True)
verdict = "; ".join(f"{size}, {said(*gain)}" for size, gain in best)
print(f"By hand beside the better loop: {verdict}.")

# %%

fig, ax = plt.subplots(figsize=(6.4, 6.4), layout="constrained")
for number, size in enumerate(ensembles):
    gain, low, high = torch.tensor([both[number] for both in gains.values()]).T.numpy()
    y = [row - 0.15 + 0.3 * number for row in range(len(gains))]
    ax.errorbar(gain, y, xerr=[gain - low, high - gain], fmt="os"[number], label=size)
ax.axvspan(0.98, 1.02, color="C5", alpha=0.4, label="up to 2 %")
labels = [f"{name}\n(beside {before})" for name, before in gains]
ax.set_yticks(range(len(gains)), labels, fontsize="small")
ax.invert_yaxis()
ax.set_xscale("log", base=2)
ax.xaxis.set_major_formatter("{x:g}")
ax.set_xlabel("gain, with its interval")
ax.set_title(f"Ways to predict, {where}")
fig.legend(loc="outside lower center", ncols=3)
fig.set_label(
    "The gain of each step with its interval, for 1,000 small networks and for 16 "
    f"larger ones. By hand beside the better loop: {verdict}."
)

# %%
# **If vmap beats the better loop only with small networks,** their calls probably take
# longer than their work. If a narrow interval reaches the band, keep what is simpler.
#
# How fast could it be?
# ---------------------
#
# For each member, a layer does 2 · rows · in · out operations, and moves in · out
# weights and rows · (in + out) activations, of 4 bytes each. With few rows, the weights
# count most, with rows / 2 operations for each of their bytes, so that to read them
# should take longer than to multiply. Below each time by hand stand two parts of it:
# what the operations alone would take, at the rate of a square product, and what the
# bytes alone would take, at the rate of a copy (intervals in brackets):

side = 1024 if device == cpu else 4096
square, source = [torch.randn(n, side, device=device) for n in (side, 8192)]
target = torch.empty_like(source)
limits = partial(torch.mm, square, square), partial(target.copy_, source)
one_row = inputs[1][:, :1].contiguous()
cases = [*zip(ensembles, stacks, inputs, strict=True)]
for name, stack, data in [*cases, ("16 larger", stacks[1], one_row)]:
    rows, shapes = data.shape[1], [p.shape for p in stack.values() if p.dim() == 3]
    work = sum(2 * n * rows * a * b for n, a, b in shapes)
    moved = sum(4 * n * (a * b + rows * (a + b)) for n, a, b in shapes)
    (time, *_), *found = in_turns(partial(predict, stack, data), *limits, seconds=0.2)
    print(f"{name}, rows: {rows}, {work / moved:.1f} operations a byte:")
    print(f"    by hand {time * 1e3:.3g} ms")
    parts = {"operations": work / (2 * side**3), "bytes": moved / (2 * source.nbytes)}
    for (part, of), (_, gain, low, high) in zip(parts.items(), found, strict=True):
        print(f"    {part} {of / gain:.0%} ({of / high:.0%} to {of / low:.0%})")

both = [partial(predict, stacks[1], data) for data in (one_row, inputs[1])]
rows, (_, *gain) = inputs[1].shape[1], in_turns(*both, seconds=0.2)[1]
print(f"16 larger: {rows} rows in one call, beside {rows} times a call of one:")
print(f"    {said(*(rows * g for g in gain))}")

# %%
# The larger part is a rough limit, which a cache can beat for the bytes. Where both are
# small, something else costs the rest. The last line says what it is worth to collect
# rows before you predict.
#
# The mistake: weights that are not transposed
# --------------------------------------------
#
# ``nn.Linear`` keeps its weights as [out, in], and ``baddbmm`` wants [in, out]. Without
# ``.mT`` PyTorch raises an error, but not if the layer is square:

w, b, *_ = params.values()
try:
    torch.baddbmm(b[:, None], x, w)
except RuntimeError as problem:
    print("RuntimeError:", problem)
w, rows = w[..., :32], x[..., :32]  # a layer from 32 to 32
off = torch.baddbmm(b[:, None], rows, w) - torch.baddbmm(b[:, None], rows, w.mT)
print(f"square: no error, but outputs are up to {off.abs().max():.2f} off")

# %%
# A check against ``vmap``, like that above, notices it.
#
# Remember
# --------
#
# - Write each layer as one ``baddbmm``, most of all for many small networks, and check
#   it against ``vmap`` in float64.
# - Compare with the better loop, at your own sizes.
# - Collect rows before you predict: with few rows, most bytes are weights.
#
# Next
# ----
#
# - ``plot_how_equal.py``: what fewer bits do to your results.
# - ``plot_fastest_ensemble.py``: the same for CNNs.
# - ``plot_when_vmap_pays.py``: from how many models on one call is faster.
#
# References
# ----------
#
# - `pytorch#121861 <https://github.com/pytorch/pytorch/issues/121861>`_: parameters are
#   copied in every call.
