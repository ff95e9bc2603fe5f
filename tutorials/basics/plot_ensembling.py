"""
An ensemble of CNNs in one vectorized call
==========================================

Run ten convolutional networks of one architecture as a single call to
``torch.func.vmap``, prove that the result equals a loop over the models, and
measure on your own machine whether the single call is faster.

**What you will learn**

- how to stack the parameters of many models and call them all at once;
- how one argument, ``in_dims``, decides whether every model gets its own
  minibatch or all share one;
- how to check that the vectorized result is right, and how exact it is;
- why the single call wins on one machine and loses on another, and how to
  find out which kind yours is;
- how to turn ten predictions into one.

**Before you start**, you should have trained one PyTorch model; the
`PyTorch basics <https://docs.pytorch.org/tutorials/beginner/basics/intro.html>`_
are enough. No GPU is needed.
"""

# %%
# Set-up
# ------
#
# The end of this cell prints where the code runs. NVIDIA GPUs since 2020 compute
# convolutions in TF32 by default: fast, but with about three decimal digits. To
# compare results we ask for IEEE float32. This page predicts and does not train, so
# autograd is off, for the loop and for ``vmap`` alike. All settings are put back at
# the end.

import copy
import platform

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

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
torch.set_grad_enabled(False)

print(
    f"{device_names[device]}, torch {torch.__version__}, {torch.get_default_dtype()}, "
    f"precision {conv.fp32_precision} (convolutions) and {matmul.fp32_precision} "
    f"(matrix products), autograd {'on' if torch.is_grad_enabled() else 'off'}"
)

# %%
# Ten models and their data
# -------------------------
#
# The network is a small CNN for images of handwritten digits. It returns
# *logits*, one unnormalized score for each of the ten classes. The members of
# the ensemble differ in their random initialization only. The data are noise
# in the shape of MNIST: 100 minibatches of 64 gray images. Neither speed nor
# equality depends on what the pixels show.


class SimpleCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):  # [64, 1, 28, 28]
        x = F.relu(self.conv1(x))  # [64, 32, 26, 26]
        x = F.relu(self.conv2(x))  # [64, 64, 24, 24]
        x = torch.flatten(F.max_pool2d(x, 2), 1)  # [64, 9216]
        x = F.relu(self.fc1(x))  # [64, 128]
        return self.fc2(x)  # [64, 10]


num_models = 10
num_classes = 10
models = [SimpleCNN().to(device) for _ in range(num_models)]
data = torch.randn(100, 64, 1, 28, 28, device=device)

weights_per_model = sum(p.numel() for p in models[0].parameters())
print(f"{num_models} models of {weights_per_model:,} parameters each")

# %%
# The plain way: a loop
# ---------------------
#
# There are two natural ways to feed an ensemble. **Option 1** gives every
# model a minibatch of its own, as in training on resampled data. **Option 2**
# gives the same minibatch to all, as in prediction. Both are one line.

minibatches = data[:num_models]  # [10, 64, 1, 28, 28]
minibatch = data[0]  # [64, 1, 28, 28]

loop1 = torch.stack([model(x) for model, x in zip(models, minibatches, strict=True)])
loop2 = torch.stack([model(minibatch) for model in models])

print("option 1, own minibatches:  ", tuple(loop1.shape))
print("option 2, shared minibatch: ", tuple(loop2.shape))

# %%
# The vectorized way: state on one side, computation on the other
# ---------------------------------------------------------------
#
# ``vmap`` vectorizes *functions of tensors*. A module is not one: it hides its
# parameters inside. Two functions take it apart.
#
# ``stack_module_state`` copies the parameters of all members into one
# dictionary, in which every tensor has a new first dimension of size
# ``num_models``. ``nn.Linear`` stores its weight as ``[outputs, inputs]``, so
# ``fc1.weight`` goes from ``[128, 9216]`` to ``[10, 128, 9216]``. Buffers, such
# as the running statistics of batch normalization, are stacked in the same
# way. This network has none, so ``buffers`` is empty.

params, buffers = stack_module_state(models)

for name, tensor in params.items():
    grad = "requires grad" if tensor.requires_grad else "no grad"
    print(f"{name:13} {list(models[0].get_parameter(name).shape)!s:19}", end=" -> ")
    print(f"{list(tensor.shape)!s:21} {grad}")

# %%
# The stacked tensors are new leaves of autograd: an optimizer can train them
# directly. They are also *copies*. If you change a model after this line, its
# row in ``params`` does not follow.
#
# ``functional_call`` runs a module with parameters that it does not own. It needs
# the module for its code, its Python attributes and its mode (train or eval), so we
# build that skeleton on the ``meta`` device, where tensors have shapes but no memory.
# ``strict=True`` insists that every parameter is supplied. Without it, a forgotten
# one is read from the skeleton: on a CPU that is uninitialized memory, and no error.

with torch.device("meta"):
    skeleton = SimpleCNN()


def predict(params, buffers, x):
    """Logits of one member, a pure function of its state and its input."""
    return functional_call(skeleton, (params, buffers), (x,), strict=True)


# %%
# ``vmap(predict)`` is the ensemble. ``in_dims`` names, for each argument, the
# dimension that counts the models; ``None`` means that all models share the
# argument. The default is 0 for every argument, which is option 1. Option 2
# changes one entry:

own = vmap(predict, in_dims=(0, 0, 0))
shared = vmap(predict, in_dims=(0, 0, None))

vmap1 = own(params, buffers, minibatches)
vmap2 = shared(params, buffers, minibatch)

print("option 1, in_dims=(0, 0, 0):   ", tuple(vmap1.shape))
print("option 2, in_dims=(0, 0, None):", tuple(vmap2.shape))

# %%
# .. note::
#
#    Older code imports these tools from ``functorch``:
#    ``combine_state_for_ensemble`` is now ``stack_module_state`` (the state) plus
#    ``functional_call`` (the call).
#
# Check: it is the same function
# ------------------------------
#
# Floating-point sums depend on their order, and a vectorized kernel sums in another
# order than ten separate ones. So we do not ask for identical bits. We ask for
# agreement within one part in a million, absolute and relative, and look at the
# distance of both sides from a loop in float64.
#
# Two things can break the bound without an error in the program:
#
# - **TF32.** It shortens the factors of every product to 10 bits of fraction, so
#   distances near one part in a thousand of the largest logit are normal, in the loop
#   and in ``vmap`` alike. That is the usual reason why two correct programs fail a
#   comparison at 1e-6, and no reason to loosen the comparison: ask for IEEE float32,
#   compare, change it back. A GPU that has TF32 gets two more rows in the table.
# - **An algorithm** of some GPU library that rounds more even in IEEE float32. A failed
#   comparison does not say *who* is wrong, so then float64 decides.
#
# On a CPU neither applies, and 1e-6 has to hold. The verdict by float64 elsewhere:
# ``vmap`` may be at most three times as far from it as the loop is, or as the
# precision allows (1e-6, or 10 bits of the largest logit). Each distance is the
# largest of thousands of rounding errors and can differ by a factor of two by chance;
# a wrong result is thousands of times farther away.

models64 = [copy.deepcopy(model).cpu().double() for model in models]
data64 = data[:num_models].cpu().double()
exact1 = torch.stack([model(x) for model, x in zip(models64, data64, strict=True)])
exact2 = torch.stack([model(data64[0]) for model in models64])
largest = exact1.abs().max().item()

rows = [("ieee", 1, loop1, vmap1, exact1), ("ieee", 2, loop2, vmap2, exact2)]
if device.type == "cuda" and torch.cuda.is_tf32_supported():
    conv.fp32_precision = "tf32"
    looped1 = [model(x) for model, x in zip(models, minibatches, strict=True)]
    looped2 = [model(minibatch) for model in models]
    vectorized1 = own(params, buffers, minibatches)
    vectorized2 = shared(params, buffers, minibatch)
    conv.fp32_precision = "ieee"
    rows.append(("tf32", 1, torch.stack(looped1), vectorized1, exact1))
    rows.append(("tf32", 2, torch.stack(looped2), vectorized2, exact2))

precision = {"ieee": 1e-6, "tf32": largest * 2**-10}
print(f"{loop1.numel():,} logits, the largest {largest:.2f}; distance from float64")
print("convolutions  option     loop     vmap  loop and vmap agree within 1e-6")
for mode, option, looped, vectorized, exact in rows:
    loop_error = (looped.cpu().double() - exact).abs().max().item()
    vmap_error = (vectorized.cpu().double() - exact).abs().max().item()
    agree = torch.allclose(vectorized, looped, atol=1e-6, rtol=1e-6)
    allowed = 3 * max(loop_error, precision[mode])
    assert agree or (device != cpu and vmap_error <= allowed), (
        f"option {option}, {mode}: vmap does not compute what the loop computes; "
        f"distance from float64: loop {loop_error:.1e}, vmap {vmap_error:.1e}"
    )
    verdict = "yes" if agree else "no, but vmap is as near to float64 as allowed"
    print(f"{mode:12}  {option:6}  {loop_error:.1e}  {vmap_error:.1e}  {verdict}")

# %%
# Neither side is the reference for the other: both round, and float64 shows by how
# much.
#
# What should happen to the time
# ------------------------------
#
# Count before you measure. ``FlopCounterMode`` counts the operations of
# convolutions and matrix products, and the largest intermediate result is the
# output of the second convolution:


def count(name, statement):
    """Print the operations of one call, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        statement()
    per_operator = counter.get_flop_counts()["Global"].items()
    print(f"{name}:", ", ".join(f"{op} {n / 1e9:.2f}" for op, n in per_operator))


print(f"1e9 floating-point operations, {num_models} models, option 1")
count("loop", lambda: [model(x) for model, x in zip(models, minibatches, strict=True)])
count("vmap", lambda: own(params, buffers, minibatches))

megabytes = 64 * 64 * 24 * 24 * loop1.element_size() / 1e6  # images, channels, h, w
print(f"largest tensor: loop {megabytes:.1f} MB, vmap {num_models * megabytes:.1f} MB")

# %%
# This arithmetic is the same. What changes is how it is packed:
#
# - The **loop** calls every operator of the network once per model. Each call costs
#   some microseconds before any arithmetic starts, and one small model leaves most
#   of a GPU idle. This overhead grows with the number of models.
# - **vmap** calls every operator of the network once, plus some copies and additions
#   of biases. Linear layers become one batched matrix product (``bmm``). Convolutions
#   become one *grouped* convolution, with one group per model, which some libraries
#   do poorly. Only the first convolution of option 2 escapes: its input is shared, so
#   it becomes one ordinary convolution with more output channels. And every
#   intermediate result is ``num_models`` times larger.
#
# So ``vmap`` should win where the overhead of calls dominates: small models, small
# batches, fast devices. It should lose where the arithmetic dominates and the larger
# steps are slower than the small ones: this CNN on a CPU, where a tensor of many
# megabytes leaves the cache and often gets fresh memory from the system each time.
#
# Measure
# -------
#
# Both sides return one stacked tensor of logits, in IEEE float32, with autograd off.
# The timer uses all threads and runs each statement before it measures, so the first
# call is not counted. Each of its values is the mean of a block of calls; the table
# shows the median of the values, their interquartile range and their number. A
# machine with an accelerator measures its CPU too. "Own data" is option 1, "shared
# data" is option 2. On NVIDIA GPUs the default, TF32, is faster for both sides and
# may change their ratio.

sizes = {where: [1, 2, 5, 10, 20] for where in device_names}
if device != cpu:
    sizes[device] = [1, 2, 5, 10, 20, 50, 100]

statements = {
    "loop, own data": "stack([m(x) for m, x in zip(models, minibatches)])",
    "vmap, own data": "own(params, buffers, minibatches)",
    "loop, shared data": "stack([m(minibatch) for m in models])",
    "vmap, shared data": "shared(params, buffers, minibatch)",
}
quartiles = torch.tensor([0.25, 0.5, 0.75])

times = {}  # (device, statement, size) -> first quartile, median, third quartile [ms]
for where, device_name in device_names.items():
    members = [SimpleCNN().to(where) for _ in range(max(sizes[where]))]
    print(f"{device_name}: milliseconds, median (interquartile range, values)")
    print("models", *[f"{label:>19}" for label in statements])
    for size in sizes[where]:
        scope = {"stack": torch.stack, "own": own, "shared": shared}
        scope["models"] = members[:size]
        scope["params"], scope["buffers"] = stack_module_state(members[:size])
        scope["minibatches"] = data[:size].to(where)
        scope["minibatch"] = data[0].to(where)
        print(f"{size:6}", end="")
        for label, statement in statements.items():
            timer = Timer(statement, globals=scope, num_threads=num_threads)
            seconds = min(3, max(0.5, 0.15 * size))
            runs = timer.blocked_autorange(min_run_time=seconds).times
            times[where, label, size] = (
                1e3 * torch.tensor(runs).quantile(quartiles)
            ).tolist()
            low, median, high = times[where, label, size]
            print(f"{f'{median:.2f} ({high - low:.2f}, {len(runs)})':>20}", end="")
        print()

# %%
# Look
# ----

looks = {
    "loop, own data": {"color": "C0", "marker": "o", "linestyle": "-"},
    "vmap, own data": {"color": "C1", "marker": "^", "linestyle": "-"},
    "loop, shared data": {"color": "C0", "marker": "o", "linestyle": "--"},
    "vmap, shared data": {"color": "C1", "marker": "^", "linestyle": "--"},
}

panels = len(device_names)
fig, _ = plt.subplots(panels, 1, figsize=(5.6, 4 * panels), layout="constrained")
for ax, (where, device_name) in zip(fig.axes, device_names.items(), strict=True):
    for label, look in looks.items():
        curve = torch.tensor([times[where, label, size] for size in sizes[where]])
        low, median, high = curve.T.tolist()
        ax.loglog(sizes[where], median, label=label, **look)
        ax.fill_between(sizes[where], low, high, color=look["color"], alpha=0.2)
    ax.set_title(f"Prediction of SimpleCNNs, batch 64, float32\n{device_name}")
    ax.set_xlabel("number of models")
    ax.set_ylabel("time [ms]")
    ax.set_xticks(sizes[where], labels=sizes[where])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.grid(True, alpha=0.3)
fig.axes[0].legend()

findings = []
for where, device_name in device_names.items():
    for feed in ["own data", "shared data"]:
        loop_time = times[where, f"loop, {feed}", num_models][1]
        vmap_time = times[where, f"vmap, {feed}", num_models][1]
        ratio = loop_time / vmap_time
        findings.append(
            f"{num_models} models with {feed} on {device_name}: "
            f"loop {loop_time:.2f} ms, vmap {vmap_time:.2f} ms, so vmap is "
            f"{max(ratio, 1 / ratio):.1f}x {'faster' if ratio > 1 else 'slower'}."
        )
fig.set_label(
    "Time of one prediction against the number of models, loop and vmap, both axes "
    f"logarithmic, one panel for each device. {' '.join(findings)}"
)

# %%
# Reading the figure
# ------------------
#
# On logarithmic axes, a line that rises as steeply as the number of models means
# that each further model takes as long as the first; a flat line means that it adds
# no time. The distance between two lines is the ratio of their times.

print(*findings, sep="\n")

# %%
# **If vmap is faster here**, the single calls of the loop left the device waiting:
# their overhead came to more than their arithmetic, and ``vmap`` pays it once. Larger
# images, larger batches or wider layers can turn this around.
#
# **If vmap is slower here**, sharing the calls saved less than the larger steps cost:
# intermediate results that no longer fit the cache, fresh memory for each of them,
# separate additions of biases, and on some libraries slow grouped convolutions. This
# is the normal result for this network on a CPU with few cores. A smaller model or
# batch can turn it around. On Linux you can see the share of the memory yourself: run
# this page as a script with settings that make the process keep what it was given.
#
# .. code-block:: sh
#
#    keep=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=9999999999
#    GLIBC_TUNABLES=$keep python plot_ensembling.py
#
# In both cases the equality above holds. So write the ensemble with ``vmap`` because
# it is one function of one set of tensors, which you can train, save and move as a
# whole, and measure before you call it fast.
#
# Combine the predictions
# -----------------------
#
# Ten answers are not yet a prediction. Two ways to make one are common:
#
# - the **mean of the softmax**: average the members' probabilities, take the most
#   probable class;
# - the **majority vote**: every member names a class, the most named wins.
#
# How often two members disagree says how much the ensemble can add: members that
# always agree are worth one model. All of it needs the same inputs for every
# member, so it starts from option 2.

probabilities = vmap2.softmax(dim=-1)  # [10, 64, 10]: member, image, class
mean_probabilities = probabilities.mean(dim=0)  # [64, 10]
votes = vmap2.argmax(dim=-1)  # [10, 64]
counts = F.one_hot(votes, num_classes).sum(dim=0)  # [64, 10]: votes for each class

by_mean = mean_probabilities.argmax(dim=-1)  # [64]
by_vote = counts.argmax(dim=-1)  # [64]; the lowest class wins a tie
winner = counts.max(dim=-1).values  # [64]: votes for the winner
tied = (counts == winner[:, None]).sum(dim=-1) > 1
differing_pairs = (votes[:, None] != votes[None, :]).sum(dim=(0, 1))
disagreement = differing_pairs / (num_models * (num_models - 1))  # [64]

print(f"{len(by_mean)} images; the vote is tied for {tied.sum()} of them")
print(f"the winner has {winner.min()} to {winner.max()} of {num_models} votes")
print(f"mean and vote name the same class for {(by_mean == by_vote).sum()} images")
print(f"two members disagree on {disagreement.mean():.0%} of the images")
print("different classes that each member names:", *[len(v.unique()) for v in votes])
print(f"probabilities: {probabilities.min():.3f} to {probabilities.max():.3f}")

# %%
# These members are untrained, and it shows. Each prefers the same few classes for
# every image, and its probabilities are all near one tenth, so the mean decides on
# tiny differences that no vote sees: the two often differ. Training changes both:
# trained members agree on most images, and the images on which they do not are those
# on which the ensemble is unsure. That is what an ensemble tells you and a single
# model cannot.
#
# What ``vmap`` can take
# ----------------------
#
# ``vmap`` runs your Python function **once**, with tensors that stand for all
# members at the same time. It is made for *pure* functions: tensors in, tensors out,
# nothing else read or changed.
#
# - In-place operations work on tensors that already differ between members, such as
#   ``x.clone().add_(1)`` or ``x.new_zeros(4).add_(x)``. ``torch.zeros(4).add_(x)``
#   fails: it would write ten members' values into one tensor.
# - Whatever needs the *value* of a tensor in Python fails, because there is no single
#   value: ``if``, ``.item()``, an f-string with a number format. So does a result
#   whose *shape* depends on values, such as ``nonzero``.
# - Random operations such as dropout need to be told, by ``randomness=``, whether all
#   members draw the same numbers.
#
# Changes to Python objects happen once in total, not once for each member:

seen = []


def remember(x):
    seen.append(x.shape)
    return x.clone().add_(1)  # in place, on a tensor made here


vmap(remember)(minibatches)
print(f"{num_models} models, {len(seen)} call, which saw one member: {list(seen[0])}")

# %%
# When it goes wrong
# ------------------
#
# Two mistakes come first for nearly everybody. This cell makes them and prints
# what PyTorch says.


def refusal(function, *inputs):
    """Message with which PyTorch refuses to run function(*inputs)."""
    try:
        function(*inputs)
    except (RuntimeError, ValueError) as problem:
        return f"{type(problem).__name__}: {problem}"
    raise AssertionError("PyTorch ran a call that this page says it refuses")


def invert_dark(x):
    return x if x.mean() > 0 else -x


print("1.", refusal(own, params, buffers, minibatch), "\n")
print("2.", refusal(vmap(invert_dark), minibatches))

# %%
# 1. A shared minibatch needs ``in_dims=(0, 0, None)``. Without it, ``vmap`` takes
#    the 64 images of the batch for 64 models. If both numbers happen to be equal,
#    this check cannot notice: compare the shape of the result.
# 2. A decision that depends on a tensor has to be made by a tensor operation:
#    ``torch.where(x.mean() > 0, x, -x)``.
#
# Last, the global switches go back to where they were.

torch.set_grad_enabled(True)
conv.fp32_precision, matmul.fp32_precision = default_precision

# %%
# Remember
# --------
#
# An ensemble is one function of stacked parameters: ``stack_module_state`` makes
# the parameters, ``functional_call`` makes the function, ``vmap`` maps it.
# **One entry of** ``in_dims`` decides between own and shared minibatches. Loop
# and ``vmap`` do the same arithmetic and agree up to rounding; the precision
# mode decides how much that is. **Whether vmap is faster is a property of model,
# batch and machine**, so measure it. Combine members by the mean of their
# probabilities or by vote, and look at how often they disagree.
#
# Next
# ----
#
# - `torch.func <https://docs.pytorch.org/docs/stable/func.html>`_, the
#   reference of the functions used here, with a page on what ``vmap`` refuses:
#   `UX limitations <https://docs.pytorch.org/docs/stable/func.ux_limitations.html>`_.
# - `Model ensembling <https://docs.pytorch.org/tutorials/intermediate/ensembling.html>`_,
#   PyTorch's own tutorial, which descends from the same original as this page.
#
# References
# ----------
#
# - The original: ``notebooks/_src/plot_ensembling.py`` in
#   `pytorch/functorch <https://github.com/pytorch/functorch>`_, 2021.
# - B. Lakshminarayanan, A. Pritzel, C. Blundell: Simple and scalable predictive
#   uncertainty estimation using deep ensembles, 2017,
#   `arXiv:1612.01474 <https://arxiv.org/abs/1612.01474>`_.
# - Grouped convolutions and their speed:
#   `pytorch/functorch#365 <https://github.com/pytorch/functorch/issues/365>`_,
#   `pytorch#73764 <https://github.com/pytorch/pytorch/issues/73764>`_.
# - Precision modes:
#   `Numerical accuracy <https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html>`_
#   in PyTorch's documentation.
