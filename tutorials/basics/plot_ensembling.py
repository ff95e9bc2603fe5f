"""
An ensemble of CNNs in one vectorized call
==========================================

Run an ensemble, ten convolutional networks of one architecture whose predictions are
averaged, as a single call of ``torch.func.vmap``, check that it returns what a loop
over the models returns, and measure which of the two is faster on your machine.

**In short.** ``stack_module_state`` puts the parameters of all models into the rows of
one set of tensors, and ``vmap`` runs one forward pass for all rows. The result is that
of the loop up to rounding. Expect a gain from many small models, and none from ten CNNs
on a CPU: the run below measures both.

Before you start: the `PyTorch basics
<https://docs.pytorch.org/tutorials/beginner/basics/intro.html>`_. You need no GPU.
"""

# %%
# Set-up
# ------

import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import timer

torch.manual_seed(0)
torch.backends.cudnn.conv.fp32_precision = "ieee"  # no TF32, which has 3 digits
torch.backends.cuda.matmul.fp32_precision = "ieee"

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")

# %%
# Ten models and their data
# -------------------------
#
# A small CNN, ten times, each with its own random weights. The images are noise.


class SimpleCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):  # [64, 1, 28, 28]
        x = F.relu(self.conv2(F.relu(self.conv1(x))))  # [64, 64, 24, 24]
        x = F.max_pool2d(x, 2).flatten(1)  # [64, 9216]
        return self.fc2(F.relu(self.fc1(x)))  # [64, 10]


num_models = 10
models = [SimpleCNN().to(device) for _ in range(num_models)]
data = torch.randn(100, 64, 1, 28, 28, device=device)  # 100 minibatches of 64 images
minibatches = data[:num_models]  # [10, 64, 1, 28, 28], one for each model
minibatch = data[0]  # [64, 1, 28, 28], one for all

# %%
# Call all models at once
# -----------------------
#
# Option 1 gives each model **its own minibatch**, option 2 gives all **the same one**.

params, buffers = stack_module_state(models)  # "fc1.weight": [10, 128, 9216], ...
with torch.device("meta"):
    skeleton = SimpleCNN().eval()  # code without memory; to train, .train()


def predict(params, buffers, x):
    """Logits of one model."""
    return functional_call(skeleton, (params, buffers), (x,), strict=True)


with torch.no_grad():  # leave this out to train
    own = vmap(predict)(params, buffers, minibatches)
    shared = vmap(predict, in_dims=(0, 0, None))(params, buffers, minibatch)

print("option 1:", list(own.shape), " option 2:", list(shared.shape))

# %%
# Both results are ``[model, image, class]``. Models that you have trained take the
# place of those in the list ``models``: one class, equal shapes, ``.eval()`` called on
# each (in the call, the skeleton's mode decides).
#
# .. code-block:: none
#
#                 params      option 1        option 2
#    models[0] -> row 0 -> minibatches[0]    minibatch -> logits of model 0
#    models[1] -> row 1 -> minibatches[1]    minibatch -> logits of model 1
#       ...        ...           ...            ...            ...
#    models[9] -> row 9 -> minibatches[9]    minibatch -> logits of model 9
#
# - ``stack_module_state`` copies the parameters of the models: for each name one
#   tensor, with a row for each model. It does the same with buffers; this network has
#   none. A later change of ``models[3]`` does not reach ``params``.
# - ``functional_call`` runs a module with parameters that you hand it, so ``predict``
#   is *one* model as a function of tensors; ``strict=True`` refuses missing and unknown
#   names.
# - ``vmap`` maps that function over the models. ``in_dims`` names, for each argument,
#   the dimension that counts them: 0 by default, ``None`` for what all share.
#
# The same with a loop
# --------------------
#
# One large kernel may add numbers in another order than ten small ones, so the last
# digits in float32 may differ. To tell rounding from a mistake, option 1 is computed in
# float64 as well, for eight images (option 2: tested). ``plot_how_equal.py`` explains
# the tolerance in float32.


def in64(state):
    return {key: tensor.cpu().double() for key, tensor in state.items()}


with torch.no_grad():
    loop_own = torch.stack([m(x) for m, x in zip(models, minibatches, strict=True)])
    loop_shared = torch.stack([m(minibatch) for m in models])

    few = minibatches[:, :8].cpu().double()  # eight images for each model
    own64 = vmap(predict)(in64(params), buffers, few)
    pairs = zip(models, few, strict=True)
    loop64 = torch.stack([predict(in64(m.state_dict()), {}, x) for m, x in pairs])

rounding = (loop_own[:, :8].cpu().double() - loop64).abs().max().item()
largest = loop_own.abs().max().item()
in32 = 1e-6 if device == cpu else 8 * rounding + 2**-23 * largest
print(f"largest logit {largest:.2f}; the loop is {rounding:.0e} from float64")
for case, one_call, loop, tol in [
    ("option 1", own, loop_own, in32),
    ("option 2", shared, loop_shared, in32),
    ("float64", own64, loop64, 1e-12),
]:
    print(f"{case}: {(one_call - loop).abs().max():.1e} apart, tolerance {tol:.0e}")
    equal = torch.allclose(one_call, loop, atol=tol, rtol=tol)
    assert equal, f"{case}: vmap does not compute what the loop computes"

# %%
# **For these inputs one call computes what the loop computes.** In your own project
# keep the line in float64; in float32, 1e-6 can fail once models are trained.
#
# Should it be faster?
# --------------------
#
# Convolutions and matrix products cost the same arithmetic (tested). Where the loop
# calls one of them ten times, ``vmap`` calls it once, as one batched matrix product or,
# with own inputs, one *grouped* convolution, and adds the bias in a call of its own;
# results are ten times as large. So expect one call
#
# - to win with many models that are each too small to keep the device busy;
# - to lose with a few small models, because ``vmap`` itself takes time;
# - to lose with ten CNNs on a CPU, probably because of large results and added
#   operators.
#
# Which is faster here?
# ---------------------
#
# We time option 1 for the CNN and for a small MLP, without autograd or compilation. You
# can skip the next cell: the ways take turns, so that other programs meet both alike.
# "No difference seen" does not mean equal.


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
# Both ways return one stacked tensor; the models are stacked before the clock starts.
# After three calls each to warm up, they take turns, at least seven. A gain is the
# median ratio of the turns, and the call's time is the loop's median over that gain:


@torch.no_grad()
def compare(make, inputs):
    """A model for each of the inputs, in a loop and in one call."""
    members = [make().to(device) for _ in inputs]
    params, _ = stack_module_state(members)
    shell = make().to("meta")
    one_call = vmap(lambda p, x: functional_call(shell, p, (x,), strict=True))
    return in_turns(
        lambda: torch.stack([m(x) for m, x in zip(members, inputs, strict=True)]),
        lambda: one_call(params, inputs),
        seconds=0.3,
    )


def small_mlp():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


# %%
# Each CNN has its own 64 images, each MLP its own 32 rows of 64 numbers:

cases = {
    "SimpleCNN": (SimpleCNN, data[: 10 if device == cpu else 100]),
    "small MLP": (small_mlp, torch.randn(100, 32, 64, device=device)),
}
sizes, gains, found, table = [1, 3, 10, 30, 100], {}, [], []
for case, (make, x) in cases.items():
    gains[case] = []
    for n in [n for n in sizes if n <= len(x)]:
        (looped, *_), (called, *gain) = compare(make, x[:n])
        gains[case].append(gain)
        times = f"loop {looped * 1e3:.3g} ms, one call {called * 1e3:.3g} ms"
        table.append(f"{n:3} {case}: {times}: {said(*gain)}")
    found.append(f"{n} {case} {said(*gain)}")
verdict = f"One call against the loop: {', '.join(found)}"
print(verdict, f"Medians on {name}; in brackets, 95 % intervals:", *table, sep="\n")

# %%

fig, ax = plt.subplots(layout="constrained")
for (case, runs), look in zip(gains.items(), ["C0o-", "C1^--"], strict=True):
    gain, low, high = zip(*runs, strict=True)
    ax.plot(sizes[: len(runs)], gain, look, label=case)
    ax.fill_between(sizes[: len(runs)], low, high, color=look[:2], alpha=0.2)
ax.axhline(1, color="gray")
ax.set_xscale("log")
ax.set_yscale("log", base=2)
ax.set_title(f"Prediction by one call and by a loop, float32\n{name}")
ax.set_xlabel("number of models")
ax.set_ylabel("time of loop / time of one call\n(above 1, one call is faster)")
ax.set_xticks(sizes, labels=sizes)
ax.yaxis.set_major_formatter("{x:g}")
ax.minorticks_off()
ax.legend()
fig.set_label(
    "Time of a loop divided by the time of one call, against the number of models, for "
    f"SimpleCNN and a small MLP, on logarithmic axes, with intervals. {verdict}."
)

# %%
# **Where one call is faster**, it probably saves the preparation of calls: see whether
# the time for each model stays the same in the loop and falls in one call. **Where it
# is slower for a few small models**, ``vmap`` probably takes longer than it saves.
# **Where it is slower for CNNs**, ``plot_what_vmap_runs.py`` tries the suspects one at
# a time.
#
# Combine the ten predictions
# ---------------------------
#
# Untrained models guess, so each first learns from 24 small minibatches of real digits
# (in a plain loop; ``plot_training.py`` trains all in one call). Their rival is one
# model that learns as long as the ten together:

digits = load_digits()  # 1,797 of 8 x 8 pixels, from 0 to 16
order = torch.randperm(1797)
x = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[order, None]
x = F.interpolate(x, size=28).to(device)  # [1797, 1, 28, 28]
y = torch.tensor(digits.target)[order].to(device)


def learn(models, num_steps):
    weights = [p for m in models for p in m.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-3, fused=True)
    for step in torch.randint(1600, (num_steps, len(models), 8), device=device):
        optimizer.zero_grad()
        pairs = zip(models, step, strict=True)
        sum(F.cross_entropy(m(x[i]), y[i]) for m, i in pairs).backward()
        optimizer.step()


learn(models, 24)
rival = SimpleCNN().to(device)
learn([rival], 24 * num_models)

# %%
# Average the probabilities for the other 197 digits, by option 2 and a new stack:

params, buffers = stack_module_state(models)
with torch.no_grad():
    logits = vmap(predict, in_dims=(0, 0, None))(params, buffers, x[1600:])
    alone = (rival(x[1600:]).argmax(dim=-1) == y[1600:]).float()  # [197]

combined = logits.softmax(dim=-1).mean(dim=0)  # [197, 10]
right = (logits.argmax(dim=-1) == y[1600:]).float()  # [10, 197]
all_ten = (combined.argmax(dim=-1) == y[1600:]).float()  # [197]
print(
    f"right on: ten combined {all_ten.mean():.1%}, rival {alone.mean():.1%},", end=" "
)
print(
    f"each {right.mean():.1%} ({right.mean(1).min():.1%} to {right.mean(1).max():.1%})"
)
for other, hits in {"one of them, on average": right.mean(0), "rival": alone}.items():
    gain = 100 * (all_ten - hits)  # [197]
    error = gain.std() / len(gain) ** 0.5
    print(f"combined against {other}: {gain.mean():+.2f} points (error {error:.2f})")

# %%
# The error is the standard error over the digits, for these models. **The mean can gain
# where wrong answers differ.** If the last line is below zero by more than twice its
# error, one model that learned ten times as long was better than ten that learned
# little: an ensemble is for models to which more training adds little
# (``plot_more_members.py``). Where members disagree, the ensemble is unsure: see
# ``plot_unknown_inputs.py``.
#
# The mistake: a shared minibatch without ``None``
# ------------------------------------------------
#
# Without ``in_dims``, ``vmap`` takes the first dimension of *every* argument for the
# models, and so the 64 images for 64 models:

try:
    vmap(predict)(params, buffers, minibatch)
except ValueError as error:
    print(error)

# %%
# The cure is ``in_dims=(0, 0, None)``. With ten images in the batch, the sizes agree
# and each model gets one image. This CNN still stops, with an error that does not name
# the cause; linear layers compute a wrong result without an error (that is tested).
# Look at the shape, which has to be ``[model, image, class]``.
#
# Remember
# --------
#
# ``stack_module_state`` makes one state of many models, ``functional_call`` runs one
# model with a state that you hand it, and ``vmap`` does so for all. **One entry of**
# ``in_dims`` **decides whether all share a minibatch.** Whether one call is faster, you
# have to measure.
#
# Next
# ----
#
# - ``plot_your_own_model.py``: whether it works for your model, and pays.
# - ``plot_recipes.py``: what one does with an ensemble, a few lines each.
# - ``plot_training.py`` trains all models with one optimizer.
# - ``plot_state.py``: batch norm, dropout, tied weights.
# - ``plot_when_vmap_pays.py`` has more sizes, and training;
#   ``plot_fastest_ensemble.py`` makes loop and call faster.
#
# References
# ----------
#
# - The original: ``plot_ensembling.py`` in `pytorch/functorch
#   <https://github.com/pytorch/functorch>`_, 2021. Its page as built in February 2022
#   (``fc0b665b`` of ``gh-pages``) shows both outcomes with ten CNNs: a comment says
#   4.91 ms (loop) and 2.07 ms (one call) on an A100 GPU, the captured output 5.81 ms
#   and 6.34 ms on a machine that it does not name.
# - B. Lakshminarayanan, A. Pritzel, C. Blundell: Simple and scalable predictive
#   uncertainty estimation using deep ensembles, `arXiv:1612.01474
#   <https://arxiv.org/abs/1612.01474>`_, 2017.
