"""Website, notebook, script: a page is the same in each form, and runs in each."""

import re
import sys

import conftest
import nbclient
import nbformat
import pytest
from conftest import TUTORIALS, environment, name_of, run

import runner

# Pages that differ in kind: the flagship, one that starts processes from functions of
# its cells, one that compiles. make test-all runs every page in both forms.
IN_A_KERNEL, AS_A_SCRIPT = (
    [page for page in TUTORIALS if conftest.ALL or page.stem in names]
    for names in (
        ["plot_ensembling", "plot_many_devices"],
        ["plot_ensembling", "plot_recipes"],
    )
)

slow = pytest.mark.slow

# What Sphinx-Gallery's converter leaves behind of reStructuredText it does not know.
RAW_RST = re.compile(
    r":\w+:`|^\s*\.\. \w|::\s*$|`_+(?!\w)|\)_|\[#?\w+\]_", re.MULTILINE
)


def downloaded(site, tutorial):
    path = site / "auto_tutorials" / f"{name_of(tutorial)}.ipynb"
    return nbformat.read(path, as_version=4)


def test_notebook_is_the_script_and_reads_well(site, tutorial):
    notebook = downloaded(site, tutorial)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL)
            raw = RAW_RST.search(prose)
            assert not raw, f"raw reStructuredText {raw[0]!r} in:\n{cell.source}"
    script = site / "tutorials" / f"{name_of(tutorial)}.py"
    cells = runner.split(script.read_text(encoding="utf-8"))
    needs, *code = runner.recorded_code(notebook)
    assert code == runner.code_of(cells)
    assert len(needs) == 1
    assert needs[0].startswith("# %pip install ")
    assert "torch" in needs[0].split()
    folded = [
        cell.source
        for cell in notebook.cells
        if cell.metadata.get("jupyter", {}).get("source_hidden")
    ]
    assert folded == [cell.code for cell in cells if runner.draws(cell.code)]


@pytest.mark.parametrize("tutorial", IN_A_KERNEL, ids=name_of)
def test_notebook_runs_in_an_empty_folder(site, tutorial, tmp_path):
    notebook = downloaded(site, tutorial)
    client = nbclient.NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=environment())
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    drawn = any("image/png" in output.get("data", {}) for output in outputs)
    draws = runner.draws("".join(cell.source for cell in notebook.cells))
    assert drawn == draws
    assert list(tmp_path.iterdir()) == [], "the notebook left files behind"


@pytest.mark.parametrize("tutorial", AS_A_SCRIPT, ids=name_of)
def test_script_runs_in_an_empty_folder_without_a_warning(executed, tutorial, tmp_path):
    script, folder = tmp_path / tutorial.name, tmp_path / "empty"
    script.write_text(executed(tutorial)["text"])
    folder.mkdir()
    done = run(sys.executable, "-W", "error", script, cwd=folder, MPLBACKEND="Agg")
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == [], "the script left files behind"


@pytest.mark.parametrize(
    "name",
    ["plot_fastest_ensemble", pytest.param("plot_faster_training", marks=slow)],
)
def test_without_a_compiler_the_compiled_ways_are_left_out(name, executed, tmp_path):
    (tutorial,) = runner.named(f"{name}.py")
    script = tmp_path / tutorial.name
    script.write_text(executed(tutorial)["text"])
    done = run(sys.executable, script, cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^The compiler failed: (.*\n)?.*C\+\+ compiler", done.stdout, re.M
    )
    assert not re.findall(r"^compiled.*\d", done.stdout, re.MULTILINE)
