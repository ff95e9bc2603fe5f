"""Functions of pages, for tests that prove what the page itself would run."""

import ast

import runner


def functions_of(page, *wanted):
    """Imports and functions of a page (section/plot_x), as the text of a script."""
    text = (runner.TUTORIALS / f"{page}.py").read_text(encoding="utf-8")
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found += [ast.unparse(node)] * (not wanted or node.name in wanted)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.append(ast.unparse(node))
    return "\n".join(part for part in found if "import matplotlib" not in part) + "\n"


def names_of(page, *wanted):
    """The same, executed: name -> function or module."""
    names = {}
    exec(functions_of(page, *wanted), names)
    return names
