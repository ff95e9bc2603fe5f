"""
When vmap pays: one call or a for loop
======================================

Find out in a minute, for your own models and on your own machine, whether one call to
``torch.func.vmap`` is faster than a for loop over the models.

**In short.** A loop pays the overhead of its operators once for each model; one call
pays an overhead once, larger than that of one model in a loop. **Many small models have
most to gain, one small model loses**, and where each model keeps the machine busy, one
call saves little or loses. The two cells below measure which case is yours.

Before you start, read ``plot_ensembling.py``: how many models become one call.
"""

# %%
# Set-up
# ------

import math
import statistics

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


def mlp():
    hidden = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(32, 1))


# %%
# Measure it for your own models
# ------------------------------
#
# Copy the cell above and the next two. Put your network, number of models, batch size
# and shape of one input into the first line. The network takes one tensor and returns
# one. Each model has its own minibatch.

build, num_models, batch, shape = mlp, 100, 32, [16]


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


(loop, *_), (call, *gain) = compare(build, num_models, batch, shape)
print(f"loop {1e3 * loop:.3g} ms, vmap {1e3 * call:.3g} ms: vmap {said(*gain)}")

# %%
# That was a forward pass in evaluation mode under ``no_grad``, a loop over modules, and
# no compiler. A faster loop or a compiled call can move every number of this page:
# ``plot_fastest_mlp.py`` measures them.
#
# All of this page is IEEE float32. Three calls of each way warm up, seven or more turns
# follow. A gain is the median ratio of the turns, brackets hold its interval (a sign
# test; of twenty intervals one may miss), and the call's time is the loop's median over
# the gain.
#
# **If no difference is seen** and the interval is wide, the run decides nothing: give
# more ``seconds`` or a quieter machine. On a CPU that has other work to do, also try
# ``torch.set_num_threads(1)`` (not measured here). **If vmap is slower**, or gains
# little, look among the three reasons below.
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
# If :math:`b < d` and :math:`a < c`, no number of models makes it pay. Below, the run
# tests the gains that the rule predicts.
#
# How many models before it pays, forward and in training
# --------------------------------------------------------
#
# A training step is forward, backward and SGD. The loop has one optimizer and one
# backward pass for all models: a *sum* of losses gives each model its own gradient.
# Most of the operators that ``vmap`` adds are in the forward pass, none are in the
# optimizer (tested). Training pays from fewer models where :math:`b - d` grows more
# than :math:`c - a`.


def step(optimizer, losses):
    optimizer.zero_grad()
    losses().sum().backward()
    optimizer.step()


# %%
# After one step both ways hold the same parameters, to 1e-6.


def compare_training(build, num_models, batch, shape, seconds=1.0):
    models = [build().to(device) for _ in range(num_models)]
    params, buffers = stack_module_state(models)
    minibatches = torch.randn(num_models, batch, *shape, device=device)
    with torch.device("meta"):
        skeleton = build()

    def loss(params, buffers, x):
        output = functional_call(skeleton, (params, buffers), (x,), strict=True)
        return output.square().mean()

    def loop():
        pairs = zip(models, minibatches, strict=True)
        return torch.stack([model(x).square().mean() for model, x in pairs])

    def one_call():
        return vmap(loss)(params, buffers, minibatches)

    every = [p for model in models for p in model.parameters()]
    one = torch.optim.SGD(every, lr=0.1, foreach=True)
    stacked = torch.optim.SGD(params.values(), lr=0.1, foreach=True)
    ways = [lambda: step(one, loop), lambda: step(stacked, one_call)]
    _ = [way() for way in ways]
    alone, _ = stack_module_state(models)
    torch.testing.assert_close(params, alone, atol=1e-6, rtol=1e-6)
    return in_turns(*ways, seconds=seconds)


# %%
# Two sizes fix the four numbers of the rule: one model, and a quarter of the largest
# number. Where :math:`a < 0`, or where an interval at one of them is wide (its ends
# differ by a factor above 1.5), the run refuses the rule. An accelerator gets more
# models and larger minibatches.

most, large = (256, 512) if device.type == "cpu" else (512, 4096)
two = [1, most // 4]
seconds = {1: 0.5, 2: 0.25, 4: 0.25, 8: 0.25, 16: 0.25, two[1]: 0.5, most: 0.5}


def straight(curve):
    """(a, b) and (c, d) of the rule; a slope below zero is noise."""
    for way in 0, 1:
        low, high = (curve[n][way][0] for n in two)
        slope = max(high - low, 0) / (two[1] - two[0])
        yield low - slope, slope


def pays_from(curve):
    """The number of models from which on vmap is faster wherever it was measured."""
    slow = [n for n, (_, (_, _, low, _)) in curve.items() if low <= 1.02]
    return next((n for n in curve if n > max(slow, default=0)), "no size")


def report(task, curve):
    (a, b), (c, d) = straight(curve)
    pays = max(1, (c - a) / (b - d)) if b > d else math.inf
    rule = f"{pays:.2g}" if pays <= most else f"none up to {most}"
    wide = any(high > 1.5 * low for *_, low, high in (curve[n][1] for n in two))
    rule = "refused, wide" if wide else "refused, a < 0" if a < 0 else rule
    print(f"{task}: vmap faster at all sizes from: {pays_from(curve)}")
    print(f"  by the rule from: {rule}")
    print("  a, b, c, d:", *(f"{1e6 * number:.3g}" for number in (a, b, c, d)), "us")
    for n in 1, 16, most:
        print(f"  N = {n}: {said(*curve[n][1][1:])}")


# %%
curves = {
    f"forward pass, batch {batch}": {
        n: compare(mlp, n, batch, shape, seconds=seconds[n]) for n in seconds
    },
    f"training step, batch {batch}": {
        n: compare_training(mlp, n, batch, shape, seconds[n]) for n in seconds
    },
}
for task, curve in curves.items():
    report(task, curve)

# %%
# The first line names the smallest number of models from which on ``vmap`` is faster,
# beyond noise, wherever it was measured: the dotted line of the figure. Bars are the
# gain's intervals, drawn on the call only. While :math:`c` is nearly all of the call's
# time, its curve is flat: **one more model is nearly free**.

fig, axes = plt.subplots(1, 2, figsize=(6.4, 3.8), sharey=True, layout="constrained")
for ax, (task, curve) in zip(axes, curves.items(), strict=True):
    for way, (start, slope) in enumerate(straight(curve)):
        label, fmt = [("loop", "C0o"), ("one vmap call", "C1^")][way]
        time, gain, low, high = torch.tensor([curve[n][way] for n in curve]).T
        bars = torch.stack([time - time * gain / high, time * gain / low - time])
        ax.errorbar(list(curve), 1e3 * time, 1e3 * bars, fmt=fmt, label=label)
        ax.plot(list(curve), [1e3 * (start + slope * n) for n in curve], f"C{way}--")
    if pays_from(curve) in curve:
        ax.axvline(pays_from(curve), color="gray", ls=":")
    ax.set_title(f"{task}\nvmap faster from: {pays_from(curve)}")
    ax.set(xlabel="number of models", xscale="log", yscale="log")
axes[0].set_ylabel("time [ms]")
axes[1].legend(title="dashed: the rule")
fig.suptitle(f"MLPs, float32, {name}")
found = []
for n in most, 1:
    words = [f"{task} {said(*curve[n][1][1:])}" for task, curve in curves.items()]
    found.append(f"{n} {'models' if n > 1 else 'model'}, " + ", ".join(words))
fig.set_label(
    "Time of a loop over modules and of one vmap call against the number of models, "
    f"logarithmic axes, {name}. One call for small MLPs: {'; '.join(found)}."
)

# %%
# Does batch size matter?
# -----------------------
#
# The forward pass again, with smaller and larger minibatches. Larger ones add work to
# both slopes. If they add the same to both, the gain comes nearer to one; if they add
# more to :math:`d`, the call can lose. Only gains whose intervals do not overlap are
# told apart here.

some = [1, 16, two[1], most]
more = {
    f"forward pass, batch {size}": {
        n: compare(mlp, n, size, shape, seconds=seconds[n]) for n in some
    }
    for size in (1, large)
}
for task, curve in more.items():
    report(task, curve)

# %%
# Predict a size that you did not measure
# ---------------------------------------
#
# All sizes but the two that made the rule test it, also where it was refused. The
# largest lies four times beyond.

rows = []
for task, curve in (curves | more).items():
    for n in sorted(curve.keys() - two):
        loop, call = (start + slope * n for start, slope in straight(curve))
        (loop_time, *_), (call_time, *gain) = curve[n]
        off = loop / call / gain[0], loop / loop_time, call / call_time
        rows.append((f"{task:22} {n:4}", loop / call, gain, [x - 1 for x in off]))
told = [row for row in rows if row[2][1] > 1.02 or row[2][2] < 0.98]
right = sum((guess > 1) == (gain > 1) for _, guess, (gain, *_), _ in told)
errors = [abs(off[0]) for *_, off in rows]
print(f"the rule names the faster way at {right} of {len(told)} sizes that have one")
print(f"gain: median error {statistics.median(errors):.0%}, largest {max(errors):.0%}")
print(f"{'models':>27}  gain: rule, run             error, of loop, of call")
for size, guess, (gain, low, high), off in rows:
    measured = f"{gain:.3g} ({low:.3g} to {high:.3g})"
    print(f"{size} {guess:5.3g} {measured:22}", *(f"{error:+5.0%}" for error in off))

# %%
# A gain below one is a loss. Where the predicted gain lies inside of the interval, the
# error can be noise. Elsewhere a line is not straight, or the machine's speed changed
# between sizes, or the noise of the two sizes is in the prediction. Errors of one sign
# decide nothing, because all share the two sizes.
#
# vmap slower than a for loop? Three reasons
# ------------------------------------------
#
# **Too few models**, at the left ends of the curves: the rule estimates how many.
#
# **Too large tensors.** One call holds the activations of all models. ``chunk_size``
# takes the models in pieces: the same arithmetic, smaller tensors, more operators.

models = [mlp().to(device).eval() for _ in range(most)]
params, buffers = stack_module_state(models)
with torch.device("meta"):
    skeleton = mlp().eval()


def predict(params, buffers, x):
    return functional_call(skeleton, (params, buffers), (x,), strict=True)


@torch.no_grad()
def against_both(way, batch):
    x = torch.randn(most, batch, *shape, device=device)
    _, *others = in_turns(
        lambda: way(x),
        lambda: torch.stack([m(data) for m, data in zip(models, x, strict=True)]),
        lambda: vmap(predict)(params, buffers, x),
        seconds=0.3,
    )
    loop, call = (said(1 / gain, 1 / high, 1 / low) for _, gain, low, high in others)
    return f"batch {batch}, against a loop: {loop}\n  against one call: {call}"


in_chunks = vmap(predict, chunk_size=most // 8)
for size in batch, 4 * large:
    found = against_both(lambda x: in_chunks(params, buffers, x), size)
    print(f"{most} models in chunks of {most // 8}, {found}")

# %%
# Where chunks are faster than one call, the size of the tensors was a cost, on a CPU
# probably that of the cache and of fresh memory (``plot_what_vmap_runs.py``). If no
# line says so, this run has no such case.
#
# **Models with much work each.** At every batch the loop runs the same operators, so
# the overhead of a model is at most :math:`b` at batch 1. What :math:`b` has beyond
# that at a larger batch is mostly work, which one call may do faster or slower: compare
# :math:`d`. ``plot_ensembling.py`` measures convolutions.
#
# The mistake: stacking in every call
# -----------------------------------
#
# With ``stack_module_state`` inside of what is called often, the predictions are the
# same (tested), but each call first copies all parameters, and a backward pass never
# reaches the models (tested).

found = against_both(lambda x: vmap(predict)(*stack_module_state(models), x), batch)
print(f"{most} models stacked in every call, {found}")

# %%
# Remember
# --------
#
# **A loop pays its overhead for every model, one call pays a larger one once.** Two
# sizes of your own network give a first estimate of the number of models from which one
# call pays. Test it on a third, and compare with the fastest loop that you can write.
#
# Next
# ----
#
# - ``plot_what_vmap_runs.py``: the operators of one call, and a fourth reason, those
#   that ``vmap`` cannot batch.
# - ``plot_fastest_mlp.py``, ``plot_faster_training.py``: faster loops, faster calls.
#
# References
# ----------
#
# - The question: `functorch#1061 <https://github.com/pytorch/functorch/issues/1061>`_,
#   `jax#15339 <https://github.com/jax-ml/jax/issues/15339>`_.
# - Stacking in every call: `pytorch#120581
#   <https://github.com/pytorch/pytorch/issues/120581>`_.
