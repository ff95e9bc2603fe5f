"""
Mistakes with vmap that raise no error
======================================

Recognize mistakes that ``torch.func.vmap`` accepts without a message, each beside the
line that is right, and copy a test to start from.

**In short.** ``vmap`` checks sizes, not meaning: what has the right shape is computed.
Write the loop once, and compare one call with it in float64: outputs, gradients, and
parameters after one step of SGD. A loop makes two mistakes as well, so it cannot show
them: members that are one model, and numbers drawn by Python.

What you may see, and where to look:

- Results of a wrong shape, or of the right one with wrong numbers: a keyword argument,
  or a shared batch.
- Gradients are zero and nothing learns: the function closes over a model.
- With SGD, learning is as many times slower as there are models: the mean of the
  losses.
- Predictions differ from those of each model: the mode, or models that changed later.
- One model with large gradients holds back all others: one norm.
- All members agree: they are one model, or Python drew once for all.

For mistakes that stop with a message, see ``plot_what_vmap_refuses.py``.
"""

# %%
# Set-up, and a comparison with the loop
# --------------------------------------

import copy
import random

import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

torch.manual_seed(0)
double = {"device": "cpu", "dtype": torch.float64}
num_models = 4
models = [nn.Linear(4, 3, **double) for _ in range(num_models)]
params, _ = stack_module_state(models)
with torch.device("meta"):
    skeleton = nn.Linear(4, 3)
minibatches = torch.randn(num_models, 8, 4, **double)  # one for each model


def predict(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


def compare(mistake, right, loop):
    """Print how far a mistake is from the loop; what is right has to equal it."""
    loop = torch.stack(list(loop))
    torch.testing.assert_close(right, loop, rtol=0, atol=1e-10)
    if mistake.shape != loop.shape:
        print(f"shape {list(mistake.shape)} where the loop has {list(loop.shape)}")
    else:
        far, largest = (mistake - loop).abs().max(), loop.abs().max()
        print(
            f"shape as in the loop, {far:.2g} away, where {largest:.2g} is the largest"
        )


# %%
# A keyword argument is not mapped
# --------------------------------
#
# ``vmap`` maps arguments by position. A keyword argument goes whole to every model:
# here each model gets the scales of all four, one for each of four features.


def scaled(params, x, scale):
    return predict(params, x * scale)


scales = torch.tensor([0.1, 1.0, 10.0, 100.0], **double)  # one for each model
mistake = vmap(scaled)(params, minibatches, scale=scales)
right = vmap(scaled)(params, minibatches, scales)
loop = (m(x * s) for m, x, s in zip(models, minibatches, scales, strict=True))
compare(mistake, right, loop)

# %%
# A shared batch has as many rows as there are models
# ---------------------------------------------------
#
# Without ``None`` for it, model *i* gets row *i* and no other. With any other number of
# rows this raises an error.

batch = torch.randn(4, 4, **double)  # four samples for all models
mistake = vmap(predict)(params, batch)
right = vmap(predict, in_dims=(0, None))(params, batch)
compare(mistake, right, (m(batch) for m in models))

# %%
# The function uses a model that it closes over
# ---------------------------------------------
#
# ``models[0]`` in the function is not the argument, so all rows are computed by model
# 0. With respect to the argument, ``torch.func.grad`` gives zeros, and ``backward``
# fills the gradients of ``models[0]`` alone: nothing learns.


def loss(params, x):
    return predict(params, x).square().mean()


def closed_over(params, x):
    return models[0](x).square().mean()


mistake = vmap(grad(closed_over))(params, minibatches)["bias"]
print(f"the largest gradient of the mistake: {mistake.abs().max():.0f}")
right = vmap(grad(loss))(params, minibatches)["bias"]
for model, x in zip(models, minibatches, strict=True):
    model(x).square().mean().backward()
gradients = [model.bias.grad for model in models]
compare(mistake, right, gradients)

# %%
# The mean of the losses instead of their sum
# -------------------------------------------
#
# The gradient of each model becomes as many times smaller as there are models, and so
# does its step of SGD. Adam without weight decay hides it, and so does AdamW, as long
# as gradients are far above ``eps`` (tested).

losses = vmap(loss)(params, minibatches)
mistake = torch.autograd.grad(losses.mean(), params["bias"], retain_graph=True)[0]
right = torch.autograd.grad(losses.sum(), params["bias"])[0]
compare(mistake, right, gradients)

# %%
# The skeleton is in the other mode
# ---------------------------------
#
# The mode of ``models`` does not count, that of the skeleton does. In train mode, batch
# norm takes the statistics of the batch and overwrites its own; in eval mode, dropout
# is off: both without a word.

layers = [nn.BatchNorm1d(4, **double).eval() for _ in range(num_models)]
state = stack_module_state(layers)
with torch.device("meta"):
    shell = nn.BatchNorm1d(4)  # in train mode, as each new module


def normalize(params, buffers, x):
    return functional_call(shell, (params, buffers), (x,), strict=True)


overwritten = copy.deepcopy(state[1])
mistake = vmap(normalize)(state[0], overwritten, minibatches)
moved = (overwritten["running_mean"] - state[1]["running_mean"]).abs().max()
print(f"running means moved by {moved:.2g}")
shell.eval()
right = vmap(normalize)(*state, minibatches)
compare(mistake, right, (m(x) for m, x in zip(layers, minibatches, strict=True)))

# %%
# One norm clips all models together
# ----------------------------------
#
# ``clip_grad_norm_`` on the stack takes one norm over all models, so a model with a
# large gradient makes the gradients of all others smaller.

large = minibatches * scales[:, None, None]
grads = vmap(grad(loss))(params, large)
for name, p in params.items():
    p.grad = grads[name].clone()
nn.utils.clip_grad_norm_(params.values(), max_norm=0.1)
mistake = params["weight"].grad

norms = sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()  # [4]
right = grads["weight"] * (0.1 / (norms + 1e-6)).clamp(max=1)[:, None, None]

for model, x in zip(models, large, strict=True):
    model.zero_grad()
    model(x).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.1)
compare(mistake, right, (model.weight.grad for model in models))

# %%
# The models change after they were stacked
# -----------------------------------------
#
# ``stack_module_state`` copies. What you train or load into ``models`` afterwards does
# not reach ``params``, and what you train in ``params`` does not reach ``models``.

with torch.no_grad():
    models[3].bias += 1
mistake = vmap(predict)(params, minibatches)
params, _ = stack_module_state(models)
right = vmap(predict)(params, minibatches)
compare(mistake, right, (m(x) for m, x in zip(models, minibatches, strict=True)))

# %%
# Two that the comparison cannot decide
# -------------------------------------
#
# **All members are one model.** A list times a number, or a copy of one model, gives
# members that agree everywhere until data separate them. A loop over them agrees as
# well. Look at the spread of the members before you train them:

one_model, _ = stack_module_state([models[0]] * num_models)
four, _ = stack_module_state([nn.Linear(4, 3, **double) for _ in range(num_models)])
for name, state in {"[model] * 4": one_model, "four models": four}.items():
    spread = vmap(predict, in_dims=(0, None))(state, batch).std(dim=0).mean()
    print(f"{name}: standard deviation over the members {spread:.2g}")

# %%
# **Python draws once.** ``vmap`` runs the function once for all models, so ``random``
# and NumPy draw one number for all, and a counter, a hook or ``append`` in it acts once
# (tested). Draw with torch and ``randomness="different"``, and return what you want to
# keep. ``randomness="same"`` draws one dropout mask for all members.


def python(x):
    return x.mean() * 0 + random.random()


def with_torch(x):
    return torch.rand(())


for function in python, with_torch:
    drawn = vmap(function, randomness="different")(minibatches)
    print(f"{function.__name__}: {len(drawn.unique())} numbers for {num_models} models")

# %%
# A loop that gives no warning
# ----------------------------
#
# An operator without a rule for ``vmap`` fails, or runs once for each model with a
# warning. ``index_add`` with own indices for each model loops **without** one. The
# result is right, so only a count of its calls shows it:


class Record(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        calls.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def add_rows(x, i):
    return x.new_zeros(3, 4).index_add(0, i, x)


def add_rows_at_once(x, i):  # what to write
    return x.new_zeros(3, 4).scatter_add(0, i[:, None].expand(-1, 4), x)


calls = []
places = torch.randint(3, (num_models, 8))
with Record():
    looped = vmap(add_rows)(minibatches, places)
    at_once = vmap(add_rows_at_once)(minibatches, places)
torch.testing.assert_close(looped, at_once, rtol=0, atol=1e-10)
for name in "index_add", "scatter_add":
    print(f"calls of {name} for {num_models} models: {calls.count(name)}")

# %%
# What to test
# ------------
#
# With your own function in the place of ``loss``, this test finds the first three
# mistakes. For the mode, use your own layers, in the mode that you will run. For the
# mean and the norm, compare the parameters after a step of SGD, for the models that
# changed the stack in use. One test for each function that you map: three models, in
# float64 on the CPU, and **sizes that all differ**, which turn the first two examples
# above into errors (tested; a keyword that broadcasts stays silent).

few = [nn.Linear(4, 3, **double) for _ in range(3)]  # three models, four features
x = torch.randn(3, 5, 4, **double)  # five samples for each
state, _ = stack_module_state(few)
state_grads = vmap(grad(loss))(state, x)
for model, rows in zip(few, x, strict=True):
    loss_of_one = model(rows).square().mean()  # by the model, not by the function
    loss_of_one.backward()
looped = torch.stack([model.weight.grad for model in few])
torch.testing.assert_close(state_grads["weight"], looped, rtol=0, atol=1e-10)

# %%
# More without a message
# ----------------------
#
# - **No decay for biases**: in a stack a bias has two dimensions, so the usual rule
#   ``p.ndim < 2`` finds none. Write ``p.ndim < 3``.
# - **Gradients are there, and nothing learns**: the optimizer is older than the stack,
#   or holds the models (``plot_training.py``).
# - **The gradient of a row is None**: ``params["weight"][3]`` after the call is a new
#   tensor. Take row 3 of the gradient of ``params["weight"]``.
# - **Inside** ``vmap``, ``requires_grad`` is False for every tensor, and code that asks
#   for it takes its other branch.
# - **The accuracy of an ensemble** is that of the averaged probabilities, not the mean
#   of the members' accuracies.
# - In two nested calls of ``vmap``, ``torch.cond`` computes a wrong result if one call
#   maps its condition, the other its operand, and both have equal size. Write
#   ``torch.where``.
#
# All of this is tested.
#
# Remember
# --------
#
# A right shape proves nothing. Write the loop with the models themselves, not with the
# function that you map. Members that are one model, and numbers that Python draws, you
# have to look for.
#
# Next
# ----
#
# - ``plot_custom_operators.py``: a kernel or an ``autograd.Function`` of your own.
# - ``plot_recurrent.py``: what to do where an LSTM or a GRU is refused.
# - ``plot_your_own_model.py`` asks your own module these questions.
# - ``plot_state.py``: batch norm, dropout, tied weights.
#
# References
# ----------
#
# - Keyword arguments: `functorch#70 <https://github.com/pytorch/functorch/issues/70>`_,
#   `pytorch#151558 <https://github.com/pytorch/pytorch/issues/151558>`_.
# - ``torch.cond``: `pytorch#195323 <https://github.com/pytorch/pytorch/pull/195323>`_.
