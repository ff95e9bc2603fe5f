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
import torch.multiprocessing as mp
from torch.distributed.checkpoint.filesystem import FileSystemWriter


def join(rank, world, name):
    torch.set_num_threads(1)  # the pool of threads does not survive a fork
    store, limit = dist.FileStore(f"store-{name}", world), timedelta(seconds=60)
    dist.init_process_group(
        "gloo", timeout=limit, store=store, rank=rank, world_size=world
    )


def go_on(rank, world, num_models, folder, until, dies=False):
    join(rank, world, f"{folder}-{until}-{dies}")
    members = share(num_models, rank, world)
    params, optimizer = begin(members, "cpu")
    done = load_latest(params, optimizer, num_models, "cpu", folder)
    assert done == until - 10, done
    for step in range(done + 1, until + 1):
        train_step(params, optimizer, members, step, "cpu")
    if dies and rank == world - 1:
        FileSystemWriter.write_data = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    save(params, optimizer, num_models, "cpu", folder, until)
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

MISTAKE = """
def mistaken(rank, world, num_models):
    join(rank, world, "mistake")
    save_plain(begin(share(num_models, rank, world), "cpu")[0], rank)
    dist.destroy_process_group()


fork(mistaken, 4, 8)
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forked")
    script = FUNCTIONS + FORKED + CHAIN + HALF + BY_MEMBER + MISTAKE
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


def test_plain_tensors_under_one_name_are_those_of_process_0(forked):
    loaded = [torch.load(forked / "mistake" / f"{rank}.pt") for rank in range(4)]
    first = undisturbed(2, 0)["0.weight"]
    assert all(torch.equal(rows, first) for rows in loaded)


def test_a_name_for_each_member_needs_no_dtensor(forked):
    assert (forked / "by-member" / ".metadata").exists()  # the script compares the rows


# --- with torchrun ----------------------------------------------------------------

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]


def test_four_processes_are_killed_and_two_go_on(tmp_path):
    killed, anew = (f"{FUNCTIONS}work(8, 30, 'cpu'{more})\n" for more in (", 15", ""))
    script = (
        f"{FUNCTIONS}import sys\nfor n, script in [(4, {killed!r}), (2, {anew!r})]:\n"
    )
    status, errors = finished(
        f"{script}    print(launch(n, script, '.'), file=sys.stderr)\n", tmp_path
    )
    assert status == 0, errors
    assert "SIGKILL" in errors
    assert {path.parent.name for path in tmp_path.glob("*/.metadata")} == {
        *["10", "20", "30"]
    }
    check_checkpoint(tmp_path / "30", 8, 30)


def test_the_variable_lets_torchrun_restart_a_killed_job(tmp_path):
    first = "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
    script = f"{FUNCTIONS}work(8, 30, 'cpu', 15 if {first} else None)\n"
    options = [*TORCHRUN, "--log-dir=.", "--nproc-per-node=2", "--max-restarts=1"]
    variable = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    # torchrun may abort at its very end, when all is saved: its status says little.
    _, errors = finished(script, tmp_path, *options, **variable)
    assert (tmp_path / "30" / ".metadata").exists(), errors
    check_checkpoint(tmp_path / "30", 8, 30)


def test_an_interrupt_leaves_no_process_and_no_file(tmp_path):
    script = f"""{FUNCTIONS}
with tempfile.TemporaryDirectory() as folder:
    launch(2, {WAITING!r}, folder)
"""
    check_that_an_interrupt_leaves_nothing(script, tmp_path)
