"""The metrics of the uncertainty pages, against scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
from pages import defined_in, functions_of, names_of, pages_of
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score, roc_curve

NAMES = {"check", "nll", "brier", "calibration_error", "check_probs", "entropy"}
NAMES |= {"mutual_information", "check_scores", "auroc", "fpr_at_95"}
SHARED = {page: NAMES & defined_in(page) for page in pages_of("uncertainty")}
METRICS = {
    name: function
    for page, wanted in SHARED.items()
    if wanted
    for name, function in names_of(page, *wanted).items()
}


def metric(name):
    return METRICS[name]


def predictions(kind):
    """Probabilities in float64, and labels."""
    torch.manual_seed(0)
    n, classes = {"two": (300, 2), "one image": (1, 4)}.get(kind, (400, 10))
    logits = 3 * torch.randn(n, classes, dtype=torch.float64)
    logits = {"uniform": 0 * logits, "extreme": 20 * logits}.get(kind, logits)
    return logits.softmax(dim=-1), torch.randint(classes, (n,))


KINDS = ["random", "two", "one image", "uniform", "extreme"]


def test_equal_names_have_equal_text():
    found = {}
    for page, wanted in SHARED.items():
        for name in wanted:
            text = functions_of(page, name)
            found.setdefault(name, set()).add(text[text.index("\ndef ") :])
    assert found.keys() == NAMES
    assert all(len(texts) == 1 for texts in found.values()), found


@pytest.mark.parametrize("kind", KINDS)
def test_nll_is_log_loss(kind):
    probs, labels = predictions(kind)
    classes = range(probs.shape[1])
    probs = probs.clamp(min=1e-12)  # scikit-learn clips where we return infinity
    probs = probs / probs.sum(dim=-1, keepdim=True)
    expected = log_loss(labels.numpy(), probs.numpy(), labels=classes)
    assert metric("nll")(probs, labels).item() == pytest.approx(expected, rel=1e-9)


def test_nll_of_an_impossible_label_is_infinite():
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert metric("nll")(probs, torch.tensor([1, 0])) == torch.inf


@pytest.mark.parametrize("kind", KINDS)
def test_brier_is_that_of_scikit_learn(kind):
    probs, labels = predictions(kind)
    expected = brier_score_loss(
        labels.numpy(), probs.numpy(), labels=range(probs.shape[1]), scale_by_half=False
    )
    assert metric("brier")(probs, labels).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["random", "two", "one image"])
def test_calibration_error_is_that_of_torchmetrics(kind):
    from torchmetrics.functional.classification import multiclass_calibration_error

    probs, labels = predictions(kind)
    expected = multiclass_calibration_error(probs, labels, probs.shape[1], 15)
    found = metric("calibration_error")(probs, labels, num_bins=15).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_calibration_error_at_the_borders_of_bins():
    # Bins are closed above (Guo 2017); torchmetrics closes them below, 1 is its own.
    error = metric("calibration_error")
    probs = torch.tensor([[1.0, 0.0], [0.95, 0.05]], dtype=torch.float64)
    assert error(probs, torch.tensor([0, 0])).item() == pytest.approx(0.025)


THIRDS, RIGHT = torch.full((5, 3), 1 / 3), torch.tensor([0, 1, 2, 0, 1])
BAD = {
    "logits": (torch.randn(5, 3), RIGHT),
    "NaN": (torch.nan * THIRDS, RIGHT),
    "sum of members": (2 * THIRDS, RIGHT),
    "label too large": (THIRDS, RIGHT + 1),
    "labels in a column": (THIRDS, RIGHT[:, None]),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["nll", "brier", "calibration_error"])
def test_bad_input_is_refused(name, bad):
    with pytest.raises(ValueError, match="must be"):
        metric(name)(*BAD[bad])


def test_entropy_and_mutual_information_on_known_cases():
    probs, _ = predictions("random")
    expected = torch.distributions.Categorical(probs=probs).entropy()
    torch.testing.assert_close(metric("entropy")(probs), expected)
    information, sure = metric("mutual_information"), torch.eye(4, dtype=torch.float64)
    agree, apart = torch.stack([probs, probs]), torch.stack([sure, sure.roll(1, 1)])
    torch.testing.assert_close(information(agree), 0 * expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(information(apart).exp(), torch.full((4,), 2.0).double())


def known_and_unknown(kind):
    torch.manual_seed(1)
    known, unknown = torch.randn(300).double(), torch.randn(200).double() + 1
    if kind == "ties":
        known, unknown = known.round(), unknown.round()
    return known, unknown


@pytest.mark.parametrize("kind", ["random", "ties"])
def test_auroc_and_fpr_are_those_of_scikit_learn(kind):
    known, unknown = known_and_unknown(kind)
    truth = np.r_[np.zeros(len(known)), np.ones(len(unknown))]
    scores = torch.cat([known, unknown]).numpy()
    found = metric("auroc")(known, unknown).item()
    assert found == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
    assert 0 <= metric("fpr_at_95")(known, unknown) <= 1
    if kind == "random":  # one score more or less at the threshold: 1 / 300
        accepted, passed, _ = roc_curve(1 - truth, -scores, drop_intermediate=False)
        expected = np.interp(0.95, passed, accepted)
        found = metric("fpr_at_95")(known, unknown).item()
        assert found == pytest.approx(expected, abs=0.02)
