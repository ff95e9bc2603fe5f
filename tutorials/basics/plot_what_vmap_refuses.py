"""
Errors of vmap and what to write instead
========================================

Find the error message of ``torch.func.vmap`` that stopped you, and the lines that
compute the same and are accepted.

**In short.** ``vmap`` runs your function once, on tensors that stand for all members,
models or samples, so it refuses whatever needs the value of a single one (``if``,
``.item()``, NumPy, shapes that depend on values); each has a form in tensor operations
that equals the loop. Python's side effects (``append``, ``random.random()``) are not
refused, but happen once for all.

Before you start: ``plot_ensembling.py`` says what ``vmap`` does.
"""

# %%
# Set-up
# ------

import random
import textwrap
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
float64 = {"device": device, "dtype": torch.float64}
num_models = 4
xs = torch.randn(num_models, 8, 6, dtype=torch.float64).to(device)  # a [8, 6] for each
print(f"{device.type.upper()}, torch {torch.__version__}, float64")


def says(function, *inputs):
    """First sentence of what vmap says about a function."""
    try:
        vmap(function)(*inputs)
    except (RuntimeError, ValueError) as error:
        sentence = str(error).split(". ")[0].split("\n")[0].removeprefix("vmap: ")
        return textwrap.fill(sentence, 88)
    return "accepted here"


# %%
# What you see, what to write, and why
# ------------------------------------
#
# Thirteen short functions that ``vmap`` refuses:


class OldFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()


refused = {
    "if": lambda x: x if x.sum() > 0 else -x,
    "item": lambda x: x / x.max().item(),
    "numpy": lambda x: x.cpu().numpy(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "in place": lambda x: torch.zeros(8, 6, **float64).copy_(x),
    "out": lambda x: torch.sin(x, out=torch.empty_like(x)),
    "random": lambda x: x + torch.randn_like(x),
    "norm": nn.BatchNorm1d(6, **float64),
    "lstm": nn.LSTM(6, 5, **float64),
    "backward": lambda x: x.sum().backward(),
    "function": OldFunction.apply,
    "return": lambda x: (x.sum(), "loss"),
}

# %%
# What to write for each of them, and why. The table's first lines come from PyTorch:

instead = {
    "if": ("torch.where(test, a, b)", "an if goes one way, members differ"),
    "item": ("x.max(), still a tensor", "a float holds one number, not four"),
    "numpy": ("torch, or NumPy after the call", "NumPy knows no members"),
    "mask": ("torch.where(mask, x, fill)", "members would differ in shape"),
    "nonzero": ("return all of x, and a mask", "members would differ in shape"),
    "in place": ("x.new_zeros(8, 6).copy_(x)", "four results, room for one"),
    "out": ("torch.sin(x)", "no rule for out="),
    "random": ('vmap(f, randomness="different")', "one draw for all, or one each?"),
    "norm": ("stack buffers, or keep no statistics", "four means, room for one"),
    "lstm": ("the cell, written out", "no rule for this operator"),
    "backward": ("vmap(grad(loss))", "no backward() inside of vmap"),
    "function": ("setup_context, generate_vmap_rule", "the old form has no rule"),
    "return": ("only tensors, or out_dims=(0, None)", "a str cannot be stacked"),
}

print(f"What you see\n    {'What to write':38} Why")
for case, (what, why) in instead.items():
    print(textwrap.shorten(says(refused[case], xs), 88, placeholder=" ..."))
    print(f"    {what:38} {why}")

# %%
# Each case in full follows, under the words of its message, checked against the loop
# that ``vmap`` stands for. If a newer PyTorch accepts one, the page prints "accepted
# here". ``chunk_size=1`` changes nothing (tested).


def check(one_call, loop):
    far = (one_call - torch.stack(loop)).abs().max().item()
    assert far < 1e-10, f"vmap does not compute what the loop computes: {far:.1e} away"
    print(f"What to write equals the loop; largest difference {far:.0e}.")


# %%
# ``You're attempting to use a Tensor in some data-dependent control flow``
# -------------------------------------------------------------------------
#
# Turn ``x`` so that its mean is positive. Some members need it, some do not:


def turn(x):  # refused
    if x.mean() < 0:
        x = -x
    return x


def turn_where(x):  # what to write
    return torch.where(x.mean() < 0, -x, x)


print(says(turn, xs))
check(vmap(turn_where)(xs), [turn(x) for x in xs])

# %%
# The same for ``assert``, ``and``, ``max(a, b)`` (write ``torch.maximum``) and
# ``sorted``. A ``while`` becomes a ``for`` over the largest number of steps, with
# ``x = torch.where(running, step(x), x)`` in it (tested).
#
# ``torch.where`` computes *both* sides for all. In training, the side that is not taken
# must not be infinite or ``nan``, or the gradient is ``nan``: write
# ``torch.where(x > 0, x, 1).sqrt()`` inside of the outer ``where`` (tested).
#
# ``You're calling .item() on a Tensor``
# --------------------------------------


def scale(x):  # refused; so is float(x.max())
    return x / x.max().item()


def scale_tensor(x):  # what to write
    return x / x.max()


print(says(scale, xs))
check(vmap(scale_tensor)(xs), [scale(x) for x in xs])

# %%
# It is also hidden in:
#
# - ``torch.tensor([a, b])`` of tensors: write ``torch.stack([a, b])``.
# - ``rates[i]``, a list at a tensor ``i``: write ``torch.tensor(rates)[i]``.
# - ``range(n)``: a ``for`` over the largest ``n``, with ``torch.where``.
# - ``f"{x:.2f}"``: format after the call; ``print(x)`` is accepted.
#
# A tensor that all members share (``in_dims=None``) may use ``.item()`` (tested).
#
# ``Cannot access data pointer of Tensor that doesn't have storage``
# ------------------------------------------------------------------
#
# That is NumPy, or ``.tolist()``. Call NumPy before or after, on all members:


def reverse(x):  # refused
    return torch.from_numpy(x.cpu().numpy()[::-1].copy()).to(x.device)


def reverse_torch(x):  # what to write
    return x.flip(0)


print(says(reverse, xs))
check(vmap(reverse_torch)(xs), [reverse(x) for x in xs])

# %%
# ``We do not support batching operators that can output dynamic shape``
# ----------------------------------------------------------------------
#
# ("Can support", for a mask.) The same for ``nonzero``, ``unique`` and ``torch.where``
# with one argument. Keep the shape; what is not wanted must have no effect:


def mean_of_positive(x):  # refused
    return x[x > 0].mean()


def mean_of_positive_where(x):  # what to write
    return torch.where(x > 0, x, torch.nan).nanmean()


print(says(mean_of_positive, xs))
check(vmap(mean_of_positive_where)(xs), [mean_of_positive(x) for x in xs])

# %%
# - ``x[mask] = 0``: write ``x = torch.where(mask, 0, x)``.
# - ``x.unique()``, to count: ``(x.flatten().sort().values.diff() != 0).sum() + 1``.
# - If the result has to differ in size, return ``x`` and ``mask`` and cut afterwards:
#   ``[x[mask] for x, mask in zip(*vmap(f)(xs))]``.
#
# ``inplace arithmetic(self, *extra_args) is not possible``
# ---------------------------------------------------------
#
# Or, for ``+=``, "output with shape [6] doesn't match the broadcast shape [4, 6]": the
# tensor was made without ``x``, so there is only one, and four members write into it.


def moving_average(x):  # refused
    mean = torch.zeros(6, **float64)
    for row in x:
        mean += 0.1 * (row - mean)
    return mean


def moving_average_new(x):  # what to write
    mean = x.new_zeros(6)  # made from x, so every member has its own
    for row in x:
        mean += 0.1 * (row - mean)
    return mean


print(says(moving_average, xs))
check(vmap(moving_average_new)(xs), [moving_average(x) for x in xs])

# %%
# A tensor from outside, such as a counter or a buffer: pass it as an argument with a
# row for each member, or return the new value.
#
# ``called random operation while in randomness error mode``
# ----------------------------------------------------------
#
# Say whose the random numbers are: ``"different"`` draws for each member, ``"same"``
# once for all. To repeat the numbers of a loop, draw outside:


def noisy(x):  # refused without randomness=
    return x + torch.randn_like(x)


print(says(noisy, xs))
drawn = vmap(noisy, randomness="different")(xs) - xs  # what to write
print(f"{num_models} members: {len(drawn.unique(dim=0))} draws")

torch.manual_seed(1)
loop = [noisy(x) for x in xs]
torch.manual_seed(1)  # what to write to repeat the loop
noise = torch.stack([torch.randn_like(x) for x in xs])
check(vmap(torch.add)(xs, noise), loop)

# %%
# "Cannot ask for different inplace randomness on an unbatched tensor" comes from
# ``torch.distributions.Normal(x, 1).rsample()``, even with ``"different"``: write
# ``x + torch.randn_like(x)`` (tested).
#
# ``Batch norm got a batched tensor as input``
# --------------------------------------------
#
# One module for all has one running mean. In an ensemble every member has its own:
# stack the buffers (``plot_state.py``), and nothing is refused. If the members are
# samples, give the running statistics up:

bn = nn.BatchNorm1d(6, **float64)  # refused
bn_without = nn.BatchNorm1d(6, track_running_stats=False, **float64)  # what to write

print(says(bn, xs))
check(vmap(bn_without)(xs), [bn(x) for x in xs])

# %%
# With stacked buffers ``momentum=None`` alone is refused, since it reads the number of
# minibatches by ``.item()``. All members have seen equally many, so say it before each
# call: ``skeleton.norm.momentum = 1 / step`` (tested).
#
# ``Batching rule not implemented``: LSTM, GRU and ``out=``
# ---------------------------------------------------------
#
# Leave ``out=`` out. Write an LSTM out: here the shortest form, one layer and one
# sequence; ``plot_what_vmap_runs.py`` has layers, minibatches and the GRU.

lstms = [nn.LSTM(6, 5, **float64) for _ in range(num_models)]
params, _ = stack_module_state(lstms)


def module_call(params, x):  # refused
    return functional_call(lstms[0], params, (x,))[0]


def lstm(params, x):  # what to write; x: [8, 6], eight time steps
    w_x, w_h, b_x, b_h = params.values()
    h = c = x.new_zeros(w_h.shape[1])
    outputs = []
    for from_x in x @ w_x.T + b_x:
        i, f, g, o = (from_x + w_h @ h + b_h).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs)


print(says(module_call, params, xs))
check(vmap(lstm)(params, xs), [m(x)[0] for m, x in zip(lstms, xs, strict=True)])

# %%
# ``You are attempting to call Tensor.requires_grad_()``
# ------------------------------------------------------
#
# Or "backward() called inside a functorch transform". Gradients inside of ``vmap`` are
# functions:

ws = torch.randn(num_models, 6, **float64)


def loss(w, x):
    return (x @ w).square().mean()


def gradient(w, x):  # refused
    w = w.clone().requires_grad_()
    loss(w, x).backward()
    return w.grad


print(says(gradient, ws, xs))
loop = [gradient(w, x) for w, x in zip(ws, xs, strict=True)]
check(vmap(grad(loss))(ws, xs), loop)  # what to write

# %%
# Or leave autograd outside: ``vmap(loss)(ws, xs).sum().backward()``, as in
# ``plot_training.py``.
#
# ``it must override the setup_context staticmethod``
# ---------------------------------------------------
#
# In the new form of an ``autograd.Function``, ``forward`` has no ``ctx``,
# ``setup_context`` saves, and a line asks for the rule:


class OldSign(torch.autograd.Function):  # refused
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0].abs() < 1)


class Sign(torch.autograd.Function):  # what to write
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0].abs() < 1)


# %%
# The gradients of both:

print(says(OldSign.apply, xs))
leaf = xs.clone().requires_grad_()
loop = [torch.autograd.grad((OldSign.apply(x) * x).sum(), x)[0] for x in leaf.unbind()]
check(vmap(grad(lambda x: (Sign.apply(x) * x).sum()))(xs), loop)

# %%
# Without ``generate_vmap_rule`` the message is "it does not have vmap support".
#
# ``must only return Tensors``
# ----------------------------
#
# Stacking needs tensors. For what is one for all, say ``None`` in ``out_dims``:


def named(x):  # refused without out_dims=
    return x.sum(), "loss"


sums, name = vmap(named, out_dims=(0, None))(xs)  # what to write
print(says(named, xs))
check(sums, [named(x)[0] for x in xs])

# %%
# ``There is a performance drop``: slow, not refused
# --------------------------------------------------
#
# Where ``vmap`` has no rule but can loop, it runs the operator once for each member.
# Catch the warning, it names the operator:

labels = torch.arange(num_models * 8, device=device).reshape(num_models, 8) ** 2 % 5


def count(y):  # slow
    return torch.bincount(y, minlength=5)


def count_one_hot(y):  # what to write
    return F.one_hot(y, 5).sum(0)


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    vmap(count)(labels)
texts = [str(w.message).split(". ")[0] for w in caught] or ["no warning here"]
print(textwrap.fill("\n".join(texts), 88))
check(vmap(count_one_hot)(labels), [count(y) for y in labels])

# %%
# ``nn.GRUCell`` warns too, and attention on a CPU (``plot_what_vmap_runs.py``). In your
# tests, make the warning an error:
#
# .. code-block:: python
#
#    warnings.filterwarnings("error", message="There is a performance drop")
#
# The mistake: append, count or draw for each member
# --------------------------------------------------
#
# All that Python does happens once, and nothing complains: a number drawn by Python or
# NumPy is *one* for all members, an appended tensor also, and of no use after the call:

kept = []


def member(x):
    kept.append(x.sum())
    return torch.tensor(random.random())


drawn = vmap(member)(xs)
print(f"{num_models} members: {len(kept)} append, {len(drawn.unique())} number drawn")
try:
    kept[0] + 1
except RuntimeError as error:
    print(textwrap.fill(str(error), 88))

# %%
# Counters and hooks run once as well (tested). Return what you want to keep, and draw
# with ``torch``:


def member_returns(x):  # what to write
    return torch.rand((), **float64), x.sum()


drawn, sums = vmap(member_returns, randomness="different")(xs)
print(f"{num_models} members: {len(drawn.unique())} numbers drawn")
check(sums, [x.sum() for x in xs])

# %%
# Activation checkpoints keep tensors as well: write ``checkpoint(vmap(f), xs)``, not
# ``vmap`` around ``checkpoint`` (tested).
#
# Remember
# --------
#
# **Your function runs once, on all members.** What needs the value of one member
# becomes a tensor operation: ``torch.where`` for ``if`` and masks, ``grad`` for
# ``backward``. Compare with the loop in float64: what happens only once has no message.
#
# Next
# ----
#
# - ``plot_state.py``: batch norm, dropout and tied weights of an ensemble.
# - ``plot_what_vmap_runs.py``: which operators run, and what is looped over.
# - ``plot_recipes.py``: what one does with an ensemble, in a few lines each.
#
# References
# ----------
#
# - PyTorch on the `limitations
#   <https://docs.pytorch.org/docs/stable/func.ux_limitations.html>`_ of ``vmap``.
# - Asked before: control flow, `functorch#257
#   <https://github.com/pytorch/functorch/issues/257>`_; ``.item()`` in ensembles,
#   `functorch#1108 <https://github.com/pytorch/functorch/issues/1108>`_; LSTM,
#   `pytorch#105982 <https://github.com/pytorch/pytorch/issues/105982>`_.
