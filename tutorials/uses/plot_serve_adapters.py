"""
Serve many LoRA adapters in one batch
=====================================

Answer a mixed batch, in which each sample needs the LoRA adapter of its own user, in
one call on one frozen network, and compare the time with loops over users.

**In short.** Stack the adapters, take the row of each sample's user, ``p[who]``, and
map over samples by ``torch.func.vmap`` with ``in_dims=(0, None, 0)``. Where all layers
take more leading dimensions, as ``nn.Linear`` does, the same rows work without
``vmap``. In the batches timed below, a merged network is faster than this call if all
samples belong to one user, and this call is faster than loops over users where each
sample has a user of its own; with few users, time both.

Before you start: ``plot_adapters.py`` trains the adapters, and merges one of them.
"""

# %%
# Set-up
# ------

import math
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.utils.benchmark import timer

torch.manual_seed(0)
torch.backends.fp32_precision = "ieee"  # no TF32
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")

# %%
# A batch of many users
# ---------------------
#
# ``who`` holds the number of each sample's user. ``add_lora`` and ``predict`` are those
# of ``plot_adapters.py``.


def add_lora(model, rank=4):
    for layer in [m for m in model.modules() if type(m) is nn.Linear]:
        layer.A = nn.Parameter(torch.empty(rank, layer.in_features))
        layer.B = nn.Parameter(torch.empty(layer.out_features, rank))
        layer.register_forward_hook(lambda m, x, out: out + x[0] @ m.A.mT @ m.B.mT)
    return model


def predict(adapter, base, x):
    return functional_call(skeleton, base | adapter, (x,), strict=True)


every = vmap(predict, in_dims=(0, None, 0))  # own adapters and inputs, one base


def serve(adapters, base, who, x):
    """Output of each sample with the adapter of its user."""
    rows = {name: p[who] for name, p in adapters.items()}  # "0.A": [64, 4, 784]
    return every(rows, base, x)


def serve_without_vmap(adapters, base, who, x):
    rows = {name: p[who] for name, p in adapters.items()}
    return predict(rows, base, x[:, None])[:, 0]  # samples as [64, 1, 784]


# %%
# Here, a random base and 64 random adapters stand for trained ones:


def build():  # your model
    layers = nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(128, 10))


def random_adapters(num_users):
    own = {k: p for k, p in skeleton.named_parameters() if k[-2:] in (".A", ".B")}
    return {k: torch.randn(num_users, *p.shape).to(device) / 20 for k, p in own.items()}


base = {name: p.detach().to(device) for name, p in build().named_parameters()}
with torch.device("meta"):
    skeleton = add_lora(build())
adapters = random_adapters(num_users=64)
who = torch.randint(64, (64,), device=device)
x = torch.randn(64, 784, device=device)
print(list(serve(adapters, base, who, x).shape), "of", len(who.unique()), "users")
size, own = (sum(p.numel() for p in part.values()) for part in (base, adapters))
print(f"numbers held: {size + own:,}; by 64 merged networks: {64 * size:,}")

# %%
# The second form calls ``predict`` once, on samples that have one more dimension. It
# fits models whose layers all take more leading dimensions; ``vmap`` also fits others.
# If your model needs a batch, call it inside ``predict`` with ``x[None]``, and return
# row 0. A user without an adapter gets a row whose ``B`` is zero, and so the answer of
# the base (tested).
#
# Adapters from PEFT
# ------------------
#
# PEFT saves ``A`` and ``B`` of ``nn.Linear`` layers in the same shapes, under other
# names, and by default multiplies their product by ``lora_alpha / r``. ``from_peft``
# takes a list of what ``safetensors.torch.load_file`` reads from each file, all of one
# rank, scaling and set of layers (tested with PEFT 0.21.2).


def from_peft(states, scaling):
    """Stack the saved adapters; scaling: lora_alpha / r of their configuration."""
    own = {}
    for key in states[0]:
        layer, kind = key.removeprefix("base_model.model.").split(".lora_")
        values = torch.stack([state[key] for state in states]).to(device)
        own[f"{layer}.{kind[0]}"] = values * scaling if kind[0] == "B" else values
    return own


# %%
# PEFT may have left out layers. Give these ``A`` and ``B`` of zeros:
# ``{k: torch.zeros_like(p) for k, p in adapters.items()} | from_peft(...)`` (tested).
#
# PEFT itself answers a mixed batch, too, by its argument ``adapter_names`` [1]: in each
# layer, it multiplies all samples by the frozen weight at once, and then loops over the
# adapters. That is the second rival below.
#
# The rivals: loops over users, and by hand
# -----------------------------------------
#
# The first loop calls a merged network for each user in the batch: all weights of each
# user are in memory. The second loop is PEFT's, but on samples that are sorted by user
# first.


def merged_of(base, adapters, i):
    """A plain network with the weights of user i."""
    own = {name: p.clone() for name, p in base.items()}
    for name in [key.removesuffix(".A") for key in adapters if key.endswith(".A")]:
        own[f"{name}.weight"] += adapters[f"{name}.B"][i] @ adapters[f"{name}.A"][i]
    model = build()
    model.load_state_dict(own, assign=True)
    return model


def serve_by_loop(networks, who, x):
    order = who.argsort()
    users, counts = who.unique(return_counts=True)  # in ascending order
    parts = zip(users.tolist(), x[order].split(counts.tolist()), strict=True)
    return torch.cat([networks[user](part) for user, part in parts])[order.argsort()]


def serve_in_each_layer(adapters, base, who, x):
    """The frozen product for all samples, the low-rank products user by user."""
    order = who.argsort()
    users, counts = (part.tolist() for part in who.unique(return_counts=True))
    x = x[order]
    for name in "024":
        A, B = adapters[f"{name}.A"], adapters[f"{name}.B"]
        parts = zip(users, x.split(counts), strict=True)
        low_rank = torch.cat([part @ A[i].T @ B[i].T for i, part in parts])
        out = F.linear(x, base[f"{name}.weight"], base[f"{name}.bias"]) + low_rank
        x = out.relu() if name != "4" else out
    return x[order.argsort()]


# %%
# By hand, for this network only, the products are those of the form without ``vmap``:


def serve_by_hand(adapters, base, who, x):
    x = x[:, None]
    for name in "024":
        A, B = adapters[f"{name}.A"][who], adapters[f"{name}.B"][who]
        out = (
            F.linear(x, base[f"{name}.weight"], base[f"{name}.bias"]) + x @ A.mT @ B.mT
        )
        x = out.relu() if name != "4" else out
    return x[:, 0]


# %%
# The check, in float64 on the CPU: all answer as the merged networks do.

base64 = {name: p.cpu().double() for name, p in base.items()}
own64 = {name: p.cpu().double() for name, p in adapters.items()}
x64, who64 = x.cpu().double(), who.cpu()
loop = serve_by_loop([merged_of(base64, own64, i) for i in range(64)], who64, x64)
for form in (serve, serve_without_vmap, serve_by_hand, serve_in_each_layer):
    far = (form(own64, base64, who64, x64) - loop).abs().max().item()
    print(f"{form.__name__}: largest difference from merged networks {far:.0e}")
    assert far < 1e-10, "a sample was not answered as by its user's network"

# %%
# Is one call faster?
# -------------------
#
# One call has the same number of products for any number of users (tested). The number
# of products of a loop grows with the users in the batch. So we expect one call to be
# slower for few users in the batch, and faster for many.


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


# %%


def said(gain, low, high):
    """A gain in words; what noise can explain, up to 2 percent, is no difference."""
    if low > 1.02:
        return f"{gain:.3g}x faster ({low:.3g} to {high:.3g})"
    if high < 0.98:
        return f"{1 / gain:.3g}x slower ({1 / high:.3g} to {1 / low:.3g})"
    return f"no difference seen ({low:.2f} to {high:.2f})"


def compare(title, ways):
    """Print and return each way's gain over the first, with its interval."""
    (first, *_), *rest = in_turns(*ways.values(), seconds=1.0)
    print(f"{title}: vmap {first * 1e3:.3g} ms")
    for name, (seconds, *gain) in zip([*ways][1:], rest, strict=True):
        print(f"    {name}: {seconds * 1e3:.3g} ms, {said(*gain)}")
    return {name: gain for name, (_, *gain) in zip([*ways][1:], rest, strict=True)}


# %%
# Each way is timed in at least seven turns, warm, and compared with the ``vmap`` call.
# In brackets stands the 95 % interval of the ratio. To serve, autograd is off.

sizes = [1, 8, 64] if device == cpu else [1, 32, 512]
serving = []
for n in sizes:
    adapters = random_adapters(n)
    x = torch.randn(sizes[-1], 784, device=device)  # as many samples as most users
    who = torch.randperm(len(x), device=device) % n  # users in equal shares
    networks = [merged_of(base, adapters, i) for i in range(n)]
    ways = {
        "vmap": partial(serve, adapters, base, who, x),
        "without vmap": partial(serve_without_vmap, adapters, base, who, x),
        "by hand": partial(serve_by_hand, adapters, base, who, x),
        "loop, merged": partial(serve_by_loop, networks, who, x),
        "loop in each layer": partial(serve_in_each_layer, adapters, base, who, x),
    }
    with torch.no_grad():
        serving.append(compare(f"{len(x)} samples of {n} users", ways))

# %%
# A training step
# ---------------
#
# Here each user has 16 samples. The loop calls one module for each user, all on the
# same frozen tensors. Each way has one fused AdamW over all users, and one backward
# pass of the summed losses.


def module_of(base, adapters, i):
    """A module on the tensors of the base, with a copy of adapter i to train."""
    model = add_lora(build())
    row = {name: p[i].detach().clone() for name, p in adapters.items()}
    model.load_state_dict(base | row, assign=True)
    for name, p in model.named_parameters():
        p.requires_grad_(name in adapters)
    return model


def train_step(way, y, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(way().flatten(0, 1), y.flatten(), reduction="sum").backward()
    optimizer.step()


def forward(models, x):
    return torch.stack([model(rows) for model, rows in zip(models, x, strict=True)])


# %%


def forms(n):
    """Training steps of n users: name -> call."""
    x = torch.randn(n, 16, 784, device=device)
    y = torch.randint(10, (n, 16), device=device)
    own = {name: p.requires_grad_() for name, p in random_adapters(n).items()}
    modules = [module_of(base, own, i) for i in range(n)]
    trained = [p for model in modules for p in model.parameters() if p.requires_grad]
    ways = {
        "vmap": (partial(every, own, base, x), own.values()),
        "without vmap": (partial(predict, own, base, x), own.values()),
        "loop, modules": (partial(forward, modules, x), trained),
    }
    return {
        name: partial(train_step, way, y, torch.optim.AdamW(weights, fused=True))
        for name, (way, weights) in ways.items()
    }


# %%

training = [compare(f"training step of {n} users", forms(n)) for n in sizes]

# %%

fig, axes = plt.subplots(1, 2, sharey=True, figsize=(9, 4), layout="constrained")
looks = {"without vmap": "o", "by hand": "x", "loop, merged": "^"}
looks |= {"loop in each layer": "s", "loop, modules": "D"}
for ax, rows in zip(axes, (serving, training), strict=True):
    for way in rows[0]:
        middle, low, high = 1 / torch.tensor([row[way] for row in rows]).T
        color = f"C{list(looks).index(way)}"
        ax.plot(sizes, middle, marker=looks[way], color=color, label=way)
        ax.fill_between(sizes, high, low, color=color, alpha=0.2)
    ax.axhline(1, color="gray")
    ax.set(xscale="log", yscale="log", xlabel="users")
    ax.set_xticks(sizes, sizes)
    ax.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "1", "2", "4", "8"])
    ax.minorticks_off()
    ax.legend(fontsize="small")
axes[0].set(title=f"Serve {sizes[-1]} samples", ylabel="time of way / time of vmap")
axes[1].set_title("A training step, 16 samples a user")
fig.suptitle(f"Below 1 a way is faster than vmap: float32, {name}")
fig.set_label(
    "Times of serving a batch and of a training step against the number of users, for "
    f"loops, by hand and without vmap, divided by the time of vmap. {sizes[-1]} users, "
    f"compared with vmap: to serve, a loop over merged networks "
    f"{said(*serving[-1]['loop, merged'])}, a loop in each layer "
    f"{said(*serving[-1]['loop in each layer'])}; a training step in a loop "
    f"{said(*training[-1]['loop, modules'])}."
)

# %%
# **Time a batch with as many users as yours has.** Take the fastest that fits: merged
# networks need memory for all, the loop in each layer does not. What *by hand* gains is
# the cost of hooks, ``functional_call`` and ``vmap``. In training, one call pays from
# the number of users on where the line of the loop is above 1. Large language models
# have servers with kernels of their own for mixed batches, as Punica [2] and S-LoRA
# [3].
#
# The mistake: as many samples as users
# -------------------------------------
#
# If you forget ``[who]``, sample 0 gets the adapter of user 0, sample 1 that of user 1.
# If there are as many samples as users, no error is raised:

off = (every(adapters, base, x) - serve(adapters, base, who, x)).abs().amax(1) > 1e-3
print(f"{off.sum()} of {len(x)} samples answered with another user's adapter")

# %%
# Remember
# --------
#
# **The rows of the adapters follow the samples, the base is shared**: ``p[who]``, then
# ``vmap`` with ``(0, None, 0)``, or no ``vmap`` where the layers allow it. For a batch
# of one or a few users, time the loops first.
#
# Next
# ----
#
# - ``plot_agents.py``: reinforcement learning, all seeds and settings in one call.
# - ``plot_saving.py``: save the stack, take one user's rows out.
# - ``plot_when_vmap_pays.py``: when one call is faster than a loop.
#
# References
# ----------
#
# - [1] Mixing different LoRA adapters in the same batch, `peft#1558
#   <https://github.com/huggingface/peft/pull/1558>`_.
# - [2] L. Chen et al.: Punica, multi-tenant LoRA serving, 2023, `arXiv:2310.18547
#   <https://arxiv.org/abs/2310.18547>`_.
# - [3] Y. Sheng et al.: S-LoRA, serving thousands of concurrent LoRA adapters, 2023,
#   `arXiv:2311.03285 <https://arxiv.org/abs/2311.03285>`_.
