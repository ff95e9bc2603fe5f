"""What plot_regression.py says in a clause, and its functions against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from mlxtend.data import autompg_data
from pages import names_of
from torch.distributions import Categorical, MixtureSameFamily, Normal
from torch.func import vmap

PAGE = names_of("uncertainty/plot_regression", num_members=5)
GaussianNet, member, train = map(PAGE.get, ["GaussianNet", "member", "train"])
covered, mixture, predict = map(PAGE.get, ["covered", "mixture", "predict"])
PAGE["skeleton"] = GaussianNet(torch.empty(2, 7), torch.empty(2)).to("meta")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_pytorchs_loss_is_refused_inside_vmap():
    mean, y = torch.randn(2, 5, 8)
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        vmap(F.gaussian_nll_loss)(mean, y, torch.rand(5, 8) + 0.1)


def test_a_network_centers_and_scales_whatever_the_width_and_units():
    x, y = torch.randn(2, 40, 3, dtype=torch.double)
    y = y[:, 0]
    plain = GaussianNet(x, y).double()
    moved = GaussianNet(7 + 100 * x, 5 - 30 * y).double()
    moved.layers = plain.layers
    mean, var = plain(x)
    means, variances = moved(7 + 100 * x)
    center = y.mean()
    theirs = 5 - 30 * center + 30 * (mean - center)  # a negative scale mirrors y
    torch.testing.assert_close(means, theirs)
    torch.testing.assert_close(variances, 900 * var)


def test_coverage_is_that_of_a_normal_distribution():
    mean, var = torch.full((1, 100_000), 2.0), torch.tensor(9.0)
    share = covered(mean, var, 2 + 3 * torch.randn(1, 100_000))
    assert abs(share.item() - 0.95) < 0.003  # four standard errors


def test_noise_and_ignorance_add_up_to_the_variance_of_the_mixture():
    means, variances = torch.randn(5, 8), torch.rand(5, 8) + 0.1
    mean, noise, ignorance = mixture(means, variances)
    weights = Categorical(torch.ones_like(means.T))
    theirs = MixtureSameFamily(weights, Normal(means.T, variances.T.sqrt()))
    torch.testing.assert_close(mean[0], theirs.mean)
    torch.testing.assert_close((noise + ignorance)[0], theirs.variance)


def test_the_wide_network_has_the_parameters_of_ten_members():
    def size(width):
        net = GaussianNet(torch.empty(2, 7), torch.empty(2), width)
        return sum(p.numel() for p in net.parameters())

    assert abs(size(170) / (10 * size(50)) - 1) < 0.01


@pytest.mark.parametrize(
    "origin",
    [
        pytest.param(1, id="America"),
        pytest.param(2, id="Europe", marks=pytest.mark.slow),
        pytest.param(3, id="Japan", marks=pytest.mark.slow),
    ],
)
def test_ensemble_and_wide_network_on_other_kinds_left_out(origin):
    table, mpg = autompg_data()
    x = torch.tensor(table[:, :7], dtype=torch.float32)
    y = torch.tensor(mpg, dtype=torch.float32)
    unseen, others = ((x[:, 6] == origin) == kind for kind in (True, False))
    unseen, others = unseen.nonzero().flatten(), others.nonzero().flatten()
    order = torch.stack([others[torch.randperm(len(others))] for _ in range(4)])
    val_rows, train_rows = order[:, :40], order[:, 40:]
    whose = torch.arange(4).repeat_interleave(5)

    def shares(members, width, rate):
        rows = train_rows[members], val_rows[members]
        models = [GaussianNet(x[i], y[i], width) for i in rows[0]]
        state, _ = train(models, x, y, *rows, rate, steps=100)
        return predict(state, x[unseen.expand(len(members), -1)])

    mean, noise, ignorance = mixture(*shares(whose, 50, 0.01))
    ours = covered(mean, noise + ignorance, y[unseen]).mean()
    wides = [shares(torch.arange(4), 170, rate) for rate in (0.003, 0.03)]
    theirs = torch.stack([covered(*wide, y[unseen]).mean() for wide in wides])
    margin = 0.05 if origin == 1 else -0.05
    assert ours > theirs.max() + margin  # of two rates, the better one in hindsight
