"""Recordings: what machines executed is shown for as long as it holds."""

import base64
import itertools
import shutil
from types import SimpleNamespace

import nbformat
import pytest
from bs4 import BeautifulSoup
from conftest import ALT, GPU, MACHINE, imagine
from docutils import nodes
from docutils.utils import new_document
from small import RUNS, page
from sphinx import addnodes
from sphinx.errors import ExtensionError

import runner
from _ext import gallery, page_head, recordings

CPU = MACHINE | {"accelerator": None, "count": 0, "memory": None}
OTHER_CPU = CPU | {"cpu": "Another CPU", "date": "2026-03-04"}
OTHER_GPU = MACHINE | {"accelerator": "Another GPU"}
NAME = "basics/plot_alpha"


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def generated():
    """What Sphinx-Gallery makes of alpha."""
    doctree = new_document("alpha")
    doctree += nodes.section("", nodes.title("", "Alpha"))
    for cell in recordings.cells_of(NAME):
        if cell.code:
            comment = nodes.comment("", "GENERATED FROM PYTHON SOURCE LINES 1-2")
            block = nodes.literal_block(cell.code, cell.code, language="Python")
            doctree[0].extend([comment, block])
    return doctree


def under(block):
    """What stands under a code cell: text, or {label of a tab: text}."""
    after = block.parent[block.parent.index(block) + 1 :]
    outputs = itertools.takewhile(lambda x: not isinstance(x, nodes.comment), after)
    tabs, text = {}, []
    for output in outputs:
        text += [] if isinstance(output, nodes.raw) else [output.astext()]
        for item in output.findall(nodes.container):
            if "sd-tab-item" in item["classes"]:
                label, panel = item.children
                tabs[label.astext()] = panel.astext()
    return tabs or "\n\n".join(text)


def joined():
    """Alpha's page with all that ran it."""
    docname = f"auto_tutorials/{NAME}"
    app = SimpleNamespace(
        srcdir=runner.ROOT,
        env=SimpleNamespace(docname=docname, found_docs={docname}),
        config=SimpleNamespace(html_baseurl=""),
    )
    doctree = generated()
    recordings.read_all(app)
    recordings.join(app, doctree)
    page_head.add_head(app, doctree)
    return SimpleNamespace(
        app=app,
        doctree=doctree,
        head=next(doctree.findall(nodes.line_block)).astext(),
        cells=[
            under(block)
            for block in doctree.findall(nodes.literal_block)
            if block.get("language") == "Python"
        ],
        figures={
            source.name: [alt for _, alt in drawn]
            for source, drawn in recordings.figures_of(app, NAME)
        },
    )


def test_on_a_built_page_tabs_stand_where_machines_differ(built_once):
    here = runner.short_name(runner.this_machine())
    alpha = BeautifulSoup(page(built_once, "alpha"), "html.parser")
    assert not alpha.select(".sd-tab-set"), "both machines say the same"
    told = alpha.select_one(".ran-on").text
    assert "Imaginary GPU, 80 GiB, driver 1.2.3 in Imaginary CPU, 16 cores" in told
    assert here in told
    index = (built_once / "_build/html/index.html").read_text()
    assert index.count("<figcaption>") == 3, "of alpha on both machines, of beta on one"


def test_tabs_stand_where_machines_differ_and_only_there(alpha):
    imagine(runner.ROOT, NAME, CPU, RUNS, "here\n")
    imagine(runner.ROOT, NAME, say="here\n")
    first, second, third = joined().cells
    assert first == third == "here"
    assert second == f"{ALT}\n\nhere"
    imagine(runner.ROOT, NAME, say="there\n")
    cpu = runner.short_name(CPU)
    assert [list(cell) for cell in joined().cells] == [[GPU, cpu]] * 3


def test_order_of_tabs(alpha):
    machines = {"older": CPU, "newer": OTHER_CPU, "gpu": MACHINE}
    for name, machine in machines.items():
        imagine(runner.ROOT, NAME, machine, name, f"{name}\n")
    app = joined().app
    sources = recordings.recorded(app, NAME)
    assert [source.name for source in sources] == ["gpu", "newer", "older"]
    same = [(source._replace(machine=CPU), []) for source in sources[:2]]
    labels = recordings.tab_set(same).findall(nodes.rubric)
    assert [x.astext().rpartition(" ")[2] for x in labels] == ["(gpu)", "(newer)"]


@pytest.mark.parametrize(
    ("old", "current"), [("# See", 3), ("x is {x}", 2), ("x = 1", 0)]
)
def test_outputs_stand_up_to_the_first_edited_cell(alpha, old, current):
    imagine(runner.ROOT, NAME, say="gpu\n")
    edit(alpha, old, old.upper())
    page = joined()
    outputs = ["gpu", f"{ALT}\n\ngpu", "gpu"]
    assert page.cells == outputs[:current] + [""] * (3 - current)
    assert page.figures == {"gpu": [ALT] if current > 1 else []}
    told = f"its code has changed since, from cell {current + 1} of 3 on"
    assert (told in page.head) == (current < 3)
    imagine(runner.ROOT, NAME, CPU, RUNS, "here\n")
    beside = [[GPU, runner.short_name(CPU)]] * current
    assert [list(x) for x in joined().cells[:current]] == beside
    assert all("here" in str(cell) for cell in joined().cells[current:])


def test_what_is_outdated_is_not_shown_beside_what_is_current_of_its_kind(alpha):
    root = runner.ROOT
    imagine(root, NAME, CPU, "cpu", "cpu\n")
    imagine(root, NAME, OTHER_GPU, "another-gpu", "another gpu\n")
    edit(alpha, "x is {x}", "x was {x}")
    imagine(root, NAME, say="gpu\n")
    cpu, other_cpu = runner.short_name(CPU), runner.short_name(OTHER_CPU)
    page = joined()
    assert page.cells[0] == {GPU: "gpu", cpu: "cpu"}, "no other CPU is current"
    assert page.cells[2] == {GPU: "gpu"}
    assert page.figures == {"gpu": [ALT], "cpu": [ALT], "another-gpu": []}
    assert "Another GPU, 80 GiB" in page.head, "the head tells of it"
    assert page.head.count("changed since, from cell 3 of 3 on") == 2

    imagine(root, NAME, OTHER_CPU, RUNS, "another cpu\n")
    assert [list(cell) for cell in joined().cells] == [[GPU, other_cpu]] * 3
    for folder in runner.RECORDINGS.glob("*gpu"):
        shutil.rmtree(folder)
    assert joined().cells[2] == "another cpu", "one machine needs no tab"


def test_of_a_run_and_a_recording_of_one_machine_the_better_is_shown(alpha):
    imagine(runner.ROOT, NAME, CPU, "cpu", "recorded\n")
    run = imagine(runner.ROOT, NAME, CPU, RUNS, "run\n")
    page = joined()
    assert page.cells[0] == "run"
    assert page.head.count("Ran on") == 1
    run.write_text(run.read_text().replace("x is {x}", "x was {x}"))
    assert joined().cells[2] == "recorded", "the run is of other code"
    run.unlink()
    assert "Ran on Imaginary CPU, 16 cores; torch 2.11.0" in joined().head
    shutil.rmtree(runner.RECORDINGS)
    assert "built without running its code" in joined().head


def test_pages_are_read_again_when_a_recording_comes_or_changes(alpha):
    app, seen = joined().app, []
    for say in [None, "once\n", "once\n", "twice\n"]:
        if say:
            imagine(runner.ROOT, NAME, say=say)
        recordings.read_all(app)
        seen.append(bool(recordings.outdated(app, app.env, set(), set(), set())))
    assert seen == [False, True, False, True]


def test_the_executed_notebook_is_the_page_as_it_is_and_says_what_it_needs(alpha):
    imagine(runner.ROOT, NAME)
    edit(alpha, "See ``plot_alpha.py``.", "New words.")
    (link,) = joined().doctree.findall(addnodes.download_reference)
    offered = nbformat.read(runner.ROOT / link["reftarget"].lstrip("/"), 4)
    nbformat.validate(offered)
    assert offered.cells[0].source.startswith("# %pip install matplotlib")
    assert "New words." in [cell.source for cell in offered.cells]
    figure = next(x for x in offered.cells if len(x.get("outputs", [])) == 2).outputs[0]
    assert base64.b64decode(figure.data["image/png"]).startswith(b"\x89PNG")
    assert runner.recorded_code(offered)[1:] == runner.code_of(
        recordings.cells_of(NAME)
    )


BAD = {
    "cut off": lambda text: text[:300],
    "no notebook": lambda text: text.replace('"cells"', '"cell"'),
    "no machine": lambda text: text.replace('"machine"', '"device"'),
}


@pytest.mark.parametrize("how", BAD)
def test_damaged_notebook_stops_the_build(how, alpha):
    path = imagine(runner.ROOT, NAME)
    path.write_text(BAD[how](path.read_text()))
    with pytest.raises(ExtensionError, match="damaged") as raised:
        recordings.read_all(SimpleNamespace())
    for part in ["gpu/basics/plot_alpha.ipynb", "git", "python runner.py plot_alpha"]:
        assert part in str(raised.value)


def test_a_recording_of_a_page_that_is_gone_stops_the_build(alpha):
    imagine(runner.ROOT, NAME, CPU, RUNS)
    imagine(runner.ROOT, NAME)
    alpha.unlink()
    with pytest.raises(
        ExtensionError, match="is of a tutorial that is gone: git rm it"
    ):
        recordings.read_all(SimpleNamespace())
    shutil.rmtree(runner.RECORDINGS)
    recordings.read_all(SimpleNamespace())


def test_cells_that_sphinx_gallery_marks_in_another_way_stop_the_build(alpha):
    with pytest.raises(ExtensionError, match="4 code cells were expected, 3 found"):
        gallery.code_cells(generated(), 4)
