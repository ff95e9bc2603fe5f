"""
One ensemble on many devices
============================

Train the members of one ensemble in as many processes as you have GPUs or CPU cores:
without dropout, any number of processes makes the same members, up to rounding.

**In short.** Give every process a share of the members and a device, and derive each
random number from the member's number, never from the process's. Training then needs
no communication, and the prediction of the whole ensemble needs **one all-reduce**, of
as many numbers as a single member predicts.

Before you start, read ``plot_training.py``: it trains the members of one process.
"""

# %%
# Set-up
# ------

import inspect
import os
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE, Popen

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
devices = torch.accelerator.device_count()
where = f"a CPU with {os.cpu_count()} cores"
if device != cpu:
    where = f"{devices} x {device.type.upper()}"
print(f"{where}, torch {torch.__version__}, float32 but for the check")

# %%
# Split the members over the processes
# ------------------------------------
#
# The lines to copy into ``train.py``: the imports from torch, and the functions of the
# next three cells. A member is known by its number, and all its random numbers follow
# from it: ``torch.manual_seed(rank)`` would make other members for another number of
# processes. With data of your own, draw
# ``rows = torch.randint(len(data), (32,), generator=generator)`` instead.


def share(num_models, rank, world):
    """Numbers of the members that process ``rank`` of ``world`` trains."""
    size = -(-num_models // world)  # rounded up
    return range(num_models)[rank * size : (rank + 1) * size]


def mlp():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def build(member):
    torch.manual_seed(member)
    return mlp()


def minibatch(member, step):
    generator = torch.Generator().manual_seed(1_000_000 * (member + 1) + step)
    x = torch.randn(32, 64, generator=generator)
    return x, x[:, :10].argmax(dim=1)  # to learn: which of the first ten is largest?


# %%
# Each process trains its members as if there were no others:


def forward(params, x, in_dims):
    """Logits of all members whose stacked parameters are given."""
    with torch.device("meta"):
        skeleton = mlp()

    def call(params, x):
        return functional_call(skeleton, params, (x,), strict=True)

    return vmap(call, in_dims)(params, x)


def train(members, num_steps, device, dtype=torch.float32):
    """Stacked parameters of these members, trained. This communicates nothing."""
    params, _ = stack_module_state([build(i).to(device, dtype) for i in members])
    optimizer = torch.optim.Adam(params.values(), lr=0.003)
    for step in range(num_steps):
        pairs = zip(*[minibatch(i, step) for i in members], strict=True)
        x, y = (torch.stack(rows).to(device) for rows in pairs)  # [share, 32, 64]
        logits = forward(params, x.to(dtype), in_dims=(0, 0))  # [share, 32, 10]
        losses = F.cross_entropy(logits.mT, y, reduction="none").mean(dim=1)  # [share]
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


# %%
# They meet only to predict. ``work`` is what a process does from its start to its end:


def join(device=None):
    """Enter the group of all processes; return rank, their number, own device."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device(device or accelerator or "cpu")
    dist.init_process_group(dist.get_default_backend_for_device(device))  # NCCL, gloo
    if device == accelerator:
        torch.accelerator.set_device_index(dist.get_node_local_rank())
    return dist.get_rank(), dist.get_world_size(), device


def predict(params, x, num_models):
    """Probabilities of the whole ensemble, for an ``x`` that is the same everywhere."""
    total = forward(params, x, in_dims=(0, None)).softmax(dim=-1).sum(dim=0)  # [32, 10]
    dist.all_reduce(total)  # the sum over all processes
    return total / num_models


def work(num_models, num_steps, device=None, dtype=torch.float32):
    rank, world, device = join(device)
    params = train(share(num_models, rank, world), num_steps, device, dtype)
    x, _ = minibatch(num_models, 0)  # no member trained on it
    probabilities = predict(params, x.to(device, dtype), num_models)
    torch.save([params, probabilities], f"{rank}.pt")
    dist.barrier()  # who leaves knows that all have saved
    dist.destroy_process_group()


# %%
# End the file with a call, as ``work(91, 10)``, and start as many processes as you have
# devices:
#
# .. code-block:: none
#
#    torchrun --standalone --nproc-per-node 4 train.py
#
# Process 0 leaves ``0.pt``: its members and the ensemble's probabilities; process 1
# leaves ``1.pt``. ``torch.cat`` makes one stack of the members (below).
#
# **No member is lost or doubled** where the processes do not divide them: 91 members in
# 4 processes are 23, 23, 23 and 22. (It is the sum that makes ``predict`` right then; a
# mean of means is not.) Each process needs a member: 5 in 4 processes are 2, 2, 1 and
# none, so the last one raises an error, and torchrun ends all (tested). Start 3. (Why
# not 2, 1, 1, 1? ``plot_checkpoints.py`` saves by PyTorch's ``Shard(0)``, which splits
# like this.)
#
# How this page starts it
# -----------------------
#
# It writes these functions into a ``train.py`` in a temporary folder, starts torchrun,
# and reads what each process has saved. For the check, the call names the CPU and
# float64. If the page is interrupted, it ends torchrun by ``terminate``, since ``kill``
# would leave the processes running.

imports = """
import time
import torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
"""
copied = [share, mlp, build, minibatch, forward, train, join, predict, work]


def launch(num_processes, script):
    """Run a script in new processes; return what each has saved."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr=127.0.0.1", "--log-dir=."]  # no name look-up, no litter
    torchrun += [f"--nproc-per-node={num_processes}", "train.py"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text(script, encoding="utf-8")
        pipes = {"cwd": folder, "stdout": PIPE, "stderr": PIPE, "text": True}
        with Popen(torchrun, **pipes) as running:
            try:
                _, errors = running.communicate(timeout=100)
            finally:
                running.terminate()
                running.wait()
        files = [Path(folder, f"{rank}.pt") for rank in range(num_processes)]
        if not all(file.exists() for file in files):
            raise RuntimeError(errors)  # with the traceback of the process that failed
        return [torch.load(file, map_location="cpu") for file in files]


# %%

functions = "\n\n".join([imports, *map(inspect.getsource, copied)])
num_models, num_steps = 91, 10
call = f'work({num_models}, {num_steps}, "cpu", torch.float64)'
results = launch(2, f"{functions}\n{call}")

shares = [len(params["0.weight"]) for params, _ in results]
print(f"{num_models} members, in {len(shares)} processes:", *shares)

# %%
# The same members for any number of processes
# --------------------------------------------
#
# This page is a process, too; it trains all members by itself. The check to keep: train
# with two numbers of processes, in float64 on the CPU.

whole = train(range(num_models), num_steps, "cpu", torch.float64)
parts = {name: torch.cat([params[name] for params, _ in results]) for name in whole}
message = "another number of processes makes other members. {}".format
torch.testing.assert_close(parts, whole, atol=1e-10, rtol=0, msg=message)
equal = all(torch.equal(parts[name], whole[name]) for name in whole)
print("2 processes and 1 train the same members, within 1e-10;")
print(f"their parameters {'agree in every bit' if equal else 'differ in last bits'}")

# %%
# **The number of processes is no property of the ensemble.** Tested are 1 to 4
# processes with 5, 7 and 8 members. Bits agree if a matrix product gives the same bits
# for 46 members as for 91; with other widths, batch norm, or a single member in a
# process, the last ones may differ. In float32 such a difference grows with every step,
# until you have *other* members of the same quality (``plot_how_equal.py``). Dropout
# makes others, too: one generator draws the masks of all members of a process.
#
# What is communicated?
# ---------------------
#
# During training, nothing; to predict, the sum of probabilities, once (tested with
# PyTorch's ``CommDebugMode``). It is as large as the prediction of one member, for any
# number of members:

x = minibatch(num_models, 0)[0].cpu().double()
probabilities = forward(whole, x, in_dims=(0, None)).softmax(dim=-1).mean(dim=0)
_, reduced = results[-1]  # [32, 10], of the last process
off = (reduced - probabilities).abs().max()
print(f"sent: {list(reduced.shape)}, {reduced.nbytes / 1e3:.1f} kB;", end=" ")
print(f"never sent: {sum(p.nbytes for p in parts.values()) / 1e6:.1f} MB of parameters")
print(f"ensemble's probabilities by 2 processes and 1: {off:.0e} apart")

# %%
# How much faster is it?
# ----------------------
#
# No process waits for another, so ``n`` of them should be ``n`` times as fast. But a
# step has a cost that a smaller share does not lower, each process needs a device of
# its own, and cores share their memory. On a CPU there is also a rival: one process
# that uses all cores, PyTorch's default. (``torchrun`` gives one thread to each of
# several processes. Starting them takes seconds more.)


def time_training(num_models, num_steps, threads):
    """Seconds to train all members; the ways (processes, threads) take turns."""
    rank, world, device = join()
    ways = [(n, 1) for n in (1, 2, 4, 8) if n <= world] + [(1, threads)]
    seconds = {way: [] for way in ways}
    train([rank], 1, device)  # to warm up
    for n, threads in [*seconds] * 5:
        torch.set_num_threads(threads)
        dist.barrier()
        start = time.perf_counter()
        if rank < n:  # the others wait
            train(share(num_models, rank, n), num_steps, device)["0.bias"].cpu()
        dist.barrier()
        seconds[n, threads].append(time.perf_counter() - start)
    torch.save(seconds, f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# %%

# On a CPU, four: more than can work at once on two cores.
most, threads = (4, torch.get_num_threads()) if device == cpu else (devices, 1)
script = functions + "\n\n" + inspect.getsource(time_training)
script += f"\n\ntime_training({num_models}, {num_steps}, {threads})"
seconds = {way: torch.tensor(t) for way, t in launch(most, script)[0].items()}
median = {way: times.median().item() for way, times in seconds.items()}
print("processes x threads: median (fastest to slowest of 5 turns)")
for (n, each), times in seconds.items():
    spread = f"{times.min() * 1e3:.0f} to {times.max() * 1e3:.0f}"
    speed = f"{median[1, 1] / median[n, each]:.1f} times the speed of 1 x 1"
    print(f"{n:9} x {each:<7}: {median[n, each] * 1e3:.0f} ms ({spread}), {speed}")
best = "{} x {}".format(*min(median, key=median.get))
backend = dist.get_default_backend_for_device(device)
print(f"Fastest here: {best}, on {where}, by {backend}")

# %%

counts = [n for n, each in seconds if each == 1]
ticks = [1, 2, 4, 8][: max(3, len(counts))]
slow, fast = (
    [median[1, 1] / end(seconds[n, 1]).item() for n in counts]
    for end in (torch.max, torch.min)
)
fig, ax = plt.subplots(layout="constrained")
speeds = [median[1, 1] / median[n, 1] for n in counts]
ax.plot(counts, speeds, "C0o-", label="one thread each")
ax.fill_between(counts, slow, fast, color="C0", alpha=0.2, label="all turns")
ax.plot(ticks, ticks, "C1--", label="n processes, n times as fast")
if threads > 1:
    rival = median[1, 1] / median[1, threads]
    ax.plot(1, rival, "C2D", label=f"one process, {threads} threads")
ax.set_xticks(ticks)
ax.set_title(f"Training of {num_models} members, {num_steps} steps, float32\n{where}")
ax.set_xlabel("processes at work")
ax.set_ylabel("speed relative to 1 process, 1 thread")
ax.legend()
fig.set_label(
    "Speed of training all members, in times that of one process, against the number "
    "of processes, a dashed diagonal, and on a CPU a mark for one process with all "
    f"threads. Fastest, processes x threads: {best}."
)

# %%
# **As many processes as devices, and no more.** Where the measured line leaves the
# dashed one although cores are free, members are too few and small, or the memory is
# the limit. Beyond the number of cores, processes take turns and win little or nothing.
# If one process with all threads is nearly as fast, start only one. A wide band says
# that the machine had other work to do.
#
# The mistake: one DistributedDataParallel for all members
# --------------------------------------------------------
#
# It is the tool for *one* model on many devices. Here two processes, on the CPU, each
# wrap a member with a seed and minibatches of its own:


def train_wrapped(num_steps):
    rank, _, _ = join("cpu")
    model = nn.parallel.DistributedDataParallel(build(rank))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for step in range(num_steps):
        x, y = minibatch(rank, step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(model.module[0].weight.detach(), f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


script = functions + "\n\n" + inspect.getsource(train_wrapped)
wrapped = torch.stack(launch(2, f"{script}\n\ntrain_wrapped({num_steps})"))
alone = parts["0.weight"][:2]  # the same members, on this page
for way, weights in {"unwrapped": alone, "wrapped": wrapped}.items():
    print(f"{way}: 2 members, {len(weights.unique(dim=0))} distinct")

# %%
# There is no warning. At the start the wrapper sends the weights of process 0 to all,
# and in each step it averages the gradients of all: **several processes train one
# model**. Leave the wrapper out.
#
# Remember
# --------
#
# Seeds belong to members, so **any number of processes makes the same ensemble**.
# Training needs no communication and no wrapper; a prediction sums probabilities in one
# ``all_reduce``. Start as many processes as you have devices.
#
# Next
# ----
#
# - ``plot_checkpoints.py`` saves the members from all processes, and goes on with
#   another number of them after one was killed.
# - ``plot_memory.py`` says how many members fit on one device.
# - `torchrun <https://docs.pytorch.org/docs/stable/elastic/run.html>`_, for several
#   machines as well.
#
# References
# ----------
#
# - S. Li et al.: PyTorch Distributed, experiences on accelerating data parallel
#   training, 2020, `arXiv:2006.15704 <https://arxiv.org/abs/2006.15704>`_.
