"""What the tests share: the tutorials, a copy of the repository, and its built site."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "_ext"))
import recording_files  # noqa: E402

TUTORIALS = sorted((ROOT / "tutorials").rglob("plot_*.py"))


# Files whose tests share a built site run in one process, so that it is built once.
SHARED_SITES = {
    "test_browser.py": "site",
    "test_notebooks.py": "site",
    "test_pages.py": "site",
    "test_commands.py": "small site",
    "test_recordings.py": "small site",
}


class BySite(LoadScopeScheduling):
    """Other tests go one by one to the process that is free."""

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0].rpartition("/")[2]
        return SHARED_SITES.get(file, nodeid)


def pytest_xdist_make_scheduler(config, log):
    return BySite(config, log)


def name_of(tutorial):
    """basics/plot_ensembling, of a path."""
    return tutorial.relative_to(ROOT / "tutorials").with_suffix("").as_posix()


OUTSIDE = str(Path(__file__).parent / "outside")


def environment(**changes):
    """Environment in which tutorials measure briefly and no display is to be had.

    Tests run side by side, so a thread that waits leaves its core to others.
    """
    display = {"DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"}
    plain = {key: value for key, value in os.environ.items() if key not in display}
    return plain | {"PYTHONPATH": OUTSIDE, "OMP_WAIT_POLICY": "PASSIVE"} | changes


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


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A copy of the repository in which ``make html`` has run, measuring briefly."""
    copy = copy_repository(tmp_path_factory.mktemp("site"))
    done = nox("html", cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy


@pytest.fixture(scope="session")
def html(site):
    """The folder with the built pages."""
    return site / "_build" / "html"


@pytest.fixture(params=TUTORIALS, ids=name_of)
def tutorial(request):
    """Every tutorial in turn. A new one joins by existing."""
    return request.param


# These tutorials measure nothing, so no change from outside is needed.
small_nox = functools.partial(nox, PYTHONPATH="")

SMALL_TUTORIAL = '''"""
{title}
=====

The {title} of this small gallery draws one line and prints when it ran.
"""

# %%
# Text before code.

import time
import matplotlib.pyplot as plt
{code}
print("{title} ran at", time.time_ns())
fig, ax = plt.subplots()
_ = ax.plot([1, 2])
{label}
'''
LABEL = 'fig.set_label("A line that rises from left to right, made up for a test.")'


def write_tutorial(site, name, code="", label=LABEL):
    """Write a tutorial of one code cell into a small site."""
    path = site / "tutorials" / "basics" / f"plot_{name}.py"
    path.write_text(SMALL_TUTORIAL.format(title=name, code=code, label=label))


@pytest.fixture
def small(tmp_path):
    """A copy of the repository with two small tutorials in place of its own."""
    return make_small(tmp_path / "site")


@pytest.fixture(scope="session")
def built_once(tmp_path_factory):
    """A small site on which ``make html`` has run."""
    site = make_small(tmp_path_factory.mktemp("built") / "site")
    done = small_nox("html", cwd=site)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.fixture
def built(built_once, tmp_path):
    """A copy of that site for a test to change."""
    return shutil.copytree(built_once, tmp_path / "site")


def make_small(folder):
    """Make the site of the fixture small in a folder; its path is returned."""
    site = copy_repository(folder, ["tutorials/", "recordings/"])
    (site / "tutorials" / "basics").mkdir(parents=True)
    for folder in ["tutorials", "tutorials/basics"]:
        (site / folder / "GALLERY_HEADER.rst").write_text("Title\n=====\n\nText.\n")
    (site / "index.rst").write_text(
        "Index\n=====\n\n.. tutorial-figure:: basics/plot_alpha 1\n\n"
        ".. toctree::\n\n   auto_tutorials/index\n"
    )
    write_tutorial(site, "alpha")
    write_tutorial(site, "beta")
    return site


def page(site, name):
    """HTML of one of the small tutorials."""
    path = site / "_build" / "html" / "auto_tutorials" / "basics" / f"plot_{name}.html"
    return path.read_text()


MACHINE = {
    "accelerator": "Imaginary GPU",
    "memory": 80,
    "cpu": "Imaginary CPU",
    "cores": 16,
    "driver": "1.2.3",
    "cuda": "13.0",
    "torch": "2.11.0",
    "python": "3.12.1",
    "date": "2026-01-02",
}


def imagine_machine(site, tutorial, texts):
    """Record a tutorial as MACHINE's, from this machine's own recording.

    The outputs are the same but for the cells named in texts: {number: text}.
    """
    root = site / "recordings"
    (own,) = [path for path in root.iterdir() if path.name != "gpu"]
    cells = []
    own_cells = recording_files.load_tutorial(own / tutorial)["cells"]
    for number, cell in enumerate(own_cells, 1):
        outputs = [output[:2] for output in cell["outputs"]]
        if number in texts:
            outputs = [("text", texts[number])]
        cells.append((cell["code"], outputs))
    recording_files.save_tutorial(root, "gpu", tutorial, MACHINE, 1.0, cells)
