"""What plot_what_vmap_runs.py says of operators: which ones run, and how many."""

import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from pages import names_of
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

WANTED = ["Operators", "attention", "gru_cell", "lstm_cell", "recurrent"]
PAGE = names_of("speed/plot_what_vmap_runs", *WANTED)
Operators, attention, gru_cell, lstm_cell, recurrent = map(PAGE.get, WANTED)


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


def cnn_operators(count, looped):
    """Number of operators forward and backward."""
    models, state, member = stacked(make_cnn, count)
    x = torch.randn(count, 2, 1, 10, 10)
    with Operators() as there:
        if looped:
            result = torch.stack([m(row) for m, row in zip(models, x, strict=True)])
        else:
            result = vmap(member)(state, x)
    loss = result.sum()
    with Operators() as back:
        loss.backward()
    return len(there.calls), len(back.calls)


def test_operators_of_vmap_do_not_grow_with_the_models():
    assert len({cnn_operators(count, looped=False) for count in (2, 3, 5, 9)}) == 1


def test_operators_of_the_loop_grow_on_a_straight_line():
    counts = [cnn_operators(count, looped=True) for count in (2, 3, 4, 5)]
    for numbers in zip(*counts, strict=True):
        steps = {b - a for a, b in pairwise(numbers)}
        assert len(steps) == 1
        assert steps.pop() > 0


def test_a_linear_layer_becomes_a_batched_product_and_an_addition():
    x, weight, bias = torch.randn(5, 7), torch.randn(3, 4, 7), torch.randn(3, 4)
    with Operators() as seen:
        vmap(F.linear)(torch.randn(3, 5, 7), weight, bias)
    assert calls_of(seen, "bmm") == ["[3, 5, 7] [3, 7, 4]"]
    assert calls_of(seen, "add")
    with Operators() as single:
        F.linear(x, weight[0], bias[0])
    assert single.calls == ["aten.addmm.default [4] [5, 7] [7, 4]"]


def test_a_linear_layer_gains_nothing_from_a_shared_input():
    with Operators() as seen:
        args = torch.randn(5, 7), torch.randn(3, 4, 7), torch.randn(3, 4)
        vmap(F.linear, in_dims=(None, 0, 0))(*args)
    assert calls_of(seen, "bmm") == ["[3, 5, 7] [3, 7, 4]"]


def test_a_convolution_with_an_input_of_its_own_is_grouped():
    weight = torch.randn(3, 4, 7, 3, 3, requires_grad=True)
    with Operators() as seen:
        y = vmap(F.conv2d)(torch.randn(3, 5, 7, 9, 9), weight, torch.randn(3, 4))
    assert calls_of(seen, "convolution") == ["[5, 21, 9, 9] [12, 7, 3, 3] 3"]
    assert calls_of(seen, "clone")
    assert calls_of(seen, "add")
    loss = y.sum()
    with Operators() as back:
        loss.backward()
    (call,) = calls_of(back, "convolution_backward")
    assert call.endswith("[5, 21, 9, 9] [12, 7, 3, 3] 3")


def test_a_convolution_with_a_shared_input_is_one_wide_convolution():
    args = torch.randn(5, 7, 9, 9), torch.randn(3, 4, 7, 3, 3), torch.randn(3, 4)
    with Operators() as seen:
        vmap(F.conv2d, in_dims=(None, 0, 0))(*args)
    assert calls_of(seen, "convolution") == ["[5, 7, 9, 9] [12, 7, 3, 3] 1"]
    assert not calls_of(seen, "clone")


def test_groups_multiply():
    with Operators() as seen:
        args = torch.randn(3, 5, 8, 9, 9), torch.randn(3, 8, 1, 3, 3)
        vmap(lambda x, weight: F.conv2d(x, weight, groups=8))(*args)
    assert calls_of(seen, "convolution") == ["[5, 24, 9, 9] [24, 1, 3, 3] 24"]


def test_pooling_folds_the_models_into_the_batch():
    with Operators() as seen:
        vmap(lambda x: F.max_pool2d(x, 2))(torch.randn(3, 5, 7, 8, 8))
    assert calls_of(seen, "max_pool2d_with_indices") == ["[15, 7, 8, 8]"]


def test_a_fallback_warns_by_these_words_and_runs_more_for_more_models():
    counts = []
    for count in (2, 3, 4):
        models, state, member = stacked(lambda: nn.GRUCell(4, 4), count)
        x = torch.randn(5, 4)
        expected = torch.stack([model(x) for model in models])
        words = "There is a performance drop .* batching rule for aten::gru_cell"
        with Operators() as seen, pytest.warns(UserWarning, match=words):
            result = vmap(member, in_dims=(0, None))(state, x)
        torch.testing.assert_close(result, expected)
        counts.append(len(seen.calls))
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell])
def test_recurrent_layers_are_refused(kind):
    _, state, member = stacked(lambda: kind(4, 4), 2)
    x = torch.randn(5, 4) if kind is nn.LSTMCell else torch.randn(3, 5, 4)
    with pytest.raises(RuntimeError, match="could not generate a fallback"):
        vmap(member, in_dims=(0, None))(state, x)


def test_attention_written_out_is_the_fused_one_and_loops_over_nothing():
    qkv = torch.randn(3, 4, 2, 3, 5, 8, dtype=torch.float64)
    gradients = {}
    with warnings.catch_warnings():
        for function in (attention, F.scaled_dot_product_attention):
            gradients[function] = vmap(
                grad(lambda *x, f=function: f(*x).square().sum(), argnums=(0, 1, 2))
            )(*qkv)
            warnings.filterwarnings("ignore", message="There is a performance drop")
    for ours, theirs in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


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


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(("kind", "cell"), [(nn.GRU, gru_cell), (nn.LSTM, lstm_cell)])
def test_cells_written_out_are_the_module_forward_and_backward(kind, cell, num_layers):
    models = [kind(3, 5, num_layers).double() for _ in range(4)]
    params, _ = stack_module_state(models)
    x = torch.randn(4, 7, 2, 3, dtype=torch.float64)
    outputs = vmap(partial(recurrent, cell))(params, x)
    expected = torch.stack([m(row)[0] for m, row in zip(models, x, strict=True)])
    torch.testing.assert_close(outputs, expected, atol=1e-12, rtol=0)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    for name, p in params.items():
        theirs = torch.stack([m.get_parameter(name).grad for m in models])
        torch.testing.assert_close(p.grad, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("option", ["bidirectional", "proj_size", "bias"])
@pytest.mark.parametrize(("kind", "cell"), [(nn.GRU, gru_cell), (nn.LSTM, lstm_cell)])
def test_what_the_written_out_cells_lack_is_an_error(kind, cell, option, num_layers):
    if kind is nn.GRU and option == "proj_size":
        return  # nn.GRU itself refuses it
    value = {"bidirectional": True, "proj_size": 2, "bias": False}[option]
    models = [kind(5, 5, num_layers, **{option: value}) for _ in range(2)]
    params, _ = stack_module_state(models)
    with pytest.raises((KeyError, RuntimeError)):
        vmap(partial(recurrent, cell))(params, torch.randn(2, 7, 3, 5))
