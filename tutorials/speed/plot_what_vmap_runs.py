"""
What vmap really runs
=====================

See every operator that ``torch.func.vmap`` calls for an ensemble, layer by layer,
forward and backward: which layers become one large operator, what is added beside
it, and which layers still run once for each model.

**What you will learn**

- what convolution, linear layer, pooling and activation become under ``vmap``, with
  shapes and groups;
- why the number of operator calls no longer depends on the number of models;
- what that is worth on your machine: calls, time, and on an NVIDIA GPU the time that
  it waits;
- how to look at a layer of your own, and how to notice that ``vmap`` falls back to a
  loop.

**Before you start**, read ``plot_ensembling.py``, which shows how to turn a list of
models into one call of ``vmap``. No GPU is needed.
"""

# %%
# Set-up
# ------
#
# As in ``plot_ensembling.py``, the precision is IEEE float32, and all settings are
# put back at the end. Autograd stays on, because this page looks at the backward pass
# as well.

import copy
import platform
import warnings
from collections import Counter

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.profiler import DeviceType, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

torch.manual_seed(0)

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
num_threads = torch.get_num_threads()
device_names = {cpu: f"CPU ({platform.machine()}, {num_threads} threads)"}
if device.type == "cuda":
    device_names[device] = torch.cuda.get_device_name(device)
elif device != cpu:
    device_names[device] = device.type

conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
default_precision = conv.fp32_precision, matmul.fp32_precision
conv.fp32_precision = matmul.fp32_precision = "ieee"

print(
    f"{device_names[device]}, torch {torch.__version__}, {torch.get_default_dtype()}, "
    f"precision {conv.fp32_precision} (convolutions) and {matmul.fp32_precision} "
    f"(matrix products), autograd {'on' if torch.is_grad_enabled() else 'off'}"
)

# %%
# The instrument
# --------------
#
# Every call of PyTorch goes through a dispatcher. ``vmap`` is a layer of it: the
# operator of one model goes in, and the operators for all models come out. A
# ``TorchDispatchMode`` sits *below* that layer, and below autograd. It gets each
# operator that remains, with its arguments, shortly before the device does, so it
# shows what runs and not what the program says.
#
# This one counts the calls. Equal calls with equal shapes are one entry. Views are
# left out: they describe memory in another way and compute nothing.

groups_at = {"convolution": 8, "convolution_backward": 9}  # position of the argument


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if not (operator.is_view or name == "_unsafe_view"):
            words = [name, *[list(a.shape) for a in args if torch.is_tensor(a)]]
            if name in groups_at:
                words.append(f"groups={args[groups_at[name]]}")
            self.seen[" ".join(map(str, words))] += 1
        return operator(*args, **(kwargs or {}))


with Calls() as calls:
    nn.Linear(3, 2)(torch.ones(5, 3))
print(*calls.seen)

# %%
# The last call is the layer; those before it made the layer and its input. One
# fused ``addmm`` does it all: matrix product and bias.
#
# The second tool runs any layer three times, forward and backward: as a loop over
# models, under ``vmap``, and as a loop in float64, the reference. It returns what
# came out, and which operators ran.


def forward_backward(function, inputs):
    """Result and gradients of function(), and the operators of both passes."""
    with Calls() as forward:
        result = function()
    weights = torch.arange(result.numel()).cos().view(result.shape).to(result)
    with Calls() as backward:
        gradients = torch.autograd.grad(result, inputs, weights)
    return [result.detach(), *gradients], forward.seen, backward.seen


def loop(models, x, own):
    """One call for each model; gradients are stacked after the operators ran."""
    xs = [row.clone() for row in x] if own else [x] * len(models)
    leaves = [list(same) for same in zip(*[m.parameters() for m in models], strict=True)]
    if own and x.is_floating_point():
        leaves.append([row.requires_grad_() for row in xs])
    (result, *gradients), *seen = forward_backward(
        lambda: torch.stack([m(row) for m, row in zip(models, xs, strict=True)]),
        [leaf for same in leaves for leaf in same],
    )
    stacked = torch.tensor(range(len(gradients))).view(-1, len(models)).tolist()
    return [result, *[torch.stack([gradients[i] for i in row]) for row in stacked]], *seen


def vectorize(make, own, **options):
    """vmap of the module that make() returns, as a function of its state."""
    with torch.device("meta"):
        skeleton = make()

    def predict(params, buffers, x):
        return functional_call(skeleton, (params, buffers), (x,), strict=True)

    return vmap(predict, in_dims=(0, 0, 0 if own else None), **options)


def run(make, x, num_models, own=True):
    """Loop, vmap and float64 loop of num_models modules that make() returns."""
    models = [make().to(x.device) for _ in range(num_models)]
    params, buffers = stack_module_state(models)
    leaves = [*params.values()]
    if own and x.is_floating_point():
        leaves.append(x := x.clone().requires_grad_())
