"""
Many transformers in one call
=============================

Call and train many small transformers at once with ``torch.func.vmap``: encoders of
``torch.nn``, with padding, dropout and masks of their own, and small BERTs and GPT-2s.

**In short.** In train mode ``vmap`` takes ``nn.TransformerEncoder`` with
``randomness="different"``; in eval mode, switch its fast path off. Pass masks to the
mapped function by position: ``vmap`` does not map its keyword arguments. On a CPU
expect a gain for many narrow models and short sequences only: the table below times
five sizes, in one call and in a loop.

Before you start: ``plot_ensembling.py`` says how models are stacked.
"""

# %%
# Set-up
# ------

import math
import warnings
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import timer

torch.manual_seed(0)
torch.backends.fp32_precision = "ieee"  # no TF32
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
where = f"{device.type.upper()}, {torch.get_num_threads()} threads"
if device.type == "cuda":
    where = torch.cuda.get_device_name()
print(f"{where}, torch {torch.__version__}, float32, IEEE")

# %%
# Encoders: train them, and predict
# ---------------------------------
#
# A model reads a list of digits that is padded to ``length``.


class Reader(nn.Module):
    def __init__(self, width=32, length=16, dropout=0.1):
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.place = nn.Parameter(torch.randn(length, width) / 10)
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, dropout=dropout, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x, padding):  # [batch, length]; padding: True to ignore
        x = self.encoder(self.embed(x) + self.place, src_key_padding_mask=padding)
        return self.head(x[:, 0])  # [batch, 10]


def predict(params, x, padding):
    return functional_call(skeleton, params, (x, padding), strict=True)


num_models = 8
models = [Reader().to(device) for _ in range(num_models)]
params, _ = stack_module_state(models)
with torch.device("meta"):
    skeleton = Reader().train()

call = vmap(predict, randomness="different")  # own dropout for each model
warnings.filterwarnings("ignore", "There is a performance drop")  # measured below

# %%
# Every model gets a minibatch of its own with its own padding, and learns to name the
# largest digit of a list:


def draw(num_models, batch, length=16, device=device):
    """Lists, their padding, and the largest digit of each."""
    x = torch.randint(10, (num_models, batch, length))
    padding = torch.arange(length) >= torch.randint(1, length + 1, (*x.shape[:2], 1))
    y = x.masked_fill(padding, -1).amax(-1)
    return x.to(device), padding.to(device), y.to(device)


optimizer = torch.optim.Adam(params.values(), lr=3e-3, fused=True)
for _ in range(100):
    x, padding, y = draw(num_models, 32)
    logits = call(params, x, padding)  # [8, 32, 10]
    losses = F.cross_entropy(logits.mT, y, reduction="none").mean(1)  # [8]
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()

skeleton.eval()
torch.backends.mha.set_fastpath_enabled(False)  # before vmap meets eval mode
x, padding, y = draw(num_models, 500)
with torch.no_grad():
    for name, mask in {"with": padding, "without": torch.zeros_like(padding)}.items():
        right = (call(params, x, mask).argmax(-1) == y).float().mean(1)
        print(f"{name} padding mask: {right.min():.0%} to {right.max():.0%} right")

# %%
# It computes what a loop computes
# --------------------------------
#
# In float64 on the CPU, in eval mode: outputs and gradients of three models, each with
# its own padding. (In train mode without dropout as well: tested.)

trio = [Reader().eval().cpu().double() for _ in range(3)]
weights, _ = stack_module_state(trio)
x, padding, _ = draw(3, 5, device=cpu)
out = call(weights, x, padding)  # [3, 5, 10]
loop = torch.stack([m(*row) for m, *row in zip(trio, x, padding, strict=True)])
(out.sin().sum() + loop.sin().sum()).backward()
pairs = [(out, loop)]
for name, weight in weights.items():
    pairs.append((weight.grad, torch.stack([m.get_parameter(name).grad for m in trio])))
far = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()
print(f"outputs and gradients, largest difference from a loop: {far:.0e}")
assert far < 1e-10, "one call is not the loop"

# %%
# The mistake: eval mode with the fast path
# -----------------------------------------
#
# In eval mode an encoder with ``batch_first=True`` calls one fused operator for each
# layer, unless it sees that a gradient is recorded. Inside ``vmap`` it does not see
# that:

torch.backends.mha.set_fastpath_enabled(True)
try:
    call(weights, x, padding).sum().backward()
    print("this version of PyTorch computes the gradient")
except RuntimeError as error:
    print(error)

# %%
# To predict, this operator runs once for each model, with a warning. With the default
# ``enable_nested_tensor=True`` a padding mask raises ``Batching rule not implemented
# for aten::_nested_tensor_from_mask_left_aligned``. All of this is tested. The switch,
# which holds for all of PyTorch, cures both errors and turns off this operator; a CPU's
# attention still runs once for each model (below).
#
# Masks, dropout, half precision, checkpoints
# -------------------------------------------
#
# - **A causal mask** that all models share needs no argument: let the function use it
#   from outside, or create it inside.
# - **An attention mask of its own for each model** is one more mapped argument. Pass
#   ``is_causal=False`` to the encoder with it; otherwise the encoder compares the
#   mask's values, and ``vmap`` refuses that.
# - **Keywords of the mapped function are not mapped**, without an error:
#   ``plot_silent_mistakes.py``.
# - **Dropout**: with ``randomness="same"`` all models drop the same units.
# - ``torch.autocast`` works around the call. On a CPU, a linear layer with a bias then
#   returns float32, while alone it returns bfloat16. One model whose gradient overflows
#   makes ``GradScaler`` skip the step of all: ``plot_data.py``.
# - ``torch.utils.checkpoint`` belongs around the call, not inside a model:
#   ``plot_what_vmap_refuses.py``.
#
# **Models of Hugging Face**, here ``BertForSequenceClassification`` and
# ``GPT2LMHeadModel`` of transformers 5.24.0, small, with random weights, in eval mode:
# let the function return ``.logits``, and give it a mask of floats, ``[batch, 1, 1,
# tokens]`` (GPT-2: ``[batch, 1, tokens, tokens]``, causal as well), 0 to see and
# ``torch.finfo(dtype).min`` to ignore. A mask ``[batch, tokens]`` raises an error about
# data-dependent control flow, except for GPT-2 with "eager" attention, which takes it.
# With "eager", a mask of booleans gives other numbers, without an error.
#
# All of this is tested. Decoders that keep keys and values: ``plot_generate.py``.
#
# Is it faster than a loop?
# -------------------------
#
# With small tensors a loop probably spends its time on starting operators, and one call
# starts most of them once for all models: we expect it to gain with many narrow models.
# Without dropout and outside the fast path, a loop's attention is one fused kernel.
# ``vmap`` runs a CPU's kernel in a loop over the models (hence the warning that this
# page hides); on CUDA this holds for the gradients of ``vmap(grad(...))`` [1]. (This
# page has not run on CUDA. There, masks under ``vmap`` have raised errors [2]: use
# ``MATH`` if yours do, and compare gradients before you train.) Inside
# ``sdpa_kernel(SDPBackend.MATH)``, attention is a few operators that ``vmap`` runs for
# all models at once, but they write a number for each pair of tokens. So we expect
# ``MATH`` to be better than the fused kernel for short sequences, and worse for long
# ones.


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
# In training, each side gets one fused Adam and one backward pass for all models. To
# predict, the loop gets the fast path where that is the faster one. A
# model has a minibatch of 8 lists.


def train_step(way, optimizer):
    optimizer.zero_grad()
    way().square().sum().backward()
    optimizer.step()


@torch.no_grad()
def predict_with(way, fast):
    torch.backends.mha.set_fastpath_enabled(fast)
    return way()


def forms(task, n, width, length):
    """Loop, one call with the fused kernel and one with MATH."""
    sizes = width, length, 0.1 if "dropout" in task else 0.0
    models = [Reader(*sizes).to(device) for _ in range(n)]
    params, _ = stack_module_state(models)
    x, padding, _ = draw(n, 8, length)
    with torch.device("meta"):
        shell = Reader(*sizes)

    def loop():
        return torch.stack(
            [m(*row) for m, *row in zip(models, x, padding, strict=True)]
        )

    call = vmap(partial(functional_call, shell), randomness="different")
    fused = partial(call, params, (x, padding))
    ways = loop, fused, sdpa_kernel(SDPBackend.MATH)(fused)
    if task != "predict":
        weights = [p for m in models for p in m.parameters()], params.values()
        loop_adam, adam = [torch.optim.Adam(p, fused=True) for p in weights]
        return list(map(partial, 3 * [train_step], ways, [loop_adam, adam, adam]))
    for model in *models, shell:
        model.eval()
    fast, plain = [partial(predict_with, loop, fast) for fast in (True, False)]
    best = plain if in_turns(fast, plain, seconds=0.1)[1][1] > 1 else fast
    return [best, *[partial(predict_with, way, False) for way in ways[1:]]]


# %%
# Medians of at least seven turns, warm; predictions run without autograd. Without
# dropout, ``MATH`` is timed against the fused kernel first, then the faster of both
# against the loop. Brackets hold the gain's 95 % interval: where it is wide, "no
# difference seen" means undecided.

cases = [(1, 32, 16), (8, 32, 16), (24, 32, 16), (4, 32, 64), (4, 128, 16)]
if device != cpu:
    cases = [(1, 32, 16), (64, 32, 16), (512, 32, 16), (64, 32, 256), (64, 256, 64)]
gains = {"train": [], "train, dropout 0.1": [], "predict": []}
for n, width, length in cases:
    for task in gains:
        loop, fused, plain = forms(task, n, width, length)
        print(f"{n} x width {width}, {length} tokens, {task}:")
        name, call = "fused", fused
        if "dropout" not in task:
            _, (_, *gain) = in_turns(fused, plain, seconds=0.1)
            print(f"    MATH against fused: {said(*gain)}")
            if gain[0] > 1:
                name, call = "MATH", plain
        (each, *_), (once, *gain) = in_turns(loop, call, seconds=0.2)
        print(f"    loop {each * 1e3:.3g} ms, one call ({name}) {once * 1e3:.3g} ms")
        print(f"    one call against the loop: {said(*gain)}")
        gains[task].append(gain)
torch.backends.mha.set_fastpath_enabled(True)

# %%

labels = [f"{n} x width {width}, {length} tokens" for n, width, length in cases]
fig, axes = plt.subplots(
    1, 3, sharex=True, sharey=True, figsize=(9, 3.6), layout="constrained"
)
for ax, (task, rows) in zip(axes, gains.items(), strict=True):
    middle, low, high = torch.tensor(rows).T
    spread = [middle - low, high - middle]
    ax.errorbar(middle, range(len(cases)), xerr=spread, fmt="o")
    ax.axvline(1, color="gray")
    ax.set(xscale="log", title=task, xlabel="time of loop / one call")
    ax.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    ax.minorticks_off()
axes[0].set_yticks(range(len(cases)), labels)
axes[0].invert_yaxis()
fig.suptitle(
    f"Encoders of two layers, float32, {where} (right of 1: one call is faster)"
)
fig.set_label(
    "Gain of one call over a loop, with intervals, for five sizes, to train without "
    f"and with dropout and to predict. To train with dropout: {labels[2]} "
    f"{said(*gains['train, dropout 0.1'][2])}; {labels[-1]} "
    f"{said(*gains['train, dropout 0.1'][-1])}."
)

# %%
# Read the table for a size near yours, and put your own model into
# ``plot_your_own_model.py``. Expect no gain with one model. Where ``MATH`` is faster
# than the fused kernel, wrap the call: ``call = sdpa_kernel(SDPBackend.MATH)(call)``.
# With dropout, CPUs have no fused kernel (tested): both forms are the same then. One
# reason why one call can be slower, fresh memory, is measured for CNNs in
# ``plot_what_vmap_runs.py``.
#
# Remember
# --------
#
# ``nn.TransformerEncoder`` works under ``vmap`` in train mode with
# ``randomness="different"``; **for eval mode, switch the fast path off**. Masks that
# differ are positional arguments. Time one call against a loop at your own width and
# length, with and without ``MATH``.
#
# Next
# ----
#
# - ``plot_generate.py``: decoders that write text, with a cache of keys and values.
# - ``plot_what_vmap_runs.py``: find operators that ``vmap`` runs in a loop.
# - ``plot_training.py``: stop early, clip, keep the best state of each model.
#
# References
# ----------
#
# - [1] ``vmap`` and CUDA's fused attention: `pytorch#133964
#   <https://github.com/pytorch/pytorch/pull/133964>`_, `pytorch#117016
#   <https://github.com/pytorch/pytorch/issues/117016>`_.
# - [2] Masks: `pytorch#151558 <https://github.com/pytorch/pytorch/issues/151558>`_,
#   `pytorch#188764 <https://github.com/pytorch/pytorch/pull/188764>`_.
