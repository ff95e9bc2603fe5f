"""What plot_what_vmap_runs.py says of operators: which ones run, and how many."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pages import names_of
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

WANTED = ["Operators", "attention", "lstm_cell", "recurrent"]
PAGE = names_of("speed/plot_what_vmap_runs", *WANTED)
Operators, attention, lstm_cell, recurrent = map(PAGE.get, WANTED)


def calls_of(seen, name):
    """What the page would print of this operator: its shapes and integers."""
    calls = [call.partition(" ") for call in seen.calls]
    return [rest for operator, _, rest in calls if operator.split(".")[1] == name]


def make_cnn():
    """That of the page, with fewer channels and pixels."""
    return nn.Sequential(
        *[nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU()],
        *[nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 16), nn.ReLU()],
        nn.Linear(16, 10),
    )


def stacked(make, count):
    """Models, their stack, and the page's ``member`` for it."""
    with torch.device("meta"):
        skeleton = make()
    models = [make() for _ in range(count)]

    def member(state, x):
        return functional_call(skeleton, state, (x,), strict=True)

    return models, stack_module_state(models), member


def test_the_number_of_operators_does_not_grow_with_the_models():
    numbers = set()
    for count in (2, 5, 9):
        _, state, member = stacked(make_cnn, count)
        with Operators() as there:
            loss = vmap(member)(state, torch.randn(count, 2, 1, 10, 10)).sum()
        with Operators() as back:
            loss.backward()
        numbers.add((len(there.calls), len(back.calls)))
    assert len(numbers) == 1


def test_a_linear_layer_gains_nothing_from_a_shared_input():
    with Operators() as seen:
        args = torch.randn(5, 7), torch.randn(3, 4, 7), torch.randn(3, 4)
        vmap(F.linear, in_dims=(None, 0, 0))(*args)
    assert calls_of(seen, "bmm") == ["[3, 5, 7] [3, 7, 4]"]


def test_a_convolution_with_a_shared_input_is_one_wide_convolution():
    args = torch.randn(5, 7, 9, 9), torch.randn(3, 4, 7, 3, 3), torch.randn(3, 4)
    with Operators() as seen:
        vmap(F.conv2d, in_dims=(None, 0, 0))(*args)
    assert calls_of(seen, "convolution") == ["[5, 7, 9, 9] [12, 7, 3, 3] 1"]
    assert not calls_of(seen, "clone")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_attention_written_out_is_the_fused_one():
    qkv = torch.randn(3, 4, 2, 3, 5, 8, dtype=torch.float64)
    fused = vmap(F.scaled_dot_product_attention)(*qkv)
    torch.testing.assert_close(vmap(attention)(*qkv), fused, atol=1e-12, rtol=0)


def test_a_transformer_layer_in_training_loops_over_nothing_with_the_math_backend():
    def make():
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    models, state, member = stacked(make, 3)
    x = torch.randn(2, 5, 8)
    with sdpa_kernel(SDPBackend.MATH):
        vmap(grad(lambda s, x: member(s, x).square().sum()), in_dims=(0, None))(
            state, x
        )
        outputs = vmap(member, in_dims=(0, None))(state, x)
    expected = torch.stack([model(x) for model in models])
    torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize(
    "option", [{"bidirectional": True}, {"proj_size": 2}, {"bias": False}]
)
def test_what_the_written_out_cells_lack_is_an_error(option):
    params, _ = stack_module_state([nn.LSTM(5, 5, **option) for _ in range(2)])
    with pytest.raises((KeyError, RuntimeError)):
        vmap(partial(recurrent, lstm_cell))(params, torch.randn(2, 7, 3, 5))
