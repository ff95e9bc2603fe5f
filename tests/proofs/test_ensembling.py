"""What plot_ensembling.py says in a clause: the network of that page, few images."""

import copy

import pytest
import torch
from pages import names_of
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode

PAGE = names_of("basics/plot_ensembling", "SimpleCNN", "predict")
SimpleCNN, predict = PAGE["SimpleCNN"], PAGE["predict"]
PAGE["skeleton"] = SimpleCNN().to("meta")


def loop(models, x, in_dim):
    rows = x if in_dim == 0 else [x] * len(models)
    return torch.stack([model(row) for model, row in zip(models, rows, strict=True)])


def one_call(models, x, in_dim):
    return vmap(predict, in_dims=(0, 0, in_dim))(*stack_module_state(models), x)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def models():
    torch.manual_seed(0)
    return [SimpleCNN() for _ in range(4)]


@pytest.fixture
def data():
    return torch.randn(4, 2, 1, 28, 28, generator=torch.Generator().manual_seed(1))


OPTIONS = pytest.mark.parametrize("in_dim", [0, None], ids=["own", "shared"])


@OPTIONS
def test_loop_and_vmap_are_one_function_in_float64(models, data, in_dim):
    exact = [model.double() for model in models]
    x = (data if in_dim == 0 else data[0]).double()
    distance = (one_call(exact, x, in_dim) - loop(exact, x, in_dim)).abs().max()
    assert distance < 1e-14


@OPTIONS
def test_vmap_is_as_near_to_float64_as_the_loop(models, data, in_dim):
    x = data if in_dim == 0 else data[0]
    exact = loop([copy.deepcopy(m).double() for m in models], x.double(), in_dim)
    loop_error = (loop(models, x, in_dim) - exact).abs().max()
    vmap_error = (one_call(models, x, in_dim) - exact).abs().max()
    # Each is the largest of many roundings and differs by chance; a mistake is
    # thousands of times as large.
    assert vmap_error < 3 * loop_error.clamp(min=1e-7)


@OPTIONS
def test_loop_and_vmap_do_the_same_arithmetic(models, data, in_dim):
    x = data if in_dim == 0 else data[0]
    counts = []
    for way in (loop, one_call):
        with FlopCounterMode(display=False) as counter:
            way(models, x, in_dim)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_change_of_a_model_does_not_reach_the_stack(models):
    params, _ = stack_module_state(models)
    before = params["fc2.bias"].clone()
    models[3].fc2.bias += 1
    assert torch.equal(params["fc2.bias"], before)


def test_a_shared_minibatch_without_none_is_refused_unless_sizes_agree(models, data):
    with pytest.raises(ValueError, match="same size in the mapped dimension"):
        vmap(predict)(*stack_module_state(models), data[0])
    linear = [nn.Linear(6, 3) for _ in range(4)]
    images = torch.randn(4, 6)  # shared, but as many as models: no error
    out = vmap(lambda p, x: functional_call(linear[0], p, (x,)))(
        stack_module_state(linear)[0], images
    )
    assert out.shape == (4, 3)  # and not [4, 4, 3]


def test_python_runs_once_for_all_models(data):
    seen = []

    def remember(x):
        seen.append(x.shape)
        return x + 1

    vmap(remember)(data)
    assert seen == [data.shape[1:]]
