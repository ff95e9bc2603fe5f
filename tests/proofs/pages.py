"""What proofs take from a page (section/plot_x): functions and classes, cells, text."""

import ast

import torch

import runner


def path_of(page):
    return runner.TUTORIALS / f"{page}.py"


def text_of(page):
    return path_of(page).read_text(encoding="utf-8")


def cells_of(page):
    return runner.split(text_of(page))


def pages_of(section):
    paths = sorted((runner.TUTORIALS / section).glob("plot_*.py"))
    return [f"{section}/{path.stem}" for path in paths]


def defined_in(page):
    """Names of the functions and classes of a page."""
    return {getattr(node, "name", None) for node in ast.parse(text_of(page)).body}


def lifted(page, wanted):
    """Imports, functions and classes of a page: all of them, or those wanted."""
    found, missing = [], set(wanted)
    for node in ast.parse(text_of(page)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found += [node] * (not wanted or node.name in wanted)
            missing.discard(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found += [node] * ("matplotlib" not in ast.unparse(node))
    if missing:
        raise LookupError(f"{page} defines no {', '.join(sorted(missing))}")
    return ast.Module(found, [])


def functions_of(page, *wanted):
    """As the text of a script, for processes of their own."""
    return ast.unparse(lifted(page, wanted)) + "\n"


def names_of(page, *wanted, **given):
    """Executed: name -> function, class or module. Page globals that they use: given.

    A test may also add globals later; the functions look them up when they are called.
    """
    names = {"__name__": page, **given}
    exec(compile(lifted(page, wanted), path_of(page), "exec"), names)
    return names


def peak_bytes(call):
    """By the ruler of plot_memory.py, on a CPU."""
    cpu = torch.device("cpu")
    ruler = names_of("speed/plot_memory", "peak_mb", "trace", device=cpu)
    return ruler["peak_mb"](call) * 1e6
