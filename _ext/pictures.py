"""Pictures that stand for a page: in the gallery, and where people share its address.

Both show a figure that the page drew, here or on a machine that recorded it; a page
without figures shows its headings. Cards for messengers are drawn only where the
site's address is known, because they need a full one.
"""

import base64
import gzip
import hashlib
import itertools
import re
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

import matplotlib
from docutils import nodes

import runner
from _ext import gallery, recordings

FOLDER = Path("_build", "pictures")
LIGHT = 12_000  # bytes of a thumbnail as sent; of a page's figures the first so light
CARD = (1200, 630)
USUAL = "plot_when_vmap_pays"  # its figure stands on the cards of all other pages


def headings(tutorial):
    """Headings of a page between its title and the usual last ones."""
    text = (runner.TUTORIALS / f"{tutorial}.py").read_text(encoding="utf-8")
    rows = [row for cell in runner.split(text) for row in cell.prose.splitlines()]
    found = [a for a, b in itertools.pairwise(rows) if re.match("-{3,}$", b)]
    usual = {"Set-up", "Remember", "Next", "References"}
    return [heading.replace("``", "") for heading in found if heading not in usual]


def contents(tutorial):
    """An SVG of a page's first headings, in the ink of the reader's theme."""
    shown = [
        textwrap.shorten(heading, 46, placeholder=" …")
        for heading in headings(tutorial)[:8]
    ]
    lines = "".join(
        f'<text x="14" y="{34 + 32 * row}" fill="currentColor" font-size="15" '
        f'font-family="sans-serif">{escape(heading)}</text>'
        for row, heading in enumerate(shown)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="403.2pt" height="273.6pt" '
        f'viewBox="0 0 403.2 273.6">{runner.THEME}{lines}</svg>'
    )


def picture_of(app, tutorial):
    """The file of the figure, or of the headings, that stands for a page."""
    drawn = [fig for _, figs in recordings.figures_of(app, tutorial) for fig in figs]
    for path, _ in drawn:
        if len(gzip.compress(path.read_bytes())) < LIGHT:
            return path
    svg = contents(tutorial)
    name = hashlib.sha256(svg.encode()).hexdigest()[:16]
    path = Path(app.srcdir, FOLDER, f"{name}.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg, encoding="utf-8")
    return path


def thumbnails(app, doctree):
    """In gallery indexes: one size, light, and loaded when they come into view."""
    for thumbnail in doctree.findall(nodes.image):
        if tutorial := gallery.thumbnail_of(thumbnail):
            app.env.note_dependency(f"{gallery.GENERATED}/{tutorial}.rst")
            path = picture_of(app, tutorial)
            thumbnail["uri"] = "/" + path.relative_to(app.srcdir).as_posix()
            thumbnail["width"], thumbnail["height"] = "403", "274"
            thumbnail["loading"] = "lazy"


def draw_card(title, section, picture):
    """PNG of a card: section and title on the left, a figure on the right."""
    from resvg_py import svg_to_bytes  # only a site with an address needs it

    svg = picture.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :].replace("currentColor", runner.INK_LIGHT)
    data = base64.b64encode(svg.encode()).decode()
    lines = textwrap.wrap(title, 19)
    rows = "".join(
        f'<text x="60" y="{250 + 58 * row}" font-size="46" font-weight="bold">'
        f"{escape(line)}</text>"
        for row, line in enumerate(lines[:5])
    )
    width, height = CARD
    card = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="DejaVu Sans" fill="{runner.INK_LIGHT}">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<rect width="16" height="{height}" fill="{runner.COLORS[0]}"/>'
        f'<text x="60" y="100" font-size="28" fill="{runner.COLORS[0]}">'
        f'{escape(section)}</text>{rows}<text x="60" y="570" font-size="26">'
        "Many Models, One Call</text>"
        f'<image x="620" y="110" width="560" height="410" '
        f'href="data:image/svg+xml;base64,{data}"/></svg>'
    )
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return bytes(
        svg_to_bytes(
            svg_string=card, font_dirs=[str(fonts)], skip_system_fonts=True, dpi=96
        )
    )


def card(app, docname):
    """Path of a page's card below the built site; drawn where there is none yet."""
    pages = runner.all_pages()
    usual = next((page for page in pages if page.stem == USUAL), pages[0])
    usual = usual.relative_to(runner.TUTORIALS).with_suffix("").as_posix()
    tutorial = gallery.tutorial_of(docname) or usual
    page = app.env.titles.get(docname)
    title = page.astext() if page else app.config.project
    section = tutorial.split("/")[0].capitalize()
    if docname != f"{gallery.GENERATED}/{tutorial}":
        section = "Ensembles of neural networks with torch.func.vmap"
    picture = picture_of(app, tutorial)
    state = repr((title, section, picture.read_text(encoding="utf-8")))
    name = f"_images/card-{hashlib.sha256(state.encode()).hexdigest()[:16]}.png"
    path = Path(app.outdir, name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw_card(title, section, picture))
    return name


def setup(app):
    app.connect("doctree-read", thumbnails, priority=302)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
