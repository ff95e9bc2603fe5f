"""
An ensemble as one module: train, save, load, export
====================================================

Hold an ensemble of PyTorch models in one ``nn.Module``, a class of about forty lines
and a few helpers that you can copy: it trains, moves, saves, loads, exports, gives
single members back bit for bit, drops, adds and replaces them, and refuses models that
do not match.

**What you will learn**

- how one module can hold the stacked state of many models under their own names;
- which differences between models ``stack_module_state`` does not see, and how to
  refuse them;
- how to save, load and warm-start an ensemble, and how to change its members without
  losing the optimizer;
- when to prefer ``TensorDict.from_modules`` of tensordict;
- how to export the ensemble, and what a call costs in each form.

**Before you start**, read ``plot_ensembling.py``, which explains
``stack_module_state``, ``functional_call`` and ``vmap``. No GPU is needed, but the
package `tensordict <https://docs.pytorch.org/tensordict/stable/index.html>`_ is.
"""

# %%
# Set-up
# ------
#
# Matrix products run in IEEE float32; the default comes back at the end.

import copy
import io
import platform
import tempfile
import textwrap
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import tensordict
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer

torch.manual_seed(0)

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
num_threads = torch.get_num_threads()
device_name = f"CPU ({platform.machine()}, {num_threads} threads)"
if device.type == "cuda":
    device_name = torch.cuda.get_device_name(device)
elif device != cpu:
    device_name = device.type

matmul = torch.backends.cuda.matmul
default_precision = matmul.fp32_precision
matmul.fp32_precision = "ieee"

print(f"{device_name}, torch {torch.__version__}, tensordict {tensordict.__version__}")
print(f"{torch.get_default_dtype()}, matrix products: {matmul.fp32_precision}")

# %%
# A network with some of everything
# ---------------------------------
#
# The example has parameters, floating-point and integer buffers (batch normalization),
# a random layer, and a plain Python attribute, ``slope``. The data are noise with
# random labels.


class Net(nn.Module):
    def __init__(self, hidden=32, slope=0.1):
        super().__init__()
        self.slope = slope
        self.fc1 = nn.Linear(16, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.dropout = nn.Dropout(0.2)
        self.fc2 = nn.Linear(hidden, 4)

    def forward(self, x):  # [64, 16]
        x = F.leaky_relu(self.norm(self.fc1(x)), self.slope)  # [64, 32]
        return self.fc2(self.dropout(x))  # [64, 4]


num_models = 5
models = [Net().to(device) for _ in range(num_models)]
x = torch.randn(64, 16, device=device)
labels = torch.randint(4, (64,), device=device)

# %%
# The helpers
# -----------
#
# An ensemble runs the Python code of *one* module with the tensors of all, so whatever
# is not a registered tensor has to be the same in every member. ``stack_module_state``
# compares the class and the mode of the outermost module, and whether each tensor
# requires gradients. Members with another slope, another activation, or one layer in
# another mode pass, and the first member speaks for all.
#
# - ``check_members`` compares **everything** that members have to share: class, mode
#   and attributes of every layer; shape, dtype and ``requires_grad`` of every tensor,
#   and which of them are tied. It stands in ``plot_state.py``, where each of its rules
#   is shown, and here it is again.
# - ``with_tensors`` copies a model with other tensors in place of its own. The memo of
#   ``deepcopy`` says which copy to use for which object, so tied weights stay tied.


def tensors_of(module, **options):
    """Parameters and buffers by name."""
    params = dict(module.named_parameters(**options))
    return params | dict(module.named_buffers(**options))


def describe(model):
    """What members have to have in common: a dictionary from names to values."""
    facts, owners = {}, {}
    internal = vars(nn.Module()).keys() - {"training"}
    for path, module in model.named_modules(remove_duplicate=False):
        path = f"{path}." if path else ""
        facts[f"{path}__class__"] = type(module)
        for name, value in vars(module).items():
            if name in internal:
                continue
            if any(isinstance(x, nn.Module | torch.Tensor) for x in tree_leaves(value)):
                raise ValueError(f"{path}{name} hides tensors: register them")
            facts[path + name] = repr(value)
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    for kind, tensors in {"parameter": parameters, "buffer": buffers}.items():
        for name, tensor in tensors:
            facts[f"{name}, a {kind},"] = "there"
            facts[f"{name}.shape"] = list(tensor.shape)
            facts[f"{name}.dtype"] = tensor.dtype
            facts[f"{name}.requires_grad"] = tensor.requires_grad
            facts[f"the owner of {name}"] = owners.setdefault(id(tensor), name)
    return facts


def check_members(models):
    """Raise ValueError unless the models differ only in the values of their tensors."""
    if len(models) == 0:
        raise ValueError("there is no model to stack")
    tensors = [id(t) for m in models for t in (*m.parameters(), *m.buffers())]
    if len(set(tensors)) < len(tensors):
        raise ValueError("two models share a tensor: the stack would part them")
    first, *others = [describe(model) for model in models]
    for i, other in enumerate(others, start=1):
        for name in first | other:
            here, there = (facts.get(name, "missing") for facts in (first, other))
            if here != there:
                raise ValueError(f"{name} is {here} in model 0, {there} in model {i}")


def with_tensors(model, tensors):
    """Deep copy of a model with other parameters and buffers; ties stay."""
    memo = {id(b): tensors[name] for name, b in model.named_buffers()}
    for name, p in model.named_parameters():
        memo[id(p)] = nn.Parameter(tensors[name].detach(), p.requires_grad)
    return copy.deepcopy(model, memo)


# %%
# The ensemble
# ------------
#
# Where do the stacked tensors live? Their names contain dots, which
# ``register_parameter`` refuses. And where does the skeleton live that
# ``functional_call`` needs? One object answers both: ``stacked`` is **a copy of the
# first model whose own tensors are the stacked ones**. As a submodule it takes part in
# all that ``nn.Module`` offers. In the call, ``strict=True`` insists that every tensor
# is replaced by one member's, so it is a skeleton without the ``meta`` device.
#
# Two limits. For the length of a call, ``stacked`` holds the tensors of the call, so
# only one thread at a time may call or save an ensemble: use a lock, or the exported
# program below. And a ``forward`` that *replaces* a buffer, instead of writing into it,
# loses the new value (``plot_state.py``).
#
# Copy this class with the helpers above.


class Ensemble(nn.Module):
    """Models of one architecture in one call. It holds copies of their tensors."""

    def __init__(self, models):
        super().__init__()
        check_members(models)
        self.training = models[0].training
        params, buffers = stack_module_state(models)
        self.stacked = with_tensors(models[0], params | buffers)

    def __len__(self):
        return len(next(iter(tensors_of(self.stacked).values())))

    def forward(self, *inputs, own_data=False):
        def call(state, *inputs):
            return functional_call(self.stacked, state, inputs, strict=True)

        in_dims = (0, *[0 if own_data else None] * len(inputs))
        ensemble = vmap(call, in_dims, randomness="different")
        return ensemble(tensors_of(self.stacked), *inputs)

    def member(self, i):
        rows = {name: t[i].clone() for name, t in tensors_of(self.stacked).items()}
        return with_tensors(self.stacked, rows)

    def members(self):
        return [self.member(i) for i in range(len(self))]

    def add(self, model):  # makes new parameters: the optimizer has to follow
        self.stacked = Ensemble([*self.members(), model]).stacked

    def drop(self, i):  # makes new parameters: the optimizer has to follow
        rows = list(range(len(self)))
        del rows[i]
        if not rows:
            raise ValueError("this is the last model of the ensemble")
        state = {name: t[rows] for name, t in tensors_of(self.stacked).items()}
        self.stacked = with_tensors(self.stacked, state)

    def replace(self, i, model):  # in place
        Ensemble([self.member(0), model])  # refuses a model that does not match
        with torch.no_grad():
            for name, row in tensors_of(model).items():
                tensors_of(self.stacked)[name][i] = row


ensemble = Ensemble(models)
print(f"{len(ensemble)} members")
for name, tensor in ensemble.state_dict().items():
    print(f"{name:35} {list(tensor.shape)!s:12} {tensor.dtype}")

# %%
# Check: it is the same function, and it moves
# --------------------------------------------
#
# The judge is a loop over the models in float64. Its rounding, about 1e-16 for each
# term in sums of 16 and 32, stays far below the 1e-12 of the largest logit that we
# allow. One call of ``to`` brings all stacked tensors to the CPU and to float64;
# integer counters keep their dtype. The check feeds shared data and own data.

models64 = [copy.deepcopy(model).to(cpu, torch.float64).eval() for model in models]
ensemble64 = copy.deepcopy(ensemble).to(cpu, torch.float64).eval()
for name, tensor in ensemble64.state_dict().items():
    dtype = torch.float64 if tensor.is_floating_point() else torch.int64
    moved = (tensor.device, tensor.dtype) == (cpu, dtype)
    assert moved, f"{name} did not move to the CPU and {dtype}"


def check_against_loop(name, results, members, inputs):
    """Assert that float64 results are those of a loop over the members."""
    looped = torch.stack([m(rows) for m, rows in zip(members, inputs, strict=True)])
    error = (results - looped).abs().max().item()
    allowed = 1e-12 * looped.abs().max().item()
    print(f"{name:22} {error:.1e} from the loop, allowed {allowed:.1e}")
    assert error <= allowed, f"{name}: not what a loop over the members computes"


shared = x.to(cpu, torch.float64)
own = torch.stack([shared.roll(i, dims=0) for i in range(num_models)])  # [5, 64, 16]
same = [shared] * num_models
check_against_loop("shared data", ensemble64(shared), models64, same)
check_against_loop("own data", ensemble64(own, own_data=True), models64, own)

# %%
# Train it
# --------
#
# ``parameters()`` feeds an optimizer, as with any module. The loss is the **sum** of
# the members' losses, so that each gets the gradient that it would get alone
# (``plot_training.py`` shows why). ``randomness="different"`` lets every member draw
# its own dropout masks.


def train(ensemble, optimizer, x, steps):
    """Losses of the members in the last of some steps."""
    for _ in range(steps):
        logits = ensemble(x)  # [5, 64, 4]
        losses = vmap(F.cross_entropy, in_dims=(0, None))(logits, labels.to(x.device))
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    return losses.tolist()


optimizer = torch.optim.Adam(ensemble.parameters(), lr=0.02)
first, last = (train(ensemble, optimizer, x, steps) for steps in (1, 39))
print("losses, step 1: ", *[f"{loss:.3f}" for loss in first])
print("losses, step 40:", *[f"{loss:.3f}" for loss in last])
print("batches counted:", *ensemble.stacked.norm.num_batches_tracked.tolist())
assert max(last) < min(first), "some member did not learn"

# %%
# Single members, exactly
# -----------------------
#
# ``member(i)`` is an ordinary ``Net`` with its own copy of row ``i``: the same bits, in
# the same mode. Models go in and come out unchanged, and what is tied in a model is
# tied in the ensemble and in its members.


def check_exact(name, members, expected):
    """Assert that two lists of models hold the same bits under the same names."""
    for i, (got, model) in enumerate(zip(members, expected, strict=True)):
        alike = describe(got) == describe(model)
        ours, theirs = tensors_of(got), tensors_of(model)
        alike = alike and all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert alike, f"{name}: member {i} is not the expected model, bit for bit"
    print(f"{name + ':':24} {len(members)} members, the same bits")


check_exact("in and out again", Ensemble(models).members(), models)

ensemble.eval()
members = ensemble.members()
ensemble64, *members64 = [
    copy.deepcopy(module).to(cpu, torch.float64) for module in [ensemble, *members]
]
check_against_loop("trained, member(i)", ensemble64(shared), members64, same)
kept = copy.deepcopy(members)
nn.init.zeros_(ensemble.member(0).fc1.weight)
check_exact("a member overwritten", ensemble.members(), kept)

layers = [nn.Linear(16, 16, device=device) for _ in range(3)]
tied_models = [nn.Sequential(layer, nn.ReLU(), layer) for layer in layers]
tied = Ensemble(tied_models)
num_params = [len(list(net.parameters())) for net in (tied, tied.member(1))]
print(f"two tied layers: {num_params[0]} parameters, in a member {num_params[1]}")
assert num_params == [2, 2], "a tie is lost"

# %%
# Save and load
# -------------
#
# A ``state_dict`` holds tensors and numbers, so ``weights_only=True`` loads it. The
# first size of any tensor is the number of members. Save the optimizer, too. Here
# memory stands in for a file.


def reloaded(state):
    """What comes back from a file, and the size of the file in bytes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, map_location=device, weights_only=True)
    return state, len(file.getvalue())


def same_predictions(a, b):
    """Same bits on a CPU; elsewhere a library may choose other kernels."""
    scale = 0 if device == cpu else 1e-5  # float32 rounds sums of 32 at 2e-6 or less
    return (a - b).abs().max().item() <= scale * b.abs().max().item()


(state, adam), _ = reloaded([ensemble.state_dict(), optimizer.state_dict()])
size = len(state["stacked.fc1.weight"])
loaded = Ensemble([Net().to(device) for _ in range(size)]).eval()
loaded.load_state_dict(state)
loaded_optimizer = torch.optim.Adam(loaded.parameters())
loaded_optimizer.load_state_dict(adam)

check_exact("saved and loaded", loaded.members(), members)
assert same_predictions(loaded(x), ensemble(x)), "loaded: other predictions"
for new, old in zip(loaded.parameters(), ensemble.parameters(), strict=True):
    for key, value in optimizer.state[old].items():
        alike = torch.equal(loaded_optimizer.state[new][key], value)
        assert alike, f"loaded: {key} of the optimizer has other bits"

# %%
# Files have a fixed cost beside the tensors: names, shapes, the archive itself. An
# ensemble pays it once, a file for each member pays it every time.

_, together = reloaded(ensemble.state_dict())
apart = sum(reloaded(member.state_dict())[1] for member in members)
alone = sum(tensor.nbytes for tensor in ensemble.state_dict().values())
print(f"the tensors alone     {alone:7,} bytes")
print(f"one file              {together:7,} bytes")
print(f"a file for each member {apart:6,} bytes")

# %%
# Warm start
# ----------
#
# Models that were trained separately, perhaps on other machines, become an ensemble
# through their own checkpoints.

with tempfile.TemporaryDirectory() as folder:
    paths = [Path(folder) / f"seed{i}.pt" for i in range(3)]
    trained = [Net().to(device) for _ in paths]
    for model, path in zip(trained, paths, strict=True):
        torch.save(model.state_dict(), path)

    started = [Net().to(device) for _ in paths]
    for model, path in zip(started, paths, strict=True):
        model.load_state_dict(torch.load(path, weights_only=True))
check_exact("from checkpoints", Ensemble(started).members(), trained)

# %%
# Drop, add, replace
# ------------------
#
# A newcomer has to match in every trait, the mode included.

newcomer, substitute = (Net().to(device).eval() for _ in range(2))
changed = copy.deepcopy(ensemble)
changed.drop(1)
changed.add(newcomer)
changed.replace(0, substitute)
expected = [substitute, *members[2:], newcomer]
check_exact("drop, add, replace", changed.members(), expected)

# %%
# **The optimizer has to follow.** ``drop`` and ``add`` make new parameters, as shapes
# change. An optimizer that was made before holds the old ones: it trains nothing, and
# no error says so. Make a new one. To keep Adam's running averages, give it the rows
# that stay. The proof runs in float64 and without dropout: the members that stay have
# to learn as in an ensemble from which nobody was dropped.

optimizer = torch.optim.Adam(ensemble64.parameters(), lr=0.01)
train(ensemble64, optimizer, shared, 3)
undisturbed, its_optimizer = copy.deepcopy((ensemble64, optimizer))
ensemble64.drop(1)
before = ensemble64.members()
train(ensemble64, optimizer, shared, 1)
check_exact("old optimizer, one step", ensemble64.members(), before)

rows = [0, 2, 3, 4]
state = copy.deepcopy(optimizer.state_dict())
for entry in state["state"].values():
    for key, value in entry.items():
        entry[key] = value[rows] if value.ndim else value  # the step is a scalar
optimizer = torch.optim.Adam(ensemble64.parameters())
optimizer.load_state_dict(state)
train(ensemble64, optimizer, shared, 3)
train(undisturbed, its_optimizer, shared, 3)
errors = [
    (tensor - tensors_of(undisturbed.stacked)[name][rows]).abs().max().item()
    for name, tensor in tensors_of(ensemble64.stacked).items()
]
print(f"new optimizer, its rows: {max(errors):.0e} from the undisturbed run")
assert max(errors) < 1e-6, "after drop(1), the others learn something else"

# %%
# One step moves a weight by about 0.01, so the bound of 1e-6 is far from chance. For
# ``add``, append a row of zeros to the optimizer's state. ``replace`` works in place
# and the optimizer still fits, but its row ``i`` belongs to the model that left: set it
# to zero. Adam counts the steps of all members together, so a newcomer gets the bias
# correction of an old member, and its first steps are too long: warm it up, or give it
# an optimizer of its own.
#
# When it goes wrong
# ------------------
#
# First, models that do not match. Each message names what differs. In parentheses, what
# ``stack_module_state`` does with them.


def refusal(function, *inputs):
    """Message with which function(*inputs) is refused, "" if it is not."""
    try:
        function(*inputs)
    except Exception as error:  # of any kind: its message is what this page shows
        return f"{type(error).__name__}: {error}"
    return ""


class Variant(Net):
    pass


net, half_frozen = Net().to(device), Net().to(device)
half_frozen.norm.eval()
relu, tanh = (nn.Sequential(nn.Linear(2, 2), act()) for act in (nn.ReLU, nn.Tanh))
mismatches = {
    "another shape": ("out_features is 32 in model 0, 8", [net, Net(8).to(device)]),
    "another class": ("__class__", [net, Variant().to(device)]),
    "another mode": ("training", [net, Net().to(device).eval()]),
    "another dtype": ("fc1.weight", [net, Net().to(device, torch.bfloat16)]),
    "a layer's mode": ("norm.training", [net, half_frozen]),
    "an attribute": ("slope is 0.1 in model 0, 0.3", [net, Net(slope=0.3).to(device)]),
    "an activation": ("1.__class__", [relu, tanh]),
    "zero models": ("no model", []),
}
for mistake, (culprit, wrong) in mismatches.items():
    message = refusal(Ensemble, wrong)
    verdict = "refuses it, too" if refusal(stack_module_state, wrong) else "TAKES IT"
    text = f"{mistake} (stack_module_state {verdict}): {message}"
    print(textwrap.fill(text, 84, subsequent_indent="    "))
    assert culprit in message, f"{mistake}: the message does not name {culprit!r}"

# %%
# Second, state that does not fit. PyTorch names the tensor. Last, a trap of other
# recipes: a skeleton on the ``meta`` device that is **registered** as a submodule stops
# ``to``. In a tuple it is hidden from ``to``, and from ``eval()`` as well.

checkpoint = net.state_dict()
missing = {name: t for name, t in checkpoint.items() if name != "fc2.bias"}
surplus = checkpoint | {"fc3.bias": checkpoint["fc2.bias"]}
four = {name: tensor[:4] for name, tensor in ensemble.state_dict().items()}
on_meta = copy.deepcopy(ensemble)
on_meta.skeleton = copy.deepcopy(net).to("meta")
for mistake, culprit, function, wrong in [
    ("missing name", "fc2.bias", Net().load_state_dict, missing),
    ("surplus name", "fc3.bias", Net().load_state_dict, surplus),
    ("four members for five", "fc1.weight", ensemble.load_state_dict, four),
    ("newcomer in train mode", "training", ensemble.add, net),
    ("registered skeleton", "meta tensor", on_meta.to, device),
]:
    message = refusal(function, wrong)
    text = textwrap.shorten(f"{mistake}: {message}", 240)
    print(textwrap.fill(text, 84, subsequent_indent="    "))
    assert culprit in message, f"{mistake}: the message does not name {culprit!r}"

# %%
# tensordict beside it
# --------------------
#
# ``TensorDict.from_modules(..., as_module=True)`` is a module that holds the stacked
# state; ``to_module`` puts tensors into a skeleton for the length of a ``with`` block.
# That makes a shorter class, here with its skeleton in a tuple:


class TensorDictEnsemble(nn.Module):
    def __init__(self, models):
        super().__init__()
        self.params = TensorDict.from_modules(*models, as_module=True)
        self.skeleton = (copy.deepcopy(models[0]).to("meta"),)

    def call(self, params, x):
        with params.to_module(self.skeleton[0]):
            return self.skeleton[0](x)

    def forward(self, x):
        return vmap(self.call, (0, None), randomness="different")(self.params, x)


beside = TensorDictEnsemble(members)
beside64 = copy.deepcopy(beside).to(cpu, torch.float64)
check_against_loop("tensordict", beside64(shared), members64, same)

# %%
# The table asks of both what this page asked of ``Ensemble``.

answers = {}  # question -> the answers of both
for kind in [Ensemble, TensorDictEnsemble]:
    held, filled = kind(members), kind([Net().to(device).eval() for _ in members])
    state, _ = reloaded(held.state_dict())
    filled.load_state_dict(state)
    loads = same_predictions(filled(x), held(x))
    del state[next(name for name in state if "fc2.bias" in name)]
    found = {
        "loads what it saved": loads,
        "refuses a missing name": refusal(filled.load_state_dict, state),
        "keeps tied weights tied": len(list(kind(tied_models).parameters())) == 2,
        "goes through torch.export": not refusal(torch.export.export, held, (x,)),
    }
    for mistake, (_, wrong) in mismatches.items():
        found[f"refuses {mistake}"] = refusal(kind, wrong)
    for question, answer in found.items():
        answers.setdefault(question, []).append("yes" if answer else "NO")

print(f"{'':26} Ensemble  tensordict {tensordict.__version__}")
for question, (ours, theirs) in answers.items():
    print(f"{question:26} {ours:8}  {theirs}")
    assert ours == "yes", f"{question}: not true of Ensemble"
assert answers["loads what it saved"][1] == "yes", "tensordict: other predictions"

# %%
# tensordict is ahead where the state is *one value*: you index it, slice it, compute
# with it. The average of all members, a "model soup", is one line.

soup = beside.params.data.float().mean(dim=0)
print("rows 0 and 3:", beside.params[[0, 3]]["fc1", "weight"].shape)
print("soup:        ", soup["fc1", "weight"].shape)
for name, tensor in tensors_of(ensemble.stacked).items():
    error = (soup[tuple(name.split("."))] - tensor.float().mean(dim=0)).abs().max()
    assert error.item() < 1e-6, f"the soup's {name} is not the mean of the members"

# %%
# **Prefer tensordict** where your program computes with the state: averages,
# interpolations, rows that come and go. A "NO" above holds for the version named there.
# The export fails on the lock that ``from_modules`` sets; without it, on layers whose
# name is a method of tensordict, such as ``norm``. ``eval()`` does not reach a skeleton
# in a tuple. ``check_members`` can check the models before you stack them. **Prefer the
# module**
# where the ensemble is one part of a program that saves, loads, switches and exports
# it, or where one dependency less counts.
#
# Export
# ------
#
# ``torch.export`` makes the ensemble a program of operators and tensors that needs none
# of your classes. At first it still contains the switches of ``vmap``, which older
# releases, such as 2.11, cannot save
# (`pytorch#181263 <https://github.com/pytorch/pytorch/pull/181263>`_).
# ``run_decompositions`` executes them.


def exported(module, dynamic_shapes=None):
    """Exported program, after a round trip through a file, and the file's size."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # releases warn of what they do themselves
        program = torch.export.export(module, (x,), dynamic_shapes=dynamic_shapes)
        torch.export.save(program.run_decompositions({}), file)
        file.seek(0)
        return torch.export.load(file), len(file.getvalue())


program, nbytes = exported(ensemble)
for name, tensor in ensemble.state_dict().items():
    alike = torch.equal(program.state_dict[name], tensor)
    assert alike, f"exported: {name} has other bits"
call_program = program.module()
assert same_predictions(call_program(x), ensemble(x)), "exported: other predictions"

operators = [node for node in program.graph.nodes if node.op == "call_function"]
print(f"{len(operators)} operators, {nbytes:,} bytes; same tensors, same predictions")
message = refusal(call_program, x[:7])
print("7 rows instead of 64:", message)
assert "64" in message, "a program for 64 rows took 7"

# %%
# The program was recorded for 64 rows and takes no other number, unless you declare the
# batch size as dynamic. Whether that works depends on the layers: some rules of
# ``vmap`` turn the size into a constant.

any_size = {"inputs": ({0: torch.export.Dim("batch")},)}
for label, layer in {
    "BatchNorm1d": lambda: nn.BatchNorm1d(16),
    "ReLU": nn.ReLU,
}.items():
    nets = [nn.Sequential(nn.Linear(16, 16), layer()) for _ in range(num_models)]
    flexible = Ensemble(nets).to(device).eval()
    message = refusal(exported, flexible, any_size)
    print(f"Linear, {label}:", message.partition("!")[0] or "any batch size")
    assert label != "ReLU" or not message, "no batch size of its own for Linear, ReLU"
    if not message:
        program, _ = exported(flexible, any_size)
        for few in (x, x[:7], x[:1]):
            alike = same_predictions(program.module()(few), flexible(few))
            assert alike, f"exported for any batch size: wrong for {len(few)}"

# %%
# What a call costs
# -----------------
#
# All forms do the same arithmetic; what differs is the work around it. *Bare vmap* gets
# a dictionary of tensors ready-made. ``Ensemble`` collects it in every call, tensordict
# puts it into the skeleton in its own way, and in the exported program only operators
# are left. The loop calls every operator once per member. None of this grows with the
# size of the layers, so it matters for small networks like these and fades for large
# ones.
#
# All return stacked logits in evaluation mode, in IEEE float32, autograd off, all
# threads, for 5 members and for 20, each member four times. The timer runs each
# statement before it measures; the table shows the median of its values, their
# interquartile range and their number.

with torch.device("meta"):
    skeleton = Net().eval()


def predict(state, x):
    return functional_call(skeleton, state, (x,), strict=True)


forms = {
    "loop": "stack([member(x) for member in members])",
    "bare vmap": "bare(state, x)",
    "Ensemble": "ensemble(x)",
    "tensordict": "beside(x)",
    "exported": "program(x)",
}
sizes = [num_models, 4 * num_models]
times = {}  # (form, size) -> first quartile, median, third quartile [ms]
for size in sizes:
    scope = {"stack": torch.stack, "x": x, "bare": vmap(predict, in_dims=(0, None))}
    scope["members"] = [copy.deepcopy(m) for m in members * (size // num_models)]
    scope["ensemble"] = Ensemble(scope["members"])
    scope["state"] = tensors_of(scope["ensemble"].stacked)
    scope["beside"] = TensorDictEnsemble(scope["members"])
    scope["program"] = exported(scope["ensemble"])[0].module()
    print(f"{size} members, milliseconds")
    for form, statement in forms.items():
        with torch.no_grad():
            logits, expected = eval(statement, scope), scope["ensemble"](x)
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
        assert error <= 1e-5, f"{form}, {size} members: other predictions"
        timer = Timer(statement, globals=scope, num_threads=num_threads)
        with torch.no_grad():
            runs = timer.blocked_autorange(min_run_time=0.8).times
        quartiles = torch.tensor(runs).quantile(torch.tensor([0.25, 0.5, 0.75]))
        low, median, high = times[form, size] = (1e3 * quartiles).tolist()
        print(f"    {form:11} {median:.3f} ({high - low:.3f}, {len(runs)})")

# %%
# Look
# ----

fig, ax = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
places = torch.arange(len(forms))
looks = [("C0", "o", -0.13), ("C1", "^", 0.13)]
for size, (color, marker, shift) in zip(sizes, looks, strict=True):
    low, median, high = torch.tensor([times[form, size] for form in forms]).T
    spread = torch.stack([median - low, high - median]).tolist()
    look = {"color": color, "fmt": marker, "capsize": 3, "label": f"{size} members"}
    ax.errorbar(median.tolist(), (places + shift).tolist(), xerr=spread, **look)
ax.set_yticks(places.tolist(), labels=list(forms))
ax.invert_yaxis()
ax.set_xlim(0)
ax.set_xlabel("time of one call [ms], median and quartiles")
ax.set_title(f"One call of an ensemble of small networks, float32\n{device_name}")
ax.grid(True, axis="x", alpha=0.3)
ax.legend()

findings = []
for form in forms:
    few, many = (times[form, size][1] for size in sizes)
    findings.append(
        f"{form} {few:.2f} and {many:.2f} ms, {many / few:.1f} times as long"
    )
fig.set_label(
    f"Time of one call on {device_name} for five forms of an ensemble, two marks with "
    f"quartiles for each form, for {sizes[0]} and {sizes[1]} members: "
    f"{'; '.join(findings)}."
)
for form, other in [("Ensemble", "bare vmap"), ("tensordict", "Ensemble")]:
    for size in sizes:
        low, median, high = times[form, size]
        start, middle, end = times[other, size]
        overlap = "quartiles overlap" if low <= end and start <= high else "apart"
        print(
            f"{size:2} members, {form} - {other}: {median - middle:+.3f} ms, {overlap}"
        )

matmul.fp32_precision = default_precision

# %%
# For the **loop**, four times the members are four times the calls. For the other
# forms, the distance between their two marks is what 15 more members add. Where it is
# short, calls are shared and you pay for the first members; where it is as long as the
# loop's, the arithmetic decides (``plot_when_vmap_pays.py``). **If bare vmap is below
# Ensemble**, that is the price of collecting the tensors, and where nothing changes
# between calls you can collect them once. **If the exported program is below both**,
# Python was the difference, and it is the form to serve from. Marks whose quartiles
# overlap are equal for this page.
#
# Remember
# --------
#
# **A copy of one model that holds the stacked tensors** is state and skeleton in one,
# and ``nn.Module`` does the rest: training, moving, saving, loading, modes, export.
# ``stack_module_state`` does not compare submodules and attributes, so **compare them
# yourself** and name the culprit. After ``drop`` and ``add``, **the optimizer has to
# follow**; it does not complain. tensordict is the better choice for computing with the
# state, the module for living with it.
#
# Next
# ----
#
# - ``plot_training.py``: why the losses are summed, and what the optimizer sees.
# - ``plot_state.py``: batch normalization, dropout, tied weights and attributes.
# - ``plot_memory.py``: how to stack without holding every model twice.
#
# References
# ----------
#
# - Requests for such a module:
#   `pytorch/functorch#992 <https://github.com/pytorch/functorch/issues/992>`_,
#   `pytorch#54147 <https://github.com/pytorch/pytorch/issues/54147>`_.
# - The registered skeleton that stops ``to``:
#   `Lightning#17820 <https://github.com/Lightning-AI/pytorch-lightning/issues/17820>`_,
#   `pytorch/functorch#793 <https://github.com/pytorch/functorch/issues/793>`_.
# - ``torch.export``: `documentation <https://docs.pytorch.org/docs/stable/export.html>`_.
# - M. Wortsman and others: Model soups: averaging weights of multiple fine-tuned models
#   improves accuracy without increasing inference time, 2022,
#   `arXiv:2203.05482 <https://arxiv.org/abs/2203.05482>`_.
