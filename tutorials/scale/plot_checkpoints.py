"""
Checkpoints for any number of processes
=======================================

Save an ensemble that trains in several processes, load it with another number of them,
and let a training whose process was killed end as if nothing had happened.

**In short.** Before ``torch.distributed.checkpoint`` saves a stack of members, declare
its rows with ``DTensor.from_local`` as a part of all rows; then any number of processes
finds its members again. If each minibatch depends on member and step only, a training
needs nothing else to go on: parameters, the optimizer's tensors, and the step.

Before you start, read ``plot_many_devices.py``: it splits members over processes.
"""

# %%
# Set-up
# ------

import inspect
import os
import shutil
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE, Popen

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.func import functional_call, stack_module_state, vmap

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
num_processes = 4 if device == cpu else torch.accelerator.device_count()
where = f"{device.type.upper()}, float64"
print(f"processes: {num_processes}, torch {torch.__version__}, {where}")

# %%
# Save and load the members of all processes
# ------------------------------------------
#
# The lines to copy. ``params`` is the stack of this process's members, ``optimizer`` a
# stock one on it, ``num_models`` counts the members of all. All processes call these;
# a checkpoint is a folder that is named after its step:


def declare(params, optimizer, num_models, device):
    """Parameters and optimizer state by name; they share memory with the originals."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    tensors = dict(params)
    for name, p in params.items():  # "0.weight.exp_avg", "0.weight.step", ...
        tensors |= {f"{name}.{key}": t for key, t in optimizer.state[p].items()}
    for name, t in tensors.items():
        if t.ndim:  # [share, ...]; the count of steps is one number for all
            whole = {"shape": (num_models, *t.shape[1:]), "stride": t.stride()}
            tensors[name] = DTensor.from_local(t.detach(), mesh, [Shard(0)], **whole)
    return tensors


def save(params, optimizer, num_models, device, folder, step):
    tensors = declare(params, optimizer, num_models, device)
    dcp.save(tensors, checkpoint_id=Path(folder, str(step)))


def load_latest(params, optimizer, num_models, device, folder):
    """Fill the tensors from the last complete checkpoint; return its step, or 0."""
    steps = [int(path.parent.name) for path in Path(folder).glob("*/.metadata")]
    if steps:
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes the optimizer's tensors, which are filled next
        tensors = declare(params, optimizer, num_models, device)
        dcp.load(tensors, checkpoint_id=Path(folder, str(max(steps))))
    return max(steps, default=0)


# %%
# Each process writes its own rows, at the same time; ``.metadata`` comes last, when all
# are there. So **a folder without** ``.metadata`` **is half written, and is never
# loaded**.
#
# Members and their training
# --------------------------
#
# As in ``plot_many_devices.py``: seeds belong to members, and a minibatch is a function
# of member and step. So there is no state of random generators to save. ``share`` gives
# equally many members to all processes but the last, as ``Shard(0)`` counts rows: 5 in
# 2 processes are 3 and 2 (tested; 5 in 4 would leave the last one none, and raise).


def share(num_models, rank, world):
    """Numbers of the members of a process, as ``Shard(0)`` splits rows."""
    size = -(-num_models // world)  # rounded up
    return range(num_models)[rank * size : (rank + 1) * size]


def mlp():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()


def build(member):
    torch.manual_seed(member)
    return mlp()


def begin(members, device):
    params, _ = stack_module_state([build(i).to(device) for i in members])
    return params, torch.optim.Adam(params.values(), lr=0.003)


def minibatch(member, step):
    generator = torch.Generator().manual_seed(1_000_000 * member + step)
    x = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    return x, x[:, :10].argmax(dim=1)  # to learn: which of the first ten is largest?


# %%


def train_step(params, optimizer, members, step, device):
    """Losses of these members; the step communicates nothing."""
    with torch.device("meta"):
        skeleton = mlp()

    def forward(params, x):
        return functional_call(skeleton, params, (x,), strict=True)

    pairs = zip(*[minibatch(i, step) for i in members], strict=True)
    x, y = (torch.stack(rows).to(device) for rows in pairs)  # [share, 32, 64]
    logits = vmap(forward)(params, x)  # [share, 32, 10]
    losses = F.cross_entropy(logits.mT, y, reduction="none").mean(dim=1)  # [share]
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()
    return losses.detach().cpu()


# %%
# What each process does
# ----------------------
#
# It goes on from the last complete checkpoint, if there is one, and saves one every ten
# steps. After step ``dies_after``, the last process kills itself. (First it makes the
# mistake of this page, shown at its end.)


def work(num_models, num_steps, device, dies_after=None):
    dist.init_process_group(timeout=timedelta(seconds=60))  # for each wait
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.accelerator.set_device_index(dist.get_node_local_rank())
    members = share(num_models, rank, world)
    params, optimizer = begin(members, device)
    save_plain(params, rank)
    done = load_latest(params, optimizer, num_models, device, ".")
    for step in range(done + 1, num_steps + 1):
        train_step(params, optimizer, members, step, device)
        if step % 10 == 0:
            save(params, optimizer, num_models, device, ".", step)
        if step == dies_after and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


def save_plain(params, rank):
    """The mistake: rows of each process under the same name, not declared."""
    saved = {name: p.detach() for name, p in params.items()}
    dcp.save(saved, checkpoint_id="mistake/plain")
    loaded = {name: torch.zeros_like(p) for name, p in saved.items()}
    dcp.load(loaded, checkpoint_id="mistake/plain")
    torch.save(loaded["0.weight"].cpu(), f"mistake/{rank}.pt")


# %%
# Kill a process
# --------------
#
# The page writes these functions into a file and starts it with torchrun. When the last
# process dies, the others wait for it in vain at their next checkpoint; torchrun ends
# them.


def launch(num_processes, script, folder):
    """Run a script in new processes in a folder; return what they say of errors."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr=127.0.0.1", "--log-dir=."]  # no name look-up, no litter
    torchrun += [f"--nproc-per-node={num_processes}", "train.py"]
    Path(folder, "train.py").write_text(script, encoding="utf-8")
    pipes = {"cwd": folder, "stdout": PIPE, "stderr": PIPE, "text": True}
    with Popen(torchrun, **pipes) as running:
        try:
            return running.communicate(timeout=100)[1]
        finally:
            running.terminate()  # not kill, which would leave the workers running
            running.wait()


# %%

imports = """
import os, signal
from datetime import timedelta
from pathlib import Path
import torch, torch.nn.functional as F
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.func import functional_call, stack_module_state, vmap
"""
num_models, num_steps, dies_after = 8, 40, 25
functions = [declare, save, load_latest, share, mlp, build, begin, minibatch]
functions += [train_step, work, save_plain]
call = f"work{(num_models, num_steps, device.type, dies_after)}"
script = "\n\n".join([imports, *map(inspect.getsource, functions), call])

scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
errors = launch(num_processes, script, folder)
if "SIGKILL" not in errors:
    raise RuntimeError(errors)  # with the traceback of the process that failed
complete = sorted(path.parent.name for path in folder.glob("*/.metadata"))
print(f"{num_processes} processes, the last one killed after step {dies_after};")
print("complete checkpoints of steps", *complete)

# %%
# One file with all members
# -------------------------
#
# To use the members elsewhere, turn a checkpoint into a file for ``torch.load``. It
# holds the stack, as if one process had trained it; ``plot_saving.py`` takes members
# out of that. It is also the file to keep: later releases of PyTorch are not promised
# to read the checkpoints of this one.

dcp_to_torch_save(folder / "20", folder / "members.pt")
stack = torch.load(folder / "members.pt")
for name in ["0.weight", "0.weight.exp_avg", "0.weight.step"]:
    print(f"{name:16} {list(stack[name].shape)}")
mistaken = [torch.load(folder / "mistake" / f"{i}.pt") for i in range(num_processes)]

# %%
# Go on with another number of processes
# --------------------------------------
#
# Start ``work`` anew with two processes, and two go on (tested). Here this page's
# process goes on alone, as a world of one: the same functions run, with a store in
# memory in place of a launcher. A half-written checkpoint of step 30 lies in its way.

half = shutil.ignore_patterns(".metadata")
shutil.copytree(folder / "20", folder / "30", ignore=half, dirs_exist_ok=True)

dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
members = share(num_models, rank=0, world=1)
params, optimizer = begin(members, device)
done = load_latest(params, optimizer, num_models, device.type, folder)
dist.destroy_process_group()
scratch.cleanup()
print(f"loaded the checkpoint of step {done}, all {len(params['0.weight'])} members")

# %%
# Beside it, the same members train undisturbed from their first step. The check to
# keep: interrupt a training of your own, in float64.

resumed = {
    step: train_step(params, optimizer, members, step, device)
    for step in range(done + 1, num_steps + 1)
}
others, their_optimizer = begin(members, device)
undisturbed = {
    step: train_step(others, their_optimizer, members, step, device)
    for step in range(1, num_steps + 1)
}
torch.testing.assert_close(
    params,
    others,
    atol=1e-10,
    rtol=0,
    msg=lambda what: f"the resumed training ends with other members. {what}",
)
equal = all(torch.equal(params[name], others[name]) for name in params)
print(f"killed with {num_processes} processes, resumed by 1: equal to undisturbed,")
print(
    "within 1e-10; the parameters", "agree in every bit" if equal else "do not in bits"
)

# %%

fig, ax = plt.subplots(layout="constrained")
for way, style, run in [
    ("undisturbed", "C0-", undisturbed),
    ("resumed", "C1o", resumed),
]:
    ax.plot(run.keys(), [losses.mean() for losses in run.values()], style, label=way)
ax.axvline(done, color="C2", linestyle="--", label="last complete checkpoint")
ax.axvline(dies_after, color="C3", linestyle=":", label="a process is killed")
ax.set_title(f"{num_models} members, {num_processes} processes, then 1\n{where}")
ax.set_xlabel("step")
ax.set_ylabel("mean loss of the members (cross entropy)")
ax.legend()
fig.set_label(
    f"Loss against step. The line of the undisturbed training falls; from step {done}, "
    "where the last complete checkpoint lies, the marks of the resumed one lie on it."
)

# %%
# **The killed training ends as if nothing had happened.** The steps between the last
# checkpoint and the death are done again, with the same minibatches. Bits agree where a
# matrix product has the same ones for two members as for eight; when it has not,
# ``plot_many_devices.py`` says. Steps between checkpoints are what a death costs you.
#
# Let torchrun restart it?
# ------------------------
#
# With ``--max-restarts``, torchrun itself starts all processes again, as many as
# before; in our trials with torch 2.13 (one machine, gloo), 11 of 14 such restarts
# failed or hung, because new processes looked for dead ones. To export
# ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` cures that (tested); to start anew, as this
# page does, needs no cure.
#
# The mistake: plain tensors under one name
# -----------------------------------------
#
# ``save_plain`` did in each process what one would do in one: it saved its rows as
# ``"0.weight"`` and loaded them again. How many members came back?

loaded = torch.cat(mistaken)  # [8, 64, 64]
different = len(loaded.unique(dim=0))
print(f"{num_models} members saved by {num_processes} processes, {len(loaded)} loaded:")
print(f"{different} different ones")

# %%
# There is no error. A plain tensor counts as the *same* in all processes, so the rows
# of process 0 were saved, and all processes got those (a single process loses nothing).
# Another number of processes gets ``Size mismatch``. Declare the rows, or give each
# member names of its own (``"member3.0.weight"``), which needs no ``DTensor`` and
# splits in any way, but makes many small entries (tested).
#
# Remember
# --------
#
# **Declare rows as a shard, and any number of processes loads them.** A folder for each
# step; only one with ``.metadata`` is complete. What goes on in the same way needs the
# optimizer's tensors, the step, and minibatches that depend on nothing else.
#
# Next
# ----
#
# - ``plot_many_devices.py`` trains and predicts with any number of processes.
# - ``plot_saving.py`` saves an ensemble from one process and takes members out.
# - PyTorch on `distributed checkpoints
#   <https://docs.pytorch.org/docs/stable/distributed.checkpoint.html>`_.
#
# References
# ----------
#
# - Restarts that meet an old store: `pytorch#135712
#   <https://github.com/pytorch/pytorch/issues/135712>`_, `pytorch#167288
#   <https://github.com/pytorch/pytorch/issues/167288>`_.
