"""What tutorials/pages.toml says of each page: its place, and phrases of the search."""

from docutils import nodes
from sphinx import addnodes

import runner
from _ext import gallery


def section_order(path):
    """Sort key of a section's folder, for Sphinx-Gallery."""
    sections = [name.split("/")[0] for name in runner.listed()]
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    return sections.index(name) if name in sections else len(sections)


def page_order(filename):
    """Sort key of a script's file name, for Sphinx-Gallery."""
    return [page.name for page in runner.all_pages()].index(filename)


def add_phrases(app, doctree):
    for phrase in runner.listed().get(gallery.tutorial_of(app.env.docname), []):
        title = next(doctree.findall(nodes.section))
        entry = ("single", phrase, title["ids"][0], "main", None)
        title.insert(1, addnodes.index(entries=[entry]))


def setup(app):
    app.connect("doctree-read", add_phrases)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
