"""
More recipes: graphs, sparse matrices, solvers, augmentation
============================================================

Look up the lines for graph neural networks (GNN), products with a sparse matrix, neural
ODEs, random augmentation, ``EmbeddingBag`` or forward hooks, for all members of an
ensemble at once with ``torch.func.vmap``.

**In short.** Inside of ``vmap``, pass messages by ``scatter_reduce``, crop by
``gather``, and choose steps of a solver by ``torch.where``; outside, draw, pad, compile
and multiply by a sparse matrix. Every recipe needs the set-up below and nothing else:
copy the lines under a heading, in any order.

``plot_recipes.py`` has the recipes to train, clip, freeze, save, split and compile.
"""

# %%
# The set-up of all recipes
# -------------------------

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

torch.manual_seed(0)
torch.backends.cudnn.conv.fp32_precision = "ieee"  # the checks compare in float32
torch.backends.cuda.matmul.fp32_precision = "ieee"
cpu = torch.device("cpu")
device = torch.accelerator.current_accelerator(check_available=True) or cpu
print(f"{device.type.upper()}, torch {torch.__version__}, float32, IEEE")

# %%
# A *member* is one network: row ``i`` of every stacked tensor. Each recipe ends with
# ``check``, which compares its result with a loop over the members. In float64 on the
# CPU, both agree within 1e-10, and so do gradients by the stacks of modules (tested).


class Net(nn.Module):  # put yours here
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.head = nn.Linear(16, 8)

    def forward(self, x):  # [..., 8]
        return self.head(self.body(x))  # [..., 8]


num_models = 10
models = [Net().to(device) for _ in range(num_models)]
params, _ = stack_module_state(models)  # "head.weight": [10, 8, 16], ...
with torch.device("meta"):
    skeleton = Net().eval()  # the code of all members, without weights


def predict(params, x):  # of one member
    return functional_call(skeleton, params, (x,), strict=True)


def check(at_once, loop):
    differs = "the result differs from that of a loop"
    torch.testing.assert_close(at_once, torch.stack([*loop]), msg=differs)
    print(f"{list(at_once.shape)}: the same as in a loop")


x = torch.randn(20, 8, device=device)  # one input for all

# %%
# Graph networks, on one graph or on own graphs
# ---------------------------------------------
#
# This layer adds to each node the mean of its neighbors. In place of ``"mean"``,
# ``"sum"`` and ``"amax"`` work as well (tested). All members share the graph, because
# its ``in_dims`` are ``None``. A minibatch of graphs is one large graph: to the node
# numbers of each, add the number of nodes in the graphs before it (tested).


def mean_of_neighbors(x, edges):  # [nodes, width], [2, number of edges]
    source, target = edges
    rows = target[:, None].expand(-1, x.shape[1])
    zeros = torch.zeros_like(x)
    return zeros.scatter_reduce(0, rows, x[source], "mean", include_self=False)


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, edges):
        x = self.first(x + mean_of_neighbors(x, edges)).relu()
        return self.second(x + mean_of_neighbors(x, edges))  # [nodes, 4]


nets = [GraphNet().to(device) for _ in range(num_models)]
graph_params, _ = stack_module_state(nets)
with torch.device("meta"):
    graph_skeleton = GraphNet().eval()


def run(params, x, edges):
    return functional_call(graph_skeleton, params, (x, edges), strict=True)


edges = torch.randint(20, (2, 60), device=device)
out = vmap(run, in_dims=(0, None, None))(graph_params, x, edges)  # [10, 20, 4]

check(out, [net(x, edges) for net in nets])

# %%
# **If each member has its own graph**, pad the graphs to one size. The last node of
# each is padding, and the padding edges join this node to itself, because at a real
# node they would change the mean. A readout of a whole graph must leave out the nodes
# of padding, as the last lines do.
#
# ``scatter_reduce`` runs once for all members (tested). With own graphs, a layer that
# calls ``index_add`` runs once for each member, without a warning
# (``plot_silent_mistakes.py``).

graphs = []  # yours: features of nodes, edges
for n in range(11, 11 + num_models):
    features = torch.randn(n, 8, device=device)
    graphs.append((features, torch.randint(n, (2, 3 * n), device=device)))

nodes = 1 + max(len(x) for x, _ in graphs)  # one more
most = max(e.shape[1] for _, e in graphs)
own = [F.pad(x, (0, 0, 0, nodes - len(x))) for x, _ in graphs]
joined = [F.pad(e, (0, most - e.shape[1]), value=nodes - 1) for _, e in graphs]
out = vmap(run)(graph_params, torch.stack(own), torch.stack(joined))  # [10, 21, 4]

sizes = torch.tensor([len(x) for x, _ in graphs], device=device)
real = torch.arange(nodes, device=device) < sizes[:, None]  # [10, 21]
readout = (out * real[..., None]).sum(dim=1) / sizes[:, None]  # mean of nodes: [10, 4]

check(readout, [net(*graph).mean(0) for net, graph in zip(nets, graphs, strict=True)])

# %%
# **Layers of PyTorch Geometric** (tested with ``torch_geometric`` 2.8.1, not run here):
# if all members share the graph, ``SAGEConv``, ``TransformerConv``, ``GCNConv``,
# ``GATConv`` and ``GATv2Conv`` run as they are. With own graphs, the first two run
# padded as above, and the other three are refused where they replace self-loops:
#
# - ``GATConv`` and ``GATv2Conv``: build them with ``add_self_loops=False``. Apply
#   ``remove_self_loops`` and ``add_self_loops`` to each graph before you pad it.
# - ``GCNConv``: build it with ``normalize=False``. Apply ``gcn_norm`` to each graph
#   before you pad it, and pad the weights of its edges with zeros.
#
# Multiply by a sparse matrix
# ---------------------------
#
# Inside of ``vmap``, ``A @ x`` with a sparse ``A`` is refused, and ``torch.sparse.mm``
# runs once for each member (tested). Outside, one product is enough: put the members
# side by side, as columns. A network with several such products becomes several calls
# of ``vmap``, with ``multiply`` between them. The layout of ``A`` may be
# ``torch.sparse_coo`` or ``torch.sparse_csr`` (tested).

A = (torch.rand(20, 20, device=device) < 0.1).to(x.dtype).to_sparse()  # yours


def multiply(A, xs):  # [20, 20], [10, 20, 8]: a block for each member
    columns = xs.movedim(0, 1).flatten(1)  # [20, 80]
    return (A @ columns).unflatten(1, (len(xs), -1)).movedim(1, 0)


out = multiply(A, vmap(predict, in_dims=(0, None))(params, x))  # [10, 20, 8]

check(out, [A @ model(x) for model in models])

# %%
# With a matrix of its own for each member, call ``torch.stack(matrices).bmm(xs)``
# outside of ``vmap``, in the layout ``torch.sparse_coo`` (tested).
#
# Solve an ODE for all members: fixed steps
# -----------------------------------------
#
# In a neural ODE, each member is the right-hand side of a differential equation. With a
# fixed number of steps, map the whole solver. This one is the classical Runge-Kutta
# method.


def solve(params, z, end=1.0, steps=20):
    h = end / steps
    for _ in range(steps):
        a = predict(params, z)
        b = predict(params, z + h / 2 * a)
        c = predict(params, z + h / 2 * b)
        d = predict(params, z + h * c)
        z = z + h / 6 * (a + 2 * b + 2 * c + d)
    return z


out = vmap(solve, in_dims=(0, None))(params, x)  # [10, 20, 8], from x at time 0

check(out, [solve(dict(m.named_parameters()), x) for m in models])

# %%
# Solve an ODE for all members: steps of their own
# ------------------------------------------------
#
# A loop ``while t < end`` is refused, because ``t`` has a value for each member. All
# members compute ``max_steps`` steps, also when done; ``torch.where`` keeps or drops
# each, for all rows of a member. **Return the time, and check it**: where ``max_steps``
# is too small, a member stops before the end without an error.


def solve_to(params, z, end=1.0, tolerance=1e-3, max_steps=50):
    t, h = z.new_zeros(()), z.new_full((), end / 10)
    for _ in range(max_steps):
        h = torch.minimum(h, end - t)
        a = predict(params, z)
        b = predict(params, z + h * a)
        error = (h / 2 * (b - a)).detach().abs().amax()  # of Euler beside Heun
        keep = error <= tolerance
        z = torch.where(keep, z + h / 2 * (a + b), z)
        t = torch.where(keep, t + h, t)
        h = h * (0.9 * (tolerance / (error + 1e-9)).sqrt()).clamp(0.2, 5)
    return z, t


out, t = vmap(solve_to, in_dims=(0, None))(params, x)  # [10, 20, 8], [10]
torch.testing.assert_close(t, torch.ones_like(t), msg="raise max_steps")

check(out, [solve_to(dict(m.named_parameters()), x)[0] for m in models])

# %%
# **With torchdiffeq**, call ``odeint`` outside of ``vmap``, with all members in one
# right-hand side, so that they take the same steps. By default, the error that sets a
# step is a root mean square over all members, in which a difficult one counts little:
# in the test, with ten oscillators and a tolerance of 1e-3, the fastest had more than
# twice the error that it has alone. The norm below is that of the worst member. (Tested
# with version 0.2.5, not run here.)
#
# .. code-block:: none
#
#    from torchdiffeq import odeint
#
#    def worst(z):  # [10, 20, 8] -> []
#        return z.flatten(1).square().mean(dim=1).sqrt().max()
#
#    def slopes(t, z):
#        return vmap(predict)(params, z)
#
#    start, times = x.expand(num_models, -1, -1), torch.tensor([0.0, 1.0]).to(x)
#    out = odeint(slopes, start, times, options={"norm": worst})[-1]  # [10, 20, 8]
#
# Augment images, each member and image in its own way
# ----------------------------------------------------
#
# Slicing, as in ``image[:, top:]``, needs a Python number, which is the same for all
# members and images. Draw the offsets outside of ``vmap``, a row for each member, and
# take the rows and columns of the crop by ``gather``.


def augment(images, top, left, flip):  # [16, 3, 32, 32], [16], [16], [16]
    padded = F.pad(images, (4, 4, 4, 4))  # [16, 3, 40, 40]
    pixel = torch.arange(32, device=images.device)
    rows = (top[:, None] + pixel)[:, None, :, None].expand(-1, 3, -1, 40)
    columns = (left[:, None] + pixel)[:, None, None, :].expand(-1, 3, 32, -1)
    crop = padded.gather(2, rows).gather(3, columns)
    return torch.where(flip[:, None, None, None], crop.flip(-1), crop)


images = torch.rand(16, 3, 32, 32, device=device)  # yours, here the same for all
top, left = torch.randint(9, (2, num_models, 16), device=device)
flip = torch.rand(num_models, 16, device=device) < 0.5
out = vmap(augment, in_dims=(None, 0, 0, 0))(images, top, left, flip)


def sliced(image, top, left, flip):
    crop = F.pad(image, (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
    return crop.flip(-1) if flip else crop


drawn = [part.flatten().tolist() for part in (top, left, flip)]
check(out.flatten(0, 1), map(sliced, images.repeat(num_models, 1, 1, 1), *drawn))

# %%
# A bag of embeddings
# -------------------
#
# ``nn.EmbeddingBag`` runs once for each member (tested). These lines run once for all
# members. As in ``nn.EmbeddingBag``, the mean is over the tokens that are not padding.


def bag(weight, tokens):  # [50, 8], [16, 6]
    rows = F.embedding(tokens, weight)  # [16, 6, 8]
    real = (tokens != 0)[..., None]  # 0 is padding
    return (rows * real).sum(dim=-2) / real.sum(dim=-2).clamp(min=1)


bags = [nn.EmbeddingBag(50, 8, padding_idx=0).to(device) for _ in range(num_models)]
tables, _ = stack_module_state(bags)
tokens = torch.randint(50, (16, 6), device=device)
out = vmap(bag, in_dims=(0, None))(tables["weight"], tokens)  # [10, 16, 8]

check(out, [bag(tokens) for bag in bags])

# %%
# Return a hidden layer of a finished model
# -----------------------------------------
#
# A tensor that a forward hook stores cannot be used after ``vmap`` has returned
# (tested). Set the hook inside of the function, and return what it stored.


def with_hidden(params, x):
    kept = []

    def keep(module, inputs, output):
        kept.append(output)

    with skeleton.body.register_forward_hook(keep):  # removes the hook at its end
        out = predict(params, x)
    return out, kept[0]


out, hidden = vmap(with_hidden, in_dims=(0, None))(params, x)  # hidden [10, 20, 16]

check(hidden, [model.body(x) for model in models])

# %%
# For its gradient, call ``torch.autograd.grad(loss.sum(), hidden)``, outside of
# ``vmap``. A full backward hook is never called there, without an error (tested).
#
# A model that returns a dataclass
# --------------------------------
#
# ``vmap`` refuses a dataclass until you register its class. After that, it may also be
# an argument. All fields of a dataclass that is returned must be tensors, not numbers.
# A ``NamedTuple`` needs no registration. (Tested.)


@dataclass
class Output:
    mean: torch.Tensor
    scale: torch.Tensor


torch.export.register_dataclass(Output)


def with_scale(params, x):
    mean, raw = predict(params, x).chunk(2, dim=-1)
    return Output(mean, F.softplus(raw))


out = vmap(with_scale, in_dims=(0, None))(params, x)  # an Output of [10, 20, 4]

check(out.scale, [F.softplus(model(x)[:, 4:]) for model in models])

# %%
# Fill a part of a tensor, as a Fourier layer does
# ------------------------------------------------
#
# A tensor from ``x.new_zeros(...)`` that is filled in place is refused if all members
# share ``x`` (tested). Pad the part that is computed instead.


def spectral(weight, x):  # [3, 2], [20, 8]
    weight = torch.view_as_complex(weight)
    low = torch.fft.rfft(x)[:, :3] * weight  # of five frequencies
    return torch.fft.irfft(F.pad(low, (0, 2)), n=8)


weights = torch.randn(num_models, 3, 2, device=device)
out = vmap(spectral, in_dims=(0, None))(weights, x)  # [10, 20, 8]

check(out, [spectral(weight, x) for weight in weights])

# %%
# The mistake: vmap of a compiled function
# ----------------------------------------
#
# Compile outside of ``vmap``. Inside, torch compiles nothing, without an error (below);
# ``fullgraph=True`` raises one [1] (tested). In place of a compiler, ``count`` counts
# the graphs that it is given:


def count(graph, inputs):
    compiled.append(graph)
    return graph.forward


compiled = []
with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # torch's own
    vmap(torch.compile(predict, backend=count), in_dims=(0, None))(params, x)
    print(f"vmap(torch.compile(predict)): {len(compiled)} compiled")
    torch.compile(vmap(predict, in_dims=(0, None)), backend=count)(params, x)
    print(f"torch.compile(vmap(predict)): {len(compiled)} compiled")

# %%
# Remember
# --------
#
# Outside of ``vmap``: draw, pad, compile, and multiply by sparse matrices. Inside:
# choose by ``torch.where``, and return all that you want to keep.
#
# Next
# ----
#
# - ``plot_ensembling.py``: the first page.
# - ``plot_between_members.py``: a hundred points on the line between two models.
# - ``plot_what_vmap_refuses.py``: when your own case ends in an error.
#
# References
# ----------
#
# - [1] `pytorch#128711 <https://github.com/pytorch/pytorch/issues/128711>`_.
# - An ODE for each member: `torchdiffeq#217
#   <https://github.com/rtqichen/torchdiffeq/issues/217>`_.
