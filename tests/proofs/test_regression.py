"""What plot_regression.py says in a clause, with small networks and few points."""

import math

import pytest
import torch
import torch.nn.functional as F
from pages import names_of
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal
from torch.func import functional_call, stack_module_state, vmap

PAGE = names_of("uncertainty/plot_regression")
gaussian_nll, covered, mixture = map(PAGE.get, ["gaussian_nll", "covered", "mixture"])
GaussianNet, member_loss = PAGE["GaussianNet"], PAGE["member_loss"]
PAGE["skeleton"] = GaussianNet(2.3, 24.0).to("meta")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def outputs():
    mean, y = torch.randn(2, 5, 8, dtype=torch.double)
    var = torch.rand(5, 8, dtype=torch.double) + 0.1
    return mean.requires_grad_(), y, var.requires_grad_()


def test_pytorchs_loss_is_refused_inside_vmap_and_outside_it_is_ours(outputs):
    mean, y, var = outputs
    for refused in F.gaussian_nll_loss, gaussian_nll:
        with pytest.raises(RuntimeError, match="data-dependent control flow"):
            vmap(refused)(mean, y, var)
    own = torch.autograd.grad(gaussian_nll(mean, var, y).mean(dim=1).sum(), (mean, var))
    loss = F.gaussian_nll_loss(mean, y, var, reduction="none").mean(dim=1)
    theirs = torch.autograd.grad(loss.sum(), (mean, var))
    torch.testing.assert_close(own, theirs, atol=1e-14, rtol=1e-12)


def test_the_metrics_are_those_of_a_normal_distribution(outputs):
    mean, y, var = outputs
    expected = -Normal(mean, var.sqrt()).log_prob(y)
    torch.testing.assert_close(gaussian_nll(mean, var, y), expected)
    mean, var = torch.tensor(2.0), torch.tensor(9.0)
    share = covered(mean, var, 2 + 3 * torch.randn(100_000)).mean()
    assert abs(share - 0.95) < 0.003  # four standard errors


def test_noise_and_ignorance_add_up_to_the_variance_of_the_mixture(outputs):
    means, _, variances = outputs
    mean, noise, ignorance = mixture(means, variances)
    weights = Categorical(torch.ones_like(means.T))
    theirs = MixtureSameFamily(weights, Normal(means.T, variances.T.sqrt()))
    torch.testing.assert_close(mean, theirs.mean)
    torch.testing.assert_close(noise + ignorance, theirs.variance)


def test_longer_training_makes_the_variances_too_small():
    x = 8 * torch.rand(8, 40) - 4
    y, y_new = x**3 + 3 * torch.randn(2, 8, 40)
    params, _ = stack_module_state([GaussianNet(2.3, 24.0) for _ in x])
    shares = []
    for steps in (200, 600):
        PAGE["train"](params, x, y, steps)
        with torch.no_grad():  # new noise at the same points
            call = vmap(lambda p, x: functional_call(PAGE["skeleton"], p, (x,)))
            shares.append(covered(*call(params, x), y_new).mean())
    assert shares[1] < shares[0] - 0.05
    assert shares[1] < 0.85


@pytest.mark.parametrize(
    ("activation", "rate", "num_members", "num_points"),
    [
        pytest.param(nn.Tanh, 0.01, 10, 40, marks=pytest.mark.slow),
        pytest.param(nn.ReLU, 0.03, 10, 40, marks=pytest.mark.slow),
        (nn.ReLU, 0.01, 5, 20),
    ],
)
def test_ignorance_finds_where_data_end_but_is_no_error_bar(
    activation, rate, num_members, num_points, monkeypatch
):
    def build():
        net = GaussianNet(2.3, 24.0)
        net.layers[1] = net.layers[3] = activation()
        return net

    x = 8 * torch.rand(12, num_points) - 4
    y = x**3 + 3 * torch.randn(12, num_points)
    whose = torch.arange(12).repeat_interleave(num_members)
    monkeypatch.setitem(PAGE, "skeleton", build().to("meta"))
    params, _ = stack_module_state([build() for _ in whose])
    optimizer = torch.optim.Adam(params.values(), lr=rate)
    for _ in range(200):
        optimizer.zero_grad()
        vmap(member_loss)(params, x[whose], y[whose]).sum().backward()
        optimizer.step()

    at = torch.linspace(-6, 6, 121)
    inside = PAGE["inside"] = at.abs() <= 4
    out = PAGE["predict"](params, at)
    means, variances = (t.unflatten(0, (12, -1)) for t in out)
    mean, noise, ignorance = mixture(means, variances)
    found = PAGE["found"]
    assert (found(ignorance) > found(variances[:, 0])).sum() >= 9
    assert found(ignorance).median() > 0.8
    hit = covered(mean, noise + ignorance, at**3 + 3 * torch.randn(12, 121))
    assert hit[:, ~inside].mean() < 0.8


def test_the_wide_network_has_the_parameters_of_ten_members():
    def size(width):
        return sum(p.numel() for p in GaussianNet(1, 1, width).parameters())

    assert abs(size(164) / (10 * size(50)) - 1) < 0.01


def test_fifteen_of_twenty_is_one_comparison_in_twenty_four():
    def chance(wins):  # of so many or more of 20, to either side
        return 2 * sum(math.comb(20, k) for k in range(wins, 21)) / 2**20

    assert round(1 / chance(15)) == 24
    assert chance(17) < 0.05 / 8 < chance(16)  # eight comparisons
