"""
What vmap really runs
=====================

See which operators ``torch.func.vmap`` makes of each layer of an ensemble, forward and
backward, count them, and find out which of your own layers become one operator, fall
back to a loop, or are refused.

**What you will learn**

- what becomes of convolutions, linear layers, pooling and activations;
- why the number of operators does not grow with the number of models, and why that
  alone does not make a call fast;
- how to look beneath ``vmap`` yourself, with a few lines;
- how to recognize a layer that falls back to a loop, and one that is refused.

**Before you start**, read ``plot_ensembling.py``. No GPU is needed.
"""

# %%
# Set-up
# ------

import os
import platform
import warnings
from collections import Counter
from functools import partial
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer

torch.manual_seed(0)

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
num_threads = torch.get_num_threads()
device_names = {cpu: f"CPU ({platform.machine()}, {num_threads} threads)"}
if device.type == "cuda":
    device_names[device] = torch.cuda.get_device_name(device)
elif device != cpu:
    device_names[device] = device.type

conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
default_precision = conv.fp32_precision, matmul.fp32_precision
conv.fp32_precision = matmul.fp32_precision = "ieee"

print(
    f"{' and '.join(device_names.values())}, torch {torch.__version__}, "
    f"{torch.get_default_dtype()}, precision {conv.fp32_precision} (convolutions) and "
    f"{matmul.fp32_precision} (matrix products)"
)

# %%
# A look beneath vmap
# -------------------
#
# Inside of ``vmap`` your function sees one member. The operators that run see all of
# them. A *dispatch mode* stands between: PyTorch hands it every operator on its way to
# the device, after ``vmap`` and autograd have done their part. This one writes down the
# name, the shapes of the tensors, and for convolutions the number of groups. Views are
# left out: they change how memory is read and move none.


class Operators(TorchDispatchMode):
    """Writes down the operators that run: (name, shapes of tensors, groups or None)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if not operator.is_view and name != "_unsafe_view":
            tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            position = {"convolution": 8, "convolution_backward": 9}.get(name)
            groups = args[position] if position else None
            self.calls.append((name, [list(x.shape) for x in tensors], groups))
        return operator(*args, **(kwargs or {}))


def operators(function):
    """Operators that function() runs, and its result."""
    with Operators() as record:
        result = function()
    return record.calls, result


def text(call):
    """One line for an operator."""
    name, shapes, groups = call
    return " ".join([name, *map(str, shapes)]) + (f" groups={groups}" if groups else "")


# %%
# Each layer on its own
# ---------------------
#
# We stack four copies of one layer, run them by a loop and by ``vmap``, and look at the
# way back as well. "Own" means that every member has its own input, "shared" that all
# have the same. The layers and shapes are those of the CNN of ``plot_ensembling.py``.
#
# First comes the proof that both do the same, outputs and gradients, in float64, where
# rounding is far below any mistake.

num_models, batch = 4, 64
layers = {
    "conv1, own input": (lambda: nn.Conv2d(1, 32, 3), [batch, 1, 28, 28], 0),
    "conv1, shared input": (lambda: nn.Conv2d(1, 32, 3), [batch, 1, 28, 28], None),
    "conv2, own input": (lambda: nn.Conv2d(32, 64, 3), [batch, 32, 26, 26], 0),
    "relu, own input": (nn.ReLU, [batch, 64, 24, 24], 0),
    "pool, own input": (lambda: nn.MaxPool2d(2), [batch, 64, 24, 24], 0),
    "fc1, own input": (lambda: nn.Linear(9216, 128), [batch, 9216], 0),
    "fc1, shared input": (lambda: nn.Linear(9216, 128), [batch, 9216], None),
}


def mapped(models, in_dim):
    """vmap over the models, as a function of the stacked state and the input."""

    def one(state, x):
        return functional_call(models[0], state, (x,), strict=True)

    state_dim = 0 if list(models[0].parameters()) else None
    return vmap(one, in_dims=(state_dim, in_dim))


def stacked(models):
    """Stacked parameters of the models; layers without any give an empty dictionary."""
    return stack_module_state(models)[0] if list(models[0].parameters()) else {}


for name, (make, shape, in_dim) in layers.items():
    models = [make().double() for _ in range(num_models)]
    params, ensemble = stacked(models), mapped(models, in_dim)
    shape = shape if in_dim is None else [num_models, *shape]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = [x] * num_models if in_dim is None else x
    pairs = zip(models, inputs, strict=True)
    looped = torch.stack([model(row) for model, row in pairs])
    output = ensemble(params, x)
    weights = torch.randn_like(output)  # of the sum whose gradient is compared
    loop_grads = torch.autograd.grad(
        looped, [x, *(p for m in models for p in m.parameters())], weights
    )
    vmap_grads = torch.autograd.grad(output, [x, *params.values()], weights)
    rows = [g.reshape(num_models, -1).unbind() for g in vmap_grads[1:]]
    vmap_rows = [row for member in zip(*rows, strict=True) for row in member]
    for what, ours, theirs in [
        ("output", output, looped),
        ("gradient of the input", vmap_grads[0], loop_grads[0]),
        *[
            ("gradient of a parameter", ours, theirs.flatten())
            for ours, theirs in zip(vmap_rows, loop_grads[1:], strict=True)
        ],
    ]:
        distance = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        assert distance < 1e-12, (
            f"{name}: vmap does not compute what the loop computes, {what}: relative "
            f"distance {distance:.1e} in float64"
        )
print(f"loop and vmap agree within 1e-12 in float64 for {', '.join(layers)}")

# %%
# Now the operators, in float32:

forward, backward, single = {}, {}, {}  # layer -> operators
for name, (make, shape, in_dim) in layers.items():
    models = [make().to(device) for _ in range(num_models)]
    params, ensemble = stacked(models), mapped(models, in_dim)
    x = torch.randn(shape, device=device)
    single[name], _ = operators(partial(models[0], x))
    x = (x if in_dim is None else torch.stack([x] * num_models)).requires_grad_()
    forward[name], output = operators(partial(ensemble, params, x))
    weights, leaves = torch.randn_like(output), [x, *params.values()]
    gradient = partial(torch.autograd.grad, output, leaves, weights)
    backward[name], _ = operators(gradient)
    print(name)
    for label, calls in {
        "one model": single[name],
        f"{num_models} models": forward[name],
        "way back": backward[name],
    }.items():
        for call in calls:
            print(f"  {label:9}  {text(call)}")
            label = ""

# %%
# Read it as follows. A shape with 4 in front, such as ``[4, 64, 128]``, still has the
# models as a dimension of its own. A size that is four times that of one model has the
# models *folded* into another dimension: 128 for 32 channels, 256 for 64 images. The
# page holds itself to what it says next:
#
# - **Convolution, own input**: the models are folded into the channels, and ``groups``
#   is the number of models, so that no model sees the channels of another. The bias
#   becomes a separate addition, which reads and writes the whole result once more. The
#   way back is one grouped ``convolution_backward``.
# - **Convolution, shared input**: one *ordinary* convolution with as many times more
#   output channels. There is nothing to keep apart, because all models see the same
#   input. Only layers that see what all models share are in this position, in most
#   ensembles the first one: its output already differs between the models.
# - **Linear, own input**: the fused ``addmm`` of one model becomes a batched matrix
#   product, ``bmm``, and a separate addition of the bias. (The rule of ``addmm`` can
#   scale the bias: that is the small ``mul``.) The way back is two more, and a ``sum``
#   over the batch for the gradient of the bias.
# - **Linear, shared input**: one wide matrix product, ``mm``, and two on the way back.
# - **Pooling**: the models are folded into the batch; it works on each image alone.
# - **Activation**: the same operator on a larger tensor.
#
# A ``clone`` stands where folding needs another order in memory: a copy of the tensor.


def find(calls, *names):
    """The only call with one of these names."""
    found = [call for call in calls if call[0] in names]
    assert len(found) == 1, (
        f"expected one {' or '.join(names)} for all models, found {len(found)} among "
        f"{[call[0] for call in calls]}"
    )
    return found[0]


def expect(name, call, shapes, groups=None):
    """Shapes (the first ones) and groups of a call, as the text above says."""
    found = call[1][: len(shapes)], call[2]
    assert found == (shapes, groups), (
        f"{name}: expected {shapes}, groups {groups}, but vmap runs {text(call)}"
    )


n = num_models
for name, groups, channels in [
    ("conv1, own input", n, (1, 32)),
    ("conv1, shared input", 1, (1, 32)),
    ("conv2, own input", n, (32, 64)),
]:
    side = layers[name][1][-1]
    into, out = channels
    wide = into * groups  # channels of the input, of all models or of the shared one
    x_shape, w_shape = [batch, wide, side, side], [n * out, into, 3, 3]
    expect(name, find(forward[name], "convolution"), [x_shape, w_shape], groups)
    expect(name, find(forward[name], "add"), [[n, batch, out, side - 2, side - 2]])
    gradient = [batch, n * out, side - 2, side - 2]
    call = find(backward[name], "convolution_backward")
    expect(name, call, [gradient, x_shape, w_shape], groups)

expect("relu", find(forward["relu, own input"], "relu"), [[n, batch, 64, 24, 24]])
find(backward["relu, own input"], "threshold_backward")
pool = find(forward["pool, own input"], "max_pool2d_with_indices")
expect("pool", pool, [[n * batch, 64, 24, 24]])
pool = find(backward["pool, own input"], "max_pool2d_with_indices_backward")
expect("pool", pool, [[n * batch, 64, 12, 12], [n * batch, 64, 24, 24]])

find(single["fc1, own input"], "addmm")
product = find(forward["fc1, own input"], "bmm")
expect("fc1", product, [[n, batch, 9216], [n, 9216, 128]])
find(forward["fc1, own input"], "add")
products = [call for call in backward["fc1, own input"] if call[0] == "bmm"]
assert len(products) == 2, f"fc1: expected two bmm on the way back, {len(products)} run"
product = find(forward["fc1, shared input"], "mm")
expect("fc1, shared", product, [[n * 128, 9216], [9216, batch]])
find(forward["fc1, shared input"], "add")
products = [call for call in backward["fc1, shared input"] if call[0] == "mm"]
assert len(products) == 2, f"fc1, shared: expected two mm back, {len(products)} run"
for name in ["conv1, own input", "conv2, own input", "fc1, own input"]:
    find(backward[name], "sum")
print("groups, shapes and numbers of operators are as stated")

# %%
# The number of operators
# -----------------------
#
# So each layer is a fixed number of operators, whatever the number of models. **The
# prediction for a whole network**: the count of the loop is a straight line, the count
# of ``vmap`` is constant, forward and backward.


class SimpleCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):  # [batch, 1, 28, 28]
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        x = F.relu(self.fc1(x))
        return self.fc2(x)  # [batch, 10]


def cnn_calls(count, images, where):
    """Loop and vmap over CNNs with own minibatches: function, parameters of each."""
    models = [SimpleCNN().to(where) for _ in range(count)]
    minibatches = torch.randn(count, images, 1, 28, 28, device=where)
    params, ensemble = stacked(models), mapped(models, 0)

    def loop():
        rows = minibatches.unbind()
        return torch.stack([model(x) for model, x in zip(models, rows, strict=True)])

    return {
        "loop": (loop, [p for model in models for p in model.parameters()]),
        "vmap": (lambda: ensemble(params, minibatches), list(params.values())),
    }


model_counts = [2, 4, 6, 8]
counts = {}  # (side, direction) -> number of operators, for each number of models
for count in model_counts:
    for side, (function, leaves) in cnn_calls(count, 2, device).items():
        there, output = operators(function)
        back, _ = operators(partial(torch.autograd.grad, output.sum(), leaves))
        counts.setdefault((side, "forward"), []).append(len(there))
        counts.setdefault((side, "backward"), []).append(len(back))

print("operators, views not counted\nmodels        ", *[f"{m:5}" for m in model_counts])
for (side, direction), numbers in counts.items():
    print(f"{side}, {direction:8}", *[f"{number:5}" for number in numbers])
    steps = {more - fewer for fewer, more in pairwise(numbers)}
    assert len(steps) == 1, f"{side}, {direction}: not a straight line, {numbers}"
    (step,) = steps
    grows = "grows" if side == "loop" else "does not grow"
    assert (step > 0) == (side == "loop"), (
        f"{side}, {direction}: the number of operators should be one that {grows} with "
        f"the number of models, but it is {numbers} for {model_counts} models"
    )

fig, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
for (side, direction), numbers in counts.items():
    color, marker = ("C0", "o") if side == "loop" else ("C1", "^")
    look = {"color": color, "marker": marker}
    dashes = "-" if direction == "forward" else "--"
    ax.plot(model_counts, numbers, dashes, label=f"{side}, {direction}", **look)
ax.set_title(f"Operators of SimpleCNN, {device_names[device]}, float32")
ax.set_xlabel("number of models")
ax.set_ylabel("operators")
ax.set_xticks(model_counts)
ax.set_ylim(0)
ax.grid(True, alpha=0.3)
ax.legend()
ends = [
    f"{side} {direction}: {v[0]} to {v[-1]}" for (side, direction), v in counts.items()
]
fig.set_label(
    f"Number of operators against the number of models, {model_counts[0]} to "
    f"{model_counts[-1]}: straight rising lines for the loop, flat lines for vmap. "
    f"{'; '.join(ends)}."
)

# %%
# Where the time goes
# -------------------
#
# A smaller number of operators is not a shorter time: each of them works on more data.
# The profiler shows where the time of ten models goes. It has a record of its own of
# every operator that runs, so it also serves as a second witness: the convolutions that
# it saw must have the groups that we found above.
#
# Each share counts the time in the operator itself, without the operators that it
# calls. Under ``vmap`` an operator can appear twice, once on its way through ``vmap``,
# so the column of calls counts some twice. On a CPU the operator *is* the work. On a
# GPU it only starts a kernel, and the kernels have a record of their own: from the time
# they take, and the time of the whole call, follows how long the device waits.
# Predictions of ten models with own minibatches of 64, IEEE float32, autograd off; the
# whole call is timed with all threads after a warm-up.


def profiled(function, where):
    """The profiler's events of one call, after a warm-up."""
    activities = [ProfilerActivity.CPU]
    if where.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    function()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # some versions of the profiler announce themselves there
    try:
        with profile(
            activities=activities, record_shapes=True, acc_events=True
        ) as record:
            function()
            if where.type == "cuda":
                torch.cuda.synchronize()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
    return record.events()


for where, device_name in device_names.items():
    for side, (function, _) in cnn_calls(10, batch, where).items():
        with torch.no_grad():
            events = profiled(function, where)
            scope = {"function": function}
            timer = Timer("function()", globals=scope, num_threads=num_threads)
            runs = timer.blocked_autorange(min_run_time=2)
        clock = f"self_{'device' if where.type == 'cuda' else 'cpu'}_time_total"
        own_time, calls = Counter(), Counter()
        groups = Counter()
        for event in events:
            if event.device_type == torch.autograd.DeviceType.CPU:
                own_time[event.name] += getattr(event, clock)
                calls[event.name] += 1
            if event.name == "aten::_convolution":
                groups[event.concrete_inputs[8]] += 1
        print(
            f"{side} on {device_name}: {1e3 * runs.median:.1f} ms (interquartile range "
            f"{1e3 * runs.iqr:.1f}, {len(runs.times)} values), "
            f"groups of the convolutions: {dict(groups)}"
        )
        expected = {1: 20} if side == "loop" else {10: 2}
        assert groups == expected, (
            f"{side}: the profiler saw convolutions with groups {dict(groups)}, number "
            f"by groups, expected {expected}"
        )
        total = sum(own_time.values())
        print(f"  operator, calls, share of the {clock.split('_')[1]} time")
        for name, microseconds in own_time.most_common(6):
            print(f"  {name:32} {calls[name]:4} calls {microseconds / total:6.1%}")
        if where.type == "cuda":
            cuda = torch.autograd.DeviceType.CUDA
            on_device = [event for event in events if event.device_type == cuda]
            copies = [e for e in on_device if e.name.startswith(("Memcpy", "Memset"))]
            busy = sum(e.time_range.elapsed_us() for e in on_device) / 1e6
            waiting = max(0.0, runs.median - busy)
            print(
                f"  {len(on_device) - len(copies)} kernels, {len(copies)} copies: "
                f"{1e3 * busy:.2f} ms on the device, {1e3 * waiting:.2f} ms waiting "
                f"({waiting / runs.median:.0%} of the call)"
            )

# %%
# **In the loop on a CPU** the layers stand on top. **Under vmap** look at what is new:
# the additions of biases (``add``), copies into another order (``copy_``), and the
# activations and pooling, which touch tensors ten times larger. On a CPU those tensors
# may no longer fit into the cache, and may need fresh memory in each call. A larger
# share of ``add`` and ``clamp_min`` (the ReLU) points that way, because both do almost
# no arithmetic.
#
# **On a GPU** compare the share of waiting. If the loop waits much and ``vmap`` little,
# the single call pays. If the loop hardly waits, there is nothing to win by fewer
# operators, and the grouped convolution decides.
#
# What follows for your own layers
# --------------------------------
#
# The same look at layers that this network does not have. The number counts what runs
# for four models, views left out.


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(32, 96)

    def forward(self, x):  # [batch, tokens, 32], four heads of size 8
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


images, vectors = torch.randn(16, 8, 10, 10), torch.randn(16, 32)
others = {
    "Conv2d, groups=8": (lambda: nn.Conv2d(8, 8, 3, groups=8), images),
    "BatchNorm2d, eval": (lambda: nn.BatchNorm2d(8).eval(), images),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), images),
    "LayerNorm": (lambda: nn.LayerNorm(32), vectors),
    "Embedding": (lambda: nn.Embedding(50, 8), torch.randint(50, (16, 7))),
    "Attention": (Attention, torch.randn(16, 7, 32)),
    "GRUCell": (lambda: nn.GRUCell(32, 32), vectors),
}
fallbacks = {}  # layer -> the warning
for name, (make, x) in others.items():
    models = [make().to(device) for _ in range(num_models)]
    state = tuple(stack_module_state(models))
    x = torch.stack([x.to(device)] * num_models)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        calls, _ = operators(partial(mapped(models, 0), state, x))
    tally = Counter(call[0] for call in calls)
    line = ", ".join(f"{k} x {name}" if k > 1 else name for name, k in tally.items())
    print(f"{name} ({len(calls)}): {line}")
    if caught:
        fallbacks[name] = str(caught[0].message).split(" (Triggered")[0]
print("\nwith a warning:", ", ".join(fallbacks) or "none")

# %%
# - **Grouped and depthwise convolutions** stay one convolution; the groups multiply.
# - **Norms** are normalized by one operator; scale and shift, which differ between the
#   models, become two more. Batch norm in training works too: its running statistics
#   are stacked buffers.
# - **Embeddings** of all models become one long table, and the indices are shifted.
# - **Dropout** asks you how to draw: ``randomness="different"`` or ``"same"``.
# - **A layer with a warning**, named in the last line, has no rule. ``vmap`` then does
#   what you wanted to avoid: it runs the operator once for each model. Which layers
#   these are depends on the device and on the version of PyTorch, so the list above is
#   the run's, not ours.
#
# When it goes wrong: the fallback
# --------------------------------
#
# A GRU cell shows it. The result is right, the number of operators is that of a loop,
# and the warning is the only sign:

print(fallbacks.get("GRUCell", "No warning: this version has a rule for it."), "\n")
grown = []
for count in model_counts:
    models = [nn.GRUCell(32, 32).to(device) for _ in range(count)]
    x = torch.randn(count, 16, 32, device=device)
    rows = zip(models, x.cpu().double(), strict=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)  # shown above
        calls, output = operators(partial(mapped(models, 0), stacked(models), x))
        exact = torch.stack([model.cpu().double()(row) for model, row in rows])
    error = (output.cpu().double() - exact).abs().max().item()
    assert error < 1e-5, f"GRUCell: vmap is {error:.1e} away from the loop in float64"
    grown.append(len(calls))
print("models   ", *[f"{count:4}" for count in model_counts])
print("operators", *[f"{number:4}" for number in grown])
falls_back = all(more > fewer for fewer, more in pairwise(grown))
assert falls_back or "GRUCell" not in fallbacks, (
    f"GRUCell: a fallback runs more operators for more models, but it ran {grown}"
)

# %%
# Turn such a warning into an error in your tests, so that it cannot pass unseen:
# ``warnings.simplefilter("error")``. The way out is to write the layer with operators
# that have a rule. A whole LSTM is not even run:

models = [nn.LSTM(32, 32).to(device) for _ in range(num_models)]
sequence = torch.randn(num_models, 5, 16, 32, device=device)
try:
    mapped(models, 0)(stacked(models), sequence)
    raise AssertionError("PyTorch ran a call that this page says it refuses")
except RuntimeError as problem:
    print(f"{type(problem).__name__}: {problem}")

conv.fp32_precision, matmul.fp32_precision = default_precision

# %%
# A recurrent cell that you write from linear layers and activations has rules for all
# its operators. The last line of the cell puts the precision back to what it was.
#
# Remember
# --------
#
# ``vmap`` runs **one operator where the loop runs one for each model**: grouped for
# convolutions, batched for linear layers, folded into the batch for pooling. Only what
# sees *shared* data, often the first layer alone, becomes an ordinary wide operator.
# Biases become operators of their own, and every tensor carries all models. **Fewer
# operators pay where starting them is the cost; larger tensors cost where memory is.**
# A warning about a batching rule means a loop in disguise.
#
# Next
# ----
#
# - ``plot_when_vmap_pays.py``: which of the two effects wins at your sizes.
# - ``plot_fastest_ensemble.py``: other ways to run the same layers.
# - ``plot_memory.py``: what the larger tensors cost.
#
# References
# ----------
#
# - The rules of convolutions:
#   `BatchRulesConvolution.cpp
#   <https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/functorch/BatchRulesConvolution.cpp>`_.
# - Grouped convolutions and their speed:
#   `pytorch#70954 <https://github.com/pytorch/pytorch/issues/70954>`_,
#   `pytorch#73764 <https://github.com/pytorch/pytorch/issues/73764>`_.
# - Recurrent layers: `pytorch#105982 <https://github.com/pytorch/pytorch/issues/105982>`_,
#   `pytorch#112459 <https://github.com/pytorch/pytorch/issues/112459>`_; attention:
#   `pytorch#117016 <https://github.com/pytorch/pytorch/issues/117016>`_.
