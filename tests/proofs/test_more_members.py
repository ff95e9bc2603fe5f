"""What plot_more_members.py says of teams, of its scores and of its training."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from pages import names_of
from torch import nn

PAGE = names_of("uncertainty/plot_more_members")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_brier_score_of_all_teams_of_a_size_follows_the_law(size):
    torch.manual_seed(0)
    logits = torch.randn(8, 50, 4, dtype=torch.float64)
    labels = torch.randint(4, (50,))
    mean_of, brier = PAGE["mean_of"], PAGE["brier"]
    teams = itertools.combinations(range(8), size)
    found = [brier(mean_of(logits[list(team)]), labels) for team in teams]
    found = torch.stack(found).mean()
    one = brier(logits, labels).mean()
    limit = (8 * brier(mean_of(logits), labels) - one) / 7
    torch.testing.assert_close(found, limit + (one - limit) / size, rtol=0, atol=1e-12)


def test_scores_of_many_teams_are_those_of_each():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 50, 4, dtype=torch.float64)  # [fold, team, image, class]
    labels = torch.randint(4, (2, 1, 50))
    for name in ("nll", "error", "brier", "calibration_error"):
        together = PAGE[name](logits, labels)
        folds = zip(logits, labels, strict=True)
        each = [[PAGE[name](team, y[0]) for team in fold] for fold, y in folds]
        torch.testing.assert_close(together, torch.tensor(each, dtype=torch.float64))
    plain = F.cross_entropy(logits[0, 0], labels[0, 0])
    torch.testing.assert_close(PAGE["nll"](logits[0, 0], labels[0, 0]), plain)


def test_calibration_error_is_that_of_bins_by_hand():
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 4, dtype=torch.float64), torch.randint(4, (200,))
    confidence, answer = logits.softmax(dim=-1).max(dim=-1)
    total = 0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        right = (answer == labels)[inside].double()
        if inside.any():
            total += inside.sum() * (right.mean() - confidence[inside].mean()).abs()
    found = PAGE["calibration_error"](logits, labels)
    torch.testing.assert_close(found, total / 200)


def test_together_and_alone_networks_train_alike():
    torch.manual_seed(0)
    x, y = torch.rand(60, 81, dtype=torch.float64), torch.randint(10, (60,))
    rows = torch.stack([torch.randperm(60)[:40] for _ in range(3)])
    page = names_of("uncertainty/plot_more_members", nn=nn)
    page["skeleton"] = page["make_model"](1).to("meta")
    models = [page["make_model"](8).double() for _ in rows]
    alone = copy.deepcopy(models)
    torch.manual_seed(1)
    params = page["train"](models, rows, x, y, 0.04, 20)
    torch.manual_seed(1)
    draws = [torch.randint(40, (3, 32)) for _ in range(20)]
    for k, model in enumerate(alone):
        optimizer = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.04, 20)
        for draw in draws:
            batch = rows[k][draw[k]]
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(params[name][k], p, rtol=0, atol=1e-10)
