"""What plot_training.py says and does not prove: optimizers, clipping, mean, NaN."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pages import names_of
from torch import nn
from torch.func import stack_module_state, vmap

NUM_MODELS, NUM_STEPS = 5, 30


def new_model():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


PAGE = names_of("training/plot_training", "member_loss", "train_step", "clip_each")
PAGE["skeleton"] = new_model().to("meta")
member_loss, clip_each = PAGE["member_loss"], PAGE["clip_each"]


@pytest.fixture
def models():
    torch.manual_seed(0)
    return [new_model() for _ in range(NUM_MODELS)]


@pytest.fixture
def data(models):
    """Minibatches of all steps, [step, member, batch, ...]."""
    x = torch.randn(NUM_STEPS, NUM_MODELS, 7, 6, dtype=torch.float64)
    return x, torch.randint(3, (NUM_STEPS, NUM_MODELS, 7))


def train_together(models, data, make_optimizer, total=None, clip=None):
    """With the step of the page, or with another total of the losses, or a clip."""
    params, _ = stack_module_state(models)
    optimizer = make_optimizer(params.values())
    for x, y in zip(*data, strict=True):
        if not total and not clip:
            PAGE["train_step"](params, optimizer, x, y)
            continue
        optimizer.zero_grad()
        (total or torch.sum)(vmap(member_loss)(params, x, y)).backward()
        if clip:
            clip(params.values(), 0.1)
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def train_alone(models, data, make_optimizer, clip=None):
    trained = [copy.deepcopy(model) for model in models]
    for member, model in enumerate(trained):
        optimizer = make_optimizer(model.parameters())
        for x, y in zip(*data, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x[member]), y[member]).backward()
            if clip:
                clip(model.parameters(), 0.1)
            optimizer.step()
    return {name: p.detach() for name, p in stack_module_state(trained)[0].items()}


def distances(one, other):
    """Largest distance of each member."""
    apart = [(one[name] - p).abs().flatten(1) for name, p in other.items()]
    return torch.cat(apart, dim=1).amax(dim=1)


def sgd(params, lr=0.3, weight_decay=1e-2):
    return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=weight_decay)


def adam(params, eps=1e-8):
    return torch.optim.Adam(params, lr=0.01, eps=eps)


def decayed_adam(params, weight_decay=1e-2):
    return torch.optim.Adam(params, lr=0.01, weight_decay=weight_decay)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def fused(params):
    return torch.optim.Adam(params, lr=0.01, fused=True)


@pytest.mark.parametrize("make_optimizer", [sgd, adam, decayed_adam, adamw, fused])
def test_training_together_is_training_alone(models, data, make_optimizer):
    together = train_together(models, data, make_optimizer)
    alone = train_alone(models, data, make_optimizer)
    assert distances(together, alone).max() < 1e-10


def test_a_scheduler_of_the_one_optimizer_schedules_all_members(models, data):
    def scheduled(params):
        optimizer = adam(params)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    together = train_together(models, data, scheduled)
    assert distances(together, train_alone(models, data, scheduled)).max() < 1e-10


def test_adafactor_mixes_members(models, data):
    def adafactor(params):
        return torch.optim.Adafactor(params, lr=0.01)

    together = train_together(models, data, adafactor)
    assert distances(together, train_alone(models, data, adafactor)).min() > 1e-4


def test_muon_refuses_stacked_matrices(models):
    params, _ = stack_module_state(models)
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon(params.values())


@pytest.mark.parametrize("make_optimizer", [sgd, adam])
def test_clipping_each_member_is_clipping_alone(models, data, make_optimizer):
    alone = train_alone(models, data, make_optimizer, nn.utils.clip_grad_norm_)
    unclipped = train_alone(models, data, make_optimizer)
    together = train_together(models, data, make_optimizer, clip=clip_each)
    for_all = train_together(
        models, data, make_optimizer, clip=nn.utils.clip_grad_norm_
    )
    assert distances(together, alone).max() < 1e-10
    assert distances(unclipped, alone).min() > 1e-3  # the clip has an effect,
    assert distances(for_all, alone).min() > 1e-3  # and one for all another one


def test_clipping_works_for_scalar_parameters():
    p = nn.Parameter(torch.ones(3))  # one number a member
    p.grad = torch.tensor([4.0, 0.5, torch.nan])
    clip_each([p], 1.0)
    torch.testing.assert_close(p.grad[:2], torch.tensor([1.0, 0.5]))


def test_the_mean_is_a_smaller_rate_and_a_larger_decay_for_sgd(models, data):
    wrong = train_together(models, data, sgd, total=torch.mean)

    def equivalent(params):
        return sgd(params, 0.3 / NUM_MODELS, 1e-2 * NUM_MODELS)

    assert distances(wrong, train_alone(models, data, equivalent)).max() < 1e-10
    assert distances(wrong, train_alone(models, data, sgd)).min() > 1e-3


def test_the_mean_is_a_larger_eps_for_adam_and_a_larger_decay(models, data):
    wrong = train_together(models, data, adam, total=torch.mean)

    def larger_eps(params):
        return adam(params, eps=1e-8 * NUM_MODELS)

    assert distances(wrong, train_alone(models, data, larger_eps)).max() < 1e-10

    def both(params):
        weight_decay, eps = 1e-2 * NUM_MODELS, 1e-8 * NUM_MODELS
        return torch.optim.Adam(params, lr=0.01, weight_decay=weight_decay, eps=eps)

    wrong = train_together(models, data, decayed_adam, total=torch.mean)
    assert distances(wrong, train_alone(models, data, both)).max() < 1e-10


def test_a_member_with_nan_leaves_the_others_as_they_are(models, data):
    well = train_together(models, data, adam)
    with torch.no_grad():
        models[3][0].weight.mul_(torch.nan)
    ill = train_together(models, data, adam)
    apart = distances(ill, well)
    assert apart[3].isnan()
    assert apart[[0, 1, 2, 4]].max() < 1e-10
