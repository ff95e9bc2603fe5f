"""Every check on a page can fail: break what it checks and see the page stop."""

import sys

import pytest
from conftest import TUTORIALS, name_of, run

# Faults that only some pages guard against, beside those that all must notice:
# name of the page, fault (see outside/sitecustomize.py), words of the message.
MORE = [
    ("basics/plot_ensembling", "disturb@1", "option 1, ieee: vmap does not compute"),
    ("basics/plot_ensembling", "disturb@2", "option 2, ieee: vmap does not compute"),
    ("basics/plot_ensembling", "accept", "PyTorch ran a call"),
]


def sabotage(tutorial, fault, folder):
    """Run the tutorial with a fault; return what its assertion says."""
    done = run(sys.executable, tutorial, cwd=folder, SABOTAGE=fault)
    assert done.returncode != 0, f"{tutorial.name} did not notice {fault}"
    assert str(tutorial) in done.stderr, done.stderr
    last = [line for line in done.stderr.splitlines() if line and line[0] != " "][-1]
    assert last.startswith("AssertionError: "), done.stderr
    return done.stderr


@pytest.mark.parametrize("fault", ["disturb", "swap"])
def test_page_notices(tutorial, fault, tmp_path):
    sabotage(tutorial, fault, tmp_path)


@pytest.mark.parametrize(("name", "fault", "words"), MORE)
def test_each_check_notices(name, fault, words, tmp_path):
    (tutorial,) = [path for path in TUTORIALS if name_of(path) == name]
    assert words in sabotage(tutorial, fault, tmp_path)
