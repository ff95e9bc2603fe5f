"""Builds small sites in a process that has imported Sphinx and torch already.

A build takes two seconds instead of seven. ``make`` and nox are tested for themselves
in test_commands.py.
"""

import contextlib
import multiprocessing
import os
import sys
from pathlib import Path
from typing import NamedTuple

PRELOAD = [
    *["warm", "torch", "torch.utils.benchmark", "matplotlib.pyplot", "nbformat"],
    *["sphinx.cmd.build", "sphinx_gallery.gen_gallery", "pydata_sphinx_theme"],
    *["sphinx_design", "sphinx_copybutton", "sphinx.ext.intersphinx"],
]


class Done(NamedTuple):
    returncode: int
    output: str


def _build(site, arguments, log):
    """In the child: run sphinx-build in a site, all output to a file."""
    from sphinx.cmd.build import main

    os.chdir(site)
    sys.path[:] = [str(site), *(path for path in sys.path if "tests" not in path)]
    with (
        open(log, "w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        status = main([str(argument) for argument in arguments])
    os._exit(status)


def build(site, arguments):
    """Run sphinx-build with these arguments in the folder of a site."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    log = Path(site) / "build.log"
    child = context.Process(target=_build, args=(site, arguments, log))
    child.start()
    child.join(300)
    return Done(child.exitcode, log.read_text(encoding="utf-8"))
