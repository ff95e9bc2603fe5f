"""What plot_critics.py does in one stack for many runs."""

import pytest
import torch
from pages import names_of
from torch import nn
from torch.func import stack_module_state, vmap

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 10])
def test_a_minimum_over_some_targets_of_each_run(size):
    page = names_of("uses/plot_critics", device=CPU, num_runs=3, sizes=[size])
    page["over"] = torch.full((3,), size)
    page["every"] = vmap(vmap(page["of_actions"], in_dims=(0, None)))
    with torch.device("meta"):
        page["four"] = page["build_four"]()
    models = [page["build_four"]().double() for _ in range(30)]
    params, _ = stack_module_state(models)
    params = {k: p.detach().unflatten(0, (3, 10)) for k, p in params.items()}
    target = {k: p.clone() for k, p in params.items()}
    start = {k: p.clone() for k, p in params.items()}
    states, following = torch.randn(2, 3, 5, 4).double()
    actions, reward = torch.randint(4, (3, 5)), torch.randn(3, 5).double()
    optimizer = torch.optim.SGD([p.requires_grad_() for p in params.values()], lr=1)
    torch.manual_seed(1)
    page["improve"](params, target, optimizer, states, actions, reward, following)

    torch.manual_seed(1)
    rank = torch.rand(3, 10).argsort(1)
    for run in range(3):
        team = models[10 * run : 10 * run + 10]
        chosen = [m for m, place in zip(team, rank[run], strict=True) if place < size]
        assert len(chosen) == size
        low = torch.stack([m(following[run]) for m in chosen]).amin(0).amax(-1)
        goal = (reward[run] + 0.9 * low).detach()
        for i, model in enumerate(team):
            out = model(states[run])[torch.arange(5), actions[run]]
            (out - goal).square().mean().backward()
            for name, p in nn.Module.named_parameters(model):
                moved = p.detach() - p.grad
                torch.testing.assert_close(
                    params[name][run, i].detach(), moved, atol=1e-12, rtol=0
                )
                followed = start[name][run, i].lerp(moved, 0.01)
                torch.testing.assert_close(
                    target[name][run, i], followed, atol=1e-12, rtol=0
                )
