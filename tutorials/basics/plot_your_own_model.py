"""
Will vmap work for your own model?
==================================

Put your own module and one batch into one cell, and learn from the run whether many
such models can become one call of ``torch.func.vmap``, whether that is faster here than
a loop, and what to do.

**In short.** Five questions decide: do the models stack, does ``vmap`` accept them,
does one call compute what a loop computes, how many fit into memory, and is one call
faster. You need not read the functions below: replace ``build`` and ``batch``, run
all cells, and read what the last one prints, such as ``To train, one call for 16, 64
models``.

Before you start: ``plot_ensembling.py`` says what a stack and ``vmap`` are.
"""

# %%
# Set-up
# ------

import math
import warnings
from collections import Counter
from functools import partial

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.benchmark import timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
where = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{where}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")

# %%
# Your model and one batch
# ------------------------
#
# Replace these lines. ``build`` makes one model, with new weights in each call, and
# ``batch`` is the **tuple** of what one call gets, by position (mind the comma if it is
# one tensor):


def build():
    hidden = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1)
    return nn.Sequential(*hidden, nn.Linear(32, 10))


batch = (torch.randn(32, 64),)

# %%
# Do they stack?
# --------------
#
# ``stack`` returns the models, their stacked tensors, and one call that runs all of
# them on the same batch. Dropout needs ``randomness``.


def stack(build, num_models, train=False, double=False):
    """Models, their stacked parameters and buffers, and one call of all of them."""
    models = [build().train(train) for _ in range(num_models)]
    models = [m.cpu().double() if double else m.to(device) for m in models]
    state = stack_module_state(models)
    with torch.device("meta"):
        skeleton = build().train(train)

    def one(params, buffers, batch):
        return functional_call(skeleton, (params, buffers), batch, strict=True)

    every = vmap(one, in_dims=(0, 0, None), randomness="different")
    return models, state, partial(every, *state)


models, (params, buffers), call = stack(build, num_models=4)
for name, t in (params | buffers).items():
    print(f"{name:21} {list(t.shape)}")

# %%
# Where this stops, the models mostly differ in class or in shapes, or building one
# needs the values of tensors. ``plot_recipes.py`` has one stack and one call for each
# kind of model.
#
# If each model gets a batch or a mask of its own, map over copies of ``batch``
# (tested): write ``in_dims=0``, and let ``stack`` return, in the place of
# ``partial(...)``, ``lambda b: every(*state, tree_map(lambda t: torch.stack([t] *
# num_models), b))``.
#
# Does vmap accept them?
# ----------------------
#
# To predict with two models, and to train them, with a stand-in loss, the sum of
# squares of all outputs. To ask about a loss of your own, let ``build`` return a module
# whose ``forward(x, y)`` ends in it, and pass ``(x, y)``. An argument by keyword needs
# a module around yours that passes it on. ``ask`` returns an answer, or the first line
# of the error that came in its place.


def to_device(batch):
    return tree_map(lambda t: t.to(device) if torch.is_tensor(t) else t, batch)


def loss_of(outputs):
    tensors = [t for t in tree_leaves(outputs) if torch.is_tensor(t)]
    return sum(t.square().sum() for t in tensors if t.is_floating_point())


def run(call, batch, train):
    with torch.set_grad_enabled(train):
        outputs = call(to_device(batch))
    if train:
        loss_of(outputs).backward()


def accepts(build, batch, train):
    *_, call = stack(build, 2, train)
    run(call, batch, train)
    return "accepted"


def ask(question, *inputs):
    try:
        return question(*inputs)
    except Exception as error:  # whatever it is, its words are the answer
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


print("predict:", ask(accepts, build, batch, False))
print("train:", ask(accepts, build, batch, True))

# %%
# **Does it loop without a word?** An operator that ``vmap`` cannot run for all models
# at once runs once for each model, sometimes without a warning. It is found by counting
# operators: with twice the models they must not become more.


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count[str(operator)] += not operator.is_view
        return operator(*args, **(kwargs or {}))


def loops(build, batch, train):
    """Operators that run more often for four models than for two."""
    counts = []
    for num_models in 2, 4:
        *_, call = stack(build, num_models, train)
        with torch.autograd.set_multithreading_enabled(False), Operators() as seen:
            run(call, batch, train)
        counts.append(seen.count)
    names = [name for name, times in counts[1].items() if times > counts[0][name]]
    return ", ".join(names) or "none"


print("operators that loop in training:", ask(loops, build, batch, True))

# %%
# Does it compute what the loop computes?
# ---------------------------------------
#
# Three models in float64 on the CPU, where rounding is far below 1e-10: outputs and
# buffers, and in training gradients, too. Dropout of modules is switched off, because
# one call and a loop draw other numbers. A distance is divided by the largest output,
# buffer or gradient.


def without_dropout(build):
    model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # attention, nn.GRU
            module.dropout = 0.0
    return model


def loop(models, batch):
    outputs = [model(*batch) for model in models]
    return tree_map(lambda *rows: torch.stack(rows), *outputs)


def apart(one_call, looped):
    pairs = [*zip(tree_leaves(one_call), tree_leaves(looped), strict=True)]
    largest = max([b.abs().max().item() for _, b in pairs], default=0)
    far = [(a - b).abs().max().item() for a, b in pairs]
    return torch.tensor([0.0, *far]).max().item() / (largest or 1)  # keeps nan


# %%


def distance(build, batch, train):
    """The largest distance between one call and the loop."""
    plain = partial(without_dropout, build)
    models, (params, buffers), call = stack(plain, 3, train, double=True)
    batch = tree_map(lambda t: t.cpu().double() if t.is_floating_point() else t, batch)
    with torch.set_grad_enabled(train):
        far = [apart(called := call(batch), looped := loop(models, batch))]
    if buffers:
        far.append(apart(buffers, stack_module_state(models)[1]))
    if train:
        (loss_of(called) + loss_of(looped)).backward()
        weights = zip(params.values(), *[m.parameters() for m in models], strict=True)
        grads = [[p.grad for p in same] for same in weights if same[0].grad is not None]
        rows = [torch.stack(own) for _, *own in grads]
        far.append(apart([one for one, *_ in grads], rows))
    if apart(loop(models, batch), looped) > 1e-10:
        raise RuntimeError("two runs of the loop differ, as with random numbers")
    return torch.tensor(far).max().item()


far = ask(distance, build, batch, True)
print("distance in training:", far if isinstance(far, str) else f"{far:.0e}")

# %%
# How many fit into memory?
# -------------------------
#
# A model in training keeps four numbers for each weight (itself, its gradient, two
# averages of Adam) and the activations that the backward pass needs. This is a rough
# count for one model; temporary tensors and a batch of its own come on top.
# ``plot_memory.py`` measures.


def megabytes(build, batch):
    """A rough count of what training keeps for one model."""
    model, x, kept = build().to(device), to_device(batch), {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        _loss = loss_of(model(*x))  # holds what was kept
    for t in tree_leaves(([*model.parameters()], [*model.buffers()], x)):
        kept.pop(t.untyped_storage().data_ptr(), None)
    weights = sum(p.nbytes for p in model.parameters())
    return (4 * weights + sum(kept.values())) / 1e6


# %%
# Is it faster?
# -------------
#
# One call saves the start of operators and pays for ``vmap`` itself, so many small
# models should gain, and a few large ones should not. Its rival is a good loop, with
# one fused optimizer for all models and one backward pass of the sum of their losses.
# Neither is compiled. After three calls of each, loop and call take turns, at least
# seven; a gain is the median ratio of the turns, in brackets its 95 % interval. With a
# batch for each model instead of one for all, the gain may differ. Up to 2 percent
# count as no difference.


def in_turns(*ways, seconds=1.0):
    """For each way: seconds of a call, gain over the first way, the gain's interval."""

    def clock(way, calls=1):
        start = timer()  # waits for a GPU
        for _ in range(calls):
            way()
        return (timer() - start) / calls

    calls = math.ceil(5e-3 / min(clock(way) for way in 3 * ways))  # the same for all
    turns, end = [], timer() + seconds
    while timer() < end or len(turns) < 7 or len(turns) % 2 == 0:
        back = (-1) ** len(turns)  # every second turn runs backwards
        turns.append([clock(way, calls) for way in ways[::back]][::back])
    times, cut = torch.tensor(turns).T, int((len(turns) - 1) / 2 - len(turns) ** 0.5)
    gains = (times[0] / times).sort().values[:, [len(turns) // 2, cut, -1 - cut]]
    first = times[0].median().item()
    return [(first / gain, gain, low, high) for gain, low, high in gains.tolist()]


def said(gain, low, high):
    """A gain in words; what noise can explain, up to 2 percent, is no difference."""
    if low > 1.02:
        return f"{gain:.3g}x faster ({low:.3g} to {high:.3g})"
    if high < 0.98:
        return f"{1 / gain:.3g}x slower ({1 / high:.3g} to {1 / low:.3g})"
    return f"no difference seen ({low:.2f} to {high:.2f})"


# %%
# Prediction is in evaluation mode without gradients, a step of training with Adam, both
# in float32:


def train_step(optimizer, outputs_of, batch):
    optimizer.zero_grad()
    loss_of(outputs_of(batch)).backward()
    optimizer.step()


def gain(build, batch, num_models, train):
    """Gain of one call over the loop, and its interval."""
    models, (params, _), call = stack(build, num_models, train)
    ways = [partial(loop, models), call]
    if train:
        every = [p for model in models for p in model.parameters()]
        for way, weights in enumerate([every, params.values()]):
            optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True)
            ways[way] = partial(train_step, optimizer, ways[way])
    x = to_device(batch)
    with torch.set_grad_enabled(train):
        _, (_, *found) = in_turns(*[partial(way, x) for way in ways], seconds=0.5)
    return found


# %%
# What to do
# ----------
#
# All questions in one function, for this model, an LSTM and a transformer layer:

tasks, sizes = {"predict": False, "train": True}, [4, 16, 64]


def advise(build, batch):
    """Print what to do with many such models, and why."""
    each = ask(megabytes, build, batch)
    if not isinstance(each, str):
        fit = float(f"{8000 / each:.2g}")
        print(f"Training keeps {each:.2g} MB a model: 8 GB hold about {fit:,.0f}.")
    for task, train in tasks.items():
        if (words := ask(accepts, build, batch, train)) != "accepted":
            print(f"To {task}, a loop: one call fails. {words}")
            continue
        if isinstance(far := ask(distance, build, batch, train), str):
            print(f"To {task}, not compared in float64. {far}")
        elif not far < 1e-10:  # also nan
            print(f"To {task}, a loop: one call computes something else.")
            continue
        row = {n: ask(gain, build, batch, n, train) for n in sizes}
        found = {n: r if isinstance(r, str) else said(*r) for n, r in row.items()}
        pays = ", ".join(str(n) for n, words in found.items() if "x faster" in words)
        print(f"To {task}, {f'one call for {pays} models' if pays else 'a loop'}.")
        for n, words in found.items():
            print(f"    one call for {n:2} models: {words}")
        print("    operators that loop:", loops(build, batch, train))


layer = partial(nn.TransformerEncoderLayer, 32, 4, 64, batch_first=True)
with warnings.catch_warnings(action="ignore"):  # of operators that loop: they are named
    advise(build, batch)
    print("An LSTM")
    advise(partial(nn.LSTM, 64, 32, batch_first=True), (torch.randn(32, 10, 64),))
    print("A transformer layer")
    advise(layer, (torch.randn(8, 16, 32),))
assert isinstance(far, str) or far < 1e-10, "one call is not the loop"

# %%
# **Where it was not compared**, the model probably draws random numbers outside of
# ``nn.Dropout``: make its rate an attribute, set it to 0, and run again. **Where one
# call fails**, look for the words of the message in ``plot_what_vmap_refuses.py``; for
# an LSTM or a GRU, ``plot_recurrent.py`` has a form that is accepted. **Where a loop is
# advised because one call gains nothing**, the models may be too few, each may keep the
# device busy, or the kernel for all may be slower: ``plot_when_vmap_pays.py`` finds
# from how many on one call pays. **Where an operator runs once for each model**, the
# result is right, and a form of it that does not loop may gain more:
# ``plot_what_vmap_runs.py``.
#
# The questions of acceptance and equality were tried on 25 kinds of modules that are
# accepted and on six that fail (tested). They do not see what a module keeps outside of
# its parameters and buffers, such as a counter: one call counts once for all models.
#
# Remember
# --------
#
# Ask before you rewrite: do they stack, are they accepted, equal, do they fit, is it
# faster? A loop inside of ``vmap`` shows in the count of operators. Equality is a
# question for float64, without dropout.
#
# Next
# ----
#
# - ``plot_recipes.py``: what one does with an ensemble, a few lines each.
# - ``plot_what_vmap_refuses.py``: the messages, and what to write.
# - ``plot_training.py``: train all of them.
