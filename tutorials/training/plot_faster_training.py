"""
A faster training step for many models
======================================

Make the training step of many small networks faster, one change at a time, each with
its number: from a loop over the models to a fused optimizer, ``vmap`` and a compiled
gradient.

**In short.** Compute the gradients of all members in one call of ``vmap``, give the
stacked parameters to one ``Adam(..., fused=True)``, and for a long training compile the
function that computes the gradients. Compiling costs seconds for each shape: the run
below says what each change gains, and whether and when those seconds are earned back.

Before you start, read ``plot_training.py``: it explains the loop that is made faster.
"""

# %%
# Set-up
# ------

import copy
import math
import warnings
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.utils.benchmark import timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
where = f"{device.type.upper()}, {torch.get_num_threads()} threads"
if device.type == "cuda":
    where = torch.cuda.get_device_name()
precision = torch.get_float32_matmul_precision()
print(f"{where}, torch {torch.__version__}, float32, precision {precision!r}")
warnings.filterwarnings("ignore", module="torch")  # of torch.compile; not to copy


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


with torch.device("meta"):
    skeleton = MLP()

# %%
# The step to copy
# ----------------


def member_loss(params, x, y):  # of one member, on its minibatch
    return F.cross_entropy(functional_call(skeleton, params, (x,), strict=True), y)


gradient = vmap(grad_and_value(member_loss))  # of all members
compiled_gradient = torch.compile(gradient)


@torch.no_grad()  # grad_and_value records what it needs by itself
def train_step(gradient, params, update, x, y):
    grads, losses = gradient(params, x, y)
    for name, p in params.items():
        g = grads[name]  # in memory it has to lie as p does
        p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
    update()
    return losses


# %%
# This is how the step is used. A scheduler works as ever, because the optimizer is not
# compiled. Every step assigns ``p.grad`` anew, so there is no ``zero_grad``.

num_models = 100
models = [MLP().to(device) for _ in range(num_models)]
params, _ = stack_module_state(models)
optimizer = torch.optim.Adam(params.values(), fused=True)
x = torch.randn(num_models, 32, 64, device=device)  # [member, image, pixel]
y = torch.randint(10, (num_models, 32), device=device)
for _ in range(3):
    losses = train_step(gradient, params, optimizer.step, x, y)
print(f"losses of {num_models} members: {losses.min():.2f} to {losses.max():.2f}")

# %%
# ``compiled_gradient`` can take the place of ``gradient``. Its first call starts the
# compiler and compiles. (An earlier run of this script leaves a cache that shortens
# it.)

compiler, start = True, timer()  # this timer waits for a GPU
try:
    train_step(compiled_gradient, params, optimizer.step, x, y)
    first_call = timer() - start
    print(f"the first call of the compiled gradient took {first_call:.1f} s")
except torch._dynamo.exc.TorchDynamoException as error:
    compiler = False
    print("The compiler failed:", str(error).split("\n\n")[0])
    print("The compiled forms are left out.")

# %%
# **Do not leave out the line with** ``stride``: a fused optimizer can read a gradient
# that lies in another order than its parameter as if it lay in the same, without an
# error. The gradients that are written by hand below lie in another order (tested). One
# step of SGD from zero at a rate of 1 has to give minus the gradient:

p = torch.zeros(2, 3, device=device)
p.grad = torch.arange(6.0, device=device).reshape(3, 2).T  # lies column by column
torch.optim.SGD([p], lr=1.0, fused=True).step()
verdict = "right" if torch.equal(p, -p.grad) else "WRONG"
print(f"{verdict} on this device: step {p.tolist()}, gradient {p.grad.tolist()}")

# %%
# It is Adam
# ----------
#
# The reference is the loop that people write, where each member has a backward pass and
# an Adam of its own.


def loop_step(models, optimizers, x, y):
    losses = []
    for model, optimizer, inputs, labels in zip(models, optimizers, x, y, strict=True):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


# %%
# The check to keep compares the losses of twenty steps in float64 on the CPU, where
# rounding is far below 1e-10. The largest distance is printed.

few = [copy.deepcopy(model).cpu().double() for model in models[:5]]
data = x[:5].cpu().double(), y[:5].cpu()
params, _ = stack_module_state(few)
optimizer = torch.optim.Adam(params.values(), fused=True)
optimizers, off = [torch.optim.Adam(model.parameters()) for model in few], []
for _ in range(20):
    found = train_step(gradient, params, optimizer.step, *data)
    off.append((found - loop_step(few, optimizers, *data)).abs().max())
off = torch.stack(off).max().item()
assert off < 1e-10, f"these are not the steps of Adam for each: {off:.0e}"
print(f"losses of 20 steps: at most {off:.0e} apart in float64")

# %%
# What should happen, and why
# ---------------------------
#
# The loop calls each operator once for each member. One backward pass and one optimizer
# are started once, in place of once for each member. A fused Adam is one operator for
# all parameters, an unfused one on a CPU several for each, and ``vmap`` calls each
# operator of a layer once for all members (tested). A compiler can join biases,
# activations and losses into fewer passes over memory, but the matrix products remain.
# So one backward pass, one fused Adam, ``vmap`` and a compiled gradient should gain
# while members are so small that starting a call takes longer than its work.
#
# Which form is fastest here?
# ---------------------------
#
# One rule for "faster": the ways take turns, the gain is the median of the ratios
# within a turn, and the brackets hold its 95 % interval. A form counts as faster or
# slower if its whole interval lies more than 2 percent from 1, so "no difference seen"
# does not say that two forms are equal.


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
# Each form starts from the same members; its losses in the fifth step have to lie
# within 1e-3 of those of the loop. Then it takes turns with the forms that are named; a
# turn consists of whole training steps. The time of the other form is the median of at
# least seven turns, and the time of the form is that median divided by the gain. A form
# can take another time beside another form: read each gain by itself, and do not
# multiply gains.

ways, losses, gains = {}, {}, {}


def step(name, way, *others, seconds=0.5):
    """Check that a form trains as the loop does; compare its time with others."""
    if "compiled" in name and not compiler:
        return
    ways[name], losses[name] = way, [way() for _ in range(5)][-1]
    off = (losses[name] - losses["loop"]).abs().max()
    assert off < 1e-3, f"{name} is another training: losses {off:.0e} apart"
    for other in others:
        (was, *_), (now, *gain) = in_turns(ways[other], way, seconds=seconds)
        gains[name, other] = was, *gain
        times = f"{name} ({now * 1e3:.3g} ms) beside {other} ({was * 1e3:.3g} ms)"
        print(f"{times}: {said(*gain)}")


# %%
# Steps 1 to 3: a better loop
# ---------------------------
#
# The first step is one backward pass of the sum of all losses, the second is one Adam
# for the parameters of all members, and the third is a fused Adam.


def better_loop_step(models, optimizers, x, y):
    tasks = zip(models, x, y, strict=True)
    losses = torch.stack([F.cross_entropy(model(a), b) for model, a, b in tasks])
    for optimizer in optimizers:
        optimizer.zero_grad()
    losses.sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return losses.detach()


def loop(step, groups=lambda members: [nn.ModuleList(members)], **options):
    members = copy.deepcopy(models)
    adams = [torch.optim.Adam(g.parameters(), **options) for g in groups(members)]
    return partial(step, members, adams, x, y)


print(f"{where}, float32 ({precision}), training steps of {num_models} members")
step("loop", loop(loop_step, list))
step("one backward pass", loop(better_loop_step, list), "loop")
step("one Adam", loop(better_loop_step), "one backward pass")
step("fused Adam", loop(better_loop_step, fused=True), "one Adam")

# %%
# Step 4: vmap in place of the loop
# ---------------------------------
#
# This is the step to copy, not compiled: first with the fused Adam, then with one that
# is not fused. Last, the same gradients by hand. They save operators, because ``vmap``
# adds the bias after the product and takes the loss apart (tested), but have to be
# copied into order.


def gradient_by_hand(params, x, y):
    def total(params):
        w1, b1, w2, b2 = params.values()
        hidden = torch.baddbmm(b1[:, None], x, w1.mT).relu()
        logits = torch.baddbmm(b2[:, None], hidden, w2.mT)
        losses = F.cross_entropy(logits.mT, y, reduction="none").mean(1)
        return losses.sum(), losses

    grads, (_, losses) = grad_and_value(total, has_aux=True)(params)
    return grads, losses


def one_call(gradient, prepare=lambda update: update, fused=True):
    params, _ = stack_module_state(models)
    update = prepare(torch.optim.Adam(params.values(), fused=fused).step)
    return partial(train_step, gradient, params, update, x, y)


step("vmap", one_call(gradient), "fused Adam", seconds=1.5)
step("vmap, Adam not fused", one_call(gradient, fused=False), "vmap")
step("by hand", one_call(gradient_by_hand), "vmap")

# %%
# Step 5: compile the gradient
# ----------------------------
#
# This is the step to copy, compiled. The loop is compiled, too, with one call for each
# member: one function computes the gradient of one member. It is compiled once for all
# members (tested), and one fused Adam follows.

compiled_member = torch.compile(grad_and_value(member_loss))


def compiled_loop_step(members, update, x, y):
    tasks = zip(members, x, y, strict=True)  # each without an update of its own:
    losses = [train_step(compiled_member, p, lambda: 0, a, b) for p, a, b in tasks]
    update()
    return torch.stack(losses)


members = copy.deepcopy(models)
adam = torch.optim.Adam(nn.ModuleList(members).parameters(), fused=True)
members = [dict(model.named_parameters()) for model in members]
way = partial(compiled_loop_step, members, adam.step, x, y)
step("compiled loop", way, "fused Adam")
others = "vmap", "compiled loop", "loop"
step("compiled gradient", one_call(compiled_gradient), *others, seconds=1.5)

# %%
# Step 6: compile Adam, too
# -------------------------
#
# Compiled apart from the gradient, Adam still reads it from memory, as a fused Adam
# does in one operator. So compiling Adam should add little. PyTorch breaks the graph of
# a compiled ``train_step`` at the optimizer (tested). An Adam that is written out, as
# in ``plot_hyperparameter_sweep.py``, can be in one graph with the gradient, without
# ``torch.optim``'s schedulers and ``state_dict``.

way = one_call(compiled_gradient, torch.compile, fused=False)
step("compiled Adam", way, "compiled gradient")

# %%

fig, ax = plt.subplots(layout="constrained")
left = {"transform": ax.get_yaxis_transform(), "fontsize": "small"}
for row, (names, (_, gain, low, high)) in enumerate(reversed(gains.items())):
    none = "no difference" in said(gain, low, high)
    ax.plot([low, high], [row, row], "C1:" if none else "C0-", linewidth=3)
    ax.plot(gain, row, "C1D" if none else "C0o")
    ax.text(0.02, row + 0.2, " beside ".join(names), **left)
ax.axvline(1, color="C5", linestyle=":")
ax.set_xscale("log", base=2)
ax.xaxis.set_major_formatter("{x:g}")
ax.set_yticks([])
ax.margins(y=0.08)
ax.set_xlabel("gain, with its interval")
ax.set_title(f"A training step of {num_models} members, {where}, float32")
result = said(*gains["vmap", "fused Adam"][1:])
fig.set_label(
    "A point and its interval for the gain of each form beside another one; dotted "
    "where no difference was seen. A training step with vmap beside a loop with one "
    f"backward pass, both with one fused Adam and not compiled: {result}."
)

# %%
# **Keep what gains; where a narrow interval shows no difference, keep what is
# simpler.** After a wide one, repeat the run on a quiet machine. By hand and compiled
# were not timed beside each other. If the form by hand is faster, the reason is
# probably that it calls fewer operators (their number is tested). If the compiled loop
# gains nothing, the reason is probably that every call of a compiled function first
# checks what it is given.
#
# The mistake: to compile a short training
# ----------------------------------------
#
# After how many steps is the first call earned back? That number is the time of the
# first call, measured once, divided by the time that each step saves; its interval is
# that of the gain alone.

if compiler:
    was, gain, low, high = gains["compiled gradient", "vmap"]
    text = "never, because the compiled step is slower"
    if high >= 0.98:
        text = "not measurable here, because no difference was seen"
    if low > 1.02:
        steps = [first_call / (was - was / g) for g in (high, low)]
        text = " to ".join(f"{float(f'{n:.2g}'):,.0f}" for n in steps) + " steps"
    print(f"The first call took {first_call:.1f} s. Earned back: {text}.")

# %%
# Each new size of minibatch or number of members is compiled once (tested), up to eight
# forms: drop a smaller last minibatch, or pay once more.
#
# Remember
# --------
#
# Compare with a loop that has one optimizer, and compile both sides or neither. Give
# the stack to a fused optimizer, and for a long training compile the gradient of all
# members. Check the step in float64 against ``torch.optim``.
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
# - PyTorch on `compiled optimizers
#   <https://docs.pytorch.org/tutorials/recipes/compiling_optimizer.html>`_.
