"""
An operator of your own under vmap
==================================

Run a kernel in NumPy, C++ or Triton, a ``torch.autograd.Function`` or a
``torch.library.custom_op`` for all members in one call of ``torch.func.vmap``, and get
the gradient of each member.

**In short.** To run once for all members, an operator needs a rule. Under
``torch.func.grad`` it also needs a ``Function`` with ``setup_context``. You have:

- **A Function that calls only PyTorch**: set ``generate_vmap_rule = True``, and split
  ``forward(ctx, ...)`` into ``forward`` and ``setup_context``.
- **A kernel** in NumPy, C++ or Triton: call it in a ``Function`` with a ``vmap``
  staticmethod (the first lines below).
- **The Function of a library**, as in Mamba: wrap it in two such classes, one for the
  call and one for its gradient.
- **A custom_op, triton_op or TORCH_LIBRARY operator**: call ``register_vmap``, or it
  runs once for each member. For ``grad``, put a ``Function`` around it.
- **A kernel that treats the rows of a batch alike**, such as flash-attn, needs no
  rule: make the members rows of the batch.

Before you start: ``plot_ensembling.py`` says what ``vmap`` does.
``plot_what_vmap_refuses.py`` has the messages.
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
# A kernel: a ``vmap`` staticmethod
# ---------------------------------
#
# The kernel takes any dimensions in front of its own. The rule moves the members to
# dimension 0 and calls the ``Function`` again, so that the kernel runs once for all.
# Put your own ``kernel`` and ``gradients`` in place of those that follow:


def members_first(info, in_dims, *tensors):
    """Views with the members in dimension 0; a shared tensor gets that dimension."""
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
# The kernel of this page computes the recurrence of state-space models, ``y[t] = a[t] *
# y[t - 1] + x[t]``, in NumPy, and notes the shapes that it gets. The same lines work
# with a kernel in C++, and with one in Triton, run by its interpreter on a CPU (both
# tested). None of them ran on a GPU.

seen = []


def kernel(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:  # [..., time]
    seen.append(list(x.shape))
    a, y = a.numpy(force=True), x.numpy(force=True).copy()
    for t in range(1, y.shape[-1]):
        y[..., t] += a[..., t] * y[..., t - 1]
    return torch.from_numpy(y)


def gradients(g, a, y, scan):
    """The one by x is the same recurrence, backwards in time."""
    gx = scan(a.flip(-1).roll(1, -1), g.flip(-1)).flip(-1)
    return gx * F.pad(y[..., :-1], (1, 0)), gx


# %%
# - ``in_dims`` has an entry for each input: the dimension of the members, or ``None``
#   for what all share. ``out_dims`` has the structure of the output, ``(0, 0)`` for
#   two. The entry of a number is ``None``, too: leave it out of ``members_first``.
# - **A kernel that ignores strides**, in Triton or C++, needs ``.contiguous()`` on each
#   tensor first. Without it the kernel may read wrong numbers, as ``members_first``
#   returns views, and no error is raised.
# - **A kernel in** ``backward`` needs a ``Function`` as well, here the same one: under
#   ``grad``, the tensors in ``backward`` have no storage. If it computes gradients
#   only, write a second ``Function``, like ``WrappedGradient`` below.
# - **A kernel that takes one batch dimension**: call
#   ``y = Scan.apply(*[t.flatten(0, 1) for t in members])``, and return
#   ``y.unflatten(0, (info.batch_size, -1)), 0``.
# - **A kernel that takes no batch dimension**: return
#   ``torch.stack([Scan.apply(*rows) for rows in zip(*members)]), 0``. It runs once for
#   each member.
#
# All of this is tested.
#
# Only PyTorch inside: ``generate_vmap_rule``
# -------------------------------------------
#
# This ``Function`` has the straight-through gradient of quantized networks. If
# ``forward`` takes ``ctx``, move its use to ``setup_context``; what it saves must be an
# input or an output:


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
# ``vmap`` runs this ``forward`` and ``backward`` on tensors that stand for all members,
# and refuses in them what it refuses elsewhere, such as NumPy and ``.item()``.
#
# The ``Function`` of a library
# -----------------------------
#
# ``vmap`` and ``grad`` refuse a ``Function`` whose ``forward`` takes ``ctx``, and
# libraries have such classes [1]. ``LibraryScan`` is written like them:


class LibraryScan(Function):
    @staticmethod
    def forward(ctx, a, x):
        y = kernel(a, x)
        ctx.save_for_backward(a, y)
        return y

    @staticmethod
    def backward(ctx, g):
        return gradients(g, *ctx.saved_tensors, kernel)


# %%
# Leave it as it is, and write one ``Function`` for the call, and one for its gradient,
# which runs the forward of the library a second time:


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
# - These lines are for one output, and for inputs that all need a gradient: two inputs
#   here, so ``(0, 0)`` for two gradients. Write options, such as ``causal``, into both
#   calls of ``LibraryScan.apply``.
# - If a module calls the class on tensors only, assign ``module.LibraryScan = Wrapped``
#   (tested); options stay inside of the two classes.
# - If its kernel takes one batch dimension, change both rules as above (tested).
#
# ``torch.library.custom_op``: ``register_vmap``
# ----------------------------------------------
#
# A ``custom_op`` takes the same rule, and so does a ``torch.library.triton_op``. For an
# operator that C++ or a library defines, give its name:
# ``torch.library.register_vmap("mine::scan", rule)`` (both tested).

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
# refuses it with a message about a ``Function`` that you did not write: ``In order to
# use an autograd.Function with functorch transforms ... it must override the
# setup_context staticmethod`` [2]. Put a ``Function`` around the operator:


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
# Compare five members with a loop in plain PyTorch. The members of ``a`` are in
# dimension 0, those of ``x`` in dimension 1.

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
# "Backward outside" is ``vmap(loss)(a, x).sum().backward()``.


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
print("How often the kernel ran, forward and backward, and how far from the loop")
print(f"{'':32}{'vmap':13}{'vmap(grad)':13}backward outside")
for name, form in forms.items():
    print(f"{name:32}" + "".join(f"{cell:13}" for cell in try_out(*form)).rstrip())

# %%
# **Only a Function with setup_context and a rule works in all columns.** With a rule,
# the kernel runs once for all members, forward and backward. The wrapped class runs it
# once more, for its second forward. (Calls and refusals are tested.)
#
# A loop without a Python warning
# -------------------------------
#
# Without a rule, ``vmap`` runs a ``custom_op`` once for each member. Its warning is
# printed by C++, which ``warnings.filterwarnings("error")`` misses, unless a
# ``Function`` calls the operator. ``torch.library.opcheck`` passes, too (all tested).
# Print the shapes in the kernel:

for name, op in {"without a rule": without, "with a rule": scan}.items():
    seen.clear()
    vmap(op, in_dims=(0, 1))(a, x)
    print(f"{name}, the kernel saw {seen}")

# %%
# Mistakes without a message
# --------------------------
#
# The first rule does not move the members, which is right only while they are in
# dimension 0. The second calls the kernel in place of ``Scan.apply``: autograd outside
# of ``vmap`` does not record that call, and raises no error if the loss has another
# path to ``x``.


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
# ``vmap(grad(...))`` of the second is right (tested), so test both orders. Three more
# mistakes have no error:
#
# - ``vmap(grad(...))`` of an operator of C++ without a formula for autograd is zero,
#   with only a ``UserWarning``: ``an autograd kernel was not registered`` (tested).
# - ``torch.func.jvp`` and ``jacfwd`` of a ``custom_op`` with ``register_autograd``
#   return zeros. A ``Function`` without a ``jvp`` staticmethod is refused there, and in
#   ``hessian``: write ``jacrev(jacrev(f))``. (All tested.)
# - ``torch.compile`` with ``grad`` or ``vmap`` inside, in torch 2.11 and 2.13, drops
#   the backward that you wrote and differentiates the forward [3]. ``allow_in_graph``
#   keeps your backward:


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
# A kernel without weights that treats the rows of a batch alike needs no rule. Call it
# outside of ``vmap`` and ``grad``, with the members as more rows, and take gradients
# with ``backward()``. Here it is attention:

qkv = torch.randn(3, 5, 2, 4, 16, 8, **double)  # q, k, v: [members, batch, heads, ...]
rows = [t.flatten(0, 1) for t in qkv]  # each [10, 4, 16, 8]
out = F.scaled_dot_product_attention(*rows).unflatten(0, (5, 2))
loop = torch.stack([F.scaled_dot_product_attention(*qkv[:, i]) for i in range(5)])
print(f"one call for all members, {(out - loop).abs().max():.1g} from a loop")

# %%
# Remember
# --------
#
# **Rule and backward call the Function or operator, never the kernel itself.** Test
# both orders, ``vmap(grad)`` and a backward pass outside of ``vmap``, with members in
# dimension 1 of one input. Count the calls in the kernel.
#
# Next
# ----
#
# - ``plot_recurrent.py``: an LSTM or a GRU, which ``vmap`` refuses.
# - ``plot_silent_mistakes.py``: a loop of PyTorch's own operators without a warning.
#
# References
# ----------
#
# - PyTorch: `Extending torch.func with autograd.Function
#   <https://docs.pytorch.org/docs/stable/notes/extending.func.html>`_, `torch.library
#   <https://docs.pytorch.org/docs/stable/library.html>`_.
# - [1] `mamba#239 <https://github.com/state-spaces/mamba/issues/239>`_,
#   `flash-attention#2071 <https://github.com/Dao-AILab/flash-attention/issues/2071>`_;
#   `mamba2-torch#9 <https://github.com/vasqu/mamba2-torch/pull/9>`_ rewrites them.
# - [2] `pytorch#168393 <https://github.com/pytorch/pytorch/issues/168393>`_.
# - [3] `pytorch#193279 <https://github.com/pytorch/pytorch/issues/193279>`_.
