"""
What an ensemble costs in memory
================================

Compute from the shapes of a network how many bytes an ensemble of it needs with a
loop, with ``torch.func.vmap`` and with ``vmap(chunk_size=...)``, check the forecast
against the allocator, and choose the largest ensemble and the chunk size that fit.

**What you will learn**

- how to measure the peak memory of one call, on a CPU as on a GPU;
- why ``stack_module_state`` needs twice the memory of the models, and how to stack
  without the second copy;
- which tensors decide the peak, with and without autograd;
- what ``chunk_size`` saves, what it does to the time, and why the gradient has to be
  inside;
- how to compute the largest ensemble that fits your memory.

**Before you start**, read ``plot_ensembling.py``, which explains ``vmap``,
``functional_call`` and ``in_dims``. No GPU is needed.
"""

# %%
# Set-up
# ------
#
# All sizes stand here. ``budget`` is the memory that you allow an ensemble: change it
# and run the page again. It is your decision, as the free memory of a machine that you
# share changes from second to second. Convolutions and matrix products run in IEEE
# float32, and the default comes back at the end. One MB is a million bytes.

import copy
import os
import platform
from bisect import bisect_right

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.profiler import profile
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.benchmark import Timer

torch.manual_seed(0)

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
device = device if device.type == "cuda" else cpu  # the two that this page measures
num_threads = torch.get_num_threads()
device_names = {cpu: f"CPU ({platform.machine()}, {num_threads} threads)"}
budget = 200_000_000  # bytes, more than one member needs
num_models, num_images, chunk = 10, 32, 3
sizes = {cpu: [2, 4, 7, 10]}
chunk_sizes = {cpu: [1, 2, 3, 5]}
if device != cpu:
    device_names[device] = torch.cuda.get_device_name(device)
    sizes[device] = [20, 40, 70, 100]
    chunk_sizes[device] = [1, 2, 5, 10, 20, 50]

conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
default_precision = conv.fp32_precision, matmul.fp32_precision
conv.fp32_precision = matmul.fp32_precision = "ieee"

print(
    f"{device_names[device]}, torch {torch.__version__}, {torch.get_default_dtype()}, "
    f"precision {conv.fp32_precision} (convolutions) and {matmul.fp32_precision} "
    "(matrix products)"
)

# %%
# Ask the allocator
# -----------------
#
# The memory of the *process* is a poor measure on a CPU: it includes the program
# itself, and memory that was freed but kept for later. PyTorch's own allocator knows
# every byte that it hands out and takes back. On CUDA it keeps statistics. On a CPU
# the profiler records each event; their running sum is the memory in use, and its
# maximum is the peak. In both cases we count from what was in use before the call.
#
# This includes scratch memory that operators get from the allocator. It does not
# include what a library takes from the system by itself or what its threads allocate,
# nor the code of the program, nor gaps between blocks.


def peak_bytes(where, call):
    """Most bytes in use at once while call() runs, above those in use before."""
    if where.type == "cuda":
        call()  # in the first call, libraries allocate workspaces that they keep
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        call()
        return torch.cuda.max_memory_allocated(where) - before
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # some versions of the profiler announce themselves there
    try:
        with profile(profile_memory=True) as record:
            call()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
    events = [e for e in record.kineto_results.events() if e.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()  # negative where memory is given back
        peak = max(peak, in_use)
    return peak


# %%
# Try it where the bytes are known: the gradient of ``exp(-x)`` for four vectors of
# 16 MiB, with ``vmap``. The call makes four results of 64 MiB, two on the way forward,
# two on the way back, and never needs more than two at once, because each is freed
# after its last use. CUDA rounds each block up by at most 1 MiB; scalars add some
# bytes.

vectors = torch.zeros(4, 4 * 2**20)
known = 2 * vectors.nbytes
for where, device_name in device_names.items():
    leaf = vectors.detach().to(where).requires_grad_()

    def known_case(leaf=leaf):
        mapped = vmap(lambda row: row.view(2, -1).neg().exp().sum())(leaf)
        return torch.autograd.grad(mapped.sum(), leaf)

    measured = peak_bytes(where, known_case)
    print(f"{device_name}: known {known:,} bytes, measured {measured:,}")
    slack = 4096 if where == cpu else 4 * 2**20
    assert known <= measured <= known + slack, (
        f"a call that needs {known:,} bytes at its peak is measured at {measured:,}: "
        "the ruler is wrong, or vmap does not work on all rows at once"
    )
del leaf, vectors, known_case

# %%
# Stacking doubles the parameters
# -------------------------------
#
# The members are the small CNNs of ``plot_ensembling.py``. ``stack_module_state``
# copies their parameters, so with the list of models you hold everything twice.
# Deleting the models gives half back, after the peak. Two steps avoid it:
#
# 1. **Fill.** Allocate the stacked tensors, then make one model at a time, copy it
#    into its row, and drop it.
# 2. **Windows.** Where you need modules too, make them on the ``meta`` device, without
#    memory, and let ``load_state_dict(assign=True)`` use the rows as their parameters.


class SimpleCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        x = F.relu(self.fc1(x))
        return self.fc2(x)


with torch.device("meta"):
    skeleton = SimpleCNN()
weights = {name: weight.nbytes for name, weight in skeleton.named_parameters()}
w = sum(weights.values())  # bytes of the parameters of one member


def stack_copies():
    torch.manual_seed(1)
    models = [SimpleCNN().to(device) for _ in range(num_models)]
    return stack_module_state(models)[0]


def fill():
    torch.manual_seed(1)
    params = {
        name: torch.empty(num_models, *weight.shape, device=device)
        for name, weight in skeleton.named_parameters()
    }
    for i in range(num_models):
        model = SimpleCNN().to(device)
        for name, weight in model.named_parameters():
            params[name][i] = weight.detach()
        del model, weight  # before the next one is made
    return params


def windows(params):
    models = []
    for i in range(num_models):
        with torch.device("meta"):
            model = SimpleCNN()
        rows = {name: stack[i] for name, stack in params.items()}
        model.load_state_dict(rows, assign=True)
        models.append(model)
    return models


params = fill()
models = windows(params)
copied = stack_copies()
for name, stack in params.items():
    assert torch.equal(stack, copied[name]), f"filled and copied {name} differ"
    shared = models[1].get_parameter(name).data_ptr() == stack[1].data_ptr()
    assert shared, f"{name} of model 1 is a copy of row 1 of the stack, not a window"
del copied

print(f"{num_models} models of {w / 1e6:.2f} MB; peak on {device_names[device]}")
for label, step, expected in [
    ("models + stack_module_state", stack_copies, 2 * num_models),
    ("fill, one model at a time", fill, num_models + 1),
    ("windows on the filled stack", lambda: windows(params), 0),
]:
    measured = peak_bytes(device, step) / w
    print(f"{label:28} {measured:5.2f} models, expected {expected}")
    assert abs(measured - expected) <= 0.05 * num_models, (
        f"{label}: memory of {measured:.2f} models instead of {expected}"
    )

# %%
# The windows and the stack are the same memory: train the stack, and every module
# follows. (The tolerance of the check is for the rounding of CUDA's blocks.)
#
# The forecast
# ------------
#
# Before you run the call you know its shapes. The ``meta`` device computes them for
# you and allocates nothing.

x = torch.empty(num_images, 1, 28, 28, device="meta")
y = torch.empty(num_images, dtype=torch.int64, device="meta")  # labels
conv1 = skeleton.conv1(x)
conv2 = skeleton.conv2(conv1)
pooled, indices = F.max_pool2d(conv2, 2, return_indices=True)
logits = skeleton(x)
c1, c2, p, i = conv1.nbytes, conv2.nbytes, pooled.nbytes, indices.nbytes

print(f"MB of one member, batch {num_images}")
for label, tensor in {
    "c1  first convolution, its ReLU": conv1,
    "c2  second convolution, its ReLU": conv2,
    "p   pooled": pooled,
    "i   indices of the maxima": indices,
}.items():
    shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    print(f"{label:33}{shape!s:16} {dtype:8} {tensor.nbytes / 1e6:5.2f}")
print(f"{'w   parameters, or their gradients':58} {w / 1e6:5.2f}")

# %%
# Let :math:`n` members be in one call. The layers after the pooling are too small to
# matter.
#
# **Without autograd** a tensor is freed when nothing names it any more, so the peak is
# the largest group of neighbors. While the second ReLU runs, its input and its result
# exist, and the input of the convolution, which ``x`` names until then. While the
# pooling runs, its input and two results exist, and for :math:`n > 1` a copy of the
# input: under ``vmap`` the convolution leaves the members beside the channels, and the
# pooling wants them beside the images. With :math:`d = 2` for :math:`n > 1` and
# :math:`d = 1` otherwise:
#
# .. math:: n \cdot \max(c_1 + 2 c_2,\; d\, c_2 + p + i)
#
# **With autograd** every activation that the way back reads is saved:
# :math:`c_1 + c_2 + p + i`. On the way back, gradients come on top: :math:`w` for the
# parameters, and while the backward of the second convolution runs, :math:`c_2` for its
# result and :math:`c_1` for its input. That operator reads two tensors, the gradient of
# its result and its saved input, and libraries often copy both into the order that
# their kernels want: once more :math:`c_2 + c_1`, scratch memory inside an operator.
#
# .. math:: n \cdot (c_1 + c_2 + p + i + w + 2 c_2 + 2 c_1)
#
# Around the call there are the parameters and data of all members, and the results.
# The loop has one member in a call and fills a stack of results. ``vmap`` has all
# members in one call. ``chunk_size`` splits them; the last chunk may be smaller. The
# results of the chunks are kept and at the end **concatenated**, one tensor after
# another, so the largest one exists twice: the doubling again.


def work(members, task):
    """Bytes that one call for some members needs at its peak, its results included."""
    if task == "gradients":
        return members * (c1 + c2 + p + i + w + 2 * c2 + 2 * c1)
    d = 2 if members > 1 else 1
    return members * max(c1 + 2 * c2, d * c2 + p + i)


def forecast(size, step, task):
    """Bytes at the peak for an ensemble, step members in a call (0 loop, None all)."""
    given = size * (w + x.nbytes + y.nbytes)
    results = list(weights.values()) if task == "gradients" else [logits.nbytes]
    result = sum(results)
    if step == 0:
        return given + size * result + work(1, task)
    if step is None or step >= size:
        return given + work(size, task)
    rest = size % step
    last_full_chunk = (size - rest - step) * result + work(step, task)
    last_chunk = (size - rest) * result + work(rest, task)
    concatenation = size * (result + max(results))
    return given + max(last_full_chunk, last_chunk, concatenation)


# %%
# Three ways, and the check that they agree
# -----------------------------------------
#
# Each task is a function of one member and returns a dictionary of tensors.
# Predictions use parameters that do not require gradients, so autograd saves nothing.
# Gradients come from ``torch.func.grad`` *inside* of ``vmap``; the end of the page
# shows why. Every member has its own minibatch of noise.


def predict(params, x):
    return {"logits": functional_call(skeleton, params, (x,), strict=True)}


def loss(params, x, y):
    return F.cross_entropy(predict(params, x)["logits"], y)


def looped(function):
    """Like vmap(function), but one member after the other."""

    def call(params, *data):
        results = {}
        for i in range(len(data[0])):
            row = {name: stack[i] for name, stack in params.items()}
            for name, tensor in function(row, *(stack[i] for stack in data)).items():
                if i == 0:
                    results[name] = tensor.new_empty(len(data[0]), *tensor.shape)
                results[name][i] = tensor
        return results

    return call


def ensemble(task, step):
    """All members, step of them in one call (0 loop, None all)."""
    return looped(tasks[task]) if step == 0 else vmap(tasks[task], chunk_size=step)


tasks = {"predictions": predict, "gradients": grad(loss)}
ways = {0: "loop", None: "vmap", chunk: f"chunk_size={chunk}"}
images = torch.randn(num_models, num_images, 1, 28, 28)
targets = torch.randint(10, (num_models, num_images))
given = {"predictions": [images], "gradients": [images, targets]}

# %%
# The judge is a loop over the modules in float64. Distances are relative to the
# largest entry of each tensor. Each way may be up to three times as far from float64
# as the larger of two numbers: the loop's own distance, capped at 1e-4, and the
# rounding to expect. That is 1e-6 for predictions; for gradients, which are sums over
# all pixels of all images, it is the rounding of one term times the square root of
# their number.

exact = {"predictions": {"logits": []}, "gradients": {name: [] for name in weights}}
for model, image, target in zip(models, images, targets, strict=True):
    model64 = copy.deepcopy(model).cpu().double()
    output = model64(image.double())
    exact["predictions"]["logits"].append(output.detach())
    F.cross_entropy(output, target).backward()
    for name, weight in model64.named_parameters():
        exact["gradients"][name].append(weight.grad)

terms = num_images * conv1.shape[-1] * conv1.shape[-2]
rounding = {"predictions": 1e-6, "gradients": terms**0.5 * 2**-24}
print("distance from float64", *[f"{way:>12}" for way in ways.values()], "     allowed")
for task in tasks:
    errors = []
    for step in ways:
        data = [tensor.to(device) for tensor in given[task]]
        results = ensemble(task, step)(params, *data)
        distances = []
        for name, members in exact[task].items():
            truth = torch.stack(members)
            distance = (results[name].cpu() - truth).abs().max() / truth.abs().max()
            distances.append(distance.item())
        errors.append(max(distances))
    allowed = 3 * max(rounding[task], min(errors[0], 1e-4))
    print(f"{task:21}", *[f"{error:12.1e}" for error in [*errors, allowed]])
    for way, error in zip(ways.values(), errors, strict=True):
        assert error <= allowed, (
            f"{task}, {way}: not what the modules compute in float64, "
            f"distance {error:.1e}, allowed {allowed:.1e}"
        )

# %%
# Forecast and measurement
# ------------------------
#
# The measured call makes everything that the ensemble needs: parameters, data,
# intermediate tensors, results. The forecast leaves out only the small last layers, so
# where the library works as described the two agree almost exactly; the table shows how
# nearly. Another library may copy less inside the backward of the convolution, which
# the bound allows for: 20% of the forecast. Above it the bound is the same with the
# library that PyTorch uses on most CPUs, oneDNN; others, as those of GPUs, may take any
# workspace they like.

stacks = {to: {name: stack.to(to) for name, stack in params.items()} for to in sizes}


def cost(where, task, step, size):
    """Peak of an ensemble with all that it needs; beyond num_models, members repeat."""

    def call():
        rows = torch.arange(size, device=where) % num_models
        own = {name: stack[rows] for name, stack in stacks[where].items()}
        return ensemble(task, step)(own, *(t.to(where)[rows] for t in given[task]))

    return peak_bytes(where, call)


peaks = {}  # (device, task, members in a call, size) -> measured bytes
for where, device_name in device_names.items():
    onednn = where == cpu and torch.backends.mkldnn.is_available()
    highest = 0.2 if onednn else float("inf")
    for task in tasks:
        print(f"{device_name}, {task}: forecast MB, measured MB, relative error")
        print("models", *[f"{way:>22}" for way in ways.values()])
        for size in sizes[where]:
            print(f"{size:6}", end="")
            for step, way in ways.items():
                expected = forecast(size, step, task)
                measured = cost(where, task, step, size)
                error = measured / expected - 1
                print(f"{expected / 1e6:8.1f}{measured / 1e6:8.1f}", end="")
                print(f"{error:z7.2%}", end="")
                assert -0.2 <= error <= highest, (
                    f"{size} models, {task}, {way}: {measured:,} bytes at the peak, "
                    f"the forecast says {expected:,}"
                )
                peaks[where, task, step, size] = measured
            print()

# %%
# Look
# ----

looks = {0: ("C0", "o", "-"), None: ("C1", "^", "--"), chunk: ("C2", "s", ":")}
for where, device_name in device_names.items():
    fig, axes = plt.subplots(2, 1, figsize=(5.6, 6.6), layout="constrained")
    line = range(sizes[where][0], sizes[where][-1] + 1)
    findings = []
    for ax, task in zip(axes, tasks, strict=True):
        ends = []
        for step, way in ways.items():
            color, marker, dashes = looks[step]
            expected = [forecast(size, step, task) / 1e6 for size in line]
            measured = [peaks[where, task, step, size] / 1e6 for size in sizes[where]]
            ax.plot(line, expected, dashes, color=color)
            ax.plot(sizes[where], measured, marker, color=color, label=way)
            ends.append(f"{way} {measured[-1]:.0f} MB")
        ax.set_title(f"Memory for {task}, float32, batch {num_images}\n{device_name}")
        ax.set_xlabel("number of models")
        ax.set_ylabel("peak memory [MB]")
        ax.set_xticks(sizes[where])
        ax.set_ylim(0)
        ax.locator_params(axis="y", nbins=4)
        ax.grid(True, axis="y", alpha=0.3)
        findings.append(f"{line[-1]} models, {task}: {', '.join(ends)}.")
    axes[0].legend(title="marks: measured, lines: forecast")
    fig.set_label(
        f"Peak memory on {device_name} against the number of models, measured marks "
        f"and the lines of the forecast. {' '.join(findings)}"
    )
    print(device_name, *findings, sep="\n")

# %%
# Reading the figure
# ------------------
#
# The slope of a line is the price of one more member. In the loop these are its
# parameters, its data and its results: with gradients, the parameters count twice.
# ``vmap`` pays for the activations of every member on top, so its line is the steepest.
# ``chunk_size`` follows ``vmap`` up to one chunk; from there on the activations are
# paid for and it rises more slowly, in steps where the last chunk becomes full; for
# many members the concatenation of the results decides, and the steps disappear. Marks
# away from their line are memory that shapes cannot predict.
#
# What a chunk size costs in time
# -------------------------------
#
# Each call costs time before it computes, and one member leaves most of a GPU idle:
# this favors many members in a call. A tensor that leaves the cache, or needs fresh
# memory from the system every time, may be slow: this favors few. Where the best chunk
# size lies is a property of the machine.
#
# Timed in IEEE float32 with all threads; no parameter requires gradients, so autograd
# works in ``grad`` only. The timer runs each statement before it measures. The table
# shows the median of its values, their interquartile range and their number. All ways
# return stacked results. The memory is measured as above.

times = {}  # (device, task, members in a call) -> first quartile, median, third [ms]
for where, device_name in device_names.items():
    size = sizes[where][-1]
    rows = torch.arange(size, device=where) % num_models
    own = {name: stack[rows] for name, stack in stacks[where].items()}
    for task in tasks:
        data = [tensor.to(where)[rows] for tensor in given[task]]
        print(f"{size} models, {task}, {device_name}")
        print("members in a call   peak [MB]   time [ms]")
        for step in [0, *chunk_sizes[where], None]:
            function = ensemble(task, step)
            scope = {"function": function, "own": own, "data": data}
            call = "function(own, *data)"
            timer = Timer(call, globals=scope, num_threads=num_threads)
            runs = timer.blocked_autorange(min_run_time=1.6).times
            quartiles = torch.tensor(runs).quantile(torch.tensor([0.25, 0.5, 0.75]))
            low, median, high = times[where, task, step] = (1e3 * quartiles).tolist()
            peaks[where, task, step, size] = cost(where, task, step, size)
            name = {0: "1 (loop)", None: f"{size} (all)"}.get(step, step)
            print(f"{name:>17}{peaks[where, task, step, size] / 1e6:12.1f}", end="   ")
            print(f"{median:.1f} ({high - low:.1f}, {len(runs)})")

# %%
# In the figure, the peak memory stands below each chunk size.

for where, device_name in device_names.items():
    fig, axes = plt.subplots(2, 1, figsize=(5.6, 6.6), layout="constrained")
    size, steps = sizes[where][-1], [*chunk_sizes[where], None]
    ticks = [*chunk_sizes[where], size]
    findings = []
    for ax, task in zip(axes, tasks, strict=True):
        quartiles = [times[where, task, step] for step in steps]
        low, median, high = zip(*quartiles, strict=True)
        space = [f"{peaks[where, task, step, size] / 1e6:.0f} MB" for step in steps]
        loop_time, loop_space = times[where, task, 0][1], peaks[where, task, 0, size]
        ax.fill_between(ticks, low, high, color="C1", alpha=0.2)
        ax.plot(ticks, median, "^-", color="C1", label="vmap")
        loop_label = f"loop, {loop_space / 1e6:.0f} MB"
        ax.axhline(loop_time, color="C0", linestyle="--", label=loop_label)
        ax.set_title(f"Time for {task}, {size} models, float32\n{device_name}")
        ax.set_xlabel(f"chunk_size ({size}: all in one call) and peak memory")
        ax.set_ylabel("time [ms]")
        ax.set_xscale("log")
        labels = [f"{n}\n{mb}" for n, mb in zip(ticks, space, strict=True)]
        ax.set_xticks(ticks, labels=labels)
        ax.minorticks_off()
        ax.set_ylim(0)
        ax.locator_params(axis="y", nbins=4)
        ax.grid(True, axis="y", alpha=0.3)
        ax.legend(loc="lower right")
        best = median.index(min(median))
        findings.append(
            f"{task} of {size} models: vmap has its lowest median with {ticks[best]} "
            f"in a call, {median[best]:.0f} ms and {space[best]}; all in one call "
            f"{median[-1]:.0f} ms and {space[-1]}; {loop_label} and {loop_time:.0f} ms."
        )
    fig.set_label(
        f"Time of vmap on {device_name} against the chunk size, the loop as a "
        f"horizontal line, peak memory below each chunk size. {' '.join(findings)}"
    )
    print(device_name, *findings, sep="\n")

# %%
# **If all members in one call are the fastest**, one chunk does not keep the device
# busy, and ``chunk_size`` is for the case that memory runs out. **If a chunk is
# faster**, large tensors cost more time than fewer calls save, and ``chunk_size`` saves
# time and memory together. **If the loop is the fastest**, ``vmap`` buys no time here.
# Differences within the bands, or between few values, mean nothing. In all cases the
# activations grow with the chunk, so take the smallest one whose time you accept.
#
# The largest ensemble that fits
# ------------------------------
#
# The forecast grows with the number of models, so the largest ensemble within a budget
# is a search in the formula. One measurement corrects it: the ratio of the measured
# peak to the forecast, which is near one if your library takes no more scratch memory
# than the formula says. Then try it: the ensemble should stay within the budget, and
# one more member should exceed it. Where the ratio is one within 1%, this page insists
# on it. Elsewhere, and on a GPU, where a library may change its algorithm from size to
# size, the table shows what happened, and a margin is advisable.


def correction(where, step, task):
    """Measured peak over the forecast."""
    size = sizes[where][-1]
    return peaks[where, task, step, size] / forecast(size, step, task)


def largest(limit, where, step, task):
    """Number of members that fit into limit bytes."""
    ratio = correction(where, step, task)
    numbers = range(1, 100_000)
    return bisect_right(numbers, limit, key=lambda n: ratio * forecast(n, step, task))


for where, device_name in device_names.items():
    print(f"within {budget / 1e6:.1f} MB on {device_name}; then one member more")
    for task in tasks:
        for step in ways:
            fits = largest(budget, where, step, task)
            within, beyond = (cost(where, task, step, n) for n in (fits, fits + 1))
            print(f"{task:11}  {ways[step]:12} {fits:3} models", end="")
            print(f"{within / 1e6:8.1f} MB{beyond / 1e6:8.1f} MB")
            sure = where == cpu and abs(correction(where, step, task) - 1) < 0.01
            assert not sure or within <= budget < beyond, (
                f"{task}, {ways[step]}: {fits} models were to be the most that fit, "
                f"but need {within:,} bytes of {budget:,}, and one more {beyond:,}"
            )
if device.type == "cuda":
    torch.cuda.empty_cache()  # give back what the allocator keeps
    free, _ = torch.cuda.mem_get_info(device)
    for task in tasks:
        for step, way in ways.items():
            fits = largest(free, device, step, task)
            print(
                f"{free / 1e9:.1f} GB are free: {fits} models, {task}, {way}, by the "
                "formula, not tried"
            )

# %%
# When it goes wrong
# ------------------
#
# In training code it is natural to write ``vmap(loss, chunk_size=...)`` and to call
# ``backward`` on the sum of the losses. Then every chunk saves its activations, and all
# of them wait for the way back: ``chunk_size`` divides the work, but not the largest
# part of the memory. With ``grad`` inside of ``vmap``, each chunk goes forward and back
# before the next one starts.

data = [tensor.to(device) for tensor in given["gradients"]]
leaves = {name: stack.clone().requires_grad_() for name, stack in params.items()}


def autograd_outside():
    losses = vmap(loss, chunk_size=chunk)(leaves, *data)
    return torch.autograd.grad(losses.sum(), list(leaves.values()))


outside = peak_bytes(device, autograd_outside)
inside = peak_bytes(device, lambda: ensemble("gradients", chunk)(params, *data))
waiting = num_models * (c1 + c2 + p + i)
print(f"chunk_size={chunk}, {num_models} models, on top of parameters and data")
print(f"autograd outside of vmap: {outside / 1e6:6.1f} MB")
print(f"grad inside of vmap:      {inside / 1e6:6.1f} MB")
print(f"saved activations of all: {waiting / 1e6:6.1f} MB")
assert outside > waiting, "autograd outside of vmap no longer saves all activations"
assert inside < outside, "chunks with grad inside need as much as with autograd outside"

conv.fp32_precision, matmul.fp32_precision = default_precision

# %%
# Remember
# --------
#
# An ensemble costs its parameters once, or **twice if you stack a list of models**:
# fill the stack instead. On top come activations: the largest neighbors without
# autograd, all that are saved with it. The loop holds them for one member, ``vmap`` for
# all, ``chunk_size`` for one chunk, **provided that the gradient is inside**. The
# results of chunks are concatenated, which doubles the largest one. You can compute all
# of it from shapes; scratch memory inside operators is the library's choice, so measure
# once and correct. Which chunk size is the fastest, only your machine knows.
#
# Next
# ----
#
# - ``plot_when_vmap_pays.py``: the same question for time.
# - ``plot_what_vmap_runs.py``: the operators that a call to ``vmap`` becomes.
#
# References
# ----------
#
# - `torch.func.vmap <https://docs.pytorch.org/docs/stable/generated/torch.func.vmap.html>`_,
#   with ``chunk_size``, which began as an argument ``chunks`` in
#   `pytorch/functorch#774 <https://github.com/pytorch/functorch/pull/774>`_.
# - `CUDA memory management <https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management>`_
#   in PyTorch's documentation: what the allocator keeps, and how it rounds.
