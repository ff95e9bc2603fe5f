"""Links to pages: a file name in prose becomes one, and old addresses stay good.

Authors write ``plot_memory.py`` in double backticks. A notebook and a script show
that name, which a reader can look for; the website shows the page's title and links it.
"""

from pathlib import Path

from docutils import nodes
from sphinx.util import logging

logger = logging.getLogger(__name__)

# Headings that have another name now: page -> {old id: id of the heading that answers
# it now, on this page}. Where another page does, "next", which links to it.
MOVED = {
    "auto_tutorials/basics/plot_what_vmap_refuses": {
        **dict.fromkeys(
            [
                "how-to-read-the-cases",
                "got-in-dim-0-for-an-input",
                "randomness-error-mode",
                "batch-norm-got-a-batched-tensor",
                "batching-rule-not-implemented",
                "must-only-return-tensors",
            ],
            "what-you-see-what-to-write-and-why",
        ),
        "inplace-arithmetic-is-not-possible": (
            "is-not-possible-because-there-exists-a-tensor"
        ),
        "there-is-a-performance-drop-slow": "there-is-a-performance-drop",
        "the-mistake-append-count-or-draw": "remember",
    },
    "auto_tutorials/speed/plot_fastest_ensemble": {
        "two-side-steps-on-step-2-threads-or-a-cuda-graph": (
            "side-steps-that-need-an-nvidia-gpu"
        ),
        "step-5-on-steps-2-to-4-fewer-bits": "step-5-on-steps-3-and-4-fewer-bits",
        "ask-for-the-layout-inside-vmap": "step-2-on-step-0-channels-last",
    },
    "auto_tutorials/speed/plot_memory": {
        "split-the-gradients": "the-mistake-autograd-records-outside-of-vmap",
        "both-give-the-gradients-of-a-loop": "groups-train-what-a-loop-trains",
        "stack-without-holding-each-model-twice": (
            "train-backward-for-some-members-at-a-time"
        ),
        "measure-the-peak-of-your-own-call": "how-many-models-fit",
        "how-many-members-fit-and-which-chunk-size": "how-many-models-fit",
    },
    "auto_tutorials/speed/plot_what_vmap_runs": {
        "batching-rule-not-implemented-for-aten-lstm-input": "an-lstm-or-a-gru",
        "large-results-need-fresh-memory": "on-a-cpu-large-results-need-fresh-memory",
    },
}


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


def keep_addresses(app, doctree):
    """Old ids of headings lead to the headings that took their place."""
    moved = MOVED.get(app.env.docname, {})
    for section in doctree.findall(nodes.section):
        section["ids"] += [old for old, new in moved.items() if new in section["ids"]]


def setup(app):
    app.connect("doctree-read", keep_addresses)
    app.connect("doctree-resolved", link_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
