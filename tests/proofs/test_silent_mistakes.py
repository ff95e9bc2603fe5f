"""plot_silent_mistakes.py: which mistakes become errors when all sizes differ."""

import pytest
import torch
from pages import names_of
from torch import nn
from torch.func import stack_module_state, vmap

PAGE = names_of("basics/plot_silent_mistakes", "predict", "scaled")
PAGE["skeleton"] = nn.Linear(4, 3, device="meta")


def test_different_sizes_turn_the_first_two_mistakes_into_errors():
    params, _ = stack_module_state([nn.Linear(4, 3) for _ in range(3)])
    minibatches, scales = torch.randn(3, 5, 4), torch.randn(3)
    vmap(PAGE["scaled"])(params, minibatches, scales)
    with pytest.raises(RuntimeError, match="must match the size"):
        vmap(PAGE["scaled"])(params, minibatches, scale=scales)
    with pytest.raises(ValueError, match="same size in the mapped dimension"):
        vmap(PAGE["predict"])(params, minibatches[0])


@pytest.mark.parametrize(("decay", "hidden"), [(0, True), (0.1, False)])
def test_adam_hides_the_mean_of_the_losses(decay, hidden):
    ends = []
    for combine in torch.sum, torch.mean:
        p = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([p], weight_decay=decay, eps=1e-30)
        for _ in range(5):
            optimizer.zero_grad()
            combine((p - torch.arange(12).view(4, 3)).square().sum(1)).backward()
            optimizer.step()
        ends.append(p.detach())
    assert torch.allclose(*ends, rtol=0, atol=1e-10) == hidden
