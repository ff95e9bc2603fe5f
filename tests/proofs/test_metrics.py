"""The scores of the uncertainty pages, against scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
from pages import names_of
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

TEAMS = names_of("uncertainty/plot_more_members")
UNKNOWN = names_of("uncertainty/plot_unknown_inputs")


@pytest.fixture(params=["random", "two", "uniform", "extreme"])
def predictions(request):
    """Logits in float64, and labels."""
    torch.manual_seed(0)
    n, classes = {"two": (300, 2)}.get(request.param, (400, 10))
    logits = 3 * torch.randn(n, classes, dtype=torch.float64)
    scale = {"uniform": 0, "extreme": 2}.get(request.param, 1)
    return scale * logits, torch.randint(classes, (n,))


def test_scores_are_those_of_scikit_learn(predictions):
    logits, labels = predictions
    probs, classes = logits.softmax(dim=-1), range(logits.shape[-1])
    expected = log_loss(labels.numpy(), probs.numpy(), labels=classes)
    assert TEAMS["nll"](logits, labels).item() == pytest.approx(expected, rel=1e-9)
    expected = brier_score_loss(
        labels.numpy(), probs.numpy(), labels=classes, scale_by_half=False
    )
    assert TEAMS["brier"](logits, labels).item() == pytest.approx(expected, rel=1e-9)
    if logits.shape[-1] == 10:
        for name in "nll", "brier":
            found = UNKNOWN[name](probs[None], labels[None])
            torch.testing.assert_close(found, TEAMS[name](logits, labels)[None])
    wrong = (logits.argmax(-1) != labels).double().mean().item()
    assert TEAMS["error"](logits, labels).item() == pytest.approx(100 * wrong)


def test_calibration_error_is_that_of_torchmetrics(predictions):
    logits, labels = predictions
    probs = logits.softmax(dim=-1)
    expected = multiclass_calibration_error(probs, labels, probs.shape[1], 15)
    found = TEAMS["calibration_error"](logits, labels).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_entropy_and_mutual_information_on_known_cases():
    probs = torch.randn(400, 10, dtype=torch.float64).softmax(dim=-1)
    expected = torch.distributions.Categorical(probs=probs).entropy()
    torch.testing.assert_close(UNKNOWN["entropy"](probs), expected)
    information, sure = UNKNOWN["mutual_information"], torch.eye(4).double()
    agree, apart = torch.stack([probs, probs]), torch.stack([sure, sure.roll(1, 1)])
    torch.testing.assert_close(information(agree), 0 * expected, rtol=0, atol=1e-12)
    ends = torch.full((4,), 2.0).double()
    np.testing.assert_allclose(information(apart).exp(), ends)
