"""A tutorial is a plain script: it runs anywhere, and every check on it can fail."""

import re
import sys

import pytest
from conftest import ROOT, TUTORIALS, make_small, name_of, run

import runner


def test_runs_without_a_warning_and_every_assertion_can_fail(tutorial, tmp_path):
    """Once in an empty folder; then every mistake of tests/faults/ in a child."""
    done = run(sys.executable, ROOT / "runner.py", "--check", tutorial, cwd=tmp_path)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_is_self_contained(tutorial):
    text = tutorial.read_text(encoding="utf-8")
    for word in ["__file__", "argparse", "environ", "dup2"]:
        assert word not in text, word
    assert "_ext" not in text
    assert "runner" not in text


def test_the_sections_hold_pages_and_nothing_else():
    for path in (ROOT / "tutorials").rglob("*"):
        expected = (
            path.is_dir() or path.name == "GALLERY_HEADER.rst" or path in TUTORIALS
        )
        assert expected or "__pycache__" in path.parts, path
    faults = (ROOT / "tests" / "faults").rglob("*.toml")
    named = {
        path.relative_to(ROOT / "tests" / "faults").with_suffix("").as_posix()
        for path in faults
    }
    assert named <= {name_of(tutorial) for tutorial in TUTORIALS}, (
        "faults of pages that are gone"
    )


@pytest.mark.parametrize("name", ["plot_fastest_ensemble", "plot_faster_training"])
def test_without_a_compiler_the_compiled_ways_are_left_out(name, tmp_path):
    (tutorial,) = runner.named(f"{name}.py")
    done = run(sys.executable, tutorial, cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "No C++ compiler was found" in done.stdout
    assert not re.findall(r"^compiled.*\d", done.stdout, re.MULTILINE)


# --- the guard itself -------------------------------------------------------------

PAGE = '''"""
Alpha
=====

Text.
"""

# %%
# Sums
# ----

import torch
from torch.func import vmap

x = torch.arange(3.0)
together = vmap(torch.sin)(x)
alone = torch.stack([torch.sin(value) for value in x])

# %%

difference = (together - alone).abs().max().item()
assert difference < 1e-6, f"vmap is {difference} away"
'''
SECOND = """
# %%
# Refused
# -------

try:
    vmap(lambda value: value.item())(x)
except RuntimeError as refused:
    print(refused)
else:
    raise AssertionError("vmap took .item()")
torch.testing.assert_close(x, x)
"""


@pytest.fixture
def checked(tmp_path):
    """Check a page with faults; return the status and what is said."""
    site = make_small(tmp_path / "site")

    def check(page, faults=""):
        (site / "tutorials/basics/plot_alpha.py").write_text(page)
        file = site / "tests/faults/basics/plot_alpha.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(faults)
        done = run(sys.executable, "runner.py", "--check", "plot_alpha", cwd=site)
        return done.returncode, done.stdout + done.stderr

    return check


def fault(under, old, new, says=""):
    return (
        f"[[fault]]\nmistake = 'a mistake'\nunder = '{under}'\n"
        f"old = '''{old}'''\nnew = '''{new}'''\nsays = '{says}'\n"
    )


def test_a_page_without_faults_of_its_own_gets_the_generic_ones(checked):
    status, says = checked(PAGE)
    assert status == 0, says
    assert says.count("noticed") == 2


def test_every_assertion_needs_a_fault(checked):
    status, says = checked(PAGE + SECOND)
    assert status == 1
    for number, line in enumerate((PAGE + SECOND).splitlines(), 1):
        alone = "raise AssertionError" in line or "assert_close" in line
        told = f"plot_alpha.py:{number}: no fault makes this assertion fail" in says
        assert told == alone
    both = "[[fault]]\nmistake = 'it is taken'\nunder = 'Refused'\nlibrary = 'accept'\n"
    both += fault(
        "Refused", "assert_close(x, x)", "assert_close(x, x + 1)", "not close"
    )
    status, says = checked(PAGE + SECOND, both)
    assert status == 0, says


@pytest.mark.parametrize(
    ("page", "faults", "words"),
    [
        (PAGE, fault("Sums", "arange(3.0)", "ones(3)"), "no assertion notices it"),
        (PAGE, fault("Sums", "arange(3.0)", "arange(3"), "does not fit"),
        (PAGE, fault("Sums", "vmap(torch.sin)", "torch.cos", "other words"), "vmap is"),
        (PAGE, fault("Sums", "torch.sin", "torch.cos"), "stands 2 times under 'Sums'"),
        (PAGE, fault("Elsewhere", "x", "y"), "no code under a heading 'Elsewhere'"),
        (
            PAGE,
            fault("Sums", "assert difference", "print(difference) #"),
            "takes one away",
        ),
        (
            PAGE + "open('left.txt', 'w').close()\n",
            "",
            "leaves files behind: ['left.txt']",
        ),
        (PAGE + "import warnings\nwarnings.warn('old')\n", "", "UserWarning: old"),
        (PAGE.replace("vmap(torch.sin)", "torch.sin"), "", "no assertion notices it"),
    ],
)
def test_what_is_wrong_is_said(checked, page, faults, words):
    status, says = checked(page, faults)
    assert status == 1
    assert words in says


def test_an_assertion_of_a_library_does_not_count(checked):
    library = (
        "import unittest\nunittest.TestCase().assertTrue(False)\nx = torch.arange(3.0)"
    )
    status, says = checked(PAGE, fault("Sums", "x = torch.arange(3.0)", library))
    assert status == 1
    assert "an assertion of a library, not of the page" in says
