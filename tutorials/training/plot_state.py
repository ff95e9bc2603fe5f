"""
Batch norm, dropout, frozen layers and tied weights
===================================================

Run members that have batch norm, dropout, frozen layers, tied weights or settings of
their own in one call of ``torch.func.vmap``, and know for each part of a model whether
it belongs to the member or to all.

**In short.** Stacked tensors are each member's own; everything else is the skeleton's,
the one module whose code runs for all members. So batch norm needs no patch, dropout
needs ``randomness="different"``, the mode is set by ``skeleton.eval()``, and what has
to differ between members must be a parameter, a buffer or an input.

Before you start, read ``plot_ensembling.py`` on ``stack_module_state``,
``functional_call`` and ``in_dims``.
"""

# %%
# Set-up
# ------
#
# This page is about state and not about rounding, so it computes in float64 on the CPU.

import copy

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

torch.manual_seed(0)
double = {"device": "cpu", "dtype": torch.float64}
print(f"CPU, torch {torch.__version__}, float64")

# %%
# Four members with a layer of each kind:


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(16, 3)

    def forward(self, x):  # [32, 6]
        return self.fc2(self.drop(F.relu(self.norm(self.fc1(x)))))  # [32, 3]


num_models = 4
models = [Net().to(**double) for _ in range(num_models)]
minibatches = torch.randn(10, num_models, 32, 6, **double)  # for 10 steps

# %%
# Batch norm and dropout in one call
# ----------------------------------
#
# The lines to copy. In train mode, each member drops units of its own, and batch norm
# updates each member's row of the running statistics, in place:

params, buffers = stack_module_state(models)  # "norm.running_mean": [4, 16], ...
with torch.device("meta"):
    skeleton = Net()


def ensemble(skeleton, **options):
    """One call for all members; the options are those of ``vmap``."""

    def call(params, buffers, *inputs):
        return functional_call(skeleton, (params, buffers), inputs, strict=True)

    return vmap(call, **options)


logits = ensemble(skeleton, randomness="different")(params, buffers, minibatches[0])
skeleton.eval()  # not models[0].eval()
predictions = ensemble(skeleton)(params, buffers, minibatches[0])  # [4, 32, 3]

counted = buffers["norm.num_batches_tracked"]  # [4]
print("minibatches counted by each member:", *counted.tolist())

# %%
# The training call counted one minibatch, the prediction none.
#
# Whose is what?
# --------------
#
# ``vmap`` runs the code of one module, with tensors that stand for all members. What
# has four boxes in this picture can differ between members. What has one bar is the
# same for all, whatever your models say:

whose = {
    "parameters": "member",
    "buffers: running statistics, ...": "member",
    "inputs with in_dims 0": "member",
    'dropout, randomness="different"': "member",
    'dropout, randomness="same"': "call",
    "anything with in_dims None": "call",
    "train or eval mode": "skeleton",
    "Python attributes: p, momentum, ...": "skeleton",
    "which weights are tied": "skeleton",
}
fig, ax = plt.subplots(layout="constrained")
for y, owner in enumerate(whose.values()):
    if owner == "member":
        ax.broken_barh([(i - 0.45, 0.9) for i in range(4)], (y - 0.35, 0.7), color="C0")
    else:
        ax.broken_barh([(-0.45, 3.9)], (y - 0.35, 0.7), color="C1")
        ax.text(1.5, y, f"the {owner}'s", color="black", ha="center", va="center")
ax.set_yticks(range(len(whose)), labels=whose)
ax.set_xticks(range(4))
ax.set_xlabel("member")
ax.invert_yaxis()
ax.set_title("Each member's own, or one for all")
fig.set_label(
    "A row for each part of a model: four boxes if it is the member's own, one bar if "
    "it is one for all. " + "; ".join(f"{k}: the {v}'s" for k, v in whose.items())
)

# %%
# What to do, part by part:
#
# - **Batch norm**: stack the buffers and map over them (``in_dims=0``).
# - **Other buffers**: write into them (``self.mean.copy_(new)``); a tensor that takes
#   the place of a buffer (``self.mean = new``) is lost after the call.
# - **Dropout**: say ``randomness="different"`` or ``"same"``; to repeat the masks of
#   one member, pass them as an input.
# - **Train or eval mode**: set it on the skeleton, also that of single layers.
# - **Frozen parameters**: freeze them in all models before stacking, or in the stack.
# - **Tied weights**: build the skeleton, do not copy it to ``meta``.
# - **Python attributes**: what has to differ must be a buffer, parameter or input.
#
# Batch norm equals the loop
# --------------------------
#
# Ten minibatches in train mode, by the models in a loop and by one call. Dropout stays
# in eval mode, on both sides, since its masks would differ:

for module in [skeleton, *models]:
    module.train()
    module.drop.eval()
params, buffers = stack_module_state(models)

with torch.no_grad():
    for x in minibatches:  # [4, 32, 6]
        logits = ensemble(skeleton)(params, buffers, x)
        looped = torch.stack(
            [model(rows) for model, rows in zip(models, x, strict=True)]
        )

_, loop_buffers = stack_module_state(models)
torch.testing.assert_close(
    {"logits": logits, **buffers},
    {"logits": looped, **loop_buffers},
    atol=1e-10,
    rtol=0,
    msg=lambda what: (
        f"batch norm: vmap does not compute what the loop computes. {what}"
    ),
)
far = (buffers["norm.running_mean"] - loop_buffers["norm.running_mean"]).abs().max()
print(f"Equal logits and statistics; running means differ by at most {far:.0e}.")

# %%
# **Nothing had to be patched.** (Training with gradients is tested, too.) PyTorch's
# page on `batch norm <https://docs.pytorch.org/docs/stable/func.batch_norm.html>`_ asks
# for a patch, because there ``vmap`` maps over *samples*, which have no statistics of
# their own. The same advice stands in the message that you get when you forget the
# buffers, so that one member's statistics have to serve all:


def forgetful(params, x):
    return functional_call(models[0], params, (x,))


try:
    vmap(forgetful)(params, x)
except RuntimeError as error:
    print(error)

# %%
# Do not patch batch norm, as the message says; pass the stacked buffers. In eval mode
# there is no such message, and all members would use the statistics of ``models[0]``.
# ``strict=True`` notices both.
#
# Dropout: one mask for all, or one for each
# ------------------------------------------
#
# Without ``randomness``, ``vmap`` refuses to draw random numbers:

drop = nn.Dropout(0.5)
ones = torch.ones(num_models, 16, **double)  # outputs show the masks
try:
    vmap(drop)(ones)
except RuntimeError as error:
    print(error, "\n")

for randomness in ["same", "different"]:
    masks = vmap(drop, randomness=randomness)(ones)
    print(f"{randomness}: {len(masks.unique(dim=0))} masks for {num_models} members")

# %%
# Members of an ensemble want ``"different"``. Seed before the call and it repeats. It
# does not repeat a *loop*: that draws member by member, and ``vmap`` layer by layer.
# For many draws of each member, call it many times and stack the results.
#
# Repeat the masks of one member
# ------------------------------
#
# To run one member again, alone or in a loop, with the masks that it had among others:
# draw outside, with a generator for each member, and pass the masks as an input.


class Masked(Net):
    def forward(self, x, keep):  # [32, 6], [32, 16]
        return self.fc2(keep / 0.5 * F.relu(self.norm(self.fc1(x))))


def draw(seed):
    """Which units a member keeps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(32, 16, generator=generator) < 0.5


members = [Masked().to(**double) for _ in range(num_models)]
with torch.device("meta"):
    masked = Masked()

keep = torch.stack([draw(seed) for seed in range(num_models)])  # [4, 32, 16]
together = ensemble(masked)(*stack_module_state(members), x, keep)
alone = members[2](x[2], draw(2))
far = (together[2] - alone).abs().max()
assert far < 1e-10, (
    f"member 2 alone computes something else; a logit is off by {far:.1e}"
)
print(f"Member 2, alone and among others: logits differ by at most {far:.0e}.")

# %%
# Freeze some layers
# ------------------
#
# Turn off ``requires_grad`` of their stacked tensors, and hand the optimizer the rest.
# (Or freeze the layer in *all* models before you stack them; a mixture is refused.)

for name, p in params.items():
    p.requires_grad_(not name.startswith("fc1."))
optimizer = torch.optim.SGD([p for p in params.values() if p.requires_grad], lr=0.1)

together = ensemble(skeleton.train(), randomness="different")
logits = together(params, buffers, minibatches[0])
logits.square().mean(dim=(1, 2)).sum().backward()
optimizer.step()
for name, p in params.items():
    print(f"{name:12} {list(p.shape)!s:12}", "frozen" if p.grad is None else "trained")

# %%
# If all members start from **one** pretrained layer, share one copy (``.clone()`` it to
# free the others). Only then: here ``p[0]`` would give every member the layer of member
# 0.
#
# .. code-block:: python
#
#     shared = {name: p[0].detach() for name, p in params.items() if "fc1." in name}
#     own = {name: p for name, p in params.items() if name not in shared}
#     in_dims = dict.fromkeys(shared, None) | dict.fromkeys(own, 0)
#     call = ensemble(skeleton, in_dims=(in_dims, 0, 0), randomness="different")
#     logits = call(shared | own, buffers, x)
#
# - To freeze the statistics of batch norm, too: ``skeleton.norm.eval()``, after each
#   ``skeleton.train()``.
# - Frozen in *some* members: ``p.register_hook(lambda grad: grad * mask)``, with a mask
#   of shape ``[4, 1, 1]`` for a weight and ``[4, 1]`` for a bias, stops their
#   gradients. Momentum and weight decay still move them, so use it from the first step
#   and without decay. To freeze entries of a tensor, multiply it by its mask in the
#   function that you map.
#
# Tied weights: build the skeleton on meta
# ----------------------------------------
#
# A language model often uses one matrix twice, to read tokens and to score them. The
# stack has it once; that two layers use it, only the skeleton knows. The recipe of many
# tutorials, a copy moved to ``meta``, forgets it:


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):  # [5]
        return self.head(self.embed(tokens))  # [5, 11]


tied = [Tied().to(**double) for _ in range(num_models)]
state = stack_module_state(tied)
tokens = torch.arange(5 * num_models).reshape(num_models, 5) % 11

with torch.device("meta"):
    built = Tied()
copied = copy.deepcopy(tied[0]).to("meta")

far = (ensemble(built)(*state, tokens)[1] - tied[1](tokens[1])).abs().max()
print(f"Built on meta: member 1 differs from its model by at most {far:.1g}.")
try:
    ensemble(copied)(*state, tokens)
except RuntimeError as error:
    print("Copied to meta:", error)

# %%
# Without ``strict=True`` the second is no error on a CPU: the call returns what happens
# to be in uninitialized memory, as if it were a result.
#
# A setting of its own for each member
# ------------------------------------
#
# Python attributes are the skeleton's. Models that differ in one are stacked without
# complaint, and all members use that of the skeleton. Make it a buffer instead; the
# class can stay as it is, since assigning an ``nn.Buffer`` registers it:


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.scale * x


scales = [1.0, 2.0, 3.0, 4.0]
plain = [Scaled(scale) for scale in scales]
cured = [Scaled(nn.Buffer(torch.tensor(scale, **double))) for scale in scales]

for kind, members in {"attributes": plain, "buffers": cured}.items():
    outputs = ensemble(members[0])(
        *stack_module_state(members), ones
    )  # ones times scale
    print(f"{kind}: members use the scales", *outputs[:, 0].tolist())

# %%
# Some layers insist on a number, such as the ``momentum`` of batch norm or the ``p`` of
# ``nn.Dropout``. Group members that share it, with one skeleton and one call for each
# group, or write the layer out. Dropout with a rate ``p`` for each member, a buffer or
# an input (tested):
#
# .. code-block:: python
#
#     def dropout(x, p):
#         return x * (torch.rand_like(x) >= p) / (1 - p)
#
# ``BatchNorm1d(momentum=None)`` stops in train mode; ``plot_what_vmap_refuses.py`` has
# another form of it.
#
# The mistake: eval mode on the models
# ------------------------------------
#
# The mode is no tensor, so it is not in the stack. The models are in eval mode; what
# does one call return if the skeleton is not?

for model in models:
    model.eval()
expected = torch.stack([model(rows) for model, rows in zip(models, x, strict=True)])

for training in [True, False]:
    skeleton.train(training)
    params, buffers = stack_module_state(models)
    counted = buffers["norm.num_batches_tracked"].clone()
    logits = ensemble(skeleton, randomness="different")(params, buffers, x)
    far = (logits - expected).abs().max()
    changed = (buffers["norm.num_batches_tracked"] != counted).any()
    print(
        f"skeleton in {'train' if training else 'eval'} mode: logits off by {far:.1g},"
    )
    print(f"    statistics {'changed' if changed else 'as before'}")

# %%
# With ``randomness`` there is no error in train mode, but members drop units, use the
# statistics of the minibatch, and *change* the state that you meant to evaluate. So
# call ``skeleton.eval()`` before you predict and ``skeleton.train()`` after it.
#
# Remember
# --------
#
# **Stacked tensors are each member's own; everything else is the skeleton's.** Stack
# buffers together with parameters, set the mode on the skeleton, say whose random
# numbers you want. Build the skeleton under ``with torch.device("meta")`` and call it
# with ``strict=True``: then a forgotten parameter or buffer is an error and no wrong
# result.
#
# Next
# ----
#
# - ``plot_saving.py`` keeps parameters, buffers and skeleton together in one module.
# - ``plot_hyperparameter_sweep.py`` gives every member its own learning rate.
# - PyTorch's page on `limitations
#   <https://docs.pytorch.org/docs/stable/func.ux_limitations.html>`_ of ``vmap``.
#
# References
# ----------
#
# - S. Ioffe, C. Szegedy: Batch normalization, 2015, `arXiv:1502.03167
#   <https://arxiv.org/abs/1502.03167>`_.
# - N. Srivastava et al.: Dropout, 2014, `JMLR 15
#   <https://jmlr.org/papers/v15/srivastava14a.html>`_.
# - O. Press, L. Wolf: Using the output embedding to improve language models, 2017,
#   `arXiv:1608.05859 <https://arxiv.org/abs/1608.05859>`_: tied weights.
# - The same questions asked: batch norm, `functorch#384
#   <https://github.com/pytorch/functorch/issues/384>`_; dropout, `pytorch/rl#1935
#   <https://github.com/pytorch/rl/issues/1935>`_; masks that repeat, `functorch#408
#   <https://github.com/pytorch/functorch/issues/408>`_.
