"""
One ensemble on many devices
============================

Train the members of one ensemble in as many processes as you have GPUs or CPU cores,
and get the same members for any number of processes.

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
from datetime import timedelta
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
num_processes, where = 4, f"a CPU with {os.cpu_count()} cores"
if device != cpu:
    num_processes, where = devices, f"{devices} x {device.type.upper()}"
print(f"processes: {num_processes}, on {where}, torch {torch.__version__}, float64")

# %%
# A member is its number
# ----------------------
#
# The usual ``torch.manual_seed(rank)`` makes other members for another number of
# processes. So the seed belongs to the member, and its minibatch is a function of
# member and step. (Of real data, take rows ``torch.randint(len(data), (32,),
# generator=generator)``.)


def mlp():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()


def build(member):
    torch.manual_seed(member)
    return mlp()


def minibatch(member, step):
    generator = torch.Generator().manual_seed(1_000_000 * (member + 1) + step)
    x = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    return x, x[:, :10].argmax(dim=1)  # to learn: which of the first ten is largest?


def forward(params, x, in_dims):
    """Logits of all members whose stacked parameters are given."""
    with torch.device("meta"):
        skeleton = mlp()

    def call(params, x):
        return functional_call(skeleton, params, (x,), strict=True)

    return vmap(call, in_dims)(params, x)


# %%
# Split the members over the processes
# ------------------------------------
#
# The lines to copy. They train a share of the members as if there were no others, and
# meet only to predict:


def share(num_models, rank, world):
    """Numbers of the members that process ``rank`` of ``world`` trains."""
    return torch.arange(num_models).tensor_split(world)[rank].tolist()


def train(members, num_steps, device):
    """Stacked parameters of these members, trained. This communicates nothing."""
    params, _ = stack_module_state([build(i).to(device) for i in members])
    optimizer = torch.optim.Adam(params.values(), lr=0.003)
    for step in range(num_steps):
        pairs = zip(*[minibatch(i, step) for i in members], strict=True)
        x, y = (torch.stack(rows).to(device) for rows in pairs)  # [share, 32, 64]
        logits = forward(params, x, in_dims=(0, 0))  # [share, 32, 10]
        losses = F.cross_entropy(logits.mT, y, reduction="none").mean(dim=1)  # [share]
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def predict(params, x, num_models):
    """Probabilities of the whole ensemble, in every process."""
    total = forward(params, x, in_dims=(0, None)).softmax(dim=-1).sum(dim=0)  # [32, 10]
    dist.all_reduce(total)  # the sum over all processes
    return total / num_models


# %%
# ``share`` loses and doubles no member where the processes do not divide them: 90
# members in 4 processes are 23, 23, 22 and 22. It is the sum that makes ``predict``
# right then; a mean of the processes' means would not be.
#
# What each process does
# ----------------------
#
# A process takes the GPU with its local number, or one CPU core; the group takes NCCL
# or gloo by itself. What a process returns to this page goes into a file.


def work(num_models, num_steps, device):
    dist.init_process_group(timeout=timedelta(seconds=60))  # for each wait
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.accelerator.set_device_index(dist.get_node_local_rank())
    params = train(share(num_models, rank, world), num_steps, device)
    x, _ = minibatch(-1, 0)  # no member trained on it
    result = {
        "params": {name: p.cpu() for name, p in params.items()},
        "probabilities": predict(params, x.to(device), num_models).cpu(),
        "seconds": time_training(num_models, num_steps, device),
        "wrapped": train_wrapped(rank, num_steps, device),
    }
    torch.save(result, f"{rank}.pt")
    dist.barrier()  # who leaves knows that all have saved
    dist.destroy_process_group()


# %%
# Two things ride along, because starting processes takes seconds. The first is a
# measurement: the first ``n`` processes share all members while the others wait.


def time_training(num_models, num_steps, device):
    """Seconds to train all members by 1, 2, 4, ... processes, which take turns."""
    rank, world = dist.get_rank(), dist.get_world_size()
    seconds = {n: [] for n in (1, 2, 4, 8) if n <= world}
    for n in [*seconds] * 5:
        dist.barrier()
        start = time.perf_counter()
        if rank < n:
            train(share(num_models, rank, n), num_steps, device)["0.bias"].cpu()
        dist.barrier()
        seconds[n].append(time.perf_counter() - start)
    return seconds


# %%
# The second is a mistake, one member in each process, wrapped as one wraps a model that
# trains on many devices:


def train_wrapped(member, num_steps, device):
    """The first weights of a member, trained in DistributedDataParallel."""
    model = nn.parallel.DistributedDataParallel(build(member).to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for step in range(num_steps):
        x, y = minibatch(member, step)
        loss = F.cross_entropy(model(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.module[0].weight.detach().cpu()


# %%
# Start the processes
# -------------------
#
# You would put these functions into a file that ends with a call of ``work``, and start
# it by ``torchrun --standalone --nproc-per-node 4 train.py``. The page does that, too,
# with a file that it writes. A launcher that is killed leaves its workers running, as
# ``subprocess.run`` does at its timeout and at Ctrl-C; one that is *terminated* ends
# them first (tested). What counts are the files: a process of gloo may abort at its
# very end. If one is missing, the error that you get holds the traceback.


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
            raise RuntimeError(errors)
        return [torch.load(file) for file in files]


# %%
# The file: imports, the functions of this page as they stand above, one call.

imports = """
import time
from datetime import timedelta
import torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
"""
num_models, num_steps = 90, 10
functions = [mlp, build, minibatch, forward, share, train, predict]
functions += [work, time_training, train_wrapped]
call = f"work{(num_models, num_steps, device.type)}"  # work(90, 10, 'cpu')
script = "\n\n".join([imports, *map(inspect.getsource, functions), call])
results = launch(num_processes, script)

shares = [len(result["params"]["0.weight"]) for result in results]
print(f"{num_models} members, in {num_processes} processes:", *shares)

# %%
# The same members for any number of processes
# --------------------------------------------
#
# This page is a process, too; it trains all members by itself. The check to keep: train
# with two numbers of processes, in float64.

whole = train(range(num_models), num_steps, device)
whole = {name: p.cpu() for name, p in whole.items()}
parts = {
    name: torch.cat([result["params"][name] for result in results]) for name in whole
}
torch.testing.assert_close(
    parts,
    whole,
    atol=1e-10,
    rtol=0,
    msg=lambda what: f"another number of processes makes other members. {what}",
)
equal = all(torch.equal(parts[name], whole[name]) for name in whole)
print(f"{num_processes} processes and 1 train the same members, within 1e-10;")
print(f"their parameters {'agree in every bit' if equal else 'differ in last bits'}")

# %%
# **The number of processes is no property of the ensemble.** Tested are 1, 2 and 4
# processes, and 5 and 7 members. Bits agree if a matrix product gives the same bits for
# 23 members as for 90; other widths, batch norm, or one lone member in a process may
# differ in the last ones. In float32, a long training makes much of that
# (``plot_how_equal.py``): then you get *other* members of the same quality.
#
# With more processes than members, one gets no member, ``stack_module_state`` raises,
# and torchrun ends the others, which would wait for it in ``all_reduce`` (tested).
#
# What is communicated?
# ---------------------
#
# During training, nothing; to predict, the sum of probabilities, once (a test counts
# the calls). Its size is that of one member's prediction, for any number of members:

x, _ = minibatch(-1, 0)
probabilities = forward(whole, x, in_dims=(0, None)).softmax(dim=-1).mean(dim=0)
reduced = results[-1]["probabilities"]  # [32, 10], from the last process
off = (reduced - probabilities).abs().max()
print(f"sent: {list(reduced.shape)}, {reduced.nbytes / 1e3:.1f} kB;", end=" ")
print(f"never sent: {sum(p.nbytes for p in parts.values()) / 1e6:.1f} MB of parameters")
print(f"ensemble's probabilities by {num_processes} processes and 1: {off:.0e} apart")

# %%
# How much faster is it?
# ----------------------
#
# No process waits for another, so ``n`` of them should be ``n`` times as fast. Two
# things stand against it: each step has a cost that a smaller share does not lower, and
# each process needs a device of its own. (Starting takes seconds more, once.)

seconds = {n: torch.tensor(times) for n, times in results[0]["seconds"].items()}
median = {n: times.median().item() for n, times in seconds.items()}
print("processes: median (fastest to slowest of 5 turns)")
for n, times in seconds.items():
    spread = f"{times.min() * 1e3:.0f} to {times.max() * 1e3:.0f}"
    speed = f"{median[1] / median[n]:.1f} times the speed of one"
    print(f"{n:9}: {median[n] * 1e3:.0f} ms ({spread}), {speed}")
best = min(median, key=median.get)
print(f"Fastest: {best} of at most {num_processes} processes, on {where}")

# %%

counts = list(seconds)
ticks = [1, 2, 4, 8][: max(3, len(counts))]
slow, fast = (
    [median[1] / end(times).item() for times in seconds.values()]
    for end in (torch.max, torch.min)
)
fig, ax = plt.subplots(layout="constrained")
ax.plot(counts, [median[1] / median[n] for n in counts], "C0o-", label="measured")
ax.fill_between(counts, slow, fast, color="C0", alpha=0.2)
ax.plot(ticks, ticks, "C1--", label="n processes, n times as fast")
ax.set_xticks(ticks)
ax.set_title(f"Training of {num_models} members, {num_steps} steps, float64\n{where}")
ax.set_xlabel("processes at work, one thread each")
ax.set_ylabel("speed [that of one]; band: all turns")
ax.legend()
fig.set_label(
    "Speed of training all members, in times that of one process, against the number "
    f"of processes that share them, and a dashed diagonal. Fastest: {best}."
)

# %%
# **As many processes as devices, and no more.** If the measured speed leaves the dashed
# line while each process has a core, other programs use the cores, or the members are
# too few and too small for their number to matter. With more processes than cores, they
# take turns and win little or nothing. On a single GPU there is one mark, and the
# dashed line is what more GPUs could do at best; a second process on the *same* GPU is
# no remedy, a larger ``vmap`` is.
#
# The mistake: one DistributedDataParallel for all members
# --------------------------------------------------------
#
# It is the tool for *one* model on many devices. ``train_wrapped`` gave every process
# a member with a seed and minibatches of its own. What came of it?

wrapped = torch.stack([result["wrapped"] for result in results])
alone = parts["0.weight"][:num_processes]  # the same members, on this page
for way, weights in {"unwrapped": alone, "wrapped": wrapped}.items():
    print(f"{way}: {num_processes} members, {len(weights.unique(dim=0))} different")

# %%
# There is no warning. At the start the wrapper sends the weights of process 0 to all,
# and in each step it averages the gradients of all: **several processes train one
# model** (a single one has nobody to average with). Leave the wrapper out.
#
# Remember
# --------
#
# Seeds belong to members, so **any number of processes makes the same ensemble**.
# Training needs no communication and no wrapper; a prediction sums probabilities in one
# ``all_reduce``. Start as many processes as you have devices, and terminate, never
# kill, their launcher.
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
# - B. Lakshminarayanan, A. Pritzel, C. Blundell: Simple and scalable predictive
#   uncertainty estimation using deep ensembles, 2017,
#   `arXiv:1612.01474 <https://arxiv.org/abs/1612.01474>`_.
