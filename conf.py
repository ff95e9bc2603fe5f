"""Sphinx settings of Many Models, One Call."""

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent))  # for _ext and the runner

project = "Many Models, One Call"
author = "the authors of Many Models, One Call"
copyright = f"%Y, {author}"
language = "en"

extensions = [
    "sphinx.ext.intersphinx",
    "sphinx_gallery.gen_gallery",
    "sphinx_design",
    "sphinx_copybutton",
    "notfound.extension",
    "_ext.gallery",
    "_ext.pages",
    "_ext.recordings",
    "_ext.page_head",
    "_ext.page_links",
    "_ext.formulas",
    "_ext.pictures",
    "_ext.sharing",
    "_ext.icons",
]
templates_path = ["_templates"]

# Where the site and its sources stand, if they do: links and cards that need it.
html_baseurl = os.environ.get("SITE_URL", "")
repository = os.environ.get("REPOSITORY", "")
notfound_urls_prefix = urlsplit(html_baseurl).path.rstrip("/") + "/"
notfound_template = "404.html"

# tutorials/ holds sources that Sphinx-Gallery turns into auto_tutorials/.
exclude_patterns = [
    "_build",
    ".*",
    "README.md",
    "recordings",
    "tests",
    "tutorials",
]

# Text inventories with the names that tutorials use: links need no network at build
# time and come out the same everywhere. tests/test_pages.py names what is missing.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", "inventories/python.txt"),
    "torch": ("https://docs.pytorch.org/docs/stable/", "inventories/torch.txt"),
    "matplotlib": ("https://matplotlib.org/stable/", "inventories/matplotlib.txt"),
}

# Strings, not objects: objects break Sphinx's cache and so -W.
sphinx_gallery_conf = {
    "examples_dirs": ["tutorials"],
    "gallery_dirs": ["auto_tutorials"],
    "subsection_order": "_ext.pages.section_order",
    "within_subsection_order": "_ext.pages.page_order",
    "ignore_pattern": r"^(?!plot_).*\.py$",
    "plot_gallery": "False",  # runner.py executes pages, recordings.py shows outputs
    "download_all_examples": True,
    "show_signature": False,
    "write_computation_times": False,
    "css": ("sg_gallery",),
}

# Outputs get no copy button.
copybutton_selector = "div:not(.sphx-glr-script-out) > div.highlight > pre"

html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_context = {"default_mode": "auto"}
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/logo.svg"
html_show_sourcelink = False  # it would show generated rST, not the script
html_copy_source = False
html_scaled_image_link = False  # sizes of images are there to keep their places free
html_use_index = False
html_sidebars = {"index": []}
html_theme_options = {
    "logo": {
        "text": project,
        "image_light": "_static/logo.svg",
        "image_dark": "_static/logo.svg",
    },
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": {
        "auto_tutorials/**": ["page-toc", "sg_download_links", "on-github"],
        "index": [],
    },
    "footer_start": ["copyright"],
    "footer_end": [],
}
