"""Recordings: executed notebooks, shown for as long as they hold, never lost."""

import base64
import json
import re
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from bs4 import BeautifulSoup
from conftest import (
    GPU,
    MACHINE,
    ROOT,
    environment,
    imagine,
    run,
)
from small import build, make_small, page, write_tutorial

import runner

ALPHA = '''"""
Alpha
=====

Alpha prints and draws, and `links <https://pytorch.org>`_ to :math:`x^2`.
"""

# %%
# First
# -----

x = 1
print("from the imaginary GPU")

# %%
# Second
# ------

import matplotlib.pyplot as plt
import time

print("at", time.time_ns())
fig, ax = plt.subplots()
_ = ax.plot([1, 2])
fig.set_label("A rising line.")

# %%
# Third
# -----

print(f"x is {x}")
'''


def record(site, *arguments, **changes):
    return run(sys.executable, "runner.py", *arguments, cwd=site, **changes)


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def alpha(site):
    return BeautifulSoup(page(site, "alpha"), "html.parser")


def labels(site):
    return [label.text.strip() for label in alpha(site).select(".sd-tab-set > label")]


def build_well(site, *options):
    done = build(site, *options)
    assert done.returncode == 0, done.output
    return done.output


@pytest.fixture
def site(tmp_path):
    """A small site whose page alpha is recorded on an imaginary GPU."""
    site = make_small(tmp_path / "site")
    (site / "tutorials/basics/plot_alpha.py").write_text(ALPHA)
    imagine(site, "basics/plot_alpha")
    return site


# --- what is shown ----------------------------------------------------------------


def test_tabs_stand_where_machines_differ_and_only_there(site):
    build_well(site)
    here = runner.this_machine()["accelerator"]
    order = ["This build", GPU] if here else [GPU, "This build"]
    assert labels(site) == order * 2, "the second cell and the third, the first agrees"
    head = alpha(site).select_one(".ran-on").text
    assert "Imaginary GPU, 80 GiB, driver 1.2.3 in Imaginary CPU, 16 cores" in head
    index = (site / "_build/html/index.html").read_text()
    assert index.count("<figcaption>") == 2, "the landing page shows both machines"


def test_the_recorded_notebook_can_be_had_and_says_what_it_needs(site):
    build_well(site, "-Dplot_gallery=0")
    link = alpha(site).select_one(".ran-on a[download]")
    offered = site / "_build/html/auto_tutorials/basics" / link["href"]
    original = site / "recordings/gpu/basics/plot_alpha.ipynb"
    offered, original = (nbformat.read(path, 4) for path in (offered, original))
    nbformat.validate(offered)
    first = offered.cells.pop(0)
    assert first.source.startswith("# %pip install matplotlib")
    pictures = []
    for cell in offered.cells:
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).pop("image/png", None):
                pictures.append(base64.b64decode(picture))
    assert [picture[:4] for picture in pictures] == [b"\x89PNG"]
    assert offered.cells == original.cells


def test_edited_first_cell_leaves_nothing_of_the_recording(site):
    build_well(site)
    edit(site / "tutorials/basics/plot_alpha.py", "# First\n", "# Other\n")
    build_well(site)
    assert GPU in labels(site), "prose is no code"
    edit(site / "tutorials/basics/plot_alpha.py", "x = 1", "x = 2")
    for options in [[], ["-Dplot_gallery=0"]]:
        build_well(site, *options)
        assert labels(site) == []
        assert "changed since, from cell 1 of 3 on" in page(site, "alpha")
        output = alpha(site).select(".sphx-glr-script-out")
        assert bool(output) == (not options), "what was not run is not shown"
        index = (site / "_build/html/index.html").read_text()
        assert ("appears here after" in index) == bool(options)
        assert "Imaginary" not in index
    listed = record(site, "--table").stdout
    assert re.search(r"basics/plot_alpha +outdated from cell 1", listed)


def test_edited_last_cell_leaves_what_came_before(site):
    edit(site / "tutorials/basics/plot_alpha.py", "x is {x}", "x was {x}")
    build_well(site, "-Dplot_gallery=0")
    assert len(alpha(site).select(".sphx-glr-script-out")) == 2
    assert "from cell 3 of 3 on" in page(site, "alpha")
    gallery = site / "_build/html/auto_tutorials/index.html"
    assert re.search(
        r'<img alt="" [^>]* src="../_images/[0-9a-f]{16}\.svg"', gallery.read_text()
    )


@pytest.mark.parametrize("way", ["same hardware", "other host, same GPU"])
def test_one_machine_has_one_tab(site, way):
    if way == "same hardware":
        imagine(site, "basics/plot_alpha", runner.this_machine(), "here", "long ago\n")
        build_well(site)
        shown = labels(site)
        assert "long ago" not in page(site, "alpha")
        assert len(set(shown)) == 2, "the GPU and this build"
        build_well(site, "-Dplot_gallery=0")
        assert "long ago" in page(site, "alpha"), "a build that runs nothing needs it"
    else:
        host = MACHINE | {"cpu": "Another CPU", "cores": 64}
        assert runner.hardware(host) == runner.hardware(MACHINE)
        assert runner.folder_name(host) == runner.folder_name(MACHINE)
        assert runner.hardware(MACHINE | {"count": 2}) != runner.hardware(MACHINE)
        assert runner.folder_name(MACHINE | {"count": 2}) == "2-x-imaginary-gpu"


# --- what is refused --------------------------------------------------------------

BAD = {
    "cut off": (lambda text: text[:300], "damaged"),
    "no notebook": (lambda text: text.replace('"cells"', '"cell"'), "damaged"),
    "no machine": (lambda text: text.replace('"machine"', '"device"'), "damaged"),
    "script": (lambda text: text.replace("<defs/>", "<script/>"), "foreign element"),
    "event": (lambda text: text.replace("<defs/>", "<g onload='x'/>"), "event handler"),
    "link": (lambda text: text.replace("<defs/>", "<a/>"), "foreign element"),
    "other host": (
        lambda text: text.replace("<defs/>", "<image href='https://x.org/y.png'/>"),
        "another file",
    ),
    "style": (
        lambda text: text.replace("stroke: c", "stroke: url(//x) c"),
        "another file",
    ),
}


@pytest.mark.parametrize("how", BAD)
def test_damaged_or_unsafe_notebook_stops_the_build(how, tmp_path, monkeypatch):
    from sphinx.errors import ExtensionError

    from _ext import recordings

    for name in ["ROOT", "TUTORIALS", "RECORDINGS"]:
        below = {"ROOT": ""}.get(name, name.lower())
        monkeypatch.setattr(runner, name, tmp_path / below)
    script = tmp_path / "tutorials/basics/plot_alpha.py"
    script.parent.mkdir(parents=True)
    script.write_text(ALPHA)
    path = imagine(tmp_path, "basics/plot_alpha")
    recordings.read(path)
    change, words = BAD[how]
    sound = path.read_text()
    path.write_text(change(sound))
    assert path.read_text() != sound
    with pytest.raises(ExtensionError, match=words) as raised:
        recordings.read(path)
    for part in ["gpu/basics/plot_alpha.ipynb", "git", "python runner.py plot_alpha"]:
        assert part in str(raised.value)


def test_recording_of_a_tutorial_that_is_gone_is_reported(site):
    (site / "tutorials/basics/plot_alpha.py").rename(
        site / "tutorials/basics/plot_new.py"
    )
    listed = record(site, "--table").stdout
    assert re.search(r"basics/plot_alpha +page is gone", listed)
    assert re.search(r"basics/plot_new +missing", listed)
    done = build(site, "-Dplot_gallery=0")
    assert done.returncode != 0
    assert "plot_alpha.ipynb is of a tutorial that is gone: git rm it" in done.output


# --- recording --------------------------------------------------------------------


def test_record_from_a_bare_copy_and_fail_alone(tmp_path):
    """No git, no Sphinx, no nox: a page that fails costs the others nothing."""
    site = make_small(tmp_path / "site")
    for name in ["_ext", "tests", "noxfile.py", "conf.py", "requirements.txt"]:
        (site / name).rename(tmp_path / name)
    (site / "tutorials/basics/plot_alpha.py").write_text(ALPHA)
    write_tutorial(site, "beta", code="import a_library_that_is_not_here")
    write_tutorial(site, "gamma", code="raise ValueError('gamma is broken')")
    former = imagine(site, "basics/plot_gamma", runner.this_machine(), "mine")
    before = former.read_bytes()
    block = (
        "import sys; sys.modules.update(dict.fromkeys(['sphinx', 'nox', 'nbformat']))"
    )
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sitecustomize.py").write_text(block)
    done = record(site, "--machine", "mine", PYTHONPATH=str(tmp_path / "block"))
    assert done.returncode == 1
    assert "skipped plot_beta: it needs a_library_that_is_not_here" in done.stdout
    assert "gamma is broken" in done.stderr
    assert "2 of 3 pages did not succeed: plot_beta, plot_gamma" in done.stdout
    assert former.read_bytes() == before, "the former recording is whole"
    recorded = list((site / "recordings").rglob("*"))
    assert not [path for path in recorded if path.suffix == ".new"]

    path = site / "recordings/mine/basics/plot_alpha.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.machine == runner.this_machine()
    assert "[links](https://pytorch.org) to $x^2$" in notebook.cells[0].source
    second = [cell for cell in notebook.cells if cell.cell_type == "code"][1]
    assert second.metadata.jupyter.source_hidden
    figure, text = second.outputs
    assert figure.data["text/plain"] == "A rising line."
    assert "<title>A rising line.</title>" in figure.data["image/svg+xml"]
    assert text.text.startswith("at ")


def test_name_of_another_machine_is_refused(site):
    done = record(site, "plot_alpha", "--machine", "gpu")
    assert done.returncode != 0
    assert "gpu is the name of another machine (Imaginary GPU" in done.stderr
    done = record(site, "plot_alpha", "--machine", "My GPU")
    assert "use small letters" in done.stderr


def test_damaged_recording_is_told_and_can_be_made_again(site):
    path = imagine(site, "basics/plot_beta", runner.this_machine(), "here")
    path.write_text(path.read_text()[:200])
    assert "damaged: record again" in record(site, "--table").stdout
    assert record(site, "plot_beta", "--machine", "here").returncode == 0
    assert re.search("plot_beta +missing +current", record(site, "--table").stdout)


def test_interrupted_recording_leaves_the_former_one(site, tmp_path):
    path = imagine(site, "basics/plot_beta", runner.this_machine(), "here")
    before = path.read_bytes()
    started = tmp_path / "started"
    wait = f"from pathlib import Path\nPath({str(started)!r}).touch()\ntime.sleep(60)"
    write_tutorial(site, "beta", code=wait)
    with subprocess.Popen(
        [sys.executable, "runner.py", "plot_beta", "--machine", "here"],
        cwd=site,
        env=environment(),
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as recording:
        until = time.monotonic() + 60
        while not started.exists() and time.monotonic() < until:
            time.sleep(0.05)
        recording.send_signal(signal.SIGINT)
    assert recording.returncode != 0
    assert path.read_bytes() == before


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


def test_the_recordings_of_this_repository_are_of_its_pages():
    listed = run(sys.executable, "runner.py", "--table", cwd=ROOT).stdout
    assert "gone" not in listed


def test_the_pictures_of_the_readme_are_recorded_ones():
    names = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (ROOT / "README.md").read_text())
    recorded = [
        output["data"]["image/svg+xml"]
        for path in (ROOT / "recordings").rglob("*.ipynb")
        for cell in json.loads(path.read_text())["cells"]
        for output in cell.get("outputs", [])
        if output["output_type"] == "display_data"
    ]
    assert len(names) == 2
    for name in names:
        picture = (ROOT / name).read_text().splitlines(keepends=True)
        assert picture in recorded, f"copy the newly recorded figure to {name}"
