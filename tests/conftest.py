"""What the tests share: the tutorials, a copy of the repository, and its built site."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from faults import engine
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import noxfile  # noqa: E402
import runner  # noqa: E402

TUTORIALS = runner.all_pages()

# --- which tests run, and how they share the cores --------------------------------

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
THREADS = max(1, len(os.sched_getaffinity(0)) // WORKERS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # before anything imports torch
TOGETHER = ("test_browser.py", "test_pages.py")  # one process each: what they load
ORDER = ["test_scripts.py", "test_browser.py", "", "test_forms.py", "test_pages.py"]


def pytest_addoption(parser):
    help = "make test-all: full sizes, all forms, slow proofs"
    parser.addoption("--all", action="store_true", help=help)


def pytest_configure(config):
    global ALL
    ALL = config.getoption("--all")


class ByFile(LoadScopeScheduling):
    """Tests that load the same site stay together; others go to whoever is free."""

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0].rpartition("/")[2]
        return file if file in TOGETHER else nodeid


def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


SELECTED = set()  # pages that tests of one topic need; empty if they need them all


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Pages run first, because the site is laid out from what they gave."""

    def place(item):
        return ORDER.index(item.path.name if item.path.name in ORDER else "")

    left_out = [item for item in items if item.get_closest_marker("slow") and not ALL]
    config.hook.pytest_deselected(items=left_out)
    items[:] = sorted((item for item in items if item not in left_out), key=place)
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
    """The environment without a display."""
    display = {"DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"}
    return {k: v for k, v in os.environ.items() if k not in display} | changes


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


name_of = runner.name_of


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
    """Write a recording of a page of a site that no machine made.

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
def once(tmp_path_factory):
    """once(name, make): the path that make(path) filled, by the first who asks.

    The processes of a test run share it; the others wait until it is there.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if WORKERS > 1 else base

    def get(name, make):
        path, done = shared / name, shared / f"{name}.done"
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(path)
                path.mkdir()
                make(path)
                done.touch()
        return path

    return get


@pytest.fixture(scope="session")
def executed(once):
    """executed(tutorial): what its one run gave, at its small sizes (--all: at full).

    "text", which ran; "notebook", executed, None if it failed; "problems", a list.
    """

    def get(tutorial):
        text = tutorial.read_text("utf-8") if ALL else engine.small(tutorial)
        faults = engine.edits_of(tutorial)[1]

        def run_it(folder):
            arguments = folder / "result.json", tutorial, text, faults
            log = folder / "log"
            done = warm.call(engine.try_into, *arguments, log=log, seconds=1800)
            if done.returncode:
                died = [f"the run died, {done.returncode}:\n{done.output}"]
                arguments[0].write_text(
                    json.dumps({"notebook": None, "problems": died})
                )

        result = once(tutorial.stem, run_it) / "result.json"
        return {"text": text} | json.loads(result.read_text())

    return get


def lay_out(site, tutorial, run):
    """Put the text of a page and its outputs into a copy of the repository."""
    name = name_of(tutorial)
    (site / "tutorials" / f"{name}.py").write_text(run["text"], encoding="utf-8")
    for outdated in site.glob(f"recordings/*/{name}.ipynb"):
        outdated.unlink()
    if run["notebook"]:
        here = runner.folder_name(run["notebook"]["metadata"]["machine"])
        path = site / "recordings" / here / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run["notebook"]), encoding="utf-8")
    imagine(site, name)


@pytest.fixture(scope="session")
def site(once, executed):
    """A copy of the repository, laid out from the runs of its pages, and built.

    Its scripts are what ran, so that outputs belong to their code. It is recorded on
    this machine and on an imaginary GPU. Pages that were not asked for keep theirs.
    """

    def build_it(copy):
        copy_repository(copy)
        for tutorial in TUTORIALS:
            if not SELECTED or tutorial.stem in SELECTED:
                lay_out(copy, tutorial, executed(tutorial))
        done = warm.build(copy, [*noxfile.sphinx_options("html"), ".", "_build/html"])
        (copy / "status.json").write_text(json.dumps(done))

    copy = once("site", build_it)
    status, output = json.loads((copy / "status.json").read_text())
    told = [line for line in output.splitlines() if "WARNING" in line]
    assert status == 0, "\n".join(told) or output
    return copy


@pytest.fixture(scope="session")
def html(site):
    """The folder with the built pages."""
    return site / "_build" / "html"


# --- small made-up sites ----------------------------------------------------------

from small import alpha, built, built_once, small  # noqa: E402, F401
