"""The runner: it executes each page in a process of its own, and records it."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import nbformat
import pytest
from conftest import MACHINE, ROOT, environment, imagine, run
from small import make_small, write_tutorial

import runner


@pytest.fixture
def bare(tmp_path):
    """What is carried to a node without git, Sphinx and network, and two pages."""
    site = make_small(tmp_path / "made")
    for name in ["runner.py", "tutorials"]:
        (site / name).rename(tmp_path / name)
    return tmp_path


STATE = """
import torch, os
compiled = os.path.exists(os.environ["TORCHINDUCTOR_CACHE_DIR"])
print("grad", torch.is_grad_enabled(), "compiled", compiled, os.listdir("."))
torch.set_grad_enabled(False)
"""


def test_record_from_a_bare_copy(bare):
    """No git, no Sphinx, no nox: what fails costs the others nothing."""
    write_tutorial(bare, "alpha", code=STATE)
    write_tutorial(bare, "beta", code="import a_library_that_is_not_here")
    write_tutorial(bare, "broken", code="raise ValueError('alpha is broken')")
    write_tutorial(bare, "unlabeled", code=STATE, label="")
    mine = runner.this_machine()
    alpha, beta = (
        imagine(bare, f"basics/plot_{name}", mine, "mine") for name in ["alpha", "beta"]
    )
    alpha.write_text("damaged")
    before = beta.read_bytes()
    blocked = "dict.fromkeys(['sphinx', 'nox', 'nbformat'])"
    (bare / "block").mkdir()
    customize = bare / "block" / "sitecustomize.py"
    customize.write_text(f"import sys; sys.modules.update({blocked})")
    options = ["--machine", "mine", "--limit", "300", "--pack", "packed.tar.gz"]
    command = [sys.executable, "runner.py", *options]
    done = run(*command, cwd=bare, PYTHONPATH=str(customize.parent))
    assert done.returncode == 1
    assert "[1/4] basics/plot_alpha" in done.stdout, "what is missing comes first"
    table = done.stdout.partition("[4/4]")[2]
    for pattern in [
        r"done +basics/plot_alpha +\d",
        r"failed +basics/plot_beta +line \d+: .*No module named 'a_library",
        r"failed +basics/plot_broken +line \d+: ValueError: alpha is broken",
        r"failed +basics/plot_unlabeled +ValueError: .*plot_unlabeled.py:\d+: .*alt",
        "3 of 4 pages did not succeed",
    ]:
        assert re.search(pattern, table), table
    assert beta.read_bytes() == before, "the former recording is whole"
    assert set(alpha.parent.iterdir()) == {alpha, beta}
    with tarfile.open(bare / "packed.tar.gz") as packed:
        names = [name for name in packed.getnames() if name.endswith("ipynb")]
    assert sorted(names) == [
        f"recordings/mine/basics/plot_{name}.ipynb" for name in ["alpha", "beta"]
    ]

    notebook = nbformat.read(alpha, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.machine == mine
    assert "[draws](https://pytorch.org) $x^2$" in notebook.cells[0].source
    first, second, third = [x for x in notebook.cells if x.cell_type == "code"]
    assert first.outputs[0].text.startswith("grad True compiled False []\nalpha ran at")
    assert second.metadata.jupyter.source_hidden
    assert second.outputs[0].data["text/plain"] == "A line that rises."
    assert "<title>A line that rises.<" in second.outputs[0].data["image/svg+xml"]
    assert third.outputs[0].text == "x is 1\n"


def moments(site):
    """When each page ran that this machine has run for the site."""
    found = {}
    for path in site.glob("_build/runs/*/basics/*.ipynb"):
        ran = re.search(r"(\w+) ran at (\d+)", path.read_text())
        found[ran[1]] = int(ran[2])
    return found


def test_what_changed_runs_again_and_an_interrupted_run_goes_on(bare):
    started = bare / "started"
    wait = f"from pathlib import Path\nif not Path({str(started)!r}).exists():\n"
    wait += f"    Path({str(started)!r}).touch()\n    time.sleep(120)"
    write_tutorial(bare, "beta", code=wait)
    command = [sys.executable, "runner.py", "--build"]
    with subprocess.Popen(
        command,
        cwd=bare,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test that itself runs in the background would hand on a deaf ear for Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        until = time.monotonic() + 60
        while not started.exists() and time.monotonic() < until:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        told = process.stdout.read()
    assert process.returncode != 0
    assert re.search("done +basics/plot_alpha(.|\n)*left +basics/plot_beta", told)
    first = moments(bare)
    assert set(first) == {"alpha"}

    done = run(*command, cwd=bare)
    assert "[1/1] basics/plot_beta" in done.stdout, done.stdout
    second = moments(bare)
    assert second.pop("beta")
    assert second == first, "what is done does not run again"

    write_tutorial(bare, "alpha", text="Other words.")
    assert run(*command, cwd=bare).stdout == "", "new prose needs no run"
    done = run(*command, "bet", cwd=bare)
    assert re.search(r"\[1/1\] basics/plot_beta: last time \d+ s of \d+ s", done.stdout)
    assert moments(bare)["beta"] > first["alpha"]


def test_a_page_over_its_limit_is_ended_with_what_it_started(alpha, tmp_path):
    mark = tmp_path / "alive"
    grandchild = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = f"""import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {grandchild!r}])
time.sleep(60)"""
    came = runner.run_page(alpha, [sys.executable, "-c", code], limit=1)
    assert came == ("failed", "it took more than 1 s")
    time.sleep(3)
    assert not mark.exists()


def test_another_torch_runs_again(alpha):
    machine = runner.this_machine()
    folder = imagine(runner.ROOT, "basics/plot_alpha", machine).parents[1]
    assert runner.is_done(alpha, folder, machine)
    assert not runner.is_done(alpha, folder, machine | {"torch": "2.11.0"})
    assert not runner.is_done(alpha, folder, MACHINE)


def test_the_flagship_and_the_speed_pages_come_first_on_a_borrowed_machine():
    names = [
        runner.name_of(page) for page in sorted(runner.all_pages(), key=runner.worth)
    ]
    assert names[0] == "basics/plot_ensembling"
    assert {name.split("/")[0] for name in names[1:6]} == {"speed"}


def test_name_of_another_machine_is_refused(alpha, monkeypatch, capsys):
    imagine(runner.ROOT, "basics/plot_alpha")
    monkeypatch.setattr(runner, "who", runner.this_machine)
    with pytest.raises(SystemExit, match=r"gpu is the name of another .*Imaginary GPU"):
        runner.main(["alpha", "--machine", "gpu"])
    with pytest.raises(SystemExit):
        runner.main(["alpha", "--machine", "My GPU"])
    assert "use small letters" in capsys.readouterr().err


def test_unknown_pages_are_told_with_the_known_ones(alpha):
    for name, told in [("gamma", "basics/plot_alpha.py"), ("a(", "regular expression")]:
        with pytest.raises(SystemExit, match=told):
            runner.named(name)


def test_processors_without_a_name_do_not_share_one(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(runner, "Path", lambda name: cpuinfo)
    names = []
    for part in ["0xd0c", "0xd40"]:
        cpuinfo.write_text(f"CPU implementer\t: 0x41\nCPU part\t: {part}\n")
        names.append(runner.processor.__wrapped__())
    assert names[0] != names[1]
    cpuinfo.write_text("model name\t: AMD EPYC\n")
    assert runner.processor.__wrapped__() == "AMD EPYC"


def test_the_same_gpu_in_another_host_is_one_machine():
    host = MACHINE | {"cpu": "Another CPU", "cores": 64}
    assert runner.hardware(host) == runner.hardware(MACHINE)
    assert runner.folder_name(host) == runner.folder_name(MACHINE)
    assert runner.hardware(MACHINE | {"count": 2}) != runner.hardware(MACHINE)
    assert runner.folder_name(MACHINE | {"count": 2}) == "2-x-imaginary-gpu"


def test_the_table_tells_what_is_outdated_damaged_missing_or_gone(alpha, capsys):
    names = ["alpha", "damaged", "edited", "gone"]
    for name in names:
        alpha.with_name(f"plot_{name}.py").write_text(alpha.read_text())
        path = imagine(runner.ROOT, f"basics/plot_{name}")
        if name == "damaged":
            path.write_text(path.read_text()[:200])
    edited = alpha.with_name("plot_edited.py")
    edited.write_text(edited.read_text().replace("x = 1", "x = 2"))
    alpha.with_name("plot_gone.py").rename(alpha.with_name("plot_new.py"))
    runner.table()
    table = capsys.readouterr().out
    states = ["current", "damaged: record again", "outdated from cell 1"]
    states += ["page is gone: git rm it", "missing"]
    for name, state in zip([*names, "new"], states, strict=True):
        assert re.search(f"basics/plot_{name} +{state}$", table, re.MULTILINE)


def test_the_recordings_of_this_repository_are_of_its_pages(capsys):
    runner.table()
    assert "gone" not in capsys.readouterr().out


def test_the_pictures_of_the_readme_are_recorded_ones():
    names = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (ROOT / "README.md").read_text())
    recorded = [path.read_text() for path in (ROOT / "recordings").rglob("*.ipynb")]
    assert len(names) == 2
    for name in names:
        lines = [json.dumps(x) for x in (ROOT / name).read_text().splitlines(True)]
        found = any(all(line in text for line in lines) for text in recorded)
        assert found, f"copy the newly recorded figure to {name}"
