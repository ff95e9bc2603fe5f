"""
Jacobians, Hessians and the curvature of each member's loss
===========================================================

Compute Jacobians, Hessians and Hessian-vector products with ``torch.func`` for each
point of a batch, or for each member of an ensemble, in one call.

**In short.** ``jacrev`` sends one vector backward for each output and ``jacfwd`` one
forward for each input; the run prints which of them is faster at which sizes. The
product of a Hessian with a vector is ``vjp`` of ``grad`` and needs no Hessian; for many
vectors at one place, keep the function that ``vjp`` returns.

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
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.benchmark import timer

warnings.filterwarnings("ignore", module="torch")  # PyTorch's on itself; not to copy
torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
double = {"device": "cpu", "dtype": torch.float64}  # an Apple GPU has no float64
name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"checks in float64 on the CPU, times in float32 on {name}")

# %%
# Jacobian, Hessian, Hessian-vector product
# -----------------------------------------
#
# The lines to copy: a network from 4 inputs to 3 outputs, and a scalar made of it.

net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).to(**double)
points, directions = torch.randn(2, 100, 4, **double)


def energy(x):  # of one point, [4] -> []
    return net(x).square().sum()


def hvp(f, x, v):
    """The Hessian of f at x, times v, without the Hessian."""
    return vjp(grad(f), x)[1](v)[0]


with torch.no_grad():  # leave it out to train the weights through these results
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
# dictionaries (tested). ``plot_derivatives_in_the_loss.py`` trains through derivatives.
#
# The same, point by point, without ``torch.func``
# ------------------------------------------------

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
# sends ``m`` vectors back, ``jacfwd`` sends ``n`` forward (tested). So by the count
#
# .. math::
#
#     \frac{\text{time of jacrev}}{\text{time of jacfwd}} \approx \frac{m}{n},
#
# and they would draw level at ``m = n``. The count leaves out how well the hardware is
# used, and the calls of operators: ``jacfwd`` makes more (tested).


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

inputs, outputs = 64, [8, 32, 64, 128, 256, 512]
widths, size = ((64, 1024), 4) if device == cpu else ((256, 4096), 64)
batch, ratios = torch.randn(size, inputs, device=device), {}
for h in widths:
    middle = [nn.Linear(inputs, h), nn.Tanh(), nn.Linear(h, h), nn.Tanh()]
    ratios[h], faster, slower = [], [0], []
    for m in outputs:
        deep = nn.Sequential(*middle, nn.Linear(h, m)).to(device)
        with torch.no_grad():
            ways = [partial(vmap(way(deep)), batch) for way in (jacfwd, jacrev)]
            (forth, *_), (back, gain, *interval) = in_turns(*ways, seconds=0.3)
        ratios[h].append(1 / gain)
        verdict = said(gain, *interval)
        faster += [m] * ("faster" in verdict)
        slower += [m] * ("slower" in verdict)
        times = f"jacrev {back * 1e3:5.1f} ms, jacfwd {forth * 1e3:5.1f} ms"
        print(f"{h} hidden, {m:3} outputs: {times}, jacrev {verdict}")
    border = f"from {min(slower) / inputs:g} on" if slower else "at none of these sizes"
    if slower and min(slower) < max(faster):
        border = "here and there before that, so that the run found no border"
    print(f"{h} hidden, outputs / inputs: jacrev is faster", end=" ")
    print(f"up to {max(faster) / inputs:g}, jacfwd {border}.")

# %%

fig, ax = plt.subplots(layout="constrained")
counted = [m / inputs for m in outputs]
for h, style in zip(widths, ["C0o-", "C2s-"], strict=True):
    ax.loglog(counted, ratios[h], style, label=f"measured, {h} hidden units")
ax.loglog(counted, counted, "C1--", label="counted: m / n")
ax.axhline(1, color="gray", linewidth=1)
ax.text(counted[0], 1.1, "jacfwd is faster", va="bottom")
ax.text(counted[0], 0.9, "jacrev is faster", va="top")
for set_ticks in (ax.set_xticks, ax.set_yticks):
    set_ticks(counted, labels=[f"{c:g}" for c in counted])
ax.minorticks_off()
ax.set_title(f"Jacobian of an MLP, {inputs} inputs, {size} points, float32\n{name}")
ax.set_xlabel("outputs / inputs")
ax.set_ylabel("time of jacrev / time of jacfwd")
ax.legend()
fig.set_label(
    f"Time of jacrev over that of jacfwd against outputs over inputs: from "
    f"{counted[0]:g} to {counted[-1]:g}, it goes "
    + " and ".join(
        f"from {r[0]:.2f} to {r[-1]:.2f} with {h} hidden units"
        for h, r in ratios.items()
    )
)

# %%
# **Near 64 inputs, and with as many points as here, take jacrev up to the first number
# in the line of the nearer width, and jacfwd from the second on, if there is one.** The
# border moves with the points and the network: measure your own function. If memory
# runs out, ``jacrev`` can split its work by ``chunk_size``.
#
# A loss has one output and many parameters, so take ``jacrev`` or ``grad``.
#
# One vector for all parameters of a member
# -----------------------------------------
#
# A Hessian of a loss is a matrix of parameters by parameters, so hold each member as
# *one vector*, and the ensemble as a matrix. The members here learn 100 digits of 4 by
# 4 pixels for a while.

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
    return (predict(theta) - y).square().sum() / len(y)


num_models, num_steps = 16, 500
models = [new_model().to(**double) for _ in range(num_models)]
vectors = [nn.utils.parameters_to_vector(model.parameters()) for model in models]
theta = torch.stack(vectors).detach()  # [16, 226]
for _ in range(num_steps):
    theta -= 0.1 * vmap(grad(member_loss))(theta)
low, high = vmap(member_loss)(theta).aminmax()
print(f"losses of {num_models} members: {low:.2f} to {high:.2f}")

# %%
# How sharp is each member's loss?
# --------------------------------
#
# *Sharpness* is the largest eigenvalue of the Hessian: the greatest curvature in any
# direction. Power iteration finds, by products alone, the one largest by size (if it
# comes out negative, it is not the sharpness): multiply a vector by the Hessian again
# and again. The place stays the same, so go forward once, and keep the function that
# ``vjp`` returns.


def sharpness(theta, steps=100):
    """Largest eigenvalue (by size) of each member's Hessian, [16]."""
    _, product = vjp(vmap(grad(member_loss)), theta)
    v = torch.randn_like(theta)
    for _ in range(steps):
        v = v / v.norm(dim=1, keepdim=True)
        (hv,) = product(v)  # [16, 226], each member's Hessian times its own v
        value = (v * hv).sum(dim=1)
        v = hv
    return value


found = sharpness(theta)
print(f"sharpness: {found.min():.2f} to {found.max():.2f}")

# %%
# The check: all of the 226 eigenvalues, and one product by backward of backward.

hessians = vmap(jacfwd(jacrev(member_loss)))(theta)  # [16, 226, 226]
values = torch.linalg.eigvalsh(hessians)  # ascending
error = (found / values[:, -1] - 1).abs().max()
print(f"within {error:.0e} of the largest eigenvalue, relative")
print(f"{(values[:, 0] < -1e-6).sum()} of {num_models} members have a negative one")
v = torch.randn_like(theta)
(products,) = vjp(vmap(grad(member_loss)), theta)[1](v)
for i in range(num_models):
    alone = older.hvp(member_loss, theta[i], v[i])[1]
    off = (products[i] - alone).abs().max() / alone.abs().max()
    assert off < 1e-10, f"member {i} has another Hessian: {off:.1e} apart"

# %%
# A member with a negative eigenvalue is not at a minimum: in some direction its loss
# curves down.
#
# What the full Hessian costs
# ---------------------------
#
# A full Hessian has 226 columns, and its size is the square of the parameters: in
# float32 0.2 MB here, 4 TB for a million. ``jvp`` of ``grad`` is the product forward
# over backward, which PyTorch's tutorial writes. ``linearize`` traces that product once
# into a function. Divide the time to trace, printed in products, by what a product
# gains: so many must follow. It fails inside ``vmap``, so put ``vmap`` inside of it; if
# the weights require gradients, call it under ``no_grad`` (tested).

x, y, theta, v = (t.to(device, torch.float32) for t in (x, y, theta, v))
slopes = vmap(grad(member_loss))
for _ in range(2):  # the first time loads the tracer
    start = timer()
    _, linear = linearize(slopes, theta)
    tracing = timer() - start
_, product = vjp(slopes, theta)

# %%

products = {
    "product, vjp kept": lambda: product(v),
    "product, linearize kept": lambda: linear(v),
    "product, vjp of grad": lambda: vmap(partial(hvp, member_loss))(theta, v),
    "product, jvp of grad": lambda: jvp(slopes, (theta,), (v,)),
    "gradient": lambda: slopes(theta),
}
full = {
    "Hessian, jacfwd(jacrev)": lambda: vmap(jacfwd(jacrev(member_loss)))(theta),
    "Hessian, jacrev(jacrev)": lambda: vmap(jacrev(jacrev(member_loss)))(theta),
}
first = []
for group in products, full:
    times = in_turns(*group.values())
    first.append(times[0][0])
    for i, (way, (seconds, *gain)) in enumerate(zip(group, times, strict=True)):
        print(f"{way:23} {seconds * 1e3:6.1f} ms  {said(*gain) if i else ''}")
print(f"in the time of one kept product: to trace linearize {tracing / first[0]:.0f},")
print(f"a Hessian by jacfwd(jacrev) about {first[1] / first[0]:.0f}, of 226 columns")

# %%
# In each group, the first time is a median of at least seven turns, warm; the others
# follow from the median ratio to it, whose 95 % interval stands behind them. **If you
# need fewer products at one place than a Hessian costs, take products**: for the
# sharpness by power iteration, or for the trace by the mean of ``v @ hvp(f, x, v)``
# over random signs ``v`` (Hutchinson; tested). A kept ``vjp`` holds the tensors of its
# forward pass as long as the function exists.
#
# The mistake: ``jvp`` of ``grad`` through every loss
# ---------------------------------------------------
#
# The loss above squares by itself. With the mean of ``F.mse_loss``, ``jvp`` of ``grad``
# fails:


def with_mean(theta):
    return 10 * F.mse_loss(predict(theta), y)  # 10, since it divides by outputs, too


try:
    jvp(grad(with_mean), (theta[0],), (v[0],))
    print("This PyTorch can do it.")
except RuntimeError as error:
    print(str(error).partition(".")[0])
off = (hvp(with_mean, theta[0], v[0]) - product(v)[0][0]).abs().max()
print(f"vjp of grad: within {off:.0e} of the product above")

# %%
# The message names no operator (`pytorch#123996
# <https://github.com/pytorch/pytorch/issues/123996>`_). ``F.huber_loss`` has no rule
# for it, and says so. Without ``vmap``, ``linearize`` of the gradient of ``F.mse_loss``
# ends the process by a signal (tested, torch 2.11 and 2.13). Go backward twice, or
# write the loss another way. ``jacfwd(jacrev(loss))`` takes both losses as they are
# (tested).
#
# Remember
# --------
#
# ``jacrev`` costs by outputs and ``jacfwd`` by inputs, and the count alone does not say
# where they draw level. A Hessian is either of them over ``jacrev``; its products need
# no Hessian: ``vjp`` of ``grad``, kept for many vectors. Write each for one point or
# one member, and let ``vmap`` do the batch.
#
# Next
# ----
#
# - ``plot_derivatives_in_the_loss.py``: train through derivatives by the input.
# - ``plot_per_sample_gradients.py``: the gradient of every sample of a batch.
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
