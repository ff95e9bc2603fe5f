"""
A faster training step for many models
======================================

Make each training step of a whole ensemble faster: with a fused optimizer, and with one
compiled function that holds the gradient and the optimizer of all members.

**In short.** ``fused=True`` makes one operator of the many that an optimizer calls: one
argument, no price. ``torch.compile`` gains more if the optimizer is written for **one**
member, so that ``vmap`` and the compiler see the whole step; but its first call takes
seconds, which a short training never earns back.

Before you start, read ``plot_training.py``: it explains the loop that is made faster.
"""

# %%
# Set-up
# ------

import warnings
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.utils.benchmark import Measurement, Timer, timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
where = f"{device.type.upper()}, float32"
print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}")


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


with torch.device("meta"):
    skeleton = MLP()

# %%
# The step to copy
# ----------------
#
# Adam (Kingma & Ba, 2014) for **one** member, as a function of its state. ``vmap``
# makes it a step of all; the copies at the end keep the state where it is, so that no
# step needs fresh memory.


def member_loss(params, x, y):
    return F.cross_entropy(functional_call(skeleton, params, (x,), strict=True), y)


def adam_step(params, means, squares, count, x, y, lr=0.001):
    grads, loss = grad_and_value(member_loss)(params, x, y)
    means = {k: 0.9 * means[k] + 0.1 * g for k, g in grads.items()}
    squares = {k: 0.999 * squares[k] + 0.001 * g**2 for k, g in grads.items()}
    rate, unbias = lr / (1 - 0.9**count), 1 - 0.999**count
    steps = {k: means[k] / ((squares[k] / unbias).sqrt() + 1e-8) for k in grads}
    params = {k: p - rate * steps[k] for k, p in params.items()}
    return params, means, squares, loss


def ensemble_step(state, count, x, y):
    *new, losses = vmap(adam_step, in_dims=(0, 0, 0, None, 0, 0))(*state, count, x, y)
    for old, fresh in zip(state, new, strict=True):
        for name, p in old.items():
            p.copy_(fresh[name])
    return losses


with warnings.catch_warnings(action="ignore"):  # torch's remarks on itself
    compiled_step = torch.compile(ensemble_step)

# %%
# And how it is used. ``count``, from 1, is a tensor: a Python number that changes would
# be compiled anew.


def begin(models):
    """State of the ensemble: parameters, means and squares of their gradients."""
    params = {name: p.detach() for name, p in stack_module_state(models)[0].items()}
    zeros = [{name: torch.zeros_like(p) for name, p in params.items()} for _ in "12"]
    return params, *zeros


models = [MLP().to(device) for _ in range(5)]
state = begin(models)
x = torch.randn(5, 32, 64, device=device)  # [member, image, pixel]
y = torch.randint(10, (5, 32), device=device)
for count in torch.arange(1, 4, device=device):
    losses = ensemble_step(state, count, x, y)  # or compiled_step
print(f"losses of five members: {[round(loss, 3) for loss in losses.tolist()]}")

# %%
# It is Adam
# ----------
#
# The check to keep, in float64 on the CPU, where rounding is far below any mistake: the
# step written out for all members, against ``torch.optim.Adam`` for each alone.


def step_alone(model, optimizer, x, y):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def loop_step(models, optimizers, x, y):
    tasks = zip(models, optimizers, x, y, strict=True)
    return torch.stack([step_alone(*task) for task in tasks])


models = [model.cpu().double() for model in models]
optimizers = [torch.optim.Adam(model.parameters()) for model in models]
state, data = begin(models), (x.cpu().double(), y.cpu())
for count in torch.arange(1, 21).cpu().double():
    losses = ensemble_step(state, count, *data)
    off = (losses - loop_step(models, optimizers, *data)).abs().max()
    assert off < 1e-10, f"the step written out is not that of torch.optim: {off:.0e}"
print(f"losses of 20 steps, written out and torch.optim: {off:.0e} apart in float64")

# %%
# What should happen, and why
# ---------------------------
#
# ``torch.optim.Adam`` calls several operators, and each reads and writes all tensors.
# Fused, one operator reads and writes them once. Compiled as a whole, a gradient need
# not be written before Adam reads it. So with many members, where memory is the limit,
# each form should be faster. The written-out form without the compiler should be slow:
# it makes a fresh tensor of every intermediate.
#
# First the first call, when nothing is compiled yet (an earlier run of this script
# leaves a cache that shortens it):

num_models = 1000 if device == cpu else 10_000
members = [MLP().to(device) for _ in range(num_models)]
x = torch.randn(num_models, 32, 64, device=device)
y = torch.randint(10, (num_models, 32), device=device)
one = torch.tensor(1, device=device)
forms = {"written out": ensemble_step, "compiled": compiled_step}
first_call, found = {}, []
for form, step in forms.items():
    state, began = begin(members), timer()  # which waits for a GPU
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on itself
            step(state, one, x, y)
    except RuntimeError as error:  # of the compiler
        print("No C++ compiler was found, or none works:", str(error).splitlines()[0])
        break
    first_call[form] = timer() - began
    for count in torch.arange(2, 6, device=device):
        losses = step(state, count, x, y)
    found.append(losses)
    print(f"first call, {form}: {first_call[form]:.2f} s")
off = (found[-1] - found[0]).abs().max()
assert off < 1e-3, f"the compiled step is another one: losses {off:.0e} apart"
print(f"losses after five steps: {off:.0e} apart")

# %%
# Which form is fastest here?
# ---------------------------
#
# Median and interquartile range of five turns after a warm-up; the forms take turns.
# Each is a whole step: losses, gradients, Adam.


def stock_step(params, optimizer, x, y):
    losses = vmap(member_loss)(params, x, y)
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    return losses.detach()


def in_turns(*functions):
    """A ``Measurement`` of each function; they take turns, so drift hits all alike."""
    threads = torch.get_num_threads()
    timers = [Timer("f()", globals={"f": f}, num_threads=threads) for f in functions]
    turns = [[t.blocked_autorange(min_run_time=0.2) for t in timers] for _ in range(5)]
    return [Measurement.merge(turn)[0] for turn in zip(*turns, strict=True)]


rungs = {}
for form, fused in [("torch.optim.Adam", False), ("fused=True", True)]:
    params, _ = stack_module_state(members)
    optimizer = torch.optim.Adam(params.values(), fused=fused)
    rungs[form] = partial(stock_step, params, optimizer, x, y)
for form in first_call:
    rungs[form] = partial(forms[form], begin(members), one, x, y)

times = dict(zip(rungs, in_turns(*rungs.values()), strict=True))
usual_time = times["torch.optim.Adam"].median
print(f"a step of {num_models:,} members; fastest:", end=" ")
print(min(times, key=lambda form: times[form].median))
for form, t in times.items():
    ratio = usual_time / t.median
    verdict = f"{max(ratio, 1 / ratio):.1f}x {'faster' if ratio > 1 else 'slower'}"
    if ratio == 1:
        verdict = "the loop of plot_training.py"
    print(f"{form:16} {t.median * 1e3:6.2f} ms ({t.iqr * 1e3:.2f}), {verdict}")

# %%
# **Fused costs one argument; take it.** Where compiling gains, it saves passes over
# memory; where it gains little, the matrix products take most of the time, and no
# compiler makes them shorter. Written out alone, the form is no gain by itself.
#
# The mistake: to compile a short training
# ----------------------------------------
#
# The first call counts, and it comes back for each new number of members or images.
# From the measured parts, how long is a training of N steps?

result = "It was not compiled."
if "compiled" in times:
    gain = times["fused=True"].median - times["compiled"].median
    result = "Compiling never pays here: the fused step is as fast."
    if gain > 0:
        steps = first_call["compiled"] / gain
        result = f"Compiling pays from {steps:,.0f} steps on, against fused."
print(result)

# %%

fig, ax = plt.subplots(layout="constrained")
steps = torch.logspace(0, 6, 61)
looks = dict(zip(times, ["C0-", "C1--", "C2:", "C3-."], strict=False))
for form, t in times.items():
    line = first_call.get(form, 0) + steps * t.median
    ax.loglog(steps, line, looks[form], label=form)
ax.set_title(f"{num_models:,} members, first call and steps, {where}")
ax.set_xlabel("steps of the training")
ax.set_ylabel("time of the training [s]")
ax.legend()
fig.set_label(
    "Time of a training against its steps, one line a form. The compiled one begins "
    f"high, at its first call, and rises late. {result}"
)

# %%
# Compile what trains for long or often with the same shapes. ``copy_`` in place and a
# ``count`` that is a tensor keep it compiled once.
#
# Remember
# --------
#
# Give the optimizer ``fused=True``. For a long training, write it for one member, map
# it with ``vmap``, and compile the whole step. Check it in float64 against
# ``torch.optim``.
#
# Next
# ----
#
# - ``plot_when_vmap_pays.py``: for which networks one call is faster at all.
# - ``plot_fastest_ensemble.py``: the fastest prediction.
#
# References
# ----------
#
# - Kingma and Ba (2014), `arXiv:1412.6980 <https://arxiv.org/abs/1412.6980>`_.
# - PyTorch on `compiled optimizers
#   <https://docs.pytorch.org/tutorials/recipes/compiling_optimizer.html>`_.
