"""
Errors of vmap and what to write instead
========================================

Find the error message of ``torch.func.vmap`` that stopped you, and the lines that
compute the same and are accepted.

**In short.** ``vmap`` runs your function once, on tensors that stand for all members
(models or samples), so it refuses what needs the value of one (``if``, ``.item()``,
NumPy, shapes that depend on values); most have a form in tensor operations that equals
the loop. Side effects (``append``, ``random.random()``) are not refused, but happen
once for all.

Before you start: ``plot_ensembling.py`` says what ``vmap`` does.
"""

# %%
# Set-up
# ------

import random
import textwrap
import warnings

import torch
from torch import nn
from torch.autograd import Function
from torch.func import functional_call, grad, stack_module_state, vmap

torch.manual_seed(0)
double = {"device": "cpu", "dtype": torch.float64}
num_models = 4
xs = torch.randn(num_models, 8, 6, **double)  # a [8, 6] for each
print(f"CPU, torch {torch.__version__}, float64")

# %%
# Two helpers of the cases below:


def says(function, *inputs):
    """First sentence of what vmap says about a function."""
    try:
        vmap(function)(*inputs)
    except (RuntimeError, ValueError, UserWarning) as error:
        sentence = str(error).split(". ")[0].split("\n")[0].removeprefix("vmap: ")
        return textwrap.fill(sentence, 88)
    return "accepted here"


def check(one_call, loop):
    far = (one_call - torch.stack(loop)).abs().max().item()
    assert far < 1e-10, f"vmap does not compute what the loop computes: {far:.1e} away"
    print(f"What to write equals the loop; largest difference {far:.0e}.")


# %%
# What you see, what to write, and why
# ------------------------------------
#
# About the inputs:
#
# - ``Got in_dim=0 for an input``, ``Got in_dim=0 for some input``, ``same size in the
#   mapped dimension``: an argument that all members share has no row for each. Say
#   ``None`` for it in ``in_dims``.
# - ``in_dims is not compatible with the structure``: say ``in_dims`` for each argument,
#   as ``(0, None)``, and in a dictionary for each key, or one number for all of it.
#
# About the function:
#
# - ``data-dependent control flow``: an ``if`` would go one way for all members. Write
#   ``torch.where(test, a, b)``.
# - ``calling .item() on a Tensor``: a Python number would be the same for all members.
#   Go on with the tensor.
# - ``Cannot access data pointer of Tensor``, ``unexpected keyword argument 'axis'``:
#   NumPy sees no members. Call it before or after, or write ``x.sum()`` for
#   ``np.sum(x)``.
# - ``can support dynamic shape``, ``can output dynamic shape``, ``return a differently
#   shaped Tensor``: a mask, or an operator such as ``aten::nonzero``, would give each
#   member another shape. Write ``torch.where(mask, x, fill)``.
# - ``is not possible because there exists a Tensor``, ``doesn't match the broadcast
#   shape``: the results of all members go into a tensor that exists once. Make it from
#   an input that has a row for each: ``x.new_zeros(...)``.
# - ``randomness error mode``: say ``randomness="different"``, or ``"same"``.
# - ``Cannot ask for different inplace randomness``: from ``torch.distributions`` and
#   ``nn.init``. Write ``loc + scale * torch.randn_like(loc)``; build modules outside.
# - ``Batch norm got a batched tensor``: one module has one running mean. Stack the
#   buffers, or call ``eval()``.
# - ``Batching rule not implemented``: an LSTM, a GRU, ``torch.equal``, ``out=``. Write
#   it in other operations.
# - ``attempting to call Tensor.requires_grad_()``, ``backward() called inside``, ``does
#   not require grad and does not have``: gradients are functions here. Write
#   ``vmap(grad(loss))``.
# - ``override the setup_context staticmethod``, ``does not have vmap support``: an
#   ``autograd.Function`` of the old form, or ``checkpoint``.
# - ``don't yet support saved tensor hooks``: ``checkpoint``. Put it around ``vmap``.
# - ``your tensor may have escaped``: a tensor kept in a list (return it instead), or
#   ``checkpoint``.
# - ``must only return Tensors``: a ``str`` is no tensor. Say ``out_dims=(0, None)``.
# - ``There is a performance drop``: not refused, but slow.
#
# About the models:
#
# - ``stack expects each tensor to be equal size``, ``Expected all models to be of the
#   same class``: one call for each architecture (``plot_recipes.py``). The first also
#   comes from ``argwhere``, and ``bincount`` without ``minlength``, in a function.
# - ``the same training/eval mode``: call ``eval()``, or ``train()``, on all of them.
# - ``t() expects a tensor with <= 2 dimensions``, ``expected stride to be a single
#   integer``: a model got the stacked parameters outside of ``vmap``, or with ``None``
#   in ``in_dims``.
#
# How to read the cases
# ---------------------
#
# The cases that need more print what ``vmap`` says, and compare what to write with the
# loop. With the set-up and the cell after it, each runs alone. "accepted here" means
# that your PyTorch is newer.
#
# ``Got in_dim=0 for an input``
# -----------------------------
#
# A number, a module or a minibatch that all members share:

shared = torch.randn(8, 6, **double)


def update(x, minibatch, rate):  # refused without in_dims=
    return x - rate * minibatch


print(says(update, xs, shared, 0.1))
print(says(torch.add, xs, shared))
one_call = vmap(update, in_dims=(0, None, None))(xs, shared, 0.1)  # what to write
check(one_call, [update(x, shared, 0.1) for x in xs])

# %%
# ``data-dependent control flow``
# -------------------------------
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
# ``x = torch.where(running, f(x), x)`` in it.
#
# ``torch.where`` computes *both* sides. In training, the side that is not taken must be
# finite, or the gradient is ``nan``:
# ``torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0)``.
#
# ``calling .item() on a Tensor``
# -------------------------------
#
# What is to differ from member to member must stay a tensor:


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
# A tensor that all members share (``in_dims=None``) may use ``.item()``.
#
# ``Cannot access data pointer of Tensor``
# ----------------------------------------
#
# That is NumPy, or ``.tolist()``. Call NumPy before or after, on all members:


def reverse(x):  # refused
    return torch.from_numpy(x.numpy()[::-1].copy())


print(says(reverse, xs))
check(vmap(lambda x: x.flip(0))(xs), [reverse(x) for x in xs])  # what to write

# %%
# ``dynamic shape``
# -----------------
#
# From a mask, ``nonzero``, ``unique`` and ``torch.where`` with one argument. Keep the
# shape, and give what is not wanted a value without effect:


def mean_of_positive(x):  # refused
    return x[x > 0].mean()


def mean_of_positive_where(x):  # what to write
    return torch.where(x > 0, x, torch.nan).nanmean()


print(says(mean_of_positive, xs))
check(vmap(mean_of_positive_where)(xs), [mean_of_positive(x) for x in xs])

# %%
# - ``x[mask] = 0``: write ``x = torch.where(mask, 0, x)``.
# - If the result has to differ in size, return ``x`` and ``mask`` and cut afterwards:
#   ``[x[mask] for x, mask in zip(*vmap(f)(xs))]``.
#
# ``inplace arithmetic is not possible``
# --------------------------------------
#
# The tensor was made without ``x``, so there is only one, and four members write into
# it.


def row_sums(x):  # refused
    total = torch.zeros(8, **double)
    for i, row in enumerate(x):
        total[i] = row.sum()
    return total


def row_sums_new(x):  # what to write
    total = x.new_zeros(8)  # made from x, so every member has its own
    for i, row in enumerate(x):
        total[i] = row.sum()
    return total


print(says(row_sums, xs))
check(vmap(row_sums_new)(xs), [row_sums(x) for x in xs])

# %%
# So do ``index_add_``, ``scatter_`` and ``fill_``. A tensor from outside, such as a
# counter or a buffer: pass it as an argument with a row for each member, or return the
# new value.
#
# ``randomness error mode``
# -------------------------
#
# From ``nn.Dropout``, too. ``randomness="different"`` draws for each member, ``"same"``
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
# ``Batch norm got a batched tensor``
# -----------------------------------
#
# One module for all members has one running mean, and ``bn.eval()`` is accepted. To
# train, give each member its own (``plot_state.py``):

norms = [nn.BatchNorm1d(6, **double) for _ in xs]
params, buffers = stack_module_state(norms)
skeleton = nn.BatchNorm1d(6, device="meta")


def norm_call(params, buffers, x):
    return functional_call(skeleton, (params, buffers), (x,), strict=True)


print(says(nn.BatchNorm1d(6, **double), xs))  # refused
one_call = vmap(norm_call)(params, buffers, xs)  # what to write
check(one_call, [norm(x) for norm, x in zip(norms, xs, strict=True)])
check(buffers["running_mean"], [norm.running_mean for norm in norms])

# %%
# ``momentum=None`` reads its count of minibatches by ``.item()``: set
# ``skeleton.momentum = 1 / step`` before each call instead (tested). If the members are
# samples and not models, ``track_running_stats=False`` keeps no mean at all.
#
# ``Batching rule not implemented``
# ---------------------------------
#
# Leave ``out=`` out. Write an LSTM out: here one layer and one sequence;
# ``plot_recurrent.py`` has layers, minibatches and the GRU.

lstms = [nn.LSTM(6, 5, **double) for _ in xs]
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
# ``attempting to call Tensor.requires_grad_()``
# ----------------------------------------------
#
# Gradients inside of ``vmap`` are functions:

ws = torch.randn(num_models, 6, **double)


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
# Or leave autograd outside: ``vmap(loss)(ws, xs).sum().backward()``.
#
# ``override the setup_context staticmethod``
# -------------------------------------------
#
# In the new form of an ``autograd.Function``, ``forward`` has no ``ctx``,
# ``setup_context`` saves, and ``generate_vmap_rule`` asks for a rule:


class OldSign(Function):  # refused
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0].abs() < 1)


class Sign(Function):  # what to write
    generate_vmap_rule = True
    backward = OldSign.backward  # stays as it was

    @staticmethod
    def forward(x):
        return x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


print(says(OldSign.apply, xs))
leaf = xs.clone().requires_grad_()
loop = [torch.autograd.grad((OldSign.apply(x) * x).sum(), x)[0] for x in leaf.unbind()]
check(vmap(grad(lambda x: (Sign.apply(x) * x).sum()))(xs), loop)

# %%
# Without ``generate_vmap_rule`` the message is "it does not have vmap support".
#
# ``checkpoint`` inside of ``vmap`` fails at once with ``use_reentrant=True``, and with
# ``False`` at the latest in the backward pass. Put it around ``vmap``, and call
# ``backward()``: ``checkpoint(vmap(f), xs, use_reentrant=False)``.
#
# ``must only return Tensors``
# ----------------------------
#
# For what is one for all, say ``None`` in ``out_dims``:


def named(x):  # refused without out_dims=
    return x.sum(), "loss"


sums, name = vmap(named, out_dims=(0, None))(xs)  # what to write
print(says(named, xs))
check(sums, [named(x)[0] for x in xs])

# %%
# ``There is a performance drop``: slow
# -------------------------------------
#
# Where ``vmap`` has no rule but can loop, it runs the operator once for each member and
# warns. In your tests, make this an error, which names the operator:

labels = torch.arange(num_models * 8).reshape(num_models, 8) ** 2 % 5


def count(y):  # slow
    return torch.bincount(y, minlength=5)


def count_one_hot(y):  # what to write
    return nn.functional.one_hot(y, 5).sum(0)


with warnings.catch_warnings():
    warnings.filterwarnings("error", message="There is a performance drop")
    print(says(count, labels))
check(vmap(count_one_hot)(labels), [count(y) for y in labels])

# %%
# ``nn.GRUCell`` warns too, and ``F.scaled_dot_product_attention`` on a CPU
# (``plot_what_vmap_runs.py``).
#
# The mistake: append, count or draw
# ----------------------------------
#
# All that Python does happens once, without a message: a number drawn by Python or
# NumPy is *one* for all members, an appended tensor also, and of no use after the call.
# (As silent: four members share four rows, and ``in_dims`` is left out. Each gets one.)

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
# Hooks run once as well. Return what you want to keep, and draw with ``torch``:


def member_returns(x):  # what to write
    return torch.rand((), **double), x.sum()


drawn, sums = vmap(member_returns, randomness="different")(xs)
print(f"{num_models} members: {len(drawn.unique())} numbers drawn")
check(sums, [x.sum() for x in xs])

# %%
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
# - ``plot_silent_mistakes.py``: what goes wrong without a message.
# - ``plot_recurrent.py``: an LSTM or a GRU in full, with layers, state and times.
# - ``plot_from_functorch.py``: older code, and code from JAX.
# - ``plot_state.py``: batch norm, dropout and tied weights of an ensemble.
#
# References
# ----------
#
# - PyTorch on the `limitations
#   <https://docs.pytorch.org/docs/stable/func.ux_limitations.html>`_ of ``vmap``.
# - LSTM: `pytorch#105982 <https://github.com/pytorch/pytorch/issues/105982>`_.
