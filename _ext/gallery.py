"""What this site knows of Sphinx-Gallery's private ways, all of it.

Sphinx-Gallery makes pages and notebooks of scripts here; it executes nothing. Its
comments, file names and class names in generated pages, and one change that it has no
setting for: a notebook says what it needs, with the cells of figures collapsed.
"""

import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx_gallery import gen_rst

import runner

UNWANTED_CLASSES = {
    "sphx-glr-download-link-note",  # "Go to the end": the sidebar has the downloads
    "sphx-glr-download-zip",  # script and notebook are self-contained
}
GENERATED = Path("auto_tutorials")


def tutorial_of(docname):
    """basics/plot_x of auto_tutorials/basics/plot_x, else None."""
    found = re.fullmatch(rf"{GENERATED}/([^/]+/plot_[^/]+)", docname)
    return found and found[1]


def code_cells(doctree, wanted):
    """Literal blocks of the code cells of a generated page, which has so many."""
    cells = []
    for block in doctree.findall(nodes.literal_block):
        at = block.parent.index(block)
        before = block.parent[at - 1] if at else None
        made = isinstance(before, nodes.comment) and "GENERATED" in before.astext()
        if made and block.get("language") == "Python":
            cells.append(block)
    if len(cells) != wanted:
        raise ExtensionError(
            f"{doctree.get('source')}: {wanted} code cells were expected, {len(cells)} "
            "found. Does Sphinx-Gallery mark them in another way? See _ext/gallery.py"
        )
    return cells


def thumbnail_of(image):
    """basics/plot_x of its thumbnail in a gallery index, else None."""
    found = re.search(r"/(\w+)/images/thumb/sphx_glr_(\w+)_thumb\.\w+", image["uri"])
    return found and f"{found[1]}/{found[2]}"


def forget_deleted(app):
    """Remove what was generated from scripts that are gone; refuse two of one name."""
    scripts = runner.all_pages()
    names = [script.stem for script in scripts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ExtensionError(f"two tutorials have the same file name: {twice}")
    for folder in [Path(app.srcdir, GENERATED), Path(app.outdir, GENERATED)]:
        for path in folder.glob("*/plot_*"):
            name = f"{path.parent.name}/{path.name.split('.')[0]}.py"
            if not (runner.TUTORIALS / name).exists():
                path.unlink()


def tidy(app, doctree):
    """Take out of generated pages what this site does not want."""
    for node in list(doctree.findall(nodes.Element)):
        tag_list = isinstance(node, nodes.raw) and "sg-tag-list" in node.astext()
        if tag_list or UNWANTED_CLASSES.intersection(node["classes"]):
            node.parent.remove(node)


def needs(code):
    """First line of a notebook: what its page imports, as pip calls it."""
    names = {"sklearn": "scikit-learn", "PIL": "pillow"}
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    wanted = sorted(names.get(n, n) for n in imported - sys.stdlib_module_names)
    return f"# %pip install {' '.join(wanted)}"


def link_pages(text, address):
    """In a notebook, the file name of another page leads to the website's page."""
    places = {path.name: runner.name_of(path) for path in runner.all_pages()}

    def link(match):
        if match[1] not in places:
            return match[0]
        return f"[`{match[1]}`]({address}/{GENERATED}/{places[match[1]]}.html)"

    return re.sub(r"`+(plot_\w+\.py)`+", link, text)


def prepare_notebook(notebook, address):
    """Make a notebook say what it needs, link its pages, close the code of figures."""
    code = ""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            code += source + "\n"
            if runner.draws(source):
                cell["metadata"]["jupyter"] = {"source_hidden": True}
        elif address:
            cell["source"] = link_pages(source, address)
    first = {"cell_type": "code", "metadata": {}, "source": needs(code)}
    notebook["cells"].insert(0, first | {"execution_count": None, "outputs": []})
    return notebook


def prepare_notebooks(app, config):
    """Prepare the notebooks that Sphinx-Gallery writes."""
    make = gen_rst.jupyter_notebook
    address = config.html_baseurl.rstrip("/")
    gen_rst.jupyter_notebook = lambda *args: prepare_notebook(make(*args), address)


def setup(app):
    app.connect("config-inited", prepare_notebooks)
    app.connect("builder-inited", forget_deleted, priority=99)  # before the gallery
    app.connect("doctree-read", tidy, priority=100)  # before downloads are collected
    return {"parallel_read_safe": True, "parallel_write_safe": True}
