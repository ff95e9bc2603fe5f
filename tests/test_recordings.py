"""Recordings: executed notebooks, shown for as long as they hold, never lost."""

import base64
import itertools
import json
import re
import shutil
import sys
from types import SimpleNamespace

import nbformat
import pytest
from bs4 import BeautifulSoup
from conftest import ALT, GPU, MACHINE, ROOT, imagine, run
from docutils import nodes
from docutils.utils import new_document
from small import make_small, page, write_tutorial
from sphinx import addnodes
from sphinx.errors import ExtensionError

import runner
from _ext import gallery, page_head, recordings

CPU = MACHINE | {"accelerator": None, "count": 0, "memory": None}
OTHER_CPU = CPU | {"cpu": "Another CPU", "date": "2026-03-04"}
OTHER_GPU = MACHINE | {"accelerator": "Another GPU"}


@pytest.fixture
def alpha(tmp_path, monkeypatch):
    """The script of a page of three cells, in a repository of its own."""
    for name in ["ROOT", "TUTORIALS", "RECORDINGS"]:
        below = {"ROOT": ""}.get(name, name.lower())
        monkeypatch.setattr(runner, name, tmp_path / below)
    (tmp_path / "tutorials/basics").mkdir(parents=True)
    return write_tutorial(tmp_path, "alpha")


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def generated(ran):
    """What Sphinx-Gallery makes of alpha. Where it ran, each cell printed "here"."""
    doctree = new_document("alpha")
    doctree += nodes.section("", nodes.title("", "Alpha"))
    for cell in runner.split((runner.TUTORIALS / "basics/plot_alpha.py").read_text()):
        if cell.code:
            comment = nodes.comment("", "GENERATED FROM PYTHON SOURCE LINES 1-2")
            block = nodes.literal_block(cell.code, cell.code, language="Python")
            printed = nodes.literal_block("", "here", classes=["sphx-glr-script-out"])
            doctree[0].extend([comment, block, *[printed] * ran])
    seconds = "(0 minutes 1.5 seconds)"
    timing = nodes.paragraph("", seconds, classes=["sphx-glr-timing"])
    doctree[0].extend([nodes.comment(), timing][: 2 * ran])
    return doctree


def under(block):
    """What stands under a code cell: text, or {label of a tab: text}."""
    after = block.parent[block.parent.index(block) + 1 :]
    outputs = itertools.takewhile(lambda x: not isinstance(x, nodes.comment), after)
    tabs, text = {}, []
    for output in outputs:
        text.append(output.astext())
        for item in output.findall(nodes.container):
            if "sd-tab-item" in item["classes"]:
                label, panel = item.children
                tabs[label.astext()] = panel.astext()
    return tabs or "\n\n".join(text)


def joined(ran_on=None):
    """Alpha's page with its recordings, where this build ran it or did not."""
    docname = "auto_tutorials/basics/plot_alpha"
    options = {"plot_gallery": str(bool(ran_on)), "filename_pattern": "/plot_"}
    app = SimpleNamespace(
        srcdir=runner.ROOT,
        env=SimpleNamespace(docname=docname, found_docs={docname}),
        config=SimpleNamespace(sphinx_gallery_conf=options, html_baseurl=""),
    )
    note = runner.ROOT / f"{docname}.ran.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"machine": ran_on, "figures": []}))
    doctree = generated(bool(ran_on))
    recordings.read_all(app)
    recordings.join(app, doctree)
    page_head.add_head(app, doctree)
    return SimpleNamespace(
        app=app,
        doctree=doctree,
        head=next(doctree.findall(nodes.line_block)).astext(),
        cells=[under(block) for block, _ in gallery.code_cells(doctree)],
        figures={
            source.name: [alt for _, alt in drawn]
            for source, drawn in recordings.figures_of(app, "basics/plot_alpha")
        },
    )


# --- what is shown ----------------------------------------------------------------


def test_on_a_built_page_tabs_stand_where_machines_differ(built_once):
    alpha = BeautifulSoup(page(built_once, "alpha"), "html.parser")
    labels = [label.text.strip() for label in alpha.select(".sd-tab-set > label")]
    assert sorted(labels) == [GPU, GPU, "This build", "This build"], "x is the same"
    told = alpha.select_one(".ran-on").text
    assert "Imaginary GPU, 80 GiB, driver 1.2.3 in Imaginary CPU, 16 cores" in told
    index = (built_once / "_build/html/index.html").read_text()
    assert index.count("<figcaption>") == 3, "of alpha on both machines, of beta on one"


def test_tabs_stand_where_machines_differ_and_only_there(alpha):
    imagine(runner.ROOT, "basics/plot_alpha", say="here\n")
    first, second, third = joined(CPU).cells
    assert first == third == "here"
    assert list(second.items()) == [(GPU, f"{ALT}\n\nhere"), ("This build", "here")]
    assert joined().cells[1] == f"{ALT}\n\nhere", "one machine needs no tab"


def test_order_of_tabs():
    machines = {"older": CPU, "newer": OTHER_CPU, recordings.OWN: CPU}
    machines |= {"gpu": MACHINE, "another": OTHER_GPU}
    sources = [recordings.Source(machines[name], name, []) for name in machines]
    ordered = recordings.in_order([(source,) for source in sources])
    names = [source.name for (source,) in ordered]
    assert names == ["another", "gpu", recordings.OWN, "newer", "older"]
    same = [(source._replace(machine=CPU), []) for source in sources[:2]]
    labels = recordings.tab_set(same).findall(nodes.rubric)
    assert [x.astext().rpartition(" ")[2] for x in labels] == ["(older)", "(newer)"]


@pytest.mark.parametrize(
    ("old", "current"), [("# See", 3), ("x is {x}", 2), ("x = 1", 0)]
)
def test_outputs_stand_up_to_the_first_edited_cell(alpha, old, current):
    imagine(runner.ROOT, "basics/plot_alpha", say="gpu\n")
    edit(alpha, old, old.upper())
    page = joined()
    outputs = ["gpu", f"{ALT}\n\ngpu", "gpu"]
    assert page.cells == outputs[:current] + [""] * (3 - current)
    assert page.figures == {"gpu": [ALT] if current > 1 else []}
    told = f"its code has changed since, from cell {current + 1} of 3 on"
    assert (told in page.head) == (current < 3)
    beside = [{GPU: text, "This build": "here"} for text in outputs[:current]]
    assert joined(CPU).cells == beside + ["here"] * (3 - current)


def test_what_is_outdated_is_not_shown_beside_what_is_current_of_its_kind(alpha):
    root, name = runner.ROOT, "basics/plot_alpha"
    imagine(root, name, CPU, "cpu", "cpu\n")
    imagine(root, name, OTHER_GPU, "another-gpu", "another gpu\n")
    edit(alpha, "x is {x}", "x was {x}")
    imagine(root, name, say="gpu\n")
    cpu, other_cpu = runner.short_name(CPU), runner.short_name(OTHER_CPU)
    page = joined()
    assert page.cells[0] == {GPU: "gpu", cpu: "cpu"}, "no other CPU is current"
    assert page.cells[2] == {GPU: "gpu"}
    assert page.figures == {"gpu": [ALT], "cpu": [ALT], "another-gpu": []}
    assert "Another GPU, 80 GiB" in page.head, "the head tells of it"
    assert page.head.count("changed since, from cell 3 of 3 on") == 2

    assert joined(OTHER_CPU).cells[0] == {GPU: "gpu", "This build": "here"}
    imagine(root, name, OTHER_CPU, "another-cpu", "another cpu\n")
    assert [list(cell) for cell in joined().cells] == [[GPU, other_cpu]] * 3
    for folder in runner.RECORDINGS.glob("*gpu"):
        shutil.rmtree(folder)
    assert joined().cells[2] == "another cpu", "one machine needs no tab"


def test_a_machine_that_built_the_page_needs_no_recording_of_it(alpha):
    imagine(runner.ROOT, "basics/plot_alpha", CPU, "cpu", "long ago\n")
    page = joined(CPU)
    assert page.cells == ["here"] * 3
    assert page.figures == {recordings.OWN: []}
    assert "Recorded" not in page.head
    page = joined()
    assert page.cells[0] == "long ago", "a build that runs nothing needs it"
    assert "Recorded on Imaginary CPU, 16 cores; torch 2.11.0" in page.head


def test_the_same_gpu_in_another_host_is_one_machine():
    host = MACHINE | {"cpu": "Another CPU", "cores": 64}
    assert runner.hardware(host) == runner.hardware(MACHINE)
    assert runner.folder_name(host) == runner.folder_name(MACHINE)
    assert runner.hardware(MACHINE | {"count": 2}) != runner.hardware(MACHINE)
    assert runner.folder_name(MACHINE | {"count": 2}) == "2-x-imaginary-gpu"


def test_pages_are_read_again_when_a_recording_comes_or_changes(alpha):
    app, seen = joined().app, []
    for say in [None, "once\n", "once\n", "twice\n"]:
        if say:
            imagine(runner.ROOT, "basics/plot_alpha", say=say)
        recordings.read_all(app)
        seen.append(bool(recordings.outdated(app, app.env, set(), set(), set())))
    assert seen == [True, True, False, True]


def test_the_recorded_notebook_can_be_had_and_says_what_it_needs(alpha):
    original = imagine(runner.ROOT, "basics/plot_alpha")
    (link,) = joined().doctree.findall(addnodes.download_reference)
    offered = runner.ROOT / link["reftarget"].lstrip("/")
    offered, original = (nbformat.read(path, 4) for path in (offered, original))
    nbformat.validate(offered)
    first = offered.cells.pop(0)
    assert first.source.startswith("# %pip install matplotlib")
    figure = next(x for x in offered.cells if len(x.get("outputs", [])) == 2).outputs[0]
    assert base64.b64decode(figure.data.pop("image/png")).startswith(b"\x89PNG")
    assert offered.cells == original.cells


# --- what is refused --------------------------------------------------------------

BAD = {
    "cut off": lambda text: text[:300],
    "no notebook": lambda text: text.replace('"cells"', '"cell"'),
    "no machine": lambda text: text.replace('"machine"', '"device"'),
}


@pytest.mark.parametrize("how", BAD)
def test_damaged_notebook_stops_the_build(how, alpha):
    path = imagine(runner.ROOT, "basics/plot_alpha")
    recordings.read(path)
    path.write_text(BAD[how](path.read_text()))
    with pytest.raises(ExtensionError, match="damaged") as raised:
        recordings.read(path)
    for part in ["gpu/basics/plot_alpha.ipynb", "git", "python runner.py plot_alpha"]:
        assert part in str(raised.value)


def test_the_table_tells_what_is_outdated_damaged_missing_or_gone(alpha, capsys):
    names = ["alpha", "damaged", "edited", "gone"]
    for name in names:
        alpha.with_name(f"plot_{name}.py").write_text(alpha.read_text())
        path = imagine(runner.ROOT, f"basics/plot_{name}")
        if name == "damaged":
            path.write_text(path.read_text()[:200])
    edit(alpha.with_name("plot_edited.py"), "x = 1", "x = 2")
    alpha.with_name("plot_gone.py").rename(alpha.with_name("plot_new.py"))
    runner.table()
    table = capsys.readouterr().out
    states = ["current", "damaged: record again", "outdated from cell 1"]
    states += ["page is gone: git rm it", "missing"]
    for name, state in zip([*names, "new"], states, strict=True):
        assert re.search(f"basics/plot_{name} +{state}$", table, re.MULTILINE)
    with pytest.raises(
        ExtensionError, match="is of a tutorial that is gone: git rm it"
    ):
        recordings.read(path)


# --- recording --------------------------------------------------------------------


def test_record_from_a_bare_copy_and_fail_alone(tmp_path):
    """No git, no Sphinx, no nox: a page that fails costs the others nothing."""
    site = make_small(tmp_path / "site")
    for name in ["_ext", "tests", "noxfile.py", "conf.py", "requirements.txt"]:
        (site / name).rename(tmp_path / name)
    write_tutorial(site, "beta", code="import a_library_that_is_not_here")
    alpha, beta = (
        imagine(site, f"basics/plot_{name}", runner.this_machine(), "mine")
        for name in ["alpha", "beta"]
    )
    alpha.write_text("damaged")
    before = beta.read_bytes()
    block = tmp_path / "block" / "sitecustomize.py"
    block.parent.mkdir()
    blocked = "dict.fromkeys(['sphinx', 'nox', 'nbformat'])"
    block.write_text(f"import sys; sys.modules.update({blocked})")
    command = [sys.executable, "runner.py", "--machine", "mine"]
    done = run(*command, cwd=site, PYTHONPATH=str(block.parent))
    assert done.returncode == 1
    assert "skipped plot_beta: it needs a_library_that_is_not_here" in done.stdout
    assert "1 of 2 pages did not succeed: plot_beta" in done.stdout
    assert beta.read_bytes() == before, "the former recording is whole"
    assert set(alpha.parent.iterdir()) == {alpha, beta}

    notebook = nbformat.read(alpha, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.machine == runner.this_machine()
    assert "[draws](https://pytorch.org) $x^2$" in notebook.cells[0].source
    first, second, third = [x for x in notebook.cells if x.cell_type == "code"]
    assert first.outputs[0].text.startswith("alpha ran at")
    assert second.metadata.jupyter.source_hidden
    assert second.outputs[0].data["text/plain"] == "A line that rises."
    assert "<title>A line that rises.<" in second.outputs[0].data["image/svg+xml"]
    assert third.outputs[0].text == "x is 1\n"


def test_name_of_another_machine_is_refused(alpha, monkeypatch, capsys):
    imagine(runner.ROOT, "basics/plot_alpha")
    monkeypatch.setattr(runner, "this_machine", lambda: CPU)
    with pytest.raises(SystemExit, match=r"gpu is the name of another .*Imaginary GPU"):
        runner.record(alpha, "gpu")
    monkeypatch.setattr(sys, "argv", ["runner.py", "alpha", "--machine", "My GPU"])
    with pytest.raises(SystemExit):
        runner.main()
    assert "use small letters" in capsys.readouterr().err


def test_processors_without_a_name_do_not_share_one(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(runner, "Path", lambda name: cpuinfo)
    names = []
    for part in ["0xd0c", "0xd40"]:
        cpuinfo.write_text(f"CPU implementer\t: 0x41\nCPU part\t: {part}\n")
        names.append(runner.processor.__wrapped__())
    assert names[0] != names[1]
    cpuinfo.write_text("model name\t: AMD EPYC\n")
    assert runner.processor.__wrapped__() == "AMD EPYC"


def test_the_recordings_of_this_repository_are_of_its_pages(capsys):
    runner.table()
    assert "gone" not in capsys.readouterr().out


def test_the_pictures_of_the_readme_are_recorded_ones():
    names = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (ROOT / "README.md").read_text())
    recorded = [path.read_text() for path in (ROOT / "recordings").rglob("*.ipynb")]
    assert len(names) == 2
    for name in names:
        lines = [json.dumps(x) for x in (ROOT / name).read_text().splitlines(True)]
        found = any(all(line in text for line in lines) for text in recorded)
        assert found, f"copy the newly recorded figure to {name}"
