"""
Feeding an ensemble: loaders, own samples, weights
==================================================

Get data to the members of an ensemble: from a ``DataLoader``, or from a file larger
than the memory; the same minibatch for all members, or one for each; with class weights
for each member, and in half precision.

**In short.** ``vmap`` takes one minibatch for all members (``in_dims=None``), or a
stack of minibatches, one for each. An index tensor ``[members, rows]`` makes that stack
from one copy of the data, on the device or in a file; a loader takes it as a list. What
else differs between members, such as class weights, is one more mapped argument of the
loss.

Before you start, read ``plot_training.py``: it explains the training step.
"""

# %%
# Set-up
# ------

import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
print(f"{device.type.upper()}, torch {torch.__version__}, float32")

digits = load_digits()  # 1,797 handwritten digits of 8 by 8 pixels, from 0 to 16
mixed = torch.randperm(1797)
x = torch.tensor(digits.data / 16, dtype=torch.float32)[mixed]  # [1797, 64], on the CPU
y = torch.tensor(digits.target)[mixed]  # [1797]

# %%
# One batch of a DataLoader for all members
# -----------------------------------------
#
# The loader is the one that you have. Each batch is moved to the device once, and
# ``None`` gives it to all members.

num_models = 8


def build():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


params, _ = stack_module_state([build().to(device) for _ in range(num_models)])
with torch.device("meta"):
    skeleton = build()
optimizer = torch.optim.Adam(params.values(), lr=0.01)


def predict(params, x):  # of one member
    return functional_call(skeleton, params, (x,), strict=True)


def member_loss(params, x, y):  # of one member
    return F.cross_entropy(predict(params, x), y)


def train(losses):  # a step of all members
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()


data = TensorDataset(x, y)
for batch in DataLoader(data, batch_size=32, shuffle=True):
    images, labels = (t.to(device) for t in batch)  # [32, 64], [32]
    losses = vmap(member_loss, in_dims=(0, None, None))(params, images, labels)  # [8]
    train(losses)
print(f"last batch, one for all: images {list(images.shape)}, {len(losses)} losses")

# %%
# - ``DataLoader(..., num_workers=4)`` loads batches in four processes. On Windows,
#   macOS, and on Linux from Python 3.14 on, the script then needs ``if __name__ ==
#   "__main__":`` around its work.
# - With ``pin_memory=True`` in the loader and ``t.to(device, non_blocking=True)``, the
#   CPU does not wait for the copy to a CUDA GPU.
# - All members see the same batch, random transforms included: only their first weights
#   differ.
#
# A batch of its own for each member
# ----------------------------------
#
# A ``batch_sampler`` can be a list, with a list of rows for each step. Put the rows of
# all members into one, and cut the batch that comes into members again. In an epoch,
# each member sees all data in its own order, and the loader reads each row eight times.


def own_orders(num_rows, batch_size):  # for each step: rows of member 0, of member 1...
    orders = torch.rand(num_models, num_rows).argsort(dim=1)  # [8, 1797]
    return [rows.flatten().tolist() for rows in orders.split(batch_size, dim=1)]


steps = own_orders(len(data), 32)
for batch in DataLoader(data, batch_sampler=steps):  # [256, 64], [256]
    own = (t.unflatten(0, (num_models, -1)) for t in batch)
    images, labels = (t.to(device) for t in own)  # [8, 32, 64], [8, 32]
    losses = vmap(member_loss)(params, images, labels)
    train(losses)

rows = torch.tensor(steps[-1]).view(num_models, -1)  # [8, 5]: of the last step
assert torch.equal(images[3].cpu(), x[rows[3]]), "member 3 got rows of another"
print(f"last batch, one for each: images {list(images.shape)}, {len(losses)} losses")

# %%
# Make the list anew for each epoch. Where reading is slow, load a larger batch for all,
# and let each member take eight steps through it, in an order of its own within it, by
# one index tensor on the device:

loader = DataLoader(data, batch_size=256, shuffle=True)
images, labels = (t.to(device) for t in next(iter(loader)))  # [256, 64], [256]
order = torch.rand(num_models, len(images), device=device).argsort(dim=1)  # [8, 256]
for rows in order.split(32, dim=1):  # [8, 32]
    train(vmap(member_loss)(params, images[rows], labels[rows]))

# %%
# Noise that you add to ``images[rows]`` before the call, drawn in its shape, is each
# member's own and needs no ``randomness`` flag of ``vmap``.
#
# **The mistake: one batch of 256 of a shuffled loader, cut into eight.** No error is
# raised, but each member takes an eighth of the steps, on an eighth of the data, in an
# epoch of the loader.
#
# Data that do not fit the device, or the memory
# ----------------------------------------------
#
# Index the data where they are, and move the rows of one step: ``x[rows].to(device)``.
# A file is indexed in the same way: only the pages that hold these rows are read. Move
# bytes, and make floating-point numbers of them on the device:

with tempfile.TemporaryDirectory() as folder:
    np.save(f"{folder}/images.npy", (16 * x).byte().numpy())
    file = np.load(f"{folder}/images.npy", mmap_mode="r")  # [1797, 64], not read
    rows = torch.randint(len(file), (num_models, 32))
    batch = torch.from_numpy(file[rows.numpy()])  # [8, 32, 64], uint8
    del file

images, labels = batch.to(device) / 16, y[rows].to(device)
losses = vmap(member_loss)(params, images, labels)
print(f"a batch of bytes: {batch.nbytes:,}; as float32: {images.nbytes:,}")

# %%
# Own subsets: bootstrap and folds
# --------------------------------
#
# Subsets of one size are an index tensor: shuffle the indices of each member for an
# epoch, and split them into steps. For subsets of several sizes, ``torch.multinomial``
# draws the rows of each step from chances that are 0 outside of the subset (of at most
# 2**24 rows of data). For stratified folds, ``fold[test] = i`` for each ``test`` of
# scikit-learn's ``StratifiedKFold``. **If a subset has fewer rows than the batch, it
# gets rows of others, without an error** (tested on the CPU).

num_rows = len(x)
bootstrap = torch.randint(num_rows, (num_models, num_rows))  # [8, 1797]
order = torch.rand(bootstrap.shape).argsort(dim=1)  # anew for each epoch
for rows in bootstrap.gather(1, order).split(32, dim=1):  # [8, 32]
    train(vmap(member_loss)(params, x[rows].to(device), y[rows].to(device)))

fold = torch.randperm(num_rows) % num_models  # member i never sees fold i
chance = (fold != torch.arange(num_models)[:, None]).float()  # [8, 1797]
rows = torch.multinomial(chance, 32)  # [8, 32], no row twice
train(vmap(member_loss)(params, x[rows].to(device), y[rows].to(device)))

distinct = sum(len(row.unique()) for row in bootstrap) / num_models
print(f"in its bootstrap, a member has {distinct / num_rows:.1%} of the digits")

# %%
# The score of each member on its own fold, whose sizes differ:
#
# .. code-block:: python
#
#     def row_losses(params, x, y):
#         return F.cross_entropy(predict(params, x), y, reduction="none")
#
#     each = vmap(row_losses, in_dims=(0, None, None))
#     with torch.no_grad():
#         losses = each(params, x.to(device), y.to(device)).cpu()  # [8, 1797]
#     held = fold == torch.arange(num_models)[:, None]
#     score = (losses * held).sum(1) / held.sum(1)  # [8]
#
# The picture draws such indices for 40 rows of data: what each member gets in one step,
# or has in its subset.

shuffle = torch.rand(num_models, 40).argsort(dim=1)
kept = torch.arange(40).expand(num_models, -1)
outside = kept % num_models != torch.arange(num_models)[:, None]
panels = {
    "one batch for all": shuffle[0, :10].expand(num_models, -1),
    "a batch of its own": shuffle[:, :10],
    "a bootstrap": torch.randint(40, (num_models, 40)),
    "without its fold": kept[outside].view(num_models, -1),
}
fig, axes = plt.subplots(2, 2, sharex=True, sharey=True, layout="constrained")
for ax, (title, rows) in zip(axes.flat, panels.items(), strict=True):
    seen = F.one_hot(rows, 40).sum(dim=1)  # [8, 40], how often
    image = ax.imshow(seen.tolist(), cmap="Blues", vmin=0, vmax=3, aspect="auto")
    ax.set_title(title)
bar = fig.colorbar(image, ax=axes, ticks=range(4))
bar.set_label("how often a member sees it (3: or more)")
fig.supxlabel("row of the data")
fig.supylabel("member")
fig.set_label(
    "Four grids of eight members by 40 rows of data, darker where a member sees a row "
    "more often. One batch for all: the same columns for each member. A batch of its "
    "own: ten columns drawn for each. A bootstrap: zero to three times or more. "
    "Without its fold: every eighth row is missing, another one for each member."
)

# %%
# Class weights of a member
# -------------------------
#
# They are one more argument of the loss, passed by position: ``vmap`` does not map what
# is passed by keyword. Here class 8 counts ten times for the last four members. All
# members start anew.


def weighted_loss(params, x, y, weight):
    return F.cross_entropy(predict(params, x), y, weight=weight)


class_weights = torch.ones(num_models, 10, device=device)
class_weights[4:, 8] = 10
params, _ = stack_module_state([build().to(device) for _ in range(num_models)])
optimizer = torch.optim.Adam(params.values(), lr=0.01)
for _ in range(4):  # epochs
    order = torch.rand(num_models, 1200).argsort(dim=1)
    for rows in order.split(32, dim=1):
        images, labels = x[rows].to(device), y[rows].to(device)
        train(vmap(weighted_loss)(params, images, labels, class_weights))

with torch.no_grad():
    logits = vmap(predict, in_dims=(0, None))(params, x[1200:].to(device))
called = logits.argmax(dim=-1).cpu() == 8  # [8, 597]
eight = y[1200:] == 8
for name, half in {"weight 1": called[:4], "weight 10": called[4:]}.items():
    print(f"{name}: {half[:, eight].float().mean():.0%} of the eights found,", end=" ")
    print(f"{half[:, ~eight].float().mean():.1%} of the others called 8")

# %%
# **The weighted mean of** ``F.cross_entropy`` **divides by the sum of the weights** of
# the labels in the minibatch, not by their number. So ten times all weights is no
# change, and a minibatch in which all weights are 0 has the loss 0/0, which is NaN.
# Sample weights are mapped in the same way. Two checks in float64: a loop with all
# weights times ten gives the same losses, and sample weights taken from the labels give
# those of the class weights.


def sample_loss(params, x, y, weight):  # weight: [32], one for each sample
    losses = F.cross_entropy(predict(params, x), y, reduction="none")  # [32]
    return (weight * losses).sum() / weight.sum()


p64 = {name: p.detach().cpu().double() for name, p in params.items()}
x64, labels, weights = images.cpu().double(), labels.cpu(), class_weights.cpu().double()
samples = weights.gather(1, labels)  # [8, 16], the weight of each label
by_class = vmap(weighted_loss)(p64, x64, labels, weights)
by_sample = vmap(sample_loss)(p64, x64, labels, samples)
one_by_one = []
for i in range(num_models):
    p = {name: tensor[i] for name, tensor in p64.items()}
    one_by_one.append(weighted_loss(p, x64[i], labels[i], 10 * weights[i]))
torch.testing.assert_close(by_class, torch.stack(one_by_one), msg="other class weights")
torch.testing.assert_close(by_sample, by_class, msg="a weighted mean of another kind")
print(f"all weights 0: loss {weighted_loss(p, x64[-1], labels[-1], 0 * weights[-1])}")

# %%
# Half precision, and one GradScaler for all
# ------------------------------------------
#
# Put ``torch.autocast(device.type, dtype=torch.bfloat16)`` around the call of ``vmap``,
# as around one model (tested on the CPU). With ``float16`` and a ``GradScaler``, **one
# member's overflow skips the step of all**: the scaler looks at all gradients together,
# and halves one scale for all. Here the images of member 3 are multiplied by a factor,
# and the CPU computes:

images = x[:32].repeat(num_models, 1, 1)  # [8, 32, 64]
for dtype, factor in [(torch.float16, 1), (torch.float16, 1e3), (torch.bfloat16, 1e3)]:
    p, _ = stack_module_state([build() for _ in range(num_models)])
    old, images[3] = p["0.weight"].detach().clone(), factor * x[:32]
    adam = torch.optim.Adam(p.values())
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    with torch.autocast("cpu", dtype=dtype):
        losses = vmap(member_loss, in_dims=(0, 0, None))(p, images, y[:32])
    scaler.scale(losses.sum()).backward()
    scaler.step(adam)
    scaler.update()
    changed = (p["0.weight"] != old).flatten(1).any(dim=1).sum()
    after = f"{changed} members moved, scale {scaler.get_scale():.0f}"
    print(f"{dtype}, images of member 3 times {factor:.0f}: {after}")

# %%
# **With** ``bfloat16`` **you need no scaler** (it is switched off above), for it has
# the range of ``float32``.
#
# Log each member's loss without waiting for the GPU
# --------------------------------------------------
#
# ``losses.tolist()``, ``.item()`` and ``print`` wait until the GPU has computed them.
# Keep the tensors, and ask for numbers once in an epoch. The data are on the device
# here, because a copy in each step waits, too, unless it is pinned and
# ``non_blocking``.

x_here, y_here, log = x.to(device), y.to(device), []
order = torch.rand(num_models, num_rows, device=device).argsort(dim=1)
for rows in order.split(32, dim=1):
    losses = vmap(member_loss)(params, x_here[rows], y_here[rows])
    train(losses)
    log.append(losses.detach())  # detached, or each step keeps its graph
means = torch.stack(log).mean(dim=0)  # [8]
print("mean losses of the minibatches:", *[f"{loss:.3f}" for loss in means.tolist()])

# %%
# With a progress bar and TensorBoard (``pip install tqdm tensorboard``):
#
# .. code-block:: none
#
#    from torch.utils.tensorboard import SummaryWriter
#    from tqdm import tqdm
#
#    writer = SummaryWriter("runs/ensemble")
#    for epoch in tqdm(range(num_epochs)):
#        ...  # an epoch as above
#        means = torch.stack(log).mean(dim=0).cpu()
#        writer.add_histogram("losses of all members", means, epoch)
#        for member, loss in enumerate(means[:4].tolist()):
#            writer.add_scalar(f"loss/{member}", loss, epoch)
#
# ``add_scalars`` would open a file for each member.
#
# Remember
# --------
#
# One batch for all is ``None``; a batch for each is an index of members by rows. What
# differs between members is a mapped argument. With one ``GradScaler``, one member's
# overflow skips everybody's step.
#
# Next
# ----
#
# - ``plot_state.py``: what belongs to each member, and what all share.
# - ``plot_silent_mistakes.py``: a shared batch with as many rows as there are members.
# - ``plot_regression.py`` and ``plot_more_members.py`` judge what an ensemble says.
#
# References
# ----------
#
# - A loader that stacks a batch for each member is wanted in `meta-pytorch/data#1507
#   <https://github.com/meta-pytorch/data/issues/1507>`_.
# - `torch.utils.data <https://docs.pytorch.org/docs/stable/data.html>`_: workers, and
#   what differs between platforms; `pinned memory
#   <https://docs.pytorch.org/tutorials/intermediate/pinmem_nonblock.html>`_.
