"""
From functorch or JAX to torch.func
===================================

Move code for ensembles from functorch, or from JAX, to ``torch.func``: line by line,
with the same numbers, and with a list of what changes without an error.

**In short.** ``stack_module_state`` replaces ``combine_state_for_ensemble``,
``functional_call`` replaces ``make_functional_with_buffers``, and the transforms keep
their arguments. Three things change without an error: the mode (train or eval) is that
of the skeleton, the stack requires gradients where the models do, and
``named_parameters()`` of one model is no copy. For code from JAX, see *From JAX, Flax
and Equinox*: names, then random numbers, state and compilation.

Before you start, read ``plot_ensembling.py``: it explains the new functions.
"""

# %%
# Set-up
# ------
#
# Four members of an ensemble, in eval mode. This page is not about rounding, so it
# computes in float64 on the CPU.

import textwrap
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, grad_and_value, stack_module_state, vmap

torch.manual_seed(0)
double = {"device": "cpu", "dtype": torch.float64}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.fc2 = nn.Linear(16, 3)

    def forward(self, x):  # [32, 6]
        return self.fc2(F.relu(self.norm(self.fc1(x))))  # [32, 3]


num_models = 4
models = [Net().to(**double).eval() for _ in range(num_models)]
x = torch.randn(num_models, 32, 6, **double)  # a minibatch for each member
print(f"CPU, torch {torch.__version__}, float64")

# %%
# Move an ensemble, line by line
# ------------------------------
#
# Each old line is a comment; the lines to copy stand below it. The new ``fmodel`` takes
# the arguments of the old one, so calls of it can stay; ``params`` and ``buffers`` are
# dictionaries now.

# old: fmodel, params, buffers = combine_state_for_ensemble(models)
params, buffers = stack_module_state(models)  # "fc1.weight": [4, 16, 6], ...
with torch.device("meta"):
    skeleton = Net()  # code without memory
for layer, old in zip(skeleton.modules(), models[0].modules(), strict=True):
    layer.training = old.training  # the old fmodel took the mode of each layer


def fmodel(params, buffers, *inputs, **options):
    return functional_call(skeleton, (params, buffers), inputs, options, strict=True)


# old: logits = functorch.vmap(fmodel)(params, buffers, x)
logits = vmap(fmodel)(params, buffers, x)  # in_dims=(0, 0, None) for a shared x

print(list(logits.shape), "from", *params)

# %%
# Does the old code still run?
# ----------------------------
#
# It has been deprecated since PyTorch 2.0, and announces that it will go. So we import
# it only where it runs, keep its warnings to show them, and go on without it where
# ``torch`` has dropped it:


def run_old(function, *args):
    """What old code returns, and its warnings; None where torch has dropped it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return function(*args), [str(warning.message) for warning in caught]
        except ImportError as error:
            print(f"torch {torch.__version__} no longer runs this: {error}")
            return None, []


def old_ensemble(models, x):
    from functorch import combine_state_for_ensemble
    from functorch import vmap as old_vmap

    fmodel, params, buffers = combine_state_for_ensemble(models)
    return old_vmap(fmodel)(params, buffers, x)


old_logits, messages = run_old(old_ensemble, models, x)
for message in messages:  # the second sentence says what is new
    print(textwrap.fill(message.split(". ")[1], 88))

# %%
# Old and new against the loop over the models. Keep this check while you move code:

loop = torch.stack([model(rows) for model, rows in zip(models, x, strict=True)])
for way, found in {"torch.func": logits, "functorch": old_logits}.items():
    if found is not None:
        far = (found - loop).abs().max()
        assert far < 1e-10, f"{way} does not compute what the loop computes: {far:.1e}"
        print(f"{way:10} equals the loop within {far:.0e}")

# %%
# Replace make_functional and grad
# --------------------------------
#
# For one model there is nothing to stack: ``functional_call`` runs the model itself,
# with the tensors that you pass. (``make_functional`` is the same without buffers. The
# ``True`` in the old line is ``disable_autograd_tracking``. If yours did not pass it,
# append ``.requires_grad_(p.requires_grad)`` to ``clone()``.)

model = models[0]
y = torch.arange(32) % 3  # a class for each row

# old: fmodel, params, buffers = make_functional_with_buffers(model, True)
params = {name: p.detach().clone() for name, p in model.named_parameters()}
buffers = {name: b.clone() for name, b in model.named_buffers()}


def loss(params, buffers, x, y):
    # old: logits = fmodel(params, buffers, x)
    logits = functional_call(model, (params, buffers), (x,), strict=True)
    return F.cross_entropy(logits, y)


# old: gradients = functorch.grad(loss)(params, buffers, x[0], y)
gradients = grad(loss)(params, buffers, x[0], y)  # "fc1.weight": [16, 6], ...

# %%
# The old lines return a tuple, in the order of ``named_parameters``. Both have to be
# what ``torch.autograd`` computes for the model:


def old_gradients(model, x, y):
    from functorch import grad as old_grad
    from functorch import make_functional_with_buffers

    fmodel, params, buffers = make_functional_with_buffers(model)
    return old_grad(lambda p: F.cross_entropy(fmodel(p, buffers, x), y))(params)


old_tuple, _ = run_old(old_gradients, model, x[0], y)
ways = {"torch.func": gradients}
if old_tuple is not None:
    ways["functorch"] = dict(zip(gradients, old_tuple, strict=True))

total = F.cross_entropy(model(x[0]), y)
expected = torch.autograd.grad(total, list(model.parameters()))
for way, found in ways.items():
    pairs = zip(params, expected, strict=True)
    far = torch.stack([(found[k] - g).abs().max() for k, g in pairs]).max()
    assert far < 1e-10, f"{way} computes other gradients than autograd: {far:.1e}"
    print(f"{way:10} equals autograd within {far:.0e}")

# %%
# **The other transforms stay**: ``vjp``, ``jvp``, ``jacrev``, ``jacfwd``, ``hessian``
# and ``functionalize`` are in ``torch.func`` with the same arguments (tested). In place
# of ``functorch.compile`` use ``torch.compile``, and of
# ``torch.nn.utils.stateless.functional_call`` the one of ``torch.func``. A functional
# optimizer, also with a rate for each member, is ``adam_step`` of
# ``plot_hyperparameter_sweep.py``. ``torch.func`` comes with torch; you can uninstall
# ``functorch``.
#
# What changes without an error
# -----------------------------
#
# The skeleton's mode, a tensor that the stack lacks, and a tuple as argument can make
# predictions wrong. Here the models are in eval mode and the skeleton is not.

skeleton.train()  # as it is built
wrong = vmap(fmodel)(*stack_module_state(models), x)
skeleton.eval()
print(f"skeleton in train mode: off by {(wrong - logits).abs().max():.1f}, no error")

# %%
# - **Mode.** The old function kept the mode that the model had when it was made;
#   ``functional_call`` uses the mode at the call. **A skeleton built on** ``meta``
#   **starts in train mode**, even if your models are in eval mode.
# - **A tensor that the stack lacks.** The old ``fmodel`` failed. ``functional_call``
#   uses the one of the skeleton, which on ``meta`` has no values: the result may be
#   whatever stands in memory. **With** ``strict=True`` **it fails.** This happens with
#   tied weights if you copy a model to ``meta``, as PyTorch's guide does: the copy
#   loses the tie. A skeleton built there keeps it (``plot_state.py``).
# - **Gradients.** ``combine_state_for_ensemble`` detached the stack, and training began
#   with ``requires_grad_()``. ``stack_module_state`` keeps what the models have, so a
#   prediction without ``torch.no_grad()`` now records a graph, which costs memory.
# - **Copies.** ``make_functional`` copied the model; ``named_parameters()``, which
#   PyTorch's guide uses, does not. An update in place reaches the model, and in train
#   mode so do running statistics, unless you call ``clone()`` as above. A stack is
#   still a copy.
# - **An argument that is a tuple.** ``functional_call(model, params, pair)`` takes it
#   for two arguments. Write ``(pair,)``.
#
# All of these are tested.
#
# An old checkpoint with a tuple of parameters gets its names from
# ``dict(zip(params, old_params, strict=True))``, if the class is unchanged.
#
# From JAX, Flax and Equinox
# --------------------------
#
# .. code-block:: none
#
#     JAX                                  PyTorch
#     jax.vmap(f, in_axes=(0, None))       vmap(f, in_dims=(0, None))
#     jax.vmap(f, out_axes=1)              vmap(f, out_dims=1)
#     jax.lax.map(f, x, batch_size=8)      vmap(f, chunk_size=8)(x)
#     jax.grad, vjp, jvp, jacrev, jacfwd   torch.func: the same names
#     jax.value_and_grad: value first      grad_and_value: gradients first
#     jax.lax.stop_gradient(x)             x.detach()
#     jax.vmap(jax.checkpoint(f))(x)       checkpoint(vmap(f), x, use_reentrant=False)
#     jax.lax.cond(test, f, g, x)          torch.where(test, f(x), g(x))
#     jax.lax.scan(f, carry, xs)           for x in xs: carry, y = f(carry, x)
#     jax.jit(f)                           torch.compile(f)
#     jax.random.split(key, n)             vmap(f, randomness="different")
#     jax.tree.map(f, params)              {k: f(p) for k, p in params.items()}
#     optax.adam(1e-3)                     torch.optim.Adam(params.values(), lr=1e-3)
#     optax.clip_by_global_norm(1.0)       clip_each(params.values(), 1.0): see below
#
#     Flax, Equinox
#     module.apply(variables, x)           functional_call(skeleton, state, (x,))
#     variables: params, batch_stats       state = (params, buffers)
#     nnx.split(model)                     skeleton, (params, buffers)
#     eqx.partition(model, eqx.is_array)   (params, buffers), skeleton
#     eqx.filter_vmap(make)(keys)          stack_module_state([make(s) for s in seeds])
#     in_axes=eqx.if_array(0)              in_dims=0
#     in_axes of a pytree                  in_dims=({"fc1.weight": 0, ...}, 0, None)
#
# ``make(s)`` calls ``torch.manual_seed(s)`` and returns ``Net()``. ``clip_each`` stands
# in ``plot_recipes.py``. One pair of results changes places:

value_last = grad_and_value(loss)(params, buffers, x[0], y)
print("grad_and_value returns", [type(part).__name__ for part in value_last])

# %%
# Three more differences fit in no table. (This page runs no JAX; what it says was tried
# with JAX 0.10, Optax 0.2, Flax 0.12 and Equinox 0.13.)
#
# From JAX: random numbers have no keys
# -------------------------------------
#
# In JAX, a member's random numbers follow from its key, whoever else is in the call. In
# PyTorch all members draw from one generator, and ``vmap`` refuses until you choose:


def noise(row):
    return torch.rand_like(row)


rows = torch.zeros(num_models, 16, **double)
try:
    vmap(noise)(rows)
except RuntimeError as error:
    print(textwrap.fill(str(error), 88))

for members in [[0, 1, 2, 3], [2]]:
    torch.manual_seed(0)
    drawn = vmap(noise, randomness="different")(rows[members])
    numbers = drawn[members.index(2), :3].tolist()
    print("member 2 of", members, "draws", *(f"{number:.2f}" for number in numbers))

# %%
# **With the same seed, a member alone may draw other numbers than among others.** Where
# they must be the same, draw outside, with a ``torch.Generator`` for each member, and
# pass the numbers as an input: ``plot_state.py`` does so for dropout.
#
# From JAX: state changes in place
# --------------------------------
#
# In JAX arrays do not change, and Flax Linen refuses to update running statistics
# unless you ask for the new ones by ``mutable``. In PyTorch, a call in train mode
# writes into the buffers that you pass, under ``vmap`` too, and returns only logits:

params, buffers = stack_module_state(models)
before = {name: b.clone() for name, b in buffers.items()}
skeleton.train()
vmap(fmodel)(params, buffers, x)
skeleton.eval()

changed = [name for name, b in buffers.items() if not torch.equal(b, before[name])]
print("changed by the call:", *changed)

# %%
# **To try a step and take it back, pass clones.** (Flax NNX updates in place as PyTorch
# does; Linen and Equinox return the new state.) The opposite happens as well: what a
# module *assigns* (``self.mean = new``) is lost after ``vmap``, so write ``copy_``.
#
# From JAX: what cannot be compiled is left out
# ---------------------------------------------
#
# ``jax.jit`` makes one program or raises an error. ``torch.compile`` cuts a function
# where it meets what it cannot compile, here an ``if`` on a value, and leaves that to
# Python. A backend of our own, which compiles nothing, counts the pieces:


def count(graph, inputs):
    pieces.append(graph)
    return graph.forward


def checked(params, buffers, x):
    logits = vmap(fmodel)(params, buffers, x)
    if logits.isnan().any():  # an error in jax.jit
        print("some logits are not numbers")
    return logits.softmax(dim=-1)


pieces = []
with torch.no_grad():
    try:
        torch.compile(checked, backend=count, fullgraph=True)(params, buffers, x)
    except RuntimeError as error:
        print("fullgraph=True:", str(error).splitlines()[0])

    torch.compile(checked, backend=count)(params, buffers, x)
print("without it:", len(pieces), "pieces and no message")

# %%
# **With** ``fullgraph=True`` **it refuses, as JAX does.** Without it, run the script
# with ``TORCH_LOGS=graph_breaks`` to see where it cuts, and why. And a tensor that the
# function takes from outside is read at every call (tested), where ``jax.jit`` keeps
# the first one as a constant.
#
# The mistake: a dictionary where the tuple was
# ---------------------------------------------
#
# Old code iterates over ``params``. From a dictionary, that gives the names:

try:
    torch.optim.SGD(params, lr=0.1)
except TypeError as error:
    print(error)

# %%
# Write ``params.values()``, and delete ``[p.requires_grad_() for p in params]``: the
# stack requires gradients where the models do.
#
# Remember
# --------
#
# The transforms have a new address and the same arguments; a model's state is now a
# dictionary. **Set the mode of the skeleton, clone what must not change, and pass**
# ``strict=True``. Before you delete the old code, compare the two in float64.
#
# Next
# ----
#
# - ``plot_training.py`` trains the stack with one optimizer.
# - ``plot_state.py`` says what belongs to a member and what to the skeleton.
# - ``plot_fastest_ensemble.py`` compiles the call.
#
# References
# ----------
#
# - PyTorch's guide, `Migrating from functorch to torch.func
#   <https://docs.pytorch.org/docs/stable/func.migrating.html>`_.
# - Why the stack requires gradients: `pytorch#92278
#   <https://github.com/pytorch/pytorch/pull/92278>`_.
# - `JAX: the sharp bits
#   <https://docs.jax.dev/en/latest/notebooks/Common_Gotchas_in_JAX.html>`_ and
#   `Equinox: tricks <https://docs.kidger.site/equinox/tricks/>`_, ensembles in JAX.
