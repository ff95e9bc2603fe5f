"""What plot_agents.py says of gymnasium's CartPole (make test-all)."""

import pytest
import torch
from pages import names_of

pytestmark = pytest.mark.slow
PAGE = names_of("uses/plot_agents", "move", "fallen", "play")


def test_states_falls_and_rewards():
    import gymnasium

    env, ends = gymnasium.make("CartPole-v1").unwrapped, [0, 0]
    for episode in range(60):
        env.reset(seed=episode)
        state = torch.tensor(env.state).double()
        for _ in range(500):
            steady = state @ torch.tensor([1.0, 1, 10, 3]).double() > 0
            right = (torch.rand(()) < 0.5).where(torch.tensor(episode % 3 > 0), steady)
            _, reward, fell, _, _ = env.step(int(right))
            state = PAGE["move"](state, right)
            there = torch.tensor(env.state).double()
            torch.testing.assert_close(state, there, atol=1e-13, rtol=0)
            assert reward == 1
            assert fell == PAGE["fallen"](state)
            if fell:
                break
        ends[fell] += 1
    assert min(ends) > 9, ends


def test_starts_and_time_limit():
    import gymnasium

    env = gymnasium.make("CartPole-v1")
    assert env.spec.max_episode_steps == 500
    assert env.spec.reward_threshold == 475
    starts = torch.tensor([env.reset(seed=i)[0].tolist() for i in range(300)])
    assert 0.045 < starts.abs().amax() <= 0.05


def test_carts_of_gymnasium_for_all_agents():
    import gymnasium

    envs = gymnasium.make_vec("CartPole-v1", 64 * 16)
    seen, _ = envs.reset(seed=0)
    assert torch.from_numpy(seen).reshape(64, 16, 4)[1, 2].tolist() == seen[18].tolist()
    right, fell = torch.ones(64, 16, dtype=torch.bool), torch.zeros(64 * 16).bool()
    starts = 0
    for _ in range(15):
        before, starts = fell, starts + fell.sum()
        action = right.flatten().int().cpu().numpy()
        seen, reward, fell, _, _ = envs.step(action)
        seen, reward, fell = map(torch.from_numpy, (seen, reward, fell))
        assert (reward[before] == 0).all(), "the step of a new start brings no reward"
        assert (seen[before].abs() <= 0.05).all()
    assert starts > 500
