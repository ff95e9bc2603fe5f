"""What plot_how_far.py says in a clause, with the functions of that page."""

import pytest
import torch
from pages import names_of, peak_bytes

MEASURED = {1: (0.5, 1.0), 10: (1.0, 10.0), 100: (5.0, 100.0)}  # seconds, MB


@pytest.fixture
def page():
    cpu = torch.device("cpu")
    names = names_of("scale/plot_how_far", cpu=cpu, device=cpu)
    names["skeleton"] = names["make_model"]().to("meta")
    return names


@pytest.mark.parametrize(
    ("num_models", "budget", "group", "seconds"),
    [
        (1000, 1000, 100, 10 * 5.0),  # the quickest for a model
        (1000, 99, 10, 100 * 1.0),  # the quickest that fits
        (1000, 1, 1, 1000 * 0.5),
        (1001, 1000, 100, 11 * 5.0),  # a last group that is not full counts as full
        (10, 1000, 10, 1.0),  # no group is larger than what there is to train
        (1, 1000, 1, 0.5),
    ],
)
def test_a_plan_takes_the_quickest_measured_size_that_fits(
    page, num_models, budget, group, seconds
):
    found = page["plan"](num_models, 7, MEASURED, budget)
    assert found == (group, pytest.approx(7 * seconds))


def test_a_budget_that_nothing_fits_is_refused(page):
    with pytest.raises(ValueError, match="none of the measured sizes fits"):
        page["plan"](10, 1, MEASURED, 0.5)


def test_a_loop_that_is_quicker_is_planned(page):
    measured = {1: (0.5, 1.0), 10: (6.0, 10.0)}
    assert page["plan"](100, 1, measured, 1000) == (1, 50.0)


@pytest.mark.parametrize(
    ("found", "holds"), [(0.79, False), (0.81, True), (1.24, True), (1.26, False)]
)
def test_a_plan_that_its_check_refuses_says_so(page, found, holds):
    said = page["verdict"](10.0, 10 * found, "s", 1.25)
    assert ("it holds" in said) is holds
    assert ("project nothing from it" in said) is not holds


@pytest.mark.parametrize("size", [1, 50, 200])
def test_the_peak_is_that_of_the_memory_page_and_of_the_count(page, size):
    peak = page["peak_mb"](size) * 1e6

    own = peak_bytes(lambda: page["train"](size, 2))
    assert peak == pytest.approx(own, rel=0.01)
    parameters = sum(p.numel() for p in page["make_model"]().parameters())
    state = 4 * 4 * parameters * size  # parameters, gradients, two numbers of Adam
    minibatch = 4 * 32 * 64 * size
    assert state + minibatch < peak < 2 * (state + minibatch)


def test_the_peak_grows_along_a_straight_line(page):
    few, more, many = [page["peak_mb"](size) for size in (10, 100, 400)]
    assert few + (more - few) / 90 * 390 == pytest.approx(many, rel=0.05)


def test_groups_one_after_the_other_need_the_memory_of_one(page):
    def job():
        for _ in range(3):
            page["train"](50, 2)

    assert peak_bytes(job) == pytest.approx(page["peak_mb"](50) * 1e6, rel=0.05)
