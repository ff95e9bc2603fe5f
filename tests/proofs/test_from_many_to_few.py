"""What plot_from_many_to_few.py relies on: selection, scores, the team as a teacher."""

import pytest
import torch
from pages import names_of
from sklearn.metrics import accuracy_score, log_loss
from torch.func import stack_module_state
from torch.nn import functional as F

USED = "check nll greedy make_models predict probs_of losses_of score verdict"
PAGE = names_of("uncertainty/plot_from_many_to_few", "teacher_of", *USED.split())
nll, greedy = PAGE["nll"], PAGE["greedy"]


def members(num_members=6, num_images=40):
    torch.manual_seed(0)
    labels = torch.randint(10, (num_images,))
    logits = torch.randn(num_members, num_images, 10, dtype=torch.float64)
    return (logits + 2 * F.one_hot(labels, 10)).softmax(dim=-1), labels


def test_each_pick_is_the_best_addition():
    probs, labels = members()
    team = greedy(probs, labels, size=4)
    for count in range(1, 5):
        found = nll(probs[team[:count]].mean(dim=0), labels)
        for other in range(len(probs)):
            rival = nll(probs[[*team[: count - 1], other]].mean(dim=0), labels)
            assert found <= rival + 1e-12


def page_with(**globals_of_the_page):
    PAGE.update(device=torch.device("cpu"), **globals_of_the_page)
    PAGE["skeleton"] = PAGE["make_models"](1)[0].to("meta")
    return PAGE


def stacked(models):
    params, _ = stack_module_state(models)
    return {k: p.detach() for k, p in params.items()}


def test_the_teacher_is_the_average_of_its_own_team():
    torch.manual_seed(0)
    page = page_with(num_members=4, split=torch.arange(2)[:, None])
    models = page["make_models"](8)  # four in each of two splits
    page["members"] = stacked(models)
    x = torch.randn(16, 5, 64)  # eight students in each split, with images of their own
    teams = [[0, 2, 2], [3, 0, 1]]
    probs = page["teacher_of"](torch.tensor(teams))(x)
    for student in range(16):
        own = [models[4 * (student // 8) + i] for i in teams[student // 8]]
        with torch.no_grad():
            alone = sum(model(x[student]).softmax(dim=-1) for model in own) / 3
        torch.testing.assert_close(probs[student], alone)


def test_predictions_are_those_of_the_own_split_and_a_diverged_network_is_not_picked():
    torch.manual_seed(0)
    images, rows = torch.randn(30, 64), torch.tensor([[3, 4, 5], [6, 7, 8]])
    page = page_with(images=images, num_splits=2)
    models = page["make_models"](4)  # two in each split
    torch.nn.init.constant_(models[3][0].weight, torch.nan)
    probs = page["probs_of"](stacked(models), rows)
    for i, model in enumerate(models[:3]):
        with torch.no_grad():
            alone = model(images[rows[i // 2]]).softmax(dim=-1)
        torch.testing.assert_close(probs[i // 2, i % 2], alone)
    assert (probs[1, 1] == 0.1).all()
    easy = probs[1, 0].argmax(dim=-1)  # labels that the sound network gets right
    assert greedy(probs[1], easy, size=1) == [0]


def test_scores_are_those_of_scikit_learn():
    probs, labels = zip(*(members() for _ in range(2)), strict=True)
    probs, labels = torch.stack(probs), torch.stack(labels)
    page = page_with(y_test=labels)
    found = page["score"](probs)  # [split, 2]
    for split in range(2):
        mean, y = probs[split].mean(dim=0), labels[split]
        wrong = 100 * (1 - accuracy_score(y, mean.argmax(dim=-1)))
        assert found[split, 0].item() == pytest.approx(wrong)
        assert found[split, 1].item() == pytest.approx(
            log_loss(y, mean, labels=range(10))
        )


@pytest.mark.parametrize(("sign", "word"), [(1, "worse"), (-1, "better")])
def test_a_difference_counts_from_three_standard_errors(sign, word):
    verdict, noise = PAGE["verdict"], torch.tensor([-1.0, 1.0] * 8)
    error = noise.std() / 16**0.5
    assert verdict(sign * 3.1 * error + noise).endswith(f"{word} here")
    assert verdict(sign * 2.9 * error + noise).endswith("not certain")
    # For other digits, three errors with the correction of Nadeau and Bengio (2003).
    wide = noise.std() * (1 / 16 + 697 / 300) ** 0.5
    assert verdict(sign * 3.1 * wide + noise).endswith(word)
    assert verdict(sign * 2.9 * wide + noise).endswith(f"{word} here")
