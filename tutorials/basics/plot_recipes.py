"""
Recipes for an ensemble
=======================

Look up the lines to train, clip, freeze, save, load, split, compile or run in half
precision many models in one ``torch.func.vmap`` call, each with its own data, dropout
and learning rate.

**In short.** One set-up stacks ten models and defines ``predict`` and ``member_loss``,
which run one of them. Every recipe needs this set-up and nothing else: put your own
model and data there, then copy the lines under a heading, in any order. (A recipe that
loads or stacks makes new ``params`` and ``buffers``.) Where a recipe names a layer
(``body.``, ``head.bias``) or a width, put yours.

To know why, read ``plot_ensembling.py``, and the page that a recipe names.
"""

# %%
# The set-up of all recipes
# -------------------------

import tempfile
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

torch.manual_seed(0)
torch.backends.cudnn.conv.fp32_precision = "ieee"  # the checks compare in float32
torch.backends.cuda.matmul.fp32_precision = "ieee"
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
print(f"{device.type.upper()}, torch {torch.__version__}, float32, IEEE")

# %%
# A *member* is one model: row ``i`` of every stacked tensor. All recipes but those for
# training and dropout run in eval mode, so that they can be checked. **To train, switch
# the mode and the randomness, as under "Train all members".**


class Net(nn.Module):  # put yours here
    def __init__(self, width=32):
        super().__init__()
        norm, drop = nn.BatchNorm1d(width), nn.Dropout(0.2)
        self.body = nn.Sequential(nn.Linear(20, width), norm, nn.ReLU(), drop)
        self.head = nn.Linear(width, 5)

    def forward(self, x):  # [16, 20]
        return self.head(self.body(x))  # [16, 5]


num_models = 10
models = [Net().to(device) for _ in range(num_models)]
params, buffers = stack_module_state(models)  # "head.weight": [10, 5, 32], ...
with torch.device("meta"):
    skeleton = Net().eval()  # the code of all members, without weights


def predict(params, buffers, x):  # logits of one member
    return functional_call(skeleton, (params, buffers), (x,), strict=True)


def member_loss(params, buffers, x, y):  # of one member
    return F.cross_entropy(predict(params, buffers, x), y)


minibatches = torch.randn(num_models, 16, 20, device=device)  # one for each member
labels = torch.randint(5, (num_models, 16), device=device)

# %%
# Give each member its own minibatch
# ----------------------------------
#
# Draw rows of your data set for each member. The last lines run member 1 alone, without
# ``vmap``, which is a check to keep in your project. If members are dimension 1 of the
# data, as agents of one environment often are, write ``in_dims=(0, 0, 1)`` and
# ``out_dims=1`` (tested). (``plot_ensembling.py``)

data = minibatches.flatten(0, 1)  # [160, 20], stands for your data set
rows = torch.randint(len(data), (num_models, 16), device=device)
with torch.no_grad():
    logits = vmap(predict)(params, buffers, data[rows])  # [10, 16, 5]

    one = [{name: t[1] for name, t in state.items()} for state in (params, buffers)]
    alone = predict(*one, data[rows[1]])
torch.testing.assert_close(logits[1], alone, msg="member 1 says something else alone")
print("member 1 says the same alone")

# %%
# Mean and disagreement of the predictions
# ----------------------------------------
#
# All members see the same minibatch. Their disagreement is the mutual information, in
# nats, of class and member. (``plot_unknown_inputs.py``)

with torch.no_grad():
    logits = vmap(predict, in_dims=(0, 0, None))(params, buffers, minibatches[0])
probs = logits.softmax(dim=-1)  # [10, 16, 5]
mean = probs.mean(dim=0)  # [16, 5], the prediction of the ensemble
unsure = torch.special.entr(mean).sum(dim=-1)  # [16], entropy of the mean
disagreement = unsure - torch.special.entr(probs).sum(dim=-1).mean(dim=0)  # [16]
print(f"{disagreement.sum() / unsure.sum():.0%} of the uncertainty is disagreement")

# %%
# Train all members with one optimizer
# ------------------------------------
#
# Make the optimizer once, before the loop over steps, and call ``backward`` on the
# **sum** of the losses. (``plot_training.py``)

optimizer = torch.optim.Adam(params.values(), lr=0.001)
skeleton.train()  # the mode of models[0] does not count
losses = vmap(member_loss, randomness="different")(params, buffers, minibatches, labels)
optimizer.zero_grad()
losses.sum().backward()
optimizer.step()
skeleton.eval()  # before you predict
print("losses", list(losses.shape), "one for each member")

# %%
# A different dropout mask for each member
# ----------------------------------------
#
# ``"different"`` draws for each member, ``"same"`` once for all. Here the dropout alone
# is in train mode; batch norm stays in eval mode. (``plot_state.py``)

for module in skeleton.modules():
    if isinstance(module, nn.Dropout):
        module.train()
logits = vmap(predict, randomness="different")(params, buffers, minibatches)
skeleton.eval()

ones = torch.ones(num_models, 64, device=device)
masks = vmap(nn.Dropout(0.5), randomness="different")(ones)
print(f"{len(masks.unique(dim=0))} masks for {num_models} members")

# %%
# A learning rate for each member
# -------------------------------
#
# Step with ``lr=1``, then scale each member's change, for SGD, Adam and AdamW.
# (``plot_hyperparameter_sweep.py`` gives each member a weight decay, too.)

rates = torch.logspace(-4, -1, num_models, device=device)
optimizer = torch.optim.SGD(params.values(), lr=1)
optimizer.zero_grad()
vmap(member_loss)(params, buffers, minibatches, labels).sum().backward()
old = [p.detach().clone() for p in params.values()]
optimizer.step()
with torch.no_grad():
    for p, before in zip(params.values(), old, strict=True):
        rate = rates.view(-1, *[1] * (p.dim() - 1))  # [10, 1, ...]
        p.copy_(before + rate * (p - before))

by_hand = old[-1] - rates[:, None] * p.grad  # of the last tensor, a bias
torch.testing.assert_close(p.detach(), by_hand, msg="a member has another rate")
print(f"{num_models} members moved, each by its own rate")

# %%
# Clip the gradient of each model
# -------------------------------
#
# Call ``clip_each`` between ``backward`` and ``step``, with the tensors that you train.
# ``nn.utils.clip_grad_norm_`` would take one norm over all members.
# (``plot_training.py``)


def clip_each(tensors, max_norm):
    norms = [p.grad.reshape(len(p), -1).norm(dim=1) for p in tensors]  # each [10]
    norms = torch.stack(norms).norm(dim=0)  # [10], over all tensors of a member
    factors = (max_norm / (norms + 1e-6)).clamp(max=1)
    for p in tensors:
        p.grad.mul_(factors.view(-1, *[1] * (p.ndim - 1)))


optimizer = torch.optim.SGD(params.values(), lr=0.01)
optimizer.zero_grad()
vmap(member_loss)(params, buffers, minibatches, labels).sum().backward()
clip_each(params.values(), max_norm=0.5)
optimizer.step()

norms = torch.cat([p.grad.flatten(1) for p in params.values()], dim=1).norm(dim=1)
print(f"largest gradient norm of a member: {norms.max():.3f}")

# %%
# Freeze some layers
# ------------------
#
# Every member keeps its own frozen layers. If these have batch norm, keep it in eval
# mode: train mode changes its statistics. (``plot_state.py``)

for name, p in params.items():
    p.requires_grad_(not name.startswith("body."))
trained = [p for p in params.values() if p.requires_grad]
optimizer = torch.optim.SGD(trained, lr=0.01)
before = {name: p.detach().clone() for name, p in params.items()}
optimizer.zero_grad()
vmap(member_loss)(params, buffers, minibatches, labels).sum().backward()
optimizer.step()
print("moved:", *[k for k, p in params.items() if not torch.equal(p, before[k])])
for p in params.values():
    p.requires_grad_()  # thaw

# %%
# Freeze the backbone and train the heads
# ---------------------------------------
#
# All members share one backbone, here that of member 0 in place of a pretrained one. In
# eval mode, on one minibatch for all, the backbone runs once (tested).
# (``plot_state.py``)

shared = {name: p[0].detach() for name, p in params.items() if "body." in name}
own = {name: p for name, p in params.items() if name not in shared}
in_dims = dict.fromkeys(shared, None) | dict.fromkeys(own, 0)
fixed = {name: b[0] for name, b in buffers.items()}  # its batch norm, in eval mode
heads_loss = vmap(member_loss, in_dims=(in_dims, None, None, None))

optimizer = torch.optim.SGD(own.values(), lr=0.01)
optimizer.zero_grad()
heads_loss(shared | own, fixed, minibatches[0], labels[0]).sum().backward()
optimizer.step()
print("one for all:", len(shared), "tensors; own:", *own)

# %%
# Take member 3 out again
# -----------------------
#
# The result is an ordinary module. To save one member, save the ``state_dict`` of this
# module, and not the rows: they are views of all ten. (``plot_saving.py``)

member = Net().to(device)
row = {name: tensor[3] for name, tensor in (params | buffers).items()}
member.load_state_dict(row)
member.eval()

with torch.no_grad():
    alone = member(minibatches[3])
    together = vmap(predict)(params, buffers, minibatches)[3]
torch.testing.assert_close(alone, together, msg="the module is not member 3")
print("the module says what member 3 says")

# %%
# Save the ensemble and load it
# -----------------------------
#
# The folder is temporary here; yours will stay. Loading makes new tensors, so make the
# optimizer afterwards, and load its state too. (``plot_saving.py``)

with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/ensemble.pt"
    torch.save((params, buffers), path)
    params, buffers = torch.load(path, map_location=device)
print("loaded, ready to train:", all(p.requires_grad for p in params.values()))

# %%
# Load ten checkpoints
# --------------------
#
# Models that were trained apart become one stack. (``plot_saving.py``)

with tempfile.TemporaryDirectory() as folder:
    paths = [f"{folder}/seed{i}.pt" for i in range(num_models)]
    for model, path in zip(models, paths, strict=True):  # stands for ten runs
        torch.save(model.state_dict(), path)

    loaded = [Net().to(device) for _ in paths]
    for model, path in zip(loaded, paths, strict=True):
        model.load_state_dict(torch.load(path, map_location=device))
params, buffers = stack_module_state(loaded)
same = torch.equal(params["head.bias"][7], models[7].head.bias)
print("row 7 is checkpoint 7:", same)

# %%
# Stack without holding every model twice
# ---------------------------------------
#
# ``stack_module_state`` copies, so the list of models and the stack exist side by side.
# These lines replace ``models`` and the stack, and hold one model beside the stack.
# (``plot_memory.py``)

with torch.device("meta"):  # shapes without memory
    params, buffers = stack_module_state([Net()] * num_models)
for stack in params, buffers:
    for name, t in stack.items():
        stack[name] = torch.empty_like(t, device=device, requires_grad=t.requires_grad)
for i in range(num_models):
    model = Net()  # or load a checkpoint
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        (params | buffers)[name].detach()[i] = t.detach()
    del model, t  # before the next one is made
print(f"stacked: {len(params['head.bias'].unique(dim=0))} different members")

# %%
# Split a batch that does not fit
# -------------------------------
#
# Split the members by ``chunk_size``, or, in eval mode, the rows. Without ``no_grad``,
# autograd keeps the intermediate results of all parts, and splitting saves little.
# (``plot_memory.py`` splits a training step, too.)

with torch.no_grad():
    by_member = vmap(predict, chunk_size=2)(params, buffers, minibatches)
    parts = [vmap(predict)(params, buffers, x) for x in minibatches.split(4, dim=1)]
    by_row = torch.cat(parts, dim=1)

    whole = vmap(predict)(params, buffers, minibatches)
for split in by_member, by_row:
    torch.testing.assert_close(split, whole, msg="the parts are not the whole")
print("by members and by rows: both make the whole")

# %%
# Compile it
# ----------
#
# The first call compiles, which takes seconds to minutes; a new size may compile again.
# On a CPU this needs a C++ compiler. (``plot_fastest_ensemble.py``)

with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # torch's own
    compiled = torch.compile(vmap(predict))
    eager = vmap(predict)(params, buffers, minibatches)
    try:
        logits = compiled(params, buffers, minibatches)
        print(f"compiled: off eager by {(logits - eager).abs().max():.0e}")
    except RuntimeError as error:  # no compiler
        print("not compiled:", str(error).splitlines()[0])

# %%
# Half precision and autocast
# ---------------------------
#
# Convert once to store half as much. To train, keep float32 weights and compute under
# ``autocast``: there a member alone may return bfloat16 where one call returns float32
# (pytorch#192617); ``.float()`` makes both float32. (``plot_how_equal.py``)

half = [
    {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
    for state in (params, buffers)
]
with torch.no_grad():
    converted = vmap(predict)(*half, minibatches.bfloat16())
    with torch.autocast(device.type, dtype=torch.bfloat16):  # around vmap
        mixed = vmap(predict)(params, buffers, minibatches)
    exact = vmap(predict)(params, buffers, minibatches)
for way, logits in {"converted": converted, "autocast": mixed}.items():
    print(f"{way}: {logits.dtype}, off by {(logits - exact).abs().max():.1g}")

# %%
# Members of different architectures
# ----------------------------------
#
# Make one stack and one call for each kind, and join the results. Whether this beats a
# loop depends on the number and size of a kind's members. (``plot_when_vmap_pays.py``)


def run(model, params, buffers, x):
    return functional_call(model, (params, buffers), (x,), strict=True)


kinds = [[Net(width).to(device).eval() for _ in range(5)] for width in (16, 64)]
stacks = [stack_module_state(kind) for kind in kinds]
run_kind = vmap(run, in_dims=(None, 0, 0, None))
with torch.no_grad():
    pairs = zip(kinds, stacks, strict=True)
    parts = [run_kind(kind[0], *stack, minibatches[0]) for kind, stack in pairs]
    logits = torch.cat(parts)  # [10, 16, 5]

    loop = torch.stack([model(minibatches[0]) for kind in kinds for model in kind])
print(f"{len(kinds)} kinds: off the loop by {(logits - loop).abs().max():.0e}")

# %%
# To train all kinds, hand both stacks to one optimizer, and add up all losses. Where
# every member is of a kind of its own, keep a loop.
#
# .. code-block:: python
#
#    weights = [p for params, _ in stacks for p in params.values()]
#    optimizer = torch.optim.Adam(weights, lr=0.01)
#    pairs = zip(kinds, stacks, strict=True)
#    parts = [run_kind(kind[0], *stack, minibatches[0]) for kind, stack in pairs]
#    torch.cat(parts).square().mean(dim=(1, 2)).sum().backward()  # or your losses
#    optimizer.step()
#
# Members on several devices
# --------------------------
#
# Give each device its rows (once, if you call often) and a call. A GPU's call returns
# before it is done, so several can work side by side; this page does not time that. One
# Python thread makes all calls; ``plot_many_devices.py`` has a process for each device.

devices = [device]  # or [torch.device("cuda", i) for i in range(number_of_gpus)]
shares = torch.arange(num_models, device=device).tensor_split(len(devices))
states, parts = (params, buffers), []
for where, rows in zip(devices, shares, strict=True):
    own = [{name: t[rows].to(where) for name, t in s.items()} for s in states]
    with torch.no_grad():
        parts.append(vmap(predict)(*own, minibatches[rows].to(where)))
logits = torch.cat([part.to(device) for part in parts])  # [10, 16, 5]

far = (logits - vmap(predict)(params, buffers, minibatches)).abs().max()
print(f"{len(devices)} device(s): off one call by {far:.0e}")

# %%
# The mistake: an optimizer that is older than the stack
# ------------------------------------------------------
#
# Loading, stacking, moving and converting make new tensors. An optimizer that was made
# before goes on with the old ones, without an error:

optimizer = torch.optim.SGD(params.values(), lr=0.01)
params, buffers = stack_module_state(models)  # or load
for when in "older", "newer":
    before = params["head.bias"].clone()
    vmap(member_loss)(params, buffers, minibatches, labels).sum().backward()
    optimizer.step()
    moved = (params["head.bias"] != before).any(dim=1).sum()
    print(f"{when} than the stack: {moved} of {num_models} moved")
    optimizer = torch.optim.SGD(params.values(), lr=0.01)

# %%
# Remember
# --------
#
# A row of every stacked tensor is a member. ``in_dims`` names what all share, and the
# skeleton's mode is that of all members. Make the optimizer after the stack.
#
# Next
# ----
#
# - ``plot_what_vmap_refuses.py``: when a recipe ends in an error of ``vmap``.
# - ``plot_more_recipes.py``: graphs, sparse matrices, ODE solvers, augmentation.
#
# References
# ----------
#
# - Autocast: `pytorch#192617 <https://github.com/pytorch/pytorch/issues/192617>`_.
# - An old optimizer: `pytorch#120581
#   <https://github.com/pytorch/pytorch/issues/120581>`_.
