"""What plot_population.py relies on when members copy members."""

import copy
import math

import pytest
import torch
from pages import functions_of, names_of

SIZE = 8
exchange = names_of("training/plot_population", "exchange")["exchange"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {}),
        ("SGD", {"momentum": 0.9}),
        ("Adam", {"amsgrad": True}),
        ("AdamW", {"fused": True}),
        ("RMSprop", {"momentum": 0.9, "centered": True}),
        ("NAdam", {}),
    ],
)
def test_weights_state_and_settings_move_together(name, options):
    torch.manual_seed(0)
    params = {"w": torch.randn(2 * SIZE, 3, requires_grad=True)}
    optimizer = getattr(torch.optim, name)(params.values(), lr=0.1, **options)
    for _ in range(2):
        optimizer.zero_grad()
        params["w"].square().sum().backward()
        optimizer.step()
    before = [params["w"].detach().clone()]
    before += copy.deepcopy(list(optimizer.state[params["w"]].values()))
    settings, losses = torch.rand(2, 2 * SIZE), torch.rand(2 * SIZE)
    changed, source = exchange(params, optimizer, settings, losses, SIZE)

    copied = source != torch.arange(2 * SIZE)
    assert copied.sum() == 2 * (SIZE // 4)
    assert (losses[source] <= losses).all()
    assert (source.view(2, SIZE) // SIZE == torch.tensor([[0], [1]])).all()
    after = [params["w"], *optimizer.state[params["w"]].values()]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new, old[source] if old.dim() else old)
    ratio = changed / settings[:, source]
    assert (ratio[:, ~copied] == 1).all()
    assert (ratio[:, copied] >= 0.249).all()
    assert (ratio[:, copied] <= 4.01).all()


def test_losses_without_a_number_are_the_worst():
    losses = torch.tensor([0.3, math.nan, 5e30, 0.1, 0.2, math.inf, 1.0, 2.0])
    params = {"w": torch.zeros(SIZE, 1, requires_grad=True)}
    optimizer = torch.optim.SGD(params.values())
    _, source = exchange(params, optimizer, torch.ones(2, SIZE), losses, SIZE)
    assert (source != torch.arange(SIZE)).nonzero().flatten().tolist() == [1, 5]
    assert sorted(source[[1, 5]].tolist()) == [3, 4]


def test_the_step_is_that_of_the_sweep():
    pages = "training/plot_population", "training/plot_hyperparameter_sweep"
    steps = [functions_of(page, "step_each").partition("def ")[2] for page in pages]
    assert steps[0] == steps[1]
