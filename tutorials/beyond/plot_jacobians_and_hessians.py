"""
Jacobians, Hessians and the curvature of each member's loss
===========================================================

Compute Jacobians, Hessians and Hessian-vector products with ``torch.func``, for each
point of a batch or each member of an ensemble in one call, and see what is cheapest.

**In short.** ``jacrev`` costs one backward pass for each output, ``jacfwd`` one forward
pass for each input, and a Hessian is one of them over ``jacrev``; its product with a
vector costs a few gradients and needs no Hessian. Each is written for *one* point or
*one* member, and ``vmap`` maps it over all.

Before you start: ``plot_ensembling.py`` explains ``vmap`` and ``functional_call``.
"""

# %%
# Set-up
# ------

import math
import warnings
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.autograd.functional as older  # for the check
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.benchmark import timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
double = {"device": "cpu", "dtype": torch.float64}  # an Apple GPU has no float64
name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{name}, torch {torch.__version__}, float64 on the CPU")
with warnings.catch_warnings(action="ignore"):  # the first jvp, on torch.jit.script
    jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))

# %%
# Jacobian, Hessian, Hessian-vector product
# -----------------------------------------
#
# The lines to copy: a network from 4 inputs to 3 outputs, and a scalar made of it.

net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).to(**double)
net.requires_grad_(False)  # we differentiate by the input, not by the weights
points, directions = torch.randn(2, 100, 4, **double)


def energy(x):  # of one point, [4] -> []
    return net(x).square().sum()


def hvp(f, x, v):
    """The Hessian of f at x, times v, without the Hessian."""
    return vjp(grad(f), x)[1](v)[0]


results = {
    "jacrev": vmap(jacrev(net))(points),  # [100, 3, 4]
    "jacfwd": vmap(jacfwd(net))(points),  # [100, 3, 4], the same
    "Hessian": vmap(jacfwd(jacrev(energy)))(points),  # [100, 4, 4]
    "product": vmap(partial(hvp, energy))(points, directions),  # [100, 4]
}
print(*[f"{way} {list(result.shape)}" for way, result in results.items()])

# %%
# ``vjp`` gives :math:`v^T J` without making :math:`J`. The Jacobian of a gradient is
# the Hessian, which is symmetric, so this is :math:`Hv`. ``torch.func.hessian(f)`` is
# short for ``jacfwd(jacrev(f))``. **Do not forget** ``vmap``: for
# ``jacrev(net)(points)`` the batch is one input, and you get ``[100, 3, 100, 4]``, 99%
# zeros (tested). For a loss of parameters, ``x`` and ``v`` of ``hvp`` may be
# dictionaries (tested).
#
# The same, point by point, without ``torch.func``
# ------------------------------------------------
#
# By default, ``torch.autograd.functional`` calls ``backward`` once for each output, and
# ``backward`` of ``backward`` for a Hessian.

jacobians = torch.stack([older.jacobian(net, x) for x in points])
hessians = torch.stack([older.hessian(energy, x) for x in points])
expected = {
    "jacrev": jacobians,
    "jacfwd": jacobians,
    "Hessian": hessians,
    "product": (hessians @ directions[:, :, None]).squeeze(2),
}
for way, result in results.items():
    off = (result - expected[way]).abs().max()
    assert off < 1e-10, f"{way} is not what repeated backward computes: {off:.1e} apart"
    print(f"{way:8} within {off:.0e} of repeated backward")

# %%
# ``jacrev`` or ``jacfwd``: compare outputs and inputs
# ----------------------------------------------------
#
# Take an MLP of ``n`` inputs, two hidden layers of ``h`` units and ``m`` outputs. A
# backward pass multiplies a vector by each weight matrix, and so does a forward pass of
# derivatives, from the other end: ``nh + hh + hm`` multiplications each. ``jacrev``
# sends ``m`` vectors back, ``jacfwd`` sends ``n`` forward (tested). So
#
# .. math::
#
#     \frac{\text{time of jacrev}}{\text{time of jacfwd}} \approx \frac{m}{n},
#
# and ``jacrev`` should win for fewer outputs than inputs. The count leaves out calling
# the operators, whose time hardly grows with ``m``: where the network is small for the
# device, expect a flatter line. An accelerator is timed in float32.


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


inputs, outputs = 64, [8, 16, 32, 64, 128, 256, 512]
hidden, size = (256, 4) if device == cpu else (2048, 64)
bits = "float64" if device == cpu else "float32"
timed = {"device": device, "dtype": getattr(torch, bits)}
batch = torch.randn(size, inputs, **timed)
middle = [nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()]
ratios, wins = [], []
for m in outputs:
    deep = nn.Sequential(nn.Linear(inputs, hidden), *middle, nn.Linear(hidden, m))
    deep.to(**timed).requires_grad_(False)
    ways = [partial(vmap(jacobian(deep)), batch) for jacobian in (jacrev, jacfwd)]
    forth, back = in_turns(*ways[::-1])
    ratios.append(1 / back[1])
    wins.append((back[2] > 1.02) - (back[3] < 0.98))  # -1: jacfwd, 0: not known
    a, b = (f"{way[0] * 1e3:5.1f}" for way in (back, forth))
    print(f"{m:3} outputs: jacrev {a} ms, jacfwd {b} ms, jacrev {said(*back[1:])}")

# %%
# Warm, each time the median of at least seven turns; brackets hold the interval of the
# ratio.

fig, ax = plt.subplots(layout="constrained")
counted = [m / inputs for m in outputs]
ax.loglog(counted, ratios, "C0o-", label="measured")
ax.loglog(counted, counted, "C1--", label="counted: m / n")
ax.axhline(1, color="gray", linewidth=1)
ax.text(counted[0], 1.1, "jacfwd is faster", va="bottom")
ax.text(counted[-1], 0.9, "jacrev is faster", va="top", ha="right")
for set_ticks in (ax.set_xticks, ax.set_yticks):
    set_ticks(counted, labels=[f"{c:g}" for c in counted])
ax.minorticks_off()
ax.set_title(f"Jacobian of an MLP, {inputs} inputs, {bits}\n{name}")
ax.set_xlabel("outputs / inputs")
ax.set_ylabel("time of jacrev / time of jacfwd")
ax.legend()
told = [
    win * (1 if c < 1 else -1) for win, c in zip(wins, counted, strict=True) if c != 1
]
print(
    f"In {len(told)} unequal cases the count is right {told.count(1)} times, wrong",
    end=" ",
)
print(f"{told.count(-1)} times; {told.count(0)} times no difference is seen.")
fig.set_label(
    "Time of jacrev over that of jacfwd, against outputs over inputs: from "
    f"{ratios[0]:.2f} at {counted[0]:g} to {ratios[-1]:.2f} at {counted[-1]:g}."
)

# %%
# **Few outputs for many inputs: jacrev. Many outputs for few inputs: jacfwd.** Where a
# call costs nearly the same for 8 vectors as for 16, the measured line is flatter than
# the counted one, and crosses 1 at another place: within a factor of four, measure your
# own function. If memory runs out, ``jacrev`` can split its work by ``chunk_size``.
#
# A loss has one output and many parameters, so take ``jacrev`` or ``grad``. The
# Jacobian of its gradient, the Hessian, has as many outputs as inputs: a tie, measured
# below.
#
# Sixteen members, each with its own learning rate
# ------------------------------------------------
#
# A Hessian of a loss is a matrix of parameters by parameters, so hold each member as
# *one vector*. The members learn 100 digits of 4 by 4 pixels by plain gradient descent,
# in float64 on the CPU.

digits = load_digits()
images = torch.tensor(digits.images[:100, None] / 16 - 0.3, **double)
x = F.avg_pool2d(images, 2).flatten(1)  # [100, 16]
y = F.one_hot(torch.tensor(digits.target[:100]), 10).to(**double)


def new_model():
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10))


with torch.device("meta"):
    skeleton = new_model()
shapes = {name: p.shape for name, p in skeleton.named_parameters()}


def predict(theta):  # of one member, [226] -> [100, 10]
    parts = theta.split([shape.numel() for shape in shapes.values()])
    params = {k: p.view(shapes[k]) for k, p in zip(shapes, parts, strict=True)}
    return functional_call(skeleton, params, (x,), strict=True)


def member_loss(theta):  # [226] -> []
    return F.mse_loss(predict(theta), y, reduction="sum") / len(y)


# %%

num_models, num_steps = 16, 2000
models = [new_model().to(**double) for _ in range(num_models)]
vectors = [nn.utils.parameters_to_vector(model.parameters()) for model in models]
start = torch.stack(vectors).detach()  # [16, 226]
rates = torch.logspace(-1.3, -0.3, num_models, **double)  # 0.05 to 0.5

theta = start.clone()
for _ in range(num_steps):
    theta -= rates[:, None] * vmap(grad(member_loss))(theta)

losses = vmap(member_loss)(theta)
finite = losses.isfinite()
low, high = losses[finite].aminmax()
print(f"losses after {num_steps} steps: {low:.2f} to {high:.2f}")

# %%
# How sharp is each member's loss?
# --------------------------------
#
# *Sharpness* is the largest eigenvalue of the Hessian, the curvature in the steepest
# direction. Power iteration finds it by products alone: multiply a vector by the
# Hessian again and again.


def sharpness(theta, steps=100):
    """Largest eigenvalue (by size) of each member's Hessian, [16]."""
    v = torch.randn_like(theta)
    for _ in range(steps):
        v = v / v.norm(dim=1, keepdim=True)
        product = vmap(partial(hvp, member_loss))(theta, v)  # [16, 226]
        value = (v * product).sum(dim=1)
        v = product
    return value


before, after = sharpness(start), sharpness(theta)

# %%
# The check: products by backward of backward, and all of the 226 eigenvalues.

v = torch.randn_like(theta)
products = vmap(partial(hvp, member_loss))(theta, v)
for i in range(num_models):
    alone = older.hvp(member_loss, theta[i], v[i])[1]
    off = (products[i] - alone).abs().max() / alone.abs().max()  # NaN: diverged
    assert not off > 1e-10, f"member {i} has another Hessian: {off:.1e} apart"

hessians = vmap(jacfwd(jacrev(member_loss)))(theta[finite])  # [..., 226, 226]
values = torch.linalg.eigvalsh(hessians)  # ascending
error = (after[finite] / values[:, -1] - 1).abs().max()
print(f"products equal; sharpness within {error:.0e} of the largest eigenvalue")
negative = (values[:, 0] < 0).sum()
print(f"{negative} of {len(values)} members have a negative eigenvalue,", end=" ")
print("{:.2f} to {:.2f}".format(*values[:, 0].aminmax()))

# %%
# **Where an eigenvalue is negative, training has stopped on its way and not at a
# minimum**: in some direction the loss still curves down. What follows is the curvature
# where each member stopped.
#
# A learning rate decides how sharp it may get
# --------------------------------------------
#
# In a direction of curvature :math:`\lambda`, one step of gradient descent with rate
# :math:`\eta` multiplies the distance to the lowest point by :math:`1 - \eta\lambda`,
# which makes it shorter only if :math:`\lambda < 2/\eta`. **So no member can settle
# where its loss is sharper than 2 / rate.** How close do they come?

bound = 2 / rates
on_it = finite & ((after / bound - 1).abs() < 0.1)
above, below = finite & ~on_it & (after > bound), finite & ~on_it & (after < bound)
print(f"of {num_models} members, {on_it.sum()} end within 10% of 2 / rate,")
print(f"{below.sum()} below, {above.sum()} above, {(~finite).sum()} diverged;")
print(f"{(before > bound).sum()} started above")

fig, ax = plt.subplots(layout="constrained")
ax.loglog(rates, bound, "C1--", label="2 / learning rate")
ax.loglog(rates, before, "C0o", fillstyle="none", label="at the start")
ax.loglog(rates, after, "C0o", label=f"after {num_steps} steps")
lost = rates[~finite], before[~finite]
ax.loglog(*lost, "C3x", markersize=10, label="diverged from here")
ax.set_title(f"Sharpness of {num_models} members, float64\nCPU")
ax.set_xticks([0.05, 0.1, 0.2, 0.5], labels=[0.05, 0.1, 0.2, 0.5])
ax.set_yticks([5, 10, 20, 40], labels=[5, 10, 20, 40])
ax.minorticks_off()
ax.set_xlabel("learning rate of the member")
ax.set_ylabel("largest eigenvalue of the Hessian")
ax.legend()
fig.set_label(
    f"Sharpness against learning rate: {on_it.sum()} of {num_models} members end near "
    f"the line 2 / rate, {below.sum()} below it, {above.sum()} above."
)

# %%
# **Members that end on the line** are at the *edge of stability* (Cohen et al.). Some
# started below it and became sharper; others started above, where a member finds a
# flatter place or diverges. Their sharpness tells the learning rate, and not how good
# they are: compare sharpness only at equal rates. **Members below the line** may need
# more steps, or lie in a flat place.
#
# What the full Hessian costs
# ---------------------------
#
# ``hvp`` goes backward through a gradient, which costs a few gradients. The Hessian
# does so for 226 vectors, and its size is the square of the parameters: 0.4 MB here, 8
# TB for a million. ``jvp`` of ``grad``, forward over backward, is the product that
# PyTorch's tutorial writes: it has no second graph to store, and calls more operators.

ways = {
    "gradient": grad(member_loss),
    "product, vjp of grad": lambda t: hvp(member_loss, t, v[0]),
    "product, jvp of grad": lambda t: jvp(grad(member_loss), (t,), (v[0],))[1],
    "Hessian, jacfwd(jacrev)": jacfwd(jacrev(member_loss)),
    "Hessian, jacrev(jacrev)": jacrev(jacrev(member_loss)),
}
x, y, theta, v = (t.to(**timed) for t in (x, y, theta, v))
calls = [partial(vmap(way), theta) for way in ways.values()]
for name_of_way, (seconds, gain, *_) in zip(ways, in_turns(*calls), strict=True):
    print(f"{name_of_way:23} {seconds * 1e3:6.1f} ms, {1 / gain:5.1f} gradients")

for kind, (back, forth) in {"product": calls[1:3], "Hessian": calls[:2:-1]}.items():
    _, (_, *gain) = in_turns(back, forth)
    print(f"{kind}: forward over backward against backward twice: {said(*gain)}")
_, (_, gain, *_) = in_turns(calls[1], calls[3])
print(f"the Hessian costs as much as {1 / gain:.0f} products, not {theta.shape[1]}")

# %%
# **Where the Hessian costs less than 226 products**, because its vectors share calls,
# make it if it fits in memory and you need many products at one place. Else take
# products: power iteration for the sharpness, or the mean of ``v @ hvp(f, x, v)`` over
# random signs ``v`` for the trace (Hutchinson; tested).
#
# **If forward mode is slower**, its operators are more (tested) and small. Where large
# matrices hide the calls, both draw level (in trials, at 512 hidden units): measure
# yours. If it is faster, take it, unless your loss refuses it:
#
# The mistake: ``jvp`` of ``grad`` through every loss
# ---------------------------------------------------
#
# Above, ``F.mse_loss`` sums, and we divide. With its default, ``reduction="mean"``,
# ``jvp`` of ``grad`` fails:


def with_mean(theta):
    return 10 * F.mse_loss(predict(theta), y)  # 10, since it divides by outputs, too


try:
    jvp(grad(with_mean), (theta[0],), (v[0],))
    print("This PyTorch can do it.")
except RuntimeError as error:
    print(str(error).partition(".")[0])
off = (hvp(with_mean, theta[0], v[0]).cpu() - products[0]).abs().max()
print(f"vjp of grad: within {off:.0e} of the product above")

# %%
# The message names no operator (`pytorch#123996
# <https://github.com/pytorch/pytorch/issues/123996>`_). Other losses, such as
# ``F.huber_loss``, have no rule for it, and say so. Go backward twice, or write the
# loss another way. ``jacfwd(jacrev(loss))`` takes both losses as they are (tested).
#
# Remember
# --------
#
# **jacrev for few outputs, jacfwd for few inputs.** A Hessian is either of them over
# ``jacrev``; its products need no Hessian: ``vjp`` of ``grad``. Write each for one
# point or one member, and let ``vmap`` do the batch.
#
# Next
# ----
#
# - ``plot_per_sample_gradients.py``: the gradient of every sample of a batch.
# - ``plot_hyperparameter_sweep.py``: a learning rate for each member.
#
# References
# ----------
#
# - PyTorch's tutorials on `Jacobians and Hessians
#   <https://docs.pytorch.org/tutorials/intermediate/jacobians_hessians.html>`_ and on
#   `tangent kernels, with costs
#   <https://docs.pytorch.org/tutorials/intermediate/neural_tangent_kernels.html>`_.
# - B. A. Pearlmutter: Fast exact multiplication by the Hessian, 1994,
#   `doi:10.1162/neco.1994.6.1.147 <https://doi.org/10.1162/neco.1994.6.1.147>`_.
# - J. Cohen et al.: Gradient descent on neural networks typically occurs at the edge of
#   stability, 2021, `arXiv:2103.00065 <https://arxiv.org/abs/2103.00065>`_.
