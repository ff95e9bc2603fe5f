"""What the tests share: the tutorials, a copy of the repository, and its built site."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "tutorials").rglob("plot_*.py"))


def name_of(tutorial):
    """basics/plot_ensembling, of a path."""
    return tutorial.relative_to(ROOT / "tutorials").with_suffix("").as_posix()


OUTSIDE = str(Path(__file__).parent / "outside")


def environment(**changes):
    """Environment in which tutorials measure briefly and need no display."""
    return os.environ | {"PYTHONPATH": OUTSIDE, "MPLBACKEND": "agg"} | changes


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


def copy_repository(target, tutorials=True):
    """Copy what git would commit; without tutorials if asked."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists() and (tutorials or not name.startswith("tutorials/")):
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
