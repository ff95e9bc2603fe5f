"""
How much memory and time many models need
=========================================

Plan the training of thousands of small models from a small run: which of the sizes you
measured to train in one ``torch.func.vmap`` call, how much memory that takes, and how
long all of them take.

**In short.** Measure a training step with 1, 10, 100 and more models in one call. Train
all in groups of a size that you measured, one group after the other: the memory is that
of one group, and the training time is that of a group, times the number of groups. Then
check the plan on a job that is longer than the small run, and drop it if it fails.

**Before you start**, read ``plot_memory.py``: it trains an ensemble in groups.
"""

# %%
# Set-up
# ------

import json
import math
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
sizes, num_models, num_steps = (1, 10, 100, 1000), 4000, 100  # to measure; the job
if device != cpu:
    sizes, num_models, num_steps = (1, 100, 1000, 10_000), 50_000, 20
name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")

# %%
# From a small run to a plan
# --------------------------
#
# The lines to copy. They choose among the sizes that were measured, and never a larger
# one.


def plan(num_models, num_steps, measured, budget):
    """Models of a group, and seconds of all groups, one after the other.

    ``measured`` maps models of a call to seconds of a step and MB at its peak.
    """
    total = {
        size: math.ceil(num_models / size) * num_steps * seconds
        for size, (seconds, mb) in measured.items()
        if mb <= budget
    }
    if not total:
        raise ValueError("none of the measured sizes fits into the budget")
    group = min(total, key=total.get)
    return group, total[group]


# %%
# With several devices, each trains a share: ask the plan for the largest share, and
# measure while all of them are busy (``plot_many_devices.py``).
#
# The models and their training step
# ----------------------------------
#
# Put yours here. One model alone is an ordinary module with an optimizer of its own; a
# group has stacked parameters, one optimizer and one backward pass. Each model has one
# minibatch of its own, for all steps: draw yours inside ``step``.


def make_model():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


with torch.device("meta"):
    skeleton = make_model()


def draw(num_models, **options):
    """Parameters and a minibatch for each model."""
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    params = {k: torch.randn(num_models, *s, **options) / 8 for k, s in shapes.items()}
    x = torch.randn(num_models, 32, 64, **options)
    return params, x, x[..., :10].argmax(dim=-1)


def model_loss(params, x, y):
    return F.cross_entropy(functional_call(skeleton, params, (x,), strict=True), y)


# %%


def step_of_group(params, x, y):
    """A function that trains all models of a group for one step."""
    params = {name: p.requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.Adam(params.values(), fused=True)

    def step():
        optimizer.zero_grad()
        vmap(model_loss)(params, x, y).sum().backward()
        optimizer.step()

    return step


def step_of_one(model, x, y):
    """The same for one module, without vmap."""
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def begin(size, device=device):
    params, x, y = draw(size, device=device)
    if size == 1:
        return step_of_one(make_model().to(device), x[0], y[0])
    return step_of_group(params, x, y)


# %%
# A group must not change what is trained. The second of three models, in the group and
# alone, in float64 on the CPU:

params, x, y = draw(3, dtype=torch.float64, device="cpu")
one = make_model().cpu().double()
one.load_state_dict({name: p[1] for name, p in params.items()})
together, alone = step_of_group(params, x, y), step_of_one(one, x[1], y[1])
for _ in range(10):
    together()
    alone()
off = (params["0.weight"][1] - one[0].weight).abs().max().item()
assert off < 1e-10, f"a model of a group is not the model trained alone: {off:.0e}"
print(f"after ten steps, at most {off:.0e} apart")

# %%
# The small run
# -------------
#
# The sizes take turns, five of ten steps each, after two steps to warm up. The plan
# gets the mean of the 50 steps, because a long job also pays for the slow ones. Taking
# turns may cost more than a job of one size does. Memory is the peak of all tensors in
# two steps, read from PyTorch's profiler on the CPU. What a library takes by itself is
# not seen. On CUDA, the peaks in the table are still those of the CPU, and
# ``torch.cuda.max_memory_reserved()`` tells what PyTorch took.


def train(size, num_steps, device=device):
    step = begin(size, device)
    for _ in range(num_steps):
        step()


def peak_mb(size):
    """Most memory of tensors, in MB, from the start of a group to its second step."""
    cpu_only = [ProfilerActivity.CPU]
    with (
        torch.autograd.set_multithreading_enabled(False),  # nothing is freed later
        profile(activities=cpu_only, profile_memory=True, acc_events=True) as record,
    ):
        train(size, 2, "cpu")
    with TemporaryDirectory() as folder:
        record.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in events)) / 1e6


def seconds_of(step, calls=10):
    start = timer()  # waits for a GPU
    for _ in range(calls):
        step()
    return (timer() - start) / calls


# %%

steps = [begin(size) for size in sizes]
for step in steps:
    seconds_of(step, calls=2)  # warm-up
start = timer()
turns = torch.tensor([[seconds_of(step) for step in steps] for _ in range(5)])
small_run = timer() - start
measured = {}
print("models of a call  peak [MB]  a step [ms], turns from .. to  a model [us]")
for size, turn in zip(sizes, turns.T, strict=True):
    measured[size] = mean, mb = turn.mean().item(), peak_mb(size)
    spread = f"{turn.min() * 1e3:.2f} .. {turn.max() * 1e3:.2f}"
    print(
        f"{size:16,}{mb:11.3g}{mean * 1e3:13.2f} {spread:>17}{mean / size * 1e6:14.1f}"
    )

# %%
# With one model in the call, the step is that of the ordinary module. Where the largest
# size has the smallest time for a model, a still larger one may be quicker: add it.
#
# The plan, and a job that checks it
# ----------------------------------
#
# The job starts every group anew and trains it to its end; you would save it then. The
# plan's memory is that of its group in the table, also for many groups (tested). For
# comparison, what one call of all models would need is projected along a line from two
# sizes, and measured. Here, a plan counts as holding within a factor of 1.25 in time
# and 1.1 in memory.


def rounded(number):
    """Two digits, no more than a projection deserves."""
    return f"{float(f'{number:.2g}'):,g}"


def verdict(planned, found, unit, within):
    ratio = found / planned
    holds = "it holds" if 1 / within < ratio < within else "project nothing from it"
    both = f"planned {rounded(planned)} {unit}, found {rounded(found)} {unit}"
    return f"{both}, {ratio:.2f} of the plan: {holds}"


budget = 1000  # MB: yours
group, seconds = plan(num_models, num_steps, measured, budget)
print(f"planned: {num_models:,} models, {num_steps} steps, in groups of {group:,}")
start = timer()
for _ in range(math.ceil(num_models / group)):
    train(group, num_steps)  # save it here
took = timer() - start
print("time:", verdict(seconds, took, "s", within=1.25))

(few, less), (more, much) = [(size, measured[size][1]) for size in sizes[1:3]]
line = less + (num_models - few) * (much - less) / (more - few)
peak = peak_mb(num_models)
print("all in one call:", verdict(line, peak, "MB", within=1.1))
print(f"the job was {rounded(took / small_run)} times as long as the small run")

# %%
# If the time fails, compare the turns: where they differ as much, the small run was
# noisy, so repeat it. Then time what the plan leaves out: ``begin``, new minibatches,
# saving. If the memory fails, measure nearer to the size that you want.
#
# **No check, no projection.** A million models, or 10,000 steps, are more of the same
# groups, but this run has not checked them. Compare the first hundredth of such a job
# with its plan while it runs, and stop if they disagree.
#
# The mistake: to multiply the time of one model
# ----------------------------------------------
#
# The time of one model, times their number, is that of a loop over models. It says
# nothing of a group:

guess = num_models * num_steps * measured[1][0]
said = f"the job took {rounded(took)} s; from one model, one plans {rounded(guess)} s"
print(said)

# %%

ms = 1e3 * turns
fig, ax = plt.subplots(layout="constrained")
ax.loglog(sizes, ms.mean(0)[0] * torch.tensor(sizes), "C1--", label="time of one, x n")
bars = torch.stack([ms.mean(0) - ms.min(0).values, ms.max(0).values - ms.mean(0)])
ax.errorbar(sizes, ms.mean(0), bars, fmt="C0o-", capsize=4, label="measured")
ax.set_title(f"A training step of n models, {name}, float32")
ax.set_xlabel("models n of a call")
ax.set_ylabel("time of a step [ms]")
ax.legend()
fig.set_label(
    "Time of a step against models of a call, both logarithmic: measured, with bars "
    "from the shortest turn to the longest, and the time of one model times their "
    f"number. In the end, {said}."
)

# %%
# If one model times their number comes close to the job, a loop does as well as groups:
# the plan then says groups of 1, or saves little time.
#
# Remember
# --------
#
# Measure a step at several sizes, train in groups of a size that you measured, and
# multiply by the number of groups. Check the plan on a longer job, and go further only
# while the job agrees with its plan.
#
# Next
# ----
#
# - ``plot_per_sample_gradients.py``: the same transforms for other jobs.
# - ``plot_faster_training.py``: a shorter step.
# - ``plot_many_devices.py``: a share of the models for each device.
# - ``plot_saving.py``: to keep the models of a group before the next one starts.
#
# References
# ----------
#
# PyTorch: `torch.cuda.max_memory_reserved
# <https://docs.pytorch.org/docs/stable/generated/torch.cuda.memory.max_memory_reserved.html>`_.
