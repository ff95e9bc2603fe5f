"""
An operator of your own under vmap
==================================

Make a kernel in NumPy, C++ or Triton, a ``torch.autograd.Function`` or a
``torch.library.custom_op`` work for all members in one call of ``torch.func.vmap``, and
give each member its gradient.

**In short.** A ``Function`` that calls only PyTorch needs ``generate_vmap_rule =
True``. A kernel that takes leading dimensions needs a ``vmap`` staticmethod. A
``custom_op`` needs ``register_vmap``, or it runs once for each member; for
``torch.func.grad`` put a ``Function`` around it.

Before you start: ``plot_ensembling.py`` says what ``vmap`` does. If you have a message,
find its words in ``plot_what_vmap_refuses.py``.
"""

# %%
# Set-up
# ------

import warnings

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.func import grad, vmap

torch.manual_seed(0)
double = {"device": "cpu", "dtype": torch.float64}
print(f"CPU, torch {torch.__version__}, float64")

# %%
# Only PyTorch inside: ``generate_vmap_rule``
# -------------------------------------------
#
# A gradient of your own, here a straight-through one. If your ``forward`` has a
# ``ctx``, split it like this:


class Sign(Function):
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
# ``vmap`` runs ``forward`` and ``backward`` on tensors that stand for all members. So
# it refuses in them what it refuses elsewhere, such as NumPy and ``.item()``.
#
# A kernel: a ``vmap`` staticmethod
# ---------------------------------
#
# The kernel here is the recurrence of state-space models, ``y[t] = a[t] * y[t - 1] +
# x[t]``, and notes the shape of what it gets. It is NumPy and stands for yours. The
# same lines work with an operator of C++ (tested); nothing here has run in Triton or on
# a GPU.

seen = []


def kernel(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:  # [..., time]
    seen.append(list(x.shape))
    a, y = a.numpy(force=True), x.numpy(force=True).copy()
    for t in range(1, y.shape[-1]):
        y[..., t] += a[..., t] * y[..., t - 1]
    return torch.from_numpy(y)


def gradients(g, a, y, scan):
    """By a and x. The one by x is the same recurrence, backwards in time."""
    gx = scan(a.flip(-1).roll(1, -1), g.flip(-1)).flip(-1)
    return gx * F.pad(y[..., :-1], (1, 0)), gx


# %%
# The lines to copy are the rule: move the members to dimension 0, and call the
# ``Function`` again.


def members_first(info, in_dims, *tensors):
    """Each tensor with the members in dimension 0, also what all share."""
    return [
        t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(tensors, in_dims, strict=True)
    ]


class Scan(Function):
    @staticmethod
    def forward(a, x):
        return kernel(a, x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, g):
        return gradients(g, *ctx.saved_tensors, Scan.apply)

    @staticmethod
    def vmap(info, in_dims, *tensors):
        members = members_first(info, in_dims, *tensors)
        return Scan.apply(*members), 0  # the result, its out_dims


# %%
# - ``in_dims`` has an entry for each input: the dimension of the members, or ``None``
#   for what all share. ``out_dims`` has the structure of the output, ``(0, 0)`` for
#   two. A number has ``None`` too: leave it out of ``members_first``.
# - **A kernel in** ``backward`` needs a ``Function`` as well, here the same one: under
#   ``grad``, the tensors in ``backward`` have no storage. For a kernel that computes
#   gradients only, see ``WrappedGradient`` below.
# - ``expand`` and ``movedim`` return views. Add ``.contiguous()`` if your kernel needs
#   it.
# - **A kernel that takes one batch dimension**: call
#   ``y = Scan.apply(*[t.flatten(0, 1) for t in members])``, and return
#   ``y.unflatten(0, (info.batch_size, -1)), 0``.
# - **A kernel that takes none**: return
#   ``torch.stack([Scan.apply(*rows) for rows in zip(*members)]), 0``. It runs once for
#   each member.
#
# All of this is tested.
#
# The ``Function`` of a library
# -----------------------------
#
# ``vmap`` and ``grad`` refuse a ``forward`` with ``ctx``, and libraries have such
# classes [1]. You can wrap one without changing it: a ``Function`` for the call, and
# another for its gradient, which runs the forward again.


class LibraryScan(Function):  # stands for the class of a library
    @staticmethod
    def forward(ctx, a, x):
        y = kernel(a, x)
        ctx.save_for_backward(a, y)
        return y

    @staticmethod
    def backward(ctx, g):
        return gradients(g, *ctx.saved_tensors, kernel)


# %%


class Wrapped(Function):
    @staticmethod
    def forward(*inputs):
        return LibraryScan.apply(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return WrappedGradient.apply(g, *ctx.saved_tensors)

    @staticmethod
    def vmap(info, in_dims, *tensors):
        return Wrapped.apply(*members_first(info, in_dims, *tensors)), 0


class WrappedGradient(Function):
    @staticmethod
    def forward(g, *inputs):
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in inputs]
            return torch.autograd.grad(LibraryScan.apply(*inputs), inputs, g)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass  # no second derivative

    @staticmethod
    def vmap(info, in_dims, *tensors):
        return WrappedGradient.apply(*members_first(info, in_dims, *tensors)), (0, 0)


# %%
# - ``(0, 0)`` stands for two gradients, since there are two inputs.
# - Write options, such as ``causal``, into both calls of ``LibraryScan.apply``.
# - Where a module of the library calls the class, assign
#   ``module.LibraryScan = Wrapped``.
# - If its kernel takes one batch dimension, change both rules as said above.
#
# The last two are tested.
#
# ``torch.library.custom_op``: ``register_vmap``
# ----------------------------------------------
#
# The same rule. An operator that C++ or a library defines takes it by name:
# ``torch.library.register_vmap("mine::scan", rule)`` (tested).

scan = torch.library.custom_op("mine::scan", kernel, mutates_args=())
scan.register_fake(lambda a, x: torch.empty_like(x))  # for torch.compile


@scan.register_vmap
def _(info, in_dims, *tensors):
    return scan(*members_first(info, in_dims, *tensors)), 0


def scan_backward(ctx, g):
    return gradients(g, *ctx.saved_tensors, scan)


scan.register_autograd(scan_backward, setup_context=Scan.setup_context)

# %%
# This is enough for ``vmap(loss)(params, x).sum().backward()``. But ``torch.func.grad``
# refuses it, in words about a class that you did not write: ``In order to use an
# autograd.Function with functorch transforms ... it must override the setup_context
# staticmethod`` [2]. Put a ``Function`` around it:


class ScanOp(Function):
    generate_vmap_rule = True  # the operator has a rule
    setup_context = Scan.setup_context

    @staticmethod
    def forward(a, x):
        return scan(a, x)

    @staticmethod
    def backward(ctx, g):
        return gradients(g, *ctx.saved_tensors, ScanOp.apply)


# %%
# Which form works where
# ----------------------
#
# Five members, beside a loop of plain PyTorch with the gradients of autograd. The
# members of ``a`` are in dimension 0, those of ``x`` in dimension 1.

a = torch.rand(5, 8, **double, requires_grad=True)
x = torch.randn(8, 5, **double, requires_grad=True)


def plain_scan(a, x):
    y = [x[0]]
    for t in range(1, len(x)):
        y.append(a[t] * y[-1] + x[t])
    return torch.stack(y)


def plain_sign(a, x):
    ramp = x.clamp(-1, 1)
    return a * (ramp + (x.sign() - ramp).detach())


# %%
# "Backward outside" is ``vmap(loss)(a, x).sum().backward()``. "2 x" says that the
# kernel ran twice, forward and backward together; beside it stands the largest
# difference from the loop.


def try_out(op, plain):
    def loss(a, x):
        return op(a, x).sin().sum()

    loop = torch.stack([plain(*rows) for rows in zip(a, x.T, strict=True)])
    slopes = torch.autograd.grad(loop.sin().sum(), (a, x))
    slope = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, 1), out_dims=(0, 1))
    for call, expected in (
        (lambda: [vmap(op, in_dims=(0, 1))(a, x)], [loop]),
        (lambda: slope(a, x), slopes),
        (lambda: torch.autograd.grad(vmap(loss, (0, 1))(a, x).sum(), (a, x)), slopes),
    ):
        seen.clear()
        try:
            pairs = zip(call(), expected, strict=True)
        except RuntimeError:
            yield "refused"
            continue
        far = torch.stack([(out - one).abs().max() for out, one in pairs]).max().item()
        assert far < 1e-10, "this is not what the loop computes"
        close = f"{far:.0e} off" if far else "equal"
        yield f"{len(seen)} x, {close}" if seen else close


# %%

without = torch.library.custom_op("mine::without", kernel, mutates_args=())
without.register_autograd(scan_backward, setup_context=Scan.setup_context)
forms = {
    "Function, generate_vmap_rule": (lambda a, x: a * Sign.apply(x), plain_sign),
    "Function, vmap staticmethod": (Scan.apply, plain_scan),
    "Function of a library": (LibraryScan.apply, plain_scan),
    "Function of a library, wrapped": (Wrapped.apply, plain_scan),
    "custom_op without a rule": (without, plain_scan),
    "custom_op, register_vmap": (scan, plain_scan),
    "custom_op, Function around it": (ScanOp.apply, plain_scan),
}
print(f"{'':32}{'vmap':13}{'vmap(grad)':13}backward outside")
for name, form in forms.items():
    print(f"{name:32}" + "".join(f"{cell:13}" for cell in try_out(*form)).rstrip())

# %%
# A loop without a Python warning
# -------------------------------
#
# Without a rule, ``vmap`` runs a ``custom_op`` once for each member. C++ prints the
# warning, so ``warnings.filterwarnings("error")`` does not see it, and
# ``torch.library.opcheck`` finds nothing (both tested). Note the shapes in the kernel:

for name, op in {"without a rule": without, "with a rule": scan}.items():
    seen.clear()
    vmap(op, in_dims=(0, 1))(a, x)
    print(f"{name}, the kernel saw {seen}")

# %%
# Mistakes without a message
# --------------------------
#
# The first rule hands on what it gets, which is right while the members are in
# dimension 0. The second calls the kernel in place of ``Scan.apply``. Autograd outside
# of ``vmap`` does not see that call, and says nothing where the loss has another path
# to ``x``.


class HandsOn(Scan):
    @staticmethod
    def vmap(info, in_dims, a, x):
        return Scan.apply(a, x), in_dims[1]


class CallsTheKernel(Scan):
    @staticmethod
    def vmap(info, in_dims, *tensors):
        return kernel(*members_first(info, in_dims, *tensors)), 0


right = vmap(Scan.apply, in_dims=(0, 1))(a, x)
for dim, pair in enumerate([(a, x.T), (a.T, x)]):
    far = (vmap(HandsOn.apply, in_dims=dim)(*pair) - right).abs().max()
    print(f"HandsOn, in_dims={dim}: {far:.1g} away")

slopes = []
for op in Scan.apply, CallsTheKernel.apply:
    losses = vmap(lambda a, x, op=op: (x + op(a, x)).square().sum(), (0, 1))(a, x)
    slopes += torch.autograd.grad(losses.sum(), x)
far, largest = (slopes[1] - slopes[0]).abs().max(), slopes[0].abs().max()
print(f"CallsTheKernel: gradients {far:.1g} away, where {largest:.1g} is the largest")

# %%
# ``vmap(grad(...))`` of the second is right, so test both orders. Three more:
#
# - ``vmap(grad(...))`` of an operator of C++ without a formula for autograd is zero.
#   There is only a ``UserWarning``, ``an autograd kernel was not registered`` (tested).
# - ``torch.func.jvp`` and ``jacfwd`` of a ``custom_op`` with ``register_autograd``
#   return zeros. A ``Function`` without a ``jvp`` staticmethod is refused there, and in
#   ``hessian``: write ``jacrev(jacrev(f))``. (All tested.)
# - ``torch.compile`` with ``grad`` or ``vmap`` inside, in torch 2.11 and 2.13, drops
#   the backward that you wrote and differentiates the forward [3]. ``allow_in_graph``
#   keeps it:


class Allowed(Sign):
    pass


torch.compiler.allow_in_graph(Allowed)
for op in Sign, Allowed:
    slope = vmap(grad(lambda x, op=op: op.apply(x).sum()))
    with warnings.catch_warnings(action="ignore"):  # of torch.compile about itself
        compiled = torch.compile(slope, backend="eager")(x)
    far = (compiled - slope(x)).abs().max()
    print(f"{op.__name__}, compiled: gradients {far:.1g} away from those not compiled")

# %%
# To compile a kernel, take the last form of the table: a ``custom_op`` with
# ``register_fake``, in a ``Function`` that is allowed in the graph (tested).
#
# Members in the batch, without ``vmap``
# --------------------------------------
#
# Outside of ``vmap``, a kernel without weights that treats the rows of a batch alike
# needs no rule. Make the members rows, here for attention, which ``vmap`` runs once for
# each member on a CPU (``plot_transformers.py``):

qkv = torch.randn(3, 5, 2, 4, 16, 8, **double)  # q, k, v: [members, batch, heads, ...]
rows = [t.flatten(0, 1) for t in qkv]  # each [10, 4, 16, 8]
out = F.scaled_dot_product_attention(*rows).unflatten(0, (5, 2))
loop = torch.stack([F.scaled_dot_product_attention(*qkv[:, i]) for i in range(5)])
print(f"one call for all members, {(out - loop).abs().max():.0e} from a loop")

# %%
# Remember
# --------
#
# **Forward and backward each need a rule.** Test both orders, ``vmap(grad)`` and a
# backward pass outside of ``vmap``, with members in dimension 1 of one input. Count the
# calls in the kernel: a loop may give no Python warning.
#
# Next
# ----
#
# - ``plot_recurrent.py``: what to do where an LSTM or a GRU is refused.
# - ``plot_what_vmap_refuses.py``: messages, and what to write.
# - ``plot_silent_mistakes.py``: a loop of PyTorch's own operators without a warning.
#
# References
# ----------
#
# - PyTorch on `torch.func and autograd.Function
#   <https://docs.pytorch.org/docs/stable/notes/extending.func.html>`_, and on `custom
#   operators <https://docs.pytorch.org/docs/stable/library.html>`_.
# - [1] `mamba#239 <https://github.com/state-spaces/mamba/issues/239>`_,
#   `flash-attention#2071 <https://github.com/Dao-AILab/flash-attention/issues/2071>`_.
# - [2] `pytorch#168393 <https://github.com/pytorch/pytorch/issues/168393>`_.
# - [3] `pytorch#193279 <https://github.com/pytorch/pytorch/issues/193279>`_.
