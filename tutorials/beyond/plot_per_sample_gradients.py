"""
Per-sample gradients
====================

Compute the gradient of the loss for each sample of a batch with one call of
``torch.func.vmap``, clip each by its own norm, and look for wrong labels with them.

**In short.** Write the loss of *one* sample as a function of the parameters;
``vmap(grad(loss), in_dims=(None, None, 0, 0))`` returns a gradient for each sample.
All of them together hold samples x parameters numbers: if you need only their norms,
return norms and set ``chunk_size``, and for linear layers form no gradients at all.

Before you start: the `PyTorch basics
<https://docs.pytorch.org/tutorials/beginner/basics/intro.html>`_. You need no GPU.
"""

# %%
# Set-up
# ------
#
# Handwritten digits of 8 by 8 pixels and a small network:

import copy
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.benchmark import timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
cuda = device.type == "cuda"
device_name = torch.cuda.get_device_name() if cuda else device.type.upper()

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)
labels = torch.tensor(digits.target, device=device)  # [1797]
x, y = images[:512], labels[:512]  # [512, 64], [512]


def make_model():
    layers = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)
    return nn.Sequential(*layers).to(device)


model = make_model()
threads = torch.get_num_threads()
print(f"{device_name}, {threads} CPU threads, torch {torch.__version__}, float32")

# %%
# The gradients of all samples in one call
# ----------------------------------------
#
# The lines to copy, for any ``model`` that treats samples separately:

params = {name: p.detach() for name, p in model.named_parameters()}
buffers = dict(model.named_buffers())


def sample_loss(params, buffers, x, y):  # of one sample: x [64], y []
    state = (params, buffers)
    logits = functional_call(model, state, (x[None],), strict=True)  # [1, 10]
    return F.cross_entropy(logits, y[None])


every_gradient = vmap(grad(sample_loss), in_dims=(None, None, 0, 0))
gradients = every_gradient(params, buffers, x, y)
for name, g in gradients.items():
    print(f"{name:9} {list(g.shape)}")

# %%
# The first dimension counts the samples. ``in_dims`` says that they share parameters
# and buffers (``None``) and that each has its own ``x`` and ``y`` (0). Inside, a sample
# has no batch dimension; ``x[None]`` adds the one that modules expect. Dropout needs
# ``vmap(..., randomness="different")``.
#
# The same with a loop
# --------------------
#
# Keep this check in your own project: some samples, one after the other with an
# ordinary ``backward``, in float64 on the CPU, where rounding is far below any mistake.

model64 = copy.deepcopy(model).cpu().double()
x64, y64 = x.cpu().double(), y.cpu()
params64 = {name: p.detach() for name, p in model64.named_parameters()}
buffers64 = dict(model64.named_buffers())
gradients64 = every_gradient(params64, buffers64, x64, y64)

off = 0.0
for i in range(32):
    model64.zero_grad()
    F.cross_entropy(model64(x64[i : i + 1]), y64[i : i + 1]).backward()
    for name, p in model64.named_parameters():
        off = max(off, (gradients64[name][i] - p.grad).abs().max().item())
assert off < 1e-10, f"vmap does not compute the gradients of the loop: {off:.0e} apart"
print(f"32 samples, vmap and loop: at most {off:.0e} apart in float64")

# %%
# Clip the gradient of each sample
# --------------------------------
#
# ``clip_grad_norm_`` bounds the gradient of the *batch*. To bound what a single sample
# can do to a step, clip each gradient by its norm over all parameters, then average:


def clipped_mean(gradients, max_norm):
    squares = [g.flatten(1).square().sum(1) for g in gradients.values()]
    norms = sum(squares).sqrt()  # [512]
    factors = (max_norm / norms.clamp(min=1e-12)).clamp(max=1)
    mean = {k: torch.tensordot(factors, g, 1) / len(g) for k, g in gradients.items()}
    return mean, norms


mean, norms = clipped_mean(gradients, max_norm=3.0)
share = (norms > 3).float().mean()
print(f"norms {norms.min():.2f} to {norms.max():.2f}; {share:.0%} of them are clipped")
for name, p in model.named_parameters():
    p.grad = mean[name]  # now call optimizer.step()

# %%
# Privacy (DP-SGD) needs noise, batches drawn at random and an account of what leaks,
# too: take `Opacus <https://opacus.ai>`_.
#
# If you need only the norms
# --------------------------
#
# Let the mapped function return a norm, and the batch go through ``vmap`` in chunks:
# then the gradients of only one chunk exist at a time.


def sample_norm(params, buffers, x, y):
    gradient = grad(sample_loss)(params, buffers, x, y)
    return sum(g.square().sum() for g in gradient.values()).sqrt()


def norms_by_vmap(params, buffers, x, y, chunk_size=64):
    every = vmap(sample_norm, in_dims=(None, None, 0, 0), chunk_size=chunk_size)
    return every(params, buffers, x, y)


norms = norms_by_vmap(params, buffers, x, y)
print(list(norms.shape))

# %%
# Linear layers: norms and clipping without gradients
# ---------------------------------------------------
#
# Let a linear layer take the vector :math:`a` of a sample, and let :math:`\delta` be
# the gradient of the sample's loss with respect to the layer's output. The gradients
# are :math:`\delta a^T` for the weights and :math:`\delta` for the bias, so
#
# .. math::
#
#     \|\delta a^T\|^2 + \|\delta\|^2 = \|\delta\|^2 (\|a\|^2 + 1).
#
# **One ordinary backward pass of the batch** has all :math:`a` and :math:`\delta`.


def losses_and_norms(model, x, y):
    """Of each sample, for a Sequential whose parameters are all in Linear layers."""
    inputs, outputs = [], []
    for layer in model:
        known = isinstance(layer, nn.Linear) or not list(layer.parameters())
        if not known or getattr(layer, "inplace", False):
            raise TypeError(f"the formula is not for {layer}")
        inputs.append(x)
        x = layer(x)
        outputs.append(x)
    losses = F.cross_entropy(x, y, reduction="none")
    deltas = torch.autograd.grad(losses.sum(), outputs, retain_graph=True)
    squares = [
        d.square().sum(1) * (a.square().sum(1) + (layer.bias is not None))
        for layer, a, d in zip(model, inputs, deltas, strict=True)
        if isinstance(layer, nn.Linear)
    ]
    return losses, sum(squares).sqrt().detach()


# %%
# A second backward pass clips ("ghost clipping"): weight each loss by its factor, which
# is a constant (hence ``detach``). That gives the mean of the clipped gradients.

losses, norms64 = losses_and_norms(model64, x64, y64)
factors = (3.0 / norms64.clamp(min=1e-12)).clamp(max=1)
model64.zero_grad()
(factors * losses).mean().backward()

mean64, _ = clipped_mean(gradients64, max_norm=3.0)
apart = [(p.grad - mean64[k]).abs().max() for k, p in model64.named_parameters()]
off = max(apart).item()
assert off < 1e-10, f"clipping by formula and of each gradient: {off:.0e} apart"
print(f"clipped by formula and one by one: at most {off:.0e} apart in float64")

# %%
# Formulas for other layers (tested), and where they hold less than the gradient:
#
# - **Linear, one vector a sample**: always. The gradient has inputs x outputs numbers,
#   the formula needs inputs + outputs.
# - **Convolution, or Linear on a sequence**: the gradient is a sum over T positions.
#   Its squared norm is the sum of the products of two T x T tables: the dot products of
#   all :math:`a`, and of all :math:`\delta`. They hold less if :math:`2T^2` is below
#   the number of weights, mostly in late layers.
# - **Anything else**, such as a weight that two layers share: use ``vmap``.
#
# What it costs
# -------------
#
# The loop calls every operator for each sample, so it should be slow, and small chunks
# as well. ``vmap`` writes all gradients to memory and reads them again; the formula
# forms none.


def norms_by_loop(model, x, y):
    norms, weights = [], list(model.parameters())
    for xi, yi in zip(x.split(1), y.split(1), strict=True):
        g = torch.autograd.grad(F.cross_entropy(model(xi), yi), weights)
        norms.append(sum(t.square().sum() for t in g).sqrt())
    return torch.stack(norms)


def in_turns(*ways, seconds=1.0):
    """For each way: seconds of a call, gain over the first way, the gain's interval."""

    def clock(way, calls=1):
        start = timer()  # waits for a GPU
        for _ in range(calls):
            way()
        return (timer() - start) / calls

    calls = math.ceil(5e-3 / min(clock(way) for way in 3 * ways))  # the same for all
    turns, end = [], timer() + seconds
    while timer() < end or len(turns) < 7 or len(turns) % 2 == 0:
        back = (-1) ** len(turns)  # every second turn runs backwards
        turns.append([clock(way, calls) for way in ways[::back]][::back])
    times, cut = torch.tensor(turns).T, int((len(turns) - 1) / 2 - len(turns) ** 0.5)
    gains = (times[0] / times).sort().values[:, [len(turns) // 2, cut, -1 - cut]]
    first = times[0].median().item()
    return [(first / gain, gain, low, high) for gain, low, high in gains.tolist()]


def said(gain, low, high):
    """A gain in words; what noise can explain, up to 2 percent, is no difference."""
    if low > 1.02:
        return f"{gain:.3g}x faster ({low:.3g} to {high:.3g})"
    if high < 0.98:
        return f"{1 / gain:.3g}x slower ({1 / high:.3g} to {1 / low:.3g})"
    return f"no difference seen ({low:.2f} to {high:.2f})"


# %%
# The norms of 512 samples, warm: medians of at least seven turns, with the interval of
# the ratio in brackets. Beside the times: the gradients that exist at once. (The peak
# of ``vmap`` is up to twice as high, since squares are a second copy; the formula holds
# activations and their gradients instead, and both are tested.)

chunks = [4, 16, 64, 256]
times = in_turns(
    lambda: norms_by_vmap(params, buffers, x, y, 512),
    *[lambda k=k: norms_by_vmap(params, buffers, x, y, k) for k in chunks],
    lambda: losses_and_norms(model, x, y),
    lambda: norms_by_loop(model, x, y),
    seconds=3.0,
)

names = ["chunk_size=512", *(f"chunk_size={k}" for k in chunks), "formula", "loop"]
one = sum(p.nbytes for p in params.values()) / 1e6
print("way        gradients [MB]  median [ms]  against chunk_size=512")
for way, held, t in zip(names, [512, *chunks, 0, 1], times, strict=True):
    against = said(*t[1:]) if way != names[0] else ""
    print(f"{way:14} {held * one:10.2f} {t[0] * 1e3:12.2f}  {against}")

# %%
# The smallest chunks may be slower than the loop: each call pays for the work of
# ``vmap`` itself. **If no smaller chunk is faster** than all 512 samples at once, split
# only when memory runs out. **If one is**, chunks save time and memory together.
# **Measure your own CNN**: for a convolution,
# Opacus found that ``vmap`` took 4 times as long as its own hooks on a T4 GPU, and half
# as long on an A100 (`opacus#497 <https://github.com/meta-pytorch/opacus/pull/497>`_,
# 2022).
#
# Find mislabeled digits
# ----------------------
#
# We give one digit in ten a wrong label, and train. Such a label contradicts similar
# images, so its gradient should stay large while others shrink. **The rival is the
# loss**: it should stay large as well, and costs a forward pass. Train briefly: once a
# network knows the wrong labels by heart, both find fewer (tested).


def find_flipped(seed, share=0.1):
    torch.manual_seed(seed)
    flipped = (torch.rand(len(labels)) < share).to(device)
    shift = torch.randint(1, 10, (len(labels),)).to(device)
    given = torch.where(flipped, (labels + shift) % 10, labels)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):  # the whole set in each step
        optimizer.zero_grad()
        F.cross_entropy(model(images), given).backward()
        optimizer.step()
    trained = {name: p.detach() for name, p in model.named_parameters()}
    norms = norms_by_vmap(trained, {}, images, given)
    losses = F.cross_entropy(model(images), given, reduction="none").detach()
    return [t.cpu() for t in (flipped, given, norms, losses)]


# %%
# Ten runs, each with other flips and another network. Look at as many images, those of
# highest score, as labels are flipped: which share of the flipped ones is among them?

found = []
for seed in range(10):
    flipped, _, *scores = find_flipped(seed)
    tops = [score.topk(int(flipped.sum())).indices for score in scores]
    found.append([flipped[top].float().mean() for top in tops])

norm, loss = torch.tensor(found).T
gap, error = (norm - loss).mean(), (norm - loss).std() / 10**0.5
verdict = "better" if gap > 0 else "worse"
if gap.abs() <= 2.3 * error:  # Student's t for ten runs, 95 %
    verdict = "neither better nor worse"
print(f"found by gradient norm {norm.mean():.1%}, by loss {loss.mean():.1%}:")
print(f"the norm is {verdict} ({gap:+.2%}, standard error {error:.2%})")

# %%
# The first run: the largest norms, the largest of right labels ("false alarms") and the
# smallest of wrong ones ("missed").

flipped, given, norms, _ = find_flipped(0)
order = norms.argsort(descending=True)
right, wrong = order[~flipped[order]], order[flipped[order]]
n = len(wrong)
print(f"{flipped[order[:n]].sum()} of {n} wrong labels are among the {n} largest norms")

rows = {"largest": order[:8], "false alarms": right[:8], "missed": wrong[-8:]}
fig, axes = plt.subplots(3, 8, figsize=(8, 4), layout="constrained")
for line, (name, row) in zip(axes, rows.items(), strict=True):
    line[0].set_ylabel(name)
    for ax, i in zip(line, row.tolist(), strict=True):
        ax.imshow(digits.images[i], cmap="gray_r")
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{labels[i]} as {given[i]}")
fig.suptitle(f"Digits and the labels given to them, by norm; {device_name}, float32")
fig.set_label(
    "Eight digits with the largest gradient norms, the eight right labels with the "
    "largest, and the eight wrong ones with the smallest, each with its label."
)

# %%
# **If the norm is not better**, take the loss: you have it anyway. No wonder: the last
# layer's gradient has the norm :math:`\|p - e\| \sqrt{\|a\|^2 + 1}`, with the predicted
# probabilities :math:`p` and the one-hot label :math:`e`; and :math:`\|p - e\|` ranks
# images much like the loss.
#
# What a loss cannot replace is a gradient to clip, or its direction, which tells which
# training images help with a given test image.
#
# The mistake: batch norm
# -----------------------
#
# In train mode, batch norm uses the statistics of the batch. **The gradient of a sample
# then depends on the other samples**, and inside of ``vmap`` there are none:

layers = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 10)
normed = nn.Sequential(*layers).to(device)


def normed_loss(params, buffers, x, y):
    logits = functional_call(normed, (params, buffers), (x[None],), strict=True)
    return F.cross_entropy(logits, y[None])


own, statistics = dict(normed.named_parameters()), dict(normed.named_buffers())
try:
    vmap(grad(normed_loss), in_dims=(None, None, 0, 0))(own, statistics, x, y)
except ValueError as error:
    print(error)

# %%
# ``BatchNorm2d`` says "Batch norm got a batched tensor"; with
# ``track_running_stats=False`` it says **nothing**, and normalizes each image by itself
# (tested). Use ``GroupNorm`` or ``LayerNorm``; or ``normed.eval()``, if the statistics
# may stay as they are. (Members of an ensemble have a batch each: ``plot_state.py``.)
#
# Remember
# --------
#
# ``vmap(grad(loss))`` **over samples returns one gradient for each, as a loop would.**
# Return from inside only what you need, and bound the memory by ``chunk_size``. Where
# layers are linear, two backward passes clip every sample without forming a gradient.
#
# Next
# ----
#
# - ``plot_jacobians_and_hessians.py``: derivatives of more than one number.
# - ``plot_memory.py``: what ``chunk_size`` bounds, and what it does not.
#
# References
# ----------
#
# - PyTorch: `Per-sample gradients
#   <https://docs.pytorch.org/tutorials/intermediate/per_sample_grads.html>`_.
# - M. Abadi et al.: Deep learning with differential privacy, 2016,
#   `arXiv:1607.00133 <https://arxiv.org/abs/1607.00133>`_.
# - I. Goodfellow: Efficient per-example gradient computations, 2015,
#   `arXiv:1510.01799 <https://arxiv.org/abs/1510.01799>`_: the formula.
# - X. Li et al., 2021, `arXiv:2110.05679 <https://arxiv.org/abs/2110.05679>`_: ghost
#   clipping. For convolutions: `arXiv:2205.10683 <https://arxiv.org/abs/2205.10683>`_.
# - G. Pruthi et al., 2020, `arXiv:2002.08484 <https://arxiv.org/abs/2002.08484>`_:
#   norms that find wrong labels, directions that explain predictions.
