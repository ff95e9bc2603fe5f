"""What plot_between_members.py relies on: lines, soups, forks, a verdict's limit."""

import pytest
import torch
from pages import names_of
from scipy.stats import t
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

USED = "build predict loss line soup minibatches verdict"
PAGE = names_of("uncertainty/plot_between_members", *USED.split())


@pytest.fixture
def params():
    torch.manual_seed(0)
    with torch.device("meta"):
        PAGE["skeleton"] = PAGE["build"]()
    return stack_module_state([PAGE["build"]() for _ in range(4)])[0]


def test_a_line_ends_at_its_two_members(params):
    x, y = torch.rand(20, 196), torch.randint(10, (20,))
    one, two = ({name: p[i] for name, p in params.items()} for i in (0, 3))
    losses = PAGE["line"](one, two, x, y, 7)
    assert losses.shape == (7,)
    torch.testing.assert_close(losses[0], PAGE["loss"](one, x, y))
    torch.testing.assert_close(losses[-1], PAGE["loss"](two, x, y))


def test_lines_of_many_pairs_go_in_one_call(params):
    x, y = torch.rand(20, 196), torch.randint(10, (20,))
    turned = {name: p.flip(0) for name, p in params.items()}
    losses = vmap(PAGE["line"], in_dims=(0, 0, None, None))(params, turned, x, y)
    torch.testing.assert_close(losses, losses.flip(0).flip(1))


def test_batch_norm_takes_the_statistics_of_the_batch():
    def build():
        return nn.Sequential(nn.Linear(196, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

    models = [build() for _ in range(2)]
    one, two = (dict(model.named_parameters()) for model in models)
    with torch.device("meta"):
        PAGE["skeleton"] = build()
    torch.func.replace_all_batch_norm_modules_(PAGE["skeleton"])
    x, y = torch.rand(20, 196), torch.randint(10, (20,))
    with torch.no_grad():
        losses = PAGE["line"](one, two, x, y, 3)
        for share, found in zip((0, 0.5, 1), losses, strict=True):
            mixed = {k: (1 - share) * one[k] + share * two[k] for k in one}
            alone = functional_call(models[0].train(), mixed, x)
            torch.testing.assert_close(found, nn.functional.cross_entropy(alone, y))


def test_a_soup_is_one_network_with_the_mean_of_the_weights(params):
    mean = PAGE["soup"](params)
    model = PAGE["build"]()
    model.load_state_dict(mean)
    torch.testing.assert_close(mean["0.bias"], params["0.bias"].sum(0) / 4)
    x = torch.rand(5, 196)
    torch.testing.assert_close(
        functional_call(nn.Sequential(*model), mean, x), model(x)
    )


def test_members_of_a_fork_see_the_same_images_up_to_the_fork():
    own, shared = torch.randint(3000, (9, 2, 4, 32)), torch.randint(3000, (9, 2, 1, 32))
    PAGE.update(num_steps=9, own=own, shared=shared)
    rows = PAGE["minibatches"](5)
    assert (rows[:5] == shared[:5]).all()
    assert (rows[5:] == own[5:]).all()
    assert (PAGE["minibatches"](0) == own).all()


def test_the_limit_of_a_verdict_is_student_s_for_eight_repeats():
    assert round(t.ppf(0.975, 7), 2) == 2.36
    gaps = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1])
    edge = 2.36 * gaps.std() / 8**0.5
    zero = torch.zeros(8)
    assert PAGE["verdict"](gaps + 1.01 * edge, zero).endswith("worse")
    assert PAGE["verdict"](gaps - 1.01 * edge, zero).endswith("better")
    assert PAGE["verdict"](gaps + 0.99 * edge, zero).endswith("not certain")
