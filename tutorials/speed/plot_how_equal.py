"""
How equal is equal: tolerances for loop and vmap
================================================

Choose a tolerance for comparing an ensemble in one call of ``torch.func.vmap`` with a
loop over its members: one that holds before and after training in every precision of
your device, and that still notices a single wrong weight in float32 and float64.

**What you will learn**

- why a comparison at 1e-6 that passes for fresh models can fail for trained ones;
- how to measure the error of each side against float64, and how large it is, layer by
  layer, in units of the rounding error of one number;
- how to derive a tolerance from four numbers that you know: the precision, the number
  of layers, the longest sum, and the largest logit;
- which decisions of a classifier rounding can change, and which it cannot.

**Before you start**, read ``plot_ensembling.py``, which builds the ensemble used here.
"""

# %%
# Set-up
# ------
#
# The precision of float32 convolutions and matrix products is a global switch on NVIDIA
# GPUs. This page sets it before every computation, turns autograd off after the
# training, and puts both back at the end.

import math
import platform
import re
from itertools import accumulate

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

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
default_switches = conv.fp32_precision, matmul.fp32_precision, torch.is_grad_enabled()
conv.fp32_precision = matmul.fp32_precision = "ieee"

print(
    f"{device_names[device]}, torch {torch.__version__}, {torch.get_default_dtype()}, "
    f"training in precision {conv.fp32_precision} (convolutions) and "
    f"{matmul.fp32_precision} (matrix products)"
)

# %%
# A few models, fresh and trained
# -------------------------------
#
# The network is that of ``plot_ensembling.py``, with one change: it returns the output
# of each of its four layers with weights, by name. The last one, ``fc2``, holds the
# logits. Every number in these outputs is one sum, of as many products as the layer has
# weights for it.

layers = {"conv1": 1 * 3 * 3, "conv2": 32 * 3 * 3, "fc1": 9216, "fc2": 128}


class SimpleCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):  # [32, 1, 28, 28]
        conv1 = self.conv1(x)  # [32, 32, 26, 26]
        conv2 = self.conv2(F.relu(conv1))  # [32, 64, 24, 24]
        pooled = torch.flatten(F.max_pool2d(F.relu(conv2), 2), 1)  # [32, 9216]
        fc1 = self.fc1(pooled)  # [32, 128]
        fc2 = self.fc2(F.relu(fc1))  # [32, 10]
        return {"conv1": conv1, "conv2": conv2, "fc1": fc1, "fc2": fc2}


# %%
# The data are made here: ten random prototypes, one a class, plus noise. A plain loop
# trains the members in float32, and we keep copies of their stacked parameters along
# the way. The 32 test images are averages of two drawn ones, so that some lie between
# two classes.

num_models, num_classes, last_step = 3, 10, 45
models = [SimpleCNN().to(device) for _ in range(num_models)]
prototypes = torch.randn(num_classes, 1, 28, 28)


def draw(count):
    labels = torch.randint(num_classes, (count,))
    return prototypes[labels] + torch.randn(count, 1, 28, 28), labels


images = (draw(32)[0] + draw(32)[0]) / 2  # [32, 1, 28, 28]
optimizer = torch.optim.Adam([p for m in models for p in m.parameters()], lr=1e-3)
states = {}  # training step -> stacked parameters
for step in range(last_step + 1):
    if step % 15 == 0:
        params, _ = stack_module_state(models)
        states[step] = {name: p.detach().cpu() for name, p in params.items()}
    x, labels = (tensor.to(device) for tensor in draw(32))
    loss = sum(F.cross_entropy(model(x)["fc2"], labels) for model in models)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

torch.set_grad_enabled(False)
print(f"{num_models} models, parameters kept after", *states, "training steps")

# %%
# The loop and ``vmap``, on the same stacked parameters and the same images:

with torch.device("meta"):
    skeleton = SimpleCNN()


def predict(params, x):
    """Outputs of all layers of one member."""
    return functional_call(skeleton, params, (x,), strict=True)


def looped(params, x):
    """Outputs of all layers of all members, one member after the other."""
    rows = [{name: p[i] for name, p in params.items()} for i in range(num_models)]
    members = [predict(row, x) for row in rows]
    return {layer: torch.stack([m[layer] for m in members]) for layer in layers}


vectorized = vmap(predict, in_dims=(0, None))

# %%
# What rounding should do
# -----------------------
#
# The **unit roundoff** *u* is the largest relative error of storing one number: half
# the distance from 1 to the next number, ``torch.finfo(dtype).eps / 2``. TF32 stores
# float32 and shortens the factors of each product to the digits of float16.
#
# A sum of *k* products has no such simple error. Higham's book proves a worst case, *k*
# times *u* times the sum of the products' absolute values, for every order of the
# additions. Errors rarely all point the same way, so his rule of thumb takes the square
# root of the constant: the error to expect grows like :math:`\sqrt{k}`. For long sums
# libraries usually do better, because they sum blocks and then the blocks' sums. And
# sums of 16-bit products are usually kept in float32 and rounded once. Do they do it
# here? Sum on the CPU, in one matrix product and then one product after the other,
# rounding each time:

precisions = {  # name: dtype, unit roundoff
    "float64": (torch.float64, 2**-53),
    "float32": (torch.float32, 2**-24),
    "TF32": (torch.float32, 2**-11),
    "bfloat16": (torch.bfloat16, 2**-8),
    "float16": (torch.float16, 2**-11),
}

print("largest error / (u * largest exact result)")
print("precision      k   one call  one by one   sqrt(k)")
for precision in ["float32", "bfloat16"]:
    dtype, u = precisions[precision]
    for k in sorted(layers.values()):
        left, right = torch.rand(64, k).to(dtype), torch.randn(128, k).to(dtype)
        exact = left.double() @ right.double().T
        one_by_one = torch.zeros(64, 128, dtype=dtype)
        for i in range(k):
            one_by_one += left[:, i, None] * right[:, i]
        unit = u * exact.abs().max()
        factors = [
            ((result.double() - exact).abs().max() / unit).item()
            for result in (left @ right.T, one_by_one)
        ]
        print(f"{precision:9} {k:6} {factors[0]:10.1f} {factors[1]:11.1f}", end="")
        print(f" {math.sqrt(k):9.1f}")

# %%
# Read the column "one call". If it stays near 1 in bfloat16 for the longest sum, while
# "one by one" grows, then the library does not keep its sums in bfloat16. If both grow,
# the library does, and the tolerance below is too tight for this machine. GPUs may add
# partial sums of long 16-bit products in 16 bits: the limit has to hold there too.
#
# **The derivation.** A layer rounds each number at most four times to the stored
# precision: two factors, the sum, and the sum with its bias. The additions round to the
# precision of the sums, which we take to be float32 or better. Partial sums are seldom
# larger than the largest output, so each of *k* additions errs by about *u* times that
# at most, and *k* such errors of random sign add up to :math:`\sqrt{k}` of them. One
# sum, the longest, stands for those of all layers. For *d* layers and a longest sum of
# *k* products we expect, for one side, an error of at most
#
# .. math::
#
#    e = \left(4\,d\,u + \sqrt{k}\,\min(u, 2^{-24})\right) \max |y|
#
# where *y* are all outputs of the layer. The largest of them sets the scale, because an
# output near zero is a small difference of large products and inherits *their* errors.
# This is an estimate and no proof. It neglects that one layer can amplify the errors of
# the one before it, so we measure how much room it leaves.

depth = {layer: d for d, layer in enumerate(layers, start=1)}
longest_sum = dict(zip(layers, accumulate(layers.values(), max), strict=True))


def of_sums(u, layer):
    """Error to expect from the order of sums, where the largest output is 1."""
    return math.sqrt(longest_sum[layer]) * min(u, 2**-24)


def estimate(u, layer, largest):
    """Error to expect in the outputs of a layer, the largest of which is known."""
    return (4 * depth[layer] * u + of_sums(u, layer)) * largest


# %%
# Measure both sides against float64
# ----------------------------------
#
# **The reference** is the loop in float64 on the CPU, on *the same rounded* weights and
# images: for bfloat16, it gets the values that bfloat16 has stored. So the error is
# that of the arithmetic alone. What rounding the weights does to a model is another
# question; we meet it at the end.
#
# **The unit** is *u* times the largest exact output of the layer. Each computation runs
# before training and after it, in each precision of each device here; float32 also runs
# in between.
#
# **What we demand of vmap**: the largest of many rounding errors, where one side adds
# the bias in a separate step and so rounds twice where the other rounds once, may
# differ by a factor of four: two for the second rounding, two for chance. The loop
# counts with an error of at least one unit. And sums may be ordered in any way, which
# by the rule of thumb is worth :math:`\sqrt{k}` times the roundoff of the sums, for the
# longest sum so far.

available = {cpu: ["float64", "float32", "bfloat16", "float16"]}
if device.type == "cuda":
    tf32 = torch.cuda.is_tf32_supported()
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    missing = {"TF32": not tf32, "bfloat16": not bf16}
    available[device] = [name for name in precisions if not missing.get(name)]
elif device != cpu:
    available[device] = ["float32", "bfloat16", "float16"]


def compute(function, params, x, where, precision):
    """Run function there, in that precision; return its outputs in float64."""
    dtype, _ = precisions[precision]
    mode = "tf32" if precision == "TF32" else "ieee"
    conv.fp32_precision = matmul.fp32_precision = mode
    params = {name: p.to(where, dtype) for name, p in params.items()}
    outputs = function(params, x.to(where, dtype))
    return {layer: output.cpu().double() for layer, output in outputs.items()}


errors = {}  # (device, precision, step, layer) -> of loop, of vmap, largest output
logits = {}  # (device, precision, step) -> reference, loop, vmap
for where, names in available.items():
    for precision in names:
        dtype, u = precisions[precision]
        for step in states if precision == "float32" else [0, last_step]:
            rounded = {name: p.to(dtype) for name, p in states[step].items()}
            exact = compute(looped, rounded, images.to(dtype), cpu, "float64")
            loop = compute(looped, rounded, images, where, precision)
            vmapped = compute(vectorized, rounded, images, where, precision)
            logits[where, precision, step] = exact["fc2"], loop["fc2"], vmapped["fc2"]
            for layer in layers:
                largest = exact[layer].abs().max().item()
                loop_error = (loop[layer] - exact[layer]).abs().max().item()
                vmap_error = (vmapped[layer] - exact[layer]).abs().max().item()
                errors[where, precision, step, layer] = loop_error, vmap_error, largest
                unit = u * largest
                allowed = max(4 * loop_error, 4 * unit, of_sums(u, layer) * largest)
                assert vmap_error <= allowed, (
                    f"{device_names[where]}, {precision}, step {step}, {layer}: vmap "
                    f"is {vmap_error:.1e} away from float64, more than {allowed:.1e}, "
                    f"and the loop is {loop_error:.1e} away"
                )

for where, names in available.items():
    print(f"{device_names[where]}: error / (u * largest output), loop and vmap")
    print("precision  state  ", *[f"{layer:>12}" for layer in layers])
    for precision in names:
        u = precisions[precision][1]
        for state, step in {"fresh": 0, "trained": last_step}.items():
            print(f"{precision:10} {state:7}", end="")
            for layer in layers:
                loop_error, vmap_error, largest = errors[where, precision, step, layer]
                unit = u * largest
                print(f"{loop_error / unit:8.2f} {vmap_error / unit:5.2f}", end="")
            print()

# %%
# The loop in float64 on the CPU *is* the reference, so its error reads zero. The error
# of ``vmap`` in the same row says how far the reference can be trusted: some units of a
# *u* that is 2**29 times smaller than that of float32.
#
# The other rows agree: between the precisions *u* differs by many powers of ten, and
# in units of *u* the errors do not. Numbers of several units are the work of long sums
# that round like all the rest, still far below their worst case *k*. Numbers near one
# in 16 bits say that the sums of this layer, convolution or product, are kept in a
# finer precision. Then what counts is how often a result is stored, and ``vmap``, which
# adds each bias separately, may store twice where the loop stores once. A much larger
# number would name the layer whose library routine rounds more.
#
# The figure shows these numbers without float64, for the accelerator if there is one,
# below the limit that we derived.

ink = plt.rcParams["text.color"]
states_shown = {"fresh": (0, "none"), "trained": (last_step, "full")}
sides = {"loop": ("C0", "o", -0.17), "vmap": ("C1", "^", 0.17)}

names = [name for name in available[device] if name != "float64"]
columns = [(precision, layer) for precision in names for layer in layers]

fig, ax = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
for number, (side, (color, marker, shift)) in enumerate(sides.items()):
    for state, (step, fill) in states_shown.items():
        places, heights = [], []
        for place, (precision, layer) in enumerate(columns):
            row = errors[device, precision, step, layer]
            places.append(place + shift)
            heights.append(row[number] / (precisions[precision][1] * row[2]))
        look = {"color": color, "marker": marker, "fillstyle": fill, "linestyle": ""}
        ax.semilogy(places, heights, label=f"{side}, {state}", **look)
places, heights = [], []  # one line with gaps
for place, (precision, layer) in enumerate(columns):
    u = precisions[precision][1]
    places += [place - 0.35, place + 0.35, math.nan]
    heights += 3 * [estimate(u, layer, 1) / u]
ax.semilogy(places, heights, color=ink, label="derived limit")
for i, precision in enumerate(names):
    ax.text(4 * i + 1.5, 190, precision, ha="center")
    ax.axvline(4 * i - 0.5, color="gray", linewidth=0.5)
ax.axhline(1, color="gray", linewidth=0.5)
ax.set_ylim(top=400)
ax.set_xticks(range(len(columns)), labels=[row[1] for row in columns], rotation=90)
ax.tick_params(axis="x", bottom=False)
ax.yaxis.set_major_formatter("{x:g}")
ax.minorticks_off()
ax.set_title(f"Error against float64, by layer and precision\n{device_names[device]}")
ax.set_ylabel("error / (u · largest output)")
fig.legend(loc="outside lower center", ncols=3)

findings = []
for precision in names:
    u = precisions[precision][1]
    rows = [row for key, row in errors.items() if key[:2] == (device, precision)]
    most = [max(row[side] / row[2] for row in rows) / u for side in (0, 1)]
    findings.append(f"{precision} {most[0]:.1f} in the loop, {most[1]:.1f} in vmap")
fig.set_label(
    "Largest error of each layer in units of the roundoff u times the layer's largest "
    "output, on a logarithmic axis, for loop and vmap, fresh and trained models, with "
    f"the derived limit of each layer. Largest of all layers: {'; '.join(findings)}."
)

# %%
# The derived limit has to hold for both sides. This is the room that it leaves:

for side, number in {"loop": 0, "vmap": 1}.items():
    used = {}
    for (where, precision, step, layer), row in errors.items():
        limit = estimate(precisions[precision][1], layer, row[2])
        case = f"{device_names[where]}, {precision}, step {step}, {layer}"
        used[case] = row[number] / limit
        assert row[number] <= limit, (
            f"{case}: the error of the {side}, {row[number]:.1e}, is larger than the "
            f"derived limit of {limit:.1e}"
        )
    worst = max(used, key=used.get)
    print(f"{side}: at most {used[worst]:.0%} of the limit, in {worst}")

# %%
# When a fixed 1e-6 holds, and when it fails
# ------------------------------------------
#
# ``torch.allclose(a, b, atol=1e-6, rtol=1e-6)`` asks of every element that it differs
# by at most 1e-6 plus 1e-6 of its own size. Test that in float32 as training goes on.
# The gap is the distance between neighboring float32 numbers at the largest logit;
# "outside" counts the elements that miss 1e-6, with the size of the largest of them.
# Beside it stand the defaults of ``torch.testing.assert_close`` and the derived
# tolerance. That is twice the estimate for the logits: one error for each of the two
# sides.


def tolerance(looped_logits, u):
    return 2 * estimate(u, "fc2", looped_logits.abs().max().item())


def close(a, b, **tolerances):
    """Whether torch.testing.assert_close accepts the pair."""
    try:
        torch.testing.assert_close(a, b, **tolerances)
    except AssertionError:
        return False
    return True


u = precisions["float32"][1]
for where in available:
    print(f"{device_names[where]}, float32: distance of loop and vmap")
    print("step  largest      gap  distance   1e-6  outside, size  defaults   derived")
    for step in states:
        _, loop, vmapped = (t.float() for t in logits[where, "float32", step])
        largest = loop.abs().max().item()
        gap = 2 ** math.floor(math.log2(largest)) * 2 * u
        outside = ~torch.isclose(vmapped, loop, atol=1e-6, rtol=1e-6)
        size = f"{loop[outside].abs().max():.2f}" if outside.any() else "-"
        print(
            f"{step:4} {largest:8.2f}  {gap:.1e}   {(vmapped - loop).abs().max():.1e}  "
            f"{' fails' if outside.any() else 'passes'}  {outside.sum():6} "
            f"{size:>6}  {'pass' if close(vmapped, loop) else 'fail':>8}   "
            f"{tolerance(loop, u):.1e}"
        )
    print("before training, in each precision:", end="")
    for precision in available[where]:
        _, loop, vmapped = logits[where, precision, 0]
        print(f"  {precision} {(vmapped - loop).abs().max():.1e}", end="")
    print()

# %%
# **Where 1e-6 fails**, nothing is wrong: the absolute error grows with the logits, and
# one step in the last binary digit of the largest is a gap. Compare the size of the
# elements outside with the largest logit. If it is far smaller, the relative part of
# the tolerance was worth almost nothing to them, although they are sums of terms as
# large as those of the others. That is why *rtol* alone does not help near zero, and
# why the derived tolerance is an *atol* that scales with the largest logit.
#
# **Where 1e-6 passes**, the logits are small or the two orders of summation happen to
# agree. The error is still proportional to the logits, so the same test can fail after
# the next epoch, on the next machine, or with the next version of a library.
#
# The original ensembling tutorial of 2021 compared its CNNs at 1e-6, its successors
# allow 1e-3, and we found no record of the reason. Their models are untrained, so
# training is not it. TF32 may be, which NVIDIA GPUs since 2020 use for convolutions by
# default. Where this page finds TF32, the last line shows what it does to fresh models.

triples = [logits[device, "float32", step] for step in states]
curves = {
    "loop, error against float64": [(b - a).abs().max().item() for a, b, _ in triples],
    "vmap, error against float64": [(c - a).abs().max().item() for a, _, c in triples],
    "derived tolerance": [tolerance(b, u) for _, b, _ in triples],
}
looks = [{"color": "C0", "marker": "o"}, {"color": "C1", "marker": "^"}, {"color": ink}]

fig, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
for (label, curve), look in zip(curves.items(), looks, strict=True):
    ax.semilogy(list(states), curve, label=label, **look)
ax.axhline(1e-6, color="gray", linestyle=":", label="1e-6")
ax.set_title(f"Largest error of the logits, float32\n{device_names[device]}")
ax.set_xlabel("training steps")
ax.set_xticks(list(states))
ax.set_ylabel("absolute error of the logits")
ax.minorticks_off()
ax.grid(True, alpha=0.3)
ax.legend()

findings = [f"{label}, {c[0]:.1e} to {c[-1]:.1e}" for label, c in curves.items()]
fig.set_label(
    "Largest absolute error of the logits in float32 against training steps, with a "
    f"fixed line at 1e-6. From step 0 to {last_step}: {'; '.join(findings)}."
)

# %%
# The defaults of ``assert_close`` depend on the dtype alone. It names them when it
# refuses a pair:

for precision in available[cpu]:
    dtype, u = precisions[precision]
    one_and_zero = torch.eye(2, dtype=dtype)[0]
    try:
        torch.testing.assert_close(*one_and_zero)
    except AssertionError as problem:
        atol, rtol = map(float, re.findall(r"up to (\S+) allowed", str(problem)))
    print(f"{precision:8}  atol {atol:.0e}  rtol {rtol:.1e}, that is {rtol / u:.2g} u")

# %%
# They know neither your logits nor the length of your sums. Where *rtol* is a few *u*,
# they suit single operations; in float64 they are far looser than rounding.
#
# What the tolerance notices
# --------------------------
#
# A tolerance that accepts everything is no test. So break the ensemble twice: exchange
# its first two members, and make *one weight* of the first convolution wrong by 10%.
# Each result is compared with the loop, in every precision.

for where, names in available.items():
    print(f"{device_names[where]}: distance from the loop, in tolerances")
    print("precision  state    vmap  exchanged  one weight 10% off")
    for precision in names:
        for state, (step, _) in states_shown.items():
            _, loop, vmapped = logits[where, precision, step]
            atol = tolerance(loop, precisions[precision][1])
            member = {name: p[0].clone() for name, p in states[step].items()}
            member["conv1.weight"][0, 0, 1, 1] *= 1.1
            spoiled = compute(predict, member, images, where, precision)["fc2"]
            pairs = [(vmapped, loop), (loop[[1, 0, 2]], loop), (spoiled, loop[0])]
            passes = [close(a, b, atol=atol, rtol=0) for a, b in pairs]
            distances = [(a - b).abs().max().item() / atol for a, b in pairs]
            print(f"{precision:10} {state:7}", *[f"{d:9.2g}" for d in distances])
            case = f"{device_names[where]}, {precision}, {state}: the tolerance"
            assert passes[0], f"{case} refuses vmap"
            assert not passes[1], f"{case} accepts exchanged members"
            if precision in ("float64", "float32"):
                assert not passes[2], f"{case} accepts a wrong weight"

# %%
# Below 1 passes, above 1 is noticed. Exchanged members are noticed everywhere. A
# slightly wrong weight is noticed in float32 and float64, and can hide in a coarser
# precision. Where its number is no larger than that of ``vmap``, no tolerance can tell
# the mistake from rounding. So **test the code in float64 or IEEE float32**, and use
# the coarse precisions to see that they are as exact as they can be.
#
# Which decisions can change
# --------------------------
#
# A classifier names the class of the largest logit. Its **margin** is the distance to
# the second largest. If every logit is off by less than half the margin, no other
# class can overtake the first. So errors decide only near ties. The table counts
# the images, over all members, whose class differs from that of the reference. The last
# column counts where the reference itself changed, because it got rounded weights and
# images.

for where, names in available.items():
    print(f"{device_names[where]}: changed classes, of {num_models * len(images)}")
    print("precision  state    loop (largest margin)  vmap (largest margin)  rounding")
    for precision in names:
        for state, (step, _) in states_shown.items():
            exact, *both = logits[where, precision, step]
            first, second = exact.topk(2).values.unbind(-1)
            margin = first - second
            print(f"{precision:10} {state:7}", end="")
            for result in both:
                error = (result - exact).abs().amax(-1)
                changed = result.argmax(-1) != exact.argmax(-1)
                assert not (changed & (margin > 2 * error)).any(), (
                    f"{device_names[where]}, {precision}, {state}: a class changed "
                    "although its margin is larger than twice the error"
                )
                largest = f"({margin[changed].max():.1e})" if changed.any() else "(-)"
                print(f"{changed.sum():8} {largest:14}", end="")
            unrounded = logits[cpu, "float32", step][0]
            print(f"{(exact.argmax(-1) != unrounded.argmax(-1)).sum():8}")

# %%
# **Where a class changed**, its margin was tiny: compare it with the largest logit
# above. Either class is a fair answer there. **Where none changed**, no image was close
# to a tie, or the errors happened to keep the order; among more images, some would
# change. The last column is not about loop or ``vmap``: a number there says that
# rounding the weights changed the model. In your own tests, compare classes only where
# the margin exceeds the tolerance.
#
# Last, the global switches go back to where they were.

conv.fp32_precision, matmul.fp32_precision, grad_enabled = default_switches
torch.set_grad_enabled(grad_enabled)
switches = conv.fp32_precision, matmul.fp32_precision, torch.is_grad_enabled()
assert switches == default_switches, f"left {switches}, found {default_switches}"

# %%
# A recipe for your own test
# --------------------------
#
# Three lines, for *d* layers with weights and sums of at most *k* products. For TF32,
# put in *u* = 2**-11.
#
# .. code-block:: python
#
#    u = torch.finfo(dtype).eps / 2
#    atol = 2 * (4 * d * u + k**0.5 * min(u, 2**-24)) * looped.abs().max().item()
#    torch.testing.assert_close(vectorized, looped, atol=atol, rtol=0)
#
# If it fails, do not loosen it: compute both sides' distance from a float64 loop on the
# same rounded weights. If only ``vmap`` is far off, the code is wrong; if both are,
# look for the precision mode, or for layers that amplify errors.
#
# Remember
# --------
#
# A tolerance is a claim about rounding, so it **scales with the largest logit and with
# the precision**; a fixed 1e-6 does neither. Loop and ``vmap`` are about equally far
# from the truth, and only a float64 reference can say so. Where sums are kept in a
# finer precision, storing dominates the error; elsewhere the long sums do. Rounding
# changes decisions only where the margin is smaller than twice the error.
#
# Next
# ----
#
# - ``plot_what_vmap_runs.py`` shows which operators do the sums.
# - `Numerical accuracy
#   <https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html>`_ in PyTorch's
#   documentation: precision modes and reduced-precision sums.
# - `torch.testing <https://docs.pytorch.org/docs/stable/testing.html>`_: the defaults
#   of ``assert_close`` by dtype.
#
# References
# ----------
#
# - N. J. Higham: Accuracy and Stability of Numerical Algorithms, 2nd edition, 2002,
#   `doi:10.1137/1.9780898718027 <https://doi.org/10.1137/1.9780898718027>`_, section
#   2.8 (rule of thumb) and chapter 3 (sums of products).
# - N. J. Higham, T. Mary: A new approach to probabilistic rounding error analysis,
#   2019, `doi:10.1137/18M1226312 <https://doi.org/10.1137/18M1226312>`_: when the
#   square root may replace the worst case.
# - The tolerance 1e-6: ``notebooks/_src/plot_ensembling.py`` in `pytorch/functorch
#   <https://github.com/pytorch/functorch>`_, 2021. The tolerance 1e-3: `Model
#   ensembling <https://docs.pytorch.org/tutorials/intermediate/ensembling.html>`_.
