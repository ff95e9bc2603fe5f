"""What the tests share: the tutorials, a copy of the repository, and its built site."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import runner  # noqa: E402

TUTORIALS = runner.all_pages()
OUTSIDE = str(Path(__file__).parent / "outside")

# --- how tests share the cores ----------------------------------------------------

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
THREADS = max(1, len(os.sched_getaffinity(0)) // WORKERS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # before anything imports torch
WITH_SITE = ("test_browser.py", "test_pages.py")  # one process, one built site
LAST = "test_notebooks.py"  # they need the site, too, and wait for it


class BySite(LoadScopeScheduling):
    """Tests of the built site stay together; others go to the process that is free."""

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0].rpartition("/")[2]
        return "site" if file in WITH_SITE else nodeid


def pytest_xdist_make_scheduler(config, log):
    return BySite(config, log)


SELECTED = set()  # pages that tests of one topic need; empty if they need the site


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name == LAST)
    with_site = [item for item in items if "site" in item.fixturenames]
    parameters = [getattr(item, "callspec", None) for item in with_site]
    if all(parameters):
        topics = [str(next(iter(each.params.values()))) for each in parameters]
        SELECTED.update(Path(topic).stem for topic in topics)


@pytest.fixture(autouse=True)
def same_precision(request):
    """Proofs leave no switch of torch behind: cells of pages that they run set some."""
    if "proofs" not in request.path.parts:
        yield
        return
    import torch

    owners = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]
    before = [owner.fp32_precision for owner in owners]
    yield
    for owner, value in zip(owners, before, strict=True):
        owner.fp32_precision = value


def environment(**changes):
    """Environment in which tutorials measure briefly and no display is to be had."""
    display = {"DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"}
    plain = {key: value for key, value in os.environ.items() if key not in display}
    return plain | {"PYTHONPATH": OUTSIDE} | changes


def run(*command, cwd, **changes):
    """Run a command to its end; return code, stdout and stderr as text."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def nox(*arguments, cwd, **changes):
    """Run a task of the noxfile in a copy of the repository."""
    return run(sys.executable, "-m", "nox", "-s", *arguments, cwd=cwd, **changes)


# --- the tutorials and their site -------------------------------------------------


def name_of(tutorial):
    """basics/plot_ensembling, of a path."""
    return tutorial.relative_to(runner.TUTORIALS).with_suffix("").as_posix()


@pytest.fixture(params=TUTORIALS, ids=name_of)
def tutorial(request):
    """Every tutorial in turn. A new one joins by existing."""
    return request.param


def copy_repository(target, without=()):
    """Copy what git would commit, except what starts with the names in without."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists() and not name.startswith(tuple(without)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


GPU = "Imaginary GPU"
MACHINE = {
    "accelerator": GPU,
    "count": 1,
    "memory": 80,
    "cpu": "Imaginary CPU",
    "cores": 16,
    "driver": "1.2.3",
    "cuda": "13.0",
    "torch": "2.11.0",
    "python": "3.12.1",
    "date": "2026-01-02",
}
ALT = "A rising line, which no machine drew, made up for the tests of this site."
SVG = (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 3"><title>{ALT}</title>'
    f'{runner.THEME}<defs/><path d="M0 3L4 0" style="stroke: currentColor"/></svg>'
)


def imagine(site, page, machine=MACHINE, folder="gpu", say="from the imaginary GPU\n"):
    """Write the recording of a page of a site on a machine that does not exist.

    Every cell prints the same; one that draws shows a line. Returns its path.
    """
    cells = runner.split((site / "tutorials" / f"{page}.py").read_text())
    outputs = {
        number: (say, [(SVG, ALT)] if runner.draws(cell.code) else [])
        for number, cell in enumerate(cells)
    }
    path = site / "recordings" / folder / f"{page}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(runner.notebook(cells, outputs, machine, 1.5), indent=1))
    return path


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A copy of the repository, recorded on an imaginary GPU, where ``make html`` ran.

    The processes of a test run share it: the first one to come builds it.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if WORKERS > 1 else shared) / "site"
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copy, done = shared / "copy", shared / "done.json"
        if not done.exists():
            copy_repository(copy)
            for tutorial in TUTORIALS:
                imagine(copy, name_of(tutorial))
            pattern = "|".join(sorted(SELECTED))
            built = nox("html", "--", *[pattern] * bool(pattern), cwd=copy)
            done.write_text(json.dumps([built.returncode, built.stdout + built.stderr]))
        status, output = json.loads(done.read_text())
    assert status == 0, output
    return copy


@pytest.fixture(scope="session")
def html(site):
    """The folder with the built pages."""
    return site / "_build" / "html"


# --- small made-up sites ----------------------------------------------------------

from small import built, built_once, make_small, small  # noqa: E402, F401
