"""How a page is found and shared: its description, its card, its address, GitHub.

``SITE_URL`` and ``REPOSITORY=owner/name`` in the environment (see conf.py) say where
the site and its sources stand. Without them no page has a link that needs them.
"""

from pathlib import Path
from urllib.parse import quote

from docutils import nodes

import runner
from _ext import gallery, pictures


def describe(app, pagename, templatename, context, doctree):
    """Give _templates/ what they write: description, card, links to the sources.

    The description of a page is its first paragraph, so that has to stand alone.
    sphinxext-opengraph would take what stands above it, too, and cut it.
    """
    paragraph = doctree and next(doctree.findall(nodes.paragraph), None)
    context["description"] = " ".join(paragraph.astext().split()) if paragraph else ""
    context["card"] = None
    if app.config.html_baseurl and doctree is not None:
        address = app.config.html_baseurl.rstrip("/")
        context["card"] = f"{address}/{pictures.card(app, pagename)}"
    context["on_github"] = on_github(app, gallery.tutorial_of(pagename))


def on_github(app, tutorial):
    """Links of a tutorial to its repository: (text, address)."""
    if not (app.config.repository and tutorial):
        return []
    home = f"https://github.com/{app.config.repository}"
    about = quote(f"Problem on the page {tutorial}", safe="")
    links = [
        ("Source on GitHub", f"{home}/blob/main/tutorials/{tutorial}.py"),
        ("Report a problem on this page", f"{home}/issues/new?title={about}"),
    ]
    for path in sorted(runner.RECORDINGS.glob(f"*/{tutorial}.ipynb")):
        if runner.state(runner.TUTORIALS / f"{tutorial}.py", path) == "current":
            place = f"{app.config.repository}/blob/main/{path.relative_to(runner.ROOT)}"
            colab = f"https://colab.research.google.com/github/{place}"
            return [("Open in Colab", colab), *links]
    return links


def write_sitemap(app, problem):
    """All pages, for search engines; sphinx-sitemap lists those of the last build."""
    if app.config.html_baseurl and app.builder.name == "html" and not problem:
        address = app.config.html_baseurl.rstrip("/")
        places = [f"{address}/{page}.html\n" for page in sorted(app.env.found_docs)]
        Path(app.outdir, "sitemap.txt").write_text("".join(places), encoding="utf-8")


def setup(app):
    app.add_config_value("repository", "", "html", str)
    app.connect("html-page-context", describe)
    app.connect("build-finished", write_sitemap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
