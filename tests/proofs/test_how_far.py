"""What plot_how_far.py says in a clause, with the functions of that page."""

import pytest
import torch
from pages import functions_of, names_of, peak_bytes
from processes import WAITING, check_that_an_interrupt_leaves_nothing, finished

FUNCTIONS = functions_of("scale/plot_how_far")


@pytest.fixture
def page():
    names = names_of("scale/plot_how_far")
    names["device"] = torch.device("cpu")
    names["skeleton"] = names["mlp"]().to("meta")
    return names


def plan_of(page, num_models, devices, seconds=(1.0, 10.0), memory=1e9):
    plan = page["plan"]
    return plan(num_models, devices, 3600, (1, 10), seconds, 1000, 500, memory)


@pytest.mark.parametrize("num_models", [1, 7, 90, 1001])
@pytest.mark.parametrize("devices", [1, 2, 7, 100])
def test_a_plan_hands_out_every_member_once_in_calls_that_were_measured(
    page, num_models, devices
):
    made = plan_of(page, num_models, devices)
    rounds_of = page["rounds_of"]
    each = [rounds_of(num_models, r, devices, made["at_once"]) for r in range(devices)]
    given = torch.cat([own for rounds in each for own in rounds])
    assert torch.equal(given, torch.arange(num_models))
    assert max(sum(map(len, rounds)) for rounds in each) == made["share"]
    assert max(len(own) for rounds in each for own in rounds) <= 10
    # The time is that of the fullest device: one second for each member.
    assert made["step"] == made["share"]


def test_a_plan_reproduces_both_measurements_and_has_no_negative_cost(page):
    for seconds in [(1.0, 4.0), (2.0, 2.0), (3.0, 2.0), (0.1, 5.0)]:
        steps = [plan_of(page, n, 1, seconds)["step"] for n in range(1, 11)]
        assert steps[-1] == pytest.approx(seconds[1])
        assert steps == sorted(steps)
        assert steps[0] > 0
        if seconds == (1.0, 4.0):
            assert steps[0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("num_models", "memory", "at_once", "calls", "chunk"),
    [
        (10, 15e3, 10, 1, 10),  # one call
        (10, 12e3, 8, 2, 4),  # ten states and four times what a member works with
        (10, 3e3, 2, 5, 0),  # ten states do not fit
        (20, 25e3, 10, 2, 10),  # no more in a call than were measured
    ],
)
def test_memory_decides_between_one_call_chunks_and_rounds(
    page, num_models, memory, at_once, calls, chunk
):
    made = plan_of(page, num_models, 1, memory=memory)
    assert (made["at_once"], made["calls"], made["chunk"]) == (at_once, calls, chunk)
    assert num_models * 1000 + chunk * 500 <= memory or not chunk


def test_a_member_that_does_not_fit_is_refused(page):
    with pytest.raises(ValueError, match="not even one member fits"):
        plan_of(page, 10, 1, memory=1499)


@pytest.mark.parametrize("num_models", [50, 200])
def test_the_peak_of_memory_is_within_a_tenth_of_the_count(page, num_models):
    params, x, y = page["begin"](num_models)
    optimizer = torch.optim.Adam(params.values())
    page["train_step"](params, optimizer, x, y)
    saved = {}

    def keep(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = page["loss_of_all"](params, x, y)
    for p in params.values():
        saved.pop(p.untyped_storage().data_ptr(), None)
    state = 4 * sum(p.nbytes for p in params.values())  # as four tensors of their size
    held = [
        t for p in params.values() for t in (p, p.grad, *optimizer.state[p].values())
    ]
    assert sum(t.nbytes for t in held if t.ndim) == state
    del loss, params, x, y, optimizer

    def call():
        step = page["prepare"](num_models)
        step()

    assert peak_bytes(call) == pytest.approx(state + 2 * sum(saved.values()), rel=0.1)


def test_a_process_that_raises_ends_the_others_and_its_message_arrives(tmp_path):
    scripts = ["raise ValueError('this one')", "print(1.5)"]
    status, errors = finished(f"{FUNCTIONS}launch({scripts!r})\n", tmp_path)
    assert status == 1
    assert "ValueError: this one" in errors, errors
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_an_interrupt_leaves_no_process_and_no_file(tmp_path):
    ranks = [f"import os\nos.environ['RANK'] = '{i}'\n{WAITING}" for i in range(2)]
    script = f"{FUNCTIONS}launch({ranks!r})\n"
    check_that_an_interrupt_leaves_nothing(script, tmp_path)
