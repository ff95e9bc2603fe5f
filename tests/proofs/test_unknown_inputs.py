"""What plot_unknown_inputs.py says and does not prove: its scores, their verdicts."""

import math

import pytest
import torch
from pages import names_of

PAGE = names_of("uncertainty/plot_unknown_inputs")
brier, nll, auroc = PAGE["brier"], PAGE["nll"], PAGE["auroc"]
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


def test_auroc_is_the_share_of_pairs_in_order_and_half_of_those_that_tie():
    torch.manual_seed(0)
    known, unknown = torch.randint(9, (2, 50)), torch.randint(3, 12, (2, 70))
    pairs = unknown[:, None, :] - known[:, :, None]
    expected = ((pairs > 0).double() + (pairs == 0).double() / 2).mean((1, 2))
    torch.testing.assert_close(auroc(known, unknown), expected, check_dtype=False)


@pytest.mark.parametrize(("sure", "worst"), [(1.0, 2.0), (0.1, 0.9)])
def test_brier_is_two_for_a_sure_mistake_and_nine_tenths_for_a_guess(sure, worst):
    probs = torch.full((1, 1, 10), (1 - sure) / 9)
    probs[..., 0] = sure
    assert brier(probs, torch.tensor([[1]])).item() == pytest.approx(worst)


def test_nll_of_a_guess_is_the_logarithm_of_the_classes():
    probs = torch.full((2, 3, 10), 0.1)
    found = nll(probs, torch.zeros(2, 3, dtype=torch.long))
    torch.testing.assert_close(found, torch.full((2,), math.log(10)))


def test_a_turn_by_90_degrees_moves_each_pixel_to_its_place():
    torch.manual_seed(0)
    image = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(PAGE["turned"](image, 0), image)
    quarter = PAGE["turned"](image, 90)
    turns = [torch.rot90(image, k, (2, 3)) for k in (1, -1)]
    assert any(torch.allclose(quarter, turn, atol=1e-4) for turn in turns)


@pytest.mark.parametrize("true", [0.6, 1.0, 2.0])
def test_the_temperature_by_which_logits_were_divided_is_found_again(true):
    torch.manual_seed(0)
    logits = 2 * torch.randn(20_000, 10, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1).flatten()
    found = PAGE["temperature"]((logits * true).softmax(-1), labels)
    assert found.item() == pytest.approx(true, rel=0.15)  # the grid's step is 12 %


@pytest.mark.parametrize(("sign", "word"), [(1, "better"), (-1, "worse")])
def test_a_difference_counts_beyond_2_8_corrected_standard_errors(sign, word):
    PAGE["num_folds"], noise = 5, torch.tensor([-2.0, -1, 0, 1, 2])
    error = noise.std() * (1 / 5 + 1000 / 3500) ** 0.5
    gaps = {"far": sign * 2.9 * error + noise, "near": sign * 2.7 * error + noise}
    assert PAGE["verdicts"](gaps) == f"{word}: far; not certain: near"
    assert PAGE["verdicts"]({"equal": torch.zeros(5)}) == "not certain: equal"
