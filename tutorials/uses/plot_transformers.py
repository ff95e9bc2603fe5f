"""
Many transformers in one call
=============================

Train many small transformers at once with ``torch.func.vmap``, and predict with them:
``nn.TransformerEncoder`` with padding masks and dropout. A list says what masks, half
precision, and BERT and GPT-2 of Hugging Face need.

**In short.** Write
``call = sdpa_kernel(SDPBackend.MATH)(vmap(predict, randomness="different"))``, and pass
padding and attention masks by position. In eval mode, first call
``torch.backends.mha.set_fastpath_enabled(False)``. Without ``MATH`` and dropout, a CPU
runs attention once for each model, and ``vmap`` warns of "a performance drop", though
it may be faster. On a CPU expect one call to be faster than a loop for many narrow
models, in training sooner than in prediction: timed below.

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
# Each model reads lists of digits, padded to ``length``, and answers with logits.


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

math_attention = sdpa_kernel(SDPBackend.MATH)  # see "Is it faster than a loop?"
call = math_attention(vmap(predict, randomness="different"))  # own dropout for each

# %%
# Each model gets a minibatch and padding of its own, and learns to name the largest
# digit of a list:


def draw(num_models, batch, length=16, device=device):
    """Lists, their padding, and the largest digit of each."""
    x = torch.randint(10, (num_models, batch, length))
    padding = torch.arange(length) >= torch.randint(1, length + 1, (*x.shape[:2], 1))
    y = x.masked_fill(padding, -1).amax(-1)
    return x.to(device), padding.to(device), y.to(device)


optimizer = torch.optim.Adam(params.values(), lr=3e-3, fused=True)
for _ in range(80):
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
# One call computes what a loop computes
# --------------------------------------
#
# Compare outputs and gradients of three models in eval mode, each with its own padding,
# in float64 on the CPU. (They agree in train mode without dropout, too: tested.)

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
# layer, unless it finds that a gradient is recorded. Inside ``vmap`` it does not find
# that, and the backward pass fails:

warnings.filterwarnings("ignore", "There is a performance drop")  # timed below
torch.backends.mha.set_fastpath_enabled(True)
try:
    call(weights, x, padding).sum().backward()
    print("this version of PyTorch computes the gradient")
except RuntimeError as error:
    print(error)

# %%
# A prediction works, but this operator runs once for each model, with a warning. With
# the default ``enable_nested_tensor=True`` a padding mask raises ``Batching rule not
# implemented for aten::_nested_tensor_from_mask_left_aligned``. The switch, which holds
# for all of PyTorch, cures both errors and turns this operator off (tested).
#
# Causal masks, dropout, half precision, Hugging Face
# ---------------------------------------------------
#
# - **A causal mask** that all models share needs no argument: let the function use it
#   from outside, or create it inside.
# - **An attention mask of its own for each model** is one more mapped argument. Pass
#   ``is_causal=False`` to the encoder with it. Otherwise the encoder compares the
#   mask's values, and ``vmap`` raises an error about data-dependent control flow.
# - **Keyword arguments of the mapped function are not mapped**, and no error says so:
#   ``plot_silent_mistakes.py``.
# - **Dropout**: with ``randomness="same"`` all models drop the same units.
# - **Half precision**: put ``torch.autocast`` around the call. On a CPU the call above
#   then returns float32, while a model alone returns bfloat16. With ``GradScaler``, one
#   model whose gradient overflows makes it skip the step of all: ``plot_data.py``.
# - **Checkpointing**: put ``torch.utils.checkpoint`` around the call, not inside a
#   model: ``plot_what_vmap_refuses.py``.
# - **FlexAttention** has no rule for ``vmap``. Call it outside, with the models in the
#   batch: ``flex_attention(*[t.flatten(0, 1) for t in (q, k, v)], block_mask=mask)``. A
#   ``mask_mod`` runs under ``vmap``, so compute what it needs before, one for each
#   ``b``, model by model and row by row, and index it:
#   ``lambda b, h, i, j: j < lengths[b]``.
# - **Hugging Face**: we tried small ``BertForSequenceClassification`` and
#   ``GPT2LMHeadModel`` of transformers 5.24.0 with random weights in eval mode. Map the
#   buffers, too, and return ``.logits``. Give it a mask of floats, ``[batch, 1, 1,
#   tokens]`` (GPT-2: ``[batch, 1, tokens, tokens]``, causal as well), 0 to see and
#   ``torch.finfo(dtype).min`` to ignore. A mask ``[batch, tokens]`` raises the error
#   about data-dependent control flow, except in GPT-2 with "eager" attention. **With
#   "eager", a mask of booleans gives wrong numbers**, without an error.
#
# All of this is tested. Decoders that keep keys and values: ``plot_generate.py``.
#
# Is it faster than a loop?
# -------------------------
#
# With small tensors a loop probably spends its time on starting operators, and one call
# starts most of them once for all models. So we expect a gain with many narrow models.
#
# Attention has two forms. A loop without dropout calls one **fused kernel**. (With
# dropout a CPU has none: tested.) ``vmap`` runs a CPU's fused kernel once for each
# model, and warns. ``MATH`` is a few operators that ``vmap`` runs for all models at
# once, but they write a number for each pair of tokens. So we expect ``MATH`` to be
# better for short sequences, and worse for long ones. On a GPU this page times ``MATH``
# only. It has not run on CUDA. There, ``vmap`` runs fused kernels once for all models
# [1], but masks have raised errors [2], and so have gradients inside ``vmap`` [3].


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
# Each model has a minibatch of 8 lists. In training, each side gets one fused Adam and
# one backward pass for all models. To predict, the loop gets the fast path where that
# is the faster one.


def train_step(way, optimizer):
    optimizer.zero_grad()
    way().square().sum().backward()
    optimizer.step()


@torch.no_grad()
def predict_with(way, fast):
    torch.backends.mha.set_fastpath_enabled(fast)
    return way()


# %%


def forms(task, n, width, length):
    """A loop, one call with MATH and, where a CPU has it, with the fused kernel."""
    sizes = width, length, 0.1 if "dropout" in task else 0
    models = [Reader(*sizes).to(device) for _ in range(n)]
    params, _ = stack_module_state(models)
    rows = draw(n, 8, length)[:2]  # lists and padding
    with torch.device("meta"):
        shell = Reader(*sizes)

    def loop():
        return torch.stack([m(*row) for m, *row in zip(models, *rows, strict=True)])

    once = vmap(partial(functional_call, shell), randomness="different")
    once = partial(once, params, rows)
    ways = [loop, math_attention(once)]
    if device == cpu and "dropout" not in task:
        ways.append(once)
    if task != "predict":
        weights = [p for m in models for p in m.parameters()], *2 * [params.values()]
        adams = [torch.optim.Adam(p, fused=True) for p in weights]
        return [partial(train_step, *pair) for pair in zip(ways, adams, strict=False)]
    for model in *models, shell:
        model.eval()
    fast, plain = [partial(predict_with, loop, fast) for fast in (True, False)]
    best = plain if in_turns(fast, plain, seconds=0.1)[1][1] > 1 else fast
    return [best, *[partial(predict_with, way, False) for way in ways[1:]]]


# %%
# Medians of at least seven turns, warm; predictions run without autograd. Brackets hold
# the 95 % interval of the gain over the loop: where it is wide, "no difference seen"
# means undecided.

cases = [(1, 32, 16), (4, 32, 16), (16, 32, 16), (4, 32, 64), (4, 128, 16)]
if device != cpu:
    cases = [(1, 32, 16), (32, 32, 16), (128, 32, 16), (32, 32, 256), (32, 256, 16)]
gains = {"train": [], "train, dropout 0.1": [], "predict": []}
for n, width, length in cases:
    for task in gains:
        (each, *_), *calls = in_turns(*forms(task, n, width, length), seconds=0.15)
        print(f"{n} x width {width}, {length} tokens, {task}: loop {each * 1e3:.3g} ms")
        for kernel, (once, *gain) in zip(("MATH", "fused"), calls, strict=False):
            print(f"    one call ({kernel}) {once * 1e3:.3g} ms: {said(*gain)}")
        gains[task].append([gain for _, *gain in calls])
torch.backends.mha.set_fastpath_enabled(True)

# %%

labels = [f"{n} x width {width}, {length} tokens" for n, width, length in cases]
fig, axes = plt.subplots(
    1, 3, sharex=True, sharey=True, figsize=(9, 3.6), layout="constrained"
)
for ax, (task, rows) in zip(axes, gains.items(), strict=True):
    for k, kernel in enumerate(("MATH", "fused")[: len(rows[0])]):
        middle, low, high = torch.tensor([row[k] for row in rows]).T
        places, spread = (
            torch.arange(len(rows)) + 0.25 * k,
            [middle - low, high - middle],
        )
        ax.errorbar(middle, places, xerr=spread, fmt="os"[k], label=kernel)
    ax.axvline(1, color="gray")
    ax.set(xscale="log", title=task, xlabel="time of loop / one call")
    ax.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    ax.minorticks_off()
axes[0].set_yticks(range(len(cases)), labels)
axes[0].invert_yaxis()
axes[2].legend(title="attention")
fig.suptitle(
    f"Encoders of two layers, float32, {where} (right of 1: one call is faster)"
)
most = [f"{task}, {said(*rows[2][0])}" for task, rows in gains.items()]
fig.set_label(
    "Gain of one call over a loop, with intervals, for five sizes, to train without "
    f"and with dropout and to predict. With MATH, {labels[2]}: {'; '.join(most)}."
)

# %%
# In our runs on a CPU, one call trained 16 models of width 32 faster than a loop, and
# did not gain with one model or at width 128. It needed more models to gain in
# prediction than in training. Compare the two kernels row by row: where the fused one
# is faster, to predict most of all, leave ``math_attention`` out, and where the loop is
# faster still, keep the loop. Read the table for a size near yours, or put your own
# model into ``plot_your_own_model.py``. One reason why one call can be slower, fresh
# memory, is measured for CNNs in ``plot_what_vmap_runs.py``.
#
# Remember
# --------
#
# ``nn.TransformerEncoder`` works under ``vmap`` with ``randomness="different"`` and
# ``SDPBackend.MATH``; **in eval mode, switch the fast path off**. Masks that differ are
# positional arguments. Time one call against a loop at your own width and length.
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
# - [1] Rules of CUDA's fused kernels: `pytorch#133964
#   <https://github.com/pytorch/pytorch/pull/133964>`_.
# - [2] Masks: `pytorch#151558 <https://github.com/pytorch/pytorch/issues/151558>`_,
#   `pytorch#188764 <https://github.com/pytorch/pytorch/pull/188764>`_.
# - [3] Gradients inside ``vmap``: `pytorch#191085
#   <https://github.com/pytorch/pytorch/pull/191085>`_.
