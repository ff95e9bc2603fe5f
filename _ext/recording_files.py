"""Recordings as files: what one machine's run of the tutorials produced.

A folder that can be read in a diff:

    recordings/<machine>/machine.json                       who the machine is
    recordings/<machine>/<section>/<plot_x>/recording.json  its code cells, in order
    recordings/<machine>/<section>/<plot_x>/07-1.txt        what cell 7 printed
    recordings/<machine>/<section>/<plot_x>/08-1.svg        the figure of cell 8

Everything read is checked: content against hashes, fields against types, figures
against a list of harmless elements. A tutorial's recording is replaced as a whole.
This file knows nothing of Sphinx; ``_ext/recordings.py`` puts recordings on pages.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

SCHEMA = 1
LARGEST_ARCHIVE = 15 * 2**20  # bytes
LARGEST_CONTENT = 150 * 2**20  # bytes, all files of an archive together
MACHINE_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
OUTPUT_NAME = re.compile(r"\d{2,3}-\d{1,2}\.(txt|svg)")
WAY_OUT = "Restore it from git, or delete its folder and record again."

# Fields of a machine and their types, and those that tell two machines apart.
MACHINE = {
    "accelerator": (str, type(None)),
    "memory": (int, type(None)),
    "cpu": str,
    "cores": int,
    "driver": (str, type(None)),
    "cuda": (str, type(None)),
    "torch": str,
    "python": str,
    "date": str,
}
HARDWARE = ("accelerator", "memory", "cpu", "cores")

# What matplotlib writes into an SVG.
SVG = "{http://www.w3.org/2000/svg}"
SVG_TAGS = set(
    [
        "svg",
        "title",
        "metadata",
        "defs",
        "style",
        "g",
        "path",
        "use",
        "clipPath",
        "rect",
        "text",
        "tspan",
        "image",
        "circle",
        "ellipse",
        "line",
        "polyline",
        "polygon",
        "pattern",
        "linearGradient",
        "radialGradient",
        "stop",
    ]
)
METADATA_NAMESPACES = (
    "{http://creativecommons.org/ns#}",
    "{http://purl.org/dc/elements/1.1/}",
    "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}",
)


class RecordingError(Exception):
    """A recording that cannot be trusted or written; says which file, and why."""


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def code_hash(code):
    """Identity of a cell: its code without the blanks at the ends of lines."""
    lines = [line.rstrip() for line in code.strip().splitlines()]
    return sha256("\n".join(lines).encode())


def write_text(path, text):
    """Write a file as a whole: an interruption leaves the former content."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def _digest(data):
    return sha256(json.dumps(data, sort_keys=True).encode())


def write_json(path, data):
    """Write data with its schema and a digest that tells later edits."""
    data = {"schema": SCHEMA, **data}
    write_text(path, json.dumps(data | {"digest": _digest(data)}, indent=1) + "\n")


def read_json(path):
    """Read what write_json wrote. Raises RecordingError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordingError(f"{path}: the file is missing. {WAY_OUT}") from None
    except ValueError as problem:
        reason = f"not readable as JSON ({problem})"
        raise RecordingError(f"{path}: {reason}. {WAY_OUT}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise RecordingError(
            f"{path}: its schema is not {SCHEMA}, which this site reads"
        )
    if data.pop("digest", None) != _digest(data):
        raise RecordingError(
            f"{path}: its digest does not fit: it was edited or cut off. {WAY_OUT}"
        )
    del data["schema"]
    return data


def check_machine(path, machine):
    """Raise RecordingError unless the fields of a machine are as MACHINE says."""
    if set(machine) != set(MACHINE):
        raise RecordingError(f"{path}: its machine has the fields {sorted(machine)}")
    for key, kind in MACHINE.items():
        if not isinstance(machine[key], kind) or "<" in str(machine[key]):
            raise RecordingError(f"{path}: {machine[key]!r} is no good {key}")


def check_text(path, text):
    if "<script" in text.lower():
        raise RecordingError(f"{path}: contains script markup")


def check_svg(path, text):
    """Raise RecordingError if a figure holds what matplotlib does not write."""
    if "<!entity" in text.lower() or "<?" in text.removeprefix("<?xml "):
        raise RecordingError(f"{path}: declares XML entities or instructions")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as problem:
        raise RecordingError(f"{path}: not readable as SVG ({problem})") from None
    if root.tag != f"{SVG}svg" or not (root.findtext(f"{SVG}title") or "").strip():
        raise RecordingError(f"{path}: not a figure with an alternative text (<title>)")
    for element in root.iter():
        tag = element.tag.removeprefix(SVG)
        if tag not in SVG_TAGS and not tag.startswith(METADATA_NAMESPACES):
            raise RecordingError(f"{path}: contains the foreign element <{tag}>")
        for key, value in element.attrib.items():
            name = key.rpartition("}")[2].lower()
            if name.startswith("on"):
                raise RecordingError(f"{path}: contains the event handler {name}")
            if name == "href" and not value.startswith(("#", "data:image/png;base64,")):
                raise RecordingError(f"{path}: refers to another file ({value[:60]})")
            check_css(path, value if name != "href" else "")
        if tag == "style":
            check_css(path, element.text or "")


def check_css(path, css):
    """Raise RecordingError if a style can load something."""
    css = css.lower()
    if re.search(r"url\((?!['\"]?#)|@import|image-set|expression\(|\\", css):
        raise RecordingError(f"{path}: its style refers to another file")


def load_tutorial(folder):
    """Read and check one tutorial's recording.

    Returns {"machine": dict, "seconds": float, "cells": list}; each cell has "code", a
    hash, and "outputs", a list of (kind, content, path), kind "text" or "figure".
    Raises RecordingError.
    """
    path = folder / "recording.json"
    data = read_json(path)
    try:
        machine, seconds, files = data["machine"], float(data["seconds"]), data["files"]
        check_machine(path, machine)
        names = [name for cell in data["cells"] for name in cell["outputs"]]
        present = {item.name for item in folder.iterdir() if item.name[0] != "."}
        if sorted(names) != sorted(files) or present != {*names, path.name}:
            extra = ", ".join(sorted(present ^ {*names, path.name})) or "a name"
            raise RecordingError(f"{folder}: missing or surplus files: {extra}")
        cells = []
        for cell in data["cells"]:
            outputs = [
                read_output(folder, name, files[name]) for name in cell["outputs"]
            ]
            if not isinstance(cell["code"], str):
                raise TypeError("code")
            cells.append({"code": cell["code"], "outputs": outputs})
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise RecordingError(f"{path}: lacks or misuses {problem}. {WAY_OUT}") from None
    return {"machine": machine, "seconds": seconds, "cells": cells}


def read_output(folder, name, expected):
    """Read and check one output: (kind, content, path)."""
    path = folder / name
    if not OUTPUT_NAME.fullmatch(name):
        raise RecordingError(f"{path}: not a name of a recorded output")
    content = path.read_bytes()
    if sha256(content) != expected:
        reason = "its content was changed after it was recorded"
        raise RecordingError(f"{path}: {reason}. {WAY_OUT}")
    text = content.decode("utf-8")
    kind = "text" if path.suffix == ".txt" else "figure"
    (check_text if kind == "text" else check_svg)(path, text)
    return kind, text, path


def load_machine(folder):
    """Read and check the recordings of one machine: {tutorial: recording}."""
    machine = read_json(folder / "machine.json")
    check_machine(folder / "machine.json", machine)
    tutorials = {}
    for section in sorted(path for path in folder.iterdir() if path.is_dir()):
        for tutorial in sorted(
            path for path in section.iterdir() if path.name[0] != "."
        ):
            if not tutorial.is_dir():
                raise RecordingError(f"{tutorial}: does not belong here")
            recording = load_tutorial(tutorial)
            different = difference(machine, recording["machine"])
            if different:
                raise RecordingError(f"{tutorial}: of another machine: {different}")
            tutorials[f"{section.name}/{tutorial.name}"] = recording
    return tutorials


def load(root, without=None):
    """Read and check all recordings but those of one machine.

    Returns {machine name: {tutorial: recording}}; a tutorial is named like
    basics/plot_x. Raises RecordingError.
    """
    recover(root)
    machines = {}
    for folder in sorted(root.iterdir() if root.exists() else ()):
        if folder.is_dir() and folder.name[0] != "." and folder.name != without:
            if not MACHINE_NAME.fullmatch(folder.name):
                raise RecordingError(f"{folder}: not a name of a machine")
            machines[folder.name] = load_machine(folder)
    return machines


def difference(machine, other):
    """What differs between the hardware of two machines, as text; empty if nothing."""
    return "; ".join(
        f"{key} {machine[key]} against {other[key]}"
        for key in HARDWARE
        if machine[key] != other[key]
    )


def refuse_other_hardware(root, name, machine):
    """Raise RecordingError if recordings/name belongs to other hardware."""
    known = root / name / "machine.json"
    if known.exists():
        owner = read_json(known)
        check_machine(known, owner)
        different = difference(owner, machine)
        if different:
            raise RecordingError(
                f"the name {name} is taken by another machine: {different}. "
                "Give this one a name of its own: make record MACHINE=..."
            )


def put_in_place(new, target):
    """Make the folder new the folder target; the former one is never lost.

    An interruption at any moment leaves one of the two, if need be under a name from
    which recover brings it back.
    """
    former = target.with_name(f".former-{target.name}")
    try:
        if target.exists():
            target.rename(former)
        new.rename(target)
    except BaseException:
        if former.exists() and not target.exists():
            former.rename(target)
        raise
    shutil.rmtree(former, ignore_errors=True)


def recover(root):
    """Finish what a killed put_in_place left."""
    for former in list(root.glob("*/*/.former-*")):
        target = former.with_name(former.name.removeprefix(".former-"))
        if target.exists():
            shutil.rmtree(former)
        else:
            former.rename(target)


@contextlib.contextmanager
def scratch_folder(parent):
    """A folder beside the recordings that is gone afterwards."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=parent) as folder:
        yield Path(folder)


def save_tutorial(root, name, tutorial, machine, seconds, cells):
    """Write one tutorial's recording, whole or not at all.

    cells: list of (hash of the code, outputs), outputs a list of ("text" or "figure",
    content). Raises RecordingError, also if the machine's name is taken.
    """
    refuse_other_hardware(root, name, machine)
    target = root / name / tutorial
    with scratch_folder(target.parent) as scratch:
        new = scratch / target.name
        new.mkdir()
        entries, files = [], {}
        for number, (code, outputs) in enumerate(cells, 1):
            names = []
            for index, (kind, content) in enumerate(outputs, 1):
                ending = "txt" if kind == "text" else "svg"
                names.append(f"{number:02}-{index}.{ending}")
                (new / names[-1]).write_bytes(content.encode())
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
        write_json(root / name / "machine.json", machine)
        put_in_place(new, target)


def pack(root, name, archive):
    """Put the recordings of one machine into one archive. Returns its size in bytes."""

    def visible(member):
        return None if Path(member.name).name[0] == "." else member

    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / name, arcname=name, filter=visible)
    size = archive.stat().st_size
    if size > LARGEST_ARCHIVE:
        raise RecordingError(
            f"{archive} has {size / 2**20:.1f} MiB, more than "
            f"{LARGEST_ARCHIVE / 2**20:.0f}: draw figures with fewer points"
        )
    return size


def extract(archive, folder):
    """Write the files of an archive below a folder. Raises RecordingError."""
    try:
        if archive.stat().st_size > LARGEST_ARCHIVE:
            raise RecordingError(f"{archive}: larger than a recording can be")
        with tarfile.open(archive) as tar:
            room = LARGEST_CONTENT
            for member in tar:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise RecordingError(f"{archive}: {name} points outside its folder")
                if member.isdir():
                    continue
                if not member.isfile():
                    raise RecordingError(f"{archive}: {name} is not a plain file")
                room -= member.size
                if room < 0:
                    raise RecordingError(f"{archive}: its files are too large")
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(tar.extractfile(member).read())
    except (tarfile.TarError, OSError, EOFError, zlib.error) as problem:
        raise RecordingError(f"{archive}: not a whole archive ({problem})") from None


def unpack(archive, root):
    """Check an archive from ``make record`` and put its recordings into root.

    Nothing is written unless all of it is sound. Tutorials that the archive does not
    hold keep their recordings. Returns lines that say what came. Raises RecordingError.
    """
    with scratch_folder(root) as scratch:
        extract(archive, scratch)
        found = list(scratch.iterdir())
        if len(found) != 1 or not MACHINE_NAME.fullmatch(found[0].name):
            raise RecordingError(f"{archive}: does not hold the folder of one machine")
        (folder,) = found
        tutorials = load_machine(folder)
        machine = read_json(folder / "machine.json")
        refuse_other_hardware(root, folder.name, machine)
        recover(root)
        lines = []
        for tutorial, recording in tutorials.items():
            target = root / folder.name / tutorial
            target.parent.mkdir(parents=True, exist_ok=True)
            line = f"{folder.name}/{tutorial} of {recording['machine']['date']}"
            with contextlib.suppress(RecordingError):  # a damaged one is replaced too
                line += f", replaces that of {load_tutorial(target)['machine']['date']}"
            write_json(root / folder.name / "machine.json", machine)
            put_in_place(folder / tutorial, target)
            lines.append(line)
        return lines


if __name__ == "__main__":  # python _ext/recording_files.py ARCHIVE: make unpack
    try:
        print(
            *unpack(Path(sys.argv[1]), Path(__file__).parent.parent / "recordings"),
            sep="\n",
        )
    except RecordingError as problem:
        sys.exit(f"make unpack: {problem}")
