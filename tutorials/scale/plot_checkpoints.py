"""
Checkpoints for any number of processes
=======================================

Save an ensemble that trains in several processes, load it with another number of them,
and let a training without dropout whose process was killed end as if nothing had
happened.

**In short.** Tell ``torch.distributed.checkpoint``, by ``DTensor.from_local``, which
rows of the whole stack a process holds; then any number of processes finds its members
again. If each minibatch depends on member and step only, parameters, the optimizer's
tensors and the step are all that a training needs to go on.

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

num_processes, where = 4, "CPU, float64"
print(f"{num_processes} processes, {where}, torch {torch.__version__}")

# %%
# Save and load the members of all processes
# ------------------------------------------
#
# The lines to copy into ``train.py``: imports from torch and ``pathlib``, and the
# functions of this section and the next. ``params`` is the stack of a process's own
# members, ``optimizer`` a stock one on it, ``num_models`` counts all members:


def share(num_models, rank, world):
    """Numbers of the members of process ``rank``; ``Shard(0)`` splits in this way."""
    size = -(-num_models // world)  # rounded up
    return range(num_models)[rank * size : (rank + 1) * size]


def declare(params, optimizer, num_models, device):
    """Parameters and optimizer state by name; they share memory with the originals."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh, own = init_device_mesh(device.type, (world,)), share(num_models, rank, world)
    tensors = dict(params)
    for name, p in params.items():  # "0.weight.exp_avg", "0.weight.step", ...
        tensors |= {f"{name}.{key}": t for key, t in optimizer.state[p].items()}
    for name, t in tensors.items():
        if t.ndim:  # [share, ...]; the count of steps is one number for all
            if len(t) != len(own):
                raise ValueError(f"{len(t)} rows, where Shard(0) means {len(own)}")
            whole = {"shape": (num_models, *t.shape[1:]), "stride": t.stride()}
            tensors[name] = DTensor.from_local(t.detach(), mesh, [Shard(0)], **whole)
    return tensors


# %%
# A checkpoint is a folder that is named after its step. All processes call these
# together. Process 0 chooses the checkpoint, since on a network file system processes
# may not yet see the same folders:


def save(params, optimizer, num_models, device, folder, step):
    tensors = declare(params, optimizer, num_models, device)
    dcp.save(tensors, checkpoint_id=Path(folder, str(step)))


def load_latest(params, optimizer, num_models, device, folder):
    """Fill the tensors from the last complete checkpoint; return its step, or 0."""
    complete = [path.parent.name for path in Path(folder).glob("*/.metadata")]
    last = [max(map(int, filter(str.isdecimal, complete)), default=0)]
    dist.broadcast_object_list(last, src=0)  # the choice of process 0
    if last[0]:
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()  # a new Adam has no tensors: this makes them, to be filled
        tensors = declare(params, optimizer, num_models, device)
        dcp.load(tensors, checkpoint_id=Path(folder, str(last[0])))
    return last[0]


# %%
# You use them so, in the function that each process runs:


def work(num_models, num_steps, folder, device=None, dtype=torch.float32):
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device(device or accelerator or "cpu")
    dist.init_process_group(dist.get_default_backend_for_device(device))  # NCCL, gloo
    if device == accelerator:
        torch.accelerator.set_device_index(dist.get_node_local_rank())
    rank, world = dist.get_rank(), dist.get_world_size()
    members = share(num_models, rank, world)
    params, optimizer = begin(members, device, dtype)
    done = load_latest(params, optimizer, num_models, device, folder)
    if rank == 0:
        print(f"{world} processes go on after step {done}")
    for step in range(done + 1, num_steps + 1):
        train_step(params, optimizer, members, step)
        if step % 10 == 0:
            save(params, optimizer, num_models, device, folder, step)
    dist.destroy_process_group()


# %%
# Each process writes its own rows, at the same time; ``.metadata`` comes last, when all
# are there. So **a folder without** ``.metadata`` **is half written, and is never
# loaded**. Older checkpoints you may delete. Split by ``share``: other splits, as the
# 3, 3, 2, 2 of ``tensor_split``, would be saved without an error, and could not be
# loaded by another number of processes, so ``declare`` refuses them (tested).
#
# Members and their training
# --------------------------
#
# The rest of ``train.py``, as in ``plot_many_devices.py``: a minibatch is a function
# of member and step, so no state of a random generator is saved. (Dropout has one: it
# goes on with other masks.) Batch-norm buffers you would add to ``tensors``, and a
# learning rate that changes you would compute from the step.


def mlp():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def build(member):
    torch.manual_seed(member)
    return mlp()


def begin(members, device, dtype=torch.float32):
    params, _ = stack_module_state([build(i).to(device, dtype) for i in members])
    return params, torch.optim.Adam(params.values(), lr=0.003)


def minibatch(member, step):
    generator = torch.Generator().manual_seed(1_000_000 * (member + 1) + step)
    x = torch.randn(32, 64, generator=generator)
    return x, x[:, :10].argmax(dim=1)  # to learn: which of the first ten is largest?


# %%


def losses_of(params, x, y):
    """The loss of each member for its own minibatch."""
    with torch.device("meta"):
        skeleton = mlp()

    def forward(params, x):
        return functional_call(skeleton, params, (x,), strict=True)

    x = x.to(params["0.weight"])  # its device and dtype
    logits = vmap(forward)(params, x)  # [share, 32, 10]
    return F.cross_entropy(logits.mT, y.to(x.device), reduction="none").mean(dim=1)


def train_step(params, optimizer, members, step):
    """One step of these members, which communicates nothing."""
    pairs = zip(*[minibatch(i, step) for i in members], strict=True)
    x, y = map(torch.stack, pairs)  # [share, 32, 64], [share, 32]
    optimizer.zero_grad()
    losses_of(params, x, y).sum().backward()
    optimizer.step()


# %%
# The file ends with a call, as ``work(8, 40, "checkpoints")``. Start it, and after a
# death start it again, with any number of processes:
#
# .. code-block:: none
#
#    torchrun --standalone --nproc-per-node 4 train.py
#
# How this page starts it
# -----------------------
#
# With a file that it writes. For the check at the end, its call names the CPU and
# float64; without them, each process takes a GPU, if there are any.


def launch(num_processes, script, folder, wanted):
    """Run a script in new processes for a wanted file; return what they print."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr=127.0.0.1", "--log-dir=."]  # no name look-up, no litter
    torchrun += [f"--nproc-per-node={num_processes}", "train.py"]
    Path(folder, "train.py").write_text(script, encoding="utf-8")
    pipes = {"cwd": folder, "stdout": PIPE, "stderr": PIPE, "text": True}
    with Popen(torchrun, **pipes) as running:
        try:
            said, errors = running.communicate(timeout=100)
        finally:
            running.terminate()  # kill would leave the workers running
            running.wait()
    if not Path(folder, wanted).exists():
        raise RuntimeError(errors)  # with the traceback of the process that failed
    return said


# %%
# Imports, and the functions to copy:

imports = """
import os, signal, torch, torch.distributed as dist, torch.nn.functional as F
import torch.distributed.checkpoint as dcp
from pathlib import Path
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.func import functional_call, stack_module_state, vmap
"""
copied = [share, declare, save, load_latest, work]
copied += [mlp, build, begin, minibatch, losses_of, train_step]
functions = "\n".join([imports, *map(inspect.getsource, copied)])

# %%
# Kill a process
# --------------
#
# In this launch one minibatch kills the process that asks for it, the last one. The
# others wait for it at their next checkpoint; torchrun ends them.


def killing(minibatch, *deadly):
    """The same minibatches, but one, of a member and a step, kills its process."""

    def draw(*asked):
        if asked == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return minibatch(*asked)

    return draw


num_models, num_steps, deadly_step = 8, 40, 26
call = f'work({num_models}, {num_steps}, "checkpoints", "cpu", torch.float64)'
deadly = f"minibatch = killing(minibatch, {num_models - 1}, {deadly_step})"

scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name, "checkpoints")
script = f"{functions}\n{inspect.getsource(killing)}\n{deadly}\n{call}"
launch(num_processes, script, scratch.name, "checkpoints/20/.metadata")
complete = sorted(path.parent.name for path in folder.glob("*/.metadata"))
print(f"{num_processes} processes, the last one killed in step {deadly_step};")
print("complete checkpoints of steps", *complete)

# %%
# Go on with another number of processes
# --------------------------------------
#
# Start the same file again, here with half as many processes. First the page puts a
# copy of step 20 without ``.metadata`` there as step 30, as a death while writing would
# leave it (a real one is tested).

half = shutil.ignore_patterns(".metadata")
shutil.copytree(folder / "20", folder / "30", ignore=half, dirs_exist_ok=True)
fewer = num_processes // 2
last = f"checkpoints/{num_steps}/.metadata"
print(launch(fewer, f"{functions}\n{call}", scratch.name, last).strip())

# %%
# One file with all members
# -------------------------
#
# To use the members elsewhere, turn a checkpoint into a file for ``torch.load``. It
# holds the stack of all; ``plot_saving.py`` takes members out. Keep this file: no later
# release is promised to read the checkpoints themselves.

stacks = {}
for step in range(10, num_steps + 1, 10):
    dcp_to_torch_save(folder / str(step), folder / "members.pt")
    stacks[step] = torch.load(folder / "members.pt")
scratch.cleanup()
for name in ["0.weight", "0.weight.exp_avg", "0.weight.step"]:
    print(f"{name:16} {list(stacks[num_steps][name].shape)}")

# %%
# As if nothing had happened
# --------------------------
#
# The page trains the same members undisturbed. The check to keep: interrupt a training
# of your own, in float64 on the CPU.


@torch.no_grad()
def test_loss(params):
    """Mean loss of the members for inputs that none of them has seen."""
    x, y = (t.expand(num_models, *t.shape) for t in minibatch(num_models, 0))
    return losses_of(params, x, y).mean().item()


params, optimizer = begin(range(num_models), "cpu", torch.float64)
undisturbed = [test_loss(params)]
for step in range(1, num_steps + 1):
    train_step(params, optimizer, range(num_models), step)
    undisturbed.append(test_loss(params))
resumed = {name: stacks[num_steps][name] for name in params}
message = "the resumed training ends with other members. {}".format
torch.testing.assert_close(resumed, params, atol=1e-10, rtol=0, msg=message)
equal = all(torch.equal(resumed[name], params[name]) for name in params)
print(f"killed with {num_processes} processes, resumed by {fewer}: as undisturbed,")
print("within 1e-10;", "all bits agree" if equal else "last bits differ")

# %%

fig, ax = plt.subplots(layout="constrained")
ax.plot(undisturbed, "C0-", label="one process, undisturbed")
for n, style, steps in [(num_processes, "C1o", [10, 20]), (fewer, "C2s", [30, 40])]:
    losses = [test_loss({name: stacks[i][name] for name in params}) for i in steps]
    ax.plot(steps, losses, style, label=f"checkpoint of {n} processes")
ax.axvline(deadly_step, color="C3", linestyle=":", label="a process is killed")
ax.set_title(f"{num_models} members, {where}")
ax.set_xlabel("step")
ax.set_ylabel("mean loss, unseen inputs (cross entropy)")
ax.legend()
fig.set_label(
    "Loss against step. The line of the undisturbed training falls; the marks of four "
    f"checkpoints lie on it, also after a process is killed in step {deadly_step}."
)

# %%
# **The number of processes may change, the members do not.** A death costs the steps
# since the last complete checkpoint; they are done again, with the same minibatches
# (tested: 5 and 8 members, 1 to 4 processes). ``plot_many_devices.py`` says when all
# bits agree.
#
# Let torchrun restart it?
# ------------------------
#
# With ``--max-restarts`` it does, but in torch 2.13 that may fail or hang, because new
# processes connect through the store of the dead ones (pytorch#135712). Start the job
# again, as this page does, or set a variable first (tested):
#
# .. code-block:: none
#
#    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#    torchrun --max-restarts 3 --standalone --nproc-per-node 4 train.py
#
# The mistake: plain tensors under one name
# -----------------------------------------
#
# Each of two processes does what it would do alone: it saves its rows as
# ``"0.weight"`` and so on, and loads them again. Whose rows does it get?


def save_plain(num_models):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    params, _ = begin(share(num_models, rank, world), "cpu")
    rows = {name: p.detach().clone() for name, p in params.items()}
    dcp.save(rows, checkpoint_id="plain")
    for t in rows.values():
        t.zero_()
    dcp.load(rows, checkpoint_id="plain")
    torch.save(rows, f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


script = f"{functions}\n{inspect.getsource(save_plain)}\nsave_plain({num_models})"
with tempfile.TemporaryDirectory() as folder:
    launch(2, script, folder, "1.pt")
    loaded = [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
for name, p in begin(range(num_models), "cpu")[0].items():
    distinct = len(torch.cat([rows[name] for rows in loaded]).unique(dim=0))
    of = [torch.equal(loaded[0][name], part) for part in p.chunk(2)].index(True)
    print(f"{name:8}: {num_models} members saved, {distinct} loaded, of process {of}")

# %%
# There is no error. A plain tensor counts as the *same* in all processes, so one of
# them saves it, and all get that. **If not all names come from one process, the weights
# of one member meet the biases of another.** Another number of processes gets a ``Size
# mismatch``. Declare the rows, or name those of each member (``"member3.0.weight"``):
# many small entries, but no ``DTensor``, and any split loads them (tested).
#
# Remember
# --------
#
# **Declare rows as a shard, and any number of processes loads them.** Give each step a
# folder; only one with ``.metadata`` is complete. Save the optimizer's tensors, too;
# let minibatches depend on member and step only.
#
# Next
# ----
#
# - ``plot_how_far.py``: how many fit on a device, and how long they train.
# - PyTorch on `distributed checkpoints
#   <https://docs.pytorch.org/docs/stable/distributed.checkpoint.html>`_.
#
# References
# ----------
#
# - Restarts that meet an old store: `pytorch#135712
#   <https://github.com/pytorch/pytorch/issues/135712>`_.
