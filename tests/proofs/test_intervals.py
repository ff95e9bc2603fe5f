"""What plot_intervals.py relies on: its interval is the one of the papers."""

import math

import pytest
import torch
from pages import names_of
from scipy.stats import norm
from torch.nn import functional as F

USED = "bootstrap interval smallest gaussian_loss normal member_loss"
PAGE = names_of("uncertainty/plot_intervals", *USED.split())


def regression(num_rows=30, num_new=7, seed=0):
    """Rows and new rows of a line with noise, float64."""
    torch.manual_seed(seed)
    x = torch.randn(num_rows + num_new, 3, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2, 0.5], dtype=torch.float64)
    y += torch.randn(len(y), dtype=torch.float64)
    return x[:num_rows], y[:num_rows], x[num_rows:], y[num_rows:]


def fitted(x, y, counts):
    """Weighted least squares for each member, at all rows and at any others."""

    def of(count, at):
        root = count.sqrt()[:, None]
        return at @ torch.linalg.lstsq(root * x, root * y[:, None]).solution[:, 0]

    return lambda at: torch.stack([of(count, at) for count in counts])


def test_leave_one_out_is_the_jackknife_plus_of_barber():
    x, y, new, _ = regression()
    counts = 1 - torch.eye(30, dtype=torch.float64)
    predict = fitted(x, y, counts)
    low, high = PAGE["interval"](predict(x), predict(new), counts, y)
    error = (y - predict(x).diagonal()).abs()
    for j in range(len(new)):
        below = sorted((predict(new)[:, j] - error).tolist())
        above = sorted((predict(new)[:, j] + error).tolist())
        assert low[j] == pytest.approx(below[math.floor(0.1 * 31) - 1])
        assert high[j] == pytest.approx(above[math.ceil(0.9 * 31) - 1])


def test_a_bootstrap_interval_asks_only_members_that_missed_the_row():
    x, y, new, _ = regression()
    counts = PAGE["bootstrap"](20, 30).double()
    predict = fitted(x, y, counts)
    at_rows, at_new = predict(x), predict(new)
    low, high = PAGE["interval"](at_rows, at_new, counts, y)
    spoiled = torch.where(counts > 0, at_rows + 100, at_rows)
    again = PAGE["interval"](spoiled, at_new, counts, y)
    torch.testing.assert_close(again, (low, high))
    counts[:, 3] = 1  # everybody saw row 3, so it drops out
    assert torch.stack(PAGE["interval"](at_rows, at_new, counts, y)).isfinite().all()


def test_each_member_draws_as_many_rows_as_there_are():
    assert (PAGE["bootstrap"](50, 60).sum(1) == 60).all()


def test_few_rows_promise_nothing():
    values = torch.arange(8.0)[:, None]
    assert PAGE["smallest"](values, 0.9).isinf().all()
    assert PAGE["smallest"](torch.arange(9.0)[:, None], 0.9) == 8


def test_the_variance_is_that_of_the_mixture_and_the_loss_that_of_torch():
    outputs = torch.randn(2, 4, 5, 2, dtype=torch.float64)
    center, variance = PAGE["normal"](outputs, torch.full((2, 4, 5), 0.25).double())
    mean, noise = outputs[..., 0], outputs[..., 1].exp()
    expected = noise.mean(1) + mean.var(1, unbiased=False)
    torch.testing.assert_close(variance, expected)
    torch.testing.assert_close(center, mean.mean(1))
    PAGE["predict"] = lambda params, x: outputs[0, 0]
    y = torch.randn(5, dtype=torch.float64)
    ours = PAGE["gaussian_loss"](None, torch.ones_like(y), None, y)
    torch.testing.assert_close(ours, F.gaussian_nll_loss(mean[0, 0], y, noise[0, 0]))
    assert norm.ppf(0.95) == pytest.approx(1.645, abs=1e-3)


@pytest.mark.slow
def test_mapie_s_jackknife_plus_is_the_same():
    """MAPIE is installed by `make test-all` only: requirements-test-all.txt."""
    from mapie.regression import CrossConformalRegressor
    from sklearn.linear_model import LinearRegression

    x, y, new, _ = regression()
    counts = 1 - torch.eye(30, dtype=torch.float64)
    predict = fitted(x, y, counts)
    low, high = PAGE["interval"](predict(x), predict(new), counts, y)
    model = LinearRegression(fit_intercept=False)
    mapie = CrossConformalRegressor(model, confidence_level=0.9, method="plus", cv=-1)
    mapie.fit_conformalize(x.numpy(), y.numpy())
    _, ends = mapie.predict_interval(new.numpy())
    ours = torch.stack([low, high], 1)
    torch.testing.assert_close(ours, torch.as_tensor(ends[..., 0]))
