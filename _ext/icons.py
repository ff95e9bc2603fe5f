"""Of the theme's icon font, 112 kB, the few icons that the theme shows here, 2 kB.

Without this a phone shows a page half a second later, and Lighthouse gives it 90 of 100
instead of 95. Any other icon still comes from the theme's own font.
"""

import base64
from pathlib import Path

import pydata_sphinx_theme
from fontTools import subset

# tests/test_browser.py notices what is missing, and a font of another name.
FONT, FAMILY = "vendor/fontawesome/webfonts/fa-solid-900.woff2", "Font Awesome 7 Free"
ICONS = {
    "angle-left": 0xF104,
    "angle-right": 0xF105,
    "arrow-up": 0xF062,
    "bars": 0xF0C9,
    "chevron-down": 0xF078,
    "circle-half-stroke": 0xF042,
    "download": 0xF019,
    "house": 0xF015,
    "list": 0xF03A,
    "magnifying-glass": 0xF002,
    "moon": 0xF186,
    "outdent": 0xF03B,
    "sun": 0xF185,
    "xmark": 0xF00D,
}


def write_icons(app, config):
    """Write icons.css: a font of these icons alone, which comes before the theme's."""
    theme = Path(pydata_sphinx_theme.__file__).parent / "theme/pydata_sphinx_theme"
    folder = Path(app.srcdir, "_build", "assets")
    folder.mkdir(parents=True, exist_ok=True)
    codes = ",".join(f"U+{code:x}" for code in ICONS.values())
    font = folder.with_name("icons.woff2")
    subset.main(
        [
            *[str(theme / "static" / FONT), f"--output-file={font}", "--flavor=woff2"],
            *[f"--unicodes={codes}", "--layout-features=", "--no-hinting"],
        ]
    )
    data = base64.b64encode(font.read_bytes()).decode()
    (folder / "icons.css").write_text(
        f'@font-face {{ font-family: "{FAMILY}"; font-weight: 900; '
        f"font-display: block; unicode-range: {codes}; "
        f"src: url(data:font/woff2;base64,{data}); }}\n"
    )
    config.html_static_path.append(str(folder))


def setup(app):
    app.connect("config-inited", write_icons)
    app.add_css_file("icons.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
