"""Runs a page at its small sizes, and tries the mistakes of its readers from that run.

    python tests/faults/engine.py PAGE

What it needs to know of a page stands in tests/faults/<section>/plot_x.toml, as edits
of the page's text, each of a piece of code that is unique under a heading:

    small = [
        ["Train all models", "num_steps = 2000", "num_steps = 20"],
    ]

    [[fault]]
    mistake = "what a reader might do"
    under = "Train all models"
    old = "losses.sum()"
    new = "losses.mean()"
    says = "words of the assertion that notices it"

A fault starts in a child of the run, in the state before the cell that it edits. So do
the blocks of code that stand in a page's prose.
"""

import argparse
import ast
import io
import json
import os
import re
import select
import signal
import sys
import tempfile
import textwrap
import time
import tomllib
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import runner


def edits_of(page):
    """Small sizes and faults of a page."""
    file = runner.ROOT / "tests" / "faults" / page.relative_to(runner.TUTORIALS)
    file = file.with_suffix(".toml")
    edits = tomllib.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    small, faults = edits.get("small", []), edits.get("fault", [])
    for fault in faults:
        if missing := {"mistake", "under", "old", "new"} - fault.keys():
            raise ValueError(f"{file}: a fault says no {', '.join(sorted(missing))}")
    return small, faults


def assertions(cells):
    """Assertions of a page: {(cell, how many before it in the cell): (line, last)}."""
    found = {}
    for number, cell in enumerate(cells):
        lines = []
        for node in ast.walk(ast.parse("\n" * (cell.line - 1) + cell.code)):
            called = node.func if isinstance(node, ast.Call) else None
            raised = getattr(node, "exc", None) if isinstance(node, ast.Raise) else None
            name = getattr(called, "attr", getattr(called, "id", ""))
            error = getattr(getattr(raised, "func", raised), "id", "")
            own = isinstance(node, ast.Assert) or error == "AssertionError"
            if own or name == "assert_close":
                lines.append((node.lineno, node.end_lineno))
        found |= {(number, i): span for i, span in enumerate(sorted(lines))}
    return found


def apply(edit, text):
    """The text with an edit in it, and the number of the cell where it stands.

    Raises ValueError where the edit does not fit, SyntaxError where its result is no
    Python.
    """
    cells, under = runner.split(text), edit["under"]
    places = [
        (number, cell)
        for number, cell in enumerate(cells)
        if cell.code and under == cell.heading
    ]
    if not places:
        raise ValueError(f"there is no code under a heading {under!r}")
    count = sum(cell.code.count(edit["old"]) for _, cell in places)
    if count != 1:
        raise ValueError(f"{edit['old']!r} stands {count} times under {under!r}")
    ((number, cell),) = [place for place in places if edit["old"] in place[1].code]
    start = len("".join(text.splitlines(keepends=True)[: cell.line - 1]))
    end = start + len(cell.code)
    edited = cell.code.replace(edit["old"], edit["new"])
    edited = text[:start] + edited + text[end:]
    if assertions(runner.split(edited)).keys() != assertions(cells).keys():
        raise ValueError("it adds an assertion or takes one away")
    return edited, number


def small(page):
    """The text of a page at its small sizes."""
    text = page.read_text(encoding="utf-8")
    for under, old, new in edits_of(page)[0]:
        try:
            text, _ = apply({"under": under, "old": old, "new": new}, text)
        except (ValueError, SyntaxError) as problem:
            raise ValueError(f"a small size does not fit {page}: {problem}") from None
    return text


def blocks_of(cells):
    """Blocks of Python in prose: (number of the code cell that follows, code)."""
    block = r"^\.\. code-block:: python\n\n((?:[ ]+.*\n|\n)+)"
    for number, cell in enumerate(cells):
        follows = [n for n in range(number, len(cells)) if cells[n].code]
        for code in re.findall(block, cell.prose + "\n", re.MULTILINE):
            yield (follows or [len(cells)])[0], textwrap.dedent(code)


# --- in a child of the run --------------------------------------------------------


def in_a_child(function, seconds=120):
    """What function() returns, from a forked process: this one stays as it is."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: the child uses one
        child = os.fork()
    if not child:
        try:
            sys.stdout = io.StringIO()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with open(writing, "w", encoding="utf-8") as pipe:
                json.dump(function(), pipe)
        finally:
            os._exit(0)
    os.close(writing)
    content, until = b"", time.monotonic() + seconds
    while select.select([reading], [], [], max(0, until - time.monotonic()))[0]:
        part = os.read(reading, 65536)
        content += part
        if not part:
            break
    else:
        content = json.dumps([None, f"it did not end within {seconds} s"]).encode()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    return json.loads(content) if content else [None, "the process died"]


def outcome(page, cells, first):
    """Run on from cell ``first``: which assertion fails, and what it says."""
    import torch

    torch.set_num_threads(1)  # the other threads did not survive the fork
    try:
        for cell in cells[first:]:
            code = "\n" * (cell.line - 1) + cell.code
            code = compile(code, str(page), "exec", dont_inherit=True)
            exec(code, vars(sys.modules["__main__"]))
    except AssertionError as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.lineno for frame in frames if frame.filename == str(page)]
        of_torch = "torch/testing/" in Path(frames[-1].filename).as_posix()
        if of_torch or frames[-1].filename == str(page):
            for key, (start, end) in assertions(cells).items():
                if start <= own[-1] <= end:
                    return [key, str(error)]
        library = "an assertion of a library, not of the page:\n"
        return [None, library + traceback.format_exc()]
    except Exception:
        return [None, "another error comes first:\n" + traceback.format_exc()]
    return [None, "no assertion notices it"]


def run_blocks(codes):
    """Run the blocks of a page so far, in an empty folder; return what goes wrong."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("default")  # torch.export warns of itself
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for code in codes:
                exec(code, vars(sys.modules["__main__"]))
        except Exception:
            return traceback.format_exc()
    return None


# --- a page -----------------------------------------------------------------------


def try_page(page, text, faults):
    """Run the text of a page, warnings as errors, with its faults.

    Returns {"notebook": the executed notebook or None, "problems": a list of lines}.
    """
    warnings.simplefilter("error")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # its helpers survive no fork
    import torch

    cells = runner.split(text)
    problems, noticed, starts = [], set(), {}
    for fault in faults:
        try:
            edited, place = apply(fault, text)
            starts.setdefault(place, []).append((fault, runner.split(edited)))
        except (ValueError, SyntaxError) as problem:
            problems.append(f"'{fault['mistake']}' does not fit the page: {problem}")

    def try_fault(number, fault, edited):
        start = time.perf_counter()
        key, says = in_a_child(lambda: outcome(page, edited, number))
        good = key is not None and fault.get("says", "") in says
        if good:
            noticed.add(tuple(key))
        else:
            wanted = f"an assertion of the page that says {fault.get('says', '')!r}"
            problems.append(f"'{fault['mistake']}': wanted {wanted}, got: {says}")
        word, seconds = "noticed" if good else "MISSED ", time.perf_counter() - start
        print(f"{word}  {seconds:4.1f} s  {fault['mistake']}")

    blocks = list(blocks_of(cells))

    def before(number):
        for fault, edited in starts.get(number, ()):
            try_fault(number, fault, edited)
        if any(at == number for at, _ in blocks):
            codes = [code for at, code in blocks if at <= number]
            if wrong := in_a_child(lambda: run_blocks(codes)):
                last = codes[-1].splitlines()[0]
                problems.append(f"the block in prose that begins {last!r}: {wrong}")

    forks = hasattr(os, "fork") and not torch.accelerator.is_available()
    if not forks:
        print("faults are skipped: a process cannot be forked here")
    runner.set_style()
    outputs, notebook, start = {}, None, time.perf_counter()
    with runner.empty_folder() as left:
        try:
            for number, *output in runner.run(page, cells, *[before] * forks):
                outputs[number] = output
            if forks:
                before(len(cells))
            seconds = time.perf_counter() - start
            machine = runner.this_machine()
            notebook = runner.notebook(cells, outputs, machine, seconds)
        except Exception:
            problems.append(traceback.format_exc())
    if left:
        problems.append(f"the page leaves files behind: {left}")
    file = f"tests/faults/{page.parent.name}/{page.stem}.toml"
    for key, (line, _) in assertions(cells).items() if forks and notebook else ():
        if key not in noticed:
            lacks = "no fault makes this assertion fail; a reader's mistake for "
            problems.append(f"{page}:{line}: {lacks}{file}?")
    return {"notebook": notebook, "problems": problems}


def try_into(target, page, text, faults):
    """Try a page and write what came of it to a JSON file."""
    target.write_text(json.dumps(try_page(page, text, faults)), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", help="path or part of a name")
    page, *others = runner.named(parser.parse_args().page)
    if others:
        names = "\n  ".join(other.stem for other in [page, *others])
        sys.exit(
            f"one page at a time, in a process of its own; these match:\n  {names}"
        )
    start = time.perf_counter()
    problems = try_page(page, small(page), edits_of(page)[1])["problems"]
    good = f"{page.stem}: every check can fail, {time.perf_counter() - start:.1f} s"
    print(*problems or [good], sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
