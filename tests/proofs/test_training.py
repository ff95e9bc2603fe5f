"""What plot_training.py says and does not prove: optimizers, clipping, the mean."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pages import names_of
from torch import nn
from torch.func import stack_module_state, vmap

NUM_MODELS, NUM_STEPS = 5, 30


def new_model():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


WANTED = "predict", "member_loss", "train_step", "clip_each"
PAGE = names_of("training/plot_training", *WANTED)
PAGE["skeleton"] = new_model().to("meta")


@pytest.fixture
def models():
    torch.manual_seed(0)
    return [new_model() for _ in range(NUM_MODELS)]


@pytest.fixture
def data(models):
    """Minibatches of all steps, [step, member, batch, ...]."""
    x = torch.randn(NUM_STEPS, NUM_MODELS, 7, 6, dtype=torch.float64)
    return x, torch.randint(3, (NUM_STEPS, NUM_MODELS, 7))


def train_together(models, data, make_optimizer, clip=None, total=torch.sum):
    """With the step of the page, or with a clip in it, or with the mean."""
    params, _ = stack_module_state(models)
    optimizer = make_optimizer(params.values())
    for x, y in zip(*data, strict=True):
        if not clip and total is torch.sum:
            PAGE["train_step"](params, optimizer, x, y)
            continue
        optimizer.zero_grad()
        total(vmap(PAGE["member_loss"])(params, x, y)).backward()
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


sgd = partial(torch.optim.SGD, lr=0.3, momentum=0.9, weight_decay=1e-2)
adam = partial(torch.optim.Adam, lr=0.01, weight_decay=1e-2)
adamw = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
adafactor = partial(torch.optim.Adafactor, lr=0.01)


@pytest.mark.parametrize("make_optimizer", [sgd, adam, adamw])
def test_training_together_is_training_alone(models, data, make_optimizer):
    together = train_together(models, data, make_optimizer)
    alone = train_alone(models, data, make_optimizer)
    assert distances(together, alone).max() < 1e-10


def test_adafactor_mixes_members(models, data):
    together = train_together(models, data, adafactor)
    assert distances(together, train_alone(models, data, adafactor)).min() > 1e-4


def test_muon_refuses_stacked_matrices(models):
    params, _ = stack_module_state(models)
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon(params.values())
    ends = []
    for rows in 2, 3:  # stacked vectors are matrices to it
        p = torch.ones(rows, 4, requires_grad=True)
        optimizer = torch.optim.Muon([p], lr=0.1)
        (p * torch.arange(4 * rows).view(rows, 4).cos()).sum().backward()
        optimizer.step()
        ends.append(p.detach()[:2])
    assert (ends[0] - ends[1]).abs().max() > 1e-3


def test_lbfgs_mixes_members():
    ends = []
    for steep in [1.0, 30.0], [1.0]:
        p = torch.ones(len(steep), 2, dtype=torch.float64, requires_grad=True)
        slope = torch.tensor([1.0, 3.0]) * torch.tensor(steep)[:, None]
        optimizer = torch.optim.LBFGS([p], max_iter=3)

        def loss(p=p, slope=slope, optimizer=optimizer):
            optimizer.zero_grad()
            value = (slope * p.square() + p.sin()).sum()
            value.backward()
            return value

        optimizer.step(loss)
        ends.append(p.detach()[0])
    assert (ends[0] - ends[1]).abs().max() > 1e-3


def test_clipping_each_member_is_clipping_alone(models, data):
    for_all = nn.utils.clip_grad_norm_
    alone = train_alone(models, data, sgd, for_all)
    together = train_together(models, data, sgd, PAGE["clip_each"])
    assert distances(together, alone).max() < 1e-10
    assert distances(train_alone(models, data, sgd), alone).min() > 1e-3
    assert distances(train_together(models, data, sgd, for_all), alone).min() > 1e-3


def exact(optimizer, decay):  # without the eps, which the mean makes larger
    return partial(optimizer, lr=0.01, eps=1e-30, weight_decay=decay)


@pytest.mark.parametrize(("make_optimizer", "same"), [
    (partial(torch.optim.SGD, lr=0.3), partial(torch.optim.SGD, lr=0.3 / NUM_MODELS)),
    (exact(torch.optim.Adam, 0), exact(torch.optim.Adam, 0)),
    (exact(torch.optim.Adam, 0.01), exact(torch.optim.Adam, 0.01 * NUM_MODELS)),
    (exact(torch.optim.AdamW, 0.1), exact(torch.optim.AdamW, 0.1)),
])  # fmt: skip
def test_what_the_mean_of_the_losses_does(models, data, make_optimizer, same):
    by_mean = train_together(models, data, make_optimizer, total=torch.mean)
    assert distances(by_mean, train_together(models, data, same)).max() < 1e-8
