"""What plot_more_members.py says about teams."""

import itertools

import pytest
import torch
from pages import names_of


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_brier_score_of_all_teams_of_a_size_follows_the_law(size):
    torch.manual_seed(0)
    probs = torch.randn(8, 50, 4, dtype=torch.float64).softmax(dim=-1)
    labels = torch.randint(4, (50,))
    brier = names_of("uncertainty/plot_more_members", "check", "brier")["brier"]
    teams = itertools.combinations(range(8), size)
    found = torch.stack(
        [brier(probs[list(team)].mean(dim=0), labels) for team in teams]
    ).mean()
    one = torch.stack([brier(member, labels) for member in probs]).mean()
    limit = (8 * brier(probs.mean(dim=0), labels) - one) / 7
    torch.testing.assert_close(found, limit + (one - limit) / size, rtol=0, atol=1e-12)
