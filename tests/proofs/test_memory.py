"""What plot_memory.py says about memory, and does not prove for itself."""

import itertools
import json

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

NUM_MODELS, WIDTH, ROWS = 6, 64, 256


def events_of(call, folder):
    """[memory] events of the exported trace, as the page reads them."""
    cpu = [ProfilerActivity.CPU]
    with profile(activities=cpu, profile_memory=True, acc_events=True) as record:
        call()
    file = folder / "trace.json"
    record.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]"]
    return sorted(events, key=lambda event: event["ts"])


@pytest.fixture
def peak_bytes(tmp_path):
    def peak(call):
        sizes = [event["args"]["Bytes"] for event in events_of(call, tmp_path)]
        return max(itertools.accumulate(sizes), default=0)

    return peak


def make_model():
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()
    )


def make_model_with_buffers():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    model[0].weight.requires_grad_(False)  # a frozen layer
    return model


@torch.no_grad()
def stack_one_at_a_time(make_model, num_models):  # as on the page
    with torch.device("meta"):
        params, buffers = stack_module_state([make_model()] * num_models)
    for stack in params, buffers:
        for name, t in stack.items():
            stack[name] = torch.empty_like(t, device="cpu").requires_grad_(
                t.requires_grad
            )
    for i in range(num_models):
        model = make_model()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            (params | buffers)[name][i] = tensor
        del model, tensor
    return params, buffers


with torch.device("meta"):
    skeleton = make_model()
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


def test_the_ruler_sees_two_tensors_where_two_are_needed(peak_bytes):
    # Four results, two forward and two back, each freed after its last use.
    leaf = torch.zeros(4, 2**20, requires_grad=True)

    def call():
        mapped = vmap(lambda row: row.neg().exp().sum())(leaf)
        return torch.autograd.grad(mapped.sum(), leaf)

    assert 2 * leaf.nbytes <= peak_bytes(call) <= 2 * leaf.nbytes + 4096


def test_a_block_is_given_back_at_the_address_where_it_was_taken(tmp_path, params, x):
    blocks = {}
    for event in events_of(lambda: vmap(grad(loss))(params, x), tmp_path):
        block = event["args"]
        assert block["Device Type"] == 0
        if block["Bytes"] > 0:
            assert block["Addr"] not in blocks
            blocks[block["Addr"]] = block["Bytes"]
        else:
            assert blocks.pop(block["Addr"]) == -block["Bytes"]
    assert not blocks


def test_stacking_a_list_holds_every_model_twice(peak_bytes):
    peak = peak_bytes(
        lambda: stack_module_state([make_model() for _ in range(NUM_MODELS)])
    )
    assert peak == pytest.approx(2 * NUM_MODELS * one_model, rel=0.01)


def test_stacking_one_at_a_time_holds_one_model_more(peak_bytes):
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


def test_modules_can_be_windows_on_the_rows(peak_bytes, params):
    def window():
        with torch.device("meta"):
            model = make_model()
        rows = {name: stack[1] for name, stack in params.items()}
        model.load_state_dict(rows, assign=True)
        return model

    assert peak_bytes(window) == 0
    for name, weight in window().named_parameters():
        assert weight.data_ptr() == params[name][1].data_ptr()


@pytest.mark.parametrize("chunk_size", [1, 2, 4, NUM_MODELS, NUM_MODELS + 1])
def test_chunks_give_the_gradients_of_a_loop(params, x, chunk_size):
    double = {name: p.detach().double() for name, p in params.items()}
    with torch.no_grad():
        found = vmap(grad(loss), chunk_size=chunk_size)(double, x.double())
    for i in range(NUM_MODELS):
        row = {name: p[i].clone().requires_grad_() for name, p in double.items()}
        loss(row, x[i].double()).backward()
        for name, leaf in row.items():
            torch.testing.assert_close(found[name][i], leaf.grad, rtol=0, atol=1e-10)


def test_backward_adds_in_place_to_rows_of_a_larger_gradient(params, x):
    total = {name: torch.ones_like(p) for name, p in params.items()}
    leaves = {name: p[2:4].detach().requires_grad_() for name, p in params.items()}
    for name, leaf in leaves.items():
        leaf.grad = total[name][2:4]
    vmap(loss)(leaves, x[2:4]).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.data_ptr() == total[name][2:4].data_ptr()
        assert (total[name][2:4] != 1).any()
        assert (total[name][:2] == 1).all()
        assert (total[name][4:] == 1).all()


@pytest.mark.parametrize("task", ["predictions", "gradients"])
def test_the_peak_of_an_own_network_is_a_line(peak_bytes, task):
    function = {"predictions": predict, "gradients": grad(loss)}[task]

    @torch.no_grad()
    def everything(size):
        params, _ = stack_one_at_a_time(make_model, size)
        return vmap(function)(params, torch.randn(size, ROWS, WIDTH))

    two, four, ten = (peak_bytes(lambda n=n: everything(n)) for n in (2, 4, 10))
    assert ten == pytest.approx(two + 8 * (four - two) / 2, rel=0.01)


def test_a_chunk_size_chosen_by_the_rule_stays_within_the_budget(peak_bytes):
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


def test_the_largest_result_of_chunks_exists_twice_at_the_end(peak_bytes, params, x):
    def call():
        with torch.no_grad():
            return vmap(grad(loss), chunk_size=1)(params, x[:, :1])

    largest = max(p.nbytes for p in skeleton.parameters())
    expected = NUM_MODELS * (one_model + largest)
    assert peak_bytes(call) == pytest.approx(expected, rel=0.02)


def test_grad_keeps_its_graph_and_a_plain_backward_frees_it(peak_bytes, params, x):
    with torch.no_grad():
        kept = peak_bytes(lambda: vmap(grad(loss))(params, x))
    assert kept > 1.1 * peak_bytes(lambda: one_backward(params, x))


def test_chunks_need_more_while_autograd_records_outside(peak_bytes, params, x):
    def predictions():
        return vmap(predict, chunk_size=1)(params, x)

    def gradients():
        return vmap(grad(loss), chunk_size=1)(params, x)

    for call in predictions, gradients:
        recorded = peak_bytes(call)
        with torch.no_grad():
            assert recorded > 1.4 * peak_bytes(call)
    activations = (
        2 * x.nbytes
    )  # the results of both hyperbolic tangents, of all members
    assert peak_bytes(lambda: one_backward(params, x, 1)) > activations


def test_checkpointing_works_around_vmap_and_not_inside(peak_bytes, params, x):
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

    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        vmap(grad(inside))(params, x)
    with pytest.raises(RuntimeError):
        vmap(inside)(params, x).sum().backward()
