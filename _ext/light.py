"""Pages that load fast: of the theme's assets only what this site uses.

Scripts wait until the page is drawn. Of the icon font, 112 kB, a page gets the few
icons that the theme shows here, in a style sheet of 3 kB; an icon that is not in the
list still comes from the theme's own font.
"""

import base64
import io
import re
from pathlib import Path

import pydata_sphinx_theme
from fontTools import subset
from fontTools.ttLib import TTFont
from sphinx.builders.html import _JavaScript

# tests/test_pages.py names what is missing.
ICONS = [
    *["angle-left", "angle-right", "arrow-up", "bars", "chevron-down"],
    *["circle-half-stroke", "download", "house", "list", "magnifying-glass"],
    *["moon", "outdent", "sun", "xmark"],
]
UNUSED = {"sg-tags.js"}  # Sphinx-Gallery's tags
AT_ONCE = {"inline", "documentation_options.js"}  # inline scripts need the options
THEME = Path(pydata_sphinx_theme.__file__).parent / "theme/pydata_sphinx_theme/static"


def write_icons(app, config):
    """Write icons.css: a font of these icons alone, which comes before the theme's."""
    styles = (THEME / "styles" / "pydata-sphinx-theme.css").read_text()
    family = re.search(r"font-family:(Font Awesome\\ \d+ Free)", styles)[1]
    names = {
        name: int(code, 16)
        for names, code in re.findall(r'([^{}]+)\{--fa:"\\([0-9a-f]+)"\}', styles)
        for name in re.findall(r"\.fa-([\w-]+)", names)
    }
    codes = [names[icon] for icon in ICONS]
    font = TTFont(THEME / "vendor/fontawesome/webfonts/fa-solid-900.woff2")
    subsetter = subset.Subsetter(subset.Options(layout_features=[], hinting=False))
    subsetter.populate(unicodes=codes)
    subsetter.subset(font)
    font.flavor, content = "woff2", io.BytesIO()
    font.save(content)
    data = base64.b64encode(content.getvalue()).decode()
    folder = Path(app.srcdir, "_build", "assets")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "icons.css").write_text(
        f"@font-face {{ font-family: {family}; font-weight: 900; font-display: block; "
        f"unicode-range: {', '.join(f'U+{code:x}' for code in codes)}; "
        f"src: url(data:font/woff2;base64,{data}); }}\n"
    )
    config.html_static_path.append(str(folder))


def defer_scripts(app, pagename, templatename, context, doctree):
    """Let scripts wait until a page is drawn; on the search page they are the page."""
    scripts = []
    for script in context["script_files"]:
        name = Path(getattr(script, "filename", None) or "inline").name
        if name not in AT_ONCE and pagename != "search":
            attributes = script.attributes | {"defer": "defer"}
            script = _JavaScript(
                script.filename, priority=script.priority, **attributes
            )
        if name not in UNUSED:
            scripts.append(script)
    context["script_files"] = scripts


def setup(app):
    app.connect("config-inited", write_icons)
    app.add_css_file("icons.css")
    app.connect("html-page-context", defer_scripts, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
