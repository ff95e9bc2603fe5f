"""
Per-sample gradients
====================

Compute the gradient of the loss for each sample of a batch with one call of
``torch.func.vmap``, also for embeddings and attention, and clip each by its own norm.

**In short.** Write the loss of *one* sample as a function of the parameters;
``vmap(grad(loss), in_dims=(None, None, 0, 0))`` returns a gradient for each sample. All
of them together hold samples x parameters numbers. If you need only their norms, return
norms and set ``chunk_size``. Where each parameter is in one call of a linear layer, an
embedding or a layer norm (not ``nn.MultiheadAttention``), two backward passes of the
batch give the clipped mean.

**Before you start**, know the `PyTorch basics
<https://docs.pytorch.org/tutorials/beginner/basics/intro.html>`_.
"""

# %%
# Set-up
# ------

import copy
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, grad, vmap
from torch.utils.benchmark import timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")

# %%
# The gradients of all samples in one call
# ----------------------------------------
#
# The lines to copy, for any ``model`` that treats samples separately. Inside, a sample
# has no batch dimension; ``x[None]`` adds the one that modules expect. ``in_dims`` says
# that the samples share parameters and buffers (``None``), and that each has its own
# ``x`` and ``y`` (0). Dropout needs ``vmap(..., randomness="different")``.


def sample_loss(params, buffers, x, y):  # of one sample
    logits = functional_call(model, (params, buffers), (x[None],), strict=True)
    return F.cross_entropy(logits, y[None])


every_gradient = vmap(grad(sample_loss), in_dims=(None, None, 0, 0))

# %%
# An embedding and attention
# --------------------------
#
# Handwritten digits as sequences of 32 tokens. A token is one of 1,056: the place of a
# pair of pixels, and its brightness, 0 to 32.

digits = load_digits()
pairs = torch.tensor(digits.data).long().unflatten(1, (32, 2)).sum(2)  # [1797, 32]
tokens = pairs + 33 * torch.arange(32)
images, labels = tokens.to(device), torch.tensor(digits.target, device=device)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):  # [batch, tokens, width]
        qkv = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, tokens, head width]
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.attention = nn.Embedding(33 * 32, 64), Attention(64, 4)
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x):  # [batch, tokens]
        return self.head(self.attention(self.embedding(x)).mean(1))


# %%

model = Classifier().to(device)
params = {name: p.detach() for name, p in model.named_parameters()}
buffers = dict(model.named_buffers())
x, y = images[:128], labels[:128]
gradients = every_gradient(params, buffers, x, y)
for key, g in gradients.items():
    print(f"{key:22} {list(g.shape)}")

# %%
# The first dimension counts the samples. **PyTorch's own attention**, such as
# ``nn.MultiheadAttention``, runs under ``vmap``, too. Where PyTorch warns of a
# "performance drop", make the call in ``with sdpa_kernel(SDPBackend.MATH)`` of
# ``torch.nn.attention`` (tested). Where a mask raises "data-dependent control flow" in
# Hugging Face's code, ``attn_implementation="eager"`` helped BERT in 2024 (`trak#78
# <https://github.com/MadryLab/trak/pull/78>`_). Switch off checkpointing inside a model
# (`pytorch#165880 <https://github.com/pytorch/pytorch/issues/165880>`_).
#
# The same with a loop
# --------------------
#
# Keep this check in your own project: some samples, one after the other with an
# ordinary ``backward``, in float64 on the CPU.

model64 = copy.deepcopy(model).cpu().double()
x_cpu, y_cpu = x.cpu(), y.cpu()
params64 = {name: p.detach() for name, p in model64.named_parameters()}
gradients64 = every_gradient(params64, {}, x_cpu, y_cpu)

apart = []
for i in range(16):
    model64.zero_grad()
    F.cross_entropy(model64(x_cpu[i : i + 1]), y_cpu[i : i + 1]).backward()
    for key, p in model64.named_parameters():
        apart.append((gradients64[key][i] - p.grad).abs().max())
off = torch.stack(apart).max().item()  # a nan stays one
assert off < 1e-10, f"vmap does not compute the gradients of the loop: {off:.0e} apart"
print(f"16 samples, vmap and loop: at most {off:.0e} apart in float64")

# %%
# Clip the gradient of each sample
# --------------------------------
#
# ``clip_grad_norm_`` bounds the gradient of the *batch*. To bound what a single sample
# adds to the mean gradient, clip each gradient by its norm over all parameters, then
# average:


def clipped_mean(gradients, max_norm):
    squares = [g.flatten(1).square().sum(1) for g in gradients.values()]
    norms = sum(squares).sqrt()  # [128]
    factors = (max_norm / norms.clamp(min=1e-12)).clamp(max=1)
    mean = {k: torch.tensordot(factors, g, 1) / len(g) for k, g in gradients.items()}
    return mean, norms


optimizer, max_norm = torch.optim.Adam(model.parameters()), 1.5
for rows in torch.randperm(1797)[:1280].to(device).split(128):
    gradients = every_gradient(params, buffers, images[rows], labels[rows])
    mean, norms = clipped_mean(gradients, max_norm)
    for key, p in model.named_parameters():
        p.grad = mean[key]  # DP-SGD adds its noise here
    optimizer.step()  # in place: ``params`` follow

# %%
# Privacy (DP-SGD) needs noise, batches drawn at random and an account of what leaks,
# too: take `Opacus <https://opacus.ai>`_. The figure shows the last batch:

whole = sum(g.mean(0).square().sum() for g in gradients.values()).sqrt().item()
other = "would clip it" if whole > max_norm else "would not clip it"
found = (
    f"{(norms > max_norm).sum()} of {len(norms)} gradients are longer than {max_norm}. "
    f"The norm of their mean is {whole:.2f}: clip_grad_norm_ {other}"
)
print(found)

fig, ax = plt.subplots(layout="constrained")
ax.hist(norms.cpu(), bins=30)
ax.axvline(max_norm, color="C1", linestyle="--", label="max_norm")
ax.axvline(whole, color="C2", label="norm of the mean gradient")
ax.set_title(f"Gradients of {len(norms)} samples, {name}, float32")
ax.set_xlabel("norm of a sample's gradient")
ax.set_ylabel("samples")
ax.legend()
fig.set_label(
    "Histogram of the norms of the gradients of single samples, with lines at max_norm "
    f"and at the norm of their mean. {found}."
)

# %%
# If you need only the norms
# --------------------------
#
# Let the mapped function return a norm, and split the batch into chunks: then the
# gradients of only one chunk exist at a time.


def sample_norm(params, buffers, x, y):
    gradient = grad(sample_loss)(params, buffers, x, y)
    return sum(g.square().sum() for g in gradient.values()).sqrt()


def norms_by_vmap(params, buffers, x, y, chunk_size=16):
    every = vmap(sample_norm, in_dims=(None, None, 0, 0), chunk_size=chunk_size)
    return every(params, buffers, x, y)


norms = norms_by_vmap(params, buffers, x, y)
print(list(norms.shape))

# %%
# Norms and clipping without gradients
# ------------------------------------
#
# Let a linear layer take the vector :math:`a_t` at position :math:`t`, and let
# :math:`\delta_t` be the gradient of the sample's loss with respect to its output
# there. The gradient of the weights is :math:`\sum_t \delta_t a_t^T`, its squared norm
#
# .. math::
#
#     \sum_{s,t} (a_s \cdot a_t) (\delta_s \cdot \delta_t).
#
# **One pass of the batch**, forward for all :math:`a` and backward for all
# :math:`\delta`, is enough. An embedding is a linear layer of one-hot vectors:
# :math:`a_s \cdot a_t` is 1 for equal tokens, otherwise 0. A layer norm has so few
# parameters that its gradient is formed.


def squares_of(layer, a, d):
    """Squared norm of a layer's gradient, for each sample."""
    if isinstance(layer, nn.Embedding):
        return ((a[:, :, None] == a[:, None]) * (d @ d.mT)).sum((1, 2))
    a, d = [t.reshape(len(t), -1, t.shape[-1]) for t in (a, d)]  # [batch, T, ...]
    bias = 0 if layer.bias is None else d.sum(1).square().sum(1)
    if isinstance(layer, nn.LayerNorm):
        scaled = F.layer_norm(a, layer.normalized_shape, eps=layer.eps)
        return (d * scaled).sum(1).square().sum(1) + bias
    return ((a @ a.mT) * (d @ d.mT)).sum((1, 2)) + bias


# %%
# Hooks collect each :math:`a`, and the place of the output in the graph. All tensors
# must have the batch as their first dimension. A trainable parameter without a formula,
# or in two calls of layers, is refused, and so is an input without the batch (tested).
# Other uses, such as ``F.linear(x, layer.weight)``, and layers that mix samples, such
# as a batch norm without weights, are not seen.


def has_formula(layer):
    if isinstance(layer, nn.Embedding):
        return layer.padding_idx is None and not layer.scale_grad_by_freq
    if isinstance(layer, nn.LayerNorm):
        return layer.elementwise_affine and len(layer.normalized_shape) == 1
    return isinstance(layer, nn.Linear)


def losses_and_norms(model, x, y):
    calls, handles = [], []

    def keep(layer, inputs, output):
        calls.append((layer, inputs[0].detach(), get_gradient_edge(output)))

    for layer in filter(has_formula, model.modules()):
        if any(p.requires_grad for p in layer.parameters()):
            handles.append(layer.register_forward_hook(keep))
    losses = F.cross_entropy(model(x), y, reduction="none")
    for handle in handles:
        handle.remove()
    covered = [id(p) for layer, *_ in calls for p in layer.parameters()]
    if sorted(covered) != sorted(id(p) for p in model.parameters() if p.requires_grad):
        raise TypeError("not every trainable parameter is in one call with a formula")
    if any(len(a) != len(x) for _, a, _ in calls):
        raise TypeError("a layer's input lacks the batch as its first dimension")
    edges = [edge for *_, edge in calls]
    deltas = torch.autograd.grad(losses.sum(), edges, retain_graph=True)
    pairs = zip(calls, deltas, strict=True)
    squares = sum(squares_of(layer, a, d) for (layer, a, _), d in pairs)
    return losses, squares.sqrt().detach()


# %%
# A second backward pass clips ("ghost clipping"): each loss times its constant factor.
# Here: the first batch, with the weights before training.

losses, norms64 = losses_and_norms(model64, x_cpu, y_cpu)
factors = (max_norm / norms64.clamp(min=1e-12)).clamp(max=1)
model64.zero_grad()
(factors * losses).mean().backward()

mean64, _ = clipped_mean(gradients64, max_norm)
apart = [(p.grad - mean64[k]).abs().max() for k, p in model64.named_parameters()]
off = torch.stack(apart).max().item()
assert off < 1e-10, f"clipping by formula and of each gradient: {off:.0e} apart"
clipped = (factors < 1).sum()
print(f"{clipped} of 128 clipped: formula and vmap are {off:.0e} apart in float64")

# %%
# For T positions, two tables hold :math:`2T^2` numbers, and a gradient holds one for
# each weight: the formula suits short sequences and wide layers.
#
# What it costs
# -------------
#
# The norms of 128 samples, warm, in float32: the first time is a median of at least
# seven turns; the others follow from the median ratio to it, whose interval stands in
# brackets.


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


def norms_by_loop(model, x, y):
    norms, weights = [], list(model.parameters())
    for xi, yi in zip(x.split(1), y.split(1), strict=True):
        g = torch.autograd.grad(F.cross_entropy(model(xi), yi), weights)
        norms.append(sum(t.square().sum() for t in g).sqrt())
    return torch.stack(norms)


chunks = [4, 16, 64]
times = in_turns(
    lambda: norms_by_vmap(params, buffers, x, y, 128),
    *[lambda k=k: norms_by_vmap(params, buffers, x, y, k) for k in chunks],
    lambda: losses_and_norms(model, x, y),
    lambda: norms_by_loop(model, x, y),
    seconds=3.0,
)

names = ["chunk_size=128", *(f"chunk_size={k}" for k in chunks), "formula", "loop"]
one = sum(p.nbytes for p in params.values()) / 1e6
print("way        gradients [MB]    time [ms]  against chunk_size=128")
for way, held, t in zip(names, [128, *chunks, 0, 1], times, strict=True):
    against = said(*t[1:]) if way != names[0] else ""
    print(f"{way:14} {held * one:10.2f} {t[0] * 1e3:12.2f}  {against}")

# %%
# "Gradients" are those that exist at once, without the layer norm's in the formula. The
# peak of ``vmap`` is up to twice as high; that of the formula, which holds activations
# and tables, is between those of chunks of 16 and of 64 (tested on a CPU). **Where no
# difference is seen, take the smaller chunk**; take a slower one only when memory runs
# out. To clip, the formula needs a second backward pass, which is not in its time.
#
# The mistake: batch norm
# -----------------------
#
# In train mode, batch norm uses the statistics of the batch. **The gradient of a sample
# then depends on the other samples**, and inside ``vmap`` a sample is alone:

model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
model = model.to(device)
own, statistics = dict(model.named_parameters()), dict(model.named_buffers())
try:
    every_gradient(own, statistics, x / 1056, y)
except ValueError as error:
    print(error)

# %%
# With ``track_running_stats=False``, ``BatchNorm2d`` says **nothing**, and normalizes
# each image by itself (tested). Use ``GroupNorm`` or ``LayerNorm``, or ``model.eval()``
# if the statistics may stay as they are.
#
# Remember
# --------
#
# ``vmap(grad(loss))`` **over samples returns one gradient for each, as a loop would**,
# also for embeddings and attention. Return from inside only what you need, and bound
# the memory by ``chunk_size``. The formulas clip by two backward passes.
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
# - M. Abadi et al.: Deep learning with differential privacy, 2016, `arXiv:1607.00133
#   <https://arxiv.org/abs/1607.00133>`_.
# - I. Goodfellow: Efficient per-example gradient computations, 2015, `arXiv:1510.01799
#   <https://arxiv.org/abs/1510.01799>`_: the formula of one position.
# - X. Li et al., 2021, `arXiv:2110.05679 <https://arxiv.org/abs/2110.05679>`_: ghost
#   clipping of sequences.
