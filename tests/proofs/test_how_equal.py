"""What plot_how_equal.py says in a clause, by the functions of that page itself."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pages import names_of, text_of
from torch.func import stack_module_state, vmap

PAGE = names_of("speed/plot_how_equal")
member, loop, in64, predict = map(PAGE.get, ["member", "loop", "in64", "predict"])
distance, allowed, SimpleCNN = map(PAGE.get, ["distance", "allowed", "SimpleCNN"])
PAGE["skeleton"] = SimpleCNN().to("meta")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def sides(function, params, x, dtype):
    params, x = {n: p.detach().to(dtype) for n, p in params.items()}, x.to(dtype)
    one_call = vmap(function, in_dims=(0, None))(params, x)
    return loop(function, params, x), one_call, loop(function, in64(params), x.double())


def mlps(seed, inputs=64):
    random = torch.Generator().manual_seed(seed)
    shapes = {"w1": (8, 128, inputs), "b1": (8, 128), "w2": (8, 10, 128), "b2": (8, 10)}
    params = {n: torch.randn(s, generator=random) / 8 for n, s in shapes.items()}
    return params, torch.randn(16, inputs, generator=random)


@pytest.fixture(scope="module")
def states():
    """Stacked parameters of two members, before and after training, and images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [SimpleCNN() for _ in range(2)]
        x, labels = torch.randn(8, 1, 28, 28), torch.randint(10, (8,))
    fresh, _ = stack_module_state(models)
    optimizer = torch.optim.Adam([p for m in models for p in m.parameters()], lr=2e-3)
    for _ in range(10):
        optimizer.zero_grad()
        sum(F.cross_entropy(model(x), labels) for model in models).backward()
        optimizer.step()
    return {"fresh": fresh, "trained": stack_module_state(models)[0]}, x


@each_dtype
@pytest.mark.parametrize("state", ["fresh", "trained"])
def test_a_cnn_uses_less_than_half_of_the_tolerance(states, state, dtype):
    looped, one_call, exact = sides(predict, states[0][state], states[1], dtype)
    assert distance(one_call, exact) < allowed(looped, exact) / 2
    assert distance(one_call.flip(0), exact) > allowed(looped, exact)


@each_dtype
@pytest.mark.parametrize("inputs", [2, 64, 784])
def test_mlps_use_less_than_half_of_the_tolerance(inputs, dtype):
    for seed in range(10):
        looped, one_call, exact = sides(member, *mlps(seed, inputs), dtype)
        assert distance(one_call, exact) < allowed(looped, exact) / 2


def test_correct_code_is_refused_at_times_by_one_logit_and_never_by_some_dozens():
    refused = {1: 0, 32: 0}
    for seed in range(5):
        results = sides(member, *mlps(seed), torch.float16)
        for size in refused:
            groups = zip(*(r.flatten().split(size) for r in results), strict=True)
            refused[size] += sum(distance(b, e) >= allowed(a, e) for a, b, e in groups)
    assert refused[32] == 0 < refused[1]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_one_call_rounds_before_and_after_the_bias_and_the_loop_once(dtype):
    x, w, b = (torch.randn(s).to(dtype) for s in [(16, 64), (8, 128, 64), (8, 128)])
    looped = torch.stack([F.linear(x, *row) for row in zip(w, b, strict=True)])
    one_call = vmap(F.linear, in_dims=(None, 0, 0))(x, w, b)
    assert torch.equal(one_call, x @ w.mT + b[:, None])
    exact = x.double() @ w.double().mT + b.double()[:, None]
    half_a_digit = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6
    assert ((looped.double() - exact).abs() <= half_a_digit).all()


@pytest.mark.parametrize("seed", range(6))
def test_one_running_sum_is_4_to_11_times_as_far_as_sixteen(seed):
    random = np.random.default_rng(seed)
    products = random.standard_normal((2, 480, 9216), np.float32).prod(0)
    exact, one = products.sum(-1, float), products.cumsum(-1)[:, -1]
    sixteen = products.reshape(480, 16, 576).cumsum(-1)[..., -1].cumsum(-1)[:, -1]
    assert 3.5 < abs(one - exact).max() / abs(sixteen - exact).max() < 11.5


@pytest.mark.parametrize("name", ["fc1.weight", "fc2.weight"])
def test_a_weight_moves_no_logit_where_its_input_or_its_unit_is_zero(states, name):
    params, x = states[0]["trained"], states[1]
    model, seen = SimpleCNN().double(), {}
    model.load_state_dict({n: p[0].double() for n, p in params.items()})
    model.fc1.register_forward_hook(lambda _, x, y: seen.update(x=x[0], y=F.relu(y)))
    model(x.double())
    used = torch.einsum("iu,if->uf", seen["y"], seen["x"]) > 0
    used = used if name == "fc1.weight" else seen["y"].sum(0).expand(10, -1) > 0
    PAGE["images"] = x
    torch.manual_seed(0)
    moved = PAGE["moves"](params, name) > 0
    torch.manual_seed(0)
    drawn = torch.randint(used.numel(), (24,))
    assert torch.equal(moved, used.flatten()[drawn])


@each_dtype
def test_the_page_names_the_defaults_of_assert_close(dtype):
    with pytest.raises(AssertionError) as problem:
        torch.testing.assert_close(*torch.eye(2, dtype=dtype))
    atol, rtol = map(float, re.findall(r"up to (\S+) allowed", str(problem.value)))
    known = re.search(rf"{dtype}: (\S+?)[,}}]", text_of("speed/plot_how_equal"))
    assert (atol, rtol) == (1e-5, float(known[1]))
