"""What plot_clients.py says in a clause."""

import ast
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pages import lifted, names_of
from torch.func import vmap

CPU = torch.device("cpu")


@pytest.fixture
def page():
    page = names_of("uses/plot_clients", device=CPU)
    with torch.device("meta"):
        page["skeleton"] = page["build"]()
    return page


def test_the_loop_is_that_of_an_optimizer_for_each_client_stopped_on_its_own(page):
    model, counts = page["build"]().double(), torch.tensor([1.0, 7, 30]).double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    x, y = torch.randn(3, 6, 4, 64).double(), torch.randint(10, (3, 6, 4))
    models = [page["build"]().double() for _ in range(3)]
    taken = torch.tensor([2, 6, 3])
    rates = 0.3 * (torch.arange(6) < taken[:, None]).double()
    best = page["looped"](models, params, x, y, rates, counts)
    once = page["average"](params, x, y, rates, counts)
    copies = [copy.deepcopy(model) for _ in counts]
    for one, rows, labels, steps in zip(copies, x, y, taken.tolist(), strict=True):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.3)
        for step, target in zip(rows[:steps], labels[:steps], strict=True):
            optimizer.zero_grad()
            F.cross_entropy(one(step), target).backward()
            optimizer.step()
    for k, p in best.items():
        stack = torch.stack([one.get_parameter(k).detach() for one in copies])
        wanted = torch.tensordot(counts / 38, stack, 1)
        torch.testing.assert_close(p, wanted, atol=1e-12, rtol=0)
        torch.testing.assert_close(once[k], wanted, atol=1e-12, rtol=0)


def test_what_is_added_for_fedprox_is_the_gradient_of_its_loss(page):
    """The page's local with the page's words put in, beside a loss with the term."""
    (local,) = lifted("uses/plot_clients", ["local"]).body[-1:]
    code = ast.unparse(local).replace("slope[k]", "(slope[k] + mu * (p - start[k]))")
    code = code.replace("    for ", "    start, mu = (params, 0.5)\n    for ", 1)
    exec(code, page)
    model = page["build"]().double()
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    x, y = torch.randn(6, 4, 64).double(), torch.randint(10, (6, 4))
    prox = page["local"](start, x, y, 6 * [0.3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for rows, labels in zip(x, y, strict=True):
        pairs = [(p, start[k]) for k, p in model.named_parameters()]
        far = sum((p - begin).square().sum() for p, begin in pairs)
        optimizer.zero_grad()
        (F.cross_entropy(model(rows), labels) + 0.25 * far).backward()
        optimizer.step()
    for k, p in model.named_parameters():
        torch.testing.assert_close(prox[k], p.detach(), atol=1e-12, rtol=0)


def test_a_client_draws_its_own_rows_and_all_of_them(page):
    client = torch.tensor([3, 0, 3, 1, 3, 0])  # client 2 has none
    page["order"] = client.argsort()
    page["sizes"] = sizes = client.bincount(minlength=4)
    page["first"] = sizes.cumsum(0) - sizes
    rows = page["own_rows"](torch.tensor([[3, 1], [0, 3]]), 50)
    assert rows.shape == (2, 2, 50, 10)
    drawn = [set(part.flatten().tolist()) for part in rows.flatten(0, 1)]
    assert drawn == [{0, 2, 4}, {3}, {1, 5}, {0, 2, 4}]
    page["sizes"] = torch.tensor([2, 4, 0])  # a last client without rows
    page["first"] = torch.tensor([0, 2, 6])
    assert page["own_rows"](torch.tensor([2]), 3).shape == (1, 3, 10)


def test_the_largest_number_drawn_stays_below_the_size():
    below_one = torch.tensor(1 - 2.0**-24)
    sizes = torch.arange(1, 1_000_000)
    assert ((below_one * sizes).long() < sizes).all()


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_any_optimizer_takes_the_difference_as_a_gradient(kind):
    params = {"w": torch.randn(3), "b": torch.randn(2)}
    mean = {k: torch.randn_like(p) for k, p in params.items()}
    copies = {k: p.clone().requires_grad_() for k, p in params.items()}
    make = partial(getattr(torch.optim, kind), lr=0.1)
    optimizer = make(params.values())
    for k, p in params.items():
        p.grad = p - mean[k]
    optimizer.step()
    optimizer = make(copies.values())
    sum((p - mean[k]).square().sum() / 2 for k, p in copies.items()).backward()
    optimizer.step()
    for k, p in params.items():
        torch.testing.assert_close(p, copies[k].detach())


def test_the_shift_is_the_rule_of_bayes_for_the_labels_of_a_client():
    """Also where labels are not equally frequent: then it is a difference of logs."""
    given_label = torch.rand(10, 50).double()  # of one of 50 images: [label, image]
    given_label /= given_label.sum(dim=1, keepdim=True)
    overall, own = torch.rand(2, 10).double()
    logits = (given_label.T * overall).log()  # of a perfect model of all clients
    shifted = logits + (own / own.sum()).log() - (overall / overall.sum()).log()
    posterior = given_label.T * own
    posterior /= posterior.sum(dim=1, keepdim=True)
    torch.testing.assert_close(shifted.softmax(dim=1), posterior)


def test_the_accuracy_on_own_labels_is_that_of_digits_drawn_from_them(page):
    params, x = {"w": torch.randn(2, 5, 10, 64)}, torch.randn(200, 64)
    y = torch.arange(200) % 7 % 10
    page["labels"] = torch.rand(2, 5, 10)
    page["labels"][..., 7:] = 0
    page["labels"] /= page["labels"].sum(-1, keepdim=True)
    page["predict"] = lambda params, x: x @ params["w"].mT
    y[-3:] = torch.tensor([7, 8, 9])  # every kind is there
    each = page["accuracy"](params, x, y)
    for i in range(2):
        for j in range(5):
            right = ((x @ params["w"][i, j].T).argmax(-1) == y).float()
            parts = torch.stack([right[y == k].mean() for k in range(10)])
            wanted = (page["labels"][i, j] * parts).sum()
            torch.testing.assert_close(each[i, j], wanted)


def test_splits_in_one_call_are_those_of_one_after_the_other(page):
    models = [page["build"]().double() for _ in range(3)]
    params = {
        k: torch.stack([m.get_parameter(k).detach() for m in models])
        for k, _ in models[0].named_parameters()
    }
    x, y = torch.randn(3, 4, 5, 2, 64).double(), torch.randint(10, (3, 4, 5, 2))
    sizes = torch.tensor([[1, 2, 3, 4], [4, 4, 1, 1], [9, 1, 1, 1]]).double()
    rates = torch.rand(3, 4, 5).double()
    together = vmap(page["average"])(params, x, y, rates, sizes)
    for i in range(3):
        own = {k: p[i] for k, p in params.items()}
        alone = page["average"](own, x[i], y[i], rates[i], sizes[i])
        for k, p in together.items():
            torch.testing.assert_close(p[i], alone[k], atol=1e-12, rtol=0)
