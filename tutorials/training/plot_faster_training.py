"""
A faster training step for many models
======================================

Make the training step of many small networks faster: with ``vmap`` in place of a loop,
a fused optimizer and a compiled gradient, each timed beside a simpler form.

**In short.** Compute the gradients of all members in one call of ``vmap``, give the
stacked parameters to one ``Adam(..., fused=True)``, and for a long training compile the
function that computes the gradients. Compiling costs seconds once: the run below says
what each change gains, and after how many steps those seconds are earned back.

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
# And how it is used. A scheduler works as ever, because the optimizer is not compiled.
# Every step assigns ``p.grad`` anew, so there is no ``zero_grad``. **Do not leave out
# the line with** ``stride``: on a CPU, the fused optimizer of torch 2.13 reads a
# gradient that lies in another order than its parameter as if it lay in the same,
# without an error.

num_models = 256
models = [MLP().to(device) for _ in range(num_models)]
params, _ = stack_module_state(models)
optimizer = torch.optim.Adam(params.values(), fused=True)
x = torch.randn(num_models, 32, 64, device=device)  # [member, image, pixel]
y = torch.randint(10, (num_models, 32), device=device)
for _ in range(3):  # below, compiled_gradient takes the place of gradient
    losses = train_step(gradient, params, optimizer.step, x, y)
print(f"losses of {num_models} members: {losses.min():.2f} to {losses.max():.2f}")

# %%
# It is Adam
# ----------
#
# There are two rivals. The first is the loop that people write. The second is a better
# loop: one fused optimizer for the parameters of all members, and one backward pass of
# the sum of their losses. Neither is compiled.


def loop_step(models, optimizers, x, y):
    losses = []
    for model, optimizer, inputs, labels in zip(models, optimizers, x, y, strict=True):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def best_loop_step(models, optimizer, x, y):
    tasks = zip(models, x, y, strict=True)
    losses = torch.stack([F.cross_entropy(model(a), b) for model, a, b in tasks])
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    return losses.detach()


# %%
# One more form goes further than the step to copy: Adam (Kingma & Ba, 2014) written
# out, so that one compiled function holds the gradient and the optimizer. The compiler
# does not join them across ``optimizer.step()``, where PyTorch breaks its graph
# (tested).


def whole_step(params, means, squares, count, x, y, lr=0.001):
    grads, losses = gradient(params, x, y)
    count += 1  # a tensor: a Python number that changes would be compiled anew
    for name, g in grads.items():
        means[name].mul_(0.9).add_(0.1 * g)
        squares[name].mul_(0.999).add_(0.001 * g**2)
        root = (squares[name] / (1 - 0.999**count)).sqrt() + 1e-8
        params[name] -= lr / (1 - 0.9**count) * means[name] / root
    return losses


def begin(models):
    """State of ``whole_step``: parameters, the two averages, the number of steps."""
    params = {name: p.detach() for name, p in stack_module_state(models)[0].items()}
    means, squares = [{k: torch.zeros_like(p) for k, p in params.items()} for _ in "12"]
    return params, means, squares, torch.zeros_like(params["0.bias"][0, 0])


# %%
# The check to keep, in float64 on the CPU, where rounding is far below any mistake:
# both forms, not compiled, against a ``torch.optim.Adam`` for each member alone. Each
# of twenty steps has to agree; the last distance is printed.

few = [copy.deepcopy(model).cpu().double() for model in models[:5]]
data = x[:5].cpu().double(), y[:5].cpu()
params, _ = stack_module_state(few)
optimizer, state = torch.optim.Adam(params.values(), fused=True), begin(few)
optimizers = [torch.optim.Adam(model.parameters()) for model in few]
for _ in range(20):
    found = [train_step(gradient, params, optimizer.step, *data)]
    found.append(whole_step(*state, *data))
    off = (torch.stack(found) - loop_step(few, optimizers, *data)).abs().max()
    assert off < 1e-10, f"these are not the steps of Adam for each: {off:.0e}"
print(f"losses of 20 steps: at most {off:.0e} apart in float64")

# %%
# What should happen, and why
# ---------------------------
#
# A loop calls each layer once for each member, forward and backward; ``vmap`` calls it
# once for all. A fused Adam is one operator that passes once over parameters, gradients
# and averages, in place of several that each pass over some of them. A compiler can
# join biases, activations and losses into fewer passes; the matrix products remain. So
# these changes should gain.
#
# A matrix product writes the gradient of the weights to memory before Adam reads it,
# compiled or not: so to compile Adam, alone or together with the gradient, should add
# nothing to a fused one. One case is open: the products of ``vmap`` are those that you
# would write by hand, but it takes more operators around them (tested).


def gradient_by_hand(params, x, y):
    def total(params):
        w1, b1, w2, b2 = params.values()
        hidden = torch.baddbmm(b1[:, None], x, w1.mT).relu()
        logits = torch.baddbmm(b2[:, None], hidden, w2.mT)
        losses = F.cross_entropy(logits.mT, y, reduction="none").mean(1)
        return losses.sum(), losses

    grads, (_, losses) = grad_and_value(total, has_aux=True)(params)
    return grads, losses


def one_call(gradient, fused, prepare=lambda update: update):
    params, _ = stack_module_state(models)
    update = prepare(torch.optim.Adam(params.values(), fused=fused).step)
    return partial(train_step, gradient, params, update, x, y)


# %%
# All forms start from the same members:

usual, best = "loop, one Adam each", "loop, one fused Adam"
copied = "compiled gradient, fused Adam"
members, others = copy.deepcopy(models), copy.deepcopy(models)
optimizers = [torch.optim.Adam(model.parameters()) for model in members]
one = torch.optim.Adam(nn.ModuleList(others).parameters(), fused=True)
ways = {usual: partial(loop_step, members, optimizers, x, y)}
ways[best] = partial(best_loop_step, others, one, x, y)
ways["vmap, Adam"] = one_call(gradient, fused=False)
ways["vmap, fused Adam"] = one_call(gradient, fused=True)
ways["by hand, fused Adam"] = one_call(gradient_by_hand, fused=True)
ways[copied] = one_call(compiled_gradient, fused=True)
ways["compiled gradient and Adam"] = one_call(compiled_gradient, False, torch.compile)
ways["compiled as a whole"] = partial(torch.compile(whole_step), *begin(models), x, y)

# %%
# The first call of a compiled form compiles. (An earlier run of this script leaves a
# cache that shortens it.) The first compiled form also pays for starting the compiler,
# and the second finds its gradient compiled, so these seconds do not rank the forms.

first_call, found = {}, []
for name, way in ways.items():
    start = timer()  # waits for a GPU
    try:
        way()
    except RuntimeError as error:
        if "compiled" not in name:
            raise  # no fault of the compiler
        print("No C++ compiler was found, or none works:", str(error).splitlines()[0])
        break
    first_call[name] = timer() - start
    found.append([way() for _ in range(4)][-1])
    off = (found[-1] - found[0]).abs().max()
    assert off < 1e-3, f"{name} is another training: losses {off:.0e} apart"
    if name.startswith("compiled"):
        print(f"{name}: first call {first_call[name]:.1f} s")
print(f"{len(found)} forms trained alike: losses after five steps within 1e-3")

# %%
# Which form is fastest here?
# ---------------------------
#
# One rule for "faster": the ways take turns, the gain is the median of the ratios
# within a turn, and the brackets are its interval: if turns were independent, it would
# hold the median gain in at least 95 of 100 runs. A form counts as faster or slower if
# its whole interval lies more than 2 percent from 1, so "no difference seen" does not
# say that two forms are equal.


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
# Each form takes turns with the one that it changes: whole training steps, after the
# five above. The time of the rival is the median of at least seven turns, and the other
# is that median divided by the gain. A form can take another time beside another rival,
# for example just after a loop of hundreds of small calls: read each gain by itself,
# and do not multiply gains. Two rows change more than one thing: the better loop has
# one optimizer, fused, and one backward pass; "vmap, Adam" replaces the loop and gives
# up the fusion.

changes = {
    best: usual,
    "vmap, Adam": best,
    "vmap, fused Adam": "vmap, Adam",
    "by hand, fused Adam": "vmap, fused Adam",
    copied: "vmap, fused Adam",
    "compiled gradient and Adam": copied,
    "compiled as a whole": copied,
}
print(f"{where}, float32 ({precision}), training steps of {num_models} members")
beside = {}  # of each change: seconds before and after, gain, interval
for name, before in changes.items():
    if name in first_call:
        (was, *_), (now, *gain) = in_turns(ways[before], ways[name], seconds=0.5)
        beside[name] = was, now, *gain
        print(f"{name}, {now * 1e3:.3g} ms, beside {before}, {was * 1e3:.3g} ms:")
        print(f"    {said(*gain)}")

# %%
# The better loop is the fairer rival. These are the gains of the step to copy over it,
# not compiled and compiled:

forms = [name for name in ["vmap, fused Adam", copied] if name in first_call]
(was, *_), *fair = in_turns(*[ways[name] for name in [best, *forms]])
print(f"{best}: {was * 1e3:.3g} ms")
for name, (now, *gain) in zip(forms, fair, strict=True):
    result = f"Beside it, {name} ({now * 1e3:.3g} ms): {said(*gain)}"
    print(result)

# %%
# The loop is not compiled: to compile it whole would write it out, member by member,
# and to compile the loss of one member was not timed. So only the first of the two
# gains compares like with like. All changes at a glance:

for word in ["faster", "slower", "no difference seen"]:
    names = [name for name, (_, _, *gain) in beside.items() if word in said(*gain)]
    print(f"{word}, beside the form that it changes: {'; '.join(names) or 'none'}")

# %%

fig, ax = plt.subplots(layout="constrained")
left = {"transform": ax.get_yaxis_transform(), "fontsize": "small"}
for row, (name, (_, _, gain, low, high)) in enumerate(reversed(beside.items())):
    none = "no difference" in said(gain, low, high)
    ax.plot([low, high], [row, row], "C1:" if none else "C0-", linewidth=3)
    ax.plot(gain, row, "C1D" if none else "C0o")
    ax.text(0.02, row + 0.2, f"{name}  (beside {changes[name]})", **left)
ax.axvline(1, color="C5", linestyle=":")
ax.set_xscale("log", base=2)
ax.xaxis.set_major_formatter("{x:g}")
ax.set_yticks([])
ax.margins(y=0.08)
ax.set_xlabel("gain over the form in brackets, with its interval")
ax.set_title(f"A training step of {num_models} members, {where}, float32")
listing = "; ".join(f"{name}: {said(*gain)}" for name, (_, _, *gain) in beside.items())
fig.set_label(
    "A point and its interval for each change of the training step, beside the form "
    f"that it changes; dotted where no difference was seen. {listing}. "
    f"{best}: {was * 1e3:.3g} ms. {result}."
)

# %%
# Hold this against what should happen: where a compiled Adam is slower, or gains, the
# reason given above is not the whole one on this machine. **Keep what gains; where no
# difference was seen, keep what is simpler.** A step compiled as a whole is Adam
# written out, without schedulers, other optimizers or ``state_dict``. A wide interval
# can hide a gain or a loss: repeat the run on a quiet machine. If the form by hand is
# faster, the reason is probably that it calls fewer operators: ``vmap`` adds the bias
# after the product, and takes the loss apart into small operators (tested).
#
# The mistake: to compile a short training
# ----------------------------------------
#
# The first call counts. After how many steps is it earned back? That number is the time
# of the first call, measured once, divided by the time that each step saves; its
# interval is that of the gain alone.

if copied in beside:
    was, now, gain, low, high = beside[copied]
    text = "never, because the compiled step is slower"
    if high >= 0.98:
        text = "not measurable here, because no difference was seen"
    if low > 1.02:
        steps = [first_call[copied] / (was - was / g) for g in (high, low)]
        text = " to ".join(f"{float(f'{n:.2g}'):,.0f}" for n in steps) + " steps"
    print(f"The first call took {first_call[copied]:.1f} s. Earned back: {text}.")

# %%
# A minibatch of another size, or another number of members, is compiled anew (tested):
# drop the last minibatch of an epoch if it is smaller.
#
# Remember
# --------
#
# Compare with a loop that has one optimizer and one backward pass. Give the stack to a
# fused optimizer, and for a long training compile the gradient of all members. Check
# the step in float64 against ``torch.optim``.
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
