"""
An ensemble that runs out of memory
===================================

Split a ``torch.func.vmap`` call that does not fit into memory, train an ensemble in
groups of members, and find from two measurements of your own network how many fit.

**In short.** To predict, ``vmap(..., chunk_size=k)`` under ``no_grad`` holds the
intermediate tensors of ``k`` members at a time. To train, give each group of ``k``
members a stack, a backward pass and an optimizer of its own. A loop in which each
model has an optimizer of its own needs least memory of the four ways
measured: the run prints the time of each.

**Before you start**, read ``plot_ensembling.py``, which explains ``vmap`` and
``functional_call``.
"""

# %%
# Set-up
# ------
#
# ``make_model`` makes the CNN of ``plot_ensembling.py``; put yours there. The page runs
# on CUDA or on a CPU, where PyTorch can tell how much memory a call takes.

import json
import math
import sys
from functools import partial
from itertools import accumulate, islice
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
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model():
    convolutions = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()]
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU()]
    return nn.Sequential(*convolutions, *head, nn.Linear(128, 10)).to(device)


num_models, images = 10 if device.type == "cpu" else 100, 16
x = torch.randn(num_models, images, 1, 28, 28, device=device)
y = torch.randint(10, (num_models, images), device=device)
print(
    f"{num_models} models, {images} images each, on {device}, torch {torch.__version__}"
)

# %%
# Split a prediction
# ------------------

params, buffers = stack_module_state([make_model() for _ in x])
skeleton = make_model().to("meta").eval()  # code without memory


def predict(params, buffers, x):
    return functional_call(skeleton, (params, buffers), (x,), strict=True)


with torch.no_grad():
    logits = vmap(predict, chunk_size=2)(params, buffers, x)  # two members at a time
print(list(logits.shape))

# %%
# Train: backward for some members at a time
# ------------------------------------------
#
# Without ``no_grad``, chunks save little, because autograd keeps the tensors of all of
# them (last section). To train, split the ensemble: members are independent, so it may
# be several small ones, each with its own optimizer. A group that waits holds its
# parameters and Adam's state, but neither gradients nor activations.
# ``stack_module_state`` copies; with a generator of models, those of one group at a
# time exist beside the stacks.


def loss(params, buffers, x, y):
    return F.cross_entropy(predict(params, buffers, x), y)


def in_groups(models, x, y, size):
    models, groups = iter(models), []
    for own_x, own_y in zip(x.split(size), y.split(size), strict=True):
        params, buffers = stack_module_state(list(islice(models, len(own_x))))
        optimizer = torch.optim.Adam(params.values(), fused=True)
        groups.append((params, buffers, optimizer, own_x, own_y))
    return groups


def step(groups):
    for params, buffers, optimizer, own_x, own_y in groups:
        vmap(loss)(params, buffers, own_x, own_y).sum().backward()
        optimizer.step()
        optimizer.zero_grad()  # frees the gradients before the next group


skeleton.train()
groups = in_groups((make_model() for _ in x), x, y, size=2)
step(groups)

# %%
# How many models fit
# -------------------
#
# PyTorch's profiler records each block of memory that a tensor takes and gives back.
# What a library takes by itself is not seen. On CUDA these lines tell the peak, with
# what was there before:
#
# .. code-block:: none
#
#    torch.cuda.reset_peak_memory_stats()
#    logits = vmap(predict, chunk_size=2)(params, buffers, x)
#    print(torch.cuda.max_memory_allocated() / 1e6, "MB")


def trace(call):
    """What the profiler records during call(), in order of time."""
    cpu = [ProfilerActivity.CPU]
    with (
        torch.autograd.set_multithreading_enabled(False),  # nothing is freed later
        profile(activities=cpu, profile_memory=True, acc_events=True) as record,
    ):
        call()
    with TemporaryDirectory() as folder:
        record.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    own = 1 if device.type == "cuda" else 0  # numbers of devices in a trace
    events = [e for e in events if e.get("args", {}).get("Device Type", own) == own]
    return sorted(events, key=lambda event: event.get("ts", 0))


def peak_mb(call):
    """Most memory in use during call() above that before, in millions of bytes."""
    changes = [e["args"]["Bytes"] for e in trace(call) if e["name"] == "[memory]"]
    return max(accumulate(changes, initial=0)) / 1e6


with torch.no_grad():
    for size in None, 2:
        peak = peak_mb(lambda k=size: vmap(predict, chunk_size=k)(params, buffers, x))
        print(f"predict, chunk_size={size}: {peak:.0f} MB")

# %%
# If the peak grows along a straight line, two sizes tell how many models fit into a
# budget. The run checks that: it measures this number of models, and one more.


def how_many(budget, small, large):
    """Members that fit, from two measured pairs (members, MB)."""
    (n, low), (m, high) = small, large
    per_member = (high - low) / (m - n)
    return int(n + (budget - low) / per_member)


def train(count, size, images=images):
    x = torch.randn(count, images, 1, 28, 28, device=device)
    y = torch.randint(10, (count, images), device=device)
    groups = in_groups((make_model() for _ in x), x, y, size)
    for _ in range(2):  # Adam makes its state in the first
        step(groups)


def peak_of(count, size):
    return peak_mb(lambda: train(count, size))


n, budget = num_models // 5, 25 * num_models  # MB; the budget is yours
for name, size in {"all at once": 1000, f"in groups of {n}": n}.items():
    fits = how_many(budget, *[(k, peak_of(k, size)) for k in (n, num_models // 2)])
    measured, more = peak_of(fits, size), peak_of(fits + 1, size)
    verdict = "right" if measured <= budget < more else "off"
    print(f"{name}: {fits} models should fit into {budget} MB: {verdict}")
    print(f"  measured: {measured:.0f} MB, with one more {more:.0f} MB")
    assert 0.5 < measured / budget < 2, "the forecast is off by more than a factor of 2"

# %%
# The budget of a GPU is ``torch.cuda.mem_get_info()[0]`` bytes after
# ``torch.cuda.empty_cache()``, less a margin: CUDA's limit counts memory that PyTorch
# has *reserved*, which includes freed blocks kept for later, while a peak counts what
# tensors hold (`allocated <https://docs.pytorch.org/docs/stable/notes/cuda.html>`_). If
# the forecast is off, the line may have a kink, where another phase peaks or a library
# chooses another algorithm: measure nearer to the size that you want.
#
# The error, and its cure
# -----------------------
#
# Here a limit makes memory short: on CUDA PyTorch's own, on Linux one of the address
# space; memory that the process has freed but kept comes on top, so that a peak
# somewhat above ``mb`` may train (if both do, lower ``mb``). On other systems the call
# succeeds. The minibatches are four times as large as before.


def error_within(mb, call):
    """What call() raises if this process may take mb MB more from the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved() + mb * 1e6
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    elif sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(mb * 1e6)
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        call()
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        return str(error)
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
        elif sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# %%

mb = 200 if device.type == "cpu" else 30 * num_models
for name, size in {"all at once": num_models, f"in groups of {n}": n}.items():
    error = error_within(mb, lambda size=size: train(num_models, size, 4 * images))
    outcome = error.splitlines()[0] if error else "trained"
    peak = peak_mb(lambda size=size: train(num_models, size, 4 * images))
    print(f"{name}, a peak of {peak:.0f} MB, within {mb} MB more: {outcome}")

# %%
# If you retry after such an error, do so outside of ``except``: there the error still
# holds the tensors of the call that failed (`PyTorch's FAQ
# <https://docs.pytorch.org/docs/stable/notes/faq.html>`_).
#
# Which tensors make the peak
# ---------------------------
#
# The figure shows one training step, after a first one has made Adam's state. Gradients
# are what ``optimizer.zero_grad`` frees, parameters and Adam's state are calculated and
# not recorded, blocks under 0.1 MB are left out, and the rest is called activations. On
# CUDA, `PyTorch's memory viewer
# <https://docs.pytorch.org/docs/stable/torch_cuda_memory.html>`_ shows each block and
# the line that took it.


def timeline(size):
    """Milliseconds of a step; MB of parameters, state, gradients, activations."""
    groups = in_groups((make_model() for _ in x), x, y, size)
    step(groups)  # makes Adam's state
    events = trace(lambda: step(groups))
    frees = [(e["ts"], e["ts"] + e["dur"]) for e in events if "zero_grad" in e["name"]]
    changes = [e for e in events if abs(e.get("args", {}).get("Bytes", 0)) > 1e5]
    mb, taken = torch.zeros(4, len(changes)), {}
    own = sum(p.nbytes for p in params.values()) / 1e6
    mb[:2, 0] = torch.tensor([own, 2 * own])  # Adam holds two numbers a parameter
    for i, e in enumerate(changes):
        address = e["args"]["Addr"]
        mb[3, i] = e["args"]["Bytes"] / 1e6
        if mb[3, i] > 0:
            taken[address] = i
        elif any(start <= e["ts"] <= end for start, end in frees):
            for k in (taken[address], i):
                mb[2:, k] = mb[2:, k].flip(0)  # it was a gradient
    return [(e["ts"] - changes[0]["ts"]) / 1e3 for e in changes], mb.cumsum(1)


# %%

kinds = ["parameters", "Adam's state", "gradients", "activations"]
lines = {"all at once": timeline(num_models), f"in groups of {n}": timeline(n)}
found = []
for name, (_, mb) in lines.items():
    peak = mb[:, mb.sum(0).argmax()]
    parts = ", ".join(f"{m:.0f} {kind}" for m, kind in zip(peak, kinds, strict=True))
    found += [f"{name}, {peak.sum():.0f} MB at the peak: {parts}"]
print(*found, sep="\n")

# %%

colors = "#0072b2", "#e69f00", "#009e73", "#cc79a7"
fig, axes = plt.subplots(1, 2, sharey=True, layout="constrained")
for ax, (name, (ms, mb)) in zip(axes, lines.items(), strict=True):
    ax.stackplot(ms, mb, step="post", labels=kinds, colors=colors)
    ax.set(title=name, xlabel="time of the CPU [ms]")
axes[0].set_ylabel("memory of tensors [MB]")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
fig.suptitle(f"One training step of {num_models} models, {device}, float32")
fig.set_label(f"Memory in one training step, by kind. {'; '.join(found)}.")

# %%
# In groups, gradients and activations are those of one group at a time, while
# parameters and Adam's state are those of all members.
#
# Groups train what a loop trains
# -------------------------------
#
# The loop has a model and an Adam of its own for each member. In float64, on the CPU,
# rounding stays below 1e-10 here.


def adam(models):
    return torch.optim.Adam([p for m in models for p in m.parameters()], fused=True)


def loop(models, optimizers, x, y):
    each = len(models) // len(optimizers)  # models of an optimizer
    for i, (model, own_x, own_y) in enumerate(zip(models, x, y, strict=True)):
        F.cross_entropy(model(own_x), own_y).backward()
        if (i + 1) % each == 0:
            optimizers[i // each].step()
            optimizers[i // each].zero_grad()


models = [make_model().cpu().double() for _ in range(3)]
optimizers = [adam([model]) for model in models]
data = x[:3].cpu().double(), y[:3].cpu()
groups = in_groups(models, *data, size=2)
for _ in range(2):
    step(groups)
    loop(models, optimizers, *data)
distance = 0
for i, model in enumerate(models):
    for name, p in model.named_parameters():
        difference = groups[i // 2][0][name][i % 2] - p
        distance = max(distance, difference.abs().max().item())
print(f"after two steps, parameters are within {distance:.0e} of those of a loop")
assert distance < 1e-10, f"groups do not train what a loop trains: {distance:.0e}"

# %%
# The price in time
# -----------------
#
# A training step in one call, in groups, and in a loop over the models, with one
# optimizer for all of them and with one for each. Memory is what comes on top of
# parameters and Adam's state.


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

models, others = [[make_model() for _ in x] for _ in range(2)]
whole, parts = [in_groups((make_model() for _ in x), x, y, k) for k in (num_models, n)]
ways = {"all at once": lambda: step(whole), f"in groups of {n}": lambda: step(parts)}
ways["loop, one Adam"] = partial(loop, models, [adam(models)], x, y)
own = [adam([model]) for model in others]
ways["loop, an Adam each"] = partial(loop, others, own, x, y)
times = in_turns(*ways.values(), seconds=3.0)
for (name, way), (seconds, *gain) in zip(ways.items(), times, strict=True):
    against = said(*gain) if name != "all at once" else ""
    print(f"{name:18} {peak_mb(way):5.0f} MB {seconds * 1e3:6.1f} ms  {against}")

# %%
# The first time is a median of at least seven turns, warm. The others are that median
# divided by the median ratio, which stands behind them with its 95 % interval. **Where
# a loop is smaller and not slower, it needs no** ``vmap``. Only a row that says slower
# pays for its smaller memory with time.
#
# The mistake: autograd records outside of vmap
# ---------------------------------------------
#
# Stacked parameters require gradients. Where autograd records outside of ``vmap``, it
# saves tensors of every chunk for a later backward pass, and **the call needs more
# memory** (tested). The peaks are those of gradients, without an optimizer. Even the
# first one holds the results twice, in parts and together. ``grad`` in chunks without
# ``no_grad`` may need more than one backward pass without chunks.


def chunks():
    return vmap(grad(loss), chunk_size=n)(params, buffers, x, y)


def one_backward(chunk_size):
    losses = vmap(loss, chunk_size=chunk_size)(params, buffers, x, y)
    return torch.autograd.grad(losses.sum(), list(params.values()))


print(f"gradients, {n} members at a time: {peak_mb(torch.no_grad()(chunks)):.0f} MB")
print(f"the same without no_grad: {peak_mb(chunks):.0f} MB")
print(f"one backward for all chunks: {peak_mb(partial(one_backward, n)):.0f} MB")
print(f"one backward, no chunks: {peak_mb(partial(one_backward, None)):.0f} MB")

# %%
# Remember
# --------
#
# ``chunk_size`` bounds the intermediate tensors of a call under ``no_grad``; its
# results it may hold twice. To train, give each group of members a stack, a backward
# pass and an optimizer, or keep a loop where it is not slower: with an optimizer for
# each model it needed least here. Two measurements of your own network forecast how
# many fit: measure that number, too.
#
# Next
# ----
#
# - ``plot_regression.py``: what all the members are for.
# - ``plot_recipes.py``: to stack with one model beside the stack.
# - ``plot_how_far.py``: to train one share of the members after the other.
# - ``plot_many_devices.py``: more members than one device holds.
#
# References
# ----------
#
# `pytorch/functorch#774 <https://github.com/pytorch/functorch/pull/774>`_ proposed
# chunks for a call that did not fit into 11 GB; `pytorch#91157
# <https://github.com/pytorch/pytorch/pull/91157>`_ made them ``chunk_size``.
