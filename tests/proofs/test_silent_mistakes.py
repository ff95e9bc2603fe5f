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


@pytest.mark.parametrize(
    ("kind", "decay", "hidden"),
    [("Adam", 0, True), ("Adam", 0.1, False), ("AdamW", 0.1, True)],
)
def test_adam_hides_the_mean_of_the_losses(kind, decay, hidden):
    ends = []
    for combine in torch.sum, torch.mean:
        p = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
        optimizer = getattr(torch.optim, kind)([p], weight_decay=decay)
        for _ in range(5):
            optimizer.zero_grad()
            combine((p - torch.arange(12).view(4, 3)).square().sum(1)).backward()
            optimizer.step()
        ends.append(p.detach())
    assert torch.allclose(*ends, rtol=0, atol=1e-6) == hidden


def branch(test, z):
    return torch.cond(test > 0, torch.sin, torch.cos, (z,))


def branch_where(test, z):
    return torch.where(test > 0, z.sin(), z.cos())


def test_cond_in_two_calls_of_vmap_is_wrong_if_their_sizes_are_equal():
    tests, zs = torch.tensor([1.0, -1.0, 1.0]), torch.randn(3, 2)

    def nested(function, tests, zs):
        return vmap(lambda t: vmap(lambda z: function(t, z))(zs))(tests)

    loop = torch.stack([torch.stack([branch_where(t, z) for z in zs]) for t in tests])
    assert torch.equal(nested(branch_where, tests, zs), loop)
    assert not torch.allclose(nested(branch, tests, zs), loop)
    with pytest.raises(ValueError, match="same size in the mapped dimension"):
        nested(branch, tests[:2], zs)
    once = torch.stack([branch(t, z) for t, z in zip(tests, zs, strict=True)])
    assert torch.equal(vmap(branch)(tests, zs), once)


def test_a_hook_and_append_act_once():
    acted = []
    layer = nn.Linear(4, 3)
    layer.register_forward_hook(lambda *_: acted.append("hook"))
    vmap(lambda x: (acted.append("append"), layer(x))[1])(torch.randn(3, 5, 4))
    assert acted == ["append", "hook"]


def test_index_add_loops_only_if_each_model_has_its_own_indices(recwarn):
    page = names_of("basics/plot_silent_mistakes", "Record", "add_rows", calls=[])
    x, own = torch.randn(3, 8, 4), torch.randint(3, (3, 8))
    for indices, in_dim, expected in (own, 0, 3), (own[0], None, 1):
        page["calls"].clear()
        with page["Record"]():
            vmap(page["add_rows"], in_dims=(0, in_dim))(x, indices)
        assert page["calls"].count("index_add") == expected
    assert not recwarn


def test_more_without_a_message():
    params, _ = stack_module_state([nn.Linear(4, 3) for _ in range(3)])
    assert not [p for p in params.values() if p.ndim < 2]
    assert [n for n, p in params.items() if p.ndim < 3] == ["bias"]
    asked = []

    def ask(params, x):
        asked.extend(p.requires_grad for p in params.values())
        return PAGE["predict"](params, x)

    losses = vmap(ask)(params, torch.randn(3, 5, 4)).square().mean((1, 2))
    assert asked == [False, False]
    ask_for = params["weight"][2], params["weight"]
    row, whole = torch.autograd.grad(losses.sum(), ask_for, allow_unused=True)
    assert row is None
    assert whole[2].abs().max() > 0


def test_the_accuracy_of_an_ensemble_is_not_a_mean_of_accuracies():
    logits = torch.tensor([[[9.0, 0.0]], [[0.0, 0.5]], [[0.0, 0.5]]])  # label: 0
    assert (logits.argmax(-1) == 0).float().mean() < 0.5
    assert logits.softmax(-1).mean(0).argmax(-1) == 0
