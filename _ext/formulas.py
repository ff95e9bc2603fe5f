"""Formulas as MathML, made at build time: no script, no font, no other host.

Browsers draw MathML themselves and screen readers read it. In a notebook the same
formula is drawn by Jupyter.
"""

from docutils import nodes
from sphinx.util import logging

logger = logging.getLogger(__name__)


def _mathml(node, display):
    from latex2mathml.converter import convert  # a recording needs no formulas

    return convert(node.astext(), display=display)


def inline(translator, node):
    translator.body.append(_mathml(node, "inline"))
    raise nodes.SkipNode


def block(translator, node):
    if node.get("label"):
        logger.warning("labels of formulas are not supported", location=node)
    # On a narrow screen it scrolls, so the keyboard has to reach it.
    formula = f'<div class="formula" tabindex="0">{_mathml(node, "block")}</div>'
    translator.body.append(formula)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
