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
    "auto_tutorials/beyond/plot_jacobians_and_hessians": {
        "sixteen-members-each-with-its-own-learning-rate": (
            "one-vector-for-all-parameters-of-a-member"
        ),
        "a-learning-rate-decides-how-sharp-it-may-get": (
            "how-sharp-is-each-member-s-loss"
        ),
    },
    "auto_tutorials/beyond/plot_per_sample_gradients": {
        "linear-layers-norms-and-clipping-without-gradients": (
            "norms-and-clipping-without-gradients"
        ),
        "find-mislabeled-digits": "what-it-costs",
    },
    "auto_tutorials/scale/plot_how_far": {
        "a-plan-for-a-thousand-members-or-a-million": (
            "how-much-memory-and-time-many-models-need"
        ),
        "from-two-measurements-to-a-plan": "from-a-small-run-to-a-plan",
        "a-member-and-its-training-step": "the-models-and-their-training-step",
        "any-plan-trains-the-same-members": "the-models-and-their-training-step",
        "how-many-members-fit": "the-small-run",
        "how-long-a-step-takes-with-one-member-and-with-many": "the-small-run",
        **dict.fromkeys(
            [
                "and-with-two-devices",
                "does-the-projection-hold",
                "more-devices-do-not-shorten-the-fixed-time",
                "what-becomes-the-bottleneck",
            ],
            "the-plan-and-a-job-that-checks-it",
        ),
        "the-mistake-to-plan-from-one-measurement": (
            "the-mistake-to-multiply-the-time-of-one-model"
        ),
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
    "auto_tutorials/uncertainty/plot_from_many_to_few": {
        "the-best-team-of-a-sweep-and-one-network-in-its-place": (
            "the-best-five-of-a-sweep"
        ),
        "pick-a-team-greedily": "keep-five-members",
        "a-sweep-in-every-split": "a-sweep-in-every-fold",
        "is-the-greedy-team-better": "is-the-team-better",
        "the-mistake-too-few-images-to-choose-by": "the-mistake-no-temperature",
    },
    "auto_tutorials/uncertainty/plot_more_members": {
        "score-a-prediction": "score-a-team",
        "train-the-whole-curve-at-once": "train-three-widths",
        **dict.fromkeys(
            [
                "choose-the-learning-rate-before-you-look",
                "what-should-happen-one-part-in-m-is-left",
            ],
            "each-team-chooses-its-rate-and-its-temperature",
        ),
        "fair-one-large-network-and-a-temperature-for-each": "members-or-width",
        "averaging-makes-less-confident": "do-members-average-overfitting-away",
    },
    "auto_tutorials/uncertainty/plot_regression": {
        "an-ensemble-that-knows-where-it-has-no-data": (
            "error-bars-from-an-ensemble-noise-and-ignorance"
        ),
        "does-it-know-where-and-how-much": "do-the-error-bars-hold",
        "the-mistake-leaving-out-the-variance-of-the-means": "do-the-error-bars-hold",
    },
    "auto_tutorials/uncertainty/plot_unknown_inputs": {
        "answer-only-what-is-sure": (
            "does-the-score-tell-unknown-inputs-from-known-ones"
        ),
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
