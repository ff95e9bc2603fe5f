"""What plot_chains.py relies on: draws of a known distribution, R-hat, anchors."""

import pytest
import torch
from pages import names_of
from torch import nn
from torch.nn.utils import parameters_to_vector

USED = "function energy energies_and_slopes hmc r_hat member_loss"
PAGE = names_of("uncertainty/plot_chains", *USED.split())
PAGE["sigma"] = 0.2
PAGE["widths"] = {"0.weight": 2.0, "0.bias": 2.0, "2.weight": 0.5, "2.bias": 0.5}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    PAGE.update(
        skeleton=model, shapes={k: p.shape for k, p in model.named_parameters()}
    )
    return model


def test_a_vector_is_a_network_in_units_of_the_prior(model):
    parts = [p / PAGE["widths"][name] for name, p in model.named_parameters()]
    theta, x = parameters_to_vector(parts), torch.randn(5, 1, dtype=torch.float64)
    torch.testing.assert_close(PAGE["function"](theta, x), model(x))


def test_chains_draw_from_a_distribution_that_is_known():
    torch.manual_seed(0)
    scale = torch.tensor([0.5, 1.0, 2.0])

    def energy(theta, x, y):
        return ((theta - x) / scale).square().sum() / 2

    chains, x = 256, torch.tensor([3.0, -1.0]).repeat_interleave(128)[:, None]
    step = torch.full((chains,), 0.3)
    draws, taken = PAGE["hmc"](energy, torch.zeros(chains, 3), x, x, step, 100, leaps=8)
    draws = draws[20:].unflatten(1, (2, 128))
    assert taken.mean() > 0.9
    for k, center in enumerate((3.0, -1.0)):
        mean, std = draws[:, k].mean((0, 1)), draws[:, k].std((0, 1))
        torch.testing.assert_close(mean, torch.full((3,), center), atol=0.1, rtol=0)
        torch.testing.assert_close(std, scale, atol=0, rtol=0.05)


def test_langevin_moves_draw_from_a_distribution_that_is_known():
    torch.manual_seed(0)
    theta, step, kept = torch.zeros(500, 2), 0.02, []
    for _ in range(400):
        slope = theta  # of a standard normal distribution
        theta = theta - step * slope + (2 * step) ** 0.5 * torch.randn_like(theta)
        kept.append(theta)
    variance = torch.stack(kept[100:]).var((0, 1))
    torch.testing.assert_close(variance, torch.ones(2), atol=0.05, rtol=0)


def test_a_chain_whose_energy_is_no_number_stays_where_it_is():
    def energy(theta, x, y):
        return torch.where(theta.sum() == 0, theta.sum(), torch.nan * theta.sum())

    start = torch.zeros(4, 3)
    draws, taken = PAGE["hmc"](energy, start, start, start, torch.full((4,), 0.1), 3)
    assert not taken.any()
    assert (draws == 0).all()


def test_r_hat_is_one_where_chains_agree_and_more_where_they_do_not():
    torch.manual_seed(0)
    values = torch.randn(1000, 8, 2)
    torch.testing.assert_close(PAGE["r_hat"](values), torch.ones(2), atol=0.01, rtol=0)
    values[:, 0, 1] += 3
    values[:500, :, 0] += 1  # all chains drift, which halves notice
    assert (PAGE["r_hat"](values) > 1.05).all()


def test_the_anchored_loss_is_the_energy_around_the_anchor(model):
    theta, anchor = torch.randn(2, 49, dtype=torch.float64)
    x, y = torch.randn(2, 6, 1, dtype=torch.float64)
    zero = torch.zeros_like(anchor)
    loss, energy = PAGE["member_loss"], PAGE["energy"](theta, x, y)
    torch.testing.assert_close(loss(theta, zero, 1.0, x, y), energy)
    pull = ((theta - anchor).square().sum() - theta.square().sum()) / 2
    torch.testing.assert_close(loss(theta, anchor, 1.0, x, y), energy + pull)
