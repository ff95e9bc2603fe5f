"""What plot_from_many_to_few.py relies on: selection, nested vmap, softening."""

import itertools

import pytest
import torch
from pages import names_of
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

PAGE = names_of("uncertainty/plot_from_many_to_few", "check", "nll", "greedy")
nll, greedy = PAGE["nll"], PAGE["greedy"]


def members(num_members=6, num_images=40):
    torch.manual_seed(0)
    labels = torch.randint(10, (num_images,))
    logits = torch.randn(num_members, num_images, 10, dtype=torch.float64)
    return (logits + 2 * F.one_hot(labels, 10)).softmax(dim=-1), labels


def test_each_pick_is_the_best_addition():
    probs, labels = members()
    team = greedy(probs, labels, size=4)
    for count in range(1, 5):
        found = nll(probs[team[:count]].mean(dim=0), labels)
        for other in range(len(probs)):
            rival = nll(probs[[*team[: count - 1], other]].mean(dim=0), labels)
            assert found <= rival + 1e-12


def test_greedy_is_not_always_the_best_of_all_teams():
    right = torch.tensor([[0.6, 0.6], [0.98, 0.3], [0.3, 0.98]], dtype=torch.float64)
    probs, labels = torch.stack([right, 1 - right], dim=-1), torch.zeros(2).long()
    team = greedy(probs, labels, size=2)
    loss = {
        pair: nll(probs[list(pair)].mean(dim=0), labels)
        for pair in itertools.combinations(range(3), 2)
    }
    assert team[0] == 0
    assert min(loss, key=loss.get) == (1, 2)
    assert nll(probs[team].mean(dim=0), labels) > loss[1, 2]


def test_a_team_is_never_worse_than_its_members_on_average():
    # Jensen: the loss of the mean is at most the mean of the losses.
    probs, labels = members()
    alone = torch.stack([nll(p, labels) for p in probs])
    for team in itertools.combinations(range(len(probs)), 3):
        assert nll(probs[list(team)].mean(dim=0), labels) <= alone[list(team)].mean()


def test_nested_vmap_is_a_loop_over_splits_and_members():
    torch.manual_seed(0)
    models = [torch.nn.Linear(4, 3).double() for _ in range(6)]
    params, _ = stack_module_state(models)
    params = {k: p.detach().unflatten(0, (2, 3)) for k, p in params.items()}
    x = torch.randn(2, 5, 4, dtype=torch.float64)  # one set of images for each split
    skeleton = torch.nn.Linear(4, 3, device="meta")

    def predict(params, x):
        return functional_call(skeleton, params, (x,), strict=True)

    together = vmap(vmap(predict, in_dims=(0, None)))(params, x)
    for split, member in itertools.product(range(2), range(3)):
        alone = models[3 * split + member](x[split])
        torch.testing.assert_close(together[split, member], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
def test_adam_divides_a_factor_of_the_loss_away(optimizer):
    # So distillation with Adam needs no factor T ** 2; with SGD it does.
    def trained(kind, factor):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(8, dtype=torch.float64))
        a = torch.randn(30, 8, dtype=torch.float64)
        optimizer = getattr(torch.optim, kind)([p], lr=0.01)
        for row in a:
            optimizer.zero_grad()
            (factor * (1 + (row @ p) ** 2).log()).backward()
            optimizer.step()
        return p.detach()

    far = (trained("SGD", 9) - trained("SGD", 1)).abs().max()
    near = (trained(optimizer, 9) - trained(optimizer, 1)).abs().max()
    assert near < 1e-5 < 1e-2 < far


def test_a_distilled_network_can_reach_the_team_at_a_temperature():
    # The minimum of the loss with both sides at T is the team itself at T = 1.
    probs, _ = members()
    team, temperature = probs.mean(dim=0), 3.0
    logits = team.log().requires_grad_()
    target = (team.log() / temperature).softmax(dim=-1)
    F.cross_entropy(logits / temperature, target).backward()
    assert logits.grad.abs().max() < 1e-12
