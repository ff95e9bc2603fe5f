"""What plot_data.py says and does not prove: workers, half precision, one scaler."""

import pytest
import torch
from pages import names_of
from torch import nn
from torch.func import stack_module_state, vmap
from torch.utils.data import DataLoader, TensorDataset

PAGE = "training/plot_data"
NUM_MODELS = 4


@pytest.fixture
def page():
    torch.manual_seed(0)
    wanted = "build", "predict", "member_loss", "own_orders"
    names = names_of(PAGE, *wanted, num_models=NUM_MODELS)
    names["skeleton"] = names["build"]().to("meta")
    return names


@pytest.fixture
def params(page):
    return stack_module_state([page["build"]() for _ in range(NUM_MODELS)])[0]


def test_each_member_sees_all_rows_once_in_its_own_order(page):
    steps = [torch.tensor(s).view(NUM_MODELS, -1) for s in page["own_orders"](50, 8)]
    orders = torch.cat(steps, dim=1)
    assert orders.shape == (NUM_MODELS, 50)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(50).expand_as(orders))
    assert len(orders.unique(dim=0)) == NUM_MODELS


def test_workers_load_the_same_batches(page):
    data, steps = TensorDataset(torch.arange(50)), page["own_orders"](50, 8)
    alone = [batch for (batch,) in DataLoader(data, batch_sampler=steps)]
    loader = DataLoader(data, batch_sampler=steps, num_workers=2)
    for batch, expected in zip(loader, alone, strict=True):
        torch.testing.assert_close(batch[0], expected)


def test_autocast_trains_as_for_one_model(page, params):
    x, y = torch.randn(NUM_MODELS, 32, 64), torch.randint(10, (NUM_MODELS, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vmap(page["member_loss"])(params, x, y).sum().backward()
    for i in range(NUM_MODELS):
        alone = page["build"]()
        alone.load_state_dict({name: p[i] for name, p in params.items()})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(alone(x[i]), y[i])
        loss.backward()
        for name, p in alone.named_parameters():
            assert params[name].grad.dtype == torch.float32
            torch.testing.assert_close(
                params[name].grad[i], p.grad, rtol=0.03, atol=1e-3
            )


@pytest.mark.parametrize("overflows", [False, True])
def test_one_overflow_skips_the_step_of_all(params, overflows):
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    old = params["0.weight"].detach().clone()
    scaler.scale(sum(p.sum() for p in params.values())).backward()
    if overflows:
        params["2.bias"].grad[3, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    moved = (params["0.weight"] != old).flatten(1).any(dim=1)
    assert moved.sum() == (0 if overflows else NUM_MODELS)
    assert scaler.get_scale() == (2.0**15 if overflows else 2.0**16)


def test_multinomial_takes_rows_of_others_where_a_subset_is_too_small():
    chance = torch.zeros(1, 100)
    chance[0, :10] = 1
    rows = torch.multinomial(chance, 32)
    assert (rows >= 10).sum() == 22
