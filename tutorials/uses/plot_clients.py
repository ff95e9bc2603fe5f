"""
Federated averaging of a hundred clients
========================================

Simulate federated learning with ``torch.func.vmap``: in a round of FedAvg, all clients
train in one call, each on rows of its own, and the weighted mean of their models is the
next model.

**In short.** Map the training of one client by ``vmap``: the weights have
``in_dims=None``, and one ``tensordot`` for each parameter averages the stack that comes
back. Unequal data need no padded rows, but idle steps: draw equally many row numbers
for all, at a learning rate of 0 after a client's last step. In the experiment below,
with non-IID labels, ten steps from the average (fine-tuning, personalization) served
clients better, on the mean, than training alone. After enough rounds, adding the
client's log label frequencies to the average's logits, which rules out labels that it
lacks, was better still.

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


def local(params, x, y, rates):  # of one client: x [steps, batch, 64], rates [steps]
    for rows, labels, rate in zip(x, y, rates, strict=True):
        slope = grad(loss)(params, rows, labels)
        params = {k: p - rate * slope[k] for k, p in params.items()}
    return params


def average(params, x, y, rates, sizes):  # x [clients, steps, batch, 64]
    stack = vmap(local, in_dims=(None, 0, 0, 0))(params, x, y, rates)
    weight = sizes / sizes.sum()
    return {k: torch.tensordot(weight, p, 1) for k, p in stack.items()}


# %%
# FedAvg [1] goes on from this mean. Close to FedAdam [2], which corrects no bias,
# ``Adam(params.values())`` takes a step with ``p.grad = p - mean[k]``. For FedProx [3],
# add ``mu * (p - start[k])`` to ``slope[k]``, where ``start`` has the weights at the
# start of the round. (Tested.)
#
# Non-IID clients with unequal data
# ---------------------------------
#
# A hundred clients share 1,000 of scikit-learn's digits. For each label, their shares
# are drawn from a Dirichlet distribution with parameter 0.1 [4], so that a client has
# few labels. Six such splits of the same rows make 600 clients.

num_splits, num_clients = 6, 100
digits, mixed = load_digits(), torch.randperm(1797)
x = torch.tensor(digits.data / 16, dtype=torch.float32)[mixed].to(device)  # [1797, 64]
y = torch.tensor(digits.target)[mixed].to(device)
valid, test = (x[1000:1300], y[1000:1300]), (x[1300:], y[1300:])

dirichlet = torch.distributions.Dirichlet(torch.full([num_clients], 0.1))
share = dirichlet.sample((num_splits, 10)).to(device)[:, y[:1000]]  # [6, 1000, 100]
client = share.flatten(0, 1).multinomial(1).view(num_splits, 1000)
client += num_clients * torch.arange(num_splits, device=device)[:, None]  # 0 to 599

# %%
# For your data, ``client`` has, for each row, the number of its client. Rows are drawn
# with replacement from the client's part of the sorted row numbers (tested).

order = client.flatten().argsort() % client.shape[-1]  # [6000]
sizes = client.flatten().bincount(minlength=num_splits * num_clients)  # [600]
first = sizes.cumsum(0) - sizes


def own_rows(who, steps, batch=10):  # clients [...] -> rows [..., steps, batch]
    size, begin = sizes[who][..., None, None], first[who][..., None, None]
    draw = torch.rand(*who.shape, steps, batch, device=device) * size
    return order[(begin + draw.long()) % len(order)]  # none, if the last is empty


# %%
# A round with ten clients of the first split: each takes as many steps as three epochs
# of its rows have, and the rates of all later steps are 0.

params = {k: p.detach() for k, p in build().to(device).named_parameters()}
who = torch.multinomial((sizes[:num_clients] > 0).float(), 10)  # those that have rows
taken = (3 * sizes[who] / 10).ceil().int()
steps = taken.max().item()
rates = 0.1 * (torch.arange(steps, device=device) < taken[:, None])  # [10, steps]
rows = own_rows(who, steps)  # [10, steps, 10]
params = average(params, x[rows], y[rows], rates, sizes[who])
print(f"rows {sizes[who].tolist()}, steps of 10 rows {taken.tolist()}")

# %%
# It computes what a loop computes
# --------------------------------
#
# The loop has a model for each client, one fused optimizer for all, and one backward
# pass of the sum of their losses, each times its rate. An optimizer for each client,
# stopped after the client's last step, gives the same (tested).


def looped(models, params, x, y, rates, sizes):
    for one in models:
        one.load_state_dict(params)
    leaves = [p for one in models for p in one.parameters()]
    optimizer = torch.optim.SGD(leaves, lr=1, fused=True)
    for *step, rate in zip(x.unbind(1), y.unbind(1), rates.unbind(1), strict=True):
        clients = zip(models, *step, strict=True)
        losses = [F.cross_entropy(one(rows), labels) for one, rows, labels in clients]
        optimizer.zero_grad()
        (torch.stack(losses) * rate).sum().backward()
        optimizer.step()
    weight, states = sizes / sizes.sum(), [one.state_dict() for one in models]
    stack = {k: torch.stack([state[k] for state in states]) for k in params}
    return {k: torch.tensordot(weight, p, 1) for k, p in stack.items()}


# %%
# In float64 on the CPU:

models = [build().cpu().double() for _ in range(5)]
params64 = {k: p.detach() for k, p in build().cpu().double().named_parameters()}
x64, y64 = torch.randn(5, 20, 10, 64).cpu().double(), torch.randint(10, (5, 20, 10))
counts = torch.tensor([1, 7, 30, 4, 12]).cpu().double()
data = x64, y64, torch.rand(5, 20).cpu().double(), counts
at_once, wanted = average(params64, *data), looped(models, params64, *data)
far = torch.stack([(p - wanted[k]).abs().max() for k, p in at_once.items()]).max()
assert far < 1e-10, f"the average is not that of the loop: {far:.1e}"
print(f"largest difference from the average of the loop: {far:.0e}")

# %%
# How long does a round take?
# ---------------------------
#
# The loop starts operators for each client, and one call starts them once for all, so
# one call should gain with many clients. Each takes five steps of 10 rows; idle steps
# would cost.


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
    rates = torch.full([n, 5], 0.1, device=device)
    data = params, x[rows], y[rows], rates, torch.ones(n, device=device)
    call = torch.no_grad()(partial(average, *data))
    loop, (seconds, *gain) = in_turns(partial(looped, models, *data), call, seconds=0.2)
    print(f"{n} clients: loop {loop[0] * 1e3:.3g} ms, ", end="")
    print(f"one call {seconds * 1e3:.3g} ms, {said(*gain)}")

# %%
# Personalization: does the average beat training alone?
# ------------------------------------------------------
#
# **What should happen:** a client with two labels needs no others, so training alone
# may serve it better than an average that has to tell ten apart. A few steps from the
# average should beat both. The measure is the accuracy **on the client's own labels**:
# of 497 digits that no client has, each label counts as often as the client has it.

has = (sizes > 0).view(num_splits, num_clients)
everyone = torch.arange(len(sizes), device=device).view(num_splits, num_clients)
counts = (10 * client + y[:1000]).flatten().bincount(minlength=10 * len(sizes))
labels = (counts.view(-1, 10) / sizes.clamp(min=1)[:, None]).view(*has.shape, 10)
several = (labels > 0).sum() / has.sum()
print(f"{has.sum()} clients have rows, of {several:.1f} labels on the mean")


@torch.no_grad()
def accuracy(params, x, y, shift=0.0):  # params [6, 100 or 1, ...] -> [6, 100]
    logits = vmap(vmap(predict, in_dims=(0, None)), in_dims=(0, None))(params, x)
    right = ((logits + shift).argmax(dim=-1) == y).float()  # [6, 100 or 1, n]
    label = F.one_hot(y, 10).float()  # [n, 10]
    return (right @ (label / label.sum(dim=0)) * labels).sum(dim=-1)


def mean(accuracies):  # of the clients that have rows: [6]
    return ((accuracies * has).sum(dim=1) / has.sum(dim=1)).cpu()


def best(tried):  # {rate: params} -> the pair best on the validation digits
    return max(tried.items(), key=lambda pair: mean(accuracy(pair[1], *valid)).mean())


# %%
# One more ``vmap`` trains all splits, from the averages or from weights of their own:


@torch.no_grad()
def own_steps(params, rate, steps):  # params [6, 100 or 1, ...]
    params = {k: p.expand(-1, num_clients, *p.shape[2:]) for k, p in params.items()}
    rows, rates = own_rows(everyone, steps), torch.full([steps], rate, device=device)
    return vmap(vmap(partial(local, rates=rates)))(params, x[rows], y[rows])


@torch.no_grad()
def rounds(params, rate, number):  # params [6, 1, ...]; 20 clients take five steps
    params = {k: p[:, 0] for k, p in params.items()}
    rates = torch.full([num_splits, 20, 5], rate, device=device)
    for _ in range(number):
        who = everyone.gather(1, has.float().multinomial(20))  # [6, 20]
        rows = own_rows(who, 5)
        params = vmap(average)(params, x[rows], y[rows], rates, sizes[who])
    return {k: p[:, None] for k, p in params.items()}


# %%
# 300 validation digits choose among three learning rates: for the average after 15
# rounds, for ten steps each time, and for clients alone after 20 of their 160 steps.

rates = 0.1, 0.3, 1.0
start, _ = stack_module_state([build().to(device) for _ in range(num_splits)])
start = {k: p.detach()[:, None] for k, p in start.items()}

rate, stack = best({rate: own_steps(start, rate, 20) for rate in rates})
for steps in (20, 40, 80):
    stack = own_steps(stack, rate, steps)
    middle = mean(accuracy(stack, *test)).mean()
    print(f"alone, {2 * steps} steps with rate {rate}: {middle:.1%}")

scores, history, marks, done = {"alone": accuracy(stack, *test)}, [], [15, 45, 135], 15
rate, server = best({rate: rounds(start, rate, done) for rate in rates})
for mark in marks:
    server = rounds(server, rate, mark - done)
    _, tuned = best({rate: own_steps(server, rate, 10) for rate in rates})
    scores["average"] = accuracy(server, *test)
    scores["average + ten steps"] = accuracy(tuned, *test)
    scores["average + label shift"] = accuracy(server, *test, labels[:, :, None].log())
    history.append(torch.stack([mean(part) for part in scores.values()]))
    done = mark
history = torch.stack(history)  # [3, 4, 6]

# %%
# **The label shift needs no step.** A client adds the logarithms of its own label
# frequencies to the logits of the average [5]. Over all clients, the labels here are
# about equally frequent; otherwise, subtract the logarithms of those frequencies.
#
# Better or worse means three standard errors of the mean difference over the six splits
# (by chance, about one in thirty; here are eleven). All splits are of the same images.


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
print(f"ten steps against the average: {told(rows[1] - rows[0])}")
print(f"label shift against ten steps: {told(rows[2] - rows[1])}")
for name in names[1:]:
    gap = (scores[name] - scores["alone"])[has]
    more, less = [(sign * gap > 0).float().mean() for sign in (1, -1)]
    print(f"{name}: better than alone for {more:.0%} of clients, worse for {less:.0%}")

# %%

fig, ax = plt.subplots(layout="constrained")
bars = 3 * (history - alone).std(dim=2) / num_splits**0.5
for row, (name, line) in enumerate(zip(names, ["s-", "o:", "^--", "D-."], strict=True)):
    middle = history[:, row].mean(dim=1)
    ax.errorbar(marks, middle, yerr=bars[:, row], fmt=line, capsize=3, label=name)
ax.set(xlabel="rounds", ylabel="accuracy, mean of the clients", xticks=marks)
ax.set_title(f"{where}, float32. Bars: three standard errors of the gap to alone")
ax.legend()
fig.set_label(
    "Accuracy against rounds: alone, average, average with ten steps or label shift. "
    f"After {mark} rounds, ten steps against alone: {told(rows[1] - alone)}."
)

# %%
# **Where ten steps are better than the average and than training alone, the average is
# a good start on the mean.** A mean hides who loses: the output counts them.
#
# The measure favors the label shift, which knows the measure's frequencies: a label
# with none is ruled out. Where clients differ in more than the labels, as in
# handwriting, it probably helps less.
#
# Remember
# --------
#
# All begin with one set of weights; rows and rates are mapped; ``tensordot`` averages.
# Judge it on each client's own labels, beside training alone.
#
# Next
# ----
#
# - ``plot_more_recipes.py``: graphs, sparse matrices, solvers, augmentation.
# - ``plot_between_members.py``: averages of models that began apart.
#
# References
# ----------
#
# - [1] H. B. McMahan et al.: Communication-efficient learning of deep networks from
#   decentralized data, 2016, `arXiv:1602.05629 <https://arxiv.org/abs/1602.05629>`_.
# - [2] S. Reddi et al.: Adaptive federated optimization, 2020, `arXiv:2003.00295
#   <https://arxiv.org/abs/2003.00295>`_.
# - [3] T. Li et al.: Federated optimization in heterogeneous networks, 2018,
#   `arXiv:1812.06127 <https://arxiv.org/abs/1812.06127>`_.
# - [4] M. Yurochkin et al.: Bayesian nonparametric federated learning of neural
#   networks, 2019, `arXiv:1905.12022 <https://arxiv.org/abs/1905.12022>`_.
# - [5] M. Saerens et al.: Adjusting the outputs of a classifier to new a priori
#   probabilities, 2002, `doi:10.1162/089976602753284446
#   <https://doi.org/10.1162/089976602753284446>`_.
