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
# The last line of this cell prints where the code runs. Recent NVIDIA GPUs
# compute convolutions in TF32 by default: fast, but with about three decimal
# digits. To compare results we ask for IEEE float32. This page predicts and does
# not train, so autograd is off, for the loop and for ``vmap`` alike. Both
# settings are put back at the end.

import copy
import platform

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator, ScalarFormatter
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator() or cpu
num_threads = torch.get_num_threads()
names = {cpu: f"CPU ({platform.machine()}, {num_threads} threads)"}
if device.type == "cuda":
    names[device] = torch.cuda.get_device_name(device)
elif device != cpu:
    names[device] = device.type

default_precision = torch.backends.cudnn.conv.fp32_precision
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.set_grad_enabled(False)

print(f"{names[device]}, torch {torch.__version__}, {torch.get_default_dtype()}")
print(
    f"convolutions: {torch.backends.cudnn.conv.fp32_precision}, "
    f"matrix products: {torch.get_float32_matmul_precision()}, "
    f"autograd: {'on' if torch.is_grad_enabled() else 'off'}"
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
# ``functional_call`` runs a module with parameters that it does not own. It
# needs the module for its code only, so we build that skeleton on the ``meta``
# device, where tensors have shapes but no memory. ``strict=True`` insists that
# every parameter is supplied; without it, a forgotten name would be read from
# the skeleton.

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

vmap1 = vmap(predict, in_dims=(0, 0, 0))(params, buffers, minibatches)
vmap2 = vmap(predict, in_dims=(0, 0, None))(params, buffers, minibatch)

print("option 1, in_dims=(0, 0, 0):   ", tuple(vmap1.shape))
print("option 2, in_dims=(0, 0, None):", tuple(vmap2.shape))

# %%
# .. note::
#
#    Older code imports these tools from ``functorch``:
#    ``combine_state_for_ensemble`` became ``stack_module_state``, and its
#    stateless module became ``functional_call``.
#
# Check: it is the same function
# ------------------------------
#
# Floating-point sums depend on their order, and a vectorized kernel sums in
# another order than ten separate ones. So we do not ask for identical bits. We
# ask for agreement within one part in a million, absolute and relative.
#
# A GPU library may choose an algorithm that rounds more than that even in IEEE
# float32. A failed comparison would not say *who* is wrong, so in that case
# float64 decides: the vectorized result may be at most three times as far from
# the float64 loop as the float32 loop is. Both distances are the largest of
# thousands of rounding errors, and such maxima scatter by a factor of two; a
# wrong result misses by thousands.

models64 = [copy.deepcopy(model).to(cpu, torch.float64) for model in models]
data64 = data[:num_models].to(cpu, torch.float64)
exact1 = torch.stack([model(x) for model, x in zip(models64, data64, strict=True)])
exact2 = torch.stack([model(data64[0]) for model in models64])


def error(logits, exact):
    """Largest distance from the float64 result."""
    return (logits.to(cpu, torch.float64) - exact).abs().max().item()


def compare(option, looped, vectorized, exact):
    """Raise unless vmap equals the loop to 1e-6 or is as near to float64."""
    agree = torch.allclose(vectorized, looped, atol=1e-6, rtol=1e-6)
    loop_error, vmap_error = error(looped, exact), error(vectorized, exact)
    assert agree or vmap_error <= 3 * loop_error, (
        f"{option}: vmap does not compute what the loop computes. Largest distance "
        f"from float64: loop {loop_error:.1e}, vmap {vmap_error:.1e}"
    )
    print(
        f"{option}: {'agree' if agree else 'do not agree'} within 1e-6; "
        f"distance from float64: loop {loop_error:.1e}, vmap {vmap_error:.1e}"
    )


compare("option 1", loop1, vmap1, exact1)
compare("option 2", loop2, vmap2, exact2)

# %%
# How equal?
# ----------
#
# The distance from float64 depends on the *precision mode*. Every device has
# IEEE float32. CUDA devices also have TF32, PyTorch's default for convolutions
# there: it shortens the factors of every product to 10 bits of fraction, so
# errors near one part in a thousand are expected, in the loop and in vmap
# alike. That mode is the usual reason why two correct programs fail a
# comparison at 1e-6, and no reason to loosen the comparison: change the mode,
# compare, change it back.

modes = ["ieee", "tf32"] if device.type == "cuda" else ["ieee"]

print("convolutions  option  loop - float64  vmap - float64  agree within 1e-6")
for mode in modes:
    torch.backends.cudnn.conv.fp32_precision = mode
    looped1 = torch.stack(
        [model(x) for model, x in zip(models, minibatches, strict=True)]
    )
    looped2 = torch.stack([model(minibatch) for model in models])
    vectorized1 = vmap(predict)(params, buffers, minibatches)
    vectorized2 = vmap(predict, in_dims=(0, 0, None))(params, buffers, minibatch)
    torch.backends.cudnn.conv.fp32_precision = "ieee"

    for option, looped, vectorized, exact in [
        (1, looped1, vectorized1, exact1),
        (2, looped2, vectorized2, exact2),
    ]:
        loop_error, vmap_error = error(looped, exact), error(vectorized, exact)
        agree = torch.allclose(vectorized, looped, atol=1e-6, rtol=1e-6)
        print(
            f"{mode:12}  {option:6}  {loop_error:14.1e}  {vmap_error:14.1e}  "
            f"{'yes' if agree else 'no'}"
        )
        assert vmap_error <= 3 * loop_error, (
            f"in {mode} precision vmap is {vmap_error:.1e} away from float64, more "
            f"than three times as far as the loop ({loop_error:.1e})"
        )

# %%
# Neither side is the reference for the other. Loop and vmap are two float32
# computations of one function, each a few rounding errors away from the truth.
#
# What should happen to the time
# ------------------------------
#
# Count before you measure. ``FlopCounterMode`` lists the floating-point
# operations that really run:


def count(name, statement):
    """Print the operations of one call, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        statement()
    per_operator = counter.get_flop_counts()["Global"].items()
    print(f"{name}:", ", ".join(f"{op} {n / 1e9:.2f}" for op, n in per_operator))


print(f"1e9 floating-point operations, {num_models} models, option 1")
count("loop", lambda: [model(x) for model, x in zip(models, minibatches, strict=True)])
count("vmap", lambda: vmap(predict)(params, buffers, minibatches))

# %%
# The arithmetic is the same. What changes is how it is packed:
#
# - The **loop** calls every operator once per model. Each call costs some
#   microseconds before any arithmetic starts, and a GPU is poorly filled by one
#   small model. This overhead grows with the number of models.
# - **vmap** calls every operator once. Linear layers become one batched matrix
#   product (``bmm``), which libraries do well. Convolutions become one *grouped*
#   convolution, with one group per model, which many libraries do poorly. Only
#   the first convolution of option 2 escapes: its input is shared, so it becomes
#   one ordinary convolution with more output channels.
#
# So vmap should win where the overhead of calls dominates: small models, small
# batches, fast devices. It should lose where the arithmetic dominates and
# grouped convolutions are slower than ordinary ones: this CNN on a CPU.
#
# Measure
# -------
#
# Both sides return one stacked tensor of logits, in IEEE float32, with autograd
# off. The timer uses all threads, runs every statement before it measures, and
# keeps every repetition, so that the table can show the median and the spread. A
# machine with an accelerator measures its CPU too. "Own data" is option 1,
# "shared data" is option 2.

sizes = [1, 2, 5, 10, 20]
seconds_per_model = 0.15

own = vmap(predict)
shared = vmap(predict, in_dims=(0, 0, None))
statements = {
    "loop, own data": "stack([m(x) for m, x in zip(models, minibatches)])",
    "vmap, own data": "own(params, buffers, minibatches)",
    "loop, shared data": "stack([m(minibatch) for m in models])",
    "vmap, shared data": "shared(params, buffers, minibatch)",
}

times = {}  # (device, statement, size) -> first quartile, median, third quartile [ms]
for place in names:
    fleet = [SimpleCNN().to(place) for _ in range(max(sizes))]
    print(f"{names[place]}: milliseconds, median (interquartile range)")
    print("models", *[f"{label:>19}" for label in statements])
    for size in sizes:
        scope = {"stack": torch.stack, "own": own, "shared": shared}
        scope["models"] = fleet[:size]
        scope["params"], scope["buffers"] = stack_module_state(fleet[:size])
        scope["minibatches"] = data[:size].to(place)
        scope["minibatch"] = data[0].to(place)
        print(f"{size:6}", end="")
        for label, statement in statements.items():
            timer = Timer(statement, globals=scope, num_threads=num_threads)
            runs = timer.blocked_autorange(min_run_time=seconds_per_model * size)
            quartiles = torch.tensor([0.25, 0.5, 0.75])
            low, median, high = 1e3 * torch.tensor(runs.times).quantile(quartiles)
            times[place, label, size] = low.item(), median.item(), high.item()
            print(f"{f'{median:.2f} ({high - low:.2f})':>20}", end="")
        print()

# %%
# Look
# ----

looks = {
    "loop, own data": {"color": "C0", "marker": "o", "linestyle": "-"},
    "vmap, own data": {"color": "C1", "marker": "o", "linestyle": "-"},
    "loop, shared data": {"color": "C0", "marker": "s", "linestyle": "--"},
    "vmap, shared data": {"color": "C1", "marker": "s", "linestyle": "--"},
}

fig, _ = plt.subplots(
    1, len(names), figsize=(5.6 * len(names), 4.2), sharey=True, layout="constrained"
)
for ax, place in zip(fig.axes, names, strict=True):
    for label, look in looks.items():
        low, median, high = zip(
            *[times[place, label, size] for size in sizes], strict=True
        )
        ax.loglog(sizes, median, label=label, **look)
        ax.fill_between(sizes, low, high, color=look["color"], alpha=0.2, linewidth=0)
    ax.set_title(f"Prediction of SimpleCNNs, batch 64, float32\n{names[place]}")
    ax.set_xlabel("number of models")
    ax.set_xticks(sizes, labels=sizes)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.minorticks_off()
    ax.grid(True, alpha=0.3)
fig.axes[0].set_ylabel("time [ms]")
fig.axes[0].legend()
fig.set_label(
    "Time of one prediction against the number of models, both axes logarithmic, "
    f"one panel for each device ({', '.join(names.values())}). Four lines: loop and "
    "vmap, each with own data and with shared data. Bands show the interquartile "
    "range."
)

# %%
# Reading the figure
# ------------------
#
# On logarithmic axes, a line that rises as steeply as the number of models means
# that every further model costs its full price; a flat line means that it is
# free. The distance between two lines is the ratio of their times.

for place in names:
    print(f"{num_models} models on {names[place]}")
    for feed in ["own data", "shared data"]:
        loop_time = times[place, f"loop, {feed}", num_models][1]
        vmap_time = times[place, f"vmap, {feed}", num_models][1]
        ratio = loop_time / vmap_time
        print(
            f"  {feed}: loop {loop_time:.2f} ms, vmap {vmap_time:.2f} ms, so vmap is "
            f"{max(ratio, 1 / ratio):.1f}x {'faster' if ratio > 1 else 'slower'}"
        )

# %%
# **If vmap is faster here**, the single calls of the loop left the device
# waiting: their overhead came to more than their arithmetic, and ``vmap`` pays
# it once. Larger images, larger batches or wider layers fill the device with
# one model alone and turn this around.
#
# **If vmap is slower here**, the device was busy with every single model. There
# was little overhead to share, and the grouped convolution needs more time than
# ordinary convolutions with the same arithmetic. On CPUs with few cores this is
# the normal result for this network. A smaller model or batch, or linear layers
# in place of convolutions, turns it around.
#
# In both cases the equality above holds. So write the ensemble with ``vmap``
# because it is one function of one set of tensors, which you can train, save and
# move as a whole, and measure before you call it fast.
#
# Combine the predictions
# -----------------------
#
# Ten answers are not yet a prediction. Two ways to make one are common:
#
# - the **mean of the softmax**: average the members' probabilities, take the
#   most probable class;
# - the **majority vote**: every member names a class, the most named wins.
#
# How often two members disagree says how much the ensemble can add: members that
# always agree are worth one model. All of it needs the same inputs for every
# member, so it starts from option 2.

probabilities = vmap2.softmax(dim=-1)  # [10, 64, 10]: member, image, class
mean_probabilities = probabilities.mean(dim=0)  # [64, 10]
votes = vmap2.argmax(dim=-1)  # [10, 64]
counts = F.one_hot(votes, 10).sum(dim=0)  # [64, 10]: members that name each class

by_mean = mean_probabilities.argmax(dim=-1)  # [64]
by_vote = counts.argmax(dim=-1)  # [64]; the lowest class wins a tie
support = counts.max(dim=-1).values  # [64]: members behind the winner
tied = (counts == support[:, None]).sum(dim=-1) > 1
differing_pairs = (votes[:, None] != votes[None, :]).sum(dim=(0, 1))
disagreement = differing_pairs / (num_models * (num_models - 1))  # [64]

print(f"images: {len(by_mean)}, of which the vote is tied for {tied.sum()}")
print(f"mean and vote name the same class for {(by_mean == by_vote).sum()} images")
print(f"two members disagree on {disagreement.mean():.0%} of the images")
print("two members that guess among ten classes would disagree on", f"{1 - 1 / 10:.0%}")

# %%

fig, ax = plt.subplots(layout="constrained")
bars = ax.bar(
    range(1, num_models + 1), torch.bincount(support, minlength=11)[1:].tolist()
)
ax.bar_label(bars)
ax.set_title(f"Votes of {num_models} untrained CNNs on {names[device]}, float32")
ax.set_xlabel("members that name the winning class")
ax.set_ylabel("number of images")
ax.set_xticks(range(1, num_models + 1))
fig.set_label(
    f"Bar chart of how many of the {num_models} members name the winning class, "
    "against the number of images for which that happens. A bar at the right end "
    "would mean that all members agree."
)

# %%
# Untrained members know nothing, and the figure shows it: the winner has few
# votes and the members disagree nearly as often as guesses do. With trained
# members the bars move to the right, and the images that stay on the left are
# those on which the ensemble is unsure. That is what an ensemble tells you and a
# single model cannot.
#
# What ``vmap`` can take
# ----------------------
#
# ``vmap`` runs your Python function **once**, with tensors that stand for all
# members at the same time. It is made for *pure* functions: tensors in, tensors
# out, nothing else read or changed. In-place operations on tensors that the
# function made itself work. Everything that needs the *value* of a tensor in
# Python does not, because there is no single value: ``if``, ``.item()``,
# ``print``. Random operations such as dropout need to be told, by ``randomness=``,
# whether all members draw the same numbers.
#
# Changes to Python objects do happen, but once and not once a member:

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


print("1.", refusal(vmap(predict), params, buffers, minibatch), "\n")
print("2.", refusal(vmap(invert_dark), minibatches))

# %%
# 1. A shared minibatch needs ``in_dims=(0, 0, None)``. Without it, ``vmap`` takes
#    the 64 images of the batch for 64 models.
# 2. A decision that depends on a tensor has to be made by a tensor operation:
#    ``torch.where(x.mean() > 0, x, -x)``.
#
# Last, the two global switches go back to where they were.

torch.backends.cudnn.conv.fp32_precision = default_precision
torch.set_grad_enabled(True)

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
