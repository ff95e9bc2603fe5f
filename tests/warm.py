"""Runs pages and builds sites in processes that have their libraries already.

Each is a process of its own, forked from one that has imported torch and Sphinx and
done nothing else: a page starts four seconds earlier, a build five. Real scripts and
kernels are tested in test_forms.py, ``make`` and nox in test_commands.py.
"""

import contextlib
import gc
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

# torch._inductor: what a first optimizer and a reset import, a thousand modules.
PRELOAD = [
    *["warm", "torch", "torch._inductor", "torch.utils.benchmark", "torch.profiler"],
    *["matplotlib.pyplot", "sklearn.datasets", "mlxtend.data"],
    *["sphinx.cmd.build", "sphinx_gallery.gen_gallery", "pydata_sphinx_theme"],
    *["sphinx_design", "sphinx_copybutton", "sphinx.ext.intersphinx", "nbformat"],
    "fontTools.subset",
]


class Done(NamedTuple):
    returncode: int | None
    output: str


def _call(function, arguments, log):
    """In the child: call a function, all output to a file."""
    gc.freeze()  # collections pass by what was loaded before
    with (
        open(log, "w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            status = function(*arguments)
        except BaseException:
            traceback.print_exc()
            status = 1
    os._exit(status or 0)


def call(function, *arguments, log, seconds=300):
    """Call a function in a process of its own; its result is the exit status."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    child = context.Process(target=_call, args=(function, arguments, log))
    child.start()
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        child.join()
    return Done(child.exitcode, Path(log).read_text(encoding="utf-8"))


def _build(site, arguments):
    from sphinx.cmd.build import main

    os.chdir(site)
    sys.path[:] = [str(site), *(path for path in sys.path if "tests" not in path)]
    return main([str(argument) for argument in arguments])


def build(site, arguments):
    """Run sphinx-build with these arguments in the folder of a site."""
    return call(_build, site, arguments, log=Path(site) / "build.log")
