"""
Errors of vmap and what to write instead
========================================

Find the error message of ``torch.func.vmap`` that stopped you, and the lines that
compute the same and are accepted.

**In short.** ``vmap`` runs your function once, on tensors that stand for all members
(models or samples), so it refuses what needs the value of one (``if``, ``.item()``,
NumPy, shapes that depend on values). Search this page for words of your message: most
refusals have a form in tensor operations that equals the loop.

Before you start: ``plot_ensembling.py`` says what ``vmap`` does. For a wrong result
without a message, see ``plot_silent_mistakes.py``.
"""

# %%
# Set-up
# ------

import textwrap
import warnings

import torch
from torch import nn
from torch.autograd import Function
from torch.func import grad, vmap

torch.manual_seed(0)
double = {"device": "cpu", "dtype": torch.float64}
num_models = 4
xs = torch.randn(num_models, 8, 6, **double)  # an input [8, 6] for each member
ws = torch.randn(num_models, 6, **double)  # weights [6] of each member
print(f"CPU, torch {torch.__version__}, float64")


def compare(refused, accepted, *inputs):
    """Print what vmap says of a function; the other call has to equal a loop of it."""
    try:
        vmap(refused)(*inputs)
        print("accepted here: your PyTorch is newer")
    except (RuntimeError, UserWarning) as error:
        sentence = str(error).split(". ")[0].removeprefix("vmap: ")
        print(textwrap.fill(sentence, 88))
    loop = torch.stack([refused(*rows) for rows in zip(*inputs, strict=True)])
    far = (accepted(*inputs) - loop).abs().max().item()
    assert far < 1e-10, f"vmap does not compute what the loop computes: {far:.1e} away"
    print(f"What to write equals the loop; largest difference {far:.0e}.")


# %%
# What you see, what to write, and why
# ------------------------------------
#
# All messages are tested, and what to write where it is code of a line or more.
#
# **About in_dim, sizes, outputs**
#
# - ``Got in_dim=0 for``, ``same size in the mapped dimension``: an argument that all
#   members share has no row for each. Pass ``None`` for it:
#   ``vmap(f, in_dims=(0, None))(params, x)``.
# - ``in_dims is not compatible with the structure``: pass one entry for each argument,
#   as ``(0, None)``. For a dictionary, it is a number or a dictionary of numbers.
# - ``must only return Tensors``: the function returns a ``str``, an ``int``, ``None``
#   or a dataclass. Pass ``out_dims=(0, None)`` if the second output is no tensor. For a
#   dataclass, call ``torch.export.register_dataclass`` once, or return ``vars(out)``. A
#   ``NamedTuple`` is accepted.
# - ``input.size(-2) should match other.size(-2)``: ``lstsq`` takes no vector here.
#   Write ``torch.linalg.lstsq(a, b[..., None]).solution[..., 0]``.
# - ``too many indices for tensor``, ``expected 4D input (got 3D input)``: inside, a
#   tensor lacks the mapped dimension. If you map over samples, give the model a batch
#   of one: ``model(x[None])[0]``.
# - ``NestedTensorImpl doesn't support sizes``: all members share a nested tensor. Pass
#   ``nested.to_padded_tensor(0.0)`` and a mask.
#
# **About a value, a shape, storage**
#
# - ``data-dependent control flow``: an ``if``, in your code or in a library, would go
#   one way for all members. Write ``torch.where(test, a, b)``. To raise an error,
#   return the test and raise outside. For masks of Hugging Face, see
#   ``plot_transformers.py``.
# - ``calling .item() on a Tensor``: a Python number would be the same for all members.
#   Keep the tensor.
# - ``Cannot access data pointer of Tensor``: NumPy, SciPy and ``.tolist()`` see no
#   members. Call them outside, or as ``Reverse`` does below.
# - ``can support dynamic shape``, ``can output dynamic shape``, ``return a differently
#   shaped Tensor``: a mask, or ``aten::nonzero``, would give each member another shape.
#   Write ``torch.where(mask, x, fill)``.
# - ``Cannot access storage of BatchedTensorImpl``: ``torch.while_loop`` is refused.
#   Write a ``for`` over the largest number of steps, as below.
# - ``Expected FakeTensor``: ``grad`` refuses ``torch.cond``. Write ``torch.where``.
#
# **About a write in place**
#
# - ``is not possible because there exists a Tensor``, ``doesn't match the broadcast
#   shape``: ``scatter_add_``, ``index_add_`` or another operation would write the
#   results of all members into a tensor that exists once. Make it from one that has a
#   row for each, ``w.new_zeros(3)``, not from a shared one. Or write
#   ``torch.zeros(3).scatter_add(0, i, x)``, without the underscore.
#
# **About randomness, layers, operators**
#
# - ``randomness error mode``: pass ``randomness="different"``, or ``"same"`` to draw
#   once for all. To draw as a loop does, draw outside and pass the numbers.
# - ``Cannot ask for different inplace randomness``: ``Normal.rsample`` and ``nn.init``
#   draw in place. Write ``loc + scale * torch.randn_like(loc)``, and build modules
#   outside.
# - ``Batch norm got a batched tensor``: one module has one running mean. Stack the
#   buffers (``plot_state.py``), or call ``eval()``.
# - ``Batching rule not implemented``: for ``aten::lstm``, ``aten::lstm_cell``,
#   ``aten::gru`` or ``aten::rnn_tanh``, take a layer from ``plot_recurrent.py``. For
#   ``aten::equal``, write ``(a == b).all()``. Delete ``out=``.
# - ``aten::_nested_tensor_from_mask``, ``Could not run 'aten::stack'``,
#   ``derivative for aten::_transformer_encoder_layer_fwd``: in eval mode,
#   ``nn.TransformerEncoder`` takes a fast path without gradient or rule. Call
#   ``torch.backends.mha.set_fastpath_enabled(False)``.
# - ``expand is unsupported for Sparse``, ``Sparse CSR tensors do not have``: ``A @ x``
#   with a sparse ``A``. Make the members columns, without ``vmap``
#   (``plot_more_recipes.py``):
#   ``(A @ xs.movedim(0, 1).flatten(1)).unflatten(1, (len(xs), -1)).movedim(1, 0)``.
# - ``reshape is not implemented for sparse tensors``: the gradient of an embedding.
#   Delete ``sparse=True``.
# - ``There is a performance drop``: the operator runs once for each member. Call
#   ``F.affine_grid(theta.flatten(0, 1), size)``, which loops, outside.
#
# **About gradients, checkpoint, autograd.Function**
#
# - ``attempting to call Tensor.requires_grad_()``, ``backward() called inside``, ``does
#   not require grad and does not have``: gradients are functions here. Write
#   ``vmap(grad(loss))``, or ``vmap(jacrev(f))`` for a Jacobian.
# - ``override the setup_context staticmethod``: an ``autograd.Function`` has the old
#   form, a model calls ``checkpoint`` with ``use_reentrant=True``, or a module has a
#   full backward hook: return the layer (``plot_more_recipes.py``). If ``grad`` meets a
#   custom operator, put a ``Function`` around it (``plot_custom_operators.py``).
# - ``does not have vmap support``: the ``Function`` needs a rule. Set
#   ``generate_vmap_rule = True`` if it calls only PyTorch, else write a ``vmap``
#   (``plot_custom_operators.py``).
# - ``You must implement the jvp function``: ``hessian`` and ``jacfwd`` meet such a
#   ``Function``. Write ``jacrev(jacrev(f))``.
# - ``don't yet support saved tensor hooks``, ``your tensor may have escaped``: a model
#   calls ``checkpoint``. Turn that off, and call ``.sum().backward()`` on
#   ``checkpoint(vmap(f), xs, use_reentrant=False)``. If a tensor was kept in a list,
#   return it instead.
#
# **About models and their parameters**
#
# - ``stack expects each tensor to be equal size``, ``Expected all models to be of the
#   same class``: make one call for each architecture (``plot_recipes.py``). The first
#   comes also from ``argwhere``, and ``bincount`` without ``minlength``; the second
#   from ``weight_norm``, which gives each layer its own class: stack
#   ``[nn.Sequential(model) for model in models]``.
# - ``the same training/eval mode``: call ``eval()``, or ``train()``, on all models.
# - ``t() expects a tensor with <= 2 dimensions``, ``expected stride to be a single
#   integer``: a model got the stacked parameters outside of ``vmap``, or with ``None``
#   in ``in_dims``.
#
# ``data-dependent control flow``
# -------------------------------
#
# Give each member a positive mean:


def turn(x):  # refused
    if x.mean() < 0:
        x = -x
    return x


def turn_where(x):  # what to write
    return torch.where(x.mean() < 0, -x, x)


compare(turn, vmap(turn_where), xs)

# %%
# - ``assert``, ``and``, ``sorted`` and ``max(a, b)`` are refused too; for the last,
#   write ``torch.maximum``.
# - ``while`` becomes a ``for`` over the largest number of steps, with
#   ``x = torch.where(running, f(x), x)`` in it.
# - ``torch.where`` computes *both* sides. In training, the side that is not taken must
#   have a finite gradient, or the gradient is ``nan``:
#   ``torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0)``.
# - **In a library**: for ``F.gaussian_nll_loss``, write the formula; so for a shared
#   target of ``F.mse_loss`` on an Apple GPU, ``(out - y).square().mean()``
#   (`pytorch#140704 <https://github.com/pytorch/pytorch/issues/140704>`_; not run
#   here). If each member has its own ``mask`` in ``nn.TransformerEncoder``, pass
#   ``is_causal=False``. Call an ODE solver that adapts its steps outside:
#   ``odeint(lambda t, z: vmap(field)(params, z), z0, times)``. All members then share
#   its steps, so results agree to its tolerance.
#
# ``calling .item() on a Tensor``
# -------------------------------
#
# What differs between members must stay a tensor:


def scale(x):  # refused; so is float(x.max())
    return x / x.max().item()


def scale_tensor(x):  # what to write
    return x / x.max()


compare(scale, vmap(scale_tensor), xs)

# %%
# ``.item()`` is also hidden in these:
#
# - ``torch.tensor([a, b])`` of tensors: write ``torch.stack([a, b])``.
# - ``rates[i]``, a list at a tensor ``i``: write ``torch.tensor(rates)[i]``.
# - ``range(n)``: write a ``for`` over the largest ``n``, with ``torch.where``.
# - ``f"{x:.2f}"``: format after the call.
# - Batch norm with ``momentum=None``: set ``skeleton.momentum = 1 / step`` before each
#   call.
#
# A tensor that all share (``in_dims=None``) may use ``.item()``.
#
# ``Cannot access data pointer of Tensor``
# ----------------------------------------
#
# If NumPy, or a kernel of your own, has to stand inside, put it into an
# ``autograd.Function``, whose ``vmap`` gets all members.


def reverse(x):  # refused
    return torch.from_numpy(x.numpy(force=True)[..., ::-1].copy())


class Reverse(Function):  # what to write
    @staticmethod
    def forward(x):
        return reverse(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass  # backward needs no tensor

    @staticmethod
    def backward(ctx, g):
        return g.flip(-1)

    @staticmethod
    def vmap(info, in_dims, x):
        return Reverse.apply(x.movedim(in_dims[0], 0)), 0  # the result, its out_dims


compare(reverse, vmap(Reverse.apply), xs)

# %%
# ``dynamic shape``
# -----------------
#
# Keep the shape, and give what is unwanted a value without effect:


def mean_of_positive(x):  # refused
    return x[x > 0].mean()


def mean_of_positive_where(x):  # what to write
    return torch.where(x > 0, x, torch.nan).nanmean()


compare(mean_of_positive, vmap(mean_of_positive_where), xs)

# %%
# - For ``x[mask] = 0``, write ``x = torch.where(mask, 0, x)``.
# - If the result has to differ in size, return ``x`` and ``mask``, and cut afterwards:
#   ``[x[mask] for x, mask in zip(*vmap(f)(xs))]``.
#
# ``is not possible because there exists a Tensor``
# -------------------------------------------------
#
# All members share ``batch``, so what is made from it exists once, as ``torch.zeros``
# would:

batch = torch.randn(8, 6, **double)


def scores(w):  # refused
    result = batch.new_zeros(8)
    for i, row in enumerate(batch):
        result[i] = row @ w
    return result


def scores_own(w):  # what to write
    result = w.new_zeros(8)  # made from w, so every member has its own
    for i, row in enumerate(batch):
        result[i] = row @ w
    return result


compare(scores, vmap(scores_own), ws)

# %%
# ``torch.zeros_like(w)`` and ``F.pad(batch @ w, (1, 1))`` are accepted, too. Pass a
# cache or a counter as an argument with a row for each member, or return the new value.
#
# ``attempting to call Tensor.requires_grad_()``
# ----------------------------------------------
#
# Gradients inside of ``vmap`` are functions:


def loss(w, x):
    return (x @ w).square().mean()


def gradient(w, x):  # refused
    w = w.clone().requires_grad_()
    loss(w, x).backward()
    return w.grad


compare(gradient, vmap(grad(loss)), ws, xs)  # what to write: vmap(grad(loss))

# %%
# Or leave autograd outside: ``ws.requires_grad_()``, then
# ``vmap(loss)(ws, xs).sum().backward()``.
#
# ``override the setup_context staticmethod``
# -------------------------------------------
#
# In the new form, ``forward`` has no ``ctx``, ``setup_context`` saves, and
# ``generate_vmap_rule`` asks for a rule:


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


compare(OldSign.apply, vmap(Sign.apply), xs)

# %%
# ``There is a performance drop``
# -------------------------------
#
# Where ``vmap`` has no rule but can loop, it warns. In your tests, make this an error,
# which names the operator:

labels = torch.arange(num_models * 8).reshape(num_models, 8) ** 2 % 5


def count(y):  # one after the other
    return torch.bincount(y, minlength=5)


def count_one_hot(y):  # what to write
    return nn.functional.one_hot(y, 5).sum(0)


with warnings.catch_warnings():
    warnings.filterwarnings("error", message="There is a performance drop")
    compare(count, vmap(count_one_hot), labels)

# %%
# - ``nn.EmbeddingBag`` loops: write ``F.embedding(tokens, weight).mean(-2)``.
# - ``nn.GRUCell`` loops (``plot_recurrent.py``), and on a CPU
#   ``F.scaled_dot_product_attention`` (``plot_what_vmap_runs.py``).
# - The filter misses a custom operator, whose warning C++ prints
#   (``plot_custom_operators.py``), and ``index_add``, which has none
#   (``plot_silent_mistakes.py``).
#
# Remember
# --------
#
# **Your function runs once, on all members**, so what needs the value of one becomes a
# tensor operation.
#
# Next
# ----
#
# - ``plot_silent_mistakes.py``: what goes wrong without a message.
# - ``plot_recurrent.py``: LSTM and GRU.
#
# References
# ----------
#
# - PyTorch on the `limitations
#   <https://docs.pytorch.org/docs/stable/func.ux_limitations.html>`_ of ``vmap``.
# - LSTM: `pytorch#105982 <https://github.com/pytorch/pytorch/issues/105982>`_;
#   ``while_loop``: `pytorch#175522
#   <https://github.com/pytorch/pytorch/issues/175522>`_.
