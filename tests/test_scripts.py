"""Every page runs, once; every check on it can fail, and its code has been recorded."""

import ast
import json
import re

import pytest
import warm
from conftest import ROOT, TUTORIALS, name_of
from faults import engine

import runner


def test_runs_without_a_warning_and_every_check_can_fail(executed, tutorial):
    """With it, every mistake of tests/faults/, and the blocks of code in its prose."""
    problems = executed(tutorial)["problems"]
    assert not problems, "\n".join(problems)


def test_has_run_in_full_on_a_machine_that_recorded_it(tutorial):
    name = f"{name_of(tutorial)}.ipynb"
    recorded = runner.RECORDINGS.glob(f"*/{name}")
    states = {path.parts[-3]: runner.state(tutorial, path) for path in recorded}
    wanted = f"run it here at its full size: make record PAGES={tutorial.stem}"
    assert "current" in states.values(), f"{wanted} ({states or 'no recording'})"


def test_is_self_contained(tutorial):
    tree = ast.parse(tutorial.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        found = [getattr(node, key, None) for key in ("id", "attr", "name", "module")]
        for word in ["__file__", "argparse", "environ", "dup2", "_ext", "runner"]:
            assert word not in found, f"{word}: a page is a plain script, see step 1"


def own_nodes(statement):
    """Nodes of a statement without those of statements inside it."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, ast.stmt):
            yield child
            yield from own_nodes(child)


def test_float64_stands_on_the_cpu(tutorial):
    """An Apple GPU has no float64: a proof in double runs on the CPU, and says so.

    x.to("cpu", torch.float64) fails there (pytorch#197715), and so does
    x.double().cpu(); x.cpu().double() does not.
    """
    for statement in ast.walk(ast.parse(tutorial.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.stmt):
            nodes = list(own_nodes(statement))
            said = "\n".join(ast.unparse(node) for node in nodes)
            names = [getattr(node, "attr", "") for node in nodes]
            double = ("float64" in names and "finfo" not in names) or "double" in names
            place = f"{tutorial}:{statement.lineno}"
            right = "cpu" in said and ".to('cpu', torch.float64)" not in said
            right = right and not re.search(r"\.double\(\)[^,;\n]*\.cpu\(\)", said)
            assert right or not double, f"{place}: float64 on the CPU: x.cpu().double()"


def test_every_block_of_python_in_prose_is_known_to_the_engine(tutorial):
    """It runs what it finds; a block in another spelling would never run."""
    text = tutorial.read_text(encoding="utf-8")
    languages = re.findall(r"code(?:-block)?:: *(\w*)", text)
    assert set(languages) <= {"python", "bash", "none"}
    blocks = list(engine.blocks_of(runner.split(text)))
    assert len(blocks) == languages.count("python")


def test_the_sections_hold_pages_and_nothing_else():
    for path in (ROOT / "tutorials").rglob("*"):
        expected = (
            path.is_dir()
            or path.name in ("GALLERY_HEADER.rst", "pages.toml")
            or path in TUTORIALS
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
def try_page(tmp_path):
    """Try a page with faults; return what is wrong, as one text."""

    def call(text, faults=()):
        result, page = tmp_path / "result.json", tmp_path / "alpha" / "plot_alpha.py"
        arguments = result, page, text, list(faults)
        done = warm.call(engine.try_into, *arguments, log=tmp_path / "log")
        assert done.returncode == 0, done.output
        return "\n".join(json.loads(result.read_text())["problems"])

    return call


def fault(under, old, new, says=""):
    return {
        "mistake": "a mistake",
        "under": under,
        "old": old,
        "new": new,
        "says": says,
    }


NOTICED = fault("Sums", "vmap(torch.sin)", "torch.cos", "vmap is")


def test_every_assertion_needs_a_fault(try_page):
    assert try_page(PAGE, [NOTICED]) == ""
    says = try_page(PAGE + SECOND, [NOTICED])
    for number, line in enumerate((PAGE + SECOND).splitlines(), 1):
        alone = "raise AssertionError" in line or "assert_close" in line
        told = f"plot_alpha.py:{number}: no fault makes this assertion fail" in says
        assert told == alone
    taken = fault("Refused", "value.item()", "value", "took .item()")
    close = fault(
        "Refused", "assert_close(x, x)", "assert_close(x, x + 1)", "not close"
    )
    assert try_page(PAGE + SECOND, [NOTICED, taken, close]) == ""


BLOCK = """
# %%
# Then write
#
# .. code-block:: python
#
#    twice = 2 * together
"""


@pytest.mark.parametrize(
    ("page", "faults", "words"),
    [
        (PAGE, [fault("Sums", "arange(3.0)", "ones(3)")], "no assertion notices it"),
        (PAGE, [fault("Sums", "arange(3.0)", "arange(3")], "does not fit"),
        (PAGE, [NOTICED | {"says": "other words"}], "vmap is"),
        (PAGE, [fault("Sums", "torch.sin", "cos")], "stands 2 times under 'Sums'"),
        (PAGE, [fault("Elsewhere", "x", "y")], "no code under a heading 'Elsewhere'"),
        (PAGE, [fault("Sums", "assert diff", "print(diff) #")], "takes one away"),
        (
            PAGE,
            [fault("Sums", "import torch\n", "import unittest\n"
            "unittest.TestCase().assertTrue(False)\n")],
            "an assertion of a library, not of the page",
        ),
        (PAGE + "open('left.txt', 'w').close()\n", [], "files behind: ['left.txt']"),
        (PAGE + "import warnings\nwarnings.warn('old')\n", [], "UserWarning: old"),
        (PAGE + "raise ValueError('broken')\n", [], "ValueError: broken"),
        (PAGE + BLOCK.replace("together", "both"), [], "name 'both' is not defined"),
        (PAGE + BLOCK + BLOCK.replace("2 *", "twice *"), [NOTICED], ""),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(try_page, page, faults, words):
    says = try_page(page, faults)
    assert words in says
    assert bool(words) == bool(says)


def test_a_small_size_that_does_not_fit_is_told(monkeypatch):
    page = TUTORIALS[0]
    monkeypatch.setattr(
        engine, "edits_of", lambda page: ([["Set-up", "x = 5", ""]], [])
    )
    with pytest.raises(ValueError, match=rf"{page.name}: 'x = 5' stands 0 times"):
        engine.small(page)
