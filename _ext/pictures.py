"""Pictures that stand for a page: in the gallery, and where people share its address.

Both show the first figure that the page drew, here or on a machine that recorded it. A
page without figures has a drawing, ``_static/plot_x.svg``. While it has neither, since
it is new or did not run yet, the logo stands there; tests ask for a drawing. Cards for
messengers are drawn only where the site's address is known: they need a full one.
"""

import base64
from pathlib import Path

import matplotlib
from docutils import nodes
from resvg_py import svg_to_bytes
from sphinx.errors import ExtensionError

import runner
from _ext import gallery, recordings

STATIC = runner.ROOT / "_static"


def picture_of(app, tutorial):
    """The file of the picture that stands for a page."""
    for _, figures in recordings.figures_of(app, tutorial):
        for path, _ in figures:
            return path
    drawing = STATIC / f"{Path(tutorial).name}.svg"
    return drawing if drawing.exists() else STATIC / "logo.svg"


def thumbnails(app, doctree):
    """In gallery indexes: one size, light, and loaded when they come into view."""
    place = Path(app.env.docname)
    if place.name != "index" or not place.is_relative_to(gallery.GENERATED):
        return
    images = {
        gallery.thumbnail_of(image): image for image in doctree.findall(nodes.image)
    }
    scripts = runner.TUTORIALS / place.parent.relative_to(gallery.GENERATED)
    if set(images) != set(map(runner.name_of, scripts.rglob("plot_*.py"))):
        raise ExtensionError(
            f"{place}: its thumbnails do not belong to its pages. Does Sphinx-Gallery "
            "name them in another way? See thumbnail_of in _ext/gallery.py"
        )
    for tutorial, thumbnail in images.items():
        app.env.note_dependency(f"{gallery.GENERATED}/{tutorial}.rst")
        path = picture_of(app, tutorial)
        thumbnail["uri"] = "/" + path.relative_to(app.srcdir).as_posix()
        thumbnail["width"], thumbnail["height"] = "403", "274"
        thumbnail["loading"] = "lazy"


def card(app, docname):
    """Draw a page's card, its picture on white; return its path below the site."""
    tutorial = gallery.tutorial_of(docname)
    general = STATIC / "many-small-networks.svg"
    picture = picture_of(app, tutorial) if tutorial else general
    svg = picture.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :].replace("currentColor", runner.INK_LIGHT)
    data = base64.b64encode(svg.encode()).decode()
    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="1200" height="630">'
        '<rect width="1200" height="630" fill="white"/>'
        '<text x="40" y="600" font-family="DejaVu Sans" font-size="26">'
        f"{app.config.project}</text>"
        '<image x="40" y="20" width="1120" height="540" '
        f'href="data:image/svg+xml;base64,{data}"/></svg>'
    )
    # Without text of its own the drawing loads no fonts, and its figure has none.
    fonts = str(Path(matplotlib.get_data_path(), "fonts", "ttf"))  # the figures' own
    options = {"font_dirs": [fonts], "skip_system_fonts": True, "dpi": 96}
    png = svg_to_bytes(svg_string=drawing, **options)
    name = f"_images/card-{docname.replace('/', '-')}.png"
    path = Path(app.outdir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(png))
    return name


def setup(app):
    app.connect("doctree-read", thumbnails, priority=302)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
