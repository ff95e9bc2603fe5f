"""What plot_from_many_to_few.py relies on: temperatures, choices, averages."""

import pytest
import torch
from pages import names_of
from scipy.optimize import minimize_scalar
from scipy.stats import t
from sklearn.metrics import log_loss
from torch.nn import functional as F

USED = "temperature calibrate losses_of average combine best_five sort greedy pick play"
PAGE = names_of("uncertainty/plot_from_many_to_few", *USED.split(), "spread", "verdict")


def members(num_members=8, num_images=60, seed=0):
    """Logits, some of them of cautious and of bold members, and labels."""
    torch.manual_seed(seed)
    labels = torch.randint(10, (num_images,))
    logits = torch.randn(num_members, num_images, 10, dtype=torch.float64)
    scale = torch.logspace(-0.5, 1, num_members, base=2)[:, None, None]
    return scale * (logits + 2 * F.one_hot(labels, 10)), labels


def test_the_temperature_is_the_least_of_scipy_up_to_its_grid():
    for logits, labels in [(z, members()[1]) for z in members()[0]]:

        def loss(log2, logits=logits, labels=labels):
            return F.cross_entropy(logits / 2**log2, labels).item()

        exact = minimize_scalar(loss, bounds=(-2, 2), method="bounded").x
        found = PAGE["temperature"](logits, labels).log2().item()
        assert abs(found - exact) <= 0.06  # steps of 0.1


def test_a_member_that_is_scaled_is_calibrated_to_the_same_predictions():
    logits, labels = members()
    once, _ = PAGE["calibrate"](logits, logits, labels)
    again, _ = PAGE["calibrate"](2**0.5 * logits, logits, labels)
    torch.testing.assert_close(once, again)


def test_the_average_is_that_of_probabilities():
    logits, labels = members()
    probs = logits.softmax(dim=-1).mean(dim=0)
    average = PAGE["average"](logits)
    torch.testing.assert_close(average.softmax(dim=-1), probs)
    loss = log_loss(labels, probs, labels=range(10))
    assert F.cross_entropy(average, labels).item() == pytest.approx(loss)


def test_the_lines_to_copy_do_what_the_comparison_does():
    (val, y_val), (test, y_test) = members(seed=0), members(seed=1)
    PAGE.update(y_val=y_val[None], y_test=y_test[None])  # one fold
    logits = PAGE["best_five"](val, test, y_val)
    own = [z[None] for z in PAGE["calibrate"](val, test, y_val)]
    error, loss = PAGE["play"](PAGE["pick"](PAGE["sort"], own[0]), *own)[0]
    assert F.cross_entropy(logits, y_test).item() == pytest.approx(loss.item())
    wrong = (logits.argmax(dim=-1) != y_test).double().mean().item()
    assert error.item() == pytest.approx(100 * wrong)


def test_a_member_of_nan_is_not_among_the_five():
    (val, labels), (test, _) = members(), members(seed=1)
    val[3], test[3] = torch.nan, torch.nan
    assert PAGE["best_five"](val, test, labels).isfinite().all()


def test_greedy_begins_with_the_best_five_and_each_pick_is_the_best_addition():
    logits, labels = members()
    team, average = PAGE["greedy"](logits, labels, picks=9), PAGE["average"]
    assert team[:5] == PAGE["sort"](logits, labels)
    for count in range(6, 10):
        found = F.cross_entropy(average(logits[team[:count]]), labels)
        for other in range(len(logits)):
            rival = average(logits[[*team[: count - 1], other]])
            assert found <= F.cross_entropy(rival, labels) + 1e-12


@pytest.mark.parametrize(("sign", "word"), [(1, "worse"), (-1, "better")])
def test_a_difference_counts_beyond_the_corrected_error_times_t(sign, word):
    PAGE["num_folds"] = 10
    noise = torch.tensor([-1.0, 1.0] * 5)
    error = (noise.std() * (1 / 10 + 500 / 4000) ** 0.5).item()  # Nadeau and Bengio
    limit = t.ppf(0.975, df=9)
    assert PAGE["verdict"](sign * 1.01 * limit * error + noise).endswith(word)
    assert PAGE["verdict"](sign * 0.99 * limit * error + noise).endswith("not certain")
