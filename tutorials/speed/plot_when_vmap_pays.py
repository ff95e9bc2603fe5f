"""
When vmap pays: one call or a for loop
======================================

Find out in a minute, for your own models and on your own machine, whether one call to
``torch.func.vmap`` is faster than a for loop over the models.

**In short.** A loop pays the overhead of its operators once for each model. One call
pays an overhead of its own once, and that one is larger: **many small models have most
to gain, one model alone loses.** Where each model keeps the machine busy there is
little to save: the two cells below measure which case is yours.

To know before: how many models become one call, in ``plot_ensembling.py``.
"""

# %%
# Set-up
# ------

import copy
import functools
import math

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import timer

torch.manual_seed(0)
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.backends.cuda.matmul.fp32_precision = "ieee"
device = torch.accelerator.current_accelerator(check_available=True)
device = device or torch.device("cpu")
name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")


def mlp(width=32):
    layers = [nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


# %%
# Measure it for your own models
# ------------------------------
#
# Copy the cell above and two cells. Put your number of models, batch size and shape of
# one input into the first line, and your network in place of ``mlp`` in the second
# cell. It takes one tensor and returns one. Each model has its own minibatch.

num_models, batch, shape = 100, 32, [16]


def compare(build, num_models, batch, shape, seconds=1.0):
    models = [build().to(device).eval() for _ in range(num_models)]
    params, buffers = stack_module_state(models)  # once, outside of what is timed
    minibatches = torch.randn(num_models, batch, *shape, device=device)
    with torch.device("meta"):
        skeleton = build().eval()

    def predict(params, buffers, x):
        return functional_call(skeleton, (params, buffers), (x,), strict=True)

    @torch.no_grad()
    def loop():
        return torch.stack([m(x) for m, x in zip(models, minibatches, strict=True)])

    @torch.no_grad()
    def one_call():
        return vmap(predict)(params, buffers, minibatches)

    torch.testing.assert_close(one_call(), loop())
    return in_turns(loop, one_call, seconds=seconds)


# %%
# The clock takes turns, so that what slows the machine slows both ways.


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


(loop, *_), (call, *gain) = compare(mlp, num_models, batch, shape)
print(f"loop {1e3 * loop:.3g} ms, vmap {1e3 * call:.3g} ms: vmap {said(*gain)}")

# %%
# That was a forward pass in evaluation mode under ``no_grad``, without a compiler
# (``plot_fastest_ensemble.py`` compiles both). All of this page is IEEE float32 on the
# device named above: three calls of each way warm up, seven or more turns follow. A
# gain is the median ratio of the turns, brackets hold its interval (a sign test; of
# twenty intervals one may miss), and the call's time is the loop's median over the
# gain.
#
# **If no difference is seen**, give more ``seconds`` or a quieter machine. **If vmap is
# slower**, or gains little, look among the three reasons below. On a CPU that has other
# work to do, also try ``torch.set_num_threads(1)``: the threads of an operator wait for
# each other, so that one busy core may delay them all (not measured here).
#
# Why one call can win: it pays the overhead once
# -----------------------------------------------
#
# Before an operator computes, Python and PyTorch have work to do, and a GPU has a
# kernel to start. Suppose that the time of :math:`N` models is a straight line:
#
# .. math:: T_\text{loop} = a + b N \qquad T_\text{vmap} = c + d N
#
# The loop has this overhead in :math:`b`, the call has it in :math:`c`, paid once. If
# :math:`b > d`, the lines make **a rule with the number of models in it**:
#
# - One call pays from :math:`N = (c - a) / (b - d)` models on.
# - Its gain approaches :math:`b / d` as :math:`N` grows.
#
# Both hold as far as the lines are straight. If :math:`b < d`, more models do not help.
# A larger minibatch adds work to both slopes: if it adds about the same to both, there
# is less to gain; if it adds more to :math:`d`, the call can lose. For this network
# most of the operators that ``vmap`` adds are in the forward pass, and none are in the
# optimizer (tested), so we expect training to pay from no more models than prediction.
#
# How many models before it pays, forward and in training
# --------------------------------------------------------
#
# Three ways to make one step of SGD: a loop with one optimizer and one backward pass
# for all models, one call, and the loop as people write it. A *sum* of losses gives
# each model its own gradient.


def step_loop(models, optimizer, minibatches):
    optimizer.zero_grad()
    pairs = zip(models, minibatches, strict=True)
    torch.stack([model(x).square().mean() for model, x in pairs]).sum().backward()
    optimizer.step()


def step_call(loss, params, buffers, optimizer, minibatches):
    optimizer.zero_grad()
    vmap(loss)(params, buffers, minibatches).sum().backward()
    optimizer.step()


def step_each(models, optimizers, minibatches):
    for model, optimizer, x in zip(models, optimizers, minibatches, strict=True):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


# %%
# Gains are over the first loop. After one step all three hold the same parameters, to
# 1e-6.


def compare_training(build, num_models, batch, shape, seconds=1.0):
    models = [build().to(device) for _ in range(num_models)]
    copies = copy.deepcopy(models)
    params, buffers = stack_module_state(models)
    x = torch.randn(num_models, batch, *shape, device=device)
    with torch.device("meta"):
        skeleton = build()

    def loss(params, buffers, x):
        output = functional_call(skeleton, (params, buffers), (x,), strict=True)
        return output.square().mean()

    every = [p for model in models for p in model.parameters()]
    one = torch.optim.SGD(every, lr=1e-3, foreach=True)
    stacked = torch.optim.SGD(params.values(), lr=1e-3, foreach=True)
    own = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in copies]
    loop = functools.partial(step_loop, models, one, x)
    one_call = functools.partial(step_call, loss, params, buffers, stacked, x)
    each = functools.partial(step_each, copies, own, x)
    _ = loop(), one_call(), each()
    for trained in models, copies:
        alone, _ = stack_module_state(trained)
        torch.testing.assert_close(params, alone, atol=1e-6, rtol=1e-6)
    return in_turns(loop, one_call, each, seconds=seconds)


# %%
# An accelerator gets more models and larger minibatches.

counts, batches = [1, 2, 4, 8, 16, 64, 256], [1, batch, 512]
if device.type != "cpu":
    counts, batches = [1, 2, 4, 8, 16, 256, 1024], [1, batch, 4096]
two, most = [1, counts[-2]], counts[-1]


def pays_from(curve):
    """The number of models from which on every measured one is told faster."""
    slow = [n for n, (_, (_, _, low, _), *_) in curve.items() if low <= 1.02]
    return next((n for n in curve if n > max(slow, default=0)), None)


curves = {
    "forward pass": {n: compare(mlp, n, batch, shape, 0.25) for n in counts},
    "training step": {n: compare_training(mlp, n, batch, shape, 0.25) for n in counts},
}
for task, curve in curves.items():
    print(f"{task}: vmap faster from: {pays_from(curve) or 'never'}")
    print("\n".join(f"  N = {n}: {said(*curve[n][1][1:])}" for n in (1, most)))
print(f"  N = {most}, loop with an optimizer each: {said(*curve[most][2][1:])}")

# %%
# The dashed line marks the number from which on every measured one is told faster. Bars
# are the intervals, drawn as times. While :math:`c` is nearly all of the call's time,
# its curve is flat: **one more model is nearly free**. If training needs more models
# than prediction here, either the expectation is wrong or the noise is large.

fig, axes = plt.subplots(1, 2, figsize=(6.4, 3.8), sharey=True, layout="constrained")
ways = [("loop", "o-"), ("vmap", "^-"), ("loop, an optimizer each", "s:")]
for ax, (task, curve) in zip(axes, curves.items(), strict=True):
    for way, results in enumerate(zip(*curve.values(), strict=True)):
        label, style = ways[way]
        time, gain, low, high = torch.tensor(results).T
        bars = torch.stack([time - time * gain / high, time * gain / low - time])
        ax.errorbar(counts, 1e3 * time, 1e3 * bars, fmt=style, label=label)
    ax.axvline(pays_from(curve) or math.nan, color="gray", ls="--")
    ax.set_title(f"{task}\nvmap faster from: {pays_from(curve) or 'never'}")
    ax.set(xlabel="number of models", xscale="log", yscale="log")
axes[0].set_ylabel("time [ms]")
axes[1].legend(fontsize="small")
fig.suptitle(f"MLPs, batch {batch}, float32, {name}")
found = [f"{task} {said(*curve[most][1][1:])}" for task, curve in curves.items()]
fig.set_label(
    "Two panels, forward pass and training step: time of loops and of one vmap call "
    f"against the number of models, logarithmic axes, batch {batch}, on {name}. One "
    f"vmap call for {most} models against the best loop: {', '.join(found)}."
)

# %%
# Does batch size matter?
# -----------------------
#
# The forward pass again, with smaller and with larger minibatches. Where two intervals
# overlap, take the gains for equal. Where the call is faster, a gain that rises with
# the batch contradicts the prediction: there the further samples cost the call less
# than the loop. Where it is slower, the work that both add brings the gain nearer to
# one.

some = [1, 8, *counts[-2:]]
grid = {b: {n: compare(mlp, n, b, shape, 0.25) for n in some} for b in batches[::2]}
grid = {batches[0]: grid[batches[0]], batch: curves["forward pass"], **grid}
for b, curve in grid.items():
    print(f"{most} models, batch {b}: vmap {said(*curve[most][1][1:])}")

# %%
# Predict a size that you did not measure
# ---------------------------------------
#
# Two sizes fix the four numbers of the rule: one model, and the last number but one.
# All other sizes test it, and the largest lies four times beyond. "As measured" is the
# first size that is told faster; between the sizes that were measured it knows nothing.


def straight(curve, way):
    """Time of a call and of each model in it; a slope below zero is noise."""
    low, high = (curve[n][way][0] for n in two)
    slope = max(high - low, 0) / (two[1] - two[0])
    return low - slope, slope


rule, wrong, new = {}, {}, sum(len(set(curve) - set(two)) for curve in grid.values())
for size, curve in grid.items():
    (a, b), (c, d) = straight(curve, 0), straight(curve, 1)
    rule[size] = {n: (a + b * n) / (c + d * n) for n in curve}
    for n, (_, (_, gain, low, high), *_) in curve.items():
        if not low <= rule[size][n] <= high and n not in two:
            wrong[n, size] = rule[size][n] / gain - 1
    pays = f"{max(1, (c - a) / (b - d)):.2g}" if b > d else "never"
    print(f"batch {size}: a, b, c, d:", *(f"{1e6 * t:.3g}" for t in (a, b, c, d)), "us")
    print(f"  pays from: {pays}, as measured: {pays_from(curve) or 'never'}")
print(f"wrong at {len(wrong)} of {new} new sizes")
for n, size in sorted(wrong, key=lambda at: -abs(wrong[at]))[:3]:
    print(f"  {n} models, batch {size}: {wrong[n, size]:+.0%}", end=", measured ")
    print(said(*grid[size][n][1][1:]))

# %%
# **Wrong** means that the predicted gain lies outside of the measured interval; up to
# three are named, the largest error first. There a line is not straight, or the noise
# of the two sizes behind it is in the prediction. A wide interval hides an error: look
# at the distance of the dashed line in the figure as well.

fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
for i, (size, curve) in enumerate(grid.items()):
    _, gain, low, high = torch.tensor([curve[n][1] for n in curve]).T
    bars, fmt = torch.stack([gain - low, high - gain]), f"C{i}{'os^'[i]}"
    ax.errorbar(list(curve), gain, bars, fmt=fmt, label=f"batch {size}")
    ax.plot(rule[size].keys(), rule[size].values(), f"C{i}--")
ax.axhline(1, color="gray")
ax.set(xscale="log", yscale="log", xlabel="number of models")
ax.set_ylabel("loop is faster < 1 < vmap is faster")
ax.set_title(f"Gain of vmap, forward pass, float32, {name}")
_ = ax.legend(title="dashed: the rule")
fig.set_label(
    "Gain of one vmap call over the loop in a forward pass, against the number of "
    f"models, for batches {list(grid)}, on {name}, with intervals, and the rule as "
    f"dashed lines. The rule is wrong at {len(wrong)} of {new} new sizes."
)

# %%
# vmap slower than a for loop? Three reasons
# ------------------------------------------
#
# The call is slower, or gains little, for one of these.
#
# **Too few models**, at the left ends of the curves: the rule says what is too few.
#
# **Too large tensors.** The activations of the call are as many times larger as there
# are models. ``chunk_size`` takes the models in pieces: the same arithmetic, smaller
# tensors, more operators. Chunks against all at once, each batch:

models = [mlp().to(device).eval() for _ in range(most)]
params, buffers = stack_module_state(models)
with torch.device("meta"):
    skeleton = mlp().eval()


def predict(params, buffers, x):
    return functional_call(skeleton, (params, buffers), (x,), strict=True)


for size in batches:
    x = torch.randn(most, size, *shape, device=device)
    whole = functools.partial(vmap(predict), params, buffers, x)
    chunks = functools.partial(vmap(predict, chunk_size=two[1]), params, buffers, x)
    with torch.no_grad():
        _, (_, *gain) = in_turns(whole, chunks, seconds=0.25)
    print(f"{most} models, batch {size}, in chunks of {two[1]}: {said(*gain)}")

# %%
# Where chunks are faster, the size of the tensors was a cost, on a CPU probably that of
# the cache and of fresh memory: ``plot_memory.py`` helps to choose chunks. The curves
# above are without chunks, so time chunks before you decide for the loop. Elsewhere
# chunks only add overhead.
#
# **Models with much work each.** Sixteen perceptrons, narrow and wide:

wide, work = (1024, 16) if device.type == "cpu" else (4096, 256)
for width in 32, wide:
    build = functools.partial(mlp, width)
    (loop, *_), (_, *gain) = compare(build, 16, work, shape, 0.25)
    print(f"width {width}, loop {1e3 * loop / 16:.2g} ms a model: vmap {said(*gain)}")

# %%
# The width alone differs, not the number of operators, so the overhead of a wide model
# is at most the narrow loop's time for a model: a small share of its time. A larger
# gain than that share comes from elsewhere: one large operator is faster there than
# many small ones. ``plot_ensembling.py`` measures convolutions.
#
# The mistake: stacking in every call
# -----------------------------------
#
# With ``stack_module_state`` inside of what is called often, the result is the same
# (tested), no message tells, and each call copies all parameters before it begins:

x = torch.randn(most, batch, *shape, device=device)
with torch.no_grad():
    _, (_, *gain) = in_turns(
        lambda: vmap(predict)(params, buffers, x),
        lambda: vmap(predict)(*stack_module_state(models), x),
        seconds=0.25,
    )
print(f"{most} models, batch {batch}, stacked in every call: {said(*gain)}")

# %%
# Remember
# --------
#
# **A loop pays its overhead for every model, one call pays a larger one once.** Two
# sizes of your own network give a first estimate: from about how many models on one
# call pays, and how far its gain can go while the lines are straight. Test it on a
# third, and compare with the fastest loop that you can write.
#
# Next
# ----
#
# - ``plot_what_vmap_runs.py``: the operators of one call, and a fourth reason, those
#   that ``vmap`` cannot batch.
# - ``plot_fastest_ensemble.py``: where the work decides.
# - ``plot_memory.py``: what a call needs, and ``chunk_size``.
# - ``plot_training.py``: many models, each on its own data.
#
# References
# ----------
#
# - The question: `functorch#1061 <https://github.com/pytorch/functorch/issues/1061>`_,
#   `jax#15339 <https://github.com/jax-ml/jax/issues/15339>`_.
# - Stacking in every call:
#   `pytorch#120581 <https://github.com/pytorch/pytorch/issues/120581>`_.
# - W. Whitney: `Parallelizing neural networks on one GPU with JAX
#   <http://willwhitney.com/parallel-training-jax.html>`_, 2021, with JAX and its
#   compiler.
