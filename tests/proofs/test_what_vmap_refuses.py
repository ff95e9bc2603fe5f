"""What plot_what_vmap_refuses.py says in a clause."""

import re

import numpy as np
import pytest
import torch
from pages import names_of, text_of
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

XS = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0)).double()
ITEM = r"calling \.item\(\) on a Tensor"
BRANCH = "data-dependent control flow"
ROWS = torch.arange(8)


def loop(function, *inputs):
    return torch.stack([function(*row) for row in zip(*inputs, strict=True)])


def test_a_while_becomes_a_for_over_the_largest_number_of_steps():
    def halve_while(x):
        while x.abs().max() > 0.1:
            x = x / 2
        return x

    def halve_for(x):
        for _ in range(10):
            x = torch.where(x.abs().max() > 0.1, x / 2, x)
        return x

    assert torch.equal(vmap(halve_for)(XS), loop(halve_while, XS))


def test_rows_that_all_share_are_split_without_a_message_if_members_are_as_many():
    shared = torch.randn(4, 6).double()
    split = vmap(lambda x, rows: x + rows)(XS, shared)
    assert torch.equal(split, XS + shared[:, None])


def test_momentum_none_has_another_form():
    norms = [nn.BatchNorm1d(6, momentum=None).double() for _ in XS]
    params, buffers = stack_module_state(norms)
    skeleton = nn.BatchNorm1d(6, momentum=None, device="meta")

    def norm_call(params, buffers, x):
        return functional_call(skeleton, (params, buffers), (x,), strict=True)

    with pytest.raises(RuntimeError, match=ITEM):
        vmap(norm_call)(params, buffers, XS)
    for step in [1, 2, 3]:
        skeleton.momentum = 1 / step
        vmap(norm_call)(params, buffers, step * XS)
        _ = [norm(step * x) for norm, x in zip(norms, XS, strict=True)]
    means = torch.stack([norm.running_mean for norm in norms])
    torch.testing.assert_close(buffers["running_mean"], means)


def test_the_side_that_is_not_taken_spoils_the_gradient_until_it_is_finite():
    def outer(x):
        return torch.where(x > 0, x.sqrt(), 0).sum()

    def both(x):
        return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0).sum()

    assert vmap(grad(outer))(XS).isnan().any()
    expected = torch.where(XS > 0, 0.5 / XS.abs().sqrt(), 0)
    torch.testing.assert_close(vmap(grad(both))(XS), expected)


def test_rates_at_a_tensor():
    rates = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    chosen = vmap(lambda x: torch.tensor(rates)[x[0].argmax()])(XS)
    assert torch.equal(chosen, torch.tensor([rates[x[0].argmax()] for x in XS]))


def test_print_is_accepted_and_item_of_what_all_members_share(capsys):
    vmap(lambda x: (print(x.sum()), x)[1])(XS)
    assert capsys.readouterr().out.count("BatchedTensor") == 1
    scaled = vmap(lambda x, s: x * s.item(), in_dims=(0, None))(XS, torch.tensor(2.0))
    assert torch.equal(scaled, 2 * XS)


def test_what_to_write_for_masks():
    def zeroed(x):
        x = x.clone()
        x[x > 0] = 0
        return x

    assert torch.equal(vmap(lambda x: torch.where(x > 0, 0, x))(XS), loop(zeroed, XS))
    cut = [x[mask] for x, mask in zip(*vmap(lambda x: (x, x > 0))(XS), strict=True)]
    assert all(torch.equal(a, x[x > 0]) for a, x in zip(cut, XS, strict=True))


@pytest.mark.parametrize(
    "accepted",
    [
        nn.BatchNorm1d(6).double().eval(),
        nn.BatchNorm1d(6, track_running_stats=False).double(),
    ],
)
def test_batch_norm_that_updates_nothing_is_accepted(accepted):
    torch.testing.assert_close(vmap(accepted)(XS), loop(accepted, XS))


def test_hooks_run_once():
    calls = []
    layer = nn.Linear(6, 2).double()
    layer.register_forward_hook(lambda *_: calls.append(1))
    vmap(layer)(XS)
    assert len(calls) == 1


def test_checkpoints_stand_around_vmap():
    def f(x):
        return torch.tanh(x).square().sum()

    x = XS.clone().requires_grad_()
    # torch 2.11 refuses the call, 2.13 the way back
    with pytest.raises(RuntimeError, match=r"vmap support|may have escaped"):
        vmap(lambda x: checkpoint(f, x, use_reentrant=False))(x).sum().backward()
    with pytest.raises(RuntimeError, match="override the setup_context"):
        vmap(lambda x: checkpoint(f, x, use_reentrant=True))(x)
    x.grad = None
    checkpoint(vmap(f), x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, vmap(grad(f))(XS))


class NoRule(names_of("basics/plot_what_vmap_refuses", "OldSign", "Sign")["Sign"]):
    generate_vmap_rule = False


STACK, _ = stack_module_state([nn.Linear(6, 2).double() for _ in XS])
LAYER = nn.Linear(6, 2, device="meta")
CONVS, _ = stack_module_state([nn.Conv2d(1, 2, 3) for _ in XS])
CONV = nn.Conv2d(1, 2, 3, device="meta")
IMAGES = torch.zeros(4, 5, 1, 8, 8)


def call(params, x):
    return functional_call(LAYER, params, (x,))


def conv_call(params, x):
    return functional_call(CONV, params, (x,))


def copies(x):
    return torch.zeros(8, 6).double().copy_(x)


def adds(x):
    total = torch.zeros(8).double()
    total += x.sum(1)
    return total


def keeps():
    kept = []
    vmap(lambda x: (kept.append(x), x)[1])(XS)
    return kept[0] + 1


def stacks(one, other):
    return lambda: stack_module_state([one, other])


def calls(function, **options):
    return lambda: vmap(function, **options)(XS)


# The messages that the page lists, and what provokes each
MESSAGES = {
    "Got in_dim=0 for an input": lambda: vmap(lambda x, f: f(x))(XS, nn.Linear(6, 2)),
    "Got in_dim=0 for some input": lambda: vmap(torch.add)(torch.tensor(1.0), XS),
    "same size in the mapped dimension": lambda: vmap(torch.add)(XS, XS[0]),
    "in_dims is not compatible with the structure": lambda: vmap(call, (0,))(STACK, XS),
    "data-dependent control flow": calls(lambda x: x if x.sum() > 0 else -x),
    "calling .item() on a Tensor": calls(lambda x: x / x.max().item()),
    "Cannot access data pointer of Tensor": calls(lambda x: x.numpy()),
    "unexpected keyword argument 'axis'": calls(np.sum),
    "can support dynamic shape": calls(lambda x: x[x > 0]),
    "can output dynamic shape": calls(torch.nonzero),
    "return a differently shaped Tensor": calls(lambda x: x.masked_select(x > 0)),
    "is not possible because there exists a Tensor": calls(copies),
    "doesn't match the broadcast shape": calls(adds),
    "randomness error mode": calls(nn.Dropout()),
    "Cannot ask for different inplace randomness": calls(
        lambda x: nn.Linear(6, 2).double()(x), randomness="different"
    ),
    "Batch norm got a batched tensor": calls(nn.BatchNorm1d(6).double()),
    "Batching rule not implemented": calls(nn.LSTM(6, 5).double()),
    "attempting to call Tensor.requires_grad_()": calls(lambda x: x.requires_grad_()),
    "backward() called inside": calls(lambda x: x.sum().backward()),
    "does not require grad and does not have": calls(
        lambda x: torch.autograd.grad(x.sum(), x)
    ),
    "override the setup_context staticmethod": calls(torch.autograd.Function.apply),
    "does not have vmap support": calls(NoRule.apply),
    "don't yet support saved tensor hooks": lambda: grad(
        lambda x: checkpoint(torch.sum, x, use_reentrant=False)
    )(XS),
    "your tensor may have escaped": keeps,
    "must only return Tensors": calls(lambda x: (x.sum(), "loss")),
    "There is a performance drop": lambda: vmap(torch.bincount)(torch.ones(4, 8).int()),
    "stack expects each tensor to be equal size": stacks(
        nn.Linear(6, 2), nn.Linear(6, 3)
    ),
    "Expected all models to be of the same class": stacks(nn.Linear(6, 2), nn.ReLU()),
    "the same training/eval mode": stacks(nn.ReLU(), nn.ReLU().eval()),
    "t() expects a tensor with <= 2 dimensions": lambda: call(STACK, XS[0]),
    "expected stride to be a single integer": lambda: conv_call(CONVS, IMAGES[0]),
}


# Where torch 2.11 has other words: those.
IN_2_11 = {"unexpected keyword argument 'axis'": "invalid combination of arguments"}


@pytest.mark.parametrize(("words", "mistake"), MESSAGES.items())
def test_the_listed_mistakes_have_the_listed_messages(words, mistake):
    refusals = (RuntimeError, ValueError, TypeError, UserWarning)
    older = IN_2_11.get(words, re.escape(words))
    with pytest.raises(refusals, match=f"{re.escape(words)}|{older}"):
        mistake()


def test_every_message_that_the_page_lists_is_provoked_here():
    text = re.sub(r"\n#\s*", " ", text_of("basics/plot_what_vmap_refuses"))
    text = text.split("About the inputs:")[1].split("How to read the cases")[0]
    listed = [item.split("``: ")[0] + "``" for item in text.split(" - ")[1:]]
    words = [word for item in listed for word in re.findall("``(.+?)``", item)]
    assert words == list(MESSAGES)


# What the cases add to the list
ALSO = [
    (BRANCH, lambda x: x * bool((x > 0).all() and (x < 1).all())),
    (BRANCH, lambda x: max(x[0, 0], x[0, 1])),
    (BRANCH, lambda x: torch.stack(sorted(x[0]))),
    (ITEM, lambda x: torch.tensor([x[0, 0], x[1, 1]])),
    (ITEM, lambda x: sum(x[i] for i in range(x[:, 0].argmax()))),
    (ITEM, lambda x: x * ([0.1] * 6)[x[0].argmax()]),
    (ITEM, lambda x: x * len(f"{x.sum():.2f}")),
    ("Cannot access data pointer", lambda x: x.tolist()),
    ("dynamic shape", torch.unique),
    ("dynamic shape", torch.where),
    ("exists a Tensor", lambda x: torch.zeros(8).double().scatter_(0, ROWS, x[:, 0])),
    ("exists a Tensor", lambda x: torch.zeros(8, 6).double().index_add_(0, ROWS, x)),
    ("exists a Tensor", lambda x: torch.zeros(6).double().fill_(x[0, 0])),
    ("inplace randomness", lambda x: torch.distributions.Normal(x, 1.0).rsample()),
    ("Batching rule not implemented", nn.GRU(6, 5).double()),
    ("Batching rule not implemented", lambda x: x * torch.equal(x, x)),
    ("Batching rule not implemented", lambda x: torch.sin(x, out=torch.empty_like(x))),
    ("expects each tensor to be equal size", lambda x: torch.argwhere(x > 1)),
    ("expects each tensor to be equal size", lambda x: (x[0] ** 4).int().bincount()),
    (r"t\(\) expects", lambda x: vmap(call, in_dims=(None, 0))(STACK, XS)),
    ("expected stride", lambda x: vmap(conv_call, (None, 0))(CONVS, IMAGES)),
]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("words", "refused"), ALSO)
def test_other_mistakes_have_a_listed_message(words, refused):
    with pytest.raises(RuntimeError, match=words):
        vmap(refused, randomness="different")(XS)


def test_in_dims_of_a_dictionary():
    expected = vmap(call)(STACK, XS)
    one_for_each = vmap(call, ({"weight": 0, "bias": 0}, 0))(STACK, XS)
    assert torch.equal(one_for_each, expected)
