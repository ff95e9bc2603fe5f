"""Recordings of several machines: written whole, checked, and joined on the page."""

import io
import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from conftest import (
    MACHINE,
    ROOT,
    imagine_machine,
    make_small,
    page,
    run,
    small_nox,
    write_tutorial,
)

sys.path.insert(0, str(ROOT / "_ext"))
import machine
import recording_files
from recording_files import RecordingError

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg"><title>A line, {}</title>'
    '<path d="M0 0" style="stroke: currentColor"/></svg>'
)
FIRST = 'x = 1\nprint("the same on every machine")'
SECOND = 'print("different")'


def save(
    root, name="gpu", tutorial="basics/plot_alpha", machine=MACHINE, text="fast\n"
):
    """Write a small recording of two cells."""
    cells = [
        (recording_files.code_hash(FIRST), [("text", "the same on every machine\n")]),
        (
            recording_files.code_hash(SECOND),
            [("figure", SVG.format(text.strip())), ("text", text)],
        ),
    ]
    recording_files.save_tutorial(root, name, tutorial, machine, 1.5, cells)
    return root / name / tutorial


# --- files ------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path)
    loaded = recording_files.load(tmp_path)
    cells = loaded["gpu"]["basics/plot_alpha"]["cells"]
    assert [cell["code"] for cell in cells] == [
        recording_files.code_hash(FIRST),
        recording_files.code_hash(SECOND + "  \n"),
    ]
    assert [path.name for _, _, path in cells[1]["outputs"]] == ["02-1.svg", "02-2.txt"]
    assert cells[1]["outputs"][1][1] == "fast\n"


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def redo(folder, name, content):
    """Change an output as somebody would who also knows how to renew the hashes."""
    (folder / name).write_text(content)
    data = recording_files.read_json(folder / "recording.json")
    data["files"][name] = recording_files.sha256(content.encode())
    recording_files.write_json(folder / "recording.json", data)


def change(folder, how):
    """Change recording.json as one would who knows how to renew its digest."""
    data = recording_files.read_json(folder / "recording.json")
    how(data)
    recording_files.write_json(folder / "recording.json", data)


DAMAGES = {
    "text edited": (
        lambda f: edit(f / "02-2.txt", "fast", "faster"),
        "02-2.txt",
        "changed",
    ),
    "figure missing": (lambda f: (f / "02-1.svg").unlink(), "02-1.svg", "missing"),
    "json edited": (
        lambda f: edit(f / "recording.json", '"seconds": 1.5', '"seconds": 0.5'),
        "recording.json",
        "digest",
    ),
    "json cut off": (
        lambda f: (f / "recording.json").write_text('{"schema": 1, "cel'),
        "recording.json",
        "not readable as JSON",
    ),
    "other schema": (
        lambda f: edit(f / "recording.json", '"schema": 1', '"schema": 2'),
        "recording.json",
        "schema",
    ),
    "file too many": (
        lambda f: (f / "03-1.txt").write_text("x"),
        "03-1.txt",
        "missing or surplus",
    ),
    "machine.json missing": (
        lambda f: (f.parents[1] / "machine.json").unlink(),
        "machine.json",
        "missing",
    ),
    "script in text": (
        lambda f: redo(f, "02-2.txt", "<script>alert(1)</script>"),
        "02-2.txt",
        "script markup",
    ),
    "script in figure": (
        lambda f: redo(f, "02-1.svg", SVG.format("</title><script>x</script><title>")),
        "02-1.svg",
        "foreign element <script>",
    ),
    "event in figure": (
        lambda f: redo(
            f, "02-1.svg", SVG.format("x").replace("<path", '<path onload="x"')
        ),
        "02-1.svg",
        "event handler onload",
    ),
    "link in figure": (
        lambda f: redo(
            f, "02-1.svg", SVG.format("x").replace("<path", '<path href="http://a.b/"')
        ),
        "02-1.svg",
        "refers to another file",
    ),
    "style from elsewhere": (
        lambda f: redo(
            f, "02-1.svg", SVG.format("x").replace("currentColor", "url(http://a.b/)")
        ),
        "02-1.svg",
        "style refers to another file",
    ),
    "entities in figure": (
        lambda f: redo(
            f, "02-1.svg", '<!DOCTYPE svg [<!ENTITY a "b">]>' + SVG.format("x")
        ),
        "02-1.svg",
        "XML entities",
    ),
    "figure without description": (
        lambda f: redo(f, "02-1.svg", '<svg xmlns="http://www.w3.org/2000/svg"/>'),
        "02-1.svg",
        "alternative text",
    ),
    "not a figure": (lambda f: redo(f, "02-1.svg", "<svg"), "02-1.svg", "not readable"),
    "foreign element": (
        lambda f: redo(
            f,
            "02-1.svg",
            SVG.format("x").replace(
                "<path", '<object xmlns="http://www.w3.org/1999/xhtml"'
            ),
        ),
        "02-1.svg",
        "foreign element",
    ),
    "style sheet": (
        lambda f: redo(
            f, "02-1.svg", '<?xml-stylesheet href="a.css"?>' + SVG.format("x")
        ),
        "02-1.svg",
        "instructions",
    ),
    "no text": (
        lambda f: (f / "02-2.txt").write_bytes(b"\xff"),
        "02-2.txt",
        "changed",
    ),
    "output elsewhere": (
        lambda f: change(f, lambda d: d["cells"][1].update(outputs=["../02-2.txt"])),
        "../02-2.txt",
        "missing or surplus",
    ),
    "no seconds": (
        lambda f: change(f, lambda d: d.pop("seconds")),
        "recording.json",
        "seconds",
    ),
    "odd machine": (
        lambda f: change(f, lambda d: d["machine"].update(driver=["x"])),
        "recording.json",
        "no good driver",
    ),
    "odd code": (
        lambda f: change(f, lambda d: d["cells"][0].update(code=["x"])),
        "recording.json",
        "code",
    ),
}


@pytest.mark.parametrize(("damage", "file", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_with_file_and_reason(tmp_path, damage, file, reason):
    damage(save(tmp_path))
    with pytest.raises(RecordingError) as caught:
        recording_files.load(tmp_path)
    assert file in str(caught.value)
    assert reason in str(caught.value)


def test_recording_from_another_machine_is_named(tmp_path):
    folder = save(tmp_path)
    data = recording_files.read_json(folder / "recording.json")
    data["machine"]["cores"] = 3
    recording_files.write_json(folder / "recording.json", data)
    with pytest.raises(RecordingError, match="cores 16 against 3"):
        recording_files.load(tmp_path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_failed_save_leaves_the_former_recording(tmp_path):
    before = contents(save(tmp_path))
    with pytest.raises(RecordingError):
        save(tmp_path, text="<script>")
    assert contents(tmp_path / "gpu/basics/plot_alpha") == before


@pytest.mark.parametrize("moment", range(4))
def test_interrupted_save_leaves_one_whole_recording(tmp_path, monkeypatch, moment):
    before = contents(save(tmp_path))
    rename, calls = Path.rename, []

    def interrupted(self, target):
        """Interrupt before or after the first or second of the two renames."""
        calls.append(target)
        if len(calls) == moment // 2 + 1 and moment % 2 == 0:
            raise KeyboardInterrupt
        done = rename(self, target)
        if len(calls) == moment // 2 + 1:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, text="new\n")
    monkeypatch.undo()
    assert list(recording_files.load(tmp_path)["gpu"]) == ["basics/plot_alpha"]
    after = contents(tmp_path / "gpu/basics/plot_alpha")
    assert after == before or after["02-2.txt"] == b"new\n"


def test_killed_between_the_renames_is_recovered(tmp_path):
    folder = save(tmp_path)
    before = contents(folder)
    folder.rename(folder.with_name(".former-plot_alpha"))
    (folder.parent / ".new-left-over").mkdir()
    assert list(recording_files.load(tmp_path)["gpu"]) == ["basics/plot_alpha"]
    assert contents(folder) == before


def test_name_taken_by_other_hardware_is_refused(tmp_path):
    save(tmp_path)
    with pytest.raises(RecordingError, match="memory 80 against 40"):
        save(tmp_path, machine=MACHINE | {"memory": 40})


def test_archive_goes_there_and_back(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    save(there, text="new\n")
    save(here, text="old\n")
    save(here, tutorial="basics/plot_beta")
    archive = tmp_path / "gpu.tar.gz"
    assert recording_files.pack(there, "gpu", archive) < recording_files.LARGEST_ARCHIVE
    (said,) = recording_files.unpack(archive, here)
    assert said == "gpu/basics/plot_alpha of 2026-01-02, replaces that of 2026-01-02"
    loaded = recording_files.load(here)["gpu"]
    assert set(loaded) == {"basics/plot_alpha", "basics/plot_beta"}
    assert (here / "gpu/basics/plot_alpha/02-2.txt").read_text() == "new\n"
    assert {path.name for path in here.iterdir()} == {"gpu"}, "nothing else is left"


def with_member(tmp_path, name, content="x", link=""):
    """A sound archive with one member more."""
    save(tmp_path / "there")
    archive = tmp_path / "gpu.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "there/gpu", arcname="gpu")
        info = tarfile.TarInfo(name)
        info.size = len(content)
        if link:
            info.type, info.linkname, info.size = tarfile.SYMTYPE, link, 0
        tar.addfile(info, io.BytesIO(content.encode()))
    return archive


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ({"name": "../outside.txt"}, "points outside"),
        ({"name": "/tmp/outside.txt"}, "points outside"),
        ({"name": "gpu/../../outside.txt"}, "points outside"),
        ({"name": "gpu/basics/plot_b", "link": "/tmp"}, "not a plain file"),
        ({"name": "other/machine.json"}, "the folder of one machine"),
        ({"name": "gpu/basics/plot_b"}, "does not belong here"),
        ({"name": "gpu/basics/plot_alpha/09-1.txt"}, "missing or surplus"),
    ],
    ids=str,
)
def test_bad_archive_is_refused_and_nothing_is_written(tmp_path, member, reason):
    here = tmp_path / "here"
    with pytest.raises(RecordingError, match=reason):
        recording_files.unpack(with_member(tmp_path, **member), here)
    assert list(here.iterdir()) == []
    assert not (tmp_path / "outside.txt").exists()
    assert not Path("/tmp/outside.txt").exists()


def test_archive_that_is_cut_off_or_too_large_is_refused(tmp_path, monkeypatch):
    archive, here = with_member(tmp_path, "gpu/basics/.hidden"), tmp_path / "here"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordingError, match="not a whole archive"):
        recording_files.unpack(archive, here)
    archive.write_bytes(whole)
    monkeypatch.setattr(recording_files, "LARGEST_CONTENT", 100)
    with pytest.raises(RecordingError, match="too large"):
        recording_files.unpack(archive, here)
    monkeypatch.setattr(recording_files, "LARGEST_ARCHIVE", 100)
    with pytest.raises(RecordingError, match="larger than a recording"):
        recording_files.unpack(archive, here)
    assert list(here.iterdir()) == []


def test_damaged_archive_is_refused(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    folder = save(there)
    edit(folder / "02-2.txt", "fast", "faster")
    recording_files.pack(there, "gpu", tmp_path / "gpu.tar.gz")
    with pytest.raises(RecordingError, match=r"02-2\.txt"):
        recording_files.unpack(tmp_path / "gpu.tar.gz", here)
    assert list(here.iterdir()) == []


# --- pages ------------------------------------------------------------------------

ALPHA = f'''"""
alpha
=====

The alpha of this small gallery has a cell that is the same everywhere.
"""

# %%
# Prose before the first cell.

{FIRST}

# %%
# Prose before the second cell.

import time
{SECOND}
print(time.time_ns())
'''


def nox(*arguments, cwd, good=True):
    done = small_nox(*arguments, cwd=cwd)
    assert (done.returncode == 0) == good, done.stdout + done.stderr
    return done.stdout + done.stderr


def alpha(small):
    return BeautifulSoup(page(small, "alpha"), "html.parser")


def labels(small):
    return [label.text.strip() for label in alpha(small).select(".sd-tab-set > label")]


@pytest.fixture(scope="session")
def recorded_once(tmp_path_factory):
    """A small site, recorded here and on an imaginary GPU, and built."""
    small = make_small(tmp_path_factory.mktemp("recorded") / "site")
    (small / "tutorials/basics/plot_alpha.py").write_text(ALPHA)
    edit(small / "index.rst", "basics/plot_alpha", "basics/plot_beta")
    nox("html", cwd=small)
    small.joinpath("before.html").write_text(page(small, "alpha"))
    nox("record", cwd=small)
    imagine_machine(small, "basics/plot_alpha", {2: "from the GPU\n"})
    nox("html", cwd=small)
    return small


@pytest.fixture
def recorded(recorded_once, tmp_path):
    """A copy of that site for a test to change."""
    return shutil.copytree(recorded_once, tmp_path / "site")


def test_tabs_stand_where_machines_differ_and_only_there(recorded):
    tabs = alpha(recorded).select(".sd-tab-set")
    assert len(tabs) == 1
    own = machine.this_machine()
    order = ["Imaginary GPU", "This build"]
    if own["accelerator"]:
        order.reverse()
    assert labels(recorded)[:2] == order, "accelerators, then this build"
    assert labels(recorded)[2] == machine.short_name(own)
    assert "from the GPU" in tabs[0].text
    assert page(recorded, "alpha").count("the same on every machine</") == 1
    head = alpha(recorded).select_one(".ran-on").text
    assert "Imaginary GPU, 80 GiB, driver 1.2.3 in Imaginary CPU, 16 cores" in head
    assert "Earlier code" not in head


def test_edits_lose_exactly_the_outputs_of_edited_code(recorded):
    table = nox("recordings", cwd=recorded)
    assert re.search(r"basics/plot_alpha +current +current", table)
    assert re.search(r"basics/plot_beta +(current +missing|missing +current)", table)

    path = recorded / "tutorials/basics/plot_alpha.py"
    edit(path, "Prose before the second cell.", "Other prose.\n#\n# More of it.")
    nox("html", cwd=recorded)
    assert len(labels(recorded)) == 3, "prose does not lose a recording"

    edit(path, SECOND, 'print("edited")')
    nox("html", cwd=recorded)
    assert labels(recorded) == []
    assert "from the GPU" not in page(recorded, "alpha")
    assert "1 code cell has changed" in alpha(recorded).select_one(".ran-on").text
    table = nox("recordings", cwd=recorded)
    assert re.search(r"basics/plot_alpha +1 cell outdated +1 cell outdated", table)


def test_cell_taken_away_is_told(recorded):
    path = recorded / "tutorials/basics/plot_alpha.py"
    edit(path, FIRST, "pass")
    text = path.read_text()
    path.write_text(
        text[: text.index("# Prose before the first")]
        + text[text.index("# Prose before the second") :]
    )
    nox("html", cwd=recorded)
    assert "Imaginary GPU" in labels(recorded)
    assert "1 code cell has changed since that recording" in page(recorded, "alpha")


def test_figure_of_edited_code_is_not_shown_elsewhere(recorded):
    write_tutorial(recorded, "beta", code="print('edited')")
    nox("html-noplot", cwd=recorded)
    index = (recorded / "_build/html/index.html").read_text()
    assert "made up for a test" not in index
    assert "appears here after" in index
    section = recorded / "_build/html/auto_tutorials/basics/index.html"
    assert "-1.svg" not in section.read_text(), "no recorded thumbnail"


def test_recordings_alone_make_the_pages(recorded):
    nox("clean", cwd=recorded)
    nox("html-noplot", cwd=recorded)
    assert "Imaginary GPU" in labels(recorded)
    assert "This build" not in labels(recorded)
    assert "the same on every machine" in alpha(recorded).text
    index = (recorded / "_build/html/index.html").read_text()
    assert "made up for a test" in index, "the recorded figure"
    section = (recorded / "_build/html/auto_tutorials/basics/index.html").read_text()
    assert section.count("-1.svg") == 1, "the recorded figure is the thumbnail"
    nox("html", cwd=recorded)
    assert "This build" in labels(recorded), "and comes back"


def test_page_follows_a_recording_without_executing(recorded):
    before = page(recorded, "alpha")
    newer = {2: "a newer <b>recording</b>\n"}
    imagine_machine(recorded, "basics/plot_alpha", newer)
    built = nox("html", cwd=recorded)
    assert "successfully executed 0 out of" in built
    assert "a newer &lt;b&gt;recording&lt;/b&gt;" in page(recorded, "alpha"), "escaped"
    assert page(recorded, "alpha") != before

    shutil.rmtree(recorded / "recordings")
    nox("html", cwd=recorded)
    assert page(recorded, "alpha") == (recorded / "before.html").read_text()


def test_build_names_a_damaged_recording(recorded):
    edit(recorded / "recordings/gpu/basics/plot_alpha/02-1.txt", "from", "From")
    said = nox("html", cwd=recorded, good=False)
    assert re.search(r"gpu/basics/plot_alpha/02-1\.txt: its content was changed", said)


def test_failed_tutorial_keeps_its_former_recording(recorded):
    (own,) = [p for p in (recorded / "recordings").iterdir() if p.name != "gpu"]
    before = (own / "basics/plot_alpha/recording.json").read_bytes()
    former_beta = (own / "basics/plot_beta/recording.json").read_bytes()
    edit(recorded / "tutorials/basics/plot_alpha.py", SECOND, "raise ValueError('no')")
    write_tutorial(recorded, "beta", code="print('new')")
    said = nox("record", cwd=recorded, good=False)
    assert "plot_alpha.py" in said
    assert "recorded basics/plot_beta" in said
    assert (own / "basics/plot_alpha/recording.json").read_bytes() == before
    assert (own / "basics/plot_beta/recording.json").read_bytes() != former_beta


def test_recording_under_the_name_of_another_machine_is_refused(recorded):
    edit(recorded / "tutorials/basics/plot_alpha.py", SECOND, "print('would run')")
    said = nox("record", "--", "gpu", cwd=recorded, good=False)
    assert "the name gpu is taken by another machine: accelerator Imaginary GPU" in said
    assert "generating gallery" not in said, "nothing ran"
    said = nox("record", "--", "No Good", cwd=recorded, good=False)
    assert "small letters, digits and hyphens" in said


# --- a machine without network ------------------------------------------------------


def test_recording_without_network(small, tmp_path):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    nox("wheels", "--", version, cwd=small)
    wheels = list((small / "wheels").iterdir())
    assert sum(path.stat().st_size for path in wheels) < 50 * 2**20
    assert not [
        path.name for path in wheels if path.name.startswith(("torch", "numpy"))
    ]

    # A Python with torch, numpy and matplotlib, and none of the site's packages.
    run(sys.executable, "-m", "venv", "node", cwd=tmp_path)
    python = tmp_path / "node/bin/python"
    theirs = tmp_path / f"node/lib/python{version}/site-packages"
    ours = ROOT / f".venv/lib/python{version}/site-packages"
    names = "torch torchgen functorch numpy matplotlib mpl_toolkits contourpy cycler"
    names += " dateutil fontTools kiwisolver packaging PIL pyparsing six sympy mpmath"
    names += " networkx fsspec filelock typing_extensions jinja2 markupsafe"
    for name in names.split():
        for pattern in [name, f"{name}.py", f"{name}.libs", f"{name}-*.dist-info"]:
            for path in ours.glob(pattern):
                (theirs / path.name).symlink_to(path)
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": "/dev/null"}
    assert run(python, "-c", "import sphinx", cwd=tmp_path).returncode != 0
    done = run(
        *["make", "record", "WHEELS=wheels", f"PYTHON={python}", "MACHINE=node"],
        cwd=small,
        PYTHONPATH="",
        **nowhere,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    archive = small / "_build" / "node.tar.gz"
    assert str(archive) in done.stdout
    assert 0 < archive.stat().st_size < recording_files.LARGEST_ARCHIVE

    home = tmp_path / "recordings"
    assert len(recording_files.unpack(archive, home)) == 2
    assert set(recording_files.load(home)["node"]) == {
        "basics/plot_alpha",
        "basics/plot_beta",
    }
