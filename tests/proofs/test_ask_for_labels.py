"""What plot_ask_for_labels.py relies on: its scores, its questions, its verdict."""

import pytest
import torch
from pages import names_of
from scipy.stats import entropy, t

USED = "margin bald ask farthest verdict"
PAGE = names_of("uncertainty/plot_ask_for_labels", *USED.split())


def test_the_margin_is_largest_where_two_classes_are_as_likely():
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.6, 0.3, 0.1], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(PAGE["margin"](probs), torch.tensor([0.0, -0.3, -1.0]))


def test_bald_is_the_mutual_information_of_member_and_class():
    probs = torch.rand(2, 4, 7, 10, dtype=torch.float64).softmax(-1)
    mean = probs.mean(1, keepdim=True).expand_as(probs)
    expected = torch.as_tensor(entropy(probs, mean, axis=-1)).mean(
        1
    )  # Kullback-Leibler
    torch.testing.assert_close(PAGE["bald"](probs, dim=1), expected)
    zeros = torch.nn.functional.one_hot(torch.tensor([[0, 1]]), 3).double()
    assert PAGE["bald"](zeros, dim=1).isfinite().all()


def test_a_question_takes_the_highest_scores_and_no_row_twice():
    candidates = torch.arange(100).expand(3, 100)
    labelled = torch.tensor([[0, 99], [1, 98], [2, 97]])
    score = torch.arange(100.0).expand(3, 100)
    rows = PAGE["ask"](score, candidates, labelled, count=3)
    assert rows.tolist() == [
        [0, 99, 98, 97, 96],
        [1, 98, 99, 97, 96],
        [2, 97, 99, 98, 96],
    ]


def test_too_few_candidates_are_no_question():
    rows = torch.arange(10)[None]
    with pytest.raises(AssertionError, match="fewer candidates"):
        PAGE["ask"](torch.rand(1, 10), rows, rows[:, :5], count=8)


def test_farthest_takes_one_by_one_what_is_farthest_from_all_others():
    torch.manual_seed(0)
    PAGE["images"] = images = torch.rand(60, 5)
    candidates, labelled = torch.arange(10, 60)[None], torch.arange(10)[None]
    score = PAGE["farthest"](candidates, labelled, count=4)
    chosen = PAGE["ask"](score, candidates, labelled, count=4)[0, 10:]
    seen = labelled[0].tolist()
    for row in chosen.tolist():
        gaps = torch.cdist(images[10:], images[seen]).amin(1)
        assert gaps.argmax().item() + 10 == row
        seen.append(row)


def test_the_limit_of_a_verdict_is_student_s_for_twelve_repeats():
    assert round(t.ppf(0.975, 11), 1) == 2.2
    gaps = torch.tensor([1.0, -1] * 6)
    edge = 2.2 * gaps.std() / 12**0.5
    assert PAGE["verdict"](gaps + 1.01 * edge).endswith("worse")
    assert PAGE["verdict"](gaps - 1.01 * edge).endswith("better")
    assert PAGE["verdict"](gaps + 0.99 * edge).endswith("not certain")
