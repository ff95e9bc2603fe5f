"""Run tutorials cell by cell, with nothing but Python and what they import themselves.

    python runner.py [PAGE...]          run pages, all by default, and record them
    python runner.py --show PAGE...     run them and print their outputs; write nothing
    python runner.py --table            what is recorded where, and what is outdated

A recording is the executed notebook recordings/<machine>/<section>/plot_x.ipynb. It
needs no network and nothing of this site: a bare copy of this file and tutorials/ will
do. ``make html`` runs what changed (--build), into _build/runs.
"""

import argparse
import ast
import contextlib
import datetime
import functools
import importlib.metadata
import io
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import types
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
TUTORIALS, RECORDINGS = ROOT / "tutorials", ROOT / "recordings"
RUNS = ROOT / "_build" / "runs"  # recordings of the machine that builds the site
OLDEST_TORCH = (2, 11)


# --- a page as cells --------------------------------------------------------------


class Cell(NamedTuple):
    """What stands between two ``# %%``: prose, then code."""

    heading: str  # the last one above the code; the title before the first
    prose: str
    code: str
    line: int  # of the code's first line, from 1


def split(text):
    """Cells of a script. The docstring at its top is the prose of the first."""
    docstring = ast.parse(text).body[0]
    lines = text.splitlines()
    blocks = [[docstring.value.value.splitlines(), docstring.end_lineno]]
    for number, line in enumerate(lines[docstring.end_lineno :], docstring.end_lineno):
        if re.match(r"# ?%%", line):
            prose = itertools.takewhile(
                lambda x: x.startswith("#"), lines[number + 1 :]
            )
            prose = [row[1:].removeprefix(" ") for row in prose]
            blocks.append([prose, number + 1 + len(prose)])
    ends = [start - len(prose) - 1 for prose, start in blocks[1:]] + [len(lines)]
    cells, heading = [], ""
    for (prose, start), end in zip(blocks, ends, strict=True):
        for above, below in itertools.pairwise(prose):
            if above.strip() and re.fullmatch(r"([-=~^])\1{2,}", below.strip()):
                heading = above.strip()
        while start < end and not lines[start].strip():
            start += 1
        code = "\n".join(lines[start:end]).rstrip()
        cells.append(Cell(heading, "\n".join(prose).strip(), code, start + 1))
    return cells


def code_of(cells):
    """Code of the cells that have any, as lists of lines without blanks at the end."""
    return [
        [line.rstrip() for line in cell.code.splitlines()]
        for cell in cells
        if cell.code
    ]


def draws(code):
    """Whether a cell draws a figure: every figure says fig.set_label(...)."""
    return ".set_label(" in code


# --- figures ----------------------------------------------------------------------

INK_LIGHT, INK_DARK = "#1f2328", "#e6edf3"

# Dark enough for white, bright enough for black, apart for color-blind eyes.
COLORS = ["#1b7fc4", "#d55e00", "#009e73", "#b5589a", "#8c6d00", "#6e7781"]

STYLE = {
    "figure.figsize": (5.6, 3.8),
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "many models, one call",  # equal figures give equal files
} | dict.fromkeys(
    [
        *["text.color", "axes.labelcolor", "axes.edgecolor"],
        *["xtick.color", "ytick.color", "grid.color"],
    ],
    INK_LIGHT,
)

THEME = (
    f"<style>svg {{ color: {INK_LIGHT} }} "
    f"@media (prefers-color-scheme: dark) {{ svg {{ color: {INK_DARK} }} }}</style>"
)


def set_style():
    """Give all figures the look of the site; scripts style nothing."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(STYLE | {"axes.prop_cycle": mpl.cycler(color=COLORS)})


def take_figures(where):
    """Close all open figures; return each as (SVG, alternative text).

    Its text stays text, its ink is the color of the reader's text. Raises ValueError,
    with ``where`` in it, for a figure that its author did not describe.
    """
    import matplotlib.pyplot as plt

    figures = [plt.figure(number) for number in plt.get_fignums()]
    plt.close("all")
    taken = []
    for figure in figures:
        alt = " ".join(figure.get_label().split())
        if not alt:
            raise ValueError(
                f"{where}: this cell draws a figure without alternative text. "
                "Say what it shows: fig.set_label('...')"
            )
        buffer = io.StringIO()
        metadata = {"Title": alt, "Date": None, "Creator": None}
        figure.savefig(buffer, format="svg", metadata=metadata)
        svg = buffer.getvalue().replace(INK_LIGHT, "currentColor")
        taken.append((svg.replace("<defs>", THEME + "<defs>", 1), alt))
    return taken


# --- this machine -----------------------------------------------------------------


def first_line(*command):
    """First line that a command prints, or None where it is missing or fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().split("\n")[0] or None if not done.returncode else None


@functools.cache
def processor():
    """Name of the processor, as the system gives it; many ARM chips have numbers."""
    if platform.system() == "Darwin":
        return first_line("sysctl", "-n", "machdep.cpu.brand_string")
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    numbers = re.findall(r"^CPU (?:implementer|part)\s*:\s*(\S+)$", text, re.MULTILINE)
    known = " ".join([platform.machine(), *sorted(set(numbers))])
    return name[1] if name else known if numbers else platform.processor() or known


def this_machine():
    """Who this machine is: hardware, versions, date; None for what it has not."""
    import torch

    accelerator = memory = driver = None
    count = 0
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        accelerator, count = device.type, torch.accelerator.device_count()
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            accelerator = properties.name
            memory = round(properties.total_memory / 2**30)  # GiB
            query = ["--query-gpu=driver_version", "--format=csv,noheader"]
            driver = first_line("nvidia-smi", *query)
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "accelerator": accelerator,
        "count": count,
        "memory": memory,
        "cpu": processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "driver": driver,
        "cuda": torch.version.cuda if accelerator else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def who():
    """``this_machine``, asked elsewhere: what starts pages shall hold no GPU itself."""
    code = "import json, runner; print(json.dumps(runner.this_machine()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def hardware(machine):
    """What makes two machines the same: of a GPU the host does not count."""
    keys = (
        ("accelerator", "count", "memory")
        if machine["accelerator"]
        else ("cpu", "cores")
    )
    return {key: machine[key] for key in keys}


def short_name(machine):
    """What a tab says: NVIDIA H200, 2 x NVIDIA H200, AMD EPYC, 2 cores."""
    if not machine["accelerator"]:
        return f"{machine['cpu']}, {machine['cores']} cores"
    many = f"{machine['count']} x " if machine["count"] > 1 else ""
    return many + machine["accelerator"]


def folder_name(machine):
    """Folder of a machine's recordings: nvidia-h100-80gb-hbm3, intel-xeon-2-cores."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*ghz", " ", short_name(machine).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def describe(machine):
    """One line that says on what a page ran, and when."""
    where = f"{machine['cpu']}, {machine['cores']} cores"
    if machine["accelerator"]:
        memory = machine["memory"] and f"{machine['memory']} GiB"
        driver = machine["driver"] and f"driver {machine['driver']}"
        known = [detail for detail in [short_name(machine), memory, driver] if detail]
        where = f"{', '.join(known)} in {where}"
    versions = f"torch {machine['torch']}, Python {machine['python']}"
    return f"{where}; {versions}; {machine['date']}"


# --- running ----------------------------------------------------------------------


def run(page, cells, before=lambda number: None):
    """Run cells as ``__main__``; yield (number, printed text, figures) after each.

    ``before(number)`` is called in the same state as the cell that follows.
    """
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    for number, cell in enumerate(cells):
        if not cell.code:
            continue
        before(number)
        code = "\n" * (cell.line - 1) + cell.code
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, str(page), "exec", dont_inherit=True), vars(main))
        yield number, printed.getvalue(), take_figures(f"{page}:{cell.line}")


@contextlib.contextmanager
def empty_folder():
    """Work in an empty folder, with nothing compiled yet; yield what is left in it."""
    home, left = Path.cwd(), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(scratch, "compiled"))
        work = Path(scratch, "empty")
        work.mkdir()
        os.chdir(work)
        try:
            yield left
            left += sorted(path.name for path in work.iterdir())
        finally:
            os.chdir(home)


def show(page):
    """Print what each cell prints and draws."""
    cells = split(page.read_text(encoding="utf-8"))
    with empty_folder():
        for number, printed, figures in run(page, cells):
            print(f"--- line {cells[number].line}: {cells[number].heading}")
            print(
                printed, *(f"[figure: {alt}]\n" for _, alt in figures), sep="", end=""
            )


# --- recording --------------------------------------------------------------------


def markdown(prose):
    """Prose of a script, which is reStructuredText, as a notebook shows it."""
    prose = re.sub(r"`([^`<]+?)\s*<([^>]+)>`__?", r"[\1](\2)", prose)
    prose = re.sub(r":math:`([^`]+)`", r"$\1$", prose)
    prose = re.sub(r"^\.\. (note|warning)::", r"**\1:**", prose, flags=re.MULTILINE)
    block = r"^\.\. (?:math|code-block)::.*\n\n?((?:[ ]+.*\n?|\n)+)"

    def fenced(found):
        fence = ("$$", "$$") if found[0].startswith(".. math") else ("```", "```")
        lines = [
            line.strip() if fence[0] == "$$" else line for line in found[1].split("\n")
        ]
        return "\n".join([fence[0], *filter(str.strip, lines), fence[1], "", ""])

    return re.sub(block, fenced, prose + "\n", flags=re.MULTILINE).strip()


def notebook(cells, outputs, machine, seconds):
    """The executed notebook. outputs: {number of a cell: (text, figures)}."""
    content = []
    for number, cell in enumerate(cells):
        if cell.prose:
            source = markdown(cell.prose).splitlines(keepends=True)
            content.append({"cell_type": "markdown", "metadata": {}, "source": source})
        if not cell.code:
            continue
        printed, figures = outputs[number]
        shown = [
            {
                "output_type": "display_data",
                "data": {
                    "image/svg+xml": svg.splitlines(keepends=True),
                    "text/plain": [alt],
                },
                "metadata": {},
            }
            for svg, alt in figures
        ]
        if printed:
            text = printed.splitlines(keepends=True)
            shown.append({"output_type": "stream", "name": "stdout", "text": text})
        content.append(
            {
                "cell_type": "code",
                "execution_count": None,
                "metadata": {"jupyter": {"source_hidden": True}}
                if draws(cell.code)
                else {},
                "source": cell.code.splitlines(keepends=True),
                "outputs": shown,
            }
        )
    return {
        "nbformat": 4,
        "nbformat_minor": 4,
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3"},
            "language_info": {"name": "python"},
            "machine": machine,
            "seconds": round(seconds, 1),
        },
        "cells": content,
    }


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def recorded_code(notebook):
    """Code cells of a notebook, in the form of ``code_of``."""
    return [
        [line.rstrip() for line in "".join(cell["source"]).splitlines()]
        for cell in code_cells(notebook)
    ]


def recorded_output(cell):
    """What a recorded cell shows, in the form of ``run``: (text, figures)."""
    text, figures = "", []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            text += "".join(output["text"])
        else:
            svg, alt = (output["data"][x] for x in ("image/svg+xml", "text/plain"))
            figures.append(("".join(svg), "".join(alt)))
    return text, figures


class Recording(NamedTuple):
    """What an executed notebook says."""

    machine: dict
    seconds: float
    code: list  # in the form of code_of
    outputs: list  # of each code cell (text, [(SVG, alternative text)])


def read(path):
    """A recording. Raises ValueError, with what to do, where it is damaged."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        machine, seconds = (notebook["metadata"][x] for x in ("machine", "seconds"))
        describe(machine)
        outputs = [recorded_output(cell) for cell in code_cells(notebook)]
        return Recording(machine, float(seconds), recorded_code(notebook), outputs)
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(
            f"{path.relative_to(ROOT)} is damaged: {type(problem).__name__}: {problem}."
            f" Restore it from git, or record it again: python runner.py {path.stem}"
        ) from None


def current(recording, cells):
    """How many code cells of a page the recording still holds for.

    A cell's outputs belong to its code and to all code before it, so they are current
    up to the first cell that differs.
    """
    pairs = zip(recording.code, code_of(cells), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def state(page, path):
    """What a recording of a page is now: current, outdated, missing, damaged, gone."""
    if not path.exists():
        return "missing" if page.exists() else ""
    if not page.exists():
        return "page is gone: git rm it"
    try:
        recording = read(path)
    except ValueError:
        return "damaged: record again"
    cells = split(page.read_text(encoding="utf-8"))
    number = current(recording, cells)
    whole = number == len(code_of(cells))
    return "current" if whole else f"outdated from cell {number + 1}"


def place(folder, page):
    """Where the recording of a page stands in the folder of a machine."""
    return folder / page.relative_to(TUTORIALS).with_suffix(".ipynb")


def is_done(page, folder, machine):
    """Whether this machine, with this torch, has run the page as it is."""
    path = place(folder, page)
    if state(page, path) != "current":
        return False
    there = read(path).machine
    return hardware(there) == hardware(machine) and there["torch"] == machine["torch"]


def record(page, folder):
    """Run a page and write its recording, whole or not at all."""
    start = time.perf_counter()
    cells = split(page.read_text(encoding="utf-8"))
    with empty_folder():
        outputs = {number: output for number, *output in run(page, cells)}
    seconds = time.perf_counter() - start
    target = place(folder, page)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(".new")
    content = notebook(cells, outputs, this_machine(), seconds)
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, target)


def table():
    """Print the state of every recording: a line for each page, a column a machine."""
    machines = sorted(path for path in RECORDINGS.glob("*") if path.is_dir())
    pages = {path.relative_to(TUTORIALS).with_suffix("") for path in all_pages()}
    for machine in machines:
        found = machine.glob("*/*.ipynb")
        pages |= {path.relative_to(machine).with_suffix("") for path in found}
    rows = [["page", *(machine.name for machine in machines)]]
    for page in sorted(pages):
        script = (TUTORIALS / page).with_suffix(".py")
        paths = [(machine / page).with_suffix(".ipynb") for machine in machines]
        rows.append([page.as_posix(), *(state(script, path) for path in paths)])
    print_columns(rows)


def print_columns(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(padded).rstrip())


# --- many pages, each in a process of its own -------------------------------------


def listed():
    """Pages in reading order: section/plot_x -> words by which search finds it."""
    file = TUTORIALS / "pages.toml"
    sections = tomllib.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {
        f"{section}/{page}": words
        for section, pages in sections.items()
        for page, words in pages.items()
    }


def name_of(page):
    """basics/plot_ensembling, of a path."""
    return page.relative_to(TUTORIALS).with_suffix("").as_posix()


def all_pages():
    """Every page, in reading order; those that are not listed come last."""
    order = list(listed())
    pages = sorted(TUTORIALS.rglob("plot_*.py"))
    return sorted(
        pages, key=lambda x: order.index(name_of(x)) if name_of(x) in order else 1e9
    )


def worth(page):
    """Sort key for a machine that one has for minutes: the first page, then speed."""
    return page != all_pages()[0], page.parent.name != "speed"


def seconds_of(page, folder):
    """How long a page took last time, here or else where it was recorded; or None."""
    for path in [place(folder, page), *RECORDINGS.glob(f"*/{name_of(page)}.ipynb")]:
        with contextlib.suppress(ValueError, FileNotFoundError):
            return read(path).seconds
    return None


def in_a_process(command, limit):
    """Run a command, and end with it all that it started; its status and stderr."""
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, told = process.communicate(timeout=limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, told


def run_page(page, command, limit):
    """Run the process of a page. Returns what came of it, and in which words."""
    start = time.perf_counter()
    try:
        status, told = in_a_process([*command, str(page)], limit)
    except subprocess.TimeoutExpired:
        return "failed", f"it took more than {limit:g} s"
    sys.stderr.write(told)
    if status == 0:
        return "done", f"{time.perf_counter() - start:.1f} s"
    lines = re.findall(rf'{page.name}", line (\d+)', told)
    where = f"line {lines[-1]}: " if lines else ""
    reason = told.strip().splitlines()[-1] if told.strip() else f"status {status}"
    return "failed", where + reason


def pack(folder, archive):
    """One file with all recordings of a machine."""
    scratch = archive.with_suffix(".new")
    with tarfile.open(scratch, "w:gz") as tar:
        tar.add(folder, f"recordings/{folder.name}")
    os.replace(scratch, archive)


def run_all(pages, folder, command, options):
    """Run each page in a process of its own; return whether one did not succeed.

    What fails or is interrupted costs the others nothing: a table says what came of
    each, and the archive holds what is there.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    if pages and os.getloadavg()[0] > os.cpu_count() / 2:
        print("this machine is busy with other work: times will be noisy")
    came = {page: ("left", "") for page in pages}
    last = {page: seconds_of(page, folder) for page in pages}
    try:
        for number, page in enumerate(pages):
            rest = [last[page] or 0 for page in pages[number:]]
            took = f": last time {last[page]:.0f} s" if last[page] else ""
            left = f" of {sum(rest):.0f} s for all that is left" if took else ""
            print(
                f"[{number + 1}/{len(pages)}] {name_of(page)}{took}{left}", flush=True
            )
            came[page] = run_page(page, command, options.limit)
            if options.pack and folder.exists():
                pack(folder, options.pack)
    except KeyboardInterrupt:
        print("interrupted")
    if pages:
        print_columns(
            [[word, name_of(page), why] for page, (word, why) in came.items()]
        )
    words = [word for word, _ in came.values()]
    if wrong := len(words) - words.count("done"):
        print(f"{wrong} of {len(pages)} pages did not succeed")
    if pages and not options.show:
        packed = f", packed in {options.pack}" if options.pack else ""
        print(f"what was done stands in {folder.relative_to(ROOT)}{packed}")
    return wrong > 0


# --- the command ------------------------------------------------------------------


def named(name):
    """The page of a path, or those whose section/plot_x.py a pattern fits."""
    pages = {f"{name_of(page)}.py": page for page in all_pages()}
    found = [page for page in pages.values() if page == Path(name).resolve()]
    try:
        found = found or [pages[known] for known in pages if re.search(name, known)]
    except re.error as problem:
        sys.exit(f"{name} is not a regular expression: {problem}")
    if not found:
        sys.exit(f"no tutorial is named {name}. There are:\n  " + "\n  ".join(pages))
    return found


def torch_trouble():
    """What is wrong with the installed torch, in one line; None if nothing is."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return (
            f"{sys.executable} has no torch, which every page needs. In the repository "
            "make .venv/ready installs all that pages need: use .venv/bin/python"
        )
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"torch {version} is too old: pages need {oldest} or newer"
    return None


def in_this_process(page, folder):
    """Record a page below folder, or print its outputs where there is none."""
    set_style()
    record(page, folder) if folder else show(page)


def folder_of(machine, options):
    """Folder for the recordings of this machine; stops where it is another's."""
    if options.build:
        return RUNS / folder_name(machine)
    folder = RECORDINGS / (options.machine or folder_name(machine))
    for path in folder.glob("*/*.ipynb"):
        with contextlib.suppress(ValueError):
            owner = read(path).machine
            if hardware(owner) != hardware(machine):
                sys.exit(
                    f"{folder.name} is the name of another machine ({describe(owner)})."
                    " Give this one a name of its own: --machine NAME"
                )
    return folder


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("pages", nargs="*", metavar="PAGE", help="path or part of a name")
    add("--show", action="store_true", help="print outputs, write nothing")
    add("--table", action="store_true", help="what is recorded where")
    add("--build", action="store_true", help="for make html: run what changed")
    add("--machine", help="name of the folder in recordings/")
    add("--limit", type=float, metavar="SECONDS", help="the most for each page")
    add("--pack", type=Path, metavar="FILE.tar.gz", help="pack this machine's folder")
    add("--into", type=Path, help="in this process, into this folder")
    options = parser.parse_args(arguments)
    if options.machine and not re.fullmatch(r"[a-z0-9][a-z0-9-]*", options.machine):
        parser.error(
            f"--machine {options.machine}: use small letters, digits and hyphens"
        )
    return options


def main(arguments=None):
    options = parse(arguments)
    if options.table:
        return table()
    if trouble := torch_trouble():
        sys.exit(trouble)
    pages = [page for name in options.pages for page in named(name)]
    if options.into or (options.show and len(pages) == 1):
        return in_this_process(pages[0], options.into)
    command = [sys.executable, __file__]
    if options.show:
        return run_all(pages or all_pages(), RUNS, [*command, "--show"], options)
    machine = who()
    folder = folder_of(machine, options)
    if not pages:  # what is not done comes first
        done = {page: is_done(page, folder, machine) for page in all_pages()}
        pages = sorted(done, key=lambda page: (done[page], *worth(page)))
        pages = [page for page in pages if not (options.build and done[page])]
    return run_all(pages, folder, [*command, "--into", str(folder)], options)


if __name__ == "__main__":
    sys.exit(main())
