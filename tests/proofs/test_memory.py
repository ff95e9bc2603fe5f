"""What plot_memory.py says about memory, and does not prove for itself."""

import pytest
import torch
from pages import names_of, peak_bytes
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

NUM_MODELS, WIDTH, ROWS = 6, 64, 256
PAGE = names_of("speed/plot_memory", device=torch.device("cpu"))
stack_one_at_a_time = PAGE["stack_one_at_a_time"]


def make_model():
    """Smaller than that of the page; its functions below, too, without buffers."""
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()
    )


def make_model_with_buffers():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    model[0].weight.requires_grad_(False)  # a frozen layer
    return model


skeleton = make_model().to("meta")
one_model = sum(p.nbytes for p in skeleton.parameters())


def predict(params, x):
    return functional_call(skeleton, params, (x,), strict=True)


def loss(params, x):
    return predict(params, x).square().mean()


@pytest.fixture
def params():
    torch.manual_seed(0)
    return stack_one_at_a_time(make_model, NUM_MODELS)[0]


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(NUM_MODELS, ROWS, WIDTH)


def one_backward(params, x, chunk_size=None):
    losses = vmap(loss, chunk_size=chunk_size)(params, x)
    return torch.autograd.grad(losses.sum(), list(params.values()))


def test_the_ruler_sees_two_tensors_where_two_are_needed():
    # Four results, two forward and two back, each freed after its last use.
    leaf = torch.zeros(4, 2**20, requires_grad=True)

    def call():
        mapped = vmap(lambda row: row.neg().exp().sum())(leaf)
        return torch.autograd.grad(mapped.sum(), leaf)

    assert 2 * leaf.nbytes <= peak_bytes(call) <= 2 * leaf.nbytes + 4096


def test_a_block_is_given_back_at_the_address_where_it_was_taken(params, x):
    blocks = {}
    for event in PAGE["trace"](lambda: vmap(grad(loss))(params, x)):
        if event["name"] != "[memory]":
            continue
        block = event["args"]
        assert block["Device Type"] == 0
        if block["Bytes"] > 0:
            assert block["Addr"] not in blocks
            blocks[block["Addr"]] = block["Bytes"]
        else:
            assert blocks.pop(block["Addr"]) == -block["Bytes"]
    assert not blocks


def test_stacking_a_list_holds_every_model_twice():
    peak = peak_bytes(
        lambda: stack_module_state([make_model() for _ in range(NUM_MODELS)])
    )
    assert peak == pytest.approx(2 * NUM_MODELS * one_model, rel=0.01)


def test_stacking_one_at_a_time_holds_one_model_more():
    peak = peak_bytes(lambda: stack_one_at_a_time(make_model, NUM_MODELS))
    assert peak == pytest.approx((NUM_MODELS + 1) * one_model, rel=0.01)


def test_stacking_one_at_a_time_gives_what_stack_module_state_gives():
    torch.manual_seed(2)
    expected = stack_module_state([make_model_with_buffers() for _ in range(3)])
    torch.manual_seed(2)
    found = stack_one_at_a_time(make_model_with_buffers, 3)
    for stacks, others in zip(found, expected, strict=True):
        assert list(stacks) == list(others)
        for name, stack in stacks.items():
            assert torch.equal(stack, others[name])
            assert stack.dtype == others[name].dtype
            assert stack.is_leaf
            assert stack.requires_grad == others[name].requires_grad
    assert not found[0]["0.weight"].requires_grad
    assert found[1]["1.num_batches_tracked"].dtype == torch.int64


def test_modules_can_be_windows_on_the_rows(params):
    def window():
        with torch.device("meta"):
            model = make_model()
        rows = {name: stack[1] for name, stack in params.items()}
        model.load_state_dict(rows, assign=True)
        return model

    assert peak_bytes(window) == 0
    for name, weight in window().named_parameters():
        assert weight.data_ptr() == params[name][1].data_ptr()


@pytest.mark.parametrize("task", ["predictions", "gradients"])
def test_the_peak_of_an_own_network_is_a_line(task):
    function = {"predictions": predict, "gradients": grad(loss)}[task]

    @torch.no_grad()
    def everything(size):
        params, _ = stack_one_at_a_time(make_model, size)
        return vmap(function)(params, torch.randn(size, ROWS, WIDTH))

    two, four, ten = (peak_bytes(lambda n=n: everything(n)) for n in (2, 4, 10))
    assert ten == pytest.approx(two + 8 * (four - two) / 2, rel=0.01)


def test_a_chunk_size_chosen_by_the_rule_stays_within_the_budget():
    @torch.no_grad()
    def everything(size, chunk_size):
        params, _ = stack_one_at_a_time(make_model, size)
        return vmap(grad(loss), chunk_size=chunk_size)(
            params, torch.randn(size, ROWS, WIDTH)
        )

    def peak(size, chunk_size=None):
        return peak_bytes(lambda: everything(size, chunk_size))

    per_member, ones = (peak(6) - peak(3)) / 3, peak(12, 1)
    for budget in torch.linspace(ones, peak(12), 3).tolist():
        assert peak(12, 1 + int((budget - ones) / per_member)) <= budget * 1.01


def test_the_largest_result_of_chunks_exists_twice_at_the_end(params, x):
    def call():
        with torch.no_grad():
            return vmap(grad(loss), chunk_size=1)(params, x[:, :1])

    largest = max(p.nbytes for p in skeleton.parameters())
    expected = NUM_MODELS * (one_model + largest)
    assert peak_bytes(call) == pytest.approx(expected, rel=0.02)


def test_grad_keeps_its_graph_and_a_plain_backward_frees_it(params, x):
    with torch.no_grad():
        kept = peak_bytes(lambda: vmap(grad(loss))(params, x))
    assert kept > 1.1 * peak_bytes(lambda: one_backward(params, x))


def test_chunks_need_more_while_autograd_records_outside(params, x):
    def predictions():
        return vmap(predict, chunk_size=1)(params, x)

    def gradients():
        return vmap(grad(loss), chunk_size=1)(params, x)

    for call in predictions, gradients:
        recorded = peak_bytes(call)
        with torch.no_grad():
            assert recorded > 1.4 * peak_bytes(call)
    activations = 2 * x.nbytes  # the results of both tanh, of all members
    assert peak_bytes(lambda: one_backward(params, x, 1)) > activations


def test_checkpointing_works_around_vmap_and_not_inside(params, x):
    wide = x.repeat(1, 4, 1)
    block = vmap(predict)

    def deep(checkpointed):
        h = wide
        for _ in range(4):
            if checkpointed:
                h = checkpoint(block, params, h, use_reentrant=False)
            else:
                h = block(params, h)
        return torch.autograd.grad(h.square().sum(), list(params.values()))

    for found, expected in zip(deep(True), deep(False), strict=True):
        torch.testing.assert_close(found, expected)
    assert peak_bytes(lambda: deep(True)) < 0.8 * peak_bytes(lambda: deep(False))

    def inside(params, x):
        return checkpoint(loss, params, x, use_reentrant=False)

    refused = "saved tensor hooks|does not have vmap support"  # torch 2.13, 2.11
    with pytest.raises(RuntimeError, match=refused):
        vmap(grad(inside))(params, x)
    with pytest.raises(RuntimeError):
        vmap(inside)(params, x).sum().backward()
