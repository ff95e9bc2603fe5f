"""
What vmap really runs
=====================

List the operators that ``torch.func.vmap`` runs for your own function, forward and
backward, beside those of a loop, and find out which of them take the milliseconds.

**In short.** ``vmap`` runs one operator for all models where a loop runs one for each,
and adds some of its own. On a Linux CPU its results may also be so large that they lie
in fresh memory at every call, which can cost more than all operators that it saves.

Before you start, read ``plot_ensembling.py``.
"""

# %%
# Set-up
# ------

import ctypes
import math
import platform
import warnings
from collections import defaultdict
from difflib import SequenceMatcher
from itertools import zip_longest

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import timer

torch.manual_seed(0)
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.backends.cuda.matmul.fp32_precision = "ieee"
accelerator = torch.accelerator.current_accelerator(check_available=True)
device = accelerator or torch.device("cpu")
num_models = 10
print(f"{device.type}, torch {torch.__version__}, IEEE float32")

# %%
# List the operators of your call
# -------------------------------
#
# A dispatch mode sees every operator that reaches a backend, not what runs inside of
# it. Views move no data and are left out.


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.bytes = [], 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results = operator(*args, **(kwargs or {}))
        if not operator.is_view and "_unsafe_view" not in str(operator):
            name = str(operator).split(".")[1]
            shapes = ["x".join(map(str, x.shape)) for x in args if torch.is_tensor(x)]
            groups = [f"groups={x}" for x in args if "conv" in name and type(x) is int]
            self.calls.append(" ".join([name, *shapes[:2], *groups]))
            tensors = filter(torch.is_tensor, tree_leaves((args, kwargs, results)))
            self.bytes += sum(x.nbytes for x in tensors)
        return results


def forward_and_backward(function, *args):
    with Operators() as forward:
        outputs = function(*args)
    loss = outputs.sum()
    with Operators() as backward:
        loss.backward()
    return forward.calls, backward.calls


# %%
# Put your own function in place of ``one``, a convolution, a ReLU and a linear layer.
# Left is what a loop runs for each of its ten models, right is what ``vmap`` runs:


def one(kernel, offset, weight, bias, x):
    hidden = torch.relu(F.conv2d(x, kernel, offset))
    return F.linear(hidden.flatten(1), weight, bias)


shapes = [4, 1, 3, 3], [4], [5, 64], [5]
stack = [torch.randn(10, *s, device=device, requires_grad=True) for s in shapes]
first = [rows[0].detach().requires_grad_() for rows in stack]
x = torch.randn(10, 7, 1, 6, 6, device=device)  # 7 images for each model
looped = forward_and_backward(one, *first, x[0])
batched = forward_and_backward(vmap(one), *stack, x)

for side, left, right in zip(["forward", "backward"], looped, batched, strict=True):
    print(f"{side + ', each model of a loop':46} {side}, vmap")
    names = [[call.split()[0] for call in calls] for calls in (left, right)]
    for _, i, j, k, m in SequenceMatcher(None, *names).get_opcodes():
        for pair in zip_longest(left[i:j], right[k:m], fillvalue=""):
            print("{:46} {}".format(*pair))

# %%
# After each name stand the shapes of its first two tensors.
#
# - **A convolution becomes one grouped convolution**, forward and backward. The models
#   are folded into the channels, 40 in place of 4; with ``groups=10`` no model sees the
#   channels of another. If all models share ``x``, no groups are needed (tested).
# - **Each matrix product of a linear layer becomes a batched one**: ``bmm`` in place of
#   ``addmm`` and ``mm``.
# - **A bias is split off.** Its ``add`` moves a whole result once more (``mul`` scales
#   it by 1).
#
# **With batching rules, their number does not grow with the models** (tested).
#
# Ten CNNs: fewer operators
# -------------------------
#
# From here on: the CNN of ``plot_ensembling.py``, ten models with a minibatch for each,
# forward and without autograd.


def make_cnn():
    return nn.Sequential(
        *[nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()],
        *[nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU()],
        nn.Linear(128, 10),
    )


models = [make_cnn().to(device) for _ in range(num_models)]
params, buffers = stack_module_state(models)
minibatches = torch.randn(num_models, 40, 1, 28, 28, device=device)
with torch.device("meta"):
    skeleton = make_cnn()


def member(params, buffers, x):
    return functional_call(skeleton, (params, buffers), (x,), strict=True)


@torch.no_grad()
def loop():
    return torch.stack([m(x) for m, x in zip(models, minibatches, strict=True)])


@torch.no_grad()
def one_call(chunk_size=None):
    return vmap(member, chunk_size=chunk_size)(params, buffers, minibatches)


# %%

with Operators() as looped:
    expected = loop()
with Operators() as batched:
    outputs = one_call()
torch.testing.assert_close(outputs, expected, atol=1e-6, rtol=1e-6)
for name, seen in {"loop": looped, "vmap": batched}.items():
    print(f"{name}: {len(seen.calls)} operators on {seen.bytes / 1e6:,.0f} MB")

# %%
# The megabytes are the tensors that the operators read and write. ``vmap`` has more,
# above all for the biases, and for a ``clone`` before the pooling (tested).
#
# Where the milliseconds go
# -------------------------
#
# **What should happen.** Loop and ``vmap`` do the same arithmetic. ``vmap`` starts
# fewer operators and moves more bytes. So expect at most the loop's time plus the time
# to move the extra bytes. Their rate is that of one large addition in memory that was
# used before; caches are ignored.


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

source, target = torch.ones(2, batched.bytes // 8, device=device)  # 4 bytes a number
((seconds, *_),) = in_turns(lambda: torch.add(source, 1, out=target), seconds=0.3)
extra = (1 - looped.bytes / batched.bytes) * seconds
rate = f"{batched.bytes / seconds / 1e9:.3g} GB/s"
print(f"{rate}, so vmap should take at most {1e3 * extra:.4g} ms more")

# %%
# Warm, at least seven turns: the loop's median, and the others' from the median ratio.
# Brackets hold that ratio's interval, without the rate's noise.


def compare():
    ways = loop, one_call, lambda: one_call(chunk_size=2)
    (loop_time, *_), (time, *gain), (in_chunks, *other) = in_turns(*ways)
    limit = loop_time + extra
    print(f"loop {1e3 * loop_time:.4g} ms, vmap {1e3 * time:.4g} ms: {said(*gain)}")
    print(f"vmap in chunks of two {1e3 * in_chunks:.4g} ms: {said(*other)}")
    against = said(*(limit / loop_time * g for g in gain))
    print(f"prediction: at most {1e3 * limit:.4g} ms; against it, vmap: {against}")
    return gain


gains = [compare()]

# %%
# The profiler splits a call into its operators: their own work on a CPU, the time of
# their kernels on a GPU.

clock = f"self_{'cpu' if device.type == 'cpu' else 'device'}_time_total"


def by_operator(*ways, rounds=3):
    rows = defaultdict(lambda: [0.0, 0.0])
    for column, way in enumerate(ways):
        with profile(acc_events=True) as record:
            start = timer()  # waits for a GPU
            for _ in range(rounds):
                way()
            rows["whole call"][column] = 1e3 * (timer() - start) / rounds
        for event in record.key_averages():
            if event.key.startswith("aten::"):
                rows[event.key[6:]][column] = getattr(event, clock) / 1e3 / rounds
    rows = dict(sorted(rows.items(), key=lambda row: -sum(row[1])))
    shown = dict(list(rows.items())[:8])
    shown["rest"] = [2 * t[0] - sum(t) for t in zip(*shown.values(), strict=True)]
    print(f"{'milliseconds':26}{'loop':>10}{'vmap':>10}{'more':>10}")
    for name, (x, y) in shown.items():
        print(f"{name:26}{x:10.1f}{y:10.1f}{y - x:+10.1f}")
    return rows


found = {"memory as it is": by_operator(loop, one_call)}

# %%
# Means of three calls; the rows below the first add up to it. It differs from the time
# above by the profiler's work, by running one way at a time, and by noise.
# (``clamp_min`` is the ``relu``, ``copy_`` the ``clone``.) Read the column "more":
#
# - **Nearly only vmap has** ``add`` and ``copy_``. The prediction contains their bytes,
#   but not in fresh memory.
# - **Both have** the convolution, ``clamp_min`` and the pooling, with the same
#   arithmetic. What ``vmap`` takes more there was not predicted. Two suspects follow,
#   fresh memory and groups; a third, the cache, is not separated here.
#
# On a CPU, large results need fresh memory
# -----------------------------------------
#
# The allocator of most Linux systems (glibc) usually takes a block above 32 MiB from
# the system and returns it when it is freed (`mallopt
# <https://man7.org/linux/man-pages/man3/mallopt.3.html>`_). So each call writes to new
# pages, and the first write to a page waits for the system: a *page fault*. Two
# settings stop that; chunks (results below 32 MiB) usually do. (Without glibc, or on a
# GPU, the cell prints nothing.)


def keep_memory():
    """From now on, memory that is freed stays in this process."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-4, 0)  # M_MMAP_MAX: map no block
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
    import resource  # not on Windows

    def page_faults(chunk_size=None):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        one_call(chunk_size)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    print(f"page faults: vmap {page_faults():,}, in chunks {page_faults(2):,}")
    keep_memory()
    gains.append(compare())
    found["memory kept"] = by_operator(loop, one_call)
    print(f"page faults, memory kept: {page_faults():,}")
    for memory, rows in found.items():
        more = sum(rows[name][1] - rows[name][0] for name in ("add", "copy_"))
        print(f"{memory}: add, copy_ {more:.1f} ms more, predicted {1e3 * extra:.1f}")
    cause = "a cause" if gains[1][1] > 1.02 * gains[0][2] else "not seen as a cause"
    print(f"Fresh memory is {cause}.")

# %%

rows = found["memory as it is"]
names = list(rows)[1:8]
largest = max(names, key=lambda name: rows[name][1] - rows[name][0])
fig, ax = plt.subplots(figsize=(5.6, 4.4), layout="constrained")
for i, (memory, rows) in enumerate(found.items()):
    more = [b - a for a, b in (rows.get(name, (0, 0)) for name in names)]
    places = [place + 0.4 * i - 0.2 for place in range(len(names))]
    ax.barh(places, more, 0.4, label=memory, hatch=["", "//"][i], edgecolor="gray")
ax.set_yticks(range(len(names)), names)
ax.invert_yaxis()
ax.set_xlabel("milliseconds that vmap takes more than the loop")
ax.set_title(f"{num_models} CNNs by operator, {device.type}, IEEE float32")
fig.legend(loc="outside lower center", ncols=2)
fig.set_label(
    "Milliseconds that vmap takes more than the loop, by operator, "
    f"{' and '.join(found)}; most, as it is, in {largest}. "
    f"The whole call: {' and '.join(said(*gain) for gain in gains)}."
)

# %%
# **Where fresh memory is a cause**, compare the two bars of an operator: the difference
# is what the memory costs there, or noise. Call ``keep_memory`` at the start of your
# program, which then gives no memory back until it ends. Or try chunks: no setting, but
# more operators (``plot_memory.py``).
#
# Is a grouped convolution slower?
# --------------------------------
#
# The second convolution of the CNN, as ten convolutions and with ``groups=10``, on the
# same numbers. What differs is the groups, the layout, the number of calls, and, unless
# memory is kept, how much of it is fresh:

xs = torch.randn(10, len(minibatches[0]), 32, 26, 26, device=device)
weights = torch.randn(10, 64, 32, 3, 3, device=device)
folded = xs.movedim(0, 1).flatten(1, 2), weights.flatten(0, 1)
(ten, *_), (grouped, *against) = in_turns(
    lambda: [F.conv2d(x, weight) for x, weight in zip(xs, weights, strict=True)],
    lambda: F.conv2d(*folded, groups=10),
)
print(f"{memory}: ten {1e3 * ten:.4g}, groups {1e3 * grouped:.4g} ms: {said(*against)}")

# %%
# **Where groups are slower**, as on a GPU in `pytorch#73764
# <https://github.com/pytorch/pytorch/issues/73764>`_, keep the loop for convolutions; a
# shared input frees only the first one of groups.
#
# There is a performance drop because we have not yet implemented the batching rule
# ---------------------------------------------------------------------------------
#
# With this warning ``vmap`` runs an operator once for each model. Results stay right
# (tested for attention and its gradient). The other sign is a call for each model in a
# list as above. Over which operators does your function loop? The lines below miss a
# custom operator, since C++ prints its warning (``plot_custom_operators.py``).


def fallbacks(function, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vmap(function)(*args)
    texts = [str(w.message) for w in caught if "performance drop" in str(w.message)]
    return sorted({text.split("rule for ")[1].split(". ")[0] for text in texts})


qkv = torch.randn(3, num_models, 16, 4, 7, 8, device=device)  # heads: 4, tokens: 7
gradient = grad(lambda *qkv: F.scaled_dot_product_attention(*qkv).sum())
print("attention's gradient loops over", fallbacks(gradient, *qkv))

# %%
# **Write such a layer from operators that have rules**, for attention
# ``torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v`` (tested). For a layer that
# you cannot change, such as ``nn.TransformerEncoderLayer``, ``plot_transformers.py``
# has a switch, and measures when it is worth it. ``plot_what_vmap_refuses.py`` makes
# the warning an error.
#
# An LSTM or a GRU
# ----------------
#
# ``vmap`` refuses ``nn.LSTM`` and ``nn.GRU``. ``plot_recurrent.py`` writes them out.
#
# Remember
# --------
#
# ``vmap`` runs **one operator where a loop runs one for each model**, and adds some:
# split biases and copies. On a Linux CPU **large results in fresh memory** can cost
# more than it saves. **A warning about a batching rule means a loop.**
#
# Next
# ----
#
# - ``plot_fastest_ensemble.py``: other ways to run the same layers.
#
# References
# ----------
#
# - Rules of convolutions: `BatchRulesConvolution.cpp
#   <https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/functorch/BatchRulesConvolution.cpp>`_.
