"""
A tolerance for loop and vmap when allclose fails
=================================================

Tell rounding from a mistake when an ensemble in one call of ``torch.func.vmap`` differs
from the loop over its members: a tolerance in three lines, and float64 as the judge.

**In short.** Loop and ``vmap`` may add the same products in different orders, so that
their last digits differ: rounding, and no bug. Compare both in float64, where rounding
all but vanishes and a mistake stays; a test that has to run in float32 needs a
tolerance that grows with the dtype's rounding and with the largest logit.

**On an NVIDIA GPU since the A100**, convolutions shorten float32 to TF32 `by default
<https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html>`_: compare in IEEE
float32, as this page does.

**Before you start**, read ``plot_ensembling.py``, which builds such an ensemble.
"""

# %%
# Set-up
# ------

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
conv.fp32_precision = matmul.fp32_precision = "ieee"
print(f"{device.type}, torch {torch.__version__}, float32 is IEEE float32")

# %%
# An ensemble of three linear layers, in two ways, and 16 inputs that they share. Put
# your own two functions in their place:


def plain_loop(x, weights, biases):
    rows = zip(weights, biases, strict=True)
    return torch.stack([F.linear(x, w, b) for w, b in rows])


def one_call(x, weights, biases):
    return vmap(F.linear, in_dims=(None, 0, 0))(x, weights, biases)


state = [torch.randn(3, 128, 9216).to(device), torch.randn(3, 128).to(device)]
x = torch.randn(16, 9216).to(device)

# %%
# Copy this: float64 decides, and a tolerance for float32
# -------------------------------------------------------
#
# For the tolerance, count the layers with weights, and the products behind one number
# in the widest of them (inputs of a linear layer, channels times kernel size of a
# convolution).


def tolerance(looped, num_layers, longest_sum, u=None):
    """How far apart two correct computations of the same logits may be."""
    u = u or torch.finfo(looped.dtype).eps / 2  # in TF32: u=2**-11
    relative = 4 * num_layers * u + longest_sum**0.5 * min(u, 2**-24)
    return 2 * relative * looped.abs().max().item()


in64 = [tensor.cpu().double() for tensor in (x, *state)]
looped, vectorized = plain_loop(*in64), one_call(*in64)
distance, largest = (vectorized - looped).abs().max(), looped.abs().max()
print(f"float64: {distance:.1e} apart, the largest logit is {largest:.0f}")
assert distance <= 1e-10 * max(1, largest), "vmap is not the loop, in float64"

looped, vectorized = plain_loop(x, *state), one_call(x, *state)
atol = tolerance(looped, num_layers=1, longest_sum=9216)
print(f"float32: {(vectorized - looped).abs().max():.1e} apart, tolerance {atol:.1e}")
torch.testing.assert_close(
    vectorized, looped, atol=atol, rtol=0, msg="vmap is off by more than rounding"
)

# %%
# **If float64 refuses, it is no rounding.** Look for a forgotten ``eval()`` (dropout,
# batch norm), members in another order, a wrong ``in_dims``. **If float32 alone
# refuses**, look for autocast on one side and for TF32. What is left is cancellation:
# where large terms cancel, as with inputs far from zero, rounding exceeds both bounds
# in correct code as well. Normalize such inputs.
#
# An Apple GPU has no float64, so float64 runs on the CPU here. Where your program uses
# TF32, ask for IEEE float32 for the comparison alone:
#
# .. code-block:: python
#
#    before = conv.fp32_precision, matmul.fp32_precision
#    conv.fp32_precision = matmul.fp32_precision = "ieee"
#    distance = (one_call(x, *state) - plain_loop(x, *state)).abs().max()
#    conv.fp32_precision, matmul.fp32_precision = before
#
# Three networks, before and after training
# -----------------------------------------
#
# The network of ``plot_ensembling.py``: four layers, the longest sum of 9216 products.


class SimpleCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):  # [images, 1, 28, 28]
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc2(x)  # [images, 10]


with torch.device("meta"):
    skeleton = SimpleCNN()

# %%
# A plain loop trains three of them until they have memorized 32 images.

models = [SimpleCNN().to(device) for _ in range(3)]
fresh, _ = stack_module_state(models)
images = torch.randn(32, 1, 28, 28).to(device)
labels = torch.randint(10, (32,)).to(device)
optimizer = torch.optim.Adam([p for m in models for p in m.parameters()], lr=1e-3)
for _ in range(40):
    optimizer.zero_grad()
    sum(F.cross_entropy(m(images), labels) for m in models).backward()
    optimizer.step()
trained, _ = stack_module_state(models)
states = {"fresh": fresh, "trained": trained}
images = images[:16]

# %%
# The function of one member, and the plain loop:


@torch.no_grad()
def predict(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


def loop_over(function, params, *shared):
    """What vmap computes in one call, one member after the other."""
    rows = zip(*params.values(), strict=True)
    members = [dict(zip(params, row, strict=True)) for row in rows]
    return torch.stack([function(member, *shared) for member in members])


# %%
# A fixed 1e-6 can fail when the logits grow
# ------------------------------------------
#
# The **unit roundoff** *u* is the largest relative error of storing one number. The
# error of a logit is some *u* times the largest logit, which grows in training.

precisions = {"bfloat16": (device, torch.bfloat16), "float16": (device, torch.float16)}
precisions |= {"TF32": (device, torch.float32)} if device.type == "cuda" else {}
precisions |= {"float32": (device, torch.float32), "float64": ("cpu", torch.float64)}

pairs, distances, limits = {}, {}, {}
print("state    precision  largest  distance  at 1e-6  tolerance")
for state, params in states.items():
    for name, to in precisions.items():
        mode, u = ("tf32", 2**-11) if name == "TF32" else ("ieee", None)
        conv.fp32_precision = matmul.fp32_precision = mode
        stacked = {n: p.cpu().to(*to) for n, p in params.items()}
        x = images.cpu().to(*to)
        a = loop_over(predict, stacked, x)
        b = vmap(predict, in_dims=(0, None))(stacked, x)
        key = state, name
        pairs[key], limits[key] = (a, b), tolerance(a, 4, 9216, u)
        apart = a.cpu().double() - b.cpu()
        distances[key] = apart.abs().max().item()
        fixed = torch.allclose(a, b, atol=1e-6, rtol=1e-6)
        print(f"{state:8} {name:9} {a.abs().max():8.2f}   {distances[key]:.1e}", end="")
        print(f"{'passes' if fixed else 'fails':>9}    {limits[key]:.1e}")

used = max(distances[key] / limits[key] for key in limits)
print(f"derived tolerance: {'passes' if used <= 1 else 'fails'}, {used:.0%} of it used")
error = max(distances["fresh", "float64"], distances["trained", "float64"])
assert error <= 1e-10, f"vmap is not the loop: {error:.1e} apart in float64"
print(f"float64: {error:.1e} apart, so loop and vmap are the same function")

# %%
# **Where 1e-6 fails in float32**, nothing need be wrong: compare the distance with the
# derived tolerance. **Where it passes**, the logits are small, or both sides happened
# to add in the same order. The last line is the proof, for these inputs.
#
# Where the three lines come from
# -------------------------------
#
# A layer rounds each number at most four times to the stored precision (two factors,
# their sum, the sum with the bias); *d* layers, :math:`4\,d\,u`. The *k* additions are
# kept in float32 or better. Each errs by at most :math:`\min(u, 2^{-24})` times a
# partial sum, and *k* errors of random sign add up to about :math:`\sqrt{k}` times one:
#
# .. math::
#
#    e = \left(4\,d\,u + \sqrt{k}\,\min(u, 2^{-24})\right) \max |y|
#
# Two sides are apart by twice that. The largest logit sets the scale, because one near
# zero inherits the errors of larger terms. This is an estimate: the proven worst case
# has *k* for :math:`\sqrt{k}` (Higham), and a GPU may add 16-bit products in 16 bits.
#
# Which wrong weight does a comparison notice?
# --------------------------------------------
#
# Make one weight of member 0 wrong by 10%, 48 random weights of each layer in turn, and
# see how far the logits move in float64. Expect a difference: a weight of ``conv1`` is
# used at 676 positions of an image, a weight of ``fc1`` once.


def moves(params, name):
    """How far wrong weights move the logits, without those that move none."""
    member = {n: p[0].detach().cpu().double() for n, p in params.items()}
    x = images.cpu().double()
    right, results = predict(member, x), []
    for i in torch.randint(member[name].numel(), (48,)).tolist():
        wrong = member[name].clone()
        wrong.view(-1)[i] *= 1.1
        logits = predict(member | {name: wrong}, x)
        results.append((logits - right).abs().max().item())
    return torch.tensor([result for result in results if result > 0])


# %%
# A weight that moves no logit meets only zeros behind a ReLU, and no comparison on
# these images notices it. How many of the others move one by more than the tolerance?

layers = {n: p[0].numel() for n, p in fresh.items() if n.endswith("weight")}
moved = {}
print("wrong weights that move a logit, of 48, and how many of these are noticed by")
print("state   layer        of all  move a logit  float64  float32  TF32 tolerance")
for state, params in states.items():
    bounds = 1e-10, limits[state, "float32"], limits[state, "float16"]  # u of TF32
    for name, size in layers.items():
        by = moved[state, name] = moves(params, name)
        share, noticed = size / sum(layers.values()), [(by > b).sum() for b in bounds]
        print(f"{state:8}{name:12}{share:7.2%}{len(by):14}", end="")
        print("".join(f"{number:9}" for number in noticed))

# %%
# **Float32 notices a weight that is used often, and can miss one in the layer that
# holds nearly all weights**, most of all after training: the tolerance grows with the
# largest logit, the effect of one weight need not. Float64 notices more because
# rounding shrinks with the precision and a mistake does not:

rounding = [distances["trained", name] for name in precisions]
allowed = [limits["trained", name] for name in precisions]
a, _ = pairs["trained", "float64"]
levels = {
    "exchanged members": (a[0] - a[1]).abs().max().item(),
    "a weight of conv1": moved["trained", "conv1.weight"].median().item(),
    "a weight of fc1": moved["trained", "fc1.weight"].median().item(),
}
fig, ax = plt.subplots(layout="constrained")
ax.semilogy(list(precisions), allowed, "C1_", ms=32, mew=3, label="tolerance")
ax.semilogy(list(precisions), rounding, "C0o", label="loop and vmap apart")
for text, level in levels.items():
    ax.axhline(level, color="C2", linestyle="--", linewidth=1)
    ax.text(len(rounding) - 0.4, level, text, color="C2", va="center")
ax.set_title(f"Mistakes above the tolerance are noticed\ntrained models, {device.type}")
ax.set_xlabel("precision of both sides")
ax.set_ylabel("largest change of a logit")
ax.set_xlim(-0.5, len(rounding) - 0.5)
ax.legend(loc="lower left")
sizes = dict(zip(precisions, allowed, strict=True)) | levels
sizes = "; ".join(f"{key} {size:.0e}" for key, size in sizes.items())
fig.set_label(
    "Tolerance by precision, above the distance of loop and vmap, and mistakes, which "
    f"have one size in all precisions: {sizes}."
)

# %%
# Training amplifies rounding, in the loop as well
# ------------------------------------------------
#
# Trained in a loop and in one call, the weights agree to few digits: is that a bug?
# Each step starts from what earlier steps have rounded, and training amplifies it. Four
# small networks learn two spirals:


def make_mlp():
    hidden = nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()
    return nn.Sequential(*hidden, nn.Linear(32, 1))


start, _ = stack_module_state([make_mlp().to(device) for _ in range(4)])
with torch.device("meta"):
    mlp = make_mlp()

targets = torch.arange(100) % 2  # the arm of the spiral
radius = torch.rand(100).sqrt()
angle = torch.pi * (3 * radius + targets)
points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def member_loss(params, x, y):
    logits = functional_call(mlp, params, (x,), strict=True).squeeze(-1)
    return F.binary_cross_entropy_with_logits(logits, y)


# %%
# One training, in a loop or in one call:


def train(way, place, dtype, move=0.0):
    """All weights after 200 steps, in float64."""
    params = {n: p.detach().cpu().to(place, dtype, copy=True) for n, p in start.items()}
    for p in params.values():
        p.add_(move * torch.randn_like(p)).requires_grad_()
    optimizer = torch.optim.Adam(params.values(), lr=0.01)
    x, y = points.to(place, dtype), targets.to(place, dtype)
    for _ in range(200):
        optimizer.zero_grad()
        if way == "vmap":
            losses = vmap(member_loss, in_dims=(0, None, None))(params, x, y)
        else:
            losses = loop_over(member_loss, params, x, y)
        losses.sum().backward()
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in params.values()])
    return weights.cpu().double()


# %%
# The loop alone shows how much training amplifies: run it in float64 once more, from
# weights that are moved by about 1e-9.

loop32, vmap32 = (train(way, device, torch.float32) for way in ("loop", "vmap"))
loop64, vmap64 = (train(way, "cpu", torch.float64) for way in ("loop", "vmap"))
nudged = train("loop", "cpu", torch.float64, move=1e-9)
growth = (nudged - loop64).abs().max() / 1e-9
error = (vmap64 - loop64).abs().max()
print(f"200 steps of Adam amplify about {growth:.0e} times. Weights apart in the end:")
print(f"loop and vmap, float32:     {(vmap32 - loop32).abs().max():.0e}")
print(f"loop, float32 and float64:  {(loop32 - loop64).abs().max():.0e}")
print(f"loop and vmap, float64:     {error:.0e}")
assert error <= 1e-10, f"vmap trains other weights, {error:.1e} apart"

# %%
# **Where the first two distances are alike**, the loop is as far from its own float64
# run as from ``vmap``: the price of float32. Float64 decides, because there the same
# growth starts from errors of 1e-16. Amplified a million times these reach 1e-10, in
# correct code: then compare after fewer steps.
#
# The mistake: a relative tolerance alone
# ---------------------------------------
#
# ``numpy.testing.assert_allclose`` has ``atol=0`` unless you say otherwise:

in_loop, in_one = (logits.cpu().numpy() for logits in pairs["fresh", "float32"])
try:
    np.testing.assert_allclose(in_one, in_loop, rtol=1e-5)
except AssertionError as problem:
    print(*str(problem).split("\n")[1:4], sep="\n")
worst = (abs(in_one - in_loop) / abs(in_loop)).argmax()
size = abs(in_loop).max()
print(f"worst: a logit of {in_loop.flat[worst]:.0e}; the largest is {size:.0e}")

# %%
# The worst is a logit near zero. Give an ``atol`` that knows the largest one.
#
# Remember
# --------
#
# Different last digits are rounding. Prove equality in float64, within 1e-10 of the
# largest logit. A tolerance for float32 scales with the precision and the largest
# logit; it notices exchanged members and weights that are used often, not every weight.
#
# Next
# ----
#
# - ``plot_memory.py``: what one call costs in memory, and how chunks help.
#
# References
# ----------
#
# - B. Dawson, `Comparing floating point numbers
#   <https://randomascii.wordpress.com/2012/02/25/comparing-floating-point-numbers-2012-edition/>`_,
#   2012.
# - N. J. Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd edition, 2002,
#   `doi:10.1137/1.9780898718027 <https://doi.org/10.1137/1.9780898718027>`_, section
#   2.8 and chapter 3.
# - `functorch#1050 <https://github.com/pytorch/functorch/issues/1050>`_: errors of 0.11
#   on an A100 were TF32.
