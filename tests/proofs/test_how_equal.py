"""What plot_how_equal.py says in a clause, with the tolerance of that page itself."""

import ast
import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

PAGE = Path(__file__).parents[2] / "tutorials" / "speed" / "plot_how_equal.py"
TREE = ast.parse(PAGE.read_text(encoding="utf-8"))
(FUNCTION,) = [node for node in TREE.body if getattr(node, "name", "") == "tolerance"]
exec(ast.unparse(FUNCTION))

DTYPES = {
    torch.float64: 2**-53,
    torch.float32: 2**-24,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}
FINE = [torch.float64, torch.float32]


class SimpleCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


with torch.device("meta"):
    SKELETON = SimpleCNN()


@torch.no_grad()
def predict(params, x):
    return functional_call(SKELETON, params, (x,), strict=True)


def looped(params, x):
    rows = [{name: p[i] for name, p in params.items()} for i in range(2)]
    return torch.stack([predict(row, x) for row in rows])


def vectorized(params, x):
    return vmap(predict, in_dims=(0, None))(params, x)


def distance(a, b):
    return (a.double() - b.double()).abs().max().item()


@pytest.fixture(scope="module")
def states():
    """Stacked parameters of two members, before and after training, and images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [SimpleCNN() for _ in range(2)]
        x, labels = torch.randn(16, 1, 28, 28), torch.randint(10, (16,))
    fresh, _ = stack_module_state(models)
    parameters = [p for model in models for p in model.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        sum(F.cross_entropy(model(x), labels) for model in models).backward()
        optimizer.step()
    trained, _ = stack_module_state(models)
    both = {"fresh": fresh, "trained": trained}
    return {key: {n: p.detach() for n, p in s.items()} for key, s in both.items()}, x


def run(states, state, dtype):
    """Parameters and images in that dtype, and the logits of loop and vmap."""
    every, x = states
    params, x = {n: p.to(dtype) for n, p in every[state].items()}, x.to(dtype)
    return params, x, looped(params, x), vectorized(params, x)


each_state = pytest.mark.parametrize("state", ["fresh", "trained"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_the_unit_roundoff_is_half_of_eps():
    for dtype, u in DTYPES.items():
        assert torch.finfo(dtype).eps / 2 == u


@each_state
@each_dtype
def test_the_tolerance_accepts_vmap(states, state, dtype):
    _, _, loop, one_call = run(states, state, dtype)
    assert distance(one_call, loop) <= tolerance(loop, 4, 9216)  # noqa: F821


@each_state
@each_dtype
def test_each_side_is_within_half_of_it_from_float64(states, state, dtype):
    params, x, *sides = run(states, state, dtype)
    exact = looped({n: p.double() for n, p in params.items()}, x.double())
    for side in sides:
        assert distance(side, exact) <= tolerance(sides[0], 4, 9216) / 2  # noqa: F821


@each_state
@each_dtype
def test_the_tolerance_refuses_exchanged_members(states, state, dtype):
    _, _, loop, one_call = run(states, state, dtype)
    assert distance(one_call.flip(0), loop) > tolerance(loop, 4, 9216)  # noqa: F821


@each_state
@pytest.mark.parametrize("dtype", FINE, ids=str)
def test_the_tolerance_refuses_a_wrong_weight_of_conv1(states, state, dtype):
    params, x, loop, _ = run(states, state, dtype)
    wrong = {name: p.clone() for name, p in params.items()}
    wrong["conv1.weight"][0, 0, 0, 1, 1] *= 1.1
    assert distance(vectorized(wrong, x), loop) > tolerance(loop, 4, 9216)  # noqa: F821


@torch.no_grad()
def moves_of_fc1(states, state, count=40):
    """How far wrong weights of fc1 move the logits: those that move any."""
    params, x, loop, _ = run(states, state, torch.float64)
    rows = torch.randperm(9216, generator=torch.Generator().manual_seed(0))[:count]
    found = []
    member = {name: p[0] for name, p in params.items()}
    for i, row in enumerate(rows.tolist()):
        wrong = member["fc1.weight"].clone()
        wrong[i, row] *= 1.1
        found.append(distance(predict(member | {"fc1.weight": wrong}, x), loop[0]))
    return torch.tensor([move for move in found if move > 0])


def test_float64_notices_all_weights_of_fc1_and_float32_fewer_after_training(states):
    parts = {}
    for state in states[0]:
        moves = moves_of_fc1(states, state)
        assert len(moves) >= 5
        assert (moves > 1e-10).all()
        _, _, loop, _ = run(states, state, torch.float32)
        noticed = moves > tolerance(loop, 4, 9216)  # noqa: F821
        parts[state] = noticed.double().mean().item()
    assert parts["fresh"] > 0.5 > parts["trained"]


@each_state
@each_dtype
def test_a_class_changes_only_where_the_margin_is_small(states, state, dtype):
    params, x, *sides = run(states, state, dtype)
    exact = looped({n: p.double() for n, p in params.items()}, x.double())
    first, second = exact.topk(2).values.unbind(-1)
    for side in sides:
        error = (side.double() - exact).abs().amax(-1)
        changed = side.argmax(-1) != exact.argmax(-1)
        assert not (changed & (first - second > 2 * error)).any()


def test_rows_of_a_stack_train_as_models_with_optimizers_of_their_own():
    """The page's loop runs over rows of a stack with one optimizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [nn.Linear(3, 1).double() for _ in range(2)]
        x = torch.randn(8, 3, dtype=torch.float64)
    start, _ = stack_module_state(models)
    rows = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    optimizer = torch.optim.Adam(rows.values(), lr=0.01)
    skeleton = copy.deepcopy(models[0]).to("meta")
    own = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
    for _ in range(20):
        optimizer.zero_grad()
        members = [{n: p[i] for n, p in rows.items()} for i in range(2)]
        sum(
            functional_call(skeleton, m, (x,)).square().mean() for m in members
        ).backward()
        optimizer.step()
        for model, one in zip(models, own, strict=True):
            one.zero_grad()
            model(x).square().mean().backward()
            one.step()
    for name, p in stack_module_state(models)[0].items():
        torch.testing.assert_close(rows[name], p, atol=1e-12, rtol=0)


def test_the_block_of_the_first_screen_puts_the_switches_back():
    block = re.search(
        r"code-block:: python\n\n((?:   .*\n)+)", ast.get_docstring(TREE, clean=False)
    )[1]
    seen = []

    def side(x, *state):
        seen.append((conv.fp32_precision, matmul.fp32_precision))
        return x

    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    names = {"torch": torch, "plain_loop": side, "one_call": side}
    names |= {"state": [], "x": torch.ones(2)}
    exec(re.sub("^   ", "", block, flags=re.MULTILINE), names)
    assert seen == [("ieee", "ieee")] * 2
    assert (conv.fp32_precision, matmul.fp32_precision) == before
