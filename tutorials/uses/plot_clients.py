"""
Federated averaging of a hundred clients
========================================

Simulate federated averaging with ``torch.func.vmap``: all clients of a round train in
one call, each on rows of its own, and their weighted mean is the next model.

**In short.** The clients of a round begin with the same weights, which ``vmap`` takes
with ``in_dims=None``. The result is a stack of their models, and one ``tensordot`` for
each parameter averages it. Clients with unequal data need no padding: draw equally many
row numbers for each. In the experiment below, ten steps of their own made the average
better for the clients, on the mean, than training alone.

Before you start: ``plot_ensembling.py`` explains ``vmap`` and the skeleton.
"""

# %%
# Set-up
# ------

import math
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.benchmark import timer

torch.manual_seed(0)
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
where = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()
print(f"{where}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")

# %%
# A round of federated averaging
# ------------------------------


def build():  # your model
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


with torch.device("meta"):
    skeleton = build()


def predict(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


def loss(params, x, y):
    return F.cross_entropy(predict(params, x), y)


def local(params, x, y, rate):  # of one client: x [steps, batch, 64]
    for rows, labels in zip(x, y, strict=True):
        slope = grad(loss)(params, rows, labels)
        params = {k: p - rate * slope[k] for k, p in params.items()}
    return params


def average(params, x, y, sizes, rate):  # x [clients, steps, batch, 64]
    stack = vmap(local, in_dims=(None, 0, 0, None))(params, x, y, rate)
    weight = sizes / sizes.sum()
    return {k: torch.tensordot(weight, p, 1) for k, p in stack.items()}


def serve(params, mean, optimizer):
    for k, p in params.items():
        p.grad = p.detach() - mean[k]
    optimizer.step()


# %%
# ``serve`` hands the difference between the weights and the mean to an optimizer, as a
# gradient. With ``SGD(params.values(), lr=1)``, the new weights are the mean, which is
# federated averaging [1]. Another optimizer of PyTorch takes its place
# [2] (tested).
#
# **Unequal data** are one list of row numbers, sorted by client, and for each client
# the place where its rows begin, and how many there are. Here, 1,000 digits of
# scikit-learn belong to a hundred clients, and a client has few kinds of digits: of
# each kind, the clients' shares are drawn from a Dirichlet distribution with parameter
# 0.1 [3]. They are dealt out six times, so there are 600 clients.

num_deals, num_clients = 6, 100
digits, mixed = load_digits(), torch.randperm(1797)
x = torch.tensor(digits.data / 16, dtype=torch.float32)[mixed].to(device)  # [1797, 64]
y = torch.tensor(digits.target)[mixed].to(device)
valid, test = (x[1000:1300], y[1000:1300]), (x[1300:], y[1300:])

dirichlet = torch.distributions.Dirichlet(torch.full([num_clients], 0.1))
share = dirichlet.sample((num_deals, 10)).to(device)[:, y[:1000]]  # [6, 1000, 100]
client = share.flatten(0, 1).multinomial(1).view(num_deals, 1000)
client += num_clients * torch.arange(num_deals, device=device)[:, None]  # 0 to 599

# %%
# With a number of a client for each row, any data are sorted and drawn so (tested):

order = client.flatten().argsort() % 1000  # [6000]
sizes = client.flatten().bincount(minlength=num_deals * num_clients)  # [600]
first = sizes.cumsum(0) - sizes


def own_rows(who, steps, batch=10):  # clients [...] -> rows [..., steps, batch]
    size, begin = sizes[who][..., None, None], first[who][..., None, None]
    draw = torch.rand(*who.shape, steps, batch, device=device) * size
    return order[begin + draw.long()]


# %%
# A round with ten clients of the first deal, drawn from those that have any rows:

params = {k: p.detach() for k, p in build().to(device).named_parameters()}
optimizer = torch.optim.SGD(params.values(), lr=1)
who = torch.multinomial((sizes[:num_clients] > 0).float(), 10)
rows = own_rows(who, 20)  # [10, 20, 10]
serve(params, average(params, x[rows], y[rows], sizes[who], 0.1), optimizer)
print(f"ten clients have {sizes[who].tolist()} rows, each takes 20 steps of 10 rows")

# %%
# It computes what a loop computes
# --------------------------------
#
# The loop has a model for each client, one fused optimizer over all their weights, and
# one backward pass of the summed losses. An optimizer for each client gives the same
# (tested).


def looped(models, params, x, y, sizes, rate):
    for one in models:
        one.load_state_dict(params)
    leaves = [p for one in models for p in one.parameters()]
    optimizer = torch.optim.SGD(leaves, lr=rate, fused=True)
    for step in zip(x.unbind(1), y.unbind(1), strict=True):
        clients = zip(models, *step, strict=True)
        losses = [F.cross_entropy(one(rows), labels) for one, rows, labels in clients]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    weight, states = sizes / sizes.sum(), [one.state_dict() for one in models]
    stack = {k: torch.stack([state[k] for state in states]) for k in params}
    return {k: torch.tensordot(weight, p, 1) for k, p in stack.items()}


# %%
# In float64 on the CPU, with the server's optimizer:

models = [build().cpu().double() for _ in range(5)]
params64 = {k: p.detach().clone() for k, p in models[0].named_parameters()}
optimizer = torch.optim.SGD(params64.values(), lr=1)
x64, y64 = torch.randn(5, 20, 10, 64).cpu().double(), torch.randint(10, (5, 20, 10))
counts = torch.tensor([1, 7, 30, 4, 12]).cpu().double()
wanted = looped(models, params64, x64, y64, counts, 0.3)
serve(params64, average(params64, x64, y64, counts, 0.3), optimizer)
far = torch.stack([(p - wanted[k]).abs().max() for k, p in params64.items()]).max()
assert far < 1e-10, f"the average is not that of the loop: {far:.1e}"
print(f"largest difference from the average of the loop: {far:.0e}")

# %%
# How long does a round take?
# ---------------------------
#
# A client takes five steps of 10 rows. The loop starts operators for each client, and
# one call starts them once for all, so one call should gain with many clients.


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
# Medians of at least seven turns, warm; in brackets the 95 % interval of the gain.

for n in [1, 10, 100] if device == cpu else [1, 100, 1000]:
    models = [build().to(device) for _ in range(n)]
    rows = torch.randint(1000, (n, 5, 10), device=device)
    data = params, x[rows], y[rows], torch.ones(n, device=device), 0.1
    call = torch.no_grad()(partial(average, *data))
    loop, (seconds, *gain) = in_turns(partial(looped, models, *data), call, seconds=0.2)
    print(f"{n} clients: loop {loop[0] * 1e3:.3g} ms, ", end="")
    print(f"one call {seconds * 1e3:.3g} ms, {said(*gain)}")

# %%
# The average, or going it alone?
# -------------------------------
#
# **What should happen:** a client with two kinds of digits needs no others, so it may
# do better alone than with an average that has to tell ten apart. A few steps of its
# own, begun at the average, should give it the best of both.
#
# So the measure is the accuracy **on the client's own mixture**: of 497 digits that no
# client has, each kind counts as often as the client has it. All deals train in one
# call, by one more ``vmap``.

has = (sizes > 0).view(num_deals, num_clients)
everyone = torch.arange(len(sizes), device=device).view(num_deals, num_clients)
kinds = (10 * client + y[:1000]).flatten().bincount(minlength=10 * len(sizes))
mixture = (kinds.view(-1, 10) / sizes.clamp(min=1)[:, None]).view(*has.shape, 10)
several = (mixture > 0).sum(dim=-1)[has].float()
print(f"{has.sum()} clients have rows, of {several.mean():.1f} kinds on the mean")


@torch.no_grad()
def accuracy(params, x, y, shift=0.0):  # params [6, 100 or 1, ...] -> [6, 100]
    logits = vmap(vmap(predict, in_dims=(0, None)), in_dims=(0, None))(params, x)
    right = ((logits + shift).argmax(dim=-1) == y).float()  # [6, 100 or 1, n]
    kind = F.one_hot(y, 10).float()  # [n, 10]
    return (right @ (kind / kind.sum(dim=0)) * mixture).sum(dim=-1)


def mean(accuracies):  # of the clients that have rows: [6]
    return ((accuracies * has).sum(dim=1) / has.sum(dim=1)).cpu()


def best(tried):
    """Of {setting: params}, the pair with the best validation digits."""
    return max(tried.items(), key=lambda pair: mean(accuracy(pair[1], *valid)).mean())


# %%
# Own steps begin at any weights, those of the average or those of each client:


@torch.no_grad()
def own_steps(params, rate, steps):  # params [6, 100 or 1, ...]
    params = {k: p.expand(-1, num_clients, *p.shape[2:]) for k, p in params.items()}
    rows = own_rows(everyone, steps)
    return vmap(vmap(partial(local, rate=rate)))(params, x[rows], y[rows])


@torch.no_grad()
def rounds(params, rate, number):  # params [6, 1, ...]; 20 clients take five steps
    params = {k: p[:, 0] for k, p in params.items()}
    for _ in range(number):
        who = everyone.gather(1, has.float().multinomial(20))  # [6, 20]
        rows = own_rows(who, 5)
        each = vmap(partial(average, rate=rate))
        params = each(params, x[rows], y[rows], sizes[who])
    return {k: p[:, None] for k, p in params.items()}


# %%
# Three learning rates are compared on 300 validation digits: for the average after 15
# rounds, for the own steps each time, and for the clients alone after 20 steps. Alone,
# they then go on to 160 steps, and keep the best of four stages.

rates = 0.1, 0.3, 1.0
start, _ = stack_module_state([build().to(device) for _ in range(num_deals)])
start = {k: p.detach()[:, None] for k, p in start.items()}

rate, stack = best({rate: own_steps(start, rate, 20) for rate in rates})
stages = {20: stack}
for steps in (20, 40, 80):
    stages[2 * steps] = own_steps(stages[steps], rate, steps)
stop, stack = best(stages)
means = [f"{mean(accuracy(p, *test)).mean():.1%}" for p in stages.values()]
print(f"alone: rate {rate}, {stop} steps chosen, test at the stages {', '.join(means)}")

scores, history, marks, done = {"alone": accuracy(stack, *test)}, [], [15, 45, 135], 15
rate, server = best({rate: rounds(start, rate, done) for rate in rates})
for mark in marks:
    server = rounds(server, rate, mark - done)
    own, tuned = best({rate: own_steps(server, rate, 10) for rate in rates})
    print(f"{mark} rounds: rate of the average {rate}, of the own steps {own}")
    scores["average"] = accuracy(server, *test)
    scores["average + ten own steps"] = accuracy(tuned, *test)
    scores["average + own shares"] = accuracy(server, *test, mixture[:, :, None].log())
    history.append(torch.stack([mean(part) for part in scores.values()]))
    done = mark
history = torch.stack(history)  # [3, 4, 6]

# %%
# The last way needs no step. A client knows the share of each kind among its rows, and
# adds the logarithms of these shares to the logits of the average [4]. This changes
# which kinds the model expects, and none of its weights.
#
# A verdict needs three standard errors of the mean difference over the six deals, which
# chance alone reaches in about one of thirty comparisons. The deals are of the same
# images, so a verdict is about these digits.


def told(gap):  # [6]
    middle, error = gap.mean(), gap.std() / len(gap) ** 0.5
    word = "better" if middle > 0 else "worse"
    word = word if middle.abs() > 3 * error else "no difference seen"
    return f"{word} ({100 * middle:+.1f} points, standard error {100 * error:.1f})"


names = list(scores)
for mark, (alone, *rows) in zip(marks, history, strict=True):
    print(f"after {mark} rounds, against {alone.mean():.1%} alone:")
    for name, row in zip(names[1:], rows, strict=True):
        print(f"    {name} {row.mean():.1%}, {told(row - alone)}")
print(f"own shares against ten own steps: {told(row - rows[1])}")

# %%

fig, (ax, each) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
bars = 3 * (history - alone).std(dim=2) / num_deals**0.5
for row, (name, line) in enumerate(zip(names, ["s-", "o:", "^--", "D-."], strict=True)):
    middle = history[:, row].mean(dim=1)
    ax.errorbar(marks, middle, yerr=bars[:, row], fmt=line, capsize=3, label=name)
    score = scores[name][has].sort().values.cpu()
    each.plot(torch.linspace(0, 100, len(score)), score, line[1:])
ax.set(xscale="log", xlabel="rounds", ylabel="accuracy on the client's own mixture")
ax.set_xticks(marks, marks)
ax.minorticks_off()
ax.set_title("Mean of the clients. Bars: three standard\nerrors of the gap to alone")
ax.legend()
each.set_xlabel("percent of the clients, worst first")
each.set_title(f"{len(score)} clients after {mark} rounds\n{where}, float32")
fig.set_label(
    "Left: accuracy on the client's own mixture against rounds, for clients alone, the "
    "average, and the average with ten own steps or own shares. Right: each client. "
    f"Ten own steps against alone: {told(rows[1] - alone)}. Own shares against ten own "
    f"steps: {told(rows[2] - rows[1])}."
)

# %%
# **Where the average is worse than alone and ten own steps are better, the average is
# where a client should begin, and not what it should use.**
#
# **Where own shares are better than ten own steps**, knowing its kinds brings a client
# more than its steps do, and no weight has to change. The measure favors this: a
# client's mixture is exactly that of its rows. Where clients differ in more than the
# kinds, as in handwriting, shares probably help less.
#
# The mistake: clients that begin with weights of their own
# ---------------------------------------------------------
#
# Separately built models train without an error, and so does their average. Six teams
# of ten clients that hold all kinds of digits, 100 steps each:

strangers, _ = stack_module_state([build().to(device) for _ in range(60)])
same = {k: p[::10].repeat_interleave(10, dim=0) for k, p in strangers.items()}
rows = torch.randint(1000, (60, 100, 10), device=device)
for name, begin in {"one start": same, "own starts": strangers}.items():
    with torch.no_grad():
        stack = vmap(partial(local, rate=0.3))(begin, x[rows], y[rows])
        merged = {k: p.unflatten(0, (6, 10)).mean(dim=1) for k, p in stack.items()}
        logits = [vmap(predict, in_dims=(0, None))(p, test[0]) for p in (stack, merged)]
    each, one = [(part.argmax(-1) == test[1]).float().mean(1) for part in logits]
    print(f"{name}: a client {each.mean():.1%} on the mean", end=", ")
    print(f"six averages {one.min():.1%} to {one.max():.1%}")

# %%
# Remember
# --------
#
# The start of a round is shared, the rows are mapped, and the average is one
# ``tensordot``. Judge an average on what its clients need, beside clients alone.
#
# Next
# ----
#
# - ``plot_more_recipes.py``: graphs, sparse matrices, solvers and more.
# - ``plot_population.py``: members that copy each other.
#
# References
# ----------
#
# - [1] H. B. McMahan et al.: Communication-efficient learning of deep networks from
#   decentralized data, 2016, `arXiv:1602.05629 <https://arxiv.org/abs/1602.05629>`_.
# - [2] S. Reddi et al.: Adaptive federated optimization, 2020, `arXiv:2003.00295
#   <https://arxiv.org/abs/2003.00295>`_.
# - [3] T.-M. H. Hsu, H. Qi, M. Brown: Measuring the effects of non-identical data
#   distribution for federated visual classification, 2019, `arXiv:1909.06335
#   <https://arxiv.org/abs/1909.06335>`_.
# - [4] M. Saerens et al.: Adjusting the outputs of a classifier to new a priori
#   probabilities, 2002, `doi:10.1162/089976602753284446
#   <https://doi.org/10.1162/089976602753284446>`_.
