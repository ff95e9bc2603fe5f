"""What plot_faster_training.py says and does not prove: the state stays in place."""

import torch
from pages import names_of
from torch import nn


def test_the_step_keeps_the_state_where_it_is_and_changes_all_of_it():
    page = names_of("training/plot_faster_training")
    models = [nn.Sequential(nn.Linear(6, 3)).double() for _ in range(4)]
    page["skeleton"] = nn.Sequential(nn.Linear(6, 3)).to("meta")
    state = page["begin"](models)
    before = [(p, p.data_ptr(), p.clone()) for part in state for p in part.values()]
    x = torch.randn(4, 8, 6, dtype=torch.float64)
    y = torch.randint(3, (4, 8))
    page["ensemble_step"](state, torch.tensor(1.0), x, y)
    for p, place, values in before:
        assert p.data_ptr() == place
        assert not torch.equal(p, values)


def test_the_state_does_not_share_memory_with_the_models():
    page = names_of("training/plot_faster_training")
    models = [nn.Linear(6, 3) for _ in range(4)]
    params, means, _ = page["begin"](models)
    params["weight"].zero_()
    assert all(model.weight.abs().sum() > 0 for model in models)
    assert means["weight"].eq(0).all()
