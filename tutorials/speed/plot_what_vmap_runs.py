"""
What vmap really runs
=====================

List the operators that ``torch.func.vmap`` runs for your own function, see where the
milliseconds go, and know what to write for a layer that it loops over or refuses.

**In short.** ``vmap`` replaces one operator for each model by one operator for all, but
large results can cost more than all saved operators. Where it has no rule it loops,
with a warning, or refuses: attention, LSTM and GRU you write out, in a few lines.

Before you start, read ``plot_ensembling.py``.
"""

# %%
# Set-up
# ------

import math
import warnings
from collections import Counter
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import timer

torch.manual_seed(0)
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.backends.cuda.matmul.fp32_precision = "ieee"
accelerator = torch.accelerator.current_accelerator(check_available=True)
device = accelerator or torch.device("cpu")
num_models = 10
print(f"{device.type}, torch {torch.__version__}, IEEE float32, timed without autograd")

# %%
# List the operators of your call
# -------------------------------
#
# Your function sees one member; the operators that run see all of them. A
# `dispatch mode <https://docs.pytorch.org/docs/stable/notes/extending.html>`_ sees
# each of them. Put your own call into the ``with``:


class Operators(TorchDispatchMode):
    """Writes down every operator that runs, but no views, which move no data."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view and "_unsafe_view" not in str(operator):
            shapes = [list(x.shape) for x in args if torch.is_tensor(x)]
            numbers = [x for x in args if type(x) is int]
            self.calls.append(" ".join(map(str, [operator, *shapes, *numbers])))
        return operator(*args, **(kwargs or {}))


def one(weight, bias, x):
    return torch.relu(F.linear(x, weight, bias))


weight = torch.randn(num_models, 128, 784, device=device)
bias = torch.randn(num_models, 128, device=device)
x = torch.randn(num_models, 64, 784, device=device)
with Operators() as seen:
    vmap(one)(weight, bias, x)
print(*seen.calls, sep="\n")

# %%
# Each line is an operator, the shapes of its tensors and its whole numbers. **A linear
# layer becomes one batched matrix product**, ``bmm``, and a separate addition of the
# bias, which for one model is part of ``addmm``. (The small ``mul`` scales the bias.)
#
# Ten CNNs: fewer operators
# -------------------------
#
# A whole network, the CNN of ``plot_ensembling.py`` with a minibatch for each model:


def make_cnn():
    return nn.Sequential(
        *[nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()],
        *[nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU()],
        nn.Linear(128, 10),
    )


models = [make_cnn().to(device) for _ in range(num_models)]
params, buffers = stack_module_state(models)
minibatches = torch.randn(num_models, 64, 1, 28, 28, device=device)
with torch.device("meta"):
    skeleton = make_cnn()


def member(params, buffers, x):
    return functional_call(skeleton, (params, buffers), (x,), strict=True)


# %%
# The loop, ``vmap``, and the check that they compute the same:


@torch.no_grad()
def loop():
    pairs = zip(models, minibatches, strict=True)
    return torch.stack([model(x) for model, x in pairs])


@torch.no_grad()
def one_call(chunk_size=None):
    return vmap(member, chunk_size=chunk_size)(params, buffers, minibatches)


with Operators() as looped:
    expected = loop()
with Operators() as seen:
    outputs = one_call()
assert torch.allclose(outputs, expected, atol=1e-6, rtol=1e-6), (
    "vmap does not compute what the loop computes"
)
each = (len(looped.calls) - 1) / num_models
print(f"operators: loop {num_models} x {each:g} + 1 stack, vmap {len(seen.calls)}")
print(*seen.calls, sep="\n")

# %%
# **A convolution becomes one grouped convolution.** The models are *folded* into the
# channels, 320 in place of 32; the last number, 10, is ``groups``: no model sees the
# channels of another. The bias, split off, reads and writes the whole output again.
# Pooling folds the models into the batch, 640 images, after a ``clone`` into that
# order. With an input that all models share, a convolution needs no groups and no copy;
# a linear layer stays a ``bmm`` (tested). **The number of operators does not grow with
# the models**, nor does it on the way back (tested).
#
# Where the milliseconds go
# -------------------------
#
# What should happen: both do the same arithmetic; ``vmap`` adds a copy and additions
# and saves the start of operators. So it should take at most a quarter more time than
# the loop, and less where starting operators takes the time. The profiler counts for
# each operator its kernels on a GPU, its own work on a CPU.

on_gpu = device.type == "cuda"
activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
clock = "self_device_time_total" if on_gpu else "self_cpu_time_total"


def milliseconds(ways, rounds=5):
    """Way -> operator -> milliseconds in one call; means, the ways take turns."""
    means = {way: Counter() for way in ways}
    for way, function in list(ways.items()) * rounds:
        with profile(activities=activities, acc_events=True) as record:
            function()
        for e in record.key_averages():
            if e.key.startswith("aten::"):
                means[way][e.key[len("aten::") :]] += getattr(e, clock) / 1e3 / rounds
    return means


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
# Times are medians of at least seven turns, warm, with the interval of the ratio in
# brackets; whole calls are timed without the profiler, which slows them. ``ways`` may
# hold your own functions:

ways = {"loop": loop, "vmap": one_call, "chunk_size=2": partial(one_call, chunk_size=2)}
calls = dict(zip(ways, in_turns(*ways.values()), strict=True))
times = milliseconds(ways)

_, gain, low, high = calls["vmap"]
held = "fails" if high < 1 / 1.25 else "holds" if low > 1 / 1.25 else "is not decided"
print(f"The prediction {held}: vmap takes {1 / gain:.2f} times the loop's time.")
for way, (seconds, *gain) in calls.items():
    against = said(*gain) if way != "loop" else ""
    print(f"  {way:14} {1e3 * seconds:8.2f} ms  {against}")

# %%
# Is the price the groups of the convolution? ``chunk_size=2`` keeps groups, two at a
# time, with results a fifth as large:

conv = {way: sum(t for op, t in times[way].items() if "conv" in op) for way in ways}
whole, chunked = (conv[way] / (conv["loop"] or 1) for way in ("vmap", "chunk_size=2"))
print(f"The convolution, loop = 1: vmap {whole:.2f}, chunk_size=2 {chunked:.2f}")
if not conv["loop"]:  # a GPU whose profiler (CUPTI) may not run
    print("The profiler saw no kernels: these numbers and the bars below say nothing.")
elif whole < 1.25:
    print("Grouped, it takes about the loop's time.")
elif chunked < 1.25:
    print("In chunks, still grouped, it is near the loop's time: the size of")
    print("the results, more than the groups, is the price.")
else:
    print("It stays slow in chunks: blame the groups, at least in part.")

# %%

shown = [op for op, _ in sum(times.values(), Counter()).most_common(5)]
bars = {op: [t[op] for t in times.values()] for op in shown}
bars["other operators"] = [
    t.total() - sum(t[op] for op in shown) for t in times.values()
]
bars["between operators"] = [
    max(0, 1e3 * calls[way][0] - t.total()) for way, t in times.items()
]

fig, ax = plt.subplots(figsize=(5.6, 4.4), layout="constrained")
left = [0] * len(ways)
hatches = ["", "//", "--", "xx", "||", "", "++"]
for i, (op, row) in enumerate(bars.items()):
    color = f"C{i}" if i < len(bars) - 1 else "none"
    look = {"color": color, "edgecolor": "gray", "hatch": hatches[i]}
    ax.barh(list(ways), row, left=left, label=op, **look)
    left = [a + b for a, b in zip(left, row, strict=True)]
ax.invert_yaxis()
ax.set_xlabel("milliseconds of one call")
ax.set_title(f"{num_models} CNNs by operator, {device.type}, IEEE float32")
fig.legend(loc="outside lower center", ncols=2)
rows = [f"{op} " + ", ".join(f"{t:.1f}" for t in row) for op, row in bars.items()]
fig.set_label(f"Stacked bars of {', '.join(ways)}, milliseconds: {'; '.join(rows)}.")

# %%
# The profiler says ``clamp_min`` for ``relu`` and ``copy_`` for ``clone``.
#
# **Where the prediction holds**, look at "between operators", where the device waits
# for Python: if only the loop waits long, ``vmap`` wins. **Where it fails on a GPU**,
# suspect the grouped convolution (pytorch#70954). **Where it fails on a CPU**, look at
# ``clamp_min``: its work is the same in both. If it grows as well, the reason is what
# all operators of ``vmap`` share, results ten times as large.
#
# On a CPU, large results need fresh memory
# -----------------------------------------
#
# The largest activation here has 94 MB. On a CPU, the allocator of Linux (glibc) takes
# blocks above 32 MiB from the system and gives them back, every time. Linux usually
# fills each page of 4 KiB with zeros when it is first written: a *page fault*, 23,000
# of them for 94 MB, inside of the operator that writes. One addition, into fresh and
# kept memory:

hidden = torch.randn(num_models, 64, 64, 24, 24, device=device)
kept = torch.empty_like(hidden)
reused, fresh = in_turns(lambda: torch.add(hidden, 1, out=kept), lambda: hidden + 1)
print(f"An addition into kept memory {1e3 * reused[0]:.2f} ms,", end=" ")
print(f"into fresh memory {1e3 * fresh[0]:.2f} ms: {said(*fresh[1:])}")

# %%
# **Where fresh memory costs much, a small** ``chunk_size`` **is the way out**: results
# below 32 MiB. Or let the allocator keep large blocks, and see the convolution with all
# ten groups:
#
# .. code-block:: bash
#
#    keep=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=9999999999
#    GLIBC_TUNABLES=$keep python plot_what_vmap_runs.py
#
# On a GPU PyTorch keeps the device's memory, so this price does not arise.
#
# There is a performance drop because we have not yet implemented the batching rule
# ---------------------------------------------------------------------------------
#
# With this warning ``vmap`` runs an operator once for each model. The result is right,
# the warning the only sign. Over which operators does your function loop?


def fallbacks(function, *args):
    """Operators over which vmap(function)(*args) loops."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vmap(function)(*args)
    texts = [str(w.message) for w in caught if "performance drop" in str(w.message)]
    return sorted({text.split("rule for ")[1].split(". ")[0] for text in texts})


def attention(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


fused = F.scaled_dot_product_attention
qkv = torch.randn(3, num_models, 16, 4, 7, 8, device=device)  # heads: 4, tokens: 7
for name, function in {"fused": fused, "matmul and softmax": attention}.items():
    gradient = grad(lambda *qkv, f=function: f(*qkv).sum(), argnums=(0, 1, 2))
    print(f"{name}: loops over {', '.join(fallbacks(gradient, *qkv)) or 'nothing'}")

# %%
# **Write such a layer from operators that have rules**, as ``attention`` does. Around a
# layer that you cannot change, ``nn.TransformerEncoderLayer`` in training, put
# ``sdpa_kernel(SDPBackend.MATH)`` of ``torch.nn.attention`` (tested). On NVIDIA GPUs
# attention has a rule forward (pytorch#133964); those for backward were still proposed
# in 2026 (pytorch#176265). Make the warning an error in your tests:
#
# .. code-block:: python
#
#    warnings.filterwarnings("error", message="There is a performance drop")
#
# An LSTM or a GRU
# ----------------
#
# ``vmap`` refuses ``nn.LSTM`` and ``nn.GRU``. Keep the modules with their
# initialization or trained weights, and write the cell out, for any number of layers:


def gru_cell(from_x, from_h, h, c):
    r_x, z_x, n_x = from_x.chunk(3, -1)
    r_h, z_h, n_h = from_h.chunk(3, -1)
    z = torch.sigmoid(z_x + z_h)
    return (1 - z) * torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h) + z * h, c


def lstm_cell(from_x, from_h, h, c):
    i, f, g, o = (from_x + from_h).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def recurrent(cell, params, x):  # time first: x.transpose(0, 1) if batch_first
    names = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
    for layer in range(sum("weight_hh" in name for name in params)):
        w_x, w_h, b_x, b_h = (params[f"{name}_l{layer}"] for name in names)
        h = c = x.new_zeros(x.shape[1], w_h.shape[1])
        outputs = []
        for from_x in F.linear(x, w_x, b_x):
            h, c = cell(from_x, F.linear(h, w_h, b_h), h, c)
            outputs.append(h)
        x = torch.stack(outputs)
    return x  # [time, batch, hidden]


# %%
# Compare it once with your own modules, in float64 on the CPU:

x = torch.randn(num_models, 20, 16, 32, device="cpu", dtype=torch.float64)
for kind, cell in {nn.GRU: gru_cell, nn.LSTM: lstm_cell}.items():
    rnns = [kind(32, 64, num_layers=2).to(x) for _ in range(num_models)]
    rnn_params, _ = stack_module_state(rnns)
    with torch.no_grad():
        outputs = vmap(partial(recurrent, cell))(rnn_params, x)
        expected = torch.stack([m(row)[0] for m, row in zip(rnns, x, strict=True)])
    name, distance = kind.__name__, (outputs - expected).abs().max().item()
    assert distance < 1e-10, f"the cell is not nn.{name}: {distance:.1e} away"
    print(f"largest distance from nn.{name} in float64: {distance:.1e}")

# %%
# With ``batch_first`` but ``x`` as it is, results are wrong and nothing complains. Two
# directions, projections or no biases raise an error (tested); dropout is left out.
# ``nn.LSTM`` runs all time steps in one operator, the cell about a dozen a step, but
# for all models: time both with your number of models.
#
# Batching rule not implemented for aten::lstm.input
# --------------------------------------------------
#
# The mistake: calling the module itself, which ``vmap`` cannot even loop over.

try:
    vmap(partial(functional_call, rnns[0]))(rnn_params, x)
    print("This version of PyTorch runs nn.LSTM: use it as it is.")
except RuntimeError as problem:
    print(f"{type(problem).__name__}: {problem}")

# %%
# Remember
# --------
#
# ``vmap`` runs **one operator where the loop runs one for each model**. On a CPU
# **large results in fresh memory** can cost more than all saved operators. **A warning
# about a batching rule means a loop**: write attention, LSTM and GRU out.
#
# Next
# ----
#
# - ``plot_fastest_ensemble.py``: other ways to run the same layers.
# - ``plot_memory.py``: what the larger tensors cost.
#
# References
# ----------
#
# - Rules of convolutions: `BatchRulesConvolution.cpp
#   <https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/functorch/BatchRulesConvolution.cpp>`_.
# - Grouped convolutions: `pytorch#70954 <https://github.com/pytorch/pytorch/issues/70954>`_.
# - Recurrent layers: `pytorch#105982 <https://github.com/pytorch/pytorch/issues/105982>`_;
#   attention: `pytorch#133964 <https://github.com/pytorch/pytorch/pull/133964>`_,
#   `pytorch#176265 <https://github.com/pytorch/pytorch/pull/176265>`_.
