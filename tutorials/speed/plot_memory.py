"""
An ensemble that runs out of memory
===================================

Split a ``torch.func.vmap`` call that does not fit with ``chunk_size``, stack models
without holding each of them twice, and forecast from two measurements of your own
network how many members fit.

**In short.** ``vmap`` holds the intermediate tensors of all members at once;
``vmap(..., chunk_size=k)`` holds those of ``k`` members and the results of all, the
largest for a moment twice, as long as autograd records nothing outside of ``vmap``. The
plain loop over members needs about as little as the smallest chunk; chunks are for when
``vmap`` is also faster.

**Before you start**, read ``plot_ensembling.py``, which explains ``vmap`` and
``functional_call``.
"""

# %%
# Set-up
# ------
#
# ``make_model`` makes the CNN of ``plot_ensembling.py``; put yours there.

import json
import math
from collections import Counter
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer

torch.manual_seed(0)
device = torch.accelerator.current_accelerator(check_available=True)
device = device or torch.device("cpu")
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.backends.cuda.matmul.fp32_precision = "ieee"


def make_model():
    convolutions = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()]
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU()]
    return nn.Sequential(*convolutions, *head, nn.Linear(128, 10))


num_models = 10 if device.type == "cpu" else 60
x = torch.randn(num_models, 16, 1, 28, 28, device=device)
y = torch.randint(10, (num_models, 16), device=device)
print(f"{num_models} models, 16 images each, on {device}")

# %%
# Split a prediction
# ------------------

models = [make_model().to(device) for _ in range(num_models)]
params, buffers = stack_module_state(models)
del models  # the stack is a copy
with torch.device("meta"):
    skeleton = make_model()


def predict(params, buffers, x):
    return functional_call(skeleton, (params, buffers), (x,), strict=True)


with torch.no_grad():
    logits = vmap(predict, chunk_size=2)(params, buffers, x)  # two members at a time
print(list(logits.shape))

# %%
# Split the gradients
# -------------------
#
# ``torch.func.grad`` works under ``no_grad``, and nothing is recorded outside of it.
# **It keeps its graph until it is done**, while a plain backward frees each activation
# after its use. So if your call nearly fits, try ``one_backward`` without chunks.


def loss(params, buffers, x, y):
    return F.cross_entropy(predict(params, buffers, x), y)


def one_backward(chunk_size=None):
    losses = vmap(loss, chunk_size=chunk_size)(params, buffers, x, y)
    return torch.autograd.grad(losses.sum(), list(params.values()))


with torch.no_grad():
    gradients = vmap(grad(loss), chunk_size=2)(params, buffers, x, y)

# %%
# Train: backward for some members at a time
# ------------------------------------------
#
# If you train with ``losses.sum().backward()``, ``chunk_size`` bounds nothing (see the
# mistake below). Call ``backward`` for each chunk.


def backward_in_chunks(params, buffers, x, y, chunk_size):
    gradients = {name: torch.zeros_like(p) for name, p in params.items()}
    for start in range(0, len(x), chunk_size):
        rows = slice(start, start + chunk_size)
        leaves = {name: p[rows].detach().requires_grad_() for name, p in params.items()}
        for name, leaf in leaves.items():
            leaf.grad = gradients[name][rows]  # a view; backward adds in place
        own = {name: b[rows] for name, b in buffers.items()}
        vmap(loss)(leaves, own, x[rows], y[rows]).sum().backward()
    return gradients


optimizer = torch.optim.SGD(params.values(), lr=0.01)
gradients = backward_in_chunks(params, buffers, x, y, chunk_size=2)
for name, p in params.items():
    p.grad = gradients[name]
optimizer.step()

# %%
# Both give the gradients of a loop
# ---------------------------------
#
# The loop knows nothing of ``vmap``. In float64, here on the CPU, rounding is far below
# any mistake.


def loop(params, buffers, x, y):
    gradients = {name: torch.empty_like(p) for name, p in params.items()}
    for i in range(len(x)):
        row = {name: p[i].detach().requires_grad_() for name, p in params.items()}
        own = {name: b[i] for name, b in buffers.items()}
        loss(row, own, x[i], y[i]).backward()
        for name, leaf in row.items():
            gradients[name][i] = leaf.grad
    return gradients


@torch.no_grad()
def grad_in_chunks(params, buffers, x, y, chunk_size):
    return vmap(grad(loss), chunk_size=chunk_size)(params, buffers, x, y)


double = {k: p.detach().cpu().double() for k, p in params.items()}
double = double, buffers, x.cpu().double(), y.cpu()
expected = loop(*double)
for way in grad_in_chunks, backward_in_chunks:
    found = way(*double, chunk_size=2)
    distance = max((found[k] - expected[k]).abs().max().item() for k in expected)
    print(f"{way.__name__}: within {distance:.0e} of the loop in float64")
    assert distance < 1e-10, f"{way.__name__} is not the loop: {distance:.0e}"

# %%
# Stack without holding each model twice
# --------------------------------------
#
# ``stack_module_state`` copies, so with the list of models you hold **every parameter
# twice**. This returns the same, and holds one model beside the stack.


@torch.no_grad()
def stack_one_at_a_time(make_model, num_models):
    with torch.device("meta"):  # shapes without memory
        params, buffers = stack_module_state([make_model()] * num_models)
    for stack in params, buffers:
        for name, t in stack.items():
            rows = torch.empty_like(t, device=device)
            stack[name] = rows.requires_grad_(t.requires_grad)
    for i in range(num_models):
        model = make_model()  # or load a checkpoint
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            (params | buffers)[name][i] = tensor
        del model, tensor  # before the next model is made
    return params, buffers


# %%
# Measure the peak of your own call
# ---------------------------------
#
# PyTorch's allocator knows every byte that it hands out, including what an operator
# needs only while it runs. On an NVIDIA GPU it keeps statistics; on a CPU the profiler
# records each change. On a GPU, a backward pass has a thread of its own, which may free
# memory after the call has returned; so here it has to use the thread of the call.


def peak_mb(call):
    """Most memory in use during call() above that before, in millions of bytes."""
    if device.type == "cuda":
        with torch.autograd.set_multithreading_enabled(False):
            call()  # in the first call, libraries take workspaces that they keep
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    changes = [e["args"]["Bytes"] for e in trace(call) if e["name"] == "[memory]"]
    return max(accumulate(changes, initial=0)) / 1e6


def trace(call):
    """What the profiler records during call(), in order of time."""
    cpu = [ProfilerActivity.CPU]
    with (
        torch.autograd.set_multithreading_enabled(False),
        profile(activities=cpu, profile_memory=True, acc_events=True) as record,
    ):
        call()
    with TemporaryDirectory() as folder:
        record.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return sorted(events, key=lambda e: (e.get("ts", 0), -e.get("dur", 0)))


def stack_all():
    return stack_module_state([make_model().to(device) for _ in range(num_models)])


one_model = sum(p.nbytes for p in skeleton.parameters()) / 1e6
all_at_once = peak_mb(stack_all) / one_model
one_by_one = peak_mb(lambda: stack_one_at_a_time(make_model, num_models)) / one_model
print(f"peak of stacking: {all_at_once:.1f} models; one by one: {one_by_one:.1f}")

# %%
# How many members fit, and which chunk size
# ------------------------------------------
#
# Peak memory grows nearly along a straight line. Put all that your ensemble needs into
# one function of the number of members: the stack, data, gradients, and the optimizer's
# step if you train. Measure it for n and 2n members, n at least 2, and once with
# ``chunk_size=1``. The chunk size found is low on purpose: a further member of a chunk
# is counted like one of the ensemble, with its row of the stack.


def peak_of(size, chunk_size=None):
    def everything():
        params, buffers = stack_one_at_a_time(make_model, size)
        rows = torch.arange(size, device=device) % num_models
        return grad_in_chunks(params, buffers, x[rows], y[rows], chunk_size)

    return peak_mb(everything)


n, budget = num_models // 3, 20 * num_models  # MB
first, second, ones = peak_of(n), peak_of(2 * n), peak_of(num_models, chunk_size=1)
per_member = (second - first) / n
fits = n + int((budget - first) // per_member)
chunk_size = max(1, 1 + int((budget - ones) / per_member))
print(f"{per_member:.1f} MB a member; {fits} fit into {budget} MB")
for size, chunk in [(fits, None), (num_models, chunk_size), (num_models, None)]:
    measured = peak_of(size, chunk)
    verdict = "within" if measured <= budget else "beyond"
    print(f"{size} members, chunk_size={chunk}: {measured:.1f} MB, {verdict} budget")
forecast = first + (num_models - n) * per_member
print(f"forecast: {forecast:.1f} MB, error {measured / forecast - 1:+.1%}")
assert 0.5 < measured / forecast < 2, "the forecast is off by more than a factor of 2"

# %%
# **If the error is not near zero**, a library chose another algorithm for another size,
# as those of GPUs do: measure nearer to the size that you want.
#
# The budget is yours. On a GPU, call ``torch.cuda.empty_cache()``, as memory that
# PyTorch keeps for later does not count as free; then ``torch.cuda.mem_get_info()``
# says what is. Leave a margin: free memory in pieces does not hold a large tensor.
#
# With parameters and inputs in ``bfloat16`` each tensor takes half as much. Put
# activation checkpointing outside of ``vmap``, never inside:
# ``checkpoint(vmap(f), ..., use_reentrant=False)``, with a plain backward.
#
# The price in time
# -----------------
#
# An idle GPU favors large chunks; caches, and fresh memory that a CPU has to ask the
# system for, favor small ones. Here memory counts above the stack and the data. All
# members at a time are one call without chunks, for "backward" ``one_backward``.


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


ensemble = params, buffers, x, y
ways = {("loop", 1): lambda: loop(*ensemble)}
for k in (1, 3, num_models // 3):
    ways["grad", k] = lambda k=k: grad_in_chunks(*ensemble, k)
    ways["backward", k] = lambda k=k: backward_in_chunks(*ensemble, k)
ways["grad", num_models] = lambda: grad_in_chunks(*ensemble, None)
ways["backward", num_models] = one_backward
peaks = {way: peak_mb(call) for way, call in ways.items()}
times = dict(zip(ways, in_turns(*ways.values(), seconds=5.0), strict=True))
for way, (seconds, *gain) in times.items():
    name, k = way
    against = said(*gain) if name != "loop" else ""
    row = f"{name:8} {k:3} at a time: {peaks[way]:6.0f} MB {seconds * 1e3:6.1f} ms"
    print(row, against)
quick = [way for way, (_, _, _, high) in times.items() if high >= 0.98]
name, k = min(quick, key=peaks.get)
print(finding := f"Not seen to be slower, with least memory: {name}, {k} at a time.")
twice = num_models * max(p.nbytes for p in skeleton.parameters()) / 1e6
print(f"all gradients, the largest twice: {num_models * one_model + twice:.0f} MB")

# %%

fig, ax = plt.subplots(layout="constrained")
for name, style in {"loop": "s", "grad": "o-", "backward": "^--"}.items():
    here = [way for way in ways if way[0] == name]
    ms, mb = [times[way][0] * 1e3 for way in here], [peaks[way] for way in here]
    ax.plot(ms, mb, style, label=name)
    for way, *dot in zip(here, ms, mb, strict=True):
        shift = (-12, -10) if name == "backward" else (4, 6)
        ax.annotate(way[1], dot, shift, textcoords="offset points")
ax.margins(x=0.15)
ax.set(xlim=0, ylim=(0, 1.15 * max(peaks.values())))
ax.set(xlabel="time of one call [ms]", ylabel="peak memory [MB]")
ax.set_title(f"Gradients of {num_models} models, {device}, float32")
ax.legend(title="number: members at a time")
fig.set_label(f"Peak memory against time, a dot for each chunk size. {finding}")

# %%
# Medians of at least seven turns, warm; behind them each way against the loop, with the
# interval of the ratio. Lower left is better. "grad" in chunks cannot go below the last
# line printed, as the chunks are concatenated at the end.
#
# **If every way is slower than the loop**, take the loop. **If a small chunk is not**,
# it saves memory without a loss of time. **If only large chunks are faster**, split no
# further than memory asks for.
#
# The mistake: autograd records outside of vmap
# ---------------------------------------------
#
# Stacked parameters require gradients. Without ``no_grad``, autograd saves the tensors
# of every chunk for a backward that may never come: **chunk_size no longer bounds the
# memory**. One ``backward`` for all chunks has the same effect.


def without_no_grad():
    return vmap(grad(loss), chunk_size=1)(params, buffers, x, y)


outside = peak_mb(without_no_grad), peak_mb(lambda: one_backward(1))
print(f"without no_grad: {outside[0]:.0f} MB instead of {peaks['grad', 1]:.0f}")
print(f"one backward: {outside[1]:.0f} MB instead of {peaks['backward', 1]:.0f}")

# %%
# Which tensors make the peak
# ---------------------------
#
# The trace also says which operator took a block. On a GPU,
# ``torch.cuda.memory._record_memory_history`` shows you the same.

ms, totals, blocks, operator, end = [], [], {}, "", 0
for event in trace(ways["grad", num_models]):
    if event.get("cat") == "cpu_op" and event["ts"] > end:  # not inside of another
        operator = event["name"].split(":")[-1].strip()
        end = event["ts"] + event["dur"]
    if event["name"] == "[memory]":
        block = event["args"]
        blocks.pop(block["Addr"], None)
        if block["Bytes"] > 0:  # taken, not given back
            blocks[block["Addr"]] = operator, block["Bytes"] / 1e6
        ms.append(event["ts"] / 1e3)
        totals.append(sum(mb for _, mb in blocks.values()))
        if totals[-1] == max(totals):
            peak, at_peak = (ms[-1] - ms[0], totals[-1]), dict(blocks)
by_operator = Counter()
for operator, mb in at_peak.values():
    by_operator[operator] += mb
held = [f"{mb:.0f} MB  {name}" for name, mb in by_operator.most_common(5)]
note = "\n".join([f"peak: {peak[1]:.0f} MB, of it", *held])

# %%

fig, ax = plt.subplots(layout="constrained")
ax.fill_between([m - ms[0] for m in ms], totals, step="post", alpha=0.4)
ax.plot(*peak, "o")
ax.text(0.02, 0.97, note, va="top", transform=ax.transAxes)
ax.set(ylim=(0, 1.15 * peak[1]), xlabel="time [ms]", ylabel="memory in use [MB]")
ax.set_title(f"Gradients of {num_models} models in one call, {device}, float32")
fig.set_label(f"Memory in use over time; {', '.join(note.splitlines())}.")

# %%
# Activations stay, because the way back reads them, and its gradients come on top
# (names in ``Backward0``; ``Addmm`` is a linear layer). Times are those of the CPU; a
# GPU works later.
#
# Remember
# --------
#
# ``chunk_size`` bounds the memory of a call under ``no_grad``; to train, call
# ``backward`` for each chunk. Stack one model at a time. Two measurements of your own
# network say how many fit.
#
# Next
# ----
#
# - ``plot_regression.py``: what all the members are for.
# - ``plot_many_devices.py``: more members than one device holds.
#
# References
# ----------
#
# `pytorch/functorch#774 <https://github.com/pytorch/functorch/pull/774>`_ began
# ``chunk_size`` for a network that did not fit a GPU.
