"""A downloaded notebook is valid, reads well, and runs where nothing else is."""

import re

import nbclient
import nbformat
from conftest import environment, name_of

# What Sphinx-Gallery's converter leaves behind of reStructuredText it does not know.
RAW_RST = re.compile(
    r":\w+:`|^\s*\.\. \w|::\s*$|`_+(?!\w)|\)_|\[#?\w+\]_", re.MULTILINE
)


def read(site, tutorial):
    path = site / "auto_tutorials" / f"{name_of(tutorial)}.ipynb"
    return nbformat.read(path, as_version=4)


def test_is_valid_and_has_no_raw_rst(site, tutorial):
    notebook = read(site, tutorial)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL)
            raw = RAW_RST.search(prose)
            assert not raw, f"raw reStructuredText {raw[0]!r} in:\n{cell.source}"


def test_runs_in_an_empty_folder(site, tutorial, tmp_path):
    notebook = read(site, tutorial)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=environment())
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert figures, "the notebook shows no figure"
    assert list(tmp_path.iterdir()) == [], "the notebook left files behind"
