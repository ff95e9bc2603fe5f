"""plot_what_vmap_refuses.py: each message is provoked, what to write equals a loop."""

import re
import warnings
from collections import namedtuple
from dataclasses import make_dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pages import names_of, text_of
from scipy.integrate import solve_ivp
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

PAGE = "basics/plot_what_vmap_refuses"
CLASSES = names_of(PAGE, "OldSign", "Sign", "reverse", "Reverse")
OldSign, Sign, Reverse = (CLASSES[name] for name in ("OldSign", "Sign", "Reverse"))
XS = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0)).double()
WS, BATCH, YS = XS[:, 0].clone(), XS[0], XS[:, :, 0].clone()
ROWS, RATES = torch.arange(8) % 3, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
IDS, TABLES = torch.arange(32).view(4, 8) % 10, torch.randn(4, 10, 6).double()
SPARSE = (torch.arange(64.0).view(8, 8) % 3).double().to_sparse()
with warnings.catch_warnings(action="ignore"):  # in beta, in prototype stage
    CSR = SPARSE.to_sparse_csr()
    NESTED = torch.nested.nested_tensor([XS[0], XS[1, :2]])

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def loop(function, *inputs):
    return torch.stack([function(*row) for row in zip(*inputs, strict=True)])


def zeros(*size):
    return torch.zeros(*size).double()


def stacked(make):
    """Parameters of four modules, a function that calls one, the modules."""
    modules = [make().double() for _ in XS]
    with torch.device("meta"):
        skeleton = make().train(modules[0].training)

    def call(params, *inputs, **options):
        return functional_call(skeleton, params, inputs, options, strict=True)

    return stack_module_state(modules)[0], call, modules


def encoder():
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


STACK, call, LINEARS = stacked(lambda: nn.Linear(6, 2))
CONVS, conv_call, _ = stacked(lambda: nn.Conv2d(1, 2, 3))
ENCODERS, encode, MODELS = stacked(encoder)
IMAGES, PADDING = zeros(4, 5, 1, 8, 8), (torch.arange(8) > 4).expand(4, 3, 8)
PX = ENCODERS, torch.randn(4, 3, 8, 6).double()
SHARED = ENCODERS, PX[1][0], PADDING[0]
STEP = lambda x: x.max() > 1, lambda x: (x / 2,)
KEPT, RUNS, LEAF = [], [], TABLES.clone().requires_grad_()
NoRule = type("NoRule", (Sign,), {"generate_vmap_rule": False})
Data, Named = make_dataclass("Data", ["x"]), namedtuple("Named", ["x"])
embed = partial(F.embedding, sparse=True)
draw, stack = partial(vmap, randomness="different"), stack_module_state
inside = partial(checkpoint, use_reentrant=False)
slope, solve, f = torch.autograd.grad, solve_ivp, torch.tanh
cond, while_loop, jacrev = torch.cond, torch.while_loop, torch.func.jacrev


@torch.library.custom_op("refuses::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    RUNS.append(x.shape)
    return 2 * x


class Twice(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(twice)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def asserts(x):
    assert x.isfinite().all()


def pads(params, x, padding):
    return encode(params, x, src_key_padding_mask=padding)


def masked(params, x, **options):
    return encode(params, x, mask=x[0, :, :1] * torch.ones(8), **options)


# The messages that the page lists, and what provokes each
MESSAGES = """
Got in_dim=0 for = vmap(lambda x, f: f(x))(XS, nn.Linear(6, 2))
same size in the mapped dimension = vmap(torch.add)(XS, BATCH)
in_dims is not compatible with the structure = vmap(call, (0,))(STACK, XS)
must only return Tensors = vmap(lambda x: (x.sum(), "loss"))(XS)
input.size(-2) should match other.size(-2) = vmap(torch.linalg.lstsq)(XS, YS)
too many indices for tensor = vmap(lambda x: x[:, :, 0])(XS)
expected 4D input (got 3D input) = vmap(nn.BatchNorm2d(8).eval())(XS[:, None].float())
NestedTensorImpl doesn't support sizes = vmap(lambda x: NESTED @ x.T)(XS)
data-dependent control flow = vmap(lambda x: x if x.sum() > 0 else -x)(XS)
calling .item() on a Tensor = vmap(lambda x: x / x.max().item())(XS)
Cannot access data pointer of Tensor = vmap(lambda x: x.numpy())(XS)
can support dynamic shape = vmap(lambda x: x[x > 0])(XS)
can output dynamic shape = vmap(torch.nonzero)(XS)
return a differently shaped Tensor = vmap(lambda x: x.masked_select(x > 0))(XS)
Cannot access storage of BatchedTensorImpl = vmap(lambda x: while_loop(*STEP, (x,)))(XS)
Expected FakeTensor = vmap(grad(lambda x: cond(x.max() > 1, f, f, (x,)).sum()))(XS)
is not possible because there exists a Tensor = vmap(zeros(8, 6).copy_)(XS)
doesn't match the broadcast shape = vmap(zeros(8, 6).add_)(XS)
randomness error mode = vmap(nn.Dropout())(XS)
Cannot ask for different inplace randomness = draw(lambda x: nn.Linear(6, 2))(XS)
Batch norm got a batched tensor = vmap(nn.BatchNorm1d(6).double())(XS)
Batching rule not implemented = vmap(lambda x: torch.sin(x, out=zeros(8, 6)))(XS)
aten::lstm = vmap(nn.LSTM(6, 5).double())(XS)
aten::lstm_cell = vmap(nn.LSTMCell(6, 5).double())(XS)
aten::gru = vmap(nn.GRU(6, 5).double())(XS)
aten::rnn_tanh = vmap(nn.RNN(6, 5).double())(XS)
aten::equal = vmap(lambda x: x * torch.equal(x, x))(XS)
aten::_nested_tensor_from_mask = vmap(pads)(*PX, PADDING)
Could not run 'aten::stack' = vmap(pads, (0, None, None))(*SHARED)
derivative for aten::_transformer_encoder_layer_fwd = vmap(encode)(*PX).sum().backward()
expand is unsupported for Sparse = vmap(lambda x: SPARSE @ x)(XS)
Sparse CSR tensors do not have = vmap(grad(lambda x: (CSR @ x).sum()))(XS)
reshape is not implemented for sparse tensors = vmap(embed)(IDS, LEAF).sum().backward()
There is a performance drop = vmap(lambda i: i.bincount(minlength=10))(IDS)
attempting to call Tensor.requires_grad_() = vmap(lambda x: x.requires_grad_())(XS)
backward() called inside = vmap(lambda x: x.sum().backward())(XS)
does not require grad and does not have = vmap(lambda x: slope(x.sum(), x))(XS)
override the setup_context staticmethod = vmap(OldSign.apply)(XS)
does not have vmap support = vmap(NoRule.apply)(XS)
You must implement the jvp function = torch.func.hessian(times(Reverse.apply))(YS[0])
don't yet support saved tensor hooks = grad(lambda x: inside(torch.sum, x))(XS)
your tensor may have escaped = vmap(KEPT.append, out_dims=None)(XS), KEPT[0] + 1
stack expects each tensor to be equal size = stack([nn.Linear(6, 2), nn.Linear(6, 3)])
Expected all models to be of the same class = stack([nn.Linear(6, 2), nn.ReLU()])
the same training/eval mode = stack([nn.ReLU(), nn.ReLU().eval()])
t() expects a tensor with <= 2 dimensions = call(STACK, BATCH)
expected stride to be a single integer = conv_call(CONVS, IMAGES[0])
"""
# What else the page says is refused, with words of a message in the list
ALSO = """
Got in_dim=0 for some input = vmap(torch.add)(torch.tensor(1.0), XS)
must only return Tensors = vmap(lambda x: (x, None))(XS)
must only return Tensors = vmap(lambda x: (x, 3))(XS)
must only return Tensors = vmap(Data)(XS)
data-dependent control flow = vmap(lambda x: x if x.sum() > 0 and x.any() else -x)(XS)
data-dependent control flow = vmap(lambda x: max(x[0, 0], x[0, 1]))(XS)
data-dependent control flow = vmap(lambda x: sorted(x[0]))(XS)
data-dependent control flow = vmap(asserts)(XS)
data-dependent control flow = vmap(F.gaussian_nll_loss)(XS, XS, XS.exp())
data-dependent control flow = vmap(masked)(*PX)
calling .item() on a Tensor = vmap(lambda x: torch.tensor([x[0, 0], x[1, 1]]))(XS)
calling .item() on a Tensor = vmap(lambda x: range(x[:, 0].argmax()))(XS)
calling .item() on a Tensor = vmap(lambda x: RATES[x[0].argmax()])(XS)
calling .item() on a Tensor = vmap(lambda x: f"{x.sum():.2f}")(XS)
Cannot access data pointer = vmap(lambda x: x.tolist())(XS)
Cannot access data pointer = vmap(lambda x: solve(torch.neg, (0, 1), x[0]))(XS)
index_add_(self = vmap(lambda x: zeros(3, 6).index_add_(0, ROWS, x))(XS)
scatter_add_(self = vmap(lambda y: zeros(3).scatter_add_(0, ROWS, y))(YS)
exists a Tensor = vmap(lambda w: BATCH.new_zeros(6).copy_(w))(WS)
inplace randomness = draw(lambda x: torch.distributions.Normal(x, 1).rsample())(XS)
unsupported for SparseCsr = vmap(lambda x: CSR @ x)(XS)
to be equal size = vmap(lambda x: torch.argwhere(x > 1))(XS)
to be equal size = vmap(lambda x: (x[0] ** 4).int().bincount())(XS)
of the same class = stack([weight_norm(nn.Linear(6, 2)) for _ in XS])
override the setup_context = vmap(lambda x: checkpoint(f, x, use_reentrant=True))(XS)
override the setup_context = vmap(grad(lambda x: twice(x).sum()))(XS)
t() expects a tensor = vmap(call, in_dims=(None, 0))(STACK, XS)
expected stride = vmap(conv_call, in_dims=(None, 0))(CONVS, IMAGES)
"""


@pytest.mark.parametrize("line", (MESSAGES + ALSO[1:]).strip().splitlines())
def test_the_mistake_has_the_message(line):
    words, _, mistake = line.partition(" = ")
    with warnings.catch_warnings(action="ignore"):
        warnings.filterwarnings("error", message=".*performance drop.*aten::bincount")
        with pytest.raises(Exception, match=re.escape(words)):
            eval(mistake)


def test_every_message_that_the_page_lists_is_provoked_here():
    text = re.sub(r"\n#\s*", " ", text_of(PAGE))
    text = re.search(r"\*\*About in_dim.+?``data-dependent control flow`` --", text)[0]
    rows = re.findall(r" - (``.+?``): ", text)
    words = [word for row in rows for word in re.findall("``(.+?)``", row)]
    named = [w for w in re.findall("``(aten::.+?)``", text) if w not in words]
    provoked = [line.partition(" = ")[0] for line in MESSAGES.strip().splitlines()]
    assert sorted(words + named) == sorted([*provoked, "aten::nonzero"])


def halve_while(x):
    while x.abs().max() > 0.1:
        x = x / 2
    return x


def halve_for(x):
    for _ in range(10):
        x = torch.where(x.abs().max() > 0.1, x / 2, x)
    return x


def of_gradient(function, x):
    """What autograd says, for one member."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


NORM = nn.BatchNorm1d(6).double().eval()
# What the page says to write, and what a loop of something else computes
WRITE = """
torch.linalg.lstsq(x, y[..., None]).solution[..., 0] = torch.linalg.lstsq(x, y).solution
(NESTED.to_padded_tensor(0.0) @ x.T)[1, :2] = XS[1, :2] @ x.T
Named(x.sin()).x = x.sin()
vars(Data(x.sin()))["x"] = Data(x.sin()).x
halve_for(x) = halve_while(x)
torch.where(y[0] > 0, x.sin(), x.cos()) = x.sin() if y[0] > 0 else x.cos()
x.new_zeros(3, 6).index_add_(0, ROWS, x) = zeros(3, 6).index_add_(0, ROWS, x)
zeros(3).scatter_add(0, ROWS, y) = zeros(3).scatter_add_(0, ROWS, y)
torch.zeros_like(x).copy_(x) = zeros(8, 6).copy_(x)
F.pad(BATCH @ x[0], (1, 1)) = torch.cat([zeros(1), BATCH @ x[0], zeros(1)])
NORM(x) = NORM(x)
(y == y).all() = torch.tensor(torch.equal(y, y))
F.embedding(i, t).mean(-2) = F.embedding_bag(i[None], t)[0]
torch.maximum(y[0], y[1]) = max(y[0], y[1])
torch.where(y > 0, 0, y) = y.masked_fill(y > 0, 0)
torch.where(y > 0, y, torch.nan).nanmean() = y[y > 0].mean()
torch.stack([y[0], y[1]]) = torch.tensor([y[0], y[1]])
torch.tensor(RATES)[x[0].argmax()] = torch.tensor(RATES[x[0].argmax()])
F.one_hot(i, 10).sum(0) = torch.bincount(i, minlength=10)
grad(finite)(y) = torch.where(y > 0, 0.5 / y.abs().sqrt(), 0)
grad(times(Sign.apply))(y) = of_gradient(times(OldSign.apply), y)
grad(times(Reverse.apply))(y) = 2 * y.flip(-1)
grad(times(Twice.apply))(y) = 4 * y
jacrev(jacrev(times(Reverse.apply)))(y) = 2 * torch.eye(8).double().flip(-1)
"""


def finite(x):
    return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0).sum()


def times(function):
    return lambda y: (function(y) * y).sum()


@pytest.mark.parametrize("line", WRITE.strip().splitlines())
def test_what_to_write_equals_a_loop(line):
    write, replaced = (eval(f"lambda x, y, i, t: {c}") for c in line.split(" = "))
    inputs = XS, YS, IDS, TABLES
    expected = loop(replaced, *inputs)
    torch.testing.assert_close(vmap(write)(*inputs), expected, rtol=0, atol=1e-10)


def test_other_clauses():
    for other in ("loss", 3, None):
        found = vmap(lambda x, y=other: (x.sum(), y), out_dims=(0, None))(XS)
        assert found[1] == other
    shared = vmap(call, in_dims=({"weight": 0, "bias": 0}, None))(STACK, BATCH)
    assert torch.equal(shared, vmap(call, in_dims=(0, None))(STACK, BATCH))
    torch.testing.assert_close(shared, torch.stack([m(BATCH) for m in LINEARS]))
    scaled = vmap(lambda x, s: x * s.item(), in_dims=(0, None))(XS, torch.tensor(2.0))
    assert torch.equal(scaled, 2 * XS)
    spoiled = vmap(grad(lambda x: torch.where(x > 0, x.sqrt(), 0).sum()))(XS)
    assert spoiled.isnan().any()
    cut = [x[mask] for x, mask in zip(*vmap(lambda x: (x, x > 0))(XS), strict=True)]
    assert all(torch.equal(a, x[x > 0]) for a, x in zip(cut, XS, strict=True))


def test_members_become_columns_of_a_sparse_product():
    xs = XS
    text = re.sub(r"\n# *", " ", text_of(PAGE))
    (line,) = re.findall(r"``(\(A @ .+?)``", text)
    for matrix in SPARSE, CSR:
        expected = SPARSE.to_dense() @ xs
        torch.testing.assert_close(eval(line, {"A": matrix, "xs": xs}), expected)


def test_without_the_fast_path_the_encoder_equals_a_loop():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        found = vmap(pads)(*PX, PADDING)
        vmap(encode)(*PX).sum().backward()
        caused = vmap(partial(masked, is_causal=False))(*PX)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    for i, (model, x, padding) in enumerate(zip(MODELS, PX[1], PADDING, strict=True)):
        mask = x[0, :, :1] * torch.ones(8)
        torch.testing.assert_close(found[i], model(x, src_key_padding_mask=padding))
        torch.testing.assert_close(caused[i], model(x, mask=mask))


def odeint(field, z, h):
    """Euler's method, whose step has to be small enough."""
    while (h * field(0, z)).abs().max() > 1e-2:
        h = h / 2
    for step in range(round(1 / h)):
        z = z + h * field(step * h, z)
    return z


def test_a_solver_that_adapts_its_steps_stands_outside():
    rates, start = torch.tensor([0.5, 1.0, 2.0]), torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="data-dependent"):
        vmap(lambda r, z: odeint(lambda t, z: -r * z, z, 0.5))(rates, start)
    found = odeint(lambda t, z: vmap(torch.mul)(-rates, z), start, 0.5)
    expected = (-rates).exp()[:, None].expand(3, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)


def test_weight_norm_is_accepted_in_a_sequential():
    params, call, models = stacked(lambda: nn.Sequential(weight_norm(nn.Linear(6, 2))))
    expected = torch.stack([model(x) for model, x in zip(models, XS, strict=True)])
    torch.testing.assert_close(vmap(call)(params, XS), expected)


def test_momentum_none_has_another_form():
    norms = [nn.BatchNorm1d(6, momentum=None).double() for _ in XS]
    params, buffers = stack_module_state(norms)
    skeleton = nn.BatchNorm1d(6, momentum=None, device="meta")

    def norm_call(params, buffers, x):
        return functional_call(skeleton, (params, buffers), (x,), strict=True)

    with pytest.raises(RuntimeError, match=r"calling \.item"):
        vmap(norm_call)(params, buffers, XS)
    for step in [1, 2, 3]:
        skeleton.momentum = 1 / step
        vmap(norm_call)(params, buffers, step * XS)
        _ = [norm(step * x) for norm, x in zip(norms, XS, strict=True)]
    means = torch.stack([norm.running_mean for norm in norms])
    torch.testing.assert_close(buffers["running_mean"], means)


def test_checkpoints_stand_around_vmap():
    def f(x):
        return torch.tanh(x).square().sum()

    x = XS.clone().requires_grad_()
    # torch 2.11 refuses the call, 2.13 the way back
    with pytest.raises(RuntimeError, match=r"vmap support|may have escaped"):
        vmap(lambda x: inside(f, x))(x).sum().backward()
    x.grad = None
    checkpoint(vmap(f), x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, vmap(grad(f))(XS))


def test_the_filter_misses_the_loop_of_a_custom_operator():
    RUNS.clear()
    with warnings.catch_warnings(action="error"):
        vmap(twice)(XS)
    assert len(RUNS) == len(XS)
