"""What plot_how_equal.py says in a clause, with the tolerance of that page itself."""

import re

import pytest
import torch
import torch.nn.functional as F
from pages import cells_of, names_of
from torch.func import stack_module_state, vmap

PAGE = names_of("speed/plot_how_equal")
tolerance, SimpleCNN, predict = map(PAGE.get, ["tolerance", "SimpleCNN", "predict"])
PAGE["skeleton"] = SimpleCNN().to("meta")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def looped(params, x):
    return PAGE["loop_over"](predict, params, x)


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
        x, labels = torch.randn(8, 1, 28, 28), torch.randint(10, (8,))
    fresh, _ = stack_module_state(models)
    parameters = [p for model in models for p in model.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(10):
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


@each_state
@each_dtype
def test_each_side_is_within_half_of_it_from_float64(states, state, dtype):
    params, x, *sides = run(states, state, dtype)
    exact = looped({n: p.double() for n, p in params.items()}, x.double())
    for side in sides:
        assert distance(side, exact) <= tolerance(sides[0], 4, 9216) / 2


@each_state
@each_dtype
def test_the_tolerance_refuses_exchanged_members(states, state, dtype):
    _, _, loop, one_call = run(states, state, dtype)
    assert distance(one_call.flip(0), loop) > tolerance(loop, 4, 9216)


def test_float64_notices_all_weights_of_fc1_and_float32_fewer_after_training(states):
    parts, PAGE["images"] = {}, states[1]
    for state, params in states[0].items():
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            moves = PAGE["moves"](params, "fc1.weight")
        assert len(moves) >= 5
        assert (moves > 1e-10).all()
        _, _, loop, _ = run(states, state, torch.float32)
        noticed = moves > tolerance(loop, 4, 9216)
        parts[state] = noticed.double().mean().item()
    assert parts["fresh"] > 0.5 > parts["trained"]


def test_the_block_that_asks_for_ieee_float32_puts_the_switches_back():
    prose = "\n".join(cell.prose for cell in cells_of("speed/plot_how_equal"))
    block = re.search(r"code-block:: python\n\n((?:   .*\n)+)", prose)[1]
    seen = []

    def side(x, *state):
        seen.append((conv.fp32_precision, matmul.fp32_precision))
        return x

    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    names = {"torch": torch, "conv": conv, "matmul": matmul, "state": []}
    names |= {"plain_loop": side, "one_call": side, "x": torch.ones(2)}
    exec(re.sub("^   ", "", block, flags=re.MULTILINE), names)
    assert seen == [("ieee", "ieee")] * 2
    assert (conv.fp32_precision, matmul.fp32_precision) == before
