"""Links to pages: the file name of a page in prose becomes one.

Authors write ``plot_memory.py`` in double backticks. A notebook and a script show
that name, which a reader can look for; the website shows the page's title and links it.
"""

from pathlib import Path

from docutils import nodes
from sphinx.util import logging

logger = logging.getLogger(__name__)


def link_pages(app, doctree, docname):
    pages = {Path(name).name: name for name in app.env.titles}
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext()
        if not (name.startswith("plot_") and name.endswith(".py")):
            continue
        if isinstance(literal.parent, (nodes.reference, nodes.title)):
            continue
        target = pages.get(name.removesuffix(".py"))
        if target is None:
            logger.warning("there is no tutorial %s to link to", name, location=literal)
        elif target != docname:
            title = app.env.titles[target].astext()
            uri = app.builder.get_relative_uri(docname, target)
            link = nodes.reference("", title, refuri=uri, internal=True)
            literal.replace_self(link)


def setup(app):
    app.connect("doctree-resolved", link_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
