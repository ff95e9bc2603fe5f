"""What plot_recurrent.py says in a clause."""

from functools import partial

import pytest
import torch
from pages import names_of
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils.rnn import pack_sequence, pad_sequence

PAGE = names_of("basics/plot_recurrent")
unroll, ensemble, operators = map(PAGE.get, ["unroll", "ensemble", "operators"])
UNROLLED = {nn.LSTM: PAGE["UnrolledLSTM"], nn.GRU: PAGE["UnrolledGRU"]}
DOUBLE = {"dtype": torch.float64}
X = torch.randn(3, 4, 7, 5, **DOUBLE)
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)


@pytest.fixture(params=UNROLLED)
def kind(request):
    return request.param


def members(kind, **options):
    return ensemble(kind, UNROLLED[kind], 3, 5, 6, **DOUBLE | options)


def loop(layers):
    return torch.stack([layer(x)[0] for layer, x in zip(layers, X, strict=True)])


def test_gradients_are_those_of_the_modules(kind):
    layers, weights, call = members(kind, num_layers=2)
    vmap(call)(weights, X)[0].sin().sum().backward()
    loop(layers).sin().sum().backward()
    for name, weight in weights.items():
        close(weight.grad, torch.stack([m.get_parameter(name).grad for m in layers]))


def test_time_first_and_without_a_batch(kind):
    layer = UNROLLED[kind](5, 6, num_layers=2, **DOUBLE)
    for x in X[0], X[0, 0]:
        close(layer(x), kind.forward(layer, x))


def test_dropout_between_layers(kind):
    layers, weights, call = members(kind, num_layers=2, dropout=1 - 1e-9)
    close(vmap(call, randomness="different")(weights, X)[0], loop(layers))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(call)(weights, X)
    call.args[0].eval()
    close(vmap(call)(weights, X)[0], loop([layer.eval() for layer in layers]))


def test_what_is_not_written_out_is_an_error(kind):
    options = [{"bidirectional": True}, {"bias": False}, {"proj_size": 2}]
    for option in options if kind is nn.LSTM else options[:2]:  # a GRU has two of them
        _, weights, call = members(kind, **option)
        with pytest.raises(NotImplementedError, match=next(iter(option))):
            vmap(call)(weights, X)


def test_two_directions_are_two_runs(kind):
    both = kind(5, 6, batch_first=True, bidirectional=True, **DOUBLE)
    there, back = (UNROLLED[kind](5, 6, batch_first=True, **DOUBLE) for _ in range(2))
    there.load_state_dict(both.state_dict(), strict=False)
    for name, weight in back.named_parameters():
        weight.data = both.get_parameter(f"{name}_reverse")
    joined = torch.cat([there(X[0])[0], back(X[0].flip(1))[0].flip(1)], dim=-1)
    close(joined, both(X[0])[0])


def test_packed_is_an_error_and_padding_reaches_the_last_state_only(kind):
    layer = UNROLLED[kind](5, 6, batch_first=True, **DOUBLE)
    full, short = X[0, 0], X[0, 1, :3]
    outputs, state = layer(pad_sequence([full, short], batch_first=True))
    close(outputs[1, :3], kind.forward(layer, short)[0])
    h = state[0] if kind is nn.LSTM else state  # of one layer: [1, 2, 6]
    close(h[0, 1], outputs[1, -1])
    assert not torch.allclose(h[0, 1], outputs[1, 2])
    with pytest.raises(AttributeError):
        layer(pack_sequence([full, short]))


def test_another_batch_first_is_wrong_without_an_error(kind):
    layers, weights, call = members(kind)
    call.args[0].batch_first = False
    assert not torch.allclose(vmap(call)(weights, X)[0], loop(layers))


def test_rnn_with_its_cell():
    rnn = nn.RNN(5, 6, num_layers=2, **DOUBLE)
    x, (h,) = unroll(rnn, lambda x, h, _: ((x + h).tanh(),), X[0], (None,))
    close((x, h), rnn(X[0]))


@torch.no_grad()
def test_one_operator_for_all_steps_or_several_a_step():
    for layer in nn.LSTM(5, 6), nn.GRU(5, 6):
        few, many = (operators(partial(layer, torch.ones(t, 5))) for t in (5, 25))
        one = isinstance(layer, nn.LSTM) and torch.backends.mkldnn.is_available()
        assert many - few == 0 if one else many - few > 5 * 20


def test_the_compiler_skips_them_unless_told(kind):
    layer = UNROLLED[kind](5, 6, **DOUBLE)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="does not support RNN"):
        compiled(X[0])
    with torch._dynamo.config.patch(allow_rnn=True):
        close(compiled(X[0]), layer(X[0]))


def test_the_class_of_a_skeleton_may_be_changed():
    models = [nn.Sequential(nn.LSTM(5, 6, batch_first=True, **DOUBLE)) for _ in X]
    skeleton = nn.Sequential(nn.LSTM(5, 6, batch_first=True)).to("meta")
    skeleton[0].__class__ = UNROLLED[nn.LSTM]
    call = vmap(partial(functional_call, skeleton))
    close(call(stack_module_state(models)[0], X)[0], loop(models))
