"""
Serve many LoRA adapters in one batch
=====================================

Answer a batch in which each sample has its own user's adapter, with the frozen network
once in memory, and compare the time, also of a training step, with loops over users.

**In short.** Take the rows of each sample's user out of the stacked adapters, and map
over samples by ``torch.func.vmap`` with ``in_dims=(0, None, 0)``. Where all layers take
more leading dimensions, as ``nn.Linear`` does, the same adapters work without ``vmap``.

Before you start: ``plot_adapters.py`` trains the adapters, and merges one.
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
from torch.func import functional_call, stack_module_state, vmap
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
# A batch of many users
# ---------------------
#
# ``who`` says to which user each sample belongs. ``add_lora`` and ``predict`` are those
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
    """For each sample of x the output with its user's adapter."""
    rows = {name: p[who] for name, p in adapters.items()}  # "0.A": [64, 4, 784]
    return every(rows, base, x)


def serve_without_vmap(adapters, base, who, x):
    rows = {name: p[who] for name, p in adapters.items()}
    return predict(rows, base, x[:, None])[:, 0]  # samples as [64, 1, 784]


# %%
# Here, the base and 64 adapters are random, for inputs of 784 numbers:


def build():  # your model
    layers = nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(128, 10))


def random_adapters(num_users):
    own = {k: p for k, p in skeleton.named_parameters() if k[-2:] in (".A", ".B")}
    values = {k: torch.randn(num_users, *p.shape) / 20 for k, p in own.items()}
    return {name: p.to(device) for name, p in values.items()}


base = {name: p.detach().to(device) for name, p in build().named_parameters()}
with torch.device("meta"):
    plain, skeleton = build(), add_lora(build())
adapters = random_adapters(num_users=64)
who = torch.randint(64, (64,), device=device)
x = torch.randn(64, 784, device=device)
print(list(serve(adapters, base, who, x).shape), "of", len(who.unique()), "users")

# %%
# The second form is ``predict`` itself, on samples with one more dimension. It fits
# models whose layers all take more leading dimensions; ``vmap`` also fits others. If
# yours needs a batch, call it inside ``predict`` with ``x[None]``, and return row 0. A
# user without an adapter gets a row in which ``B`` is zero, and so the base's answer
# (tested).
#
# The rivals: a network for each user, and by hand
# ------------------------------------------------
#
# A loop sorts the samples by user, and calls one network for each user that is there:
# either a module on the tensors of the base, with its adapter, or a merged network,
# which holds all weights of its user.


def module_of(base, adapters, i):
    """A module on the tensors of the base, with a copy of adapter i."""
    with torch.device("meta"):
        model = add_lora(build())
    row = {name: p[i].detach().clone() for name, p in adapters.items()}
    model.load_state_dict(base | row, assign=True)
    for name, p in model.named_parameters():
        p.requires_grad_(name in adapters)
    return model


def merged_of(base, adapters, i):
    """A plain network with the weights of user i."""
    own = {name: p.clone() for name, p in base.items()}
    for name in [key.removesuffix(".A") for key in adapters if key.endswith(".A")]:
        own[f"{name}.weight"] += adapters[f"{name}.B"][i] @ adapters[f"{name}.A"][i]
    with torch.device("meta"):
        model = build()
    model.load_state_dict(own, assign=True)
    return model


def serve_by_loop(networks, who, x):
    order = who.argsort()
    users, counts = who.unique(return_counts=True)  # in ascending order
    parts = zip(users.tolist(), x[order].split(counts.tolist()), strict=True)
    return torch.cat([networks[user](part) for user, part in parts])[order.argsort()]


# %%
# By hand, the products are those of the form without ``vmap``, for this network only:


def by_hand(adapters, base, x):  # [users, rows, 784]
    for name in "024":
        A, B = adapters[f"{name}.A"], adapters[f"{name}.B"]
        out = F.linear(x, base[f"{name}.weight"], base[f"{name}.bias"])
        out = out + x @ A.mT @ B.mT
        x = out.relu() if name != "4" else out
    return x


def serve_by_hand(adapters, base, who, x):
    rows = {name: p[who] for name, p in adapters.items()}
    return by_hand(rows, base, x[:, None])[:, 0]


# %%
# The check, in float64 on the CPU: all answer as the merged networks do.

base64 = {name: p.cpu().double() for name, p in base.items()}
own64 = {name: p.cpu().double() for name, p in adapters.items()}
x64, who64 = x.cpu().double(), who.cpu()
loop = serve_by_loop([merged_of(base64, own64, i) for i in range(64)], who64, x64)
for form in (serve, serve_without_vmap, serve_by_hand):
    far = (form(own64, base64, who64, x64) - loop).abs().max().item()
    print(f"{form.__name__}: largest difference from merged networks {far:.0e}")
    assert far < 1e-10, "a sample was not answered as by its user's network"

# %%
# Is one call faster?
# -------------------
#
# Both forms multiply all samples by a frozen weight in one product (tested); a loop has
# one for each user that is there. So we expect them to be slower than the loop with one
# user, and faster with many.


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
# Medians of at least seven turns, warm; each way is compared with one call, in brackets
# the 95 % interval of its gain. Predictions run without autograd.

sizes = [1, 8, 64] if device == cpu else [1, 32, 512]
batch = sizes[-1]  # samples


def compare(title, ways):
    """Print and return each way's gain over the first, with its interval."""
    (first, *_), *rest = in_turns(*ways.values(), seconds=1.0)
    print(f"{title}: vmap {first * 1e3:.3g} ms")
    for name, (seconds, *gain) in zip([*ways][1:], rest, strict=True):
        print(f"    {name}: {seconds * 1e3:.3g} ms, {said(*gain)}")
    return {name: gain for name, (_, *gain) in zip([*ways][1:], rest, strict=True)}


serving = []
for n in sizes:
    adapters = random_adapters(n)
    x = torch.randn(batch, 784, device=device)
    who = torch.randint(n, (batch,), device=device)
    loops = [
        [make(base, adapters, i) for i in range(n)] for make in (module_of, merged_of)
    ]
    ways = {
        "vmap": partial(serve, adapters, base, who, x),
        "without vmap": partial(serve_without_vmap, adapters, base, who, x),
        "by hand": partial(serve_by_hand, adapters, base, who, x),
        "loop, adapters": partial(serve_by_loop, loops[0], who, x),
        "loop, merged": partial(serve_by_loop, loops[1], who, x),
    }
    with torch.no_grad():
        serving.append(compare(f"{batch} samples of {n} users", ways))

# %%
# A training step
# ---------------
#
# Here each user has 16 samples. Each way has one fused AdamW and one backward pass of
# the summed losses. Two more ways train a full copy of all weights for each user.


def train_step(way, y, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(way().flatten(0, 1), y.flatten(), reduction="sum").backward()
    optimizer.step()


def forward(models, x):
    return torch.stack([model(rows) for model, rows in zip(models, x, strict=True)])


def trained(models):
    return [p for model in models for p in model.parameters() if p.requires_grad]


# %%


def forms(n):
    """Training steps of n users: name -> call."""
    x = torch.randn(n, 16, 784, device=device)
    y = torch.randint(10, (n, 16), device=device)
    own = {name: p.requires_grad_() for name, p in random_adapters(n).items()}
    modules = [module_of(base, own, i) for i in range(n)]
    copies = [build().to(device) for _ in range(n)]
    full, _ = stack_module_state(copies)
    every_copy = vmap(partial(functional_call, plain))
    ways = {
        "vmap": (partial(every, own, base, x), own.values()),
        "without vmap": (partial(predict, own, base, x), own.values()),
        "by hand": (partial(by_hand, own, base, x), own.values()),
        "loop, adapters": (partial(forward, modules, x), trained(modules)),
        "loop, copies": (partial(forward, copies, x), trained(copies)),
        "vmap, copies": (partial(every_copy, full, x), full.values()),
    }
    return {
        name: partial(train_step, way, y, torch.optim.AdamW(weights, fused=True))
        for name, (way, weights) in ways.items()
    }


# %%

training = [compare(f"training step of {n} users", forms(n)) for n in sizes]

# %%
# Between steps, a number that is trained has 16 bytes: itself, its gradient and two
# averages of AdamW. The base has 4 bytes a number. During one call's step of 64 users,
# the most that is taken on top is, on a CPU, less than a tenth of that with own copies
# (both tested). A batch to serve copies the adapter of each sample.

size, own = (sum(p.numel() for p in part.values()) for part in (base, adapters))
own //= len(adapters["0.A"])
held = {"adapters": 4 * size + 16 * own * 1000, "own copies": 16 * size * 1000}
counted = ", ".join(f"{name} {held[name] / 1e6:.0f} MB" for name in held)
print(f"held by 1,000 users between steps, counted: {counted}")

# %%

fig, axes = plt.subplots(1, 2, sharey=True, figsize=(9, 4), layout="constrained")
looks = {"without vmap": "o", "by hand": "x", "loop, adapters": "s"}
looks |= {"loop, merged": "^", "loop, copies": "v", "vmap, copies": "D"}
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
axes[0].set(title=f"Serve {batch} samples", ylabel="time of way / time of vmap")
axes[1].set_title("A training step, 16 samples a user")
fig.suptitle(f"Below 1 a way is faster than vmap: float32, {where}")
fig.set_label(
    "Times of serving a batch and of a training step against the number of users, for "
    f"loops, by hand and without vmap, divided by the time of vmap. {sizes[-1]} users, "
    "a loop over adapters compared with vmap: serving "
    f"{said(*serving[-1]['loop, adapters'])}, a training step "
    f"{said(*training[-1]['loop, adapters'])}."
)

# %%
# Where a loop is faster, run the loop: merged networks to serve, if all of them fit in
# memory, modules on one base to train. Where *without vmap* is faster and fits your
# model, take it. A wide interval decides nothing.
#
# The mistake: as many samples as users
# -------------------------------------
#
# Without ``[who]``, sample 0 gets the adapter of user 0, sample 1 that of user 1. If
# there are as many samples as users, this raises no error:

wrong = every(adapters, base, x)
off = (wrong - serve(adapters, base, who, x)).abs().amax(1) > 1e-3
print(f"{off.sum()} of {len(x)} samples answered with another user's adapter")

# %%
# Remember
# --------
#
# **The rows of the adapters follow the samples, the base stays one**: ``p[who]``, then
# ``vmap`` with ``(0, None, 0)``, or no ``vmap`` where the layers allow it. Merge where
# a user has a model alone. Time a batch with as many users as yours.
#
# Next
# ----
#
# - ``plot_agents.py``: many agents of reinforcement learning, many seeds.
# - ``plot_when_vmap_pays.py``: when one call is faster than a loop.
#
# References
# ----------
#
# - L. Chen and others: Punica, multi-tenant LoRA serving, 2023, `arXiv:2310.18547
#   <https://arxiv.org/abs/2310.18547>`_: a kernel for this on GPUs.
