"""What plot_many_devices.py says in a clause, with the functions of that page."""

import pytest
import torch
from pages import functions_of, names_of
from processes import WAITING, check_that_an_interrupt_leaves_nothing, finished

FUNCTIONS = functions_of("scale/plot_many_devices")

# Processes by fork, which need not import torch again; a file in place of a port.
FORKED = """
import torch._dynamo  # what the first step of an optimizer imports: once for all
import torch.multiprocessing as mp
from datetime import timedelta
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += "c10d" in func.namespace
        return func(*args, **(kwargs or {}))


def one(rank, world, num_models):
    torch.set_num_threads(1)  # the pool of threads does not survive a fork
    store, limit = dist.FileStore(f"{num_models}-{world}", world), timedelta(seconds=60)
    dist.init_process_group(
        "gloo", timeout=limit, store=store, rank=rank, world_size=world
    )
    x, _ = minibatch(num_models, 0)
    with Count() as training:
        params = train(share(num_models, rank, world), 20, "cpu", torch.float64)
    reduced, all_reduce = [], dist.all_reduce

    def reduce(total):  # CommDebugMode cannot stand around a vmapped module
        with CommDebugMode() as mode:
            all_reduce(total)
        reduced.append((mode.get_total_counts(), [*total.shape]))

    dist.all_reduce = reduce
    with Count() as predicting:
        probabilities = predict(params, x.double(), num_models)
    result = [params, probabilities, [training.calls, predicting.calls, reduced]]
    torch.save(result, f"{num_models}-{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


worlds = {5: (1, 2, 3), 7: (1, 2, 4), 8: (1, 2, 4)}
for num_models in worlds:
    for world in worlds[num_models]:
        mp.start_processes(one, (world, num_models), world, start_method="fork")
"""


def test_any_processes_train_the_same_members_and_reduce_once(tmp_path):
    status, errors = finished(FUNCTIONS + FORKED, tmp_path)
    assert status == 0, errors
    worlds = {5: (1, 2, 3), 7: (1, 2, 4), 8: (1, 2, 4)}
    for num_models in worlds:
        found = {
            world: [
                torch.load(tmp_path / f"{num_models}-{world}-{rank}.pt")
                for rank in range(world)
            ]
            for world in worlds[num_models]
        }
        params, probabilities, _ = found[1][0]
        assert len(params["0.weight"].unique(dim=0)) == num_models
        for results in found.values():
            shares = [result[0] for result in results]
            joined = {k: torch.cat([part[k] for part in shares]) for k in params}
            torch.testing.assert_close(joined, params, atol=1e-10, rtol=0)
            for _, reduced, counts in results:
                torch.testing.assert_close(reduced, probabilities, atol=1e-10, rtol=0)
                assert counts == [0, 1, [(1, [32, 10])]]


def test_every_member_has_one_process_whether_these_divide_them_or_not():
    share = names_of("scale/plot_many_devices", "share")["share"]
    for num_models in range(1, 20):
        for world in range(1, 9):
            shares = [[*share(num_models, rank, world)] for rank in range(world)]
            assert [i for part in shares for i in part] == [*range(num_models)]
            rows = torch.arange(num_models).chunk(world)  # as Shard(0) splits them
            assert [part for part in shares if part] == [part.tolist() for part in rows]


def test_both_pages_split_members_and_draw_minibatches_alike():
    one, other = (names_of(f"scale/plot_{x}") for x in ("many_devices", "checkpoints"))
    for name in ("share", "build", "minibatch"):
        assert one[name].__code__.co_code == other[name].__code__.co_code
        assert one[name].__code__.co_consts[1:] == other[name].__code__.co_consts[1:]


@pytest.mark.slow
def test_a_process_without_a_member_ends_all_and_its_message_arrives(tmp_path):
    # One member for two processes: the second has none, the first waits for it.
    worker = f"{FUNCTIONS}work(1, 1)\n"
    status, errors = finished(f"{FUNCTIONS}launch(2, {worker!r})\n", tmp_path)
    assert status == 1
    assert "Expected at least one model, got 0" in errors, errors
    assert "SIGTERM" in errors, errors  # torchrun ended the first
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_an_interrupt_leaves_no_process_and_no_file(tmp_path):
    script = f"{FUNCTIONS}launch(2, {WAITING!r})\n"
    check_that_an_interrupt_leaves_nothing(script, tmp_path)
