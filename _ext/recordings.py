"""Outputs of several machines on one page: recorded in files, joined as tabs.

``make record`` writes what this machine's run produced, in files that a diff can show:

    recordings/<machine>/machine.json                       who the machine is
    recordings/<machine>/<section>/<plot_x>/recording.json  its code cells, in order
    recordings/<machine>/<section>/<plot_x>/07.txt          what cell 7 printed
    recordings/<machine>/<section>/<plot_x>/08-1.svg        the first figure of cell 8

``make html`` joins them with this build's outputs. A recorded output belongs to the
*code* of its cell: prose may change, an edited cell loses its recorded outputs. Where
all machines agree, one output stands; where they differ, each machine has a tab.

The first half of this file knows files and no Sphinx, the second half the reverse.
"""

import hashlib
import json
import re
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from docutils import nodes
from figures import FIGURE
from machine import HARDWARE, RAN_ON, describe, short_name, slug, this_machine
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx_design.shared import create_component

logger = logging.getLogger(__name__)

SCHEMA = 1
MACHINE_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
OUTPUT_NAME = re.compile(r"\d\d(\.txt|-\d\.svg)")
LARGEST_ARCHIVE = 15 * 2**20  # bytes

SVG = "{http://www.w3.org/2000/svg}"
ACTIVE_TAGS = {"script", "foreignobject", "iframe", "a", "set", "handler"}


# --- files ----------------------------------------------------------------------


class Damaged(ExtensionError):
    """A recording that cannot be trusted; the message names file and reason."""


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def code_hash(code):
    """Identity of a cell: its code without the blanks at the ends of lines."""
    lines = [line.rstrip() for line in code.strip().splitlines()]
    return sha256("\n".join(lines).encode())


def _digest(data):
    return sha256(json.dumps(data, sort_keys=True).encode())


def write_json(path, data):
    """Write data with its schema and a digest that tells later edits."""
    data = {"schema": SCHEMA, **data}
    data["digest"] = _digest(data)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_json(path):
    """Read what write_json wrote. Raises Damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path}: the file is missing") from None
    except ValueError as problem:
        raise Damaged(f"{path}: not readable as JSON ({problem})") from None
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise Damaged(f"{path}: its schema is not {SCHEMA}, the one this site reads")
    if data.pop("digest", None) != _digest({"schema": SCHEMA, **data}):
        raise Damaged(f"{path}: its digest does not fit: it was edited or cut off")
    if "<" in json.dumps(data):
        raise Damaged(f"{path}: contains markup")
    return data


def check_output(path):
    """Raise Damaged if a recorded text or figure holds anything active."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        if "<script" in text.lower():
            raise Damaged(f"{path}: contains script markup")
        return
    if "<!entity" in text.lower():
        raise Damaged(f"{path}: declares XML entities")
    if "@import" in text or re.search(r"url\((?!['\"]?#)", text):
        raise Damaged(f"{path}: refers to another file")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as problem:
        raise Damaged(f"{path}: not readable as SVG ({problem})") from None
    if root.tag != f"{SVG}svg" or not (root.findtext(f"{SVG}title") or "").strip():
        raise Damaged(f"{path}: not a figure with an alternative text (<title>)")
    for element in root.iter():
        tag = element.tag.rpartition("}")[2].lower()
        if tag in ACTIVE_TAGS or tag.startswith("animate"):
            raise Damaged(f"{path}: contains the active element <{tag}>")
        for key, value in element.attrib.items():
            name = key.rpartition("}")[2].lower()
            if name.startswith("on"):
                raise Damaged(f"{path}: contains the event handler {name}")
            if name == "href" and not value.startswith(("#", "data:image/png;base64,")):
                raise Damaged(f"{path}: refers to another file ({value[:60]})")


def load_tutorial(folder):
    """Read and check one tutorial's recording.

    Returns the data of recording.json; each of its cells has "code", a hash, and
    "outputs", a list of paths. Raises Damaged.
    """
    data = read_json(folder / "recording.json")
    try:
        for name, expected in data["files"].items():
            path = folder / name
            if not OUTPUT_NAME.fullmatch(name):
                raise Damaged(f"{path}: not a name of a recorded output")
            if not path.is_file():
                raise Damaged(f"{path}: the file is missing")
            if sha256(path.read_bytes()) != expected:
                raise Damaged(f"{path}: its content was changed after it was recorded")
            check_output(path)
        cells = [
            {
                "code": cell["code"],
                "outputs": [folder / name for name in cell["outputs"]],
            }
            for cell in data["cells"]
        ]
        listed = {path.name for cell in cells for path in cell["outputs"]}
        machine = {key: data["machine"][key] for key in this_machine_keys()}
    except (KeyError, TypeError, AttributeError) as problem:
        raise Damaged(f"{folder / 'recording.json'}: lacks {problem}") from None
    present = {path.name for path in folder.iterdir()} - {"recording.json"}
    if listed != set(data["files"]) or present != listed:
        extra = ", ".join(sorted(present ^ listed)) or "a name"
        raise Damaged(f"{folder}: recording.json and the files differ: {extra}")
    return {"machine": machine, "seconds": data["seconds"], "cells": cells}


def this_machine_keys():
    return (*HARDWARE, "driver", "cuda", "torch", "python", "date")


def load(root):
    """Read and check all recordings.

    Returns {machine name: {tutorial: recording}}, accelerators first. A tutorial is
    named like basics/plot_x. Raises Damaged.
    """
    machines = {}
    for folder in sorted(root.iterdir() if root.exists() else ()):
        if folder.is_dir() and not folder.name.startswith("."):
            if not MACHINE_NAME.fullmatch(folder.name):
                raise Damaged(f"{folder}: not a name of a machine")
            machines[folder.name] = load_machine(folder)
    return machines


def load_machine(folder):
    """Read and check the recordings of one machine. Raises Damaged."""
    machine = read_json(folder / "machine.json")
    tutorials = {}
    for section in sorted(path for path in folder.iterdir() if path.is_dir()):
        for tutorial in sorted(section.iterdir()):
            if not tutorial.name.startswith("."):
                recording = load_tutorial(tutorial)
                different = difference(machine, recording["machine"])
                if different:
                    raise Damaged(f"{tutorial}: not from this machine: {different}")
                tutorials[f"{section.name}/{tutorial.name}"] = recording
    return tutorials


def difference(machine, other):
    """What differs between the hardware of two machines, as text; empty if nothing."""
    return "; ".join(
        f"{key} {machine.get(key)} against {other.get(key)}"
        for key in HARDWARE
        if machine.get(key) != other.get(key)
    )


def save_tutorial(root, name, tutorial, machine, seconds, cells):
    """Write one tutorial's recording, whole or not at all.

    cells: list of (hash of the code, outputs), outputs a list of ("text", str) or
    ("figure", str).
    Raises ExtensionError if the machine's name is taken by other hardware.
    """
    folder = root / name
    refuse_other_hardware(root, name, machine)
    target = folder / tutorial
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(folder / "machine.json", machine)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        entries, files = [], {}
        for number, (code, outputs) in enumerate(cells, 1):
            names = []
            for kind, content in outputs:
                figures = sum(item.endswith(".svg") for item in names)
                ending = ".txt" if kind == "text" else f"-{figures + 1}.svg"
                names.append(f"{number:02}{ending}")
                (new / names[-1]).write_text(content, encoding="utf-8")
                files[names[-1]] = sha256(content.encode())
            entries.append({"code": code, "outputs": names})
        data = {
            "machine": machine,
            "seconds": seconds,
            "cells": entries,
            "files": files,
        }
        write_json(new / "recording.json", data)
        load_tutorial(new)
        if target.exists():
            target.rename(Path(scratch) / "old")
        new.rename(target)


def refuse_other_hardware(root, name, machine):
    """Raise ExtensionError if recordings/name belongs to other hardware."""
    known = root / name / "machine.json"
    if known.exists():
        different = difference(read_json(known), machine)
        if different:
            raise ExtensionError(
                f"the name {name} is taken by another machine: {different}. "
                "Give this one a name of its own: make record MACHINE=..."
            )


def pack(root, name, archive):
    """Put the recordings of one machine into one archive. Returns its size in bytes."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / name, arcname=name)
    size = archive.stat().st_size
    if size > LARGEST_ARCHIVE:
        raise ExtensionError(
            f"{archive} has {size / 2**20:.1f} MiB, more than "
            f"{LARGEST_ARCHIVE / 2**20:.0f}: draw figures with fewer points"
        )
    return size


def unpack(archive, root):
    """Check an archive from ``make record`` and put its recordings into root.

    Nothing is written unless all of it is sound. Tutorials that the archive does not
    hold keep their recordings. Returns the machine's name. Raises ExtensionError.
    """
    root.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=root) as scratch:
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    if not (member.isfile() or member.isdir()):
                        raise ExtensionError(f"{archive}: {member.name} is not a file")
                    tar.extract(member, scratch, filter="data")
        except (tarfile.TarError, OSError) as problem:
            raise ExtensionError(f"{archive}: {problem}") from None
        found = list(Path(scratch).iterdir())
        if len(found) != 1 or not MACHINE_NAME.fullmatch(found[0].name):
            raise ExtensionError(f"{archive}: does not hold the folder of one machine")
        (machine,) = found
        tutorials = load_machine(machine)
        refuse_other_hardware(root, machine.name, read_json(machine / "machine.json"))
        for number, tutorial in enumerate(tutorials):
            target = root / machine.name / tutorial
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(Path(scratch) / f"old-{number}")
            (machine / tutorial).rename(target)
        shutil.copy(machine / "machine.json", root / machine.name)
        return machine.name


# --- pages ----------------------------------------------------------------------


def root_of(app):
    return Path(app.srcdir, "recordings")


def tutorial_of(docname):
    """basics/plot_x of auto_tutorials/basics/plot_x, else None."""
    found = re.fullmatch(r"auto_tutorials/([^/]+/plot_[^/]+)", docname)
    return found and found[1]


def code_cells(doctree):
    """Code cells of a generated page: (literal block, the output nodes after it)."""
    cells = []
    for block in doctree.findall(nodes.literal_block):
        siblings = block.parent.children
        at = siblings.index(block)
        before = siblings[at - 1] if at else None
        if (
            not isinstance(before, nodes.comment)
            or "GENERATED FROM" not in before.astext()
        ):
            continue
        outputs = []
        for node in siblings[at + 1 :]:
            is_output = "sphx-glr-script-out" in node["classes"]
            if not is_output and "tutorial-figure" not in node["classes"]:
                break
            outputs.append(node)
        cells.append((block, outputs))
    return cells


def own_content(app, outputs):
    """This build's outputs of a cell as save_tutorial takes them."""
    return [
        (
            "figure",
            Path(app.srcdir, node["uri"].lstrip("/")).read_text(encoding="utf-8"),
        )
        if isinstance(node, nodes.image)
        else ("text", node.astext() + "\n")
        for node in outputs
    ]


def recorded_content(paths):
    return [
        (
            "text" if path.suffix == ".txt" else "figure",
            path.read_text(encoding="utf-8"),
        )
        for path in paths
    ]


def recorded_nodes(app, paths):
    """The nodes that show recorded outputs."""
    shown = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            text = text.removesuffix("\n")
            block = nodes.literal_block(text, text, language="none")
            block["classes"].append("sphx-glr-script-out")
            shown.append(block)
        else:
            uri = "/" + path.relative_to(app.srcdir).as_posix()
            alt = ElementTree.fromstring(text).findtext(f"{SVG}title")
            shown.append(nodes.image(uri=uri, alt=alt, classes=FIGURE.split()))
    return shown


def tab_set(entries):
    """Synchronized tabs, from a list of (label, id, nodes)."""
    items = []
    for label, sync_id, content in entries:
        tab_label = nodes.rubric(label, label, classes=["sd-tab-label"])
        tab_label["sync_group"], tab_label["sync_id"] = "machine", sync_id
        content = content or [nodes.paragraph("", "This machine printed nothing here.")]
        panel = create_component(
            "tab-content", classes=["sd-tab-content"], children=content
        )
        items.append(
            create_component(
                "tab-item", classes=["sd-tab-item"], children=[tab_label, panel]
            )
        )
    return create_component(
        "tab-set", classes=["sd-tab-set", "machines"], children=items
    )


def current_outputs(recording, hashes):
    """Recorded outputs, by position in the page, of the cells whose code is the same.

    Cells with equal code are told apart by their order, if there are as many now as
    there were then.
    """
    then = Counter(cell["code"] for cell in recording["cells"])
    now = Counter(hashes)
    recorded = {}
    for cell in recording["cells"]:
        recorded.setdefault(cell["code"], []).append(cell["outputs"])
    return {
        position: recorded[code].pop(0)
        for position, code in enumerate(hashes)
        if then[code] == now[code]
    }


def read_all(app):
    """Load and check the recordings, once a build."""
    app.recordings = load(root_of(app))
    app.recordings_table = {}


def outdated(app, env, added, changed, removed):
    """Pages to read again because a recording came, went or changed."""
    state = {}
    for name, tutorials in app.recordings.items():
        for tutorial in tutorials:
            path = root_of(app) / name / tutorial / "recording.json"
            state.setdefault(tutorial, []).append((name, sha256(path.read_bytes())))
    before = getattr(env, "recordings_state", {})
    env.recordings_state = state
    if state == before:
        return []
    names = {name for name in {*state, *before} if state.get(name) != before.get(name)}
    return [
        doc
        for doc in env.found_docs
        if tutorial_of(doc) is None or tutorial_of(doc) in names
    ]


def in_order(machine, own):
    """Sort key of tabs: accelerators first, then this build, then by name."""
    return machine["accelerator"] is None, not own, short_name(machine)


def join(app, doctree):
    """Put the outputs of all machines under each code cell of a tutorial's page."""
    tutorial = tutorial_of(app.env.docname)
    if not tutorial:
        return
    cells = code_cells(doctree)
    hashes = [code_hash(block.astext()) for block, _ in cells]
    sources = []  # (machine, label, id, {position: content}, {position: nodes})
    ran_on = Path(app.srcdir, f"{app.env.docname}{RAN_ON}")
    ran = any("sphx-glr-timing" in e["classes"] for e in doctree.findall(nodes.Element))
    if ran:
        content = {
            at: own_content(app, outputs) for at, (_, outputs) in enumerate(cells)
        }
        own_nodes = {at: outputs for at, (_, outputs) in enumerate(cells)}
        machine = json.loads(ran_on.read_text(encoding="utf-8"))
        sources.append((machine, "This build", "this-build", content, own_nodes))
    doctree["machines"] = []
    for name, tutorials in app.recordings.items():
        if tutorial not in tutorials:
            continue
        recording = tutorials[tutorial]
        machine = recording["machine"]
        current = current_outputs(recording, hashes)
        changed = len(cells) - len(current)
        app.recordings_table[tutorial, name] = changed
        about = describe(machine), recording["seconds"], changed, len(cells)
        doctree["machines"].append(about)
        content = {at: recorded_content(paths) for at, paths in current.items()}
        shown = {at: recorded_nodes(app, paths) for at, paths in current.items()}
        sources.append((machine, short_name(machine), name, content, shown))
    sources.sort(key=lambda source: in_order(source[0], source[2] == "this-build"))

    for position, (block, outputs) in enumerate(cells):
        having = [source for source in sources if position in source[3]]
        if not having:
            continue
        contents = [content[position] for _, _, _, content, _ in having]
        if all(content == contents[0] for content in contents):
            result = outputs if ran else having[0][4][position]
        else:
            result = [tab_set([(s[1], s[2], s[4][position]) for s in having])]
        for node in outputs:
            block.parent.remove(node)
        at = block.parent.index(block) + 1
        block.parent[at:at] = result


def record(app, doctree):
    """Write what this build's run of a tutorial produced, if ``make record`` asked."""
    tutorial = tutorial_of(app.env.docname)
    if not tutorial or not app.config.record_as:
        return
    elements = list(doctree.findall(nodes.Element))
    timing = next((e for e in elements if "sphx-glr-timing" in e["classes"]), None)
    failed = any(e.get("language") == "pytb" for e in elements)
    if timing is None or failed:
        return  # not run, or a failure that Sphinx-Gallery reports itself
    minutes, seconds = re.findall(r"[\d.]+", timing.astext())[:2]
    ran_on = Path(app.srcdir, f"{app.env.docname}{RAN_ON}")
    save_tutorial(
        root_of(app),
        record_name(app),
        tutorial,
        json.loads(ran_on.read_text(encoding="utf-8")),
        60 * int(minutes) + float(seconds),
        [
            (code_hash(block.astext()), own_content(app, outputs))
            for block, outputs in code_cells(doctree)
        ],
    )
    logger.info("recorded %s as %s", tutorial, record_name(app))


def record_name(app):
    name = app.config.record_as
    return slug(this_machine()) if name == "auto" else name


def before_recording(app):
    """Refuse a bad name before anything runs."""
    if app.config.record_as:
        name = record_name(app)
        if not MACHINE_NAME.fullmatch(name):
            raise ExtensionError(
                f"MACHINE={name}: use small letters, digits and hyphens"
            )
        refuse_other_hardware(root_of(app), name, this_machine())


def after_build(app, exception):
    """Pack the recording, or print the table, if asked."""
    if app.config.record_as and (root_of(app) / record_name(app)).exists():
        archive = Path(app.outdir).parent / f"{record_name(app)}.tar.gz"
        size = pack(root_of(app), record_name(app), archive)
        logger.info("to carry back: %s (%.0f KiB)", archive, size / 1024)
    if app.config.recordings_table and not exception:
        print_table(app)


def print_table(app):
    """Tutorial by machine: current, cells outdated, missing."""
    tutorials = sorted(filter(None, map(tutorial_of, app.env.found_docs)))
    names = list(app.recordings)
    rows = [["tutorial", *names]]
    for tutorial in tutorials:
        states = [app.recordings_table.get((tutorial, name)) for name in names]
        words = {None: "missing", 0: "current", 1: "1 cell outdated"}
        rows.append([tutorial, *(words.get(n, f"{n} cells outdated") for n in states)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(
                cell.ljust(w) for cell, w in zip(row, widths, strict=True)
            ).rstrip()
        )
    if not names:
        print("There are no recordings yet. 'make record' makes those of this machine.")


def recorded_thumbnails(app, doctree):
    """In gallery indexes, a recorded figure stands in for a page that did not run."""
    for image in doctree.findall(nodes.image):
        found = re.search(
            r"auto_tutorials/(\w+)/images/thumb/sphx_glr_(\w+)_thumb\.png", image["uri"]
        )
        for tutorials in app.recordings.values() if found else ():
            recording = tutorials.get(f"{found[1]}/{found[2]}")
            paths = (
                [path for cell in recording["cells"] for path in cell["outputs"]]
                if recording
                else []
            )
            figures = [path for path in paths if path.suffix == ".svg"]
            if figures:
                image["uri"] = "/" + figures[0].relative_to(app.srcdir).as_posix()
                break


class TutorialFigure(SphinxDirective):
    """``.. tutorial-figure:: basics/plot_x 1``: a tutorial's figure, with a link to it.

    With a tab for each machine that has it. Where none has, a sentence says how to
    make it.
    """

    required_arguments = 2

    def run(self):
        app = self.env.app
        tutorial, number = self.arguments[0], int(self.arguments[1])
        section, stem = tutorial.split("/")
        page = f"/auto_tutorials/{tutorial}"
        sources = []
        own = Path(
            app.srcdir,
            f"auto_tutorials/{section}/images/sphx_glr_{stem}_{number:03}.svg",
        )
        self.env.note_dependency(own.relative_to(app.srcdir).as_posix())
        if own.exists():
            machine = json.loads(Path(app.srcdir, f"{page[1:]}{RAN_ON}").read_text())
            sources.append((machine, "This build", "this-build", own))
        for name, tutorials in app.recordings.items():
            recording = tutorials.get(tutorial, {"cells": []})
            figures = [
                path
                for cell in recording["cells"]
                for path in cell["outputs"]
                if path.suffix == ".svg"
            ]
            if len(figures) >= number:
                machine = recording["machine"]
                sources.append(
                    (machine, short_name(machine), name, figures[number - 1])
                )
        if not sources:
            text = f"The figure of :doc:`{page}` appears here after ``make html``."
            return self.parse_text_to_nodes(text)
        sources.sort(key=lambda source: in_order(source[0], source[2] == "this-build"))
        entries = []
        for machine, label, sync_id, path in sources:
            figure = nodes.figure("", *recorded_nodes(app, [path]))
            caption, _ = self.parse_inline(
                f"From :doc:`{page}`, on {describe(machine)}."
            )
            figure += nodes.caption("", "", *caption)
            entries.append((label, sync_id, [figure]))
        return entries[0][2] if len(entries) == 1 else [tab_set(entries)]


def setup(app):
    app.add_config_value("record_as", "", "")  # a machine's name, "auto", or "" for no
    app.add_config_value("recordings_table", False, "")
    app.add_directive("tutorial-figure", TutorialFigure)
    app.connect("builder-inited", before_recording, priority=100)  # before scripts run
    app.connect("builder-inited", read_all, priority=900)
    app.connect("env-get-outdated", outdated)
    # Before Sphinx collects images, and before page_head and tidy.
    app.connect("doctree-read", record, priority=300)
    app.connect("doctree-read", join, priority=301)
    app.connect("doctree-read", recorded_thumbnails, priority=302)
    app.connect("build-finished", after_build)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":  # python _ext/recordings.py ARCHIVE, called by make unpack
    try:
        print(
            "unpacked",
            unpack(Path(sys.argv[1]), Path(__file__).parent.parent / "recordings"),
        )
    except ExtensionError as problem:
        sys.exit(f"make unpack: {problem}")
