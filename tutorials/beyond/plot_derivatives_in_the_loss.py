"""
Derivatives in the loss: an ensemble of PINNs
=============================================

Write a derivative by the input for one network and one point, map it over the members
of an ensemble and over points by two nested ``vmap`` calls, and train through it.

**In short.** ``grad(u, argnums=1)`` is the slope of ``u(params, x)`` by ``x``,
``jacrev`` of it holds the second derivatives, and ``backward`` goes through both to the
stacked parameters. Judge a physics-informed network (PINN) by a known solution, not by
its loss or by how well its members agree: the run prints all three.

Before you start: ``plot_jacobians_and_hessians.py`` explains ``jacrev`` and products.
"""

# %%
# Set-up
# ------

import math
import warnings
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, stack_module_state, vmap
from torch.utils.benchmark import timer

warnings.filterwarnings("ignore", module="torch")  # of jacfwd; not to copy
torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
print(f"{device.type}, torch {torch.__version__}, float32 but for the check")

# %%
# Derivatives of all members at all points
# ----------------------------------------


def make_model(inputs):
    hidden = [nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()]
    return nn.Sequential(*hidden, nn.Linear(32, 1))


def u(params, x):  # one member, one point: [d] -> []
    return functional_call(skeleton, params, (x,), strict=True).squeeze(0)


slope = grad(u, argnums=1)  # one member, one point: [d] -> [d]
second = jacrev(slope, argnums=1)  # [d] -> [d, d]


def laplacian(params, x):
    return second(params, x).trace()


num_models, num_points, d = 16, 64, 3
with torch.device("meta"):
    skeleton = make_model(d)
models = [make_model(d).to(device) for _ in range(num_models)]
params, _ = stack_module_state(models)
x = torch.randn(num_models, num_points, d, device=device)  # each member has its own

slopes = vmap(vmap(slope, in_dims=(None, 0)))(params, x)  # [16, 64, 3]
curvatures = vmap(vmap(laplacian, in_dims=(None, 0)))(params, x)  # [16, 64]
curvatures.square().mean(dim=1).sum().backward()  # the stacked weights have a .grad
print(list(slopes.shape), list(curvatures.shape))

# %%
# The inner ``vmap`` maps points, the outer one members. The parameters require
# gradients, as ``stack_module_state`` returns them: ``requires_grad_(False)`` would
# freeze what you train. The last bias has no gradient, because no slope depends on it.
#
# Points that all members share: forces of a committee
# ----------------------------------------------------
#
# For shared points the outer ``vmap`` gets ``in_dims=(0, None)``. If ``u`` is an
# energy, the force is minus its slope; ``plot_committee_forces.py`` trains on forces.

with torch.no_grad():  # nobody trains through these
    at_points = vmap(vmap(slope, in_dims=(None, 0)), in_dims=(0, None))
    forces = -at_points(params, x[0])  # [16, 64, 3]
disagreement = forces.std(dim=0).norm(dim=1)  # of the members, at each point
print(f"disagreement at {len(disagreement)} points:", end=" ")
print(f"{disagreement.min():.2f} to {disagreement.max():.2f}")

# %%
# The same with ``torch.autograd.grad``
# -------------------------------------
#
# The loop takes the points of one model at once: in the gradient of a *sum* over
# points, each point has its own row. ``create_graph=True`` lets ``backward`` of the
# loss go through it.


def by_sums(f, x):
    """Laplacians of f at the rows of x, each value depending on its own row."""
    x = x.clone().requires_grad_()
    (rows,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)  # [..., d]
    parts = [
        torch.autograd.grad(column.sum(), x, create_graph=True)[0][..., i]
        for i, column in enumerate(rows.unbind(dim=-1))
    ]
    return sum(parts)


def loop_loss(models, x):
    """The sum over the models of their mean squared Laplacian."""
    rows = zip(models, x, strict=True)
    return sum(by_sums(model, points).square().mean() for model, points in rows)


def nested_loss(laplacian, params, x):
    every = vmap(vmap(laplacian, in_dims=(None, 0)))(params, x)
    return every.square().mean(dim=1).sum()


# %%

doubles = [make_model(d).cpu().double() for _ in range(3)]
stack, _ = stack_module_state(doubles)
points = x[:3].cpu().double()
nested_loss(laplacian, stack, points).backward()
loop_loss(doubles, points).backward()
off = 0
for name, p in stack.items():
    for i, model in enumerate(doubles):
        alone = model.get_parameter(name).grad
        if alone is not None:  # the last bias has none
            off = max(off, (p.grad[i] - alone).abs().max().item())
assert off < 1e-10, f"the loop trains otherwise: gradients are {off:.1e} apart"
print(f"gradients of all parameters within {off:.0e} of the loop's, in float64")

# %%
# Which way is cheapest to train through?
# ---------------------------------------
#
# Each way computes the Laplacians and the gradients of all parameters. ``jacfwd`` sends
# derivatives forward. The sum over points works for all members at once, too. The
# loop's losses are summed for one call of ``torch.autograd.grad``.


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


def forward_over_reverse(params, x):
    return jacfwd(slope, argnums=1)(params, x).trace()


def forward_twice(params, x):
    return jacfwd(jacfwd(u, argnums=1), argnums=1)(params, x).trace()


def summed_loss(params, x):
    values = partial(vmap(vmap(u, in_dims=(None, 0))), params)
    return by_sums(values, x).square().mean(dim=1).sum()


def gradients(loss, tensors, *inputs):
    return torch.autograd.grad(loss(*inputs), tensors, allow_unused=True)


# %%

for inputs in 1, 8:
    models = [make_model(inputs).to(device) for _ in range(num_models)]
    params, _ = stack_module_state(models)
    x = torch.randn(num_models, num_points, inputs, device=device)
    ways = {
        "jacrev(grad)": partial(nested_loss, laplacian),
        "jacfwd(grad)": partial(nested_loss, forward_over_reverse),
        "jacfwd(jacfwd)": partial(nested_loss, forward_twice),
        "grad of sums": summed_loss,
    }
    tensors = list(params.values())
    calls = [partial(gradients, way, tensors, params, x) for way in ways.values()]
    tensors = [p for model in models for p in model.parameters()]
    calls.append(partial(gradients, loop_loss, tensors, models, x))
    print(f"{num_models} members, {num_points} points, {inputs} inputs:")
    better, times = [], in_turns(*calls)
    for way, (seconds, *gain) in zip([*ways, "loop"], times, strict=True):
        against = said(*gain) if way != "jacrev(grad)" else ""
        better += [way] * ("faster" in against)
        print(f"  {way:15} {seconds * 1e3:6.1f} ms  {against}")
    print("  faster than jacrev(grad):", ", ".join(better) or "none seen")

# %%
# The first time is a median of at least seven turns, warm. The others are that median
# divided by the median ratio, in brackets its 95 % interval. *No difference seen* means
# that the interval comes within 2 percent of 1 or holds it: undecided, not equal. After
# the slope, the sums go backward once for each input, one after the other; ``jacrev``
# goes back for all inputs in one call. So the sums may pay with few inputs; the last
# lines say whether they did here.
#
# Train PINNs
# -----------
#
# A PINN learns the solution of an equation from the equation: its loss is the residual
# at random points, and the initial conditions. Here it is a damped oscillator from 0 to
# 1, in which :math:`u'' + 2\gamma u' + \omega^2 u = 0` with :math:`\gamma = 2`,
# :math:`u(0) = 1` and :math:`u'(0) = 0`. Half of the 40 members have :math:`\omega =
# 6`, half 12: ``omega`` is an argument with a value for each member. All start from
# weights of their own and draw their own points.

damping, frequencies, num_steps = 2.0, (6.0, 12.0), 400


def residual(params, omega, t):  # one member, one time: [1] -> []
    curve = second(params, t)[0, 0] + 2 * damping * slope(params, t)[0]
    return curve / omega**2 + u(params, t)


def loss(params, omega, times):  # one member: [64, 1] -> []
    start = torch.zeros_like(times[0])
    off = u(params, start) - 1, slope(params, start)[0] / omega
    inside = vmap(residual, in_dims=(None, None, 0))(params, omega, times)
    return inside.square().mean() + off[0] ** 2 + off[1] ** 2


# %%

omegas = torch.tensor(frequencies, device=device).repeat_interleave(20)  # [40]
params, _ = stack_module_state([make_model(1).to(device) for _ in omegas])
optimizer = torch.optim.Adam(params.values(), lr=0.01, fused=True)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
for _ in range(num_steps):
    times = torch.rand(len(omegas), num_points, 1, device=device)
    losses = vmap(loss)(params, omegas, times)
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    schedule.step()
low, high = losses.view(2, 20).detach().cpu().aminmax(dim=1)
for i, omega in enumerate(frequencies):
    print(f"omega {omega:2.0f}: losses {low[i]:.1e} to {high[i]:.1e}")
print("a curve that is 0 everywhere has a loss of 1")

# %%
# The trap: members that agree on a wrong curve
# ---------------------------------------------
#
# The solutions of these equations are known. The members of each :math:`\omega` make
# four committees of five; if the spread (the standard deviation of the members) told
# the error, the solution would lie within two spreads of the mean nearly always. The
# rows *within 2 spreads* give the share of times at which it does.


def solution(omega, t):
    ringing = math.sqrt(omega**2 - damping**2)
    wave = torch.cos(ringing * t) + damping / ringing * torch.sin(ringing * t)
    return torch.exp(-damping * t) * wave


times = torch.linspace(0, 1, 101, device=device)[:, None]
with torch.no_grad():
    curves = vmap(vmap(u, in_dims=(None, 0)), in_dims=(0, None))(params, times)
curves, t = curves.cpu().view(2, 4, 5, 101), times[:, 0].cpu()  # 4 committees of 5
exact = torch.stack([solution(omega, t) for omega in frequencies])  # [2, 101]
mean, spread = curves.mean(dim=2), curves.std(dim=2)
error = (mean - exact[:, None]).abs()
held = (error < 2 * spread).float().mean(dim=2)  # [2, 4]
rms_error, rms_spread = (v.square().mean(dim=2).sqrt() for v in (error, spread))
fooled = (rms_error > 2 * rms_spread).sum()
print(f"in {fooled} of 8 committees the error is more than two spreads")
for omega, *rows in zip(frequencies, rms_error, rms_spread, held, strict=True):
    size = solution(omega, times).square().mean().sqrt()
    print(f"omega {omega:.0f}, a solution of size {size:.2f}, committees 0 to 3:")
    for what, row in zip(["error", "spread", "within 2 spreads"], rows, strict=True):
        print(f"  {what:16}", *[f"{value:.3f}" for value in row.tolist()])

# %%

fig, axes = plt.subplots(2, sharex=True, layout="constrained")
for i, ax in enumerate(axes):
    low, high = mean[i, 0] - 2 * spread[i, 0], mean[i, 0] + 2 * spread[i, 0]
    ax.fill_between(t, low, high, color="C0", alpha=0.3, label="2 standard deviations")
    ax.plot(t, mean[i, 0], "C0", label="mean of five members")
    ax.plot(t, exact[i], "k--", label="solution")
    ax.set(ylabel="u", title=f"omega {frequencies[i]:.0f}")
axes[0].legend()
axes[1].set_xlabel("time")
fig.suptitle(f"A committee of PINNs after {num_steps} steps, {device.type}, float32")
fig.set_label(
    "Solutions of two damped oscillators, each with the mean of five PINNs and a band "
    f"of two standard deviations, which holds the solution at {held[0, 0]:.0%} and "
    f"{held[1, 0]:.0%} of the times."
)

# %%
# **Members that make the same mistake agree on it.** They share equation, architecture,
# optimizer and schedule; their spread shows what differs among them, which is the
# initial weights and the points. So compare a PINN with a solver or with measurements
# at a setting where you have them. Train longer, by ``num_steps``, and the table says
# whether the members become right or only agree more. Krishnapriyan and others describe
# failures of PINNs and propose two ways to train against them: from easy settings to
# hard ones, and one span of time after the other.
#
# The mistake: ReLU
# -----------------
#
# The second derivative of a ReLU network is 0 wherever it exists, and no message says
# so: a residual then holds no second derivative.

layers = nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)
relu = nn.Sequential(*layers).to(device)
with torch.no_grad():
    seconds = vmap(jacrev(grad(lambda t: relu(t).squeeze(0))))(times)
print(f"largest second derivative of a ReLU network: {seconds.abs().max():.1f}")

# %%
# Other mistakes (tested): without ``argnums=1``, ``grad(u)`` is a dictionary of
# gradients by the parameters, and an error comes later, if at all. Without a message,
# ``no_grad`` inside ``u`` makes every slope 0, and with the two ``vmap`` of shared
# points swapped the result is ``[points, members, d]``.
#
# Remember
# --------
#
# Write ``u`` for one member and one point, ``grad`` and ``jacrev`` by the point around
# it, one ``vmap`` for points and one for members around that. Second derivatives need a
# smooth activation. Neither a small loss nor agreement proves that the equation is
# solved.
#
# Next
# ----
#
# - ``plot_committee_forces.py``: train on energies and forces, choose what to label.
# - ``plot_regression.py``: spread and error on data.
#
# References
# ----------
#
# - M. Raissi, P. Perdikaris and G. Karniadakis: Physics-informed neural networks, 2019,
#   `doi:10.1016/j.jcp.2018.10.045 <https://doi.org/10.1016/j.jcp.2018.10.045>`_.
# - A. Krishnapriyan and others: Characterizing possible failure modes in
#   physics-informed neural networks, 2021, `arXiv:2109.01050
#   <https://arxiv.org/abs/2109.01050>`_.
