"""
A plan for a thousand members, or a million
===========================================

Compute from two measured training steps how many members of an ensemble fit on a
device, how long they train on 1 to 1,000 devices, and what becomes the bottleneck.

**In short.** A step takes a fixed time, plus a time for each member: measure it with
one member and with many, and you know both. More devices divide only the second part;
with one shared disk, a checkpoint takes as long as before, and handing out data longer.

Before you start, read ``plot_many_devices.py``: it splits members over processes.
"""

# %%
# Set-up
# ------

import inspect
import os
import sys
from contextlib import ExitStack
from subprocess import PIPE, Popen

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.utils.benchmark import Measurement, Timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
large, where = 100, "one core of a CPU"
if device != cpu:
    large, where = 20_000, f"one {device.type.upper()} device"
print(f"a device here is {where}; torch {torch.__version__}")

# %%
# From two measurements to a plan
# -------------------------------
#
# The lines to copy. ``seconds`` are those of a step with ``sizes`` members. The rest
# are bytes: ``state`` is what a member holds between two steps (parameters, gradients,
# optimizer), ``working`` what it needs during one, ``memory`` what a device has.


def plan(num_models, devices, num_steps, sizes, seconds, state, working, memory):
    """Members of a device, calls of a step, members of a call, and the time."""
    if state + working > memory:
        raise ValueError("not even one member fits into the memory of a device")
    slope = (seconds[1] - seconds[0]) / (sizes[1] - sizes[0])
    per_member = min(max(slope, 0), seconds[1] / sizes[1])  # no cost is negative
    fixed = seconds[1] - sizes[1] * per_member
    share = -(-num_models // devices)  # rounded up
    at_once = min(share, int(memory // (state + working)), sizes[1])
    calls = -(-share // at_once)
    room = int((memory - share * state) // working)  # if all stay in memory
    chunk = max(0, min(at_once, room))
    step = calls * fixed + share * per_member
    found = dict(share=share, at_once=at_once, calls=calls, chunk=chunk, step=step)
    return found | {"hours": num_steps * step / 3600}


# Invented numbers, to show what goes in and what comes out:
sizes, seconds, counted = (1, 1000), (0.001, 0.05), (40_000, 20_000, 16e9)
for devices in 1, 8, 1000:
    made = plan(1_000_000, devices, 10_000, sizes, seconds, *counted)
    print(f"{devices} devices:", *(f"{name} {value:g}" for name, value in made.items()))

# %%
# A share that does not fit, or is larger than what you measured, needs several calls:
#
# - **Rounds**: train ``at_once`` members to their end, then the next. Members are
#   independent, so this always works, and needs the memory of one round.
# - **Chunks** of each step (``plot_memory.py``), only for members that must step
#   together: at most ``chunk`` in a call, since the states of all stay in memory. With
#   a ``chunk`` of 0 they do not fit.
# - **Shards**: more devices (``plot_many_devices.py``), where rounds take too long, or
#   the chunk is 0.
#
# A member and its training step
# ------------------------------


def mlp():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


with torch.device("meta"):
    skeleton = mlp()


def begin(num_models, **options):
    """Parameters and a minibatch of each member, all random."""
    options = {"device": device} | options
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    params = {k: torch.randn(num_models, *s, **options) / 8 for k, s in shapes.items()}
    x = torch.randn(num_models, 32, 64, **options)
    for p in params.values():
        p.requires_grad_()
    return params, x, x[..., :10].argmax(dim=-1)


def loss_of_all(params, x, y):
    def call(params, x):
        return functional_call(skeleton, params, (x,), strict=True)

    logits = vmap(call)(params, x)  # [members, 32, 10]
    return F.cross_entropy(logits.mT, y, reduction="none").mean(dim=1).sum()


def train_step(params, optimizer, x, y):
    optimizer.zero_grad()
    loss_of_all(params, x, y).backward()
    optimizer.step()


# %%
# Any plan trains the same members
# --------------------------------
#
# A plan must not change, forget or repeat a member. Seven train on "three devices" in
# rounds of two, then one by one, without ``vmap``, both in float64 on the CPU.


def rounds_of(num_models, rank, devices, at_once):
    """Numbers of the members that a device trains: a tensor for each round."""
    share = -(-num_models // devices)  # rounded up
    return torch.arange(num_models)[rank * share : (rank + 1) * share].split(at_once)


params, x, y = begin(7, dtype=torch.float64, device="cpu")
trained = []
for own in [own for rank in range(3) for own in rounds_of(7, rank, 3, at_once=2)]:
    mine = {k: p[own].detach().requires_grad_() for k, p in params.items()}
    optimizer = torch.optim.Adam(mine.values())
    for _ in range(10):
        train_step(mine, optimizer, x[own], y[own])
    trained += mine["0.weight"].detach()
alone = []
for i in range(7):
    model = mlp().cpu().double()
    model.load_state_dict({name: p[i] for name, p in params.items()})
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()
    alone.append(model[0].weight.detach())
wrong = "split members are not those that train alone"
trained, alone = torch.stack(trained), torch.stack(alone)
torch.testing.assert_close(trained, alone, atol=1e-10, rtol=0, msg=wrong)
print("7 members, split over devices and rounds, are those trained alone (1e-10)")

# %%
# How many members fit
# --------------------
#
# Count. With Adam a member holds four numbers for each parameter: itself, its gradient,
# two moments. The activations that autograd saves for the backward pass go through a
# hook; their gradients take about as much again.

params, x, y = begin(100)
optimizer = torch.optim.Adam(params.values())
train_step(params, optimizer, x, y)
held = [t for p in params.values() for t in (p, p.grad, *optimizer.state[p].values())]
state = sum(t.nbytes for t in held if t.ndim) // 100  # without the count of steps

saved = {}


def keep(t):
    saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return t


with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
    loss = loss_of_all(params, x, y)
for p in params.values():
    saved.pop(p.untyped_storage().data_ptr(), None)  # counted in the state
working = 2 * sum(saved.values()) // 100
memory = 16e9  # assumed: a small GPU, the NVIDIA T4
print(f"counted, a member: {state:,} bytes of state, {working:,} to work with")
print(f"projected: {memory // (state + working):,.0f} fit into {memory / 1e9:.0f} GB")

# %%
# Leave a margin (tested on a CPU: the peak is within a tenth of the count), or measure
# your own peak: ``plot_memory.py``.
#
# How long a step takes, with one member and with many
# ----------------------------------------------------
#
# The plan gets the times of one member and of ``large``. The other two test it: is the
# line between both straight, and is ``large`` large enough? Medians (and interquartile
# ranges) of five turns after a warm-up, float32.


def time_each(*functions):
    """A ``Measurement`` of each; they take turns, so drift hits all alike."""
    timers = [Timer("f()", globals={"f": f}, num_threads=1) for f in functions]
    turns = [[t.blocked_autorange(min_run_time=0.05) for t in timers] for _ in range(5)]
    return [Measurement.merge(turn)[0] for turn in zip(*turns, strict=True)]


def prepare(num_models):
    params, x, y = begin(num_models)
    optimizer = torch.optim.Adam(params.values())
    train_step(params, optimizer, x, y)
    return lambda: train_step(params, optimizer, x, y)


counts = [1, large // 10, large, 4 * large]
one, tenth, many, four = times = time_each(*map(prepare, counts))
for size, time in zip(counts, times, strict=True):
    ms = f"{time.median * 1e3:.2f} ms a step ({time.iqr * 1e3:.2f})"
    each = f"{time.median / size * 1e6:.1f} us a member"
    print(f"measured, {size:6,} members: {ms}, {each}")

# %%
# And with two devices?
# ---------------------
#
# Training communicates nothing, so plain processes will do for this test (to train, see
# ``plot_many_devices.py``). Each does the rounds of its plan on its own core or GPU.


def work(num_models, rank, devices, at_once):
    """Print the seconds of a step, the sum of all rounds of a device."""
    seconds = 0
    for own in rounds_of(num_models, rank, devices, at_once):
        timer = Timer("step()", globals={"step": prepare(len(own))})  # one thread
        seconds += timer.blocked_autorange(min_run_time=0.2).median
    print(seconds)


def launch(scripts):
    """Run scripts at the same time; return the number that each prints."""
    with ExitStack() as ending:
        running = []
        for script in scripts:
            process = Popen([sys.executable, "-c", script], stdout=PIPE, stderr=PIPE)
            running.append(ending.enter_context(process))
            ending.callback(process.kill)  # also if this page is interrupted
        said = [process.communicate(timeout=100) for process in running]
        if any(process.returncode for process in running):
            raise RuntimeError(b"".join(errors for _, errors in said).decode())
        return [float(printed.split()[-1]) for printed, _ in said]


# %%

imports = """
import torch, torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.utils.benchmark import Timer
"""
names = f"device = torch.device('{device.type}')\nskeleton = mlp().to('meta')"
functions = [begin, loss_of_all, train_step, prepare, rounds_of, work]
script = [imports, inspect.getsource(mlp), names, *map(inspect.getsource, functions)]
use = "" if device == cpu else "torch.accelerator.set_device_index({})\n"
num_models, took = 10 * large, {}
available = os.cpu_count() if device == cpu else torch.accelerator.device_count()
for n in {1, min(2, available)}:
    calls = [use.format(i) + f"work({num_models}, {i}, {n}, {large})" for i in range(n)]
    took[n] = max(launch("\n\n".join([*script, call]) for call in calls))

# %%
# Does the projection hold?
# -------------------------

known = [(1, large), (one.median, many.median), state, working, memory]


def project(num_models, devices):
    """Projected seconds of a step."""
    return plan(num_models, devices, 1, *known)["step"]


million = 1_000_000
measured = {(large // 10, 1): tenth.median}
measured |= {(num_models, n): time for n, time in took.items()}
print("  members  devices  projected [ms]  measured [ms]  measured / projected")
for size in [*measured, (num_models, 1000), (million, 1), (million, 1000)]:
    print("{:9,} {:8,}".format(*size), f"{project(*size) * 1e3:15,.2f}", end="")
    time = measured.get(size)
    print(f"{time * 1e3:15.2f}  {time / project(*size):.2f}" if time else f"{'-':>15}")
ratio = four.median / project(4 * large, 1)
faster = "rounds are" if ratio > 1 else "one call is"
print(f"One call of {4 * large:,} took {ratio:.2f} times the projected rounds,")
print(f"so {faster} faster here")

# %%
# **The last column is the margin to plan with.** Above 1, devices share something (two
# cores: caches and memory) or were not free. If one call is slower than rounds, it
# leaves the caches, or takes fresh memory in each step: **never project to larger
# calls**. If it is clearly faster, the device was not full: plan with a larger
# ``large``.
#
# More devices do not shorten the fixed time
# ------------------------------------------

hours = 10_000 / 3600  # of 10,000 steps of a second
devices = [round(10 ** (i / 20)) for i in range(61)]
fig, ax = plt.subplots(layout="constrained")
for style, size in [("C0--", num_models), ("C1--", million)]:
    line = [hours * project(size, n) for n in devices]
    ax.loglog(devices, line, style, label=f"{size:,} members, projected")
marks = [hours * time for time in took.values()]
ax.plot(took.keys(), marks, "C0o", label=f"{num_models:,} members, measured")
ax.plot(1, hours * one.median, "C2s", label="1 member, measured")
ax.axhline(hours * one.median, color="C2", linestyle=":")
ax.set_title(f"Training for 10,000 steps, each device {where}, float32")
ax.set_xlabel("devices")
ax.set_ylabel("time of the training [h]")
ax.legend()
fig.set_label(
    "Hours of training against devices, both logarithmic; dashed is projected. The "
    f"line of {million:,} members falls all along; that of {num_models:,}, with solid "
    "measured marks at its left end, flattens near the time of a single member."
)

# %%
# While calls are full, twice the devices take half the time. With fewer members in a
# call, its time approaches the fixed time, which no number of devices divides. (Where
# the number of calls changes, the line has a kink.) **Stop adding devices when a share
# is smaller than a call.**
#
# What becomes the bottleneck
# ---------------------------
#
# Training communicates nothing; what surrounds it does. These are **assumptions**: put
# your numbers there.

network = 1.25e9  # bytes/s of a device: 10-gigabit Ethernet
delay = 0.25e-3  # seconds to another device: half a round trip in a data center [1]
disk = 1e9  # bytes/s for all devices together: an SSD [1]
data_set, answers = 1e9, 10_000 * 10 * 4  # bytes; answers: 10,000 rows, 10 classes
num_steps = 1000  # from one checkpoint to the next


def costs(n):
    """Projected seconds from one checkpoint to the next, on n devices."""
    return {
        "training": num_steps * project(million, n),
        "all-reduce [2], prediction": 2 * (n - 1) * (delay + answers / n / network),
        "checkpoint": 0.75 * state * million / disk,  # without the gradients
        "data set, to all devices": n * data_set / disk,
        "minibatches, from disk": num_steps * million * x[0].nbytes / disk,
    }


table = {n: costs(n) for n in range(1, 1001)}
marks = (1, 10, 100, 1000)
print(f"projected seconds of {num_steps:,} steps, {million:,} members")
print(f"{'devices':26}", *(f"{n:8,}" for n in marks), " exceeds training from")
for name in table[1]:
    first = [n for n in table if table[n][name] > table[n]["training"]]
    shown = [f"{table[n][name]:8,.1f}" for n in marks]
    print(f"{name:26}", *shown, f" {first[0]} devices" if first else " -")
for n in marks:
    print(f"with {n:5,}, the longest is: {max(table[n], key=table[n].get)}")

# %%
# All is projected: "training" from measured steps, the rest from counted bytes and the
# assumed rates; the last two rows are alternatives. A **checkpoint** takes as long with
# more devices, while training gets shorter: write fewer. A **data set** that all read
# from one disk is better read once and sent by ``torch.distributed.broadcast``. Members
# that read their **minibatches** from disk wait for it: keep the data on the device, as
# ``plot_training.py`` does.
#
# The mistake: to plan from one measurement
# -----------------------------------------
#
# What one member takes, times their number:

guess, found = 4 * large * one.median * 1e3, four.median * 1e3
print(f"{4 * large:,} members: guessed {guess:.1f} ms a step, measured {found:.1f}")

# %%
# It counts the fixed time for each member. To divide the time of many by the devices is
# the opposite mistake: it divides the fixed time, too.
#
# Remember
# --------
#
# Two sizes give you the fixed time and that of a member. Never plan with larger calls
# than you measured; **stop adding devices when calls are not full**. Check the plan on
# two devices before you rent a thousand.
#
# Next
# ----
#
# - ``plot_per_sample_gradients.py``: the same transforms for other jobs.
# - ``plot_fastest_ensemble.py``: a shorter step on one device.
#
# References
# ----------
#
# - [1] J. Dean, P. Norvig: `Latency numbers every programmer should know
#   <https://gist.github.com/jboner/2841832>`_.
# - [2] P. Patarasuk, X. Yuan: Bandwidth optimal all-reduce algorithms for clusters of
#   workstations, 2009, `doi:10.1016/j.jpdc.2008.09.002
#   <https://doi.org/10.1016/j.jpdc.2008.09.002>`_.
