"""What plot_agents.py says in a clause."""

import math

import pytest
import torch
from pages import names_of
from torch.distributions import Bernoulli
from torch.func import stack_module_state, vmap

CPU = torch.device("cpu")
SCALE = torch.tensor([1.0, 1.0, 5.0, 1.0])
PAGE = names_of("uses/plot_agents", device=CPU, scale=SCALE)
Agent, call, move, fallen = map(PAGE.get, ["Agent", "call", "move", "fallen"])
with torch.device("meta"):
    PAGE["skeleton"] = Agent()


def test_a_start_an_end_and_an_age():
    state = torch.tensor([[[0.0, 0, 0, 0], [2.39, 3, 0, 0], [0, 0, 0, 0]]])
    luck, age = torch.rand(16, 1, 3, 5), torch.tensor([[0.0, 0, 499]])

    def still(state):
        return state[..., 0] * 0, state[..., 0] * 0

    (_, last), (states, right, after, fell, end) = PAGE["play"](still, state, age, luck)
    assert fell[0, 0].tolist() == [False, True, False]
    assert end[0, 0].tolist() == [False, True, True]
    assert (states[0, 1, 1:] == 0.1 * luck[0, 0, 1:, 1:] - 0.05).all()
    assert (states[0, 1, 0] == after[0, 0, 0]).all()
    assert (right == (luck[..., 0] < 0.5).transpose(0, 1)).all()
    assert last[0, 2] <= 15


def test_a_time_limit_counts_the_value_and_ends_the_sum():
    model, state = Agent().double(), torch.randn(1, 16, 2, 4).double()
    after, right = torch.randn_like(state), torch.rand(1, 16, 2) < 0.5
    fell = torch.rand(1, 16, 2) < 0.2
    end = fell | (torch.rand(1, 16, 2) < 0.2)
    *_, advantage, goal = PAGE["judge"](model, state, right, after, fell, end)
    value, later = model(state)[1], model(after)[1]
    torch.testing.assert_close(goal, advantage + value)
    for cart in range(2):
        total = 0.0
        for t in reversed(range(16)):
            if end[0, t, cart]:
                total = 0.0
            beyond = 0.0 if fell[0, t, cart] else later[0, t, cart].item()
            total = 0.01 + 0.99 * beyond - value[0, t, cart].item() + 0.9405 * total
            assert math.isclose(advantage[0, t, cart].item(), total, abs_tol=1e-12)


def test_the_interquartile_mean_and_its_draws():
    for num in (3, 10, 16):
        values = torch.randn(2, num)
        middle = values.sort().values[:, num // 4 : num - num // 4]
        torch.testing.assert_close(PAGE["iqm"](values), middle.mean(1))
    values = torch.arange(16.0).expand(3, 5, 16)
    draws = PAGE["bootstrap"](values, 10)
    assert draws.shape == (3, 5, 2000)
    assert not (draws[0] == draws[1]).all(), "each row has draws of its own"
    assert (draws.mean(-1) - 7.5).abs().max() < 0.4


def test_random_numbers_inside():
    params, _ = stack_module_state([Agent() for _ in range(4)])
    draw = vmap(
        lambda p, x: Bernoulli(logits=call(p, x)[0]).sample(), randomness="different"
    )
    drawn = draw(params, torch.zeros(4, 200, 4))
    assert drawn.shape == (4, 200)
    assert drawn.unique().tolist() == [0, 1]


def test_a_mask_inside():
    def starts(state):
        state[fallen(state)] = 0
        return state

    with pytest.raises(RuntimeError, match="dynamic shape"):
        vmap(starts)(torch.zeros(3, 5, 4))


def test_actions_of_logits_of_any_shape():
    logits = torch.randn(2, 1, 3).expand(2, 40_000, 3)
    action = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)
    share = torch.nn.functional.one_hot(action, 3).float().mean(1)
    torch.testing.assert_close(share, logits[:, 0].softmax(-1), atol=0.02, rtol=0)
