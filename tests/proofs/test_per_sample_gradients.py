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


class Attention(nn.Module):  # a sequence through linear layers, and one used twice
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 6)
        self.out = nn.Linear(6, 10)

    def forward(self, x):  # [batch, 6]
        x = self.qkv(x.unsqueeze(1) * torch.arange(1, 5)[:, None])  # [batch, 4, 6]
        x = F.scaled_dot_product_attention(x, self.qkv(x), x)
        return self.out(x.mean(1))


def make_cnn(norm):
    layers = [nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.ZeroPad2d(3), *layers)


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10)),
    "cnn, GroupNorm": lambda: make_cnn(lambda n: nn.GroupNorm(2, n)),
    "cnn, BatchNorm2d in eval mode": lambda: make_cnn(nn.BatchNorm2d).eval(),
    "attention": Attention,
}


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(BATCH, 6, dtype=torch.float64)


@pytest.fixture
def y():
    return torch.arange(BATCH) % 10


def state_of(model):
    params = {name: p.detach() for name, p in model.named_parameters()}
    return params, dict(model.named_buffers())


def gradients_of(model, x, y, **options):
    PAGE["model"] = model
    every = vmap(grad(PAGE["sample_loss"]), in_dims=(None, None, 0, 0), **options)
    return every(*state_of(model), x, y)


def norms_by_vmap(model, x, y, chunk_size):
    PAGE["model"] = model
    return PAGE["norms_by_vmap"](*state_of(model), x, y, chunk_size)


def gradients_by_loop(model, x, y):
    rows = []
    for xi, yi in zip(x.split(1), y.split(1), strict=True):
        loss = F.cross_entropy(model(xi), yi)
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    names = [name for name, _ in model.named_parameters()]
    columns = map(torch.stack, zip(*rows, strict=True))
    return dict(zip(names, columns, strict=True))


def norms_of(gradients):
    return sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()


@pytest.mark.parametrize("kind", MODELS)
def test_every_gradient_is_that_of_the_loop(kind, x, y):
    torch.manual_seed(0)
    model = MODELS[kind]().double()
    expected = gradients_by_loop(model, x, y)
    torch.testing.assert_close(gradients_of(model, x, y), expected, rtol=0, atol=1e-12)
    for chunk_size in [1, 5, BATCH, None]:  # 5 does not divide the batch
        norms = norms_by_vmap(model, x, y, chunk_size)
        torch.testing.assert_close(norms, norms_of(expected), rtol=1e-12, atol=0)


def test_the_formula_gives_the_norms_of_the_loop(x, y):
    torch.manual_seed(0)
    model = MODELS["mlp"]().double()
    losses, norms = losses_and_norms(model, x, y)
    expected = norms_of(gradients_by_loop(model, x, y))
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses, F.cross_entropy(model(x), y, reduction="none"))


def test_the_formula_needs_no_bias_and_refuses_what_it_does_not_know(x, y):
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 10))
    _, norms = losses_and_norms(bare.double(), x, y)
    expected = norms_of(gradients_by_loop(bare, x, y))
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0)
    for layer in nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8)):
        model = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 10)).double()
        with pytest.raises(TypeError, match="the formula is not for"):
            losses_and_norms(model, x, y)


def test_the_norm_of_the_last_layer_comes_from_the_probabilities(x, y):
    torch.manual_seed(0)
    model = MODELS["mlp"]().double()
    gradients = gradients_by_loop(model, x, y)
    last = {name: g for name, g in gradients.items() if name.startswith("2.")}
    a = model[:2](x)
    off = (model(x).softmax(1) - F.one_hot(y, 10)).norm(dim=1)
    expected = off * (a.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(norms_of(last), expected, rtol=1e-12, atol=0)


def norms_from_tables(a, delta):
    """Of a weight whose gradient is the sum over positions of delta a^T."""
    return ((a @ a.mT) * (delta @ delta.mT)).sum((1, 2)).sqrt()


def test_two_tables_of_positions_give_the_norm_of_a_linear_layer_on_sequences():
    torch.manual_seed(0)
    a, layer = torch.randn(BATCH, 5, 7, dtype=torch.float64), nn.Linear(7, 3).double()
    out = layer(a)
    (delta,) = torch.autograd.grad(out.square().sum(), out)

    def loss(weight, a):
        return F.linear(a, weight, layer.bias).square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(layer.weight.detach(), a)
    expected = gradients.flatten(1).norm(dim=1)
    found = norms_from_tables(a, delta)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_two_tables_of_positions_give_the_norm_of_a_convolution():
    torch.manual_seed(0)
    images = torch.randn(BATCH, 2, 6, 6, dtype=torch.float64)
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    out = F.conv2d(images, weight, padding=1)
    (delta,) = torch.autograd.grad(out.pow(3).sum(), out)

    def loss(weight, image):
        return F.conv2d(image, weight, padding=1).pow(3).sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(weight.detach(), images)
    patches = F.unfold(images, 3, padding=1).mT  # [batch, 36, 18]
    found = norms_from_tables(patches, delta.flatten(2).mT)
    expected = gradients.flatten(1).norm(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_dropout_needs_randomness_and_drops_other_units_of_each_sample():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 10))
    x, y = torch.ones(BATCH, 64), torch.zeros(BATCH, dtype=torch.long)
    with pytest.raises(RuntimeError, match="randomness"):
        gradients_of(model, x, y)
    gradients = gradients_of(model, x, y, randomness="different")["1.weight"]
    assert len((gradients[:, 0] != 0).unique(dim=0)) == BATCH


def test_batch_norm_in_train_mode_is_refused(x, y):
    vectors = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).double()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        gradients_of(vectors, x, y)
    images = make_cnn(nn.BatchNorm2d).double()
    with pytest.raises(RuntimeError, match="Batch norm got a batched tensor"):
        gradients_of(images, x, y)
    silent = make_cnn(lambda n: nn.BatchNorm2d(n, track_running_stats=False)).double()
    alone = gradients_by_loop(silent, x, y)  # batches of one image
    torch.testing.assert_close(gradients_of(silent, x, y), alone, rtol=0, atol=1e-12)


def test_the_peak_follows_the_gradients_held():
    # The squares of one tensor's gradients are a second copy of them for a moment.
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    x, y = torch.randn(256, 64), torch.arange(256) % 10
    one = sum(p.nbytes for p in model.parameters())
    for chunk_size in [16, 64, 256]:
        peak = peak_bytes(lambda k=chunk_size: norms_by_vmap(model, x, y, k))
        assert chunk_size * one < peak < 2.5 * chunk_size * one + x.nbytes
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
    (loss_soon, norm_soon), (loss_late, norm_late) = found
    assert loss_soon > loss_late + 0.02
    assert norm_soon > norm_late + 0.02
