"""What plot_unknown_inputs.py says and does not prove: its scores, what they refuse."""

import math

import pytest
import torch
from pages import names_of

PAGE = names_of("uncertainty/plot_unknown_inputs")
auroc, fpr_at_95 = PAGE["auroc"], PAGE["fpr_at_95"]
entropy, mutual_information = PAGE["entropy"], PAGE["mutual_information"]


@pytest.fixture
def member_probs():
    torch.manual_seed(0)
    return (3 * torch.randn(5, 40, 10, dtype=torch.float64)).softmax(-1)


def test_entropy_is_between_zero_and_the_logarithm_of_the_classes(member_probs):
    values = entropy(member_probs)
    assert values.min() >= 0
    assert values.max() <= math.log(10)
    assert entropy(torch.full((10,), 0.1)).item() == pytest.approx(math.log(10))
    assert entropy(torch.eye(10)).eq(0).all()  # 0 log 0 is 0, not NaN


def test_mutual_information_is_the_mean_divergence_from_the_mean(member_probs):
    mean = member_probs.mean(0)
    divergence = (member_probs * (member_probs / mean).log()).sum(-1).mean(0)
    torch.testing.assert_close(mutual_information(member_probs), divergence)
    assert mutual_information(member_probs).max() <= math.log(5)  # of the members
    assert mutual_information(torch.eye(5)).item() == pytest.approx(math.log(5))


def test_one_member_has_no_mutual_information(member_probs):
    assert mutual_information(member_probs[:1]).eq(0).all()


def test_mutual_information_takes_any_dimensions_between_member_and_class(member_probs):
    folded = mutual_information(member_probs.unflatten(1, (4, 10)))
    torch.testing.assert_close(folded.flatten(), mutual_information(member_probs))


@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([2.0, -1.0]),  # logits that sum to one
        torch.tensor([0.5, 0.2]),
        torch.tensor([0.5, 0.5]).log(),
        torch.tensor([torch.nan, 0.5]),
    ],
)
def test_what_is_no_probability_is_refused(wrong):
    with pytest.raises(ValueError, match="apply softmax first"):
        entropy(wrong)


def test_fpr_lets_95_percent_of_the_known_pass():
    known = torch.arange(101.0)
    assert fpr_at_95(known, torch.tensor([94.0, 95.0, 96.0, 200.0])) == 0.5


@pytest.mark.parametrize("metric", [auroc, fpr_at_95])
@pytest.mark.parametrize(
    "wrong", [torch.empty(0), torch.ones(2, 2), torch.tensor([torch.nan])]
)
def test_scores_of_one_group_only_or_of_nothing_are_refused(metric, wrong):
    with pytest.raises(ValueError, match="known and unknown"):
        metric(torch.rand(5), wrong)
    with pytest.raises(ValueError, match="known and unknown"):
        metric(wrong, torch.rand(5))


@pytest.mark.parametrize("true", [0.6, 1.0, 2.0])
def test_the_temperature_by_which_logits_were_divided_is_found_again(true):
    torch.manual_seed(0)
    logits = 2 * torch.randn(20_000, 10, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1).flatten()
    found = PAGE["temperature"]((logits * true).softmax(-1), labels)
    assert found.item() == pytest.approx(true, rel=0.15)  # the grid's step is 12 %


def test_sure_and_wrong_counts_wrong_answers_above_nine_tenths():
    probs = torch.tensor([[[0.95, 0.05], [0.85, 0.15], [0.95, 0.05]]])
    answers = torch.tensor([1, 1, 0])  # wrong and sure, wrong and unsure, right
    assert PAGE["sure_and_wrong"](probs, answers).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize(("sign", "word"), [(1, "better"), (-1, "worse")])
def test_a_difference_counts_beyond_2_8_corrected_standard_errors(sign, word):
    PAGE["num_folds"], noise = 5, torch.tensor([-2.0, -1, 0, 1, 2])
    error = noise.std() * (1 / 5 + 1000 / 3500) ** 0.5
    assert PAGE["verdict"](sign * 2.9 * error + noise) == word
    assert PAGE["verdict"](sign * 2.7 * error + noise) == "not certain"
