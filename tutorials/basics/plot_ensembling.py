"""
An ensemble of CNNs in one vectorized call
==========================================

Run ten convolutional networks of one architecture as a single call of
``torch.func.vmap``, check that it returns what a loop over the models returns, and
measure which of the two is faster on your machine.

**In short.** ``stack_module_state`` puts the parameters of all models into one set of
tensors, a row for each model; ``vmap`` runs the forward pass of one model for all rows
at once, on its own minibatch or on one that all share. The result is that of the loop
up to rounding; the speed depends on model, batch and machine.

Before you start: the `PyTorch basics
<https://docs.pytorch.org/tutorials/beginner/basics/intro.html>`_. You need no GPU.
"""

# %%
# Set-up
# ------

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import Measurement, Timer

torch.manual_seed(0)
torch.backends.cudnn.conv.fp32_precision = "ieee"  # no TF32, which has 3 digits
torch.backends.cuda.matmul.fp32_precision = "ieee"

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{name}, torch {torch.__version__}, float32, IEEE")

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
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))  # [64, 64, 24, 24]
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
    skeleton = SimpleCNN()  # code without memory


def predict(params, buffers, x):
    """Logits of one model."""
    return functional_call(skeleton, (params, buffers), (x,), strict=True)


with torch.no_grad():  # leave this out to train
    own = vmap(predict)(params, buffers, minibatches)
    shared = vmap(predict, in_dims=(0, 0, None))(params, buffers, minibatch)

print("option 1:", list(own.shape), " option 2:", list(shared.shape))

# %%
# Both results are ``[model, image, class]``. Three functions make them:
#
# - ``stack_module_state`` copies the parameters of all models into one dictionary, in
#   which every tensor has a new first dimension; buffers as well, but this network has
#   none. After the copy, a change of ``models[3]`` does not reach ``params``.
# - ``functional_call`` runs a module with parameters that you hand it. So ``predict``
#   is *one* model as a function of tensors, the form that ``vmap`` needs. On the
#   ``meta`` device the skeleton's own tensors have shapes and no memory;
#   ``strict=True`` insists that the call supplies them all.
# - ``vmap`` maps that function over the models. ``in_dims`` names, for each argument,
#   the dimension that counts them: 0 by default, ``None`` for what all share.
#
# In older code, ``functorch.combine_state_for_ensemble`` did the work of the first two.
#
# The same with a loop
# --------------------
#
# One large kernel may add numbers in another order than ten small ones, so the last
# bits differ. On a CPU, each logit has to agree within one part in a million (of itself
# or of 1, if that is more); elsewhere, within 224 roundings of the largest logit, the
# tolerance of ``plot_how_equal.py``.

with torch.no_grad():
    pairs = zip(models, minibatches, strict=True)
    loop_own = torch.stack([model(x) for model, x in pairs])
    loop_shared = torch.stack([model(minibatch) for model in models])

for option, one_call, loop in [(1, own, loop_own), (2, shared, loop_shared)]:
    distance = (one_call - loop).abs().max()
    tol = 1e-6 if device == cpu else 224 * 2**-24 * loop.abs().max().item()
    assert torch.allclose(one_call, loop, atol=tol, rtol=tol), (
        f"option {option}: vmap does not compute what the loop computes; "
        f"a logit is off by {distance:.1e}"
    )
    print(f"option {option}: equal within {tol:.0e}; largest difference {distance:.1e}")

# %%
# **One call computes what the loop computes.** Keep this check in your own project. If
# it fails there, because a GPU uses TF32 or logits are larger, ``plot_how_equal.py``
# finds a fair tolerance and lets float64 decide who is wrong.
#
# Should it be faster?
# --------------------
#
# The arithmetic is the same. But where the loop calls each operator ten times, ``vmap``
# calls it once: a linear layer becomes one batched matrix product, a convolution one
# *grouped* convolution with a group for each model. This saves calls, which cost
# microseconds each and leave a GPU idle. It also makes every intermediate result ten
# times as large: 10 x 64 images x 64 channels x 24 x 24 pixels x 4 bytes behind
# ``conv2``, more than most CPU caches hold.
#
# So expect ``vmap`` to be faster where one small model cannot fill the device, as on a
# GPU, and slower where one model keeps all cores busy already and large results have
# their price, as on a small CPU.
#
# Which is faster here?
# ---------------------
#
# We time option 1. Both sides return one stacked tensor, with autograd off. They take
# five turns each, every turn with a call to warm up; ``Timer`` waits for a GPU.


def in_turns(*functions, rounds=5):
    """One ``Measurement`` for each function; they take turns, so drift hits all."""
    threads = torch.get_num_threads()
    timers = [Timer("f()", globals={"f": f}, num_threads=threads) for f in functions]
    turns = [
        [timer.blocked_autorange(min_run_time=0.05) for timer in timers]
        for _ in range(rounds)
    ]
    return [Measurement.merge(column)[0] for column in zip(*turns, strict=True)]


def compare(n):
    """Times of n models: in a loop, and in one call."""
    members, inputs = many[:n], data[:n]
    state = stack_module_state(members)
    return in_turns(
        lambda: torch.stack([m(x) for m, x in zip(members, inputs, strict=True)]),
        lambda: vmap(predict)(*state, inputs),
    )


# %%
# Up to ten models, or a hundred on a GPU:

sizes = [1, 2, 5, 10] if device == cpu else [1, 2, 5, 10, 20, 50, 100]
many = [SimpleCNN().to(device) for _ in range(max(sizes))]
with torch.no_grad():
    loops, calls = zip(*[compare(n) for n in sizes], strict=True)

print("models  loop, vmap: median ms (distance between the quartiles)")
for n, loop, call in zip(sizes, loops, calls, strict=True):
    ratio = loop.median / call.median
    verdict = f"{max(ratio, 1 / ratio):.1f}x {'faster' if ratio > 1 else 'slower'}"
    if abs(loop.median - call.median) < max(loop.iqr, call.iqr):
        verdict = "about as fast"
    looped, called = (f"{t.median * 1e3:.2f} ({t.iqr * 1e3:.2f})" for t in (loop, call))
    print(f"{n:6}  {looped}, {called}: vmap is {verdict}")

# %%

fig, ax = plt.subplots(layout="constrained")
for way, look, runs in [("loop", "C0o-", loops), ("vmap", "C1^--", calls)]:
    ax.loglog(sizes, [t.median * 1e3 for t in runs], look, label=way)
    fastest, slowest = ([f(t.times) * 1e3 for t in runs] for f in (min, max))
    ax.fill_between(sizes, fastest, slowest, color=look[:2], alpha=0.2)
ax.set_title(f"Prediction of SimpleCNNs, batch 64, float32\n{name}")
ax.set_xlabel("number of models")
ax.set_ylabel("time [ms]; band: all turns")
ax.set_xticks(sizes, labels=sizes)
ax.yaxis.set_major_formatter("{x:g}")
ax.xaxis.minorticks_off()
ax.legend()
fig.set_label(
    "Time of one prediction by all models against the number of models, for the loop "
    f"and for vmap, on logarithmic axes. With {n} models, vmap is {verdict}."
)

# %%
# **If vmap is faster here**, the calls of the loop left the device waiting, and one
# call for all models waits once. Larger images, batches or layers shrink the gain, and
# so do slow grouped convolutions. The authors of this example saw both in 2022: 4.91 ms
# (loop) against 2.07 on an A100 GPU, 5.81 against 6.34 where their page was built.
#
# **If vmap is slower here**, there was no idle device to fill, and the large tensors
# have their price: on a CPU, fresh memory, which ``plot_what_vmap_runs.py`` measures.
# There, keep a loop for this network, best compiled (``plot_fastest_ensemble.py``);
# with smaller models, one call is faster on a CPU too (``plot_when_vmap_pays.py``).
#
# Combine the ten predictions
# ---------------------------
#
# Average the probabilities, or let the models vote. For both, all models must see the
# same images, so this takes option 2. Our models are untrained, so they disagree:

by_mean = shared.softmax(dim=-1).mean(dim=0).argmax(dim=-1)  # [64]
votes = shared.argmax(dim=-1)  # [10, 64]
by_vote = votes.mode(dim=0).values  # [64]
for_winner = (votes == by_vote).sum(dim=0)  # [64], of 10 votes

print(f"mean and vote agree on {(by_mean == by_vote).sum()} of {len(votes.T)} images")
print(f"votes for the winning class: {for_winner.min()} to {for_winner.max()}")

# %%
# **Where trained models disagree, the ensemble is unsure**: what that is worth is the
# subject of ``plot_unknown_inputs.py``.
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
# The cure is ``in_dims=(0, 0, None)``. With ten images in the batch, the sizes would
# agree and every model would get one image: look at the shape of the result, too.
#
# Other refusals mostly mean that a model is no pure function of tensors, for instance
# by ``.item()`` or an ``if`` on values: PyTorch lists these `limitations
# <https://docs.pytorch.org/docs/stable/func.ux_limitations.html>`_. Batch norm, dropout
# and tied weights are the subject of ``plot_state.py``.
#
# Remember
# --------
#
# ``stack_module_state`` makes one state of many models, ``functional_call`` makes a
# function of one model, ``vmap`` calls it for all. **One entry of** ``in_dims``
# **decides between own and shared minibatches.** The result is that of the loop up to
# rounding; whether it comes faster, you have to measure.
#
# Next
# ----
#
# - ``plot_recipes.py``: what one does with an ensemble, a few lines each.
# - ``plot_training.py`` trains all models with one optimizer.
# - ``plot_when_vmap_pays.py`` says for which models and batches one call is faster.
#
# References
# ----------
#
# - The original: ``plot_ensembling.py`` in `pytorch/functorch
#   <https://github.com/pytorch/functorch>`_, 2021, and its page as built in 2022.
# - B. Lakshminarayanan, A. Pritzel, C. Blundell: Simple and scalable predictive
#   uncertainty estimation using deep ensembles, 2017,
#   `arXiv:1612.01474 <https://arxiv.org/abs/1612.01474>`_.
