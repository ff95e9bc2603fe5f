"""What plot_per_sample_gradients.py says about layers, memory and labels."""

import pytest
import torch
import torch.nn.functional as F
from pages import names_of, peak_bytes
from sklearn.datasets import load_digits
from torch import nn
from torch.func import grad, vmap

BATCH = 12
PAGE = names_of("beyond/plot_per_sample_gradients")
losses_and_norms = PAGE["losses_and_norms"]


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(BATCH, 6, dtype=torch.float64)


@pytest.fixture
def y():
    return torch.arange(BATCH) % 10


def mlp(**options):
    layers = nn.Linear(6, 8, **options), nn.ReLU(), nn.Linear(8, 10)
    return nn.Sequential(*layers).double()


def cnn(norm):
    layers = [nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    shapes = nn.Unflatten(1, (1, 2, 3)), nn.ZeroPad2d(3)
    return nn.Sequential(*shapes, *layers).double()


def gradients_of(model, x, y):
    PAGE["model"] = model
    state = dict(model.named_parameters()), dict(model.named_buffers())
    return vmap(grad(PAGE["sample_loss"]), in_dims=(None, None, 0, 0))(*state, x, y)


def norms_of(gradients):
    return sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()


def test_the_formula_needs_no_bias_and_refuses_what_it_does_not_know(x, y):
    model = mlp(bias=False)
    _, norms = losses_and_norms(model, x, y)
    expected = PAGE["norms_by_loop"](model, x, y)
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0)
    for layer in nn.ReLU(inplace=True), nn.LayerNorm(10).double():
        with pytest.raises(TypeError, match="the formula is not for"):
            losses_and_norms(model.append(layer), x, y)


def test_the_norm_of_the_last_layer_comes_from_the_probabilities(x, y):
    model = mlp()
    gradients = gradients_of(model, x, y)
    last = {name: g for name, g in gradients.items() if name.startswith("2.")}
    a = model[:2](x)
    off = (model(x).softmax(1) - F.one_hot(y, 10)).norm(dim=1)
    expected = off * (a.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(norms_of(last), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("layer", [F.linear, F.conv2d])
def test_two_tables_of_positions_give_the_norm_of_other_layers(layer):
    torch.manual_seed(0)
    sizes = {F.linear: [(5, 7), (3, 7)], F.conv2d: [(2, 6, 6), (4, 2, 3, 3)]}[layer]
    x = torch.randn(BATCH, *sizes[0], dtype=torch.float64)
    weight = torch.randn(sizes[1], dtype=torch.float64, requires_grad=True)
    out = layer(x, weight)  # [12, 5, 3] or [12, 4, 4, 4]
    (delta,) = torch.autograd.grad(out.pow(3).sum(), out)
    if layer is F.conv2d:  # [12, position, ...]
        x_at, delta = F.unfold(x, 3).mT, delta.flatten(2).mT
    else:
        x_at = x
    found = ((x_at @ x_at.mT) * (delta @ delta.mT)).sum((1, 2)).sqrt()

    def loss(weight, x):
        return layer(x, weight).pow(3).sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(weight.detach(), x)
    expected = gradients.flatten(1).norm(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4).eval(),
        nn.BatchNorm2d(4, track_running_stats=False),  # each image by itself
    ],
)
def test_norms_without_running_statistics_are_those_of_batches_of_one(norm, x, y):
    model = cnn(norm)
    found = norms_of(gradients_of(model, x, y))
    expected = PAGE["norms_by_loop"](model, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_peak_follows_the_gradients_held():
    # The squares of one tensor's gradients are a second copy of them for a moment.
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    params = {name: p.detach() for name, p in model.named_parameters()}
    x, y = torch.randn(256, 64), torch.arange(256) % 10
    one = sum(p.nbytes for p in params.values())
    PAGE["model"] = model
    for k in [16, 256]:
        peak = peak_bytes(lambda k=k: PAGE["norms_by_vmap"](params, {}, x, y, k))
        assert k * one < peak < 2.5 * k * one + x.nbytes
    assert peak_bytes(lambda: losses_and_norms(model, x, y)) < 32 * one


def test_labels_learned_by_heart_are_found_less_often():
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data[:400] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target[:400])
    flipped = torch.rand(400) < 0.1
    given = torch.where(flipped, (labels + torch.randint(1, 10, (400,))) % 10, labels)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    found = []
    for step in range(1, 401):
        optimizer.zero_grad()
        F.cross_entropy(model(x), given).backward()
        optimizer.step()
        if step in (50, 400):
            scores = losses_and_norms(model, x, given)
            tops = [s.topk(int(flipped.sum())).indices for s in scores]
            found.append([flipped[top].double().mean() for top in tops])
    soon, late = torch.tensor(found)
    assert (soon > late + 0.02).all()  # by loss and by norm
