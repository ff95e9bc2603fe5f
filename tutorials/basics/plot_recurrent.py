"""
An ensemble of LSTMs or GRUs
============================

Call and train many recurrent networks at once, although ``torch.func.vmap`` refuses
``nn.LSTM`` and ``nn.GRU``, and keep your modules and their weights.

**In short.** Give the skeleton of your model the class ``UnrolledLSTM`` or
``UnrolledGRU`` below in place of ``nn.LSTM`` or ``nn.GRU``: it has the same parameters,
computes the same up to rounding (checked in float64), and ``vmap`` accepts it. To
predict, it runs about a dozen operators in each time step of a layer for all models
together; a loop of ``nn.LSTM`` runs one for all time steps of a layer and can be
faster: see the table below.

Before you start: ``plot_ensembling.py`` says how models are stacked.
"""

# %%
# Set-up
# ------

import math
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import backends, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import timer

torch.manual_seed(0)
backends.fp32_precision = "ieee"  # no TF32, in products and in cuDNN's LSTM and GRU
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
torch.set_num_threads(1)  # see the table
where = f"{device.type.upper()}, one thread"
if device.type == "cuda":
    where = torch.cuda.get_device_name()
print(f"{where}, torch {torch.__version__}, float32, IEEE")

# %%
# An LSTM and a GRU that vmap accepts
# -----------------------------------
#
# Both are a loop over time, here for any number of layers:


def unroll(rnn, cell, x, state):
    """What nn.LSTM and nn.GRU compute, one time step after the other."""
    if rnn.bidirectional or rnn.proj_size or not rnn.bias:
        raise NotImplementedError(f"unroll has no such option: {rnn}")
    x = x.movedim(-2, 0) if rnn.batch_first else x  # [time, batch, features]
    zeros = x.new_zeros(rnn.num_layers, *x.shape[1:-1], rnn.hidden_size)
    state = zip(*[zeros if s is None else s for s in state], strict=True)
    last = []
    for (w_x, w_h, b_x, b_h), now in zip(rnn.all_weights, state, strict=True):
        if last and rnn.dropout and rnn.training:
            x = F.dropout(x, rnn.dropout)
        outputs = []
        for from_x in F.linear(x, w_x, b_x):
            now = cell(from_x, now[0] @ w_h.mT + b_h, *now)
            outputs.append(now[0])
        x = torch.stack(outputs)
        last.append(now)
    x = x.movedim(0, -2) if rnn.batch_first else x
    return x, tuple(torch.stack(s) for s in zip(*last, strict=True))


# %%
# The two cells, and a class for each:


def lstm_cell(from_x, from_h, h, c):
    i, f, g, o = (from_x + from_h).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class UnrolledLSTM(nn.LSTM):
    def forward(self, x, state=None):
        return unroll(self, lstm_cell, x, state or (None, None))


def gru_cell(from_x, from_h, h):
    r_x, z_x, n_x = from_x.chunk(3, -1)
    r_h, z_h, n_h = from_h.chunk(3, -1)
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (n.lerp(h, (z_x + z_h).sigmoid()),)


class UnrolledGRU(nn.GRU):
    def forward(self, x, h=None):
        x, (h,) = unroll(self, gru_cell, x, (h,))
        return x, h


# %%
# Put it into your model
# ----------------------
#
# The models keep ``nn.GRU``, with its initialization or their trained weights. Only the
# skeleton, whose code ``vmap`` runs, gets the new class:


class Forecaster(nn.Module):
    def __init__(self, gru):
        super().__init__()
        self.gru = gru(1, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, x, h=None):  # x: [batch, time, 1]
        x, h = self.gru(x, h)
        return self.head(x), h


num_models = 10
models = [Forecaster(nn.GRU).to(device) for _ in range(num_models)]
params, _ = stack_module_state(models)  # "gru.weight_hh_l0": [10, 48, 16], ...
with torch.device("meta"):
    skeleton = Forecaster(UnrolledGRU)


def forecast(params, *inputs):
    return functional_call(skeleton, params, inputs, strict=True)


x = torch.randn(num_models, 8, 20, 1, device=device)  # 8 sequences of 20 for each
with torch.no_grad():
    y, h = vmap(forecast)(params, x)
    y, h = vmap(forecast)(params, x, h)  # 20 more, here the same, from the state h
print(f"predictions {list(y.shape)}, state {list(h.shape)}")

# %%
# The state of an LSTM is the pair ``(h, c)``. Where you cannot change the model's code,
# write ``skeleton.gru.__class__ = UnrolledGRU`` (tested).
#
# It computes what nn.LSTM and nn.GRU compute
# -------------------------------------------
#
# The judge is float64: two layers, the sequence in two halves with the state handed on,
# against the whole sequence in a loop of the modules.


def ensemble(kind, unrolled, n, *sizes, **options):
    """n modules for a loop, their stacked parameters, and one of them as a function."""
    layers = [kind(*sizes, batch_first=True, **options) for _ in range(n)]
    shell = unrolled(*sizes, batch_first=True, **options | {"device": "meta"})
    call = partial(functional_call, shell, strict=True)
    return layers, stack_module_state(layers)[0], call


def flat(output, state):
    return torch.cat([tensor.flatten() for tensor in (output, *state)])


kinds = {nn.LSTM: UnrolledLSTM, nn.GRU: UnrolledGRU}
double = {"num_layers": 2, "device": "cpu", "dtype": torch.float64}
x = torch.randn(5, 8, 20, 3, device="cpu", dtype=torch.float64)
for kind, unrolled in kinds.items():
    layers, weights, call = ensemble(kind, unrolled, 5, 3, 16, **double)

    def halves(weights, x, call=call):
        first, state = call(weights, x[:, :10])
        second, state = call(weights, (x[:, 10:], state))
        return flat(torch.cat([first, second], dim=1), state)

    loop = [flat(*layer(row)) for layer, row in zip(layers, x, strict=True)]
    far = (vmap(halves)(weights, x) - torch.stack(loop)).abs().max().item()
    print(f"nn.{kind.__name__}: outputs and last state, largest difference {far:.0e}")
    assert far < 1e-10, f"vmap does not compute what nn.{kind.__name__} computes"

# %%
# The gradients are those of ``nn.LSTM`` and ``nn.GRU`` as well (tested).
#
# Train ten GRUs to forecast
# --------------------------
#
# Each learns the next number of a noisy oscillation, from minibatches of its own. The
# variance of the noise is the part of a loss that no model can learn:

time = torch.arange(400)
clean = (2 * torch.pi * time / 25).sin() * (1 + 0.5 * (2 * torch.pi * time / 70).sin())
series = (clean + 0.1 * torch.randn(400)).to(device)
optimizer = torch.optim.Adam(params.values(), lr=2e-2, fused=True)
for starts in torch.randint(300 - 40, (100, num_models, 8, 1)):
    windows = series[(starts + torch.arange(41)).to(device), None]  # [10, 8, 41, 1]
    predicted, _ = vmap(forecast)(params, windows[:, :, :-1])
    losses = (predicted - windows[:, :, 1:]).square().mean((1, 2, 3))  # [10]
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
print(f"last losses: {losses.min():.3f} to {losses.max():.3f}; noise: {0.1**2:.3f}")

# %%
# Generate: the state goes in and out
# -----------------------------------
#
# All models read the 300 known numbers, which they share. Then each goes on from its
# state, with its own last prediction as the next input. Errors are root mean squares
# against the series without noise; a copy repeats the last 25 known, noisy numbers:

with torch.no_grad():
    read, h = vmap(forecast, in_dims=(0, None))(params, series[None, :300, None])
    steps = [read[:, :, -1:]]  # prediction of number 300: [10, 1, 1, 1]
    for _ in range(99):
        x, h = vmap(forecast)(params, steps[-1], h)
        steps.append(x)

ahead, truth = torch.cat(steps, dim=2)[:, 0, :, 0].cpu(), clean[300:]  # [10, 100]
means, spread = ahead.mean(dim=0), ahead.std(dim=0)
again = series[275:300].cpu().repeat(4)
one, mean, copied = [(g - truth).square().mean() ** 0.5 for g in (ahead, means, again)]
print(f"error of a model {one:.2f}, of the mean {mean:.2f}, of a copy {copied:.2f}")

# %%

fig, ax = plt.subplots(layout="constrained")
ax.plot(time[240:300], series[240:300].cpu(), ".", color="gray", label="known")
ax.plot(time[240:], clean[240:], "--", color="black", label="without noise")
ax.plot(time[300:], means, color="C0", label="mean of the models")
low, high = means - 2 * spread, means + 2 * spread
ax.fill_between(time[300:], low, high, alpha=0.3, label="2 standard deviations")
ax.set_title(f"Forecast of {num_models} GRUs\n{where}, float32")
ax.set(xlabel="time step", ylabel="value")
fig.legend(loc="outside lower center", ncols=2)
fig.set_label(
    "An oscillation, its last known numbers, and the mean forecast with a band of two "
    "standard deviations. The standard deviation of the models in the first ten steps "
    f"is {spread[:10].mean():.2f}, in the last ten {spread[-10:].mean():.2f}."
)

# %%
# The band says how much the models disagree, not how far they are from the truth: see
# ``plot_regression.py``.
#
# Is it faster than a loop?
# -------------------------
#
# One call runs the same number of operators for few models and for many, as the table
# shows. The loop runs those of ``nn.LSTM`` or ``nn.GRU`` for each model: one operator
# for all time steps of a layer with cuDNN (NVIDIA GPUs) or oneDNN (a float32 LSTM on a
# CPU); a GRU on a CPU runs several in each step. With small tensors we expect the side
# with fewer operators to be the faster one.


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
# Both sides train with one fused Adam and one backward pass for all models. A layer has
# 32 units; each model has 16 sequences of 20 steps:


def step(way, optimizer):
    optimizer.zero_grad()
    way().square().mean((1, 2, 3)).sum().backward()
    optimizer.step()


def forms(kind, n):
    """Loop and one call, to predict and to train."""
    layers, weights, call = ensemble(kind, kinds[kind], n, 4, 32, device=device)
    x = torch.randn(n, 16, 20, 4, device=device)

    def loop():
        return torch.stack([m(row)[0] for m, row in zip(layers, x, strict=True)])

    def one_call():
        return vmap(call)(weights, x)[0]

    weight_lists = [p for m in layers for p in m.parameters()], weights.values()
    adams = [torch.optim.Adam(p, fused=True) for p in weight_lists]
    predict = [torch.no_grad()(loop), torch.no_grad()(one_call)]
    train = [partial(step, loop, adams[0]), partial(step, one_call, adams[1])]
    return {"predict": predict, "train": train}


# %%
# Predictions run without autograd. The loop's time is a median of at least seven turns,
# warm; one call's is that over the median gain, whose interval is in brackets. Up to 2
# percent is no difference. A CPU runs one thread here, which other programs disturb
# less, and what follows holds for one thread. With more, the winner may change: remove
# ``torch.set_num_threads(1)`` to see.


class Count(TorchDispatchMode):
    """Counts the operators that run, but no views."""

    number = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.number += not operator.is_view
        return operator(*args, **kwargs or {})


def operators(way):
    with Count() as seen:
        way()
    return seen.number


held, table = [], []
for kind in kinds:
    for n in [4, 64] if device == cpu else [16, 256]:
        for task, ways in forms(kind, n).items():
            (looped, *_), (called, *gain) = in_turns(*ways, seconds=0.4)
            before, after = map(operators, ways)
            held.append(gain[1] > 1.02 if after < before else gain[2] < 0.98)
            table.append(f"{n} {kind.__name__}s, {task}: {said(*gain)}")
            loop_row = f"    loop {before} operators, {looped * 1e3:.3g} ms"
            table.append(f"{loop_row}; one call {after}, {called * 1e3:.3g} ms")
print(f"The side with fewer operators is faster in {sum(held)} of {len(held)} cases.")
print(f"One call against the loop on {where}:", *table, sep="\n")

# %%
# **More models mean more operators in the loop, and no more in one call.** Where the
# loop is faster, keep it, and ask again with more models. Where one call has fewer
# operators and is not faster, its own take longer: probably Python and ``vmap`` start
# them, each computes for all models, and those of oneDNN are fused.
#
# By default ``torch.compile`` skips classes derived from ``nn.LSTM`` and ``nn.GRU``.
# With ``torch._dynamo.config.allow_rnn = True``, which is experimental, it does not
# (both tested).
#
# Bidirectional, dropout, padded sequences
# ----------------------------------------
#
# - Two directions, ``proj_size`` and ``bias=False`` raise an error. For two directions
#   in one layer, run a second class on ``x.flip`` in time, flip its outputs back, and
#   join both by ``torch.cat``.
# - Dropout between layers is there; in training, give ``vmap``
#   ``randomness="different"``.
# - A ``PackedSequence`` raises an error. In a padded batch the outputs are right up to
#   the length of each sequence, and the last state is the one after the padding.
# - **Without an error it is wrong** where skeleton and models differ in
#   ``batch_first``, because no parameter shows it.
# - For ``nn.RNN`` with its default tanh, the cell returns
#   ``((from_x + from_h).tanh(),)``.
#
# All of this is tested.
#
# Batching rule not implemented for aten::lstm.input
# --------------------------------------------------
#
# The mistake: a skeleton that still has ``nn.LSTM`` or ``nn.GRU``.

for kind in kinds:
    layers, weights, _ = ensemble(kind, kind, 2, 4, 8)
    try:
        vmap(partial(functional_call, layers[0]))(weights, torch.randn(2, 3, 5, 4))
        print(f"This version of PyTorch runs nn.{kind.__name__} as it is.")
    except RuntimeError as error:
        print(error)

# %%
# Remember
# --------
#
# ``vmap`` refuses ``nn.LSTM`` and ``nn.GRU``. **Give the skeleton a class that unrolls
# them over time**, and the models may keep their modules and weights. Whether that is
# faster than a loop, time for your own model: the number of operators is a hint.
#
# Next
# ----
#
# - ``plot_from_functorch.py``: older code, and code from JAX.
# - ``plot_training.py``: stop early, clip, keep the best state of each model.
# - ``plot_what_vmap_runs.py`` lists the operators of any call.
#
# References
# ----------
#
# - What ``nn.LSTM`` and ``nn.GRU`` run: `RNN.cpp
#   <https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/RNN.cpp>`_.
# - ``vmap`` refuses: `pytorch#105982
#   <https://github.com/pytorch/pytorch/issues/105982>`_ (LSTM), `pytorch#134606
#   <https://github.com/pytorch/pytorch/issues/134606>`_ (GRU). It loops over
#   ``nn.GRUCell``: `pytorch#112459
#   <https://github.com/pytorch/pytorch/issues/112459>`_.
