"""The head of a tutorial page: where and when it ran, and its description.

* ``scraper`` is called by Sphinx-Gallery after every cell. It draws nothing; it
  writes ``plot_x.ran_on.json`` beside the generated page.
* ``add_head`` puts that and the running time under the page's title, and uses the
  first paragraph as the description that search engines and messengers show.
"""

import datetime
import json
import os
import platform
import re
from pathlib import Path

import torch
from docutils import nodes
from sphinx.util import logging

logger = logging.getLogger(__name__)

RAN_ON = ".ran_on.json"
TIME = r"\((\d+) minutes ([\d.]+) seconds\)"  # as Sphinx-Gallery writes it


def cpu_model():
    """Name of the processor, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(
            r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE
        )
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def cpu_cores():
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def this_machine():
    """Where the code runs: accelerator (or None), CPU, cores, torch, Python, date."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        accelerator = (
            torch.cuda.get_device_name()
            if accelerator.type == "cuda"
            else accelerator.type
        )
    return {
        "accelerator": accelerator,
        "cpu": cpu_model(),
        "cores": cpu_cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def scraper(block, block_vars, gallery_conf):
    """Sphinx-Gallery image scraper that records where the script ran."""
    path = Path(block_vars["target_file"]).with_suffix(RAN_ON)
    path.write_text(json.dumps(this_machine(), indent=2) + "\n", encoding="utf-8")
    return ""


def describe(machine):
    """One line about the machine, as ``this_machine`` gives it."""
    device = machine["accelerator"] or "no accelerator"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {device}; "
        f"torch {machine['torch']}, Python {machine['python']}; {machine['date']}"
    )


def _head(machine, seconds):
    return nodes.paragraph(
        "",
        "",
        nodes.strong("", "This page ran on "),
        nodes.Text(f"{describe(machine)}, in {seconds:.1f} s."),
        classes=["ran-on"],
    )


def _not_run():
    return nodes.note(
        "",
        nodes.paragraph(
            "", "This page was built without running its code, so it shows no outputs."
        ),
        classes=["ran-on"],
    )


def add_head(app, doctree):
    docname = app.env.docname
    source = Path(app.srcdir, f"{docname}.py")
    if not (docname.startswith("auto_tutorials/") and source.exists()):
        return
    title = next(doctree.findall(nodes.title))
    section = title.parent
    first = next(n for n in section.children if isinstance(n, nodes.paragraph))
    description = " ".join(first.astext().split())
    for key, name in [("name", "description"), ("property", "og:description")]:
        doctree.insert(0, nodes.meta(**{key: name, "content": description}))

    elements = doctree.findall(nodes.Element)
    timing = next((e for e in elements if "sphx-glr-timing" in e["classes"]), None)
    if timing is not None:
        minutes, rest = re.search(TIME, timing.astext()).groups()
        machine = json.loads(source.with_suffix(RAN_ON).read_text(encoding="utf-8"))
        head = _head(machine, 60 * int(minutes) + float(rest))
    else:
        head = _not_run()
        gallery_conf = app.config.sphinx_gallery_conf
        wanted = re.search(gallery_conf["filename_pattern"], f"{docname}.py")
        if str(gallery_conf["plot_gallery"]) == "True" and wanted:
            logger.warning(
                "the tutorial did not run: 'make html' runs it", location=docname
            )
    section.insert(section.index(title) + 1, head)


def setup(app):
    app.connect("doctree-read", add_head)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
