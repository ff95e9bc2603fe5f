"""What plot_what_vmap_refuses.py says in a clause."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

XS = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0)).double()
ITEM = r"calling \.item\(\) on a Tensor"
BRANCH = "data-dependent control flow"


def loop(function, *inputs):
    return torch.stack([function(*row) for row in zip(*inputs, strict=True)])


def halve_while(x):
    while x.abs().max() > 0.1:
        x = x / 2
    return x


def halve_for(x):
    for _ in range(10):
        x = torch.where(x.abs().max() > 0.1, x / 2, x)
    return x


def test_a_while_becomes_a_for_over_the_largest_number_of_steps():
    with pytest.raises(RuntimeError, match=BRANCH):
        vmap(halve_while)(XS)
    assert torch.equal(vmap(halve_for)(XS), loop(halve_while, XS))


@pytest.mark.parametrize(
    "refused",
    [
        lambda x: x * bool((x > 0).all() and (x < 1).all()),
        lambda x: max(x[0, 0], x[0, 1]),
        lambda x: torch.stack(sorted(x[0])),
    ],
)
def test_python_that_compares_tensors_is_an_if(refused):
    with pytest.raises(RuntimeError, match=BRANCH):
        vmap(refused)(XS)


def test_an_assert_is_an_if():
    def asserts(x):
        assert (x < 100).all()
        return x

    with pytest.raises(RuntimeError, match=BRANCH):
        vmap(asserts)(XS)


def test_chunk_size_1_refuses_the_same():
    with pytest.raises(RuntimeError, match=BRANCH):
        vmap(lambda x: x if x.sum() > 0 else -x, chunk_size=1)(XS)


def test_the_side_that_is_not_taken_spoils_the_gradient_until_it_is_finite():
    def outer(x):
        return torch.where(x > 0, x.sqrt(), 0).sum()

    def both(x):
        return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0).sum()

    assert torch.equal(vmap(outer)(XS), vmap(both)(XS))
    assert vmap(grad(outer))(XS).isnan().any()
    expected = torch.where(XS > 0, 0.5 / XS.abs().sqrt(), 0)
    torch.testing.assert_close(vmap(grad(both))(XS), expected)


RATES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("refused", "instead"),
    [
        (
            lambda x: torch.tensor([x[0, 0], x[1, 1]]).double(),
            lambda x: torch.stack([x[0, 0], x[1, 1]]),
        ),
        (
            lambda x: torch.tensor(RATES[x[0].argmax()]),
            lambda x: torch.tensor(RATES)[x[0].argmax()],
        ),
        (
            lambda x: sum(x[i] for i in range(x[:, 0].argmax())) + x[0],
            lambda x: (
                sum(
                    torch.where(i < x[:, 0].argmax(), row, 0) for i, row in enumerate(x)
                )
                + x[0]
            ),
        ),
    ],
)
def test_hidden_item_calls_and_what_to_write(refused, instead):
    with pytest.raises(RuntimeError, match=ITEM):
        vmap(refused)(XS)
    expected = loop(refused, XS)
    torch.testing.assert_close(vmap(instead)(XS).to(expected.dtype), expected)


def test_formatting_is_an_item_call_and_print_is_accepted(capsys):
    with pytest.raises(RuntimeError, match=ITEM):
        vmap(lambda x: x * len(f"{x.sum():.2f}"))(XS)
    vmap(lambda x: (print(x.sum()), x)[1])(XS)
    assert capsys.readouterr().out.count("BatchedTensor") == 1


def test_tolist_has_the_message_of_numpy():
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        vmap(lambda x: x.tolist())(XS)


def test_item_of_what_all_members_share_is_accepted():
    scaled = vmap(lambda x, s: x * s.item(), in_dims=(0, None))(XS, torch.tensor(2.0))
    assert torch.equal(scaled, 2 * XS)


@pytest.mark.parametrize(
    "refused", [torch.nonzero, torch.unique, torch.where, lambda x: x[x > 0]]
)
def test_shapes_that_depend_on_values_are_refused(refused):
    with pytest.raises(RuntimeError, match="dynamic shape"):
        vmap(refused)(XS)


def test_what_to_write_for_masks_and_unique():
    def zeroed(x):
        x = x.clone()
        x[x > 0] = 0
        return x

    with pytest.raises(RuntimeError, match="dynamic shape"):
        vmap(zeroed)(XS)
    assert torch.equal(vmap(lambda x: torch.where(x > 0, 0, x))(XS), loop(zeroed, XS))

    rounded = XS.round()
    counts = vmap(lambda x: (x.flatten().sort().values.diff() != 0).sum() + 1)(rounded)
    assert counts.tolist() == [len(x.unique()) for x in rounded]

    cut = [x[mask] for x, mask in zip(*vmap(lambda x: (x, x > 0))(XS), strict=True)]
    assert all(torch.equal(a, x[x > 0]) for a, x in zip(cut, XS, strict=True))


def test_normal_is_refused_even_with_different_and_has_another_form():
    def draws(x):
        return torch.distributions.Normal(x, 1.0).rsample()

    words = "Cannot ask for different inplace randomness on an unbatched tensor"
    with pytest.raises(RuntimeError, match=words):
        vmap(draws, randomness="different")(XS)
    torch.manual_seed(0)
    expected = draws(XS)
    torch.manual_seed(0)
    noisy = vmap(lambda x: x + torch.randn_like(x), randomness="different")(XS)
    assert torch.equal(noisy, expected)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6, momentum=None)

    def forward(self, x):
        return self.norm(x)


def test_a_cumulative_batch_norm_runs_with_the_momentum_of_the_step():
    models = [Normed().double() for _ in XS]
    with torch.device("meta"):
        skeleton = Normed()

    def member(params, buffers, x):
        return functional_call(skeleton, (params, buffers), (x,), strict=True)

    with pytest.raises(RuntimeError, match=ITEM):
        vmap(member)(*stack_module_state(models), XS)
    params, buffers = stack_module_state(models)
    for step in [1, 2, 3]:
        skeleton.norm.momentum = 1 / step
        outputs = vmap(member)(params, buffers, step * XS)
        expected = [model(step * x) for model, x in zip(models, XS, strict=True)]
        torch.testing.assert_close(outputs, torch.stack(expected))
    torch.testing.assert_close(buffers, stack_module_state(models)[1])


class NoRule(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g


def test_a_new_function_without_the_rule_says_so():
    with pytest.raises(RuntimeError, match="it does not have vmap support"):
        vmap(NoRule.apply)(XS)


def test_hooks_and_counters_run_once():
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
    x.grad = None
    checkpoint(vmap(f), x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, vmap(grad(f))(XS))
