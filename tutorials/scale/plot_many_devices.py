"""
One ensemble on many devices
============================

Train the members of one ensemble in as many processes as you have GPUs or CPU cores:
independent members need no process group, only a share and a device for each process.

**In short.** Derive each random number from the number of the member, never from that
of the process: then any number of processes makes the same members, up to rounding. You
want a process group where processes exchange something while they run: probabilities,
whose sum takes **one all-reduce**, or gradients, if each process holds all members and
a part of the data.

Before you start, read ``plot_training.py``: it trains the members of one process.
"""

# %%
# Set-up
# ------
#
# This section and the next are a complete ``train.py``, which needs ``os`` and torch.

import inspect
import os
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE, Popen

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import timer

# %%
# Split the members over the processes
# ------------------------------------
#
# Put your model into ``build``. With data of your own, draw in ``minibatch``
# ``rows = torch.randint(len(data), (32,), generator=generator)``.


def share(num_models, rank, world):
    """Numbers of the members that process ``rank`` of ``world`` trains."""
    size = -(-num_models // world)  # rounded up
    return range(num_models)[rank * size : (rank + 1) * size]


def minibatch(member, step):
    generator = torch.Generator().manual_seed(1_000_000 * (member + 1) + step)
    x = torch.randn(32, 64, generator=generator)
    return x, x[:, :10].argmax(dim=1)  # to learn: which of the first ten is largest?


# %%


def build(member):
    torch.manual_seed(member)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def begin(members, device, dtype=torch.float32):
    params, _ = stack_module_state([build(i).to(device, dtype) for i in members])
    return params, torch.optim.Adam(params.values(), lr=0.003)


def draw(members, step, params):
    """Stacked minibatches, on the device and in the dtype of the parameters."""
    x, y = zip(*[minibatch(i, step) for i in members], strict=True)
    like = params["0.weight"]
    return torch.stack(x).to(like), torch.stack(y).to(like.device)


# %%


def forward(params, x, in_dims=(0, 0)):
    """Logits of all members whose stacked parameters are given."""
    with torch.device("meta"):
        skeleton = build(0)

    def call(params, x):
        return functional_call(skeleton, params, (x,), strict=True)

    return vmap(call, in_dims)(params, x)


def loss_of(params, x, y):
    logits = forward(params, x)  # [share, 32, 10]
    return F.cross_entropy(logits.mT, y, reduction="none").mean(dim=1).sum()


def train_step(params, optimizer, x, y):
    optimizer.zero_grad()
    loss_of(params, x, y).backward()
    optimizer.step()


# %%


def own_device():
    """An accelerator for each process of this machine, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    torch.accelerator.set_device_index(int(os.getenv("LOCAL_RANK", "0")))
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def work(num_models, num_steps, device=None, dtype=torch.float32):
    rank, world = int(os.getenv("RANK")), int(os.getenv("WORLD_SIZE"))
    members = share(num_models, rank, world)
    params, optimizer = begin(members, device or own_device(), dtype)
    for step in range(num_steps):
        train_step(params, optimizer, *draw(members, step, params))
    torch.save({name: p.detach() for name, p in params.items()}, f"{rank}.pt")


if os.getenv("RANK"):  # torchrun sets it, and runs this file as train.py
    work(num_models=91, num_steps=10)
    raise SystemExit

# %%
# Copy these cells into ``train.py``, or download this page as a script, which ends here
# under torchrun (tested). Start a process for each device:
#
# .. code-block:: none
#
#    torchrun --standalone --nproc-per-node 4 train.py
#
# torchrun ends all if one fails. To let the others go on, start each as a job of its
# own, with one visible GPU, or, on a CPU, with ``OMP_NUM_THREADS=1``, which torchrun
# sets by itself (tested on a CPU):
#
# .. code-block:: none
#
#    CUDA_VISIBLE_DEVICES=0 RANK=0 WORLD_SIZE=4 python train.py
#
# Process 0 leaves its members in ``0.pt``; ``torch.cat`` joins the stacks of all files,
# in order of rank, in a folder that was empty before. **No member is lost or doubled**
# where the processes do not divide them: 91 members in 4 processes are 23, 23, 23 and
# 22. Each process needs a member: 5 in 4 processes are 2, 2, 1 and none, so the last
# one raises an error (tested). PyTorch's ``Shard(0)``, by which ``plot_checkpoints.py``
# saves, splits like this.
#
# When processes need a group
# ---------------------------
#
# They need one to exchange tensors while they run. If members stay on their devices,
# the ensemble's probabilities are a sum over processes. If there are fewer members than
# devices, each process may hold all members and take a part of the rows of each
# minibatch; then **gradients are averaged**, here by hand. Add to ``train.py``:


def join(device):
    backend = dist.get_default_backend_for_device(device)  # NCCL, gloo
    chosen = None if device.type == "cpu" else device  # before NCCL starts
    dist.init_process_group(backend, device_id=chosen)


def predict(params, x, num_models):
    """Probabilities of the whole ensemble, for an ``x`` that is the same everywhere."""
    total = forward(params, x, in_dims=(0, None)).softmax(dim=-1).sum(dim=0)  # [32, 10]
    dist.all_reduce(total)  # the sum over all processes
    return total / num_models


def split_step(params, optimizer, x, y):
    """As train_step, where x and y are a part of the rows, equally large for all."""
    optimizer.zero_grad()
    loss_of(params, x, y).backward()
    for p in params.values():  # each is a tensor of all members
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    optimizer.step()


# %%
# You use them so, after ``join(own_device())``:


def work_in_group(num_models, num_steps, device, dtype=torch.float32):
    rank, world = dist.get_rank(), dist.get_world_size()
    own = torch.load(f"{rank}.pt", map_location=device)  # what work has left
    x = minibatch(num_models, 0)[0].to(device, dtype)  # no member trained on it
    probabilities = predict(own, x, num_models)
    params, optimizer = begin(range(num_models), device, dtype)  # all members
    for step in range(num_steps):
        batches = draw(range(num_models), step, params)
        x, y = (t.chunk(world, dim=1)[rank] for t in batches)  # [91, 32 / world, ...]
        split_step(params, optimizer, x, y)
    torch.save([probabilities, params], f"group-{rank}.pt")


# %%
# How this page starts it
# -----------------------
#
# It writes the functions into a ``train.py``, starts torchrun, and reads what processes
# leave. An interrupt ends torchrun by ``terminate``, and no process is left (tested).

imports = """
import os, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.benchmark import timer
"""
copied = [share, minibatch, build, begin, draw, forward, loss_of, train_step]
copied += [own_device, work, join, predict, split_step, work_in_group]

# %%


def launch(num_processes, call, *more):
    """Run a call in new processes; return what they save, by name of the file."""
    script = "\n\n".join([imports, *map(inspect.getsource, [*copied, *more]), call])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr=127.0.0.1", "--log-dir=."]  # no name look-up, no litter
    torchrun += [f"--nproc-per-node={num_processes}", "train.py"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text(script, encoding="utf-8")
        with Popen(torchrun, cwd=folder, stderr=PIPE, text=True) as running:
            try:
                _, errors = running.communicate(timeout=100)
            finally:
                running.terminate()
        if running.returncode:
            raise RuntimeError(errors)  # with the traceback of the process that failed
        files = Path(folder).glob("*.pt")
        return {file.stem: torch.load(file, map_location="cpu") for file in files}


# %%
# The mistake: one DistributedDataParallel for all members
# --------------------------------------------------------
#
# It is the tool for *one* model on many devices. Here each of two processes on the CPU
# wraps a member of its own, after they have called the functions above:


def wrap():
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(build(rank))
    torch.save([build(rank)[0].weight, model.module[0].weight], f"ddp-{rank}.pt")


num_models, num_steps = 91, 6
call = f"""
work({num_models}, {num_steps}, "cpu", torch.float64)
join(torch.device("cpu"))
work_in_group({num_models}, {num_steps}, "cpu", torch.float64)
wrap()
dist.barrier()  # nobody leaves early
dist.destroy_process_group()
"""
found = launch(2, call, wrap)
pairs = zip(found["ddp-0"], found["ddp-1"], strict=True)
for way, weights in zip(["unwrapped", "wrapped"], pairs, strict=True):
    print(f"{way}: 2 members, {len(torch.stack(weights).unique(dim=0))} distinct")

# %%
# There is no error. The wrapper sends the weights of process 0 to all, and averages
# gradients in each step: **several processes train one model**.
#
# The same members for any number of processes
# --------------------------------------------
#
# This page is a process, too; it trains all members. The check to keep: train with two
# numbers of processes, in float64 on the CPU.

whole, optimizer = begin(range(num_models), "cpu", torch.float64)
for step in range(num_steps):
    train_step(whole, optimizer, *draw(range(num_models), step, whole))
print("members of each process:", *[len(found[rank]["0.bias"]) for rank in "01"])
joined = {name: torch.cat([found["0"][name], found["1"][name]]) for name in whole}
for what, params in {"members": joined, "rows": found["group-0"][1]}.items():
    message = f"2 processes that split {what} make other members. {{}}".format
    torch.testing.assert_close(params, whole, atol=1e-10, rtol=0, msg=message)
    equal = all(torch.equal(params[name], whole[name]) for name in whole)
    bits = "all bits agree" if equal else "last bits differ"
    print(f"2 processes that split {what} train what 1 does, within 1e-10; {bits}")
logits = forward(whole, minibatch(num_models, 0)[0].cpu().double(), (0, None))
off = (found["group-1"][0] - logits.softmax(dim=-1).mean(dim=0)).abs().max()
print(f"their ensemble predicts what that of 1 does, within {off:.0e}")

# %%
# **The number of processes is no property of the ensemble.** Tested are 1 to 4
# processes for members, and 1, 2 and 4 for rows, which divide 32. In float32 a
# difference in last bits can grow with every step, until you have *other* members
# (``plot_how_equal.py``). Dropout, which needs ``randomness="different"``, makes
# others, too: one generator draws the masks of all members of a process. With split
# rows, batch norm sees those of its own process only.
#
# What is communicated?
# ---------------------
#
# To train, split members exchange nothing; to predict, as many numbers as one member
# predicts (tested). Split rows exchange all gradients in each step.
#
# How much faster is it?
# ----------------------
#
# No process waits for another, so ``n`` should be ``n`` times as fast, but for what a
# smaller share does not shorten. On a CPU the rival is one process with PyTorch's
# default number of threads. Members are built and minibatches drawn before the clock
# starts. The number of turns is fixed, so that all processes make the same ones.


def time_training(num_models, num_steps, ways):
    dist.init_process_group("gloo")  # to start and to end together
    rank, device, jobs = dist.get_rank(), own_device(), {}
    for n in {n for n, _ in ways if rank < n}:
        members = share(num_models, rank, n)
        own = begin(members, device)
        jobs[n] = [(*own, *draw(members, step, own[0])) for step in range(num_steps)]

    def clock(n, threads):
        torch.set_num_threads(threads)
        dist.barrier()
        start = timer()
        for job in jobs.get(n, []):
            train_step(*job)
        timer()  # waits for a GPU
        dist.barrier()
        return timer() - start

    backs = [(-1) ** turn for turn in range(16)]  # every second turn backwards
    turns = [[clock(*way) for way in ways[::back]][::back] for back in backs]
    torch.save(torch.tensor(turns), f"{rank}.pt")
    dist.destroy_process_group()


# %%


def said(gain, low, high):
    """A gain in words; what noise can explain, up to 2 percent, is no difference."""
    if low > 1.02:
        return f"{gain:.3g}x faster ({low:.3g} to {high:.3g})"
    if high < 0.98:
        return f"{1 / gain:.3g}x slower ({1 / high:.3g} to {1 / low:.3g})"
    return f"no difference seen ({low:.2f} to {high:.2f})"


# %%

device, devices = own_device(), torch.accelerator.device_count()
where = f"{devices} {device.type}" if devices else f"{os.cpu_count()} CPU cores"
threads = 1 if devices else torch.get_num_threads()
counts = [n for n in (1, 2, 4, 8) if n <= (devices or 2 * os.cpu_count())]
ways = [*dict.fromkeys([(1, threads), *[(n, 1) for n in counts]])]
call = f"time_training({num_models}, {num_steps}, {ways})"
turns = launch(counts[-1], call, time_training)["0"][1:]  # without the first
gains = (turns[:, :1] / turns).sort(dim=0).values[[7, 3, -4]].T  # median, interval
times = dict(zip(ways, turns[:, 0].median() * 1e3 / gains[:, 0], strict=True))
print(f"{num_models} members, {num_steps} steps, {where}; processes x threads:")
told = ["", *[said(*gain) for gain in gains[1:].tolist()]]
for (n, each), against in zip(ways, told, strict=True):
    print(f"{n:9} x {each:<7} {times[n, each]:6.1f} ms  {against}")

# %%

fig, ax = plt.subplots(layout="constrained")
alone = [times[n, 1].item() for n in counts]
ax.plot(counts, alone, "C0o-", label="one thread each")
ax.plot(counts, [alone[0] / n for n in counts], "C1--", label="n times as fast as 1")
ax.axhline(times[ways[0]], color="C2", ls=":", label=f"one process, threads: {threads}")
ax.set_xticks(counts)
ax.set_title(f"{num_steps} steps of {num_models} members, float32\n{where}")
ax.set(xlabel="processes at work", ylabel="time [ms]", ylim=(0, None))
ax.legend()
row = f"{counts[-1]} x 1 against {ways[0][0]} x {threads}: {told[-1] or 'the same'}"
fig.set_label(
    "Training time against processes, beside lines for n times as fast and for one "
    f"process with all threads. Processes x threads, {row}."
)

# %%
# The first time is the median of 15 turns, after one to warm up. The others are that
# median divided by the median gain over it. Behind stands the gain with its 95 %
# interval, or, if no difference is seen, the interval alone. **Start several processes
# where a row with several says faster**. Their start is not timed. Where the line
# leaves the dashed one before the devices or cores run out, members are probably too
# few and too small, or memory bandwidth is the limit.
#
# Remember
# --------
#
# Seeds belong to members, so **another number of processes makes the same ensemble**,
# up to rounding. Training needs no group and no wrapper; common predictions and split
# rows do need one.
#
# Next
# ----
#
# - ``plot_checkpoints.py`` saves from all processes, and goes on with any number.
# - ``plot_memory.py`` says how many members fit on one device.
# - `torchrun <https://docs.pytorch.org/docs/stable/elastic/run.html>`_.
#
# References
# ----------
#
# - S. Li et al.: PyTorch Distributed, experiences on accelerating data parallel
#   training, 2020, `arXiv:2006.15704 <https://arxiv.org/abs/2006.15704>`_.
