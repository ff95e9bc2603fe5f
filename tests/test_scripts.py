"""A tutorial is a plain script: it runs anywhere and leaves nothing behind."""

import ast
import re
import sys

import pytest
from conftest import ROOT, run


def test_runs_in_an_empty_folder(tutorial, tmp_path):
    done = run(sys.executable, "-W", "error", tutorial, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [], "the script left files behind"


def test_is_self_contained(tutorial):
    text = tutorial.read_text(encoding="utf-8")
    assert "__file__" not in text, "a notebook has no __file__"
    assert "argparse" not in text
    assert "environ" not in text, "scripts carry no switch"


@pytest.mark.parametrize(
    ("name", "row", "least"),
    [
        ("speed/plot_fastest_ensemble", r"^[ \d]\d .*", 10),
        ("training/plot_training", r"^(?:eager|compiled), .*", 4),
    ],
)
def test_without_a_compiler_the_compiled_ways_are_left_out(name, row, least, tmp_path):
    tutorial = ROOT / "tutorials" / f"{name}.py"
    done = run(sys.executable, tutorial, cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (
        "No C++ compiler was found: the compiled variants are left out" in done.stdout
    )
    rows = re.findall(row, done.stdout, re.MULTILINE)
    assert len(rows) >= least
    assert not [row for row in rows if "compiled" in row]


def test_check_members_is_the_same_on_both_pages():
    """plot_saving.py says that it repeats what plot_state.py explains."""
    pages = []
    for name in ["plot_state.py", "plot_saving.py"]:
        text = (ROOT / "tutorials" / "training" / name).read_text(encoding="utf-8")
        functions = {f.name: f for f in ast.parse(text).body if hasattr(f, "name")}
        pages.append([ast.unparse(functions[f]) for f in ("describe", "check_members")])
    assert pages[0] == pages[1]
