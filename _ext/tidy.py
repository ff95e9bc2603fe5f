"""Take out of generated pages what Sphinx-Gallery adds and this site does not want.

Its settings have no switch for these.
"""

from docutils import nodes

UNWANTED_CLASSES = {
    "sphx-glr-download-link-note",  # "Go to the end": the sidebar has the downloads
    "sphx-glr-timing",  # _ext/page_head.py says it under the title
    "sphx-glr-download-zip",  # script and notebook are self-contained
}


def tidy(app, doctree):
    for node in list(doctree.findall(nodes.Element)):
        tag_list = isinstance(node, nodes.raw) and "sg-tag-list" in node.astext()
        if tag_list or UNWANTED_CLASSES.intersection(node["classes"]):
            node.parent.remove(node)


def setup(app):
    app.connect("doctree-read", tidy, priority=900)  # after page_head has read the time
    return {"parallel_read_safe": True, "parallel_write_safe": True}
