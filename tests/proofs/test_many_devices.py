"""What plot_many_devices.py says in a clause, with the functions of that page."""

import pytest
import torch
from pages import functions_of, names_of, text_of
from processes import WAITING, check_that_an_interrupt_leaves_nothing, finished

FUNCTIONS = functions_of("scale/plot_many_devices")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
TORCHRUN += ["--log-dir=.", "--nproc-per-node=2"]

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


def trained(step_of, members, rows):
    params, optimizer = begin(members, "cpu", torch.float64)
    for step in range(20):
        x, y = draw(members, step, params)
        step_of(params, optimizer, x[:, rows], y[:, rows])
    return {name: p.detach() for name, p in params.items()}


def one(rank, world, num_models):
    torch.set_num_threads(1)  # the pool of threads does not survive a fork
    store, limit = dist.FileStore(f"{num_models}-{world}", world), timedelta(seconds=60)
    dist.init_process_group(
        "gloo", timeout=limit, store=store, rank=rank, world_size=world
    )
    x, _ = minibatch(num_models, 0)
    with Count() as training:
        params = trained(train_step, share(num_models, rank, world), slice(None))
    rows = slice(rank * 32 // world, (rank + 1) * 32 // world)
    split = trained(split_step, range(num_models), rows)
    reduced, all_reduce = [], dist.all_reduce

    def reduce(total):  # CommDebugMode cannot stand around a vmapped module
        with CommDebugMode() as mode:
            all_reduce(total)
        reduced.append((mode.get_total_counts(), [*total.shape]))

    dist.all_reduce = reduce
    with Count() as predicting:
        probabilities = predict(params, x.double(), num_models)
    result = [params, probabilities, [training.calls, predicting.calls, reduced], split]
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
        params, probabilities, *_ = found[1][0]
        assert len(params["0.weight"].unique(dim=0)) == num_models
        for results in found.values():
            shares = [result[0] for result in results]
            joined = {k: torch.cat([part[k] for part in shares]) for k in params}
            torch.testing.assert_close(joined, params, atol=1e-10, rtol=0)
            for _, reduced, counts, split in results:
                torch.testing.assert_close(reduced, probabilities, atol=1e-10, rtol=0)
                assert counts == [0, 1, [(1, [32, 10])]]
                if len(results) != 3:  # which does not divide 32 rows
                    torch.testing.assert_close(split, params, atol=1e-10, rtol=0)


def test_every_member_has_one_process_whether_these_divide_them_or_not():
    share = names_of("scale/plot_many_devices", "share")["share"]
    for num_models in range(1, 20):
        for world in range(1, 9):
            shares = [[*share(num_models, rank, world)] for rank in range(world)]
            assert [i for part in shares for i in part] == [*range(num_models)]
            rows = torch.arange(num_models).chunk(world)  # as Shard(0) splits them
            assert [part for part in shares if part] == [part.tolist() for part in rows]


def test_both_pages_have_the_same_members_and_minibatches():
    names = ["share", "minibatch", "build", "begin", "draw", "train_step", "own_device"]
    pages = "scale/plot_many_devices", "scale/plot_checkpoints"
    one, other = (functions_of(page, *names).partition("def ")[2] for page in pages)
    assert (
        one.replace("loss_of(params, x, y)", "losses_of(params, x, y).sum()") == other
    )


def test_the_page_that_a_reader_downloads_is_a_train_py(tmp_path):
    status, errors = finished(text_of("scale/plot_many_devices"), tmp_path, *TORCHRUN)
    assert status == 0, errors
    check_files(tmp_path, 2, range(2))


def test_its_first_cells_are_a_train_py_that_also_runs_as_independent_jobs(tmp_path):
    text, _, _ = text_of("scale/plot_many_devices").partition("    raise SystemExit\n")
    status, errors = finished(text, tmp_path, RANK="1", WORLD_SIZE="4")
    assert status == 0, errors
    check_files(tmp_path, 4, [1])


def check_files(folder, world, ranks):
    """Each process has left its members, and nothing else."""
    names = names_of("scale/plot_many_devices")
    left = {path.name for path in folder.glob("*.*")} - {"script.py"}
    assert left == {f"{rank}.pt" for rank in ranks}
    for rank in ranks:
        members = names["share"](91, rank, world)
        params, optimizer = names["begin"](members, "cpu")
        for step in range(10):
            names["train_step"](
                params, optimizer, *names["draw"](members, step, params)
            )
        found = torch.load(folder / f"{rank}.pt")
        assert found.keys() == params.keys()
        torch.testing.assert_close(found, params, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_a_process_without_a_member_ends_all_and_its_message_arrives(tmp_path):
    # One member for two processes: the second has none, the first waits for it.
    work = "work(1, 1)\ntorch.distributed.init_process_group('gloo')\n"
    status, errors = finished(f"{FUNCTIONS}{work}", tmp_path, *TORCHRUN)
    assert status == 1
    assert "Expected at least one model, got 0" in errors, errors
    assert "SIGTERM" in errors, errors  # torchrun ended the first


def test_an_interrupt_leaves_no_process_and_no_file(tmp_path):
    script = f"{FUNCTIONS}imports, copied = '', []\nlaunch(2, {WAITING!r})\n"
    check_that_an_interrupt_leaves_nothing(script, tmp_path)
