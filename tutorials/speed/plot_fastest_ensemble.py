"""
The fastest ensemble on your machine
====================================

Run the same ensemble of CNNs in every way that PyTorch offers, from the plain loop to
compiled ``vmap``, prove each way right, and see how near each comes to what your
machine can do at all.

**What you will learn**

- how to measure two ceilings of a machine, arithmetic and memory, and to place a
  program below them (the roofline);
- what ``channels_last``, in-place operations, threads, chunks and ``torch.compile`` are
  worth for a loop over models and for ``vmap``;
- on NVIDIA GPUs, also TF32, bfloat16, CUDA graphs, streams and ``cudnn.benchmark``;
- which of them to try first for an ensemble of your own.

**Before you start**, read ``plot_ensembling.py`` for the ensemble and
``plot_what_vmap_runs.py`` for what ``vmap`` makes of a convolution. No GPU is needed;
the compiled variants need a C++ compiler.
"""

# %%
# Set-up
# ------
#
# The page predicts and does not train, so autograd is off throughout. Precision is a
# part of each variant: IEEE float32 everywhere, and on NVIDIA GPUs also TF32, which
# shortens the factors of a product to 10 bits of fraction, and bfloat16, which stores
# 7 bits of fraction.

import copy
import functools
import math
import platform
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)
torch.set_grad_enabled(False)

cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
num_threads = torch.get_num_threads()
device_names = {cpu: f"CPU ({platform.machine()}, {num_threads} threads)"}
if device.type == "cuda":
    device_names[device] = torch.cuda.get_device_name(device)
elif device != cpu:
    device_names[device] = device.type

older_names = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
default_precision = conv.fp32_precision, matmul.fp32_precision
conv.fp32_precision = matmul.fp32_precision = "ieee"

precisions = {where: ["float32"] for where in device_names}
if device.type == "cuda":
    if torch.cuda.is_tf32_supported():
        precisions[device].append("tf32")
    precisions[device].append("bfloat16")

usual = {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
compiler = usual if shutil.which(usual) else None
print(
    f"{' and '.join(device_names.values())}, torch {torch.__version__}, autograd "
    f"{'on' if torch.is_grad_enabled() else 'off'}, precision {conv.fp32_precision} "
    f"(convolutions) and {matmul.fp32_precision} (matrix products), C++ compiler: "
    f"{compiler}"
)
if compiler is None:
    print("No C++ compiler was found: the compiled variants are left out.")

# %%
# The ensemble
# ------------
#
# Ten copies of the CNN of ``plot_ensembling.py``, minibatches of 64 gray images of 28
# by 28 pixels, own minibatches (option 1) or one shared minibatch (option 2). One
# switch is new: with ``inplace=True`` the activations overwrite their input.


class SimpleCNN(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)
        self.inplace = inplace

    def forward(self, x):  # [64, 1, 28, 28]
        x = F.relu(self.conv1(x), self.inplace)  # [64, 32, 26, 26]
        x = F.relu(self.conv2(x), self.inplace)  # [64, 64, 24, 24]
        x = torch.flatten(F.max_pool2d(x, 2), 1)  # [64, 9216]
        x = F.relu(self.fc1(x), self.inplace)  # [64, 128]
        return self.fc2(x)  # [64, 10]


num_models, batch = 10, 64
models = [SimpleCNN() for _ in range(num_models)]
minibatches = torch.randn(num_models, batch, 1, 28, 28)

# option -> exact logits, by a loop in float64
models64 = [copy.deepcopy(model).double() for model in models]
feeds = {1: minibatches, 2: minibatches[:1].expand_as(minibatches)}
exact = {
    option: torch.stack(
        [model(x) for model, x in zip(models64, feed.double(), strict=True)]
    )
    for option, feed in feeds.items()
}
print({option: tuple(logits.shape) for option, logits in exact.items()})

# %%
# Count before you measure
# ------------------------
#
# Two counts decide what is possible. The **operations** are the same for every way to
# run it: ``FlopCounterMode`` counts those of convolutions and matrix products. The
# **traffic** is not: every operator reads its inputs from memory and writes its
# results. A small mode that sees every operator, also beneath ``vmap``, adds up the
# bytes. With ``fused=True`` it leaves out activations and additions of biases, as if
# they were done while the result of the layer before is still in a register; that is
# what a compiler aims at. It is an upper estimate: a compiler can also leave out the
# indices that pooling writes.


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write; a view of a tensor moves none."""

    def __init__(self, fused=False):
        super().__init__()
        self.bytes = 0
        self.left_out = {"_unsafe_view"}  # moves nothing
        if fused:
            self.left_out |= {"relu", "relu_", "add", "add_"}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if not operator.is_view and name not in self.left_out:
            leaves = tree_leaves((args, kwargs, result))
            self.bytes += sum(x.nbytes for x in leaves if isinstance(x, torch.Tensor))
        return result


def loop(models, minibatches):
    """Logits of all models, one after the other."""
    return torch.stack([m(x) for m, x in zip(models, minibatches, strict=True)])


with FlopCounterMode(display=False) as counter:
    loop(models, minibatches)
flops = counter.get_total_flops()

print(f"{flops / 1e9:.2f}e9 floating-point operations, of which")
for operator, count in counter.get_flop_counts()["Global"].items():
    print(f"  {operator}: {count / flops:.1%}")
for fused in [False, True]:
    with Traffic(fused) as traffic:
        loop(models, minibatches)
    if not fused:
        loop_traffic = traffic.bytes
    kind = "fused" if fused else "as written"
    print(
        f"{traffic.bytes / 1e6:.0f} MB of traffic in the loop, {kind}: "
        f"{flops / traffic.bytes:.0f} operations a byte"
    )
weights = sum(p.nbytes for model in models for p in model.parameters())
least = weights + minibatches.nbytes + loop(models, minibatches).nbytes
print(
    f"{least / 1e6:.0f} MB if each weight, input and logit moved once and nothing else"
)

# %%
# The **roofline** joins both counts with the two ceilings of a machine. If a program
# does :math:`I` operations for each byte of its traffic, it cannot do more than
#
# .. math:: \min(\text{arithmetic rate}, \; I \cdot \text{memory bandwidth})
#
# operations a second. The arithmetic rate that counts is the one that your library
# reaches: we measure a large matrix product. The bandwidth is measured by copying a
# tensor too large for any cache, which reads and writes each byte once. Traffic that
# stays in a cache is faster than this, so points can lie above the slope.


def settle(precision):
    """Set the precision of float32 products; return the dtype that is stored."""
    tf32 = precision == "tf32"
    if device.type == "cuda":  # parts of torch.compile still read the older names
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    conv.fp32_precision = matmul.fp32_precision = "tf32" if tf32 else "ieee"
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def measure(statement, seconds):
    """Times of single calls, or means of blocks of short ones [s]."""
    scope = {"statement": statement}
    timer = Timer("statement()", globals=scope, num_threads=num_threads)
    return timer.blocked_autorange(min_run_time=seconds).times


def quartiles(times):
    """First quartile, median and third quartile."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return torch.tensor(times, dtype=torch.float64).quantile(points).tolist()


bandwidth, rates = {}, {}  # by device [byte/s]; by (device, precision) [operation/s]
products = {}  # (device, precision) -> the matrix product, and its operations
for where, device_name in device_names.items():
    source = torch.randn(2**26 if where == cpu else 2**29, device=where)
    target = torch.empty_like(source)
    _, seconds, _ = quartiles(measure(functools.partial(target.copy_, source), 0.5))
    bandwidth[where] = 2 * source.nbytes / seconds
    print(f"{device_name}: copies at {bandwidth[where] / 1e9:.0f} GB/s")
    size = 2048 if where == cpu else 8192
    for precision in precisions[where]:
        factor = torch.randn(size, size, device=where, dtype=settle(precision))
        product = functools.partial(torch.mm, factor, factor)
        products[where, precision] = product, 2 * size**3
        times = measure(product, 1)
        low, seconds, high = quartiles(times)
        rates[where, precision] = 2 * size**3 / seconds
        ridge = rates[where, precision] / bandwidth[where]
        print(
            f"  {precision}: {size} x {size} matrix product at "
            f"{rates[where, precision] / 1e9:.0f}e9 operations a second (interquartile "
            f"range {(high - low) / seconds:.0%}, {len(times)} values); arithmetic is "
            f"the limit above {ridge:.0f} operations a byte"
        )
        bytes_stored = 4 if precision != "bfloat16" else 2
        intensity = flops / (loop_traffic * bytes_stored / 4)
        ceiling = "arithmetic" if intensity > ridge else "memory"
        print(f"  prediction for the loop as written: {ceiling} is the ceiling")
del source, target

# %%
# Where arithmetic is the ceiling, no saving of traffic raises it. In practice a way
# stays below both ceilings for reasons that the roofline does not know: operators that
# wait for each other, layouts that a library has to rearrange, fresh memory from the
# system, grouped convolutions without a good kernel.

# %%
# The ways
# --------
#
# Each entry names a way, the function that runs it, and the eager function whose
# traffic it has. Some remarks on those that are not obvious:
#
# - **channels_last** keeps the channels of a pixel side by side, as the convolutions of
#   most libraries want it. Inside ``vmap`` you cannot ask for it, as the last section
#   shows. But ``vmap`` folds the models into the channels, so it is enough to lay out
#   the stacked tensors so that models and channels are the last dimensions in memory.
# - **in place** saves a new tensor for each activation.
# - **chunks** of two models let ``vmap`` run five times, on tensors a fifth as large.
# - **threads** run one model a core, where the plain loop shares each operator among
#   all cores; this needs as many models as cores. Compiled, each core gets a loop of
#   its own over its share of the models. On a GPU, **streams** do the same.
# - **unfold and matmul** writes each convolution as a batched matrix product. It avoids
#   grouped convolutions and pays with nine times the traffic of the input.
# - **compiled** ways go through ``torch.compile``, which writes C++ code for a CPU and
#   Triton code for a GPU and can join an activation with the layer before. Compiled in
#   threads, it may also take the weights for constants and rearrange them once
#   (``freezing``), so nobody may change them afterwards. The modes ``reduce-overhead``
#   (CUDA graphs) and ``max-autotune`` (which tries several kernels for a matrix
#   product) are used on GPUs only: a CPU has no CUDA graphs, and most operations
#   counted above are those of convolutions.


def models_last(x):
    """The same [model, batch, channel, height, width], models and channels last."""
    return x.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2)


def unfold_and_matmul(params, x):
    """Logits [models, batch, 10] of inputs [models or 1, batch, 1, 28, 28]."""
    for name in ["conv1", "conv2"]:
        side = x.shape[-1] - 2
        columns = F.unfold(x.flatten(0, 1), 3).unflatten(0, x.shape[:2])
        weight = params[f"{name}.weight"].flatten(2)[:, None]  # [models, 1, out, 9 in]
        bias = params[f"{name}.bias"][:, None, :, None]
        x = F.relu_(weight @ columns + bias).unflatten(-1, (side, side))
    x = F.max_pool2d(x.flatten(0, 1), 2).view(num_models, -1, 9216)
    x = torch.baddbmm(params["fc1.bias"][:, None], x, params["fc1.weight"].mT)
    return torch.baddbmm(
        params["fc2.bias"][:, None], F.relu_(x), params["fc2.weight"].mT
    )


def start_worker():
    """What each thread of the pool does first: these settings belong to a thread."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


pool = ThreadPoolExecutor(num_threads, initializer=start_worker)


def compiled_in_threads(models, feed):
    """A compiled loop for each core, over its share of the models."""

    def part(models, minibatches):
        minibatches = [
            x.contiguous(memory_format=torch.channels_last) for x in minibatches
        ]
        function = functools.partial(loop, models, minibatches)
        return torch.compile(function, options={"freezing": True})

    share = math.ceil(num_models / num_threads)
    parts = []  # compiled in the first call

    def call():
        if not parts:
            for i in range(0, num_models, share):
                parts.append(part(models[i : i + share], feed[i : i + share]))
        return torch.cat(list(pool.map(lambda part: part(), parts)))

    return call


def build(where, precision, option):
    """The ways: name -> (function, eager function, torch.compile's options or None)."""
    dtype = settle(precision)
    plain = [copy.deepcopy(model).to(where, dtype) for model in models]
    laid_out = [copy.deepcopy(m).to(memory_format=torch.channels_last) for m in plain]
    inplace = copy.deepcopy(laid_out)
    for model in inplace:
        model.inplace = True
    params, buffers = stack_module_state(plain)
    params_last = {
        name: p.movedim(2, -1).contiguous().movedim(-1, 2) if p.ndim == 5 else p
        for name, p in params.items()
    }
    if option == 1:
        stacked = minibatches.to(where, dtype)
        stacked_last, feed = models_last(stacked), list(stacked)
    else:
        stacked = minibatches[0].to(where, dtype)
        stacked_last = stacked.contiguous(memory_format=torch.channels_last)
        feed = [stacked] * num_models
    in_dims = (0, 0, 0 if option == 1 else None)

    def ensemble(inplace=False, chunk_size=None):
        with torch.device("meta"):
            skeleton = SimpleCNN(inplace)

        def predict(params, buffers, x):
            return functional_call(skeleton, (params, buffers), (x,), strict=True)

        return vmap(predict, in_dims=in_dims, chunk_size=chunk_size)

    vmap_plain, vmap_inplace = ensemble(), ensemble(inplace=True)
    vmap_chunks = ensemble(inplace=True, chunk_size=2)

    def loop_last(models=laid_out):
        channels_last = [x.contiguous(memory_format=torch.channels_last) for x in feed]
        return loop(models, channels_last)

    def run(pair):
        model, x = pair
        return model(x.contiguous(memory_format=torch.channels_last))

    def in_threads():
        return torch.stack(list(pool.map(run, zip(inplace, feed, strict=True))))

    eager = {
        "loop": lambda: loop(plain, feed),
        "loop, channels_last": loop_last,
        "loop, channels_last, in place": lambda: loop_last(inplace),
        "vmap": lambda: vmap_plain(params, buffers, stacked),
        "vmap, channels_last": lambda: vmap_plain(params_last, buffers, stacked_last),
        "vmap, in place": lambda: vmap_inplace(params, buffers, stacked),
        "vmap, in place, chunks": lambda: vmap_chunks(params, buffers, stacked),
        "unfold and matmul": lambda: unfold_and_matmul(
            params, stacked if option == 1 else stacked[None]
        ),
    }
    ways = {name: (function, function, None) for name, function in eager.items()}
    if where == cpu:
        twin = eager["loop, channels_last, in place"]
        ways["threads, channels_last, in place"] = in_threads, twin, None
    if where.type == "cuda":
        for name in ["loop, channels_last", "vmap"]:
            twin = eager[name]
            ways[f"{name}, cudnn.benchmark"] = with_benchmark(twin), twin, None
            ways[f"{name}, CUDA graph"] = as_graph(twin), twin, None
        ways["loop in streams"] = in_streams(plain, feed), eager["loop"], None
    if compiler and where == cpu:
        twin = eager["loop, channels_last"]
        function = compiled_in_threads(laid_out, feed)
        ways["threads, compiled, channels_last"] = function, twin, None
    if compiler and where.type in ["cpu", "cuda"]:
        for name in ["loop", "loop, channels_last", "vmap"]:
            ways[f"compiled {name}"] = eager[name], eager[name], {}
    if compiler and where.type == "cuda":
        for name, mode in [
            ("loop, channels_last", "reduce-overhead"),
            ("vmap", "reduce-overhead"),
            ("vmap", "max-autotune"),
        ]:
            ways[f"compiled {name}, {mode}"] = eager[name], eager[name], {"mode": mode}
    return ways


# The three that only NVIDIA GPUs have.


def with_benchmark(function):
    """cuDNN tries all its algorithms, in a thread where it remembers none yet."""
    thread = ThreadPoolExecutor(1, initializer=start_worker)

    def call():
        torch.backends.cudnn.benchmark = True
        try:
            return thread.submit(function).result()
        finally:
            torch.backends.cudnn.benchmark = False

    return call


def as_graph(function):
    """The function as a CUDA graph, recorded in the first call and then replayed."""
    recorded = []

    def call():
        if not recorded:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    function()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = function()
            recorded.extend([graph, result])
        recorded[0].replay()
        return recorded[1]

    return call


def in_streams(models, feed, count=4):
    """The loop with its models dealt out to CUDA streams."""
    streams = [torch.cuda.Stream() for _ in range(count)]

    def call():
        current, results = torch.cuda.current_stream(), []
        for stream in streams:
            stream.wait_stream(current)
        for i, (model, x) in enumerate(zip(models, feed, strict=True)):
            with torch.cuda.stream(streams[i % count]):
                results.append(model(x))
        for stream in streams:
            current.wait_stream(stream)
        return torch.stack(results)

    return call


# %%
# Prove, then measure
# -------------------
#
# **The bound.** Every result is compared with a loop in float64. Its largest error may
# be the tolerance that ``plot_how_equal.py`` derives from the unit of roundoff *u*: for
# four layers and sums of up to 9216 products it is :math:`2 (4 \cdot 4 u + \sqrt{9216}
# \min(u, 2^{-24}))` times the largest logit, where *u* is :math:`2^{-24}` for float32,
# :math:`2^{-11}` for TF32 and :math:`2^{-8}` for bfloat16. Exchanged members or
# minibatches change logits by about their own size.
#
# **The time.** The first call is timed alone: it compiles, where there is something to
# compile. torch keeps on disk what it compiled, so a second run of this page compiles
# less. Then come the medians, over rounds in which every way has its turn: a
# processor's clock changes with its temperature and with what else runs, and so it
# changes for all. For the same reason the matrix product is measured again before each
# turn. The last two columns are the medians of what each turn reached in comparison
# with this neighbor: as a share of the arithmetic rate, and as a share of the roof,
# which may be the memory. Their order can differ from that of the times.

roundoff = {"float32": 2**-24, "tf32": 2**-11, "bfloat16": 2**-8}
both_options = {  # the rest would repeat what option 1 shows
    "loop",
    "loop, channels_last, in place",
    "threads, channels_last, in place",
    "threads, compiled, channels_last",
    "vmap",
    "compiled loop, channels_last",
    "compiled vmap",
}


def first_calls(where, precision, option):
    """Prove every way; name -> function, time of its first call, error, traffic."""
    torch.compiler.reset()
    u, largest = roundoff[precision], exact[option].abs().max().item()
    allowed = 2 * (4 * 4 * u + 9216**0.5 * min(u, 2**-24)) * largest
    proved = {}
    for name, (function, eager, options) in build(where, precision, option).items():
        if option == 2 and name not in both_options:
            continue
        start = time.perf_counter()
        with warnings.catch_warnings():  # torch uses deprecated parts of itself
            warnings.simplefilter("ignore", DeprecationWarning)
            if options is not None:
                function = torch.compile(function, **options)
            logits = function().cpu()
        first = time.perf_counter() - start
        error = (logits.double() - exact[option]).abs().max().item()
        assert error <= allowed, (
            f"{name}, {precision}, option {option}: a logit is {error:.1e} off from "
            f"float64, more than the {allowed:.1e} that rounding explains"
        )
        with Traffic(fused="compiled" in name) as traffic:
            eager()
        proved[name] = function, first, error, traffic.bytes
    return proved


num_rounds = 4
# (device, precision, option) -> {name: (time, rate, intensity, share, lower quartile)}
results = {}
for where, precision in products:
    product, product_flops = products[where, precision]
    for option in feeds:
        proved = first_calls(where, precision, option)
        times, shares = {name: [] for name in proved}, {name: [] for name in proved}
        for _ in range(num_rounds):
            for name, (function, *_) in proved.items():
                peak = product_flops / quartiles(measure(product, 0.2))[1]
                rates[where, precision] = max(peak, rates[where, precision])
                values = measure(function, 0.25)
                times[name] += values
                shares[name].append(flops / quartiles(values)[1] / peak)

        data = "own minibatches" if option == 1 else "one shared minibatch"
        print(f"\n{device_names[where]}, {precision}, option {option}: {data}")
        print(f"{'':39}  first    time       (IQR,  error    share of")
        print(f"{'':39}    [s]    [ms]     values)          peak  roof")
        measured = results[where, precision, option] = {}
        for name, (_, first, error, traffic_bytes) in proved.items():
            low, median, high = quartiles(times[name])
            of_peak = quartiles(shares[name])[1]
            rate, intensity = flops / median, flops / traffic_bytes
            memory_roof = intensity * bandwidth[where]
            of_roof = max(of_peak, rate / memory_roof)
            measured[name] = median, rate, intensity, of_roof, low
            spread = f"({1e3 * (high - low):.2f}, {len(times[name])})"
            print(f"{len(measured):2} {name:36}{first:7.1f}{1e3 * median:8.2f}", end="")
            print(f"{spread:>12}{error:7.0e}{of_peak:6.0%}{of_roof:6.0%}")

pool.shutdown()

# %%
# Look
# ----
#
# The dashed line is the time that the highest rate of the matrix product in this run
# allows for this many operations. Compiled ways are hatched.

looks = {"loop": "C0", "vmap": "C1", "unfold": "C2", "threads": "C3"}
option1 = {key[:2]: measured for key, measured in results.items() if key[2] == 1}

for (where, precision), measured in option1.items():
    times = {name: 1e3 * median for name, (median, *_) in measured.items()}
    limit = 1e3 * flops / rates[where, precision]
    fig, ax = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
    for name in sorted(times, key=times.get, reverse=True):
        color = next(looks[word] for word in looks if word in name)
        hatch = {"hatch": "///", "fill": False} if "compiled" in name else {}
        ax.barh(name, times[name], color=color, edgecolor=color, **hatch)
    ax.axvline(limit, linestyle="--", color="C5")
    ax.set_xlabel("time of one prediction [ms]")
    ax.set_title(
        f"{num_models} SimpleCNNs, own minibatches of {batch}, {precision}, no grad\n"
        f"{device_names[where]}",
        loc="right",
    )
    listing = [f"{name} {times[name]:.1f} ms" for name in sorted(times, key=times.get)]
    fig.set_label(
        f"Bars for the time of every way on {device_names[where]} in {precision}, with "
        f"a line at {limit:.1f} ms, which the rate of the matrix product allows. "
        f"From the fastest to the slowest: {', '.join(listing)}."
    )

# %%
# The roofline shows the same measurements below the two ceilings. The number of a point
# is its row in the table; hollow points are compiled. The ceiling is the highest rate
# of the run, so a point can look lower than its share says.

for (where, precision), measured in option1.items():
    peak = rates[where, precision]
    points = [(row[2], row[1]) for row in measured.values()]
    left, right = min(points)[0] / 4, 4 * max(points)[0]
    corners = sorted([left, peak / bandwidth[where], right])
    fig, ax = plt.subplots(figsize=(5.6, 4), layout="constrained")
    roof = [min(peak, x * bandwidth[where]) / 1e9 for x in corners]
    ax.loglog(corners, roof, color="C5", linewidth=2)
    labels = []  # points that nearly coincide share one label
    for number, (name, (x, rate)) in enumerate(zip(measured, points, strict=True), 1):
        color = next(looks[word] for word in looks if word in name)
        hollow = {"markerfacecolor": "none"} if "compiled" in name else {}
        ax.plot(x, rate / 1e9, "o", color=color, **hollow)
        for group, at_x, at_rate in labels:
            if max(x / at_x, at_x / x, rate / at_rate, at_rate / rate) < 1.1:
                group.append(str(number))
                break
        else:
            labels.append(([str(number)], x, rate))
    for group, x, rate in labels:
        place = {"xytext": (7, -3), "textcoords": "offset points", "fontsize": 8}
        ax.annotate(", ".join(group), (x, rate / 1e9), **place)
    ax.set_xlabel("operations a byte of traffic")
    ax.set_ylabel("1e9 operations a second")
    for axis in [ax.xaxis, ax.yaxis]:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.set_title(f"Roofline, option 1, {precision}\n{device_names[where]}")
    shares = [f"{name} {row[3]:.0%}" for name, row in measured.items()]
    fig.set_label(
        f"Roofline of {device_names[where]} in {precision}: rate against operations a "
        "byte, both logarithmic, under the ceilings of memory and arithmetic. Shares "
        f"of the roof: {', '.join(shares)}."
    )

# %%
# What is fastest here
# --------------------

for (where, precision, option), measured in results.items():
    times = {name: 1e3 * median for name, (median, *_) in measured.items()}
    best = min(times, key=times.get)
    best_vmap = min((name for name in times if "vmap" in name), key=times.get)
    print(f"{device_names[where]}, {precision}, option {option}")
    print(
        f"  of all ways: {best}, {times[best]:.2f} ms, {measured[best][3]:.0%} of the "
        f"roof, {times['loop'] / times[best]:.1f}x as fast as the loop"
    )
    rivals = [n for n in times if n != best and 1e3 * measured[n][4] <= times[best]]
    print(f"  within its spread: {', '.join(rivals) or 'no other'}")
    print(
        f"  with vmap: {best_vmap}, {times[best_vmap]:.2f} ms, "
        f"{measured[best_vmap][3]:.0%} of the roof, "
        f"{times['vmap'] / times[best_vmap]:.1f}x as fast as vmap alone"
    )

# %%
# Reading the results
# -------------------
#
# **A loop that wins** has steps large enough to fill the device, and tensors small
# enough for its caches. Then everything that helps one model helps the ensemble:
# ``channels_last``, in-place activations, one model a core, a compiler.
#
# **If vmap wins**, the single steps were too small for the device, and fewer, larger
# steps are worth more than perfect ones. CUDA graphs fight the same overhead from the
# other side: they keep the steps and drop the cost of starting them.
#
# **Where eager vmap is far from the roof**, chunks give a hint. Chunks of two models do
# the same arithmetic on tensors a fifth as large, but also with two groups instead of
# ten. If they are much faster, the size of the tensors or the number of groups is the
# reason, not the arithmetic. ``plot_memory.py`` helps to choose the size.
#
# **Between the best way and the roof** stand the steps that are not large matrix
# products: a first convolution with one input channel, pooling, and for each model
# megabytes of weights of ``fc1`` that only 64 samples share.
#
# When it goes wrong
# ------------------
#
# Asking for a layout inside of ``vmap`` looks natural and is refused:


def predict_channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


try:
    vmap(predict_channels_last)(minibatches)
    raise AssertionError("PyTorch ran a call that this page says it refuses")
except RuntimeError as problem:
    print(f"{type(problem).__name__}: {problem}")

# %%
# Lay the stacked tensors out *outside*, as ``models_last`` above does.
#
# Last, the global switches go back to where they were.

torch.set_grad_enabled(True)
torch.set_num_threads(num_threads)
if device.type == "cuda":
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = older_names
conv.fp32_precision, matmul.fp32_precision = default_precision

# %%
# Remember
# --------
#
# What to try first, by regime:
#
# - **Small models or small batches**, where starting operators takes longer than
#   running them: ``vmap``; then ``torch.compile`` of it; on a GPU also CUDA graphs, by
#   ``mode="reduce-overhead"``. ``plot_when_vmap_pays.py`` tells whether you are there.
# - **Large steps on a CPU**: a loop in ``channels_last``, activations in place, one
#   model a core; or ``torch.compile`` of that loop.
# - **Large steps on a GPU**: lower precision first (TF32, then bfloat16), because it
#   raises the ceiling itself; then ``channels_last``; then the loop and ``vmap``, each
#   compiled, side by side.
# - **Tensors too large** for the cache or the memory: ``chunk_size``.
#
# **Before all of them**, count operations and bytes, measure the two ceilings, and stop
# when you are near. No trick goes through the roof.
#
# Next
# ----
#
# - ``plot_how_equal.py``: what lower precision does to the results.
# - ``plot_memory.py``: what each way costs in memory.
#
# References
# ----------
#
# - S. Williams, A. Waterman, D. Patterson: Roofline: an insightful visual performance
#   model for multicore architectures, 2009,
#   `doi:10.1145/1498765.1498785 <https://doi.org/10.1145/1498765.1498785>`_.
# - Grouped convolutions and matrix products instead of them:
#   `functorch#365 <https://github.com/pytorch/functorch/issues/365>`_; against streams:
#   `pytorch#73764 <https://github.com/pytorch/pytorch/issues/73764>`_; with
#   ``channels_last``:
#   `pytorch#34977 <https://github.com/pytorch/pytorch/issues/34977>`_.
# - The wish for ``torch.compile`` on PyTorch's own pages:
#   `tutorials#2984 <https://github.com/pytorch/tutorials/pull/2984>`_.
