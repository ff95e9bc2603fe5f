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
