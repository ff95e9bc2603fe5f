"""What this site knows of Sphinx-Gallery's private ways, all of it.

Its comments, file names and class names in generated pages, and two changes that it
has no setting for: only what a script prints to stdout stands on its page, and a
notebook says what it needs, with the cells of figures collapsed.
"""

import re
import sys
from pathlib import Path

import nbformat
from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx_gallery import gen_rst
from sphinx_gallery.gen_gallery import _bool_eval

import runner

UNWANTED_CLASSES = {
    "sphx-glr-download-link-note",  # "Go to the end": the sidebar has the downloads
    "sphx-glr-timing",  # page_head.py says it under the title
    "sphx-glr-download-zip",  # script and notebook are self-contained
}
GENERATED = Path("auto_tutorials")


def executes(app):
    """Whether this build runs scripts."""
    return bool(_bool_eval(app.config.sphinx_gallery_conf["plot_gallery"]))


def tutorial_of(docname):
    """basics/plot_x of auto_tutorials/basics/plot_x, else None."""
    found = re.fullmatch(rf"{GENERATED}/([^/]+/plot_[^/]+)", docname)
    return found and found[1]


def generated(filename):
    """The copy of the script of this name beside its generated page."""
    (script,) = [path for path in runner.all_pages() if path.name == filename]
    return runner.ROOT / GENERATED / script.relative_to(runner.TUTORIALS)


def running_time(doctree):
    """Seconds that a page's script took, as the page says; None if it did not run."""
    for element in doctree.findall(nodes.Element):
        if "sphx-glr-timing" in element["classes"]:
            minutes, seconds = re.findall(r"[\d.]+", element.astext())[:2]
            return 60 * int(minutes) + float(seconds)
    return None


def code_cells(doctree):
    """Code cells of a generated page: (literal block, the output nodes after it)."""
    cells = []
    for block in doctree.findall(nodes.literal_block):
        siblings = block.parent.children
        at = siblings.index(block)
        before = siblings[at - 1] if at else None
        made = isinstance(before, nodes.comment) and "GENERATED" in before.astext()
        if not made or block.get("language") != "Python":
            continue
        outputs = []
        for node in siblings[at + 1 :]:
            if not {"sphx-glr-script-out", "tutorial-figure"} & set(node["classes"]):
                break
            outputs.append(node)
        cells.append((block, outputs))
    return cells


def thumbnail_of(image):
    """basics/plot_x of its thumbnail in a gallery index, else None."""
    found = re.search(r"/(\w+)/images/thumb/sphx_glr_(\w+)_thumb\.\w+", image["uri"])
    return found and f"{found[1]}/{found[2]}"


def run_again(script):
    """Make the next build execute a generated script although it did not change."""
    Path(f"{script}.md5").unlink(missing_ok=True)


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


def keep_stderr_off_pages():
    """What libraries tell on stderr goes where the build's messages go."""
    tee = gen_rst._LoggingTee
    take_both = tee.set_std_and_reset_position

    def take_stdout(self):
        take_both(self)
        sys.stderr = self.origs[1]
        return self

    tee.set_std_and_reset_position = take_stdout


def needs(code):
    """First line of a notebook: what its page imports, as pip calls it."""
    names = {"sklearn": "scikit-learn"}
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    wanted = sorted(names.get(n, n) for n in imported - sys.stdlib_module_names)
    return f"# %pip install {' '.join(wanted)}"


def link_pages(text, address):
    """In a notebook, the file name of another page leads to the website's page."""
    places = {
        path.name: path.relative_to(runner.TUTORIALS) for path in runner.all_pages()
    }

    def link(match):
        place = places.get(match[1])
        if not place:
            return match[0]
        page = place.with_suffix(".html").as_posix()
        return f"[`{match[1]}`]({address}/{GENERATED}/{page})"

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
    first = nbformat.v4.new_code_cell(needs(code))
    if notebook["nbformat_minor"] < 5:
        del first["id"]
    notebook["cells"].insert(0, first)
    return notebook


def prepare_notebooks(app, config):
    """Prepare the notebooks that Sphinx-Gallery writes."""
    make = gen_rst.jupyter_notebook
    address = config.html_baseurl.rstrip("/")
    gen_rst.jupyter_notebook = lambda *args: prepare_notebook(make(*args), address)


def setup(app):
    keep_stderr_off_pages()
    app.connect("config-inited", prepare_notebooks)
    app.connect("builder-inited", forget_deleted, priority=99)  # before scripts run
    app.connect("doctree-read", tidy, priority=900)  # after page_head has read the time
    return {"parallel_read_safe": True, "parallel_write_safe": True}
