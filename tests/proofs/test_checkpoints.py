"""What plot_checkpoints.py says in a clause, with the functions of that page."""

import pytest
import torch
from pages import functions_of, names_of, text_of
from processes import finished
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

FUNCTIONS = functions_of("scale/plot_checkpoints")
NAMESPACE = names_of("scale/plot_checkpoints")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
TORCHRUN += ["--log-dir=.", "--nproc-per-node=2"]


def undisturbed(num_models, num_steps, dtype):
    members = range(num_models)
    params, optimizer = NAMESPACE["begin"](members, "cpu", dtype)
    for step in range(num_steps):
        batches = NAMESPACE["draw"](members, step + 1, params)
        NAMESPACE["train_step"](params, optimizer, *batches)
    state = {name: p.detach() for name, p in params.items()}
    for name, p in params.items():
        state |= {f"{name}.{key}": t for key, t in optimizer.state[p].items()}
    return state


def check_checkpoint(folder, num_models, num_steps, dtype=torch.float64, atol=1e-10):
    """The checkpoint holds what one process has after these steps."""
    dcp_to_torch_save(folder, folder / "all.pt")
    found = torch.load(folder / "all.pt")
    expected = undisturbed(num_models, num_steps, dtype)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# Processes by fork need not import torch again.
FORKED = """
import itertools
import torch._dynamo  # what the first step of an optimizer imports: once for all
import time
import torch.multiprocessing as mp
from datetime import timedelta
from torch.distributed.checkpoint.filesystem import FileSystemWriter

cpu, number = torch.device("cpu"), itertools.count()


def in_group(rank, function, world, store, arguments):
    torch.set_num_threads(1)  # the pool of threads does not survive a fork
    store, limit = dist.FileStore(store, world), timedelta(seconds=60)
    dist.init_process_group(
        "gloo", timeout=limit, store=store, rank=rank, world_size=world
    )
    function(rank, world, *arguments)
    dist.destroy_process_group()


def fork(function, world, *arguments):
    given = function, world, f"store-{next(number)}", arguments
    mp.start_processes(in_group, given, world, start_method="fork")


def go_on(rank, world, num_models, folder, until, dies=False):
    # as work of plot_checkpoints.py, for ten steps
    members = share(num_models, rank, world)
    params, optimizer = begin(members, cpu, torch.float64)
    done = load_latest(params, optimizer, num_models, folder)
    assert done == until - 10, done
    for step in range(done + 1, until + 1):
        train_step(params, optimizer, *draw(members, step, params))
    if dies and rank == world - 1:
        FileSystemWriter.write_data = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    save(params, optimizer, num_models, folder, until)


def save_slowly(rank, world, asynchronously):
    # every other process writes late; process 0 goes on when all have written
    write, folder = FileSystemWriter.write_data, f"slow-{asynchronously}"

    def late(*args):
        time.sleep(0.5 * rank)
        writing = write(*args)
        writing.wait()
        Path(f"{folder}-{rank}").touch()
        return writing

    FileSystemWriter.write_data = late
    params, optimizer = begin(share(4, rank, world), cpu, torch.float64)
    for step in range(1, 11):
        train_step(params, optimizer, *draw(share(4, rank, world), step, params))
    tensors = declare(params, optimizer, 4)
    if asynchronously:
        saving = dcp.async_save(tensors, checkpoint_id=folder)
        train_step(params, optimizer, *draw(share(4, rank, world), 11, params))
        saving.result()
    else:
        dcp.save(tensors, checkpoint_id=folder)
    assert all(Path(f"{folder}-{i}").exists() for i in range(world))


fork(save_slowly, 2, False)
fork(save_slowly, 2, True)


for num_models, worlds in {8: (4, 2, 1), 5: (2, 1, 3)}.items():
    for times, world in enumerate(worlds, 1):
        fork(go_on, world, num_models, f"m{num_models}", 10 * times)

fork(go_on, 2, 4, "half", 10)
try:
    fork(go_on, 2, 4, "half", 20, True)
except mp.ProcessExitedException as error:
    assert error.signal_name == "SIGKILL", error
assert Path("half/20.part").exists() and not Path("half/20").exists()
fork(go_on, 1, 4, "half", 20)


def split_otherwise(rank, world):
    return torch.arange(10).tensor_split(world)[rank].tolist()


def save_by_member(rank, world):
    dcp.save(rows_of(rank, world), checkpoint_id="by-member")


def load_by_member(rank, world):
    expected = rows_of(rank, world)
    rows = {name: torch.zeros_like(t) for name, t in expected.items()}
    dcp.load(rows, checkpoint_id="by-member")
    torch.testing.assert_close(rows, expected, atol=0, rtol=0)


def rows_of(rank, world):
    members = split_otherwise(rank, world)
    stacks = begin(members, cpu)[0].items()
    return {
        f"member{i}.{name}": p.detach()[row]
        for name, p in stacks
        for row, i in enumerate(members)
    }


fork(save_by_member, 4)
fork(load_by_member, 3)


def save_otherwise(rank, world):
    members = split_otherwise(rank, world)
    params, optimizer = begin(members, cpu)
    try:
        declare(params, optimizer, 10)
    except ValueError as error:
        Path(f"refused-{rank}").write_text(str(error))
    globals()["share"] = lambda *_: members  # so declare has nothing to refuse
    dcp.save(declare(params, optimizer, 10), checkpoint_id="other-split")


def load_otherwise(rank, world):
    params, optimizer = begin(share(10, rank, world), cpu)
    try:
        dcp.load(declare(params, optimizer, 10), checkpoint_id="other-split")
    except dcp.api.CheckpointException as error:
        Path(f"not-loaded-{rank}").write_text(str(error))


fork(save_otherwise, 4)
fork(load_otherwise, 2)
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forked")
    status, errors = finished(FUNCTIONS + FORKED, folder)
    assert status == 0, errors
    return folder


@pytest.mark.parametrize("num_models", [8, 5])
def test_another_number_of_processes_goes_on_whether_it_divides_or_not(
    forked, num_models
):
    check_checkpoint(forked / f"m{num_models}" / "30", num_models, 30)


def test_a_death_while_writing_leaves_a_part_and_the_step_is_done_again(forked):
    check_checkpoint(forked / "half" / "20", 4, 20)


@pytest.mark.parametrize("asynchronously", [False, True])
def test_saved_is_what_all_have_written_also_while_training_goes_on(
    forked, asynchronously
):
    check_checkpoint(forked / f"slow-{asynchronously}", 4, 10)


def test_the_page_that_a_reader_downloads_is_a_train_py(tmp_path):
    page = text_of("scale/plot_checkpoints")
    for _ in range(2):  # the second time goes on after the last step
        status, errors = finished(page, tmp_path, *TORCHRUN)
        assert status == 0, errors
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"10", "20", "30", "40"}
    check_checkpoint(tmp_path / "checkpoints" / "40", 8, 40, torch.float32, 1e-2)


def test_names_with_dots_are_no_names_of_parameters():
    with pytest.raises(KeyError, match="parameter name"):
        torch.nn.ParameterDict(NAMESPACE["begin"](range(2), "cpu")[0])


def test_another_split_than_that_of_shard_0_is_refused(forked):
    # 10 members in 4 processes: 3, 3, 2, 2 where Shard(0) means 3, 3, 3, 1
    refused = {path.name: path.read_text() for path in forked.glob("refused-*")}
    assert refused == {
        "refused-2": "2 rows, where Shard(0) means 3",
        "refused-3": "2 rows, where Shard(0) means 1",
    }
    assert (forked / "other-split" / ".metadata").exists()  # saved without the check
    for rank in range(2):
        assert "mismatch" in (forked / f"not-loaded-{rank}").read_text()


def test_a_name_for_each_member_needs_no_dtensor(forked):
    assert (forked / "by-member" / ".metadata").exists()  # the script compares the rows


@pytest.mark.slow
def test_the_variable_lets_torchrun_restart_a_killed_job(tmp_path):
    script = f"""{FUNCTIONS}
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    draw = deadly_draw
work(8, 40, "saved", torch.device("cpu"), torch.float64)
"""
    options = [*TORCHRUN, "--max-restarts=1"]
    variable = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    # torchrun may abort at its very end, when all is saved: its status says little.
    _, errors = finished(script, tmp_path, *options, **variable)
    assert (tmp_path / "saved" / "40").exists(), errors
    assert "exitcode: -9" in errors, errors
    check_checkpoint(tmp_path / "saved" / "40", 8, 40)
