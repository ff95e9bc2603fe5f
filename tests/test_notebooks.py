"""A downloaded notebook is valid, reads well, and runs where nothing else is."""

import re

import nbclient
import nbformat
from conftest import environment, name_of

import runner

# What Sphinx-Gallery's converter leaves behind of reStructuredText it does not know.
RAW_RST = re.compile(
    r":\w+:`|^\s*\.\. \w|::\s*$|`_+(?!\w)|\)_|\[#?\w+\]_", re.MULTILINE
)


def test_is_the_script_and_runs_in_an_empty_folder(site, tutorial, tmp_path):
    path = site / "auto_tutorials" / f"{name_of(tutorial)}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL)
            raw = RAW_RST.search(prose)
            assert not raw, f"raw reStructuredText {raw[0]!r} in:\n{cell.source}"
    cells = runner.split(tutorial.read_text(encoding="utf-8"))
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

    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=environment())
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    drawn = any("image/png" in output.get("data", {}) for output in outputs)
    assert drawn == bool(folded)
    assert list(tmp_path.iterdir()) == [], "the notebook left files behind"
