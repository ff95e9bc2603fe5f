"""
Checkpoints for any number of processes
=======================================

Save an ensemble that trains in several processes, load it with another number of them,
and, if one is killed, go on as if nothing had happened, up to rounding (without
dropout).

**In short.** Tell ``torch.distributed.checkpoint``, by ``DTensor.from_local``, which
rows of the whole stack a process holds; then another number of processes finds its
members, too. Without dropout and buffers, and if each minibatch depends on member and
step only, parameters, the optimizer's tensors and the step are all that a training
needs to go on.

Before you start, read ``plot_many_devices.py``: it splits members over processes.
"""

# %%
# Set-up
# ------
#
# This section and the next two are a complete ``train.py``, which needs ``os``,
# ``pathlib`` and torch.

import inspect
import os
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

# %%
# Save and load the members of all processes
# ------------------------------------------
#
# ``params`` is the stack of a process's own members, ``optimizer`` an Adam on it,
# ``num_models`` counts the members of all processes:


def share(num_models, rank, world):
    """Numbers of the members that process ``rank`` of ``world`` trains."""
    size = -(-num_models // world)  # rounded up
    return range(num_models)[rank * size : (rank + 1) * size]


def declare(params, optimizer, num_models):
    """Parameters and optimizer state by name, in the same memory."""
    rank, world = dist.get_rank(), dist.get_world_size()
    own, tensors = share(num_models, rank, world), dict(params)
    for name, p in params.items():  # "0.weight.exp_avg", "0.weight.step", ...
        tensors |= {f"{name}.{key}": t for key, t in optimizer.state[p].items()}
    mesh = init_device_mesh(p.device.type, (world,))
    for name, t in tensors.items():
        if t.ndim:  # [share, ...]; the count of steps is one number for all
            if len(t) != len(own):
                raise ValueError(f"{len(t)} rows, where Shard(0) means {len(own)}")
            whole = {"shape": (num_models, *t.shape[1:]), "stride": t.stride()}
            tensors[name] = DTensor.from_local(t.detach(), mesh, [Shard(0)], **whole)
    return tensors


# %%
# A checkpoint is a folder that is named after its step. All processes call these
# functions together:


def save(params, optimizer, num_models, folder, step):
    part = Path(folder, f"{step}.part")
    dcp.save(declare(params, optimizer, num_models), checkpoint_id=part)
    if dist.get_rank() == 0:
        part.rename(Path(folder, str(step)))


def load_latest(params, optimizer, num_models, folder):
    """Fill the tensors from the last complete checkpoint; return its step, or 0."""
    complete = [path.name for path in Path(folder).glob("*") if path.name.isdecimal()]
    last = [max(map(int, complete), default=0)]
    dist.broadcast_object_list(last, src=0)  # process 0 chooses
    if last[0]:
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()  # a new Adam has no tensors: this makes them, to be filled
        tensors = declare(params, optimizer, num_models)
        dcp.load(tensors, checkpoint_id=Path(folder, str(last[0])))
    return last[0]


# %%
# ``dcp.save`` returns when all processes have written (tested). So, on a file system
# that all share, **a folder named by a number is complete**. (In torch 2.13 the file
# ``.metadata`` comes last; that is a detail of its implementation.) Split by ``share``:
# another split, as the 3, 3, 2, 2 that ``tensor_split`` makes of 10, would be saved
# without an error, and could not be loaded by another number of processes, so
# ``declare`` refuses it (tested).
#
# Members and their training
# --------------------------
#
# The rest of ``train.py``, as in ``plot_many_devices.py``: a minibatch is a function of
# member and step, so no state of a random generator is saved. (Dropout, with
# ``randomness="different"``, needs such a state: it goes on with other masks.) Add
# batch-norm buffers to ``tensors``, and compute a learning rate that changes from the
# step.


def minibatch(member, step):
    generator = torch.Generator().manual_seed(1_000_000 * (member + 1) + step)
    x = torch.randn(32, 64, generator=generator)
    return x, x[:, :10].argmax(dim=1)  # to learn: which of the first ten is largest?


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


def losses_of(params, x, y):
    """The loss of each member for its own minibatch."""
    with torch.device("meta"):
        skeleton = build(0)

    def forward(params, x):
        return functional_call(skeleton, params, (x,), strict=True)

    logits = vmap(forward)(params, x)  # [share, 32, 10]
    return F.cross_entropy(logits.mT, y, reduction="none").mean(dim=1)


def train_step(params, optimizer, x, y):
    optimizer.zero_grad()
    losses_of(params, x, y).sum().backward()
    optimizer.step()


def own_device():
    """An accelerator for each process of this machine, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    torch.accelerator.set_device_index(int(os.getenv("LOCAL_RANK", "0")))
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


# %%


def work(num_models, num_steps, folder, device=None, dtype=torch.float32):
    device = device or own_device()  # chosen before NCCL starts
    backend = dist.get_default_backend_for_device(device)  # NCCL, gloo
    chosen = None if device.type == "cpu" else device
    dist.init_process_group(backend, device_id=chosen)
    rank, world = dist.get_rank(), dist.get_world_size()
    members = share(num_models, rank, world)
    params, optimizer = begin(members, device, dtype)
    done = load_latest(params, optimizer, num_models, folder)
    if rank == 0:
        print(f"{world} processes go on after step {done}")
    for step in range(done + 1, num_steps + 1):
        train_step(params, optimizer, *draw(members, step, params))
        if step % 10 == 0:
            save(params, optimizer, num_models, folder, step)
    dist.barrier()  # nobody leaves early
    dist.destroy_process_group()


if os.getenv("RANK"):  # torchrun sets it, and runs this file as train.py
    work(8, 40, "checkpoints")
    raise SystemExit

# %%
# Copy these cells into ``train.py``, or download this page as a script, which ends here
# under torchrun (tested). Start it, and after a death again, with any number of
# processes that leaves none without members (8 fit 1 to 4, or 8):
#
# .. code-block:: none
#
#    torchrun --standalone --nproc-per-node 4 train.py
#
# Other ways to save, and why not here
# ------------------------------------
#
# - ``get_state_dict`` takes a module. A stack is a dictionary, and ``nn.ParameterDict``
#   refuses its names, which have dots (tested).
# - ``Stateful`` objects have a method that takes what was loaded. None is needed here,
#   since ``dcp.load`` writes into the tensors that the optimizer holds.
# - ``dcp.async_save`` copies the tensors and writes while you train; PyTorch calls it
#   experimental. Rename the folder after ``result()`` of what it returns (tested). On
#   GPUs it needs the backend ``"cpu:gloo,cuda:nccl"``.
#
# How this page starts it
# -----------------------
#
# It writes the functions into a ``train.py`` that names the CPU and float64.


def launch(num_processes, script, folder, wanted):
    """Run a script in processes that leave what is wanted; return the output."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr=127.0.0.1", "--log-dir=."]  # no name look-up, no litter
    torchrun += [f"--nproc-per-node={num_processes}", "train.py"]
    Path(folder, "train.py").write_text(script, encoding="utf-8")
    pipes = {"cwd": folder, "stdout": PIPE, "stderr": PIPE, "text": True}
    with Popen(torchrun, **pipes) as running:
        try:
            printed, errors = running.communicate(timeout=100)
        finally:
            running.terminate()  # kill would leave the workers running
    if not Path(folder, wanted).exists():
        raise RuntimeError(errors)  # with the traceback of the process that failed
    return printed


# %%

imports = """
import os, signal, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
import torch.nn as nn, torch.nn.functional as F
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.func import functional_call, stack_module_state, vmap
"""
copied = [share, declare, save, load_latest, minibatch, build, begin, draw]
copied += [losses_of, train_step, own_device, work]
functions = "\n".join([imports, *map(inspect.getsource, copied)])

# %%
# Kill a process
# --------------
#
# In this launch the last process kills itself in step 26. The others may begin with
# ``30.part``, but cannot complete it without the last one; torchrun ends them.


def deadly_draw(members, step, params, draw=draw):
    if 7 in members and step == 26:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(members, step, params)


num_processes, num_models, num_steps = 3, 8, 40
call = f'work({num_models}, {num_steps}, "saved", torch.device("cpu"), torch.float64)'
deadly = f"{inspect.getsource(deadly_draw)}\ndraw = deadly_draw"

scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name, "saved")
launch(num_processes, f"{functions}\n{deadly}\n{call}", scratch.name, "saved/20")
print(f"{num_processes} processes on the CPU, the last one killed in step 26;")
print("folders:", *sorted(path.name for path in folder.iterdir()))

# %%
# Go on with another number of processes
# --------------------------------------
#
# Start it again without the kill, and with one process less:

fewer = num_processes - 1
print(launch(fewer, f"{functions}\n{call}", scratch.name, "saved/40").strip())

# %%
# One file with all members
# -------------------------
#
# To use the members elsewhere, turn a checkpoint into a file for ``torch.load``. It
# holds the stack of all; ``plot_saving.py`` takes members out. Keep it: later releases
# are not promised to read checkpoints.

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
# The page trains the same members undisturbed. The check to keep: interrupt your own
# training, in float64 on the CPU.


@torch.no_grad()
def test_loss(params):
    """Mean loss of the members for inputs that none of them has seen."""
    batches = draw([num_models] * num_models, 0, params)
    return losses_of(params, *batches).mean().item()


params, optimizer = begin(range(num_models), "cpu", torch.float64)
undisturbed = [test_loss(params)]
for step in range(1, num_steps + 1):
    train_step(params, optimizer, *draw(range(num_models), step, params))
    undisturbed.append(test_loss(params))
resumed = {name: stacks[num_steps][name] for name in params}
message = "the resumed training ends with other members. {}".format
torch.testing.assert_close(resumed, params, atol=1e-10, rtol=0, msg=message)
equal = all(torch.equal(resumed[name], params[name]) for name in params)
bits = "all bits agree" if equal else "last bits differ"
print(f"{num_processes} processes, then {fewer}: as undisturbed, within 1e-10; {bits}")

# %%

fig, ax = plt.subplots(layout="constrained")
ax.plot(undisturbed, "C0-", label="one process, undisturbed")
for n, style, steps in [(num_processes, "C1o", [10, 20]), (fewer, "C2s", [30, 40])]:
    losses = [test_loss({name: stacks[i][name] for name in params}) for i in steps]
    ax.plot(steps, losses, style, label=f"checkpoint of {n} processes")
ax.axvline(26, color="C3", linestyle=":", label="a process is killed")
ax.set_title(f"{num_models} members, CPU, float64")
ax.set(xlabel="step", ylabel="mean loss, unseen inputs (cross entropy)")
ax.legend()
fig.set_label(
    "Loss against step. The line of the undisturbed training falls; the marks of four "
    "checkpoints lie on it, also after a process is killed in step 26."
)

# %%
# **The number of processes may change, the members do not.** A death costs the steps
# since the last complete checkpoint (tested: other numbers of processes with 5 and 8
# members; a death while writing with 4).
#
# Let torchrun restart it?
# ------------------------
#
# With ``--max-restarts`` it does, but in torch 2.13 that may fail or hang, probably as
# new processes find, in torchrun's store, what the dead ones left there
# (pytorch#135712). Start the job again, as this page does, or set a variable first
# (tested; torchrun may abort at its end, after the last checkpoint):
#
# .. code-block:: none
#
#    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#    torchrun --max-restarts 3 --standalone --nproc-per-node 4 train.py
#
# The mistake: plain tensors under one name
# -----------------------------------------
#
# Each of two processes saves its rows as ``"0.weight"`` and so on, and loads them
# again. Whose rows does it get?


def save_plain(num_models):
    dist.init_process_group("gloo")
    members = share(num_models, dist.get_rank(), dist.get_world_size())
    rows = {name: p.detach() for name, p in begin(members, "cpu")[0].items()}
    dcp.save(rows, checkpoint_id="plain")
    loaded = {name: torch.zeros_like(t) for name, t in rows.items()}
    dcp.load(loaded, checkpoint_id="plain")
    torch.save(loaded, f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


script = f"{functions}\n{inspect.getsource(save_plain)}\nsave_plain({num_models})"
with tempfile.TemporaryDirectory() as folder:
    launch(2, script, folder, "1.pt")
    loaded = [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
for name, p in begin(range(num_models), "cpu")[0].items():
    distinct = len(torch.cat([rows[name] for rows in loaded]).unique(dim=0))
    of = [torch.equal(loaded[0][name], part) for part in p.chunk(2)].index(True)
    print(f"{name:8}: {num_models} members given, {distinct} saved, of process {of}")

# %%
# There is no error. A plain tensor counts as the *same* in all processes: one of them
# saves it, and all get that. **If not all names come from one process, the weights of
# one member meet the biases of another.** Declare the rows, or name those of each
# member (``"member3.0.weight"``): many small entries, but no ``DTensor``, and any split
# loads them (tested).
#
# Remember
# --------
#
# **Declare rows as a shard, and another number of processes loads them.** Rename a
# folder when it is complete. Save the optimizer's tensors, too.
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
# - Restarts: `pytorch#135712 <https://github.com/pytorch/pytorch/issues/135712>`_.
