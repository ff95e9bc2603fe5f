"""What plot_checkpoints.py says in a clause, with the functions of that page."""

import pytest
import torch
from pages import functions_of, names_of
from processes import WAITING, check_that_an_interrupt_leaves_nothing, finished
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

FUNCTIONS = functions_of("scale/plot_checkpoints")
NAMESPACE = names_of("scale/plot_checkpoints")


def undisturbed(num_models, num_steps):
    members = range(num_models)
    params, optimizer = NAMESPACE["begin"](members, "cpu")
    for step in range(num_steps):
        NAMESPACE["train_step"](params, optimizer, members, step + 1, "cpu")
    state = {name: p.detach() for name, p in params.items()}
    for name, p in params.items():
        state |= {f"{name}.{key}": t for key, t in optimizer.state[p].items()}
    return state


def check_checkpoint(folder, num_models, num_steps):
    """The checkpoint holds what one process has after these steps."""
    dcp_to_torch_save(folder, folder / "all.pt")
    found, expected = torch.load(folder / "all.pt"), undisturbed(num_models, num_steps)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


# --- with processes by fork, which need not import torch again ---------------------

FORKED = """
import torch._dynamo  # what the first step of an optimizer imports: once for all
import torch.multiprocessing as mp
from datetime import timedelta
from torch.distributed.checkpoint.filesystem import FileSystemWriter

cpu = torch.device("cpu")


def join(rank, world, name):
    torch.set_num_threads(1)  # the pool of threads does not survive a fork
    store, limit = dist.FileStore(f"store-{name}", world), timedelta(seconds=60)
    dist.init_process_group(
        "gloo", timeout=limit, store=store, rank=rank, world_size=world
    )


def go_on(rank, world, num_models, folder, until, dies=False):
    # as work of plot_checkpoints.py, for ten steps
    join(rank, world, f"{folder}-{until}-{dies}")
    members = share(num_models, rank, world)
    params, optimizer = begin(members, cpu)
    done = load_latest(params, optimizer, num_models, cpu, folder)
    assert done == until - 10, done
    for step in range(done + 1, until + 1):
        train_step(params, optimizer, members, step, cpu)
    if dies and rank == world - 1:
        FileSystemWriter.write_data = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    save(params, optimizer, num_models, cpu, folder, until)
    dist.destroy_process_group()


def fork(function, world, *arguments):
    mp.start_processes(function, (world, *arguments), world, start_method="fork")
"""

CHAIN = """
worlds = {8: (4, 2, 1), 5: (2, 1, 3)}
for num_models in worlds:
    for number, world in enumerate(worlds[num_models], 1):
        fork(go_on, world, num_models, f"m{num_models}", 10 * number)
"""

HALF = """
fork(go_on, 2, 4, "half", 10)
try:
    fork(go_on, 2, 4, "half", 20, True)
except mp.ProcessExitedException as error:
    assert error.signal_name == "SIGKILL", error
else:
    raise RuntimeError("nobody died")
assert Path("half/20").exists() and not Path("half/20/.metadata").exists()
fork(go_on, 1, 4, "half", 20)
"""

BY_MEMBER = """
def save_or_load(rank, world, num_models, save):
    join(rank, world, f"by-member-{world}-{save}")
    members = torch.arange(num_models).tensor_split(world)[rank].tolist()
    params, _ = begin(members, "cpu")
    rows = {
        f"member{i}.{name}": p.detach()[row]
        for name, p in params.items()
        for row, i in enumerate(members)
    }
    if save:
        dcp.save(rows, checkpoint_id="by-member")
    else:
        expected = {name: t.clone() for name, t in rows.items()}
        for t in rows.values():
            t.zero_()
        dcp.load(rows, checkpoint_id="by-member")
        assert all(torch.equal(expected[name], t) for name, t in rows.items())
    dist.destroy_process_group()


fork(save_or_load, 4, 5, True)
for world in (4, 2, 1):
    fork(save_or_load, world, 5, False)
"""

OTHER_SPLIT = """
def split_otherwise(rank, world, num_models):
    join(rank, world, "other-split")
    members = torch.arange(num_models).tensor_split(world)[rank].tolist()
    params, optimizer = begin(members, cpu)
    if len(members) != len(share(num_models, rank, world)):
        try:
            declare(params, optimizer, num_models, cpu)
        except ValueError as error:
            Path(f"refused-{rank}").write_text(str(error))
    globals()["share"] = lambda *_: members  # so declare has nothing to refuse
    dcp.save(declare(params, optimizer, num_models, cpu), checkpoint_id="other-split")
    dist.destroy_process_group()


def load(rank, world, num_models, folder, whole):
    join(rank, world, f"load-{folder}")
    params, optimizer = begin(share(num_models, rank, world), cpu)
    tensors = declare(params, optimizer, num_models, cpu) if whole else dict(params)
    try:
        dcp.load({"0.weight": tensors["0.weight"].detach()}, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:
        Path(f"not-{folder}-{rank}").write_text(str(error))
    dist.destroy_process_group()


fork(split_otherwise, 4, 10)
fork(load, 2, 10, "other-split", True)
"""

NO_STEP = """
def begin_anew(rank, world):
    join(rank, world, "no-step")
    Path("named/best").mkdir(parents=True, exist_ok=True)
    Path("named/best/.metadata").touch()  # a folder of another name is no step
    assert load_latest({}, None, 4, cpu, "named") == 0
    dist.destroy_process_group()


fork(begin_anew, 2)
"""

MISTAKE = """
def mistaken(rank, world, num_models):
    join(rank, world, "mistake")
    dist.init_process_group = lambda backend: None  # done
    save_plain(num_models)


fork(mistaken, 4, 8)
fork(load, 2, 8, "plain", False)
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forked")
    script = FUNCTIONS + FORKED + CHAIN + HALF + BY_MEMBER + OTHER_SPLIT + NO_STEP
    script += MISTAKE
    status, errors = finished(script, folder)
    assert status == 0, errors
    return folder


@pytest.mark.parametrize("num_models", [8, 5])
def test_another_number_of_processes_goes_on_whether_it_divides_or_not(
    forked, num_models
):
    for step in (10, 20, 30):
        check_checkpoint(forked / f"m{num_models}" / str(step), num_models, step)


def test_a_death_while_writing_leaves_no_metadata_and_the_step_is_done_again(forked):
    check_checkpoint(forked / "half" / "20", 4, 20)


def test_plain_tensors_under_one_name_are_those_of_one_process(forked):
    loaded = [torch.load(forked / f"{rank}.pt") for rank in range(4)]
    for name, whole in undisturbed(8, 0).items():
        parts = whole.chunk(4)
        assert any(torch.equal(loaded[0][name], part) for part in parts)
        assert all(torch.equal(rows[name], loaded[0][name]) for rows in loaded)
    for rank in range(2):  # another number of processes
        assert "Size mismatch" in (forked / f"not-plain-{rank}").read_text()


def test_another_split_than_that_of_shard_0_is_refused(forked):
    # 10 members in 4 processes: 3, 3, 2, 2 where Shard(0) means 3, 3, 3, 1
    refused = {path.name: path.read_text() for path in forked.glob("refused-*")}
    assert refused == {
        "refused-2": "2 rows, where Shard(0) means 3",
        "refused-3": "2 rows, where Shard(0) means 1",
    }
    assert (forked / "other-split" / ".metadata").exists()  # saved without the check
    for rank in range(2):
        assert "mismatch" in (forked / f"not-other-split-{rank}").read_text()


def test_a_name_for_each_member_needs_no_dtensor(forked):
    assert (forked / "by-member" / ".metadata").exists()  # the script compares the rows


# --- with torchrun ----------------------------------------------------------------

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]


@pytest.mark.slow
def test_the_variable_lets_torchrun_restart_a_killed_job(tmp_path):
    script = f"""{FUNCTIONS}
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    minibatch = killing(minibatch, 7, 16)
work(8, 30, "saved")
"""
    options = [*TORCHRUN, "--log-dir=.", "--nproc-per-node=2", "--max-restarts=1"]
    variable = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    # torchrun may abort at its very end, when all is saved: its status says little.
    _, errors = finished(script, tmp_path, *options, **variable)
    assert (tmp_path / "saved" / "30" / ".metadata").exists(), errors
    assert "exitcode: -9" in errors, errors
    check_checkpoint(tmp_path / "saved" / "30", 8, 30)


@pytest.mark.slow  # that of plot_many_devices.py is quick
def test_an_interrupt_leaves_no_process_and_no_file(tmp_path):
    script = f"""{FUNCTIONS}
with tempfile.TemporaryDirectory() as folder:
    launch(2, {WAITING!r}, folder, "a file")
"""
    check_that_an_interrupt_leaves_nothing(script, tmp_path)
