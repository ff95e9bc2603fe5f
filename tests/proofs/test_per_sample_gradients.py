"""What plot_per_sample_gradients.py says about layers, attention and memory."""

import warnings

import pytest
import torch
from pages import names_of, peak_bytes
from torch import nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCH = 12
PAGE = names_of("beyond/plot_per_sample_gradients")
losses_and_norms, norms_by_loop = PAGE["losses_and_norms"], PAGE["norms_by_loop"]


torch.manual_seed(1)
X, Y = torch.randn(BATCH, 6, dtype=torch.float64), torch.arange(BATCH) % 10
TOKENS = torch.randint(5, (BATCH, 7))  # seven places, five tokens: some come again


class Sequence(nn.Module):
    def __init__(self, *layers, **embedding):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 8, dtype=torch.float64, **embedding)
        self.layers = nn.Sequential(*layers).double()
        self.head = nn.Linear(8, 10).double()

    def forward(self, x):
        return self.head(self.layers(self.embedding(x)).mean(1))


def gradients_of(model, x, y):
    PAGE["model"] = model
    state = dict(model.named_parameters()), dict(model.named_buffers())
    return vmap(grad(PAGE["sample_loss"]), in_dims=(None, None, 0, 0))(*state, x, y)


def norms_of(gradients):
    return sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()


def check(found, model, x, y):
    expected = norms_by_loop(model, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [PAGE["Attention"](8, 2)],
        [nn.Linear(8, 9, bias=False), nn.ReLU(inplace=True), nn.Linear(9, 8)],
        [nn.LayerNorm(8, bias=False), nn.LayerNorm(8, elementwise_affine=False)],
    ],
)
def test_the_formula_holds_for_sequences_with_repeated_tokens(layers):
    model = Sequence(*layers)
    check(losses_and_norms(model, TOKENS, Y)[1], model, TOKENS, Y)
    check(norms_of(gradients_of(model, TOKENS, Y)), model, TOKENS, Y)


def test_the_formula_holds_for_one_vector_a_sample_and_leaves_out_frozen_layers():
    layers = nn.Linear(6, 8, dtype=torch.float64), nn.ReLU(), nn.Linear(8, 10).double()
    model = nn.Sequential(*layers)
    check(losses_and_norms(model, X, Y)[1], model, X, Y)
    model[0].requires_grad_(False)
    _, norms = losses_and_norms(model, X, Y)
    last = {k: g for k, g in gradients_of(model, X, Y).items() if k.startswith("2.")}
    torch.testing.assert_close(norms, norms_of(last), rtol=1e-12, atol=0)


SHARED = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("layers", "embedding"),
    [
        ([nn.GroupNorm(1, 7)], {}),
        ([SHARED, SHARED], {}),
        ([nn.LayerNorm((7, 8))], {}),
        ([nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)], {}),
        ([], {"padding_idx": 0}),
        ([], {"scale_grad_by_freq": True}),
    ],
)
def test_what_the_formula_does_not_cover_is_refused(layers, embedding):
    with pytest.raises(TypeError, match="not every trainable parameter"):
        losses_and_norms(Sequence(*layers, **embedding), TOKENS, Y)


def test_an_input_without_the_batch_is_refused():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(10, 10), nn.Embedding(7, 10)

        def forward(self, x):
            return (self.tokens(x) + self.places(torch.arange(7)[None])).mean(1)

    with pytest.raises(TypeError, match="lacks the batch"):
        losses_and_norms(Places(), TOKENS, Y)


def test_attention_of_pytorch_is_silent_with_the_plain_kernel():
    options = {"dropout": 0.0, "batch_first": True}
    model = Sequence(nn.TransformerEncoderLayer(8, 2, 8, **options))
    with pytest.warns(UserWarning, match="performance drop"):
        check(norms_of(gradients_of(model, TOKENS, Y)), model, TOKENS, Y)
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("error")
        check(norms_of(gradients_of(model, TOKENS, Y)), model, TOKENS, Y)


def test_batch_norm_without_running_statistics_takes_each_image_by_itself():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    layers = nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(168, 10)
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.ZeroPad2d(3), *layers).double()
    check(norms_of(gradients_of(model, X, Y)), model, X, Y)


def test_the_peak_follows_the_gradients_held():
    PAGE["model"] = model = PAGE["Classifier"]()
    params = {name: p.detach() for name, p in model.named_parameters()}
    x, y = torch.randint(1056, (128, 32)), torch.arange(128) % 10
    one = sum(p.nbytes for p in params.values())
    peak = {}
    for k in [16, 64]:
        peak[k] = peak_bytes(lambda k=k: PAGE["norms_by_vmap"](params, {}, x, y, k))
        assert k * one < peak[k] < 2 * k * one
    assert peak[16] < peak_bytes(lambda: losses_and_norms(model, x, y)) < peak[64]
