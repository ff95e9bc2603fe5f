"""
Generate text with many models in one call
==========================================

Let many small GPTs write at once with ``torch.func.vmap`` and a KV cache: each model
its own texts, greedy or sampled, or the whole ensemble one text.

**In short.** Map one step, ``call = partial(vmap(step), params)``, and keep the loop
over tokens outside of ``vmap``: a step takes the newest token of each text and the
stacked caches of keys and values, and returns logits and longer caches. Choose tokens
and stop by ordinary code on the stacked logits. To write one text with an ensemble,
average the models' probabilities for each token. Expect one call to be faster than a
loop for many small models, and not for one: timed below.

Before you start: ``plot_ensembling.py`` says how models are stacked.
"""

# %%
# Set-up
# ------

import math
from functools import partial

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
# The loop over tokens
# --------------------
#
# Here ``call(tokens, real, *caches)`` is one step of all models; the next two sections
# build it. Shorter prompts are padded on the left, where ``real`` is False.

PAD, END = 0, 1


@torch.no_grad()
def generate(call, tokens, choose, number):
    """At most ``number`` more tokens for each text: [models, batch, number]."""
    real, caches, written = tokens != PAD, [], []  # tokens: [models, batch, prompt]
    ended = torch.zeros_like(real[..., 0])  # [models, batch]
    for _ in range(number):
        logits, *caches = call(tokens, real, *caches)  # [models, batch, new, symbols]
        token = choose(logits[:, :, -1]).masked_fill(ended, PAD)
        written.append(token)
        ended = ended | (token == END)
        if ended.all():  # an ordinary test, outside of vmap
            break
        tokens, real = token[..., None], torch.cat([real, ~ended[..., None]], dim=-1)
    return torch.stack(written, dim=-1)


def greedy(logits):  # [models, batch, symbols]
    return logits.argmax(-1)


def sample(logits, temperature=1.0, top_k=10):
    least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
    logits = logits.masked_fill(logits < least, -math.inf) / temperature
    return torch.distributions.Categorical(logits=logits).sample()


# %%
# A GPT with a cache
# ------------------
#
# Each block appends the new keys and values to those that it is given. No token sees
# padding, and places are counted from the first token that is not padding.


class Block(nn.Module):
    def __init__(self, width, heads=4):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.out, self.up = nn.Linear(width, width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x, mask, cache=()):  # [batch, new, width]
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, *kv = qkv.movedim(1, -2).unbind(1)  # each [batch, heads, new, channels]
        if cache:
            kv = [torch.cat(pair, dim=-2) for pair in zip(cache, kv, strict=True)]
        seen = F.scaled_dot_product_attention(q, *kv, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x)))), kv


# %%


class GPT(nn.Module):
    def __init__(self, width=32, length=64, symbols=40):
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.place = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, symbols))

    def forward(self, tokens, real, caches=((), ())):
        new, end = tokens.shape[1], real.shape[1]  # new tokens, all tokens so far
        places = (real.cumsum(1) - 1).clamp(min=0)[:, -new:]
        mask = real[:, None] | ~real[:, -new:, None]  # padding sees all: no empty row
        mask = mask & torch.ones_like(mask[0]).tril(end - new)  # no later token
        x, kept = self.embed(tokens) + self.place(places), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, mask[:, None], cache)
            kept.append(cache)
        return self.head(x), kept


# %%
# Eight models learn to spell numbers
# -----------------------------------
#
# They read digits up to ``=`` and go on in words until ``.``, which ends the text.
# ``MATH`` is attention in a few operators that ``vmap`` runs for all models at once. A
# CPU's default is a fused kernel, which ``vmap`` runs once for each model, and those of
# CUDA have raised errors with masks under ``vmap`` (``plot_transformers.py``).


def stacked_call(skeleton, models):
    def step(params, *inputs):
        return functional_call(skeleton, params, inputs, strict=True)

    params, _ = stack_module_state(models)
    call = partial(vmap(step), params)
    return sdpa_kernel(SDPBackend.MATH)(call), params


num_models = 8
with torch.device("meta"):
    skeleton = GPT()
models = [GPT().to(device) for _ in range(num_models)]
call, params = stacked_call(skeleton, models)

# %%
# A text is a number below 1,000, then its words:

symbols = "_.0123456789= abcdefghijklmnopqrstuvwxyz"
ones = "one two three four five six seven eight nine ten eleven twelve thirteen "
ones = (ones + "fourteen fifteen sixteen seventeen eighteen nineteen").split()
tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
below = ["", *ones, *(f"{t} {one}".strip() for t in tens for one in ["", *ones[:9]])]
names = [f"{one} hundred {rest}".strip() for one in ones[:9] for rest in below]
spelled = dict(enumerate(below[1:] + names, start=1))  # {1: "one", 2: "two", ...}


def encode(texts):
    length = max(map(len, texts))
    rows = [[symbols.index(s) for s in text.rjust(length, "_")] for text in texts]
    return torch.tensor(rows, device=device)


def decode(row):
    return "".join(symbols[i] for i in row.tolist() if i not in (PAD, END))


# %%
# All models learn from the same 500 numbers, each from minibatches of its own. The loss
# is summed over the models, so each model gets the gradient of its own loss:

numbers = (1 + torch.randperm(999)).tolist()
train, test = numbers[:500], numbers[500:700]
lines = encode([f"{n}={spelled[n]}." for n in train])
optimizer = torch.optim.Adam(params.values(), lr=1e-2, fused=True)
for _ in range(150):
    x = lines[torch.randint(500, (num_models, 16), device=device)]
    logits = call(x, x != PAD)[0][:, :, :-1].flatten(0, 2)  # without a cache
    targets = x[:, :, 1:].flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=PAD, reduction="sum")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
# Each model writes its own texts
# -------------------------------
#
# Give three new numbers to each model, and print a text of the first two models, greedy
# and sampled:

prompts = encode([f"{n}=" for n in test[:24]]).unflatten(0, (num_models, 3))
for choose in greedy, sample:
    texts = generate(call, prompts, choose, number=28)  # [8, 3, at most 28]
    for prompt, text in zip(prompts[:2, 0], texts[:2, 0], strict=True):
        print(f"{choose.__name__}: {decode(prompt)}{decode(text)}")

# %%
# ``sample`` runs outside of ``vmap``, so ``vmap`` needs no ``randomness``.
#
# One text from the whole ensemble
# --------------------------------
#
# An ensemble writes one text if all models go on with the same token. Average their
# probabilities for each token [1]:


def team(logits):
    mean = logits.softmax(-1).mean(0)  # [batch, symbols]
    return greedy(mean).expand(len(logits), -1)  # or sample(mean.log())


prompts = encode([f"{n}=" for n in test]).expand(num_models, -1, -1)
right = []
for choose in greedy, team:
    texts = generate(call, prompts, choose, number=28).flatten(0, 1)  # [1600, ...]
    words = zip(num_models * test, texts, strict=True)
    right.append([decode(text) == spelled[n] for n, text in words])
alone, together = torch.tensor(right).float().unflatten(1, (num_models, -1))
gap = together[0] - alone[alone.mean(1).argmax()]  # less the best model
noise = gap.std() / len(test) ** 0.5  # standard error
verdict = "better" if gap.mean() > 2 * noise else "not clearly better"
found = f"{gap.mean():+.1%} (+- {noise:.1%})"
print(f"the ensemble is {verdict} than its best model: {found}")
shares = ", ".join(f"{share:.0%}" for share in alone.mean(1).sort().values)
print(
    f"{len(test)} new numbers: ensemble {together[0].mean():.0%} right, alone {shares}"
)

# %%
# ``+-`` is one standard error of the difference over the numbers; the best model is the
# one that is best on these very numbers. **Average models that you have anyway; here,
# training them for this did not pay**: one model that trained for eight times as many
# steps was right on 88 % to 94 % of new numbers, in four runs on a CPU (two seeds, two
# learning rates; a test demands more than 87 %).
#
# One call writes what each model alone writes
# --------------------------------------------
#
# Three models write. Then each model reads its finished texts again, alone, without
# padding and without a cache, in float64 on the CPU, and must find the logits that the
# tokens were chosen by. (A loop of cached models also writes the same tokens, and
# samples the same with the same seed: tested.)

trio = [GPT().cpu().double() for _ in range(3)]
in_one, stacked = stacked_call(skeleton, trio)
prompts, seen, far = torch.randint(2, 40, (3, 4, 6), device=cpu), [], []
prompts[torch.arange(6) < torch.randint(6, (3, 4, 1))] = PAD
texts = generate(in_one, prompts, lambda x: seen.append(x) or greedy(x), number=20)
seen = torch.stack(seen, dim=2)  # [3, 4, 20, 40]
for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(4)):
    text = torch.cat([prompts[i, j][prompts[i, j] != PAD], texts[i, j]])[None]
    again = trio[i](text, text == text)[0][0, -1 - texts.shape[2] : -1]
    far.append((again - seen[i, j])[texts[i, j] != PAD].abs().max())
print(f"{(texts != PAD).sum()} tokens, logits apart: {torch.stack(far).max():.0e}")
assert torch.stack(far).max() < 1e-10, "a model alone goes on with another token"

# %%
# The mistake: stop inside the mapped function
# --------------------------------------------


def write(params, tokens):
    for _ in range(28):
        inputs = tokens, tokens != PAD
        logits, _ = functional_call(skeleton, params, inputs, strict=True)
        tokens = torch.cat([tokens, greedy(logits[:, -1:])], dim=-1)
        if (tokens == END).any(-1).all():
            break
    return tokens


try:
    with sdpa_kernel(SDPBackend.MATH):
        vmap(write)(stacked, prompts)
except RuntimeError as error:
    print(error)

# %%
# ``vmap`` runs all models at once, so one ``if`` cannot stop one model and not another.
# Map one step, as above, and stop outside. ``generate`` of Hugging Face raises the same
# error inside ``vmap`` (transformers 5.24.0, a small GPT-2: tested).
#
# Is it faster than a loop?
# -------------------------
#
# For one new token the operators of a small model are small. A loop probably spends its
# time on starting them for each model, and one call starts most once for all models. So
# we expect a gain with many narrow models.


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
# Time one more token for four texts of each model, without autograd. The loop has
# caches, too, and PyTorch's default choice of attention. Medians of at least seven
# turns, with the gain's 95 % interval: where it is wide, "no difference seen" means
# undecided. (This page has not run on CUDA.)


def in_a_loop(models):
    def call(tokens, real, caches=()):
        none = len(models) * [((), ())]
        rows = zip(models, tokens, real, caches or none, strict=True)
        logits, caches = zip(*[m(*row) for m, *row in rows], strict=True)
        return torch.stack(logits), caches

    return call


@torch.no_grad()
def compare(n, width, length):
    models = [GPT(width, length).to(device) for _ in range(n)]
    with torch.device("meta"):
        skeleton = GPT(width, length)
    tokens = torch.randint(2, 40, (n, 4, length), device=device)
    real, ways = tokens != PAD, []
    for way in in_a_loop(models), stacked_call(skeleton, models)[0]:
        _, caches = way(tokens[..., :-1], real[..., :-1])
        ways.append(partial(way, tokens[..., -1:], real, caches))
    (each, *_), (once, *gain) = in_turns(*ways, seconds=0.4)
    print(f"{n} x width {width}, token {length}: loop {each * 1e3:.3g} ms")
    print(f"    one call {once * 1e3:.3g} ms: {said(*gain)}")


n = 8 if device == cpu else 64
for case in (1, 32, 32), (n, 32, 32), (8 * n, 32, 32), (n, 32, 128), (n, 128, 32):
    compare(*case)  # models, width, tokens

# %%
# Read the row near your own sizes. Both ways copy their caches at each token. To avoid
# that, write in place to a cache of fixed length, as a mapped argument: if the mapped
# function makes it, ``vmap`` raises ``vmap: inplace arithmetic(self, *extra_args) is
# not possible`` (tested).
#
# Remember
# --------
#
# **Map one step, and keep the loop over tokens outside of vmap**: choosing, masking and
# stopping are ordinary code on stacked logits. **To write one text with an ensemble,
# average the models' probabilities for each token.** Time your own sizes before you
# leave a loop.
#
# Next
# ----
#
# - ``plot_adapters.py``: many low-rank adapters on one network.
# - ``plot_transformers.py``: encoders, masks, dropout, and what eval mode needs.
# - ``plot_recurrent.py``: networks that carry a state in place of a cache.
#
# References
# ----------
#
# - [1] A. Malinin and M. Gales, *Uncertainty Estimation in Autoregressive Structured
#   Prediction* (2021), `arXiv:2002.07650 <https://arxiv.org/abs/2002.07650>`_.
