"""
The state of an ensemble: batch norm, dropout, buffers, ties
============================================================

Run members that have more than parameters in one call of ``torch.func.vmap``: batch
norm with updated statistics, dropout, other buffers, tied weights and Python
attributes, each proved equal to a loop over the models, or shown to differ and cured.
Then find the members that one call cannot stand for.

**What you will learn**

- why batch norm works in train mode, and what it needs;
- which parts of a member come from the skeleton, silently, for all members;
- what dropout repeats in each mode of ``randomness``, and how to repeat a loop;
- how tied weights end in uninitialized memory, and how ``strict=True`` prevents it;
- how to check models before you stack them.

**Before you start**, read ``plot_ensembling.py``, which explains
``stack_module_state``, ``functional_call`` and ``in_dims``.
"""

# %%
# Set-up
# ------
#
# This page is about state and not about rounding, so it computes in float64. Loop and
# ``vmap`` then differ by roundings of 1.1e-16, which training can amplify; comparisons
# allow 1e-10 and print what they find.

import copy
import math
import platform
import textwrap

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_leaves

torch.manual_seed(0)

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
if device.type == "mps":  # it has no float64
    device = cpu
device_name = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
if device.type == "cuda":
    device_name = torch.cuda.get_device_name(device)
elif device != cpu:
    device_name = device.type

default_dtype, default_grad = torch.get_default_dtype(), torch.is_grad_enabled()
default_deterministic = torch.are_deterministic_algorithms_enabled()
torch.set_default_dtype(torch.float64)

print(f"{device_name}, torch {torch.__version__}, {torch.get_default_dtype()}")

# %%
# Loop, ensemble, comparison and refusal, for all that follows:


def loop(models, *inputs):
    """The plain way: each model with its own inputs."""
    rows = zip(models, *inputs, strict=True)
    return torch.stack([model(*row) for model, *row in rows])


def ensemble_of(skeleton, **options):
    """The vectorized way: one call, in which the skeleton stands for all models."""

    def predict(state, *inputs):  # state is what stack_module_state returns
        return functional_call(skeleton, state, inputs, strict=True)

    return vmap(predict, **options)


def agree(what, vmapped, looped):
    """Stop unless vmap computed what the loop computed; print how far they differ."""
    message = f"{what}: vmap does not compute what the loop computes"
    torch.testing.assert_close(vmapped, looped, atol=1e-10, rtol=0, msg=message)
    print(f"{what}: largest difference {(vmapped - looped).abs().max():.1g}")


def show_refusal(what, function, *inputs):
    """Print the message with which function(*inputs) is refused."""
    try:
        function(*inputs)
    except (RuntimeError, ValueError, KeyError) as problem:
        words = f"{what}: {type(problem).__name__}: {problem}".split()
        print(textwrap.fill(" ".join(words), 86, subsequent_indent="    "))
    else:
        raise AssertionError(f"{what}: this ran, but the page says it is refused")


# %%
# What a member is made of
# ------------------------
#
# ``vmap`` runs the code of *one* module, the skeleton, for all members. So what a
# member is made of falls into two groups: tensors that you stack, and everything else,
# which is the skeleton's. The first network has a layer with both.


class Net(nn.Module):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.fc1 = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16, momentum=momentum)
        self.fc2 = nn.Linear(16, 3)

    def forward(self, x):  # [32, 6]
        return self.fc2(F.relu(self.norm(self.fc1(x))))  # [32, 3]


num_models = 4
models = [Net().to(device) for _ in range(num_models)]
params, buffers = stack_module_state(models)

print("stacked, every member has its own:")
for kind, tensors in {"parameter": params, "buffer": buffers}.items():
    for name, tensor in tensors.items():
        print(f"    {kind:9}  {name:24}  {list(tensor.shape)}")
attributes = [f"{k}={v}" for k, v in vars(models[0].norm).items() if k[0] != "_"]
print("from the skeleton, one for all, here those of norm:")
print("   ", *attributes[:4])
print("   ", *attributes[4:])

# %%
# Batch norm in train mode
# ------------------------
#
# In train mode, ``norm`` normalizes with the statistics of the minibatch and moves its
# running statistics toward them, *in place*. In ``buffers`` each member has a row of
# its own, so ``vmap`` can write there: after the call, the tensors that you passed hold
# the new values.
#
# For the proof, train twice: the models in a loop, and the stacked state. The *sum* of
# the members' losses gives each member its own gradient (``plot_training.py``).

with torch.device("meta"):
    skeleton = Net()
ensemble = ensemble_of(skeleton)

minibatches = 2 * torch.randn(40, num_models, 32, 6, device=device) + 1
labels = (minibatches.sum(-1) > 6).long()  # [40, 4, 32]

loop_optimizer = torch.optim.SGD([p for m in models for p in m.parameters()], lr=0.1)
optimizer = torch.optim.SGD(params.values(), lr=0.1)
loop_means, means = [], []  # running mean of the first unit, of every member

for x, y in zip(minibatches, labels, strict=True):
    looped, vmapped = loop(models, x), ensemble((params, buffers), x)  # [4, 32, 3]
    for logits, way in [(looped, loop_optimizer), (vmapped, optimizer)]:
        losses = F.cross_entropy(logits.mT, y, reduction="none").mean(-1)  # [4]
        way.zero_grad()
        losses.sum().backward()
        way.step()
    loop_means.append([model.norm.running_mean[0].item() for model in models])
    means.append(buffers["norm.running_mean"][:, 0].tolist())

torch.set_grad_enabled(False)
loop_params, loop_buffers = stack_module_state(models)

for name in params:
    agree(f"trained {name}", params[name], loop_params[name])
for name in buffers:
    agree(f"updated {name}", buffers[name], loop_buffers[name])
agree("logits of the last step", vmapped, looped)

# %%
# Nothing had to be patched. PyTorch's page on `batch norm and vmap
# <https://docs.pytorch.org/docs/stable/func.batch_norm.html>`_ asks for a patch because
# it answers another question: ``vmap`` over *samples* with one module, where many
# samples would write into one row.

fig, ax = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
steps = list(range(1, len(means) + 1))
for i in range(num_models):
    few = [row[i] for row in means[3::4]]
    ax.plot(steps, [row[i] for row in loop_means], color="C0")
    ax.plot(steps[3::4], few, color="C1", marker="^", linestyle="")
for line, label in zip(ax.lines, ["loop", "vmap, every fourth step"], strict=False):
    line.set_label(label)
ax.set_xlabel("training step")
ax.set_ylabel("running mean of the first unit")
ax.set_title(f"Batch norm in train mode, {num_models} members, float64\n{device_name}")
ax.legend()
ends = ", ".join(f"{value:.2f}" for value in means[-1])
apart = (torch.tensor(loop_means) - torch.tensor(means)).abs().max().item()
fig.set_label(
    f"Running mean of one batch-norm unit against the training step: {num_models} "
    f"lines, one a member, that end at {ends}. The lines of the "
    f"loop run through the markers of vmap; they are at most {apart:.0e} apart."
)

# %%
# One line a member: different weights see different means. The markers of ``vmap`` lie
# on the lines of the loop.
#
# **When it goes wrong.** If all members share one row of statistics, there are many
# writers. If you stack the buffers and give them no dimension in ``in_dims``, the layer
# gets all rows at once:

one_row = {name: buffer[0] for name, buffer in buffers.items()}
shared_buffers = ensemble_of(skeleton, in_dims=((0, None), 0))

show_refusal("1. one row", shared_buffers, (params, one_row), x)
show_refusal("2. all rows", shared_buffers, (params, buffers), x)

# %%
# The advice in message 1 is for ``vmap`` over samples, too. For members, the cure of
# both is the call above: stacked buffers, ``in_dims=0``.
#
# Train or eval: the skeleton decides
# -----------------------------------
#
# In eval mode, every member normalizes with its running statistics. But the mode is an
# attribute of a module and not a tensor, so it is not in the stack. Put the *models*
# into eval mode, stack them, and call:

for model in models:
    model.eval()
looped = loop(models, x)

state = stack_module_state(models)
vmapped = ensemble_of(skeleton)(state, x)
before = loop_buffers["norm.num_batches_tracked"].tolist()
after = state[1]["norm.num_batches_tracked"].tolist()

print(f"logits of loop and vmap differ by up to {(vmapped - looped).abs().max():.2f}")
print("minibatches in the statistics before the prediction:", *before)
print("minibatches in the statistics after the prediction: ", *after)
assert after != before, "the skeleton is in train mode, but left the statistics alone"

# %%
# No error, but ``vmap`` used the statistics of the minibatch, and *changed* the state.
# The cure is one line. The check looks at the state as well:

skeleton.eval()  # or: skeleton.train(models[0].training)

state = stack_module_state(models)
agree("eval mode, logits", ensemble_of(skeleton)(state, x), looped)
for name in buffers:
    agree(f"eval mode, {name}", state[1][name], loop_buffers[name])

# %%
# If your models train with some layers in eval mode (frozen batch norm), set the same
# layers of the skeleton.
#
# Python attributes: the skeleton's, for all
# ------------------------------------------
#
# The other attributes are the skeleton's, too: sizes, probabilities, names of
# activations. Members that differ in one are stacked without complaint.


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.scale = scale  # a number, or an nn.Buffer

    def forward(self, x):
        return self.scale * self.fc(x)


scales = [1.0, 2.0, 3.0, 4.0]
members = [Scaled(scale).to(device) for scale in scales]
with torch.device("meta"):
    skeleton = Scaled(scales[0])

vmapped = ensemble_of(skeleton)(stack_module_state(members), x)
factors = (loop(members, x) / vmapped).mean((1, 2))
print("scales of the members:       ", scales)
print("outputs, loop divided by vmap:", [round(f, 6) for f in factors.tolist()])

# %%
# Where a factor is not 1, ``vmap`` used the scale of the skeleton for a member that has
# another. **The cure: what differs between members has to be a tensor**, a buffer or a
# parameter. The class can stay as it is, because assigning an ``nn.Buffer`` registers
# it:

members = [Scaled(nn.Buffer(torch.tensor(scale))).to(device) for scale in scales]
with torch.device("meta"):
    skeleton = Scaled(nn.Buffer(torch.tensor(scales[0])))

vmapped = ensemble_of(skeleton)(stack_module_state(members), x)
agree("scale in a buffer, outputs", vmapped, loop(members, x))

# %%
# Some attributes cannot become tensors, because a layer of PyTorch wants a number. The
# ``momentum`` of batch norm is one. And ``momentum=None``, which gives all minibatches
# the same weight, does not run at all: it turns the counter into a Python number.

momenta = [0.05, 0.1, 0.3, None]
members = [Net(momentum).to(device) for momentum in momenta]
with torch.device("meta"):
    skeleton = Net(momentum=None)

state = stack_module_state(members)
show_refusal("momentum=None", ensemble_of(skeleton), state, x)
counted = state[1]["norm.num_batches_tracked"].tolist()
print("minibatches counted by this call:", *counted)

# %%
# If that count is not zero, the call changed your state before it failed: stack again.
# The cure for both, own momenta and ``None``: let the layer store the bare statistics
# of the minibatch (``momentum=1``), and blend them with the old ones yourself.

weights = torch.tensor([math.nan if m is None else m for m in momenta], device=device)
with torch.device("meta"):
    skeleton = Net(momentum=1.0)
ensemble = ensemble_of(skeleton)

params, buffers = stack_module_state(members)
for x in minibatches[:10]:
    old = {name: buffer.clone() for name, buffer in buffers.items()}
    ensemble((params, buffers), x)
    average = 1 / buffers["norm.num_batches_tracked"]
    weight = torch.where(weights.isnan(), average, weights)[:, None]  # [4, 1]
    for name in ["norm.running_mean", "norm.running_var"]:
        buffers[name].copy_(torch.lerp(old[name], buffers[name], weight))
    loop(members, x)  # updates the members' own statistics

_, loop_buffers = stack_module_state(members)
for name in buffers:
    agree(f"own momentum, {name}", buffers[name], loop_buffers[name])

# %%
# Buffers: change them in place
# -----------------------------
#
# Batch norm keeps its statistics because it writes *into* its buffers. Many layers
# written by hand replace them: ``self.mean = ...``. Here are both, called in three
# ways.


class Centered(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.in_place:
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        else:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x - self.mean


for in_place in [True, False]:
    members = [Centered(in_place).to(device) for _ in range(num_models)]
    with torch.device("meta"):
        skeleton = Centered(in_place)
    _, stacked = stack_module_state(members)
    one_dict = {"mean": torch.zeros(6, device=device)}
    two_dicts = ({}, {"mean": torch.zeros(6, device=device)})
    for x in minibatches[:3]:
        functional_call(skeleton, one_dict, (x[0],), strict=True)
        functional_call(skeleton, two_dicts, (x[0],), strict=True)
        ensemble_of(skeleton)(stacked, x)
        loop(members, x)
    means = {
        "functional_call, one dictionary": one_dict["mean"],
        "functional_call, two dictionaries": two_dicts[1]["mean"],
        "vmap": stacked["mean"],
    }
    print("changed in place:" if in_place else "replaced:")
    for way, mean in means.items():
        print(f"    {way:34}", "new value" if mean.any() else "still zero")
    changed = [mean.any().item() for mean in means.values()]
    assert changed == [True, in_place, in_place], (
        f"in_place={in_place}: one dictionary, two, vmap have new values: {changed}"
    )
    if in_place:
        looped = torch.stack([member.mean for member in members])
        agree("changed in place, mean", stacked["mean"], looped)

# %%
# ``functional_call`` puts your tensors into the module for the time of the call. What
# is written into them stays with you. A new tensor that takes the place of one comes
# back only if you pass a single dictionary, as the example in the documentation of
# ``functional_call`` does, and ``vmap`` passes dictionaries of its own. **The cure**:
# write in place, with ``copy_``, ``add_`` or ``mul_``.
#
# Dropout: who draws which numbers
# --------------------------------
#
# Random numbers are state of the generator, not of the model. ``vmap`` wants to be told
# by ``randomness`` whether members draw the ``"same"`` numbers or ``"different"`` ones;
# the default is to refuse. The members here are bare dropout layers, and the input is
# all ones, so that the outputs show the masks.

layers = {
    "one dropout": nn.Sequential(nn.Dropout(0.5)),
    "two in a row": nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)),
}
ones = torch.ones(num_models, 16, device=device)
show_refusal("default", vmap(layers["one dropout"]), ones)


def seeded(function, *inputs):
    torch.manual_seed(1)
    return function(*inputs)


masks = {}
print("\nequal cells    same, and a loop         different, and a loop")
print("               seeded for every model   seeded once")
for name, layer in layers.items():
    same = seeded(vmap(layer, randomness="same"), ones)  # [4, 16]
    different = seeded(vmap(layer, randomness="different"), ones)
    again = seeded(vmap(layer, randomness="different"), ones)
    every = torch.stack([seeded(layer, row) for row in ones])
    once = seeded(loop, [layer] * num_models, ones)

    assert (same == same[0]).all(), f"{name}: 'same' drew different masks"
    assert (different != different[0]).any(), f"{name}: 'different' drew one mask"
    assert (different == again).all(), f"{name}: 'different' did not repeat itself"
    if device == cpu:
        assert (same == every).all(), f"{name}: 'same' does not repeat the seeded loop"

    masks[name] = {"same": same, "different": different}
    print(f"{name:15}{(same == every).double().mean():<25.0%}", end="")
    print(f"{(different == once).double().mean():.0%}")

# %%
# The masks in the first row of this table, with one square for each unit that was kept:

fig, axes = plt.subplots(2, 1, figsize=(5.6, 3.6), layout="constrained", sharex=True)
for ax, (mode, mask) in zip(axes, masks["one dropout"].items(), strict=True):
    members, units = mask.nonzero(as_tuple=True)
    ax.plot(units.tolist(), members.tolist(), "s", color="C0", markersize=10)
    ax.set_title(f'randomness="{mode}"')
    ax.set_ylim(num_models - 0.4, -0.6)
    ax.set_yticks(range(num_models))
    ax.set_ylabel("member")
axes[1].set_xlabel("unit")
fig.suptitle(f"Units that dropout kept, float64, {device_name}", fontsize=10)
distinct = {mode: len(m.unique(dim=0)) for mode, m in masks["one dropout"].items()}
fig.set_label(
    f"Dropout masks of {num_models} members, one row each, with a square for each unit "
    f"that was kept. Number of different rows: {distinct['same']} with randomness "
    f"same, {distinct['different']} with randomness different."
)

# %%
# - **same**: one mask for all members, what a loop draws that seeds the generator
#   before every model. On a CPU the two are identical. A GPU may draw the mask of one
#   model with another kernel; then the first column is below 100%.
# - **different**: a mask for each member. They repeat if you seed the generator before
#   the call. But ``vmap`` draws layer by layer, for all members, and a loop draws
#   member by member. With one dropout the two orders can coincide; with two they do
#   not, and cells are equal by chance.
# - **Neither** gives a member a generator of its own, which is what it takes to repeat
#   one member alone when masks differ.
#
# **The cure** is to draw outside, and to pass the noise as an argument. Each member has
# its own generator, and gets the same masks in the loop, in ``vmap``, and alone.


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 16)
        self.fc2 = nn.Linear(16, 3)

    def forward(self, x, keep):  # [32, 6], [32, 16]
        return self.fc2(keep * F.relu(self.fc1(x)) / 0.5)


def draw(seed):
    """Which units a member keeps, each with probability 0.5."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(32, 16, generator=generator) < 0.5).to(device)


members = [Masked().to(device) for _ in range(num_models)]
with torch.device("meta"):
    skeleton = Masked()

keep = torch.stack([draw(seed) for seed in range(num_models)])  # [4, 32, 16]
vmapped = ensemble_of(skeleton)(stack_module_state(members), x, keep)
agree("masks as an argument, outputs", vmapped, loop(members, x, keep))
agree("member 2 alone, outputs", vmapped[2], members[2](x[2], draw(2)))

# %%
# Tied weights: the tie is the skeleton's
# ---------------------------------------
#
# A language model often uses one matrix twice, to read tokens and to score them.
# PyTorch lists a tied parameter once, under its first name, so the stack has one entry.
# That two layers use it is known to the skeleton only. The recipe of many tutorials for
# a skeleton, a copy moved to ``meta``, forgets it:


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):  # [5]
        return self.head(self.embed(tokens))  # [5, 11]


tied = [Tied().to(device) for _ in range(num_models)]
state = stack_module_state(tied)
tokens = torch.randint(11, (num_models, 5), device=device)

copied = copy.deepcopy(tied[0]).to("meta")
with torch.device("meta"):
    built = Tied()

print("stacked:       ", *state[0])
print("copied to meta:", *dict(copied.named_parameters()))
print("built on meta: ", *dict(built.named_parameters()))
agree("built on meta, logits", ensemble_of(built)(state, tokens), loop(tied, tokens))
assert copied.head.weight is not copied.embed.weight, "the copy kept its tie"

# %%
# The copy needs a second matrix. Without ``strict=True``, ``functional_call`` takes the
# skeleton's own, which has a shape and no values. To see what comes out, let PyTorch
# fill new memory with NaN, and call the copy on the CPU:

on_cpu = tuple({name: p.to(cpu) for name, p in tensors.items()} for tensors in state)
careless = vmap(lambda state, tokens: functional_call(copied, state, (tokens,)))

torch.use_deterministic_algorithms(True)  # fills new memory with NaN
try:
    logits = careless(on_cpu, tokens.to(cpu))
    found = f"no error, and {logits.isnan().sum()} of {logits.numel()} logits are NaN"
except RuntimeError as error:
    found = f"PyTorch refuses: {error}"
torch.use_deterministic_algorithms(default_deterministic)

print("not strict:", found)
show_refusal("strict", ensemble_of(copied), state, tokens)

# %%
# **If logits are NaN**, nobody wrote them: without the filling, the call returns what
# happened to be in memory, as if it were a result. **If PyTorch refuses**, your version
# notices that a tensor on ``meta`` cannot take part, at least in this layer. **If no
# logit is NaN**, your version fills that memory in another way, and this shows nothing.
# With
# ``strict=True`` you need not know. And a skeleton that is *built* under
# ``with torch.device("meta")`` is right, because its constructor ties the weights.
#
# Check before you stack
# ----------------------
#
# ``stack_module_state`` looks at the outermost module, and at the tensors whose names
# the *first* model has. These two functions look at the rest. They compare attributes
# by what Python prints for them: one that prints its address in memory, such as a
# ``lambda`` made for each model, counts as different, and a large array that is printed
# shortened may hide a difference.


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


def sequence(activation=nn.ReLU, width=8, **options):
    return nn.Sequential(nn.Linear(6, width, **options), activation(), nn.Dropout(0.5))


check_members(models)
check_members([built, *tied])

# %%
# These lists are fine: no error. The second one holds the skeleton, too. **Make that a
# habit**: the skeleton decides about mode, attributes and ties, so it has to match.
# Give it the dtype and ``requires_grad`` of the models as well; the call does not need
# them, but the check compares them. Now what readers will try, first what both refuse:

for what, members in {
    "no model": [],
    "classes": [sequence(), Net()],
    "shapes": [sequence(), sequence(width=9)],
    "modes": [sequence(), sequence().eval()],
    "one frozen": [sequence(), sequence().requires_grad_(False)],
    "second without bias": [sequence(), sequence(bias=False)],
}.items():
    show_refusal(f"{what}, stack_module_state", stack_module_state, members)
    show_refusal(f"{what}, check_members", check_members, members)
    print()

# %%
# Then what ``stack_module_state`` accepts. It drops a bias or a matrix of the second
# model, changes its dtype, parts what is shared, or forgets what is no tensor:

half_eval, gentle, plain, untied = sequence(), sequence(), sequence(), Tied()
layer = nn.Linear(6, 6)
half_eval[2].eval()
gentle[2].p = 0.1
plain.offset = torch.ones(6)
untied.head.weight = nn.Parameter(untied.embed.weight.clone())

for what, members in {
    "first without bias": [sequence(bias=False), sequence()],
    "one untied": [Tied(), untied],
    "dtypes": [sequence(), sequence(dtype=torch.float32)],
    "modes of a submodule": [sequence(), half_eval],
    "activations": [sequence(), sequence(nn.Tanh)],
    "attributes": [sequence(), gentle],
    "a tensor as attribute": [plain, copy.deepcopy(plain)],
    "a layer in both": [nn.Sequential(layer), nn.Sequential(layer)],
}.items():
    stack_module_state(members)  # no error
    show_refusal(what, check_members, members)
show_refusal("the copied skeleton", check_members, [copied, *tied])

# %%
# ``torch.nn.utils.parametrize`` makes a class for each module, so models built one by
# one are refused; copies of one model, filled by ``load_state_dict``, share the class.
#
# Last, the global switches go back to where they were.

torch.set_default_dtype(default_dtype)
torch.set_grad_enabled(default_grad)

# %%
# Remember
# --------
#
# **Tensors are each member's own; everything else is the skeleton's.** Stacked buffers
# with ``in_dims=0`` make batch norm in train mode equal to the loop. Set the mode on
# the skeleton, and write into buffers instead of replacing them. What differs between
# members has to be a tensor; random numbers that you want to repeat have to be an
# argument. Build the skeleton on ``meta``, call it with ``strict=True``, and run
# ``check_members([skeleton, *models])`` once.
#
# Next
# ----
#
# - ``plot_training.py`` trains the stacked state with one optimizer.
# - ``plot_hyperparameter_sweep.py`` gives every member its own numbers in training.
# - ``plot_saving.py`` keeps parameters, buffers and skeleton together in one module.
# - `UX limitations <https://docs.pytorch.org/docs/stable/func.ux_limitations.html>`_ in
#   PyTorch's documentation: in-place operations and ``randomness``.
#
# References
# ----------
#
# - S. Ioffe, C. Szegedy: Batch normalization, 2015,
#   `arXiv:1502.03167 <https://arxiv.org/abs/1502.03167>`_.
# - N. Srivastava et al.: Dropout: a simple way to prevent neural networks from
#   overfitting, 2014, `JMLR 15 <https://jmlr.org/papers/v15/srivastava14a.html>`_.
# - O. Press, L. Wolf: Using the output embedding to improve language models, 2017,
#   `arXiv:1608.05859 <https://arxiv.org/abs/1608.05859>`_: tied weights.
# - Threads about these limits: batch norm "not compatible with vmap",
#   `torch_blue#61 <https://github.com/RAI-SCC/torch_blue/issues/61>`_, and the patch
#   for ``vmap`` over samples, `functorch#505
#   <https://github.com/pytorch/functorch/pull/505>`_; dropout in an ensemble,
#   `pytorch/rl#1935 <https://github.com/pytorch/rl/issues/1935>`_; random numbers that
#   repeat, `functorch#408 <https://github.com/pytorch/functorch/issues/408>`_.
