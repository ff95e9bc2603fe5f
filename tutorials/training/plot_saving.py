"""
Saving, loading and changing an ensemble
========================================

Save a trained ensemble to a file and load it, take any member out as an ordinary
module, drop, add or replace members, and go on training where you stopped.

**In short.** Row 3 of every stacked tensor is member 3: ``torch.save`` of the stacked
dictionaries keeps the whole ensemble, and ``load_state_dict`` makes a module of a row.
If ``to``, ``eval`` and ``state_dict`` should reach the stack, register it in an
``nn.Module`` of some forty lines,
which then moves, trains, saves and loads like any other module.

Before you start, read ``plot_ensembling.py``, which explains ``stack_module_state``,
``functional_call`` and ``vmap``.
"""

# %%
# Set-up
# ------
#
# This page is about state and not about rounding, so it computes in float64 on the CPU.

import copy
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

torch.manual_seed(0)
double = {"device": "cpu", "dtype": torch.float64}
print(f"CPU, torch {torch.__version__}, float64")

# %%
# Ten networks with parameters, and with the buffers of a batch norm:


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 8)
        self.norm = nn.BatchNorm1d(8)
        self.fc2 = nn.Linear(8, 10)

    def forward(self, x):  # [32, 64]
        return self.fc2(F.relu(self.norm(self.fc1(x))))  # [32, 10]


num_models = 10
models = [Net().to(**double) for _ in range(num_models)]

# %%
# Save, load, take member 3 out again
# -----------------------------------
#
# The lines to copy. The folder is temporary here; yours will stay.

params, buffers = stack_module_state(models)  # "fc1.weight": [10, 8, 64], ...
optimizer = torch.optim.Adam(params.values(), lr=0.003)  # and now you train

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "ensemble.pt")
    state = {"params": params, "buffers": buffers, "optimizer": optimizer.state_dict()}
    torch.save(state, path)
    state = torch.load(path, map_location="cpu", weights_only=True)

params, buffers = state["params"], state["buffers"]
optimizer = torch.optim.Adam(params.values())  # its rate is in the file
optimizer.load_state_dict(state["optimizer"])

member = Net().to(**double)
row = {name: tensor[3] for name, tensor in (params | buffers).items()}
member.load_state_dict(row)
member.eval()  # to predict

for name, tensor in models[3].state_dict().items():
    assert torch.equal(member.state_dict()[name], tensor), (
        f"member 3 is not the model that was stacked: {name} has other bits"
    )
print("Member 3 went in and came out with the same bits.")

# %%
# What you hold now:
#
# - ``params`` and ``buffers``, ready to go on: the parameters come back as leaves that
#   require gradients, so an optimizer takes them. ``weights_only=True``, the default
#   since torch 2.6, loads tensors and containers, and refuses code in a file. On a GPU,
#   move them before you make the optimizer, as new leaves:
#   ``p.detach().to(device).requires_grad_(p.requires_grad)``.
# - ``member``, a ``Net`` like any other, which shares no memory with the stack. (With
#   tied weights or non-persistent buffers, ``load_state_dict`` stops at missing or
#   unexpected keys: take ``Ensemble(models).member(3)`` below.)
#
# To save *one* member, save ``member.state_dict()``. The tensors in ``row`` are views,
# and ``torch.save`` of a view writes all the memory behind it, here that of all ten.
#
# One module for the whole ensemble
# ---------------------------------
#
# In a larger program, the stack should follow ``to``, ``eval`` and ``state_dict``. For
# that, a module has to hold it, and a skeleton has to run it. One module can be both:
# **a copy of one model whose own tensors are the stacked ones**. Three helpers:


def tensors(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


def with_tensors(model, new):
    """Copy of a model that holds other tensors; what is tied stays tied."""
    model = copy.deepcopy(model)
    made = {}  # by the tensor that it replaces
    for name, t in tensors(model).items():
        p = isinstance(t, nn.Parameter)
        made[t] = nn.Parameter(new[name].detach(), t.requires_grad) if p else new[name]
    for module in model.modules():
        named = module.named_parameters, module.named_buffers
        for name, t in [pair for own in named for pair in own(recurse=False)]:
            setattr(module, name, made[t])
    return model


def check_members(models):
    """Refuse models that differ in names, shapes, dtypes, or layers as printed."""

    def describe(model):
        named = tensors(model).items()
        found = {f"{name}: {list(t.shape)}, {t.dtype}" for name, t in named}
        return found | {line.strip() for line in str(model).splitlines()}

    for i, model in enumerate(models):
        if different := describe(models[0]) ^ describe(model):
            raise ValueError(f"models 0 and {i} differ: {sorted(different)}")


# %%
# And the class:


class Ensemble(nn.Module):
    """Models of one architecture in one call. It holds copies of their tensors."""

    def __init__(self, models):
        super().__init__()
        check_members(models)
        params, buffers = stack_module_state(models)
        self.stacked = with_tensors(models[0], params | buffers)

    def forward(self, x, in_dim=None):  # in_dim=0: a minibatch for each member
        def predict(state, x):
            return functional_call(self.stacked, state, (x,), strict=True)

        ensemble = vmap(predict, in_dims=(0, in_dim), randomness="different")
        return ensemble(tensors(self.stacked), x)

    def member(self, i):
        named = tensors(self.stacked).items()
        return with_tensors(self.stacked, {name: t[i].clone() for name, t in named})


# %%
# ``check_members`` is there because ``stack_module_state`` compares little: given these
# two, in this order, it returns a stack without any bias. (The check cannot see what a
# layer does not print, such as an attribute of your own class.) ``print(ensemble)``
# shows one network, of the sizes of one member: the members are the first dimension of
# its tensors, and ``sum(p.numel() for p in ensemble.parameters())`` counts all ten.

try:
    Ensemble([nn.Linear(64, 10, bias=False), nn.Linear(64, 10)])
except ValueError as error:
    print(error)

# %%
# Load ten checkpoints
# --------------------
#
# Models that were trained apart, perhaps on ten machines, meet here. Load each into a
# module of its own, then stack:

with tempfile.TemporaryDirectory() as folder:
    paths = [Path(folder, f"seed{i}.pt") for i in range(num_models)]
    for model, path in zip(models, paths, strict=True):  # stands for ten runs
        torch.save(model.state_dict(), path)

    loaded = [Net().to(**double) for _ in paths]
    for model, path in zip(loaded, paths, strict=True):
        model.load_state_dict(torch.load(path, map_location="cpu"))

ensemble = Ensemble(loaded)
for name, tensor in ensemble.state_dict().items():
    print(f"{name:33} {list(tensor.shape)}")

# %%
# Strip ``module.`` (of ``DistributedDataParallel``) and ``_orig_mod.`` (of
# ``torch.compile``) from names before ``load_state_dict``:
#
# .. code-block:: python
#
#     for prefix in "_orig_mod.", "module.":
#         state = {name.removeprefix(prefix): t for name, t in state.items()}
#
# Train it like any module
# ------------------------
#
# The ensemble is a module, so ``parameters()`` feeds the optimizer. The loss is the sum
# of the members' losses (``plot_training.py``). Handwritten digits, 500 to train with:

digits = load_digits()
x = torch.tensor(digits.data / 16, **double)  # [1797, 64]
y = torch.tensor(digits.target)  # [1797]
(x_train, x_val), (y_train, y_val) = x.split([500, 1297]), y.split([500, 1297])
order = torch.rand(20, 500).argsort(dim=1)  # of 20 epochs
epochs = order[:, :480].reshape(20, 15, 32)  # in 15 minibatches each

cross_entropies = vmap(F.cross_entropy, in_dims=(0, None))


def train(ensemble, optimizer, epochs):  # [epoch, step, 32]
    """Validation loss of each member after each epoch."""
    curves = []
    for epoch in epochs:
        ensemble.train()
        for rows in epoch:
            optimizer.zero_grad()
            cross_entropies(ensemble(x_train[rows]), y_train[rows]).sum().backward()
            optimizer.step()
        with torch.no_grad():
            curves.append(cross_entropies(ensemble.eval()(x_val), y_val))
    return torch.stack(curves)  # [epoch, member]


ensemble = Ensemble(models)
optimizer = torch.optim.Adam(ensemble.parameters(), lr=0.003)
first_half = train(ensemble, optimizer, epochs[:10])

# %%
# ``member(i)`` is an ordinary ``Net`` again, in the mode of the ensemble. The check to
# keep: what all members say in one call, each of them says alone.

with torch.no_grad():
    together = ensemble(x_val)  # [10, 1297, 10]
    alone = torch.stack([ensemble.member(i)(x_val) for i in range(num_models)])

far = (together - alone).abs().max()
assert far < 1e-10, f"a member says something else alone; a logit is off by {far:.1e}"
print(f"Ten members in one call and alone: logits differ by at most {far:.0e}.")

# %%
# Go on training after a reload
# -----------------------------
#
# Save the optimizer, too: Adam's running averages have a row for each member. And load
# onto the **CPU**: ``load_state_dict`` brings each tensor to where it belongs, while
# ``map_location="cuda"`` moves Adam's step counts to the GPU, where every update has to
# wait for them (`pytorch#128208 <https://github.com/pytorch/pytorch/issues/128208>`_).

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "checkpoint.pt")
    states = {"ensemble": ensemble.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(states, path)
    checkpoint = torch.load(path, map_location="cpu")

size = len(checkpoint["ensemble"]["stacked.fc1.weight"])  # the file knows: 10
resumed = Ensemble([Net().to(**double) for _ in range(size)])
resumed.load_state_dict(checkpoint["ensemble"])
resumed_optimizer = torch.optim.Adam(resumed.parameters())  # its rate is in the file
resumed_optimizer.load_state_dict(checkpoint["optimizer"])

# %%
# From here on, ``resumed`` trains as ``ensemble`` would have (tested, bit for bit on a
# CPU). Save the states of a scheduler and of random generators as well.
#
# Drop, add or replace a member
# -----------------------------
#
# Take the members that stay, put newcomers behind them, make a new ``Ensemble``. **The
# optimizer has to follow**: the tensors are new, and an old optimizer would go on with
# those that nobody uses, without an error. Its state keeps the rows of those who stay,
# and a newcomer starts with zeros:


def take_rows(state, rows, num_new):
    """State of an optimizer when some members stay and new ones come after them."""

    def take(t):
        if t.ndim == 0:  # Adam counts steps once for all members
            return t.clone()
        return torch.cat([t[rows], t.new_zeros(num_new, *t.shape[1:])])

    entries = state["state"].items()
    kept = {i: {key: take(t) for key, t in entry.items()} for i, entry in entries}
    return state | {"state": kept}


# %%
# We drop the worst member and add a fresh one. **Nobody who stays should notice**: the
# check compares them with the original ensemble, which goes on without interruption.

worst = first_half[-1].argmax().item()
stay = [i for i in range(num_models) if i != worst]
newcomer = Net().to(**double)
changed = Ensemble([*(resumed.member(i) for i in stay), newcomer])
changed_optimizer = torch.optim.Adam(changed.parameters())
state = take_rows(resumed_optimizer.state_dict(), stay, num_new=1)
changed_optimizer.load_state_dict(state)
second_half = train(changed, changed_optimizer, epochs[10:])

original = copy.deepcopy((ensemble, optimizer))  # in one call: they belong together
undisturbed = train(*original, epochs[10:])
far = (second_half[:, :-1] - undisturbed[:, stay]).abs().max()
assert far < 1e-6, f"those who stay learn something else: a loss is off by {far:.1e}"
print(f"Losses of those who stay, here and in the original: {far:.0e} apart.")

# %%

fig, ax = plt.subplots(layout="constrained")
before, after, others = range(1, 11), range(11, 21), [None] * (len(stay) - 1)
whole = torch.cat([first_half, undisturbed])
ax.plot([*before, *after], whole[:, stay], "C5", lw=0.8, label=["original", *others])
ax.plot([*before, *after], whole[:, worst], "C5--", lw=0.8, label="dropped member")
ax.plot(after, second_half[:, :-1], "C0o", ms=4, label=["those who stay", *others])
ax.plot(after, second_half[:, -1], "C1^-", ms=4, lw=0.8, label="newcomer")
ax.axvline(10, color="C5", ls=":")
ax.set_xticks(range(0, 21, 5))
ax.set_xlabel("epoch; dotted: saved, loaded, one dropped, one added")
ax.set_ylabel("validation loss")
ax.set_title("Ten members of an ensemble on digits, float64, CPU")
ax.legend()
fig.set_label(
    "Validation loss against epoch. Thin lines: ten members of the original ensemble. "
    "From epoch 11 on, dots: the nine that stay after saving, loading, dropping and "
    f"adding, at most {far:.0e} off their lines. A newcomer starts at "
    f"{second_half[0, -1]:.2f} and ends at {second_half[-1, -1]:.2f}."
)

# %%
# **The dots lie on the lines**: reloading, dropping and adding disturbed none of those
# who stay. To replace a member is to drop it and to add another: it comes last, and
# later rows move up by one. The same works with SGD, AdamW and RMSprop (tested).
#
# One thing a newcomer does not get: Adam's correction of the first steps, since Adam
# counts steps once for all. In a long run, with a gradient that stays the same, a
# newcomer's first step is 3 times as long as in a fresh run, and its twelfth, the
# longest, 6.5 times (tested). Where that hurts, lower its rate at first
# (``plot_hyperparameter_sweep.py``).
#
# Export it
# ---------
#
# ``torch.export`` turns the ensemble into a program that runs without your classes, and
# computes the same (tested). ``run_decompositions`` replaces the internal calls of
# ``vmap``, which torch 2.11 could not save, by plain operators:
#
# .. code-block:: python
#
#     program = torch.export.export(ensemble.eval(), (x_val,))
#     program = program.run_decompositions({})
#     torch.export.save(program, "ensemble.pt2")
#     logits = torch.export.load("ensemble.pt2").module()(x_val)
#
# It takes batches of that size only. With ``dynamic_shapes={"x": {0:
# torch.export.Dim("batch")}}`` it takes any, if members consist of linear layers; under
# ``vmap``, batch norm fixes the size (tested), and so did a second convolution (tried):
# pad the last batch. For ONNX, hand the decomposed program to
# ``torch.onnx.export(program, dynamo=True)``: onnxruntime 1.32 computed the same logits
# (tried with torch 2.13 and onnxscript 0.7.2).
#
# Or use tensordict
# -----------------
#
# ``TensorDict.from_modules(*models, as_module=True)`` of `tensordict
# <https://docs.pytorch.org/tensordict/stable/index.html>`_ holds such a stack, which
# you index and slice. In version 0.15.3 (tried) it accepted models of other dtypes or
# layers, tied weights came apart, and ``torch.export`` failed.
#
# The mistake: keeping the models instead of the stack
# ----------------------------------------------------
#
# ``stack_module_state`` copies. After training, the list ``models`` still exists, saves
# without complaint, and has learned nothing:

old = copy.deepcopy(models[3]).eval()
for name, model in {"models[3]": old, "ensemble.member(3)": ensemble.member(3)}.items():
    accuracy = (model(x_val).argmax(dim=1) == y_val).float().mean()
    print(f"{name}: {accuracy:.0%} of the digits right")

# %%
# Save the stack. The models are not needed beside it: ``del models`` after stacking
# halves the memory of the weights.
#
# Remember
# --------
#
# **Row i of every stacked tensor is member i**: save the stack, and clone a row to take
# a member out. One copy of a model that holds the stack makes an ordinary module of the
# ensemble. When members come or go, **the optimizer has to follow**, row by row.
#
# Next
# ----
#
# - ``plot_hyperparameter_sweep.py``: a learning rate for each member.
# - ``plot_population.py``: replacing bad members by good ones while they train.
# - ``plot_recipes.py``: how to stack without holding every model twice.
#
# References
# ----------
#
# - PyTorch: `Saving and loading models
#   <https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html>`_, and
#   `torch.export <https://docs.pytorch.org/docs/stable/export.html>`_.
# - Such a module was asked for in `functorch#992
#   <https://github.com/pytorch/functorch/issues/992>`_ and `pytorch#54147
#   <https://github.com/pytorch/pytorch/issues/54147>`_.
# - ``to`` fails on a skeleton on ``meta`` that is registered as a submodule:
#   `pytorch-lightning#17820
#   <https://github.com/Lightning-AI/pytorch-lightning/issues/17820>`_.
