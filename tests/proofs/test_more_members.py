"""What plot_more_members.py says about teams."""

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_brier_score_of_all_teams_of_a_size_follows_the_law(size):
    torch.manual_seed(0)
    probs = torch.randn(8, 50, 4, dtype=torch.float64).softmax(dim=-1)
    target = F.one_hot(torch.randint(4, (50,)), 4)

    def brier(mean):
        return (mean - target).square().sum(dim=-1).mean()

    teams = torch.combinations(torch.arange(8), size)
    found = torch.stack([brier(probs[team].mean(dim=0)) for team in teams]).mean()
    one = torch.stack([brier(member) for member in probs]).mean()
    limit = (8 * brier(probs.mean(dim=0)) - one) / 7
    torch.testing.assert_close(found, limit + (one - limit) / size, rtol=0, atol=1e-12)
