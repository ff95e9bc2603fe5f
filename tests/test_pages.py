"""The built pages: they show what ran, and everything they refer to is there."""

import gzip
import itertools
import json
import re
import zipfile
from types import SimpleNamespace
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup
from conftest import GPU, ROOT, TUTORIALS, name_of
from docutils import nodes

import runner
from _ext import pictures

# Names of torch that tutorials use and PyTorch's documentation has no entry for, and
# torch.Tensor, which would make a link of every variable that holds one.
UNDOCUMENTED = {
    "torch.Tensor",
    "torch.__version__",
    "torch.autograd.DeviceType.CPU",
    "torch.autograd.DeviceType.CUDA",
    "torch.autograd.set_multithreading_enabled",
    "torch.backends.cuda.matmul",
    "torch.backends.fp32_precision",
    "torch.backends.cuda.matmul.fp32_precision",
    "torch.backends.cudnn.conv",
    "torch.backends.cudnn.conv.fp32_precision",
    "torch.bfloat16",
    "torch.channels_last",
    "torch.float16",
    "torch.float32",
    "torch.float64",
    "torch.inf",
    "torch.int64",
    "torch.long",
    "torch.nan",
    "torch.pi",
    "torch.utils.benchmark.timer",
}


@pytest.fixture(scope="session")
def pages(html):
    """Every page of the site: path -> parsed HTML."""
    return {
        path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for path in sorted(html.rglob("*.html"))
        if "_static" not in path.relative_to(html).parts
    }


@pytest.fixture
def page(html, pages, tutorial):
    """The page of each tutorial in turn."""
    return pages[html / "auto_tutorials" / f"{name_of(tutorial)}.html"]


def test_page_shows_what_ran_on_every_machine(page, site, tutorial):
    head = page.select_one(".ran-on").text
    for path in site.glob(f"recordings/*/{name_of(tutorial)}.ipynb"):
        metadata = nbformat.read(path, as_version=4).metadata
        machine = runner.describe(metadata.machine)
        assert f"Ran on {machine}, in {metadata.seconds:.1f} s" in head
    assert head.count("Ran on") == 2
    assert "changed since" not in head
    assert "the notebook with these outputs" in head
    assert page.select(".sphx-glr-script-out"), "the page shows no output"
    assert not page.select(".highlight-pytb"), "the page shows a traceback"
    tabs = {label.text.strip() for label in page.select(".machines > label")}
    assert tabs == {runner.short_name(runner.this_machine()), GPU}
    cells = runner.split(tutorial.read_text(encoding="utf-8"))
    folded = sum(runner.draws(cell.code) for cell in cells)
    assert len(page.select("details.figure-code > .highlight-Python")) == folded


def test_the_answer_comes_first(page):
    """Two sentences under the title, before any code."""
    paragraphs = [p.text for p in page.select("section > p")]
    second = paragraphs[1]
    assert second.startswith("In short."), f"begin it with **In short.**: {second}"


def test_figures_are_small_and_have_an_alternative_text(page, html, tutorial):
    figures = page.select("img.tutorial-figure")
    assert bool(figures) == runner.draws(tutorial.read_text(encoding="utf-8"))
    for figure in figures:
        assert figure["loading"] == "lazy"
        assert int(figure["width"]) > 0 < int(figure["height"]), "no size: it jumps"
        alt = figure["alt"]
        assert len(alt.split()) > 8, f"too short to describe a figure: {alt!r}"
        assert "sphx_glr" not in alt
        image = (html / "auto_tutorials" / name_of(tutorial)).parent / figure["src"]
        if b"<image" not in image.read_bytes():  # without raster content
            sent = len(gzip.compress(image.read_bytes()))  # as every host sends it
            assert sent < 30_000, "draw fewer points"
        assert ".svg" not in alt


def test_landing_page_shows_the_measured_figure_and_its_machine(html, pages):
    landing = pages[html / "index.html"]
    captions = [c.text.strip() for c in landing.select("figcaption")]
    assert captions
    above = landing.select_one(".highlight").find_previous("p").text
    assert captions[-1].startswith(above.partition(" From ")[0]), "the number first"
    assert all("cores" in caption for caption in captions)


def test_first_sentence_is_the_description(page):
    first = page.select_one("section > p:not(.ran-on)").text
    description = page.select_one("meta[name=description]")["content"]
    assert description == " ".join(first.split())


def test_every_page_can_be_found_and_shared(pages, html):
    titles = [page.title.text for page in pages.values()]
    assert len(set(titles)) == len(titles), "a tab of the browser tells pages apart"
    for path, page in pages.items():
        if path.name in {"search.html", "404.html"}:
            continue
        said = page.select_one("meta[name=description]")["content"]
        assert len(said) > 30, path
        assert page.select_one("meta[property='og:description']")["content"] == said
        assert page.select_one("meta[property='og:title']")["content"]
        for link in page.select("link[rel=canonical], meta[property='og:image']"):
            pytest.fail(f"{path}: {link} needs the site's address, which is not set")


def test_thumbnails_are_light_and_of_one_size(pages, html):
    path = html / "auto_tutorials" / "index.html"
    thumbnails = pages[path].select(".sphx-glr-thumbcontainer img")
    assert len(thumbnails) == len(TUTORIALS)
    assert len({(image["width"], image["height"]) for image in thumbnails}) == 1
    for image in thumbnails:
        sent = gzip.compress((path.parent / image["src"]).read_bytes())
        assert len(sent) < 30_000, image["src"]
        own = "logo" not in image["src"]
        assert own, "a page without figures needs a drawing: _static/plot_<topic>.svg"


def test_a_gallery_with_unknown_thumbnails_fails():
    app = SimpleNamespace(env=SimpleNamespace(docname="auto_tutorials/index"))
    with pytest.raises(pictures.ExtensionError, match="thumbnails"):
        pictures.thumbnails(app, nodes.section())


def test_page_has_its_line_its_row_and_its_next(tutorial):
    """In tutorials/pages.toml, on the landing page, and where a page says "Next"."""
    name, listed = name_of(tutorial), set(runner.listed())
    assert name in listed, f"{name} has no line in tutorials/pages.toml"
    gone = listed - {name_of(page) for page in TUTORIALS}
    assert not gone, f"tutorials/pages.toml names pages that are gone: {gone}"
    landing = (ROOT / "index.rst").read_text()
    assert f"auto_tutorials/{name}" in landing, f"index.rst: a row that links to {name}"
    here = TUTORIALS.index(tutorial)
    for page, follows in itertools.pairwise(TUTORIALS[max(here - 1, 0) : here + 2]):
        _, found, text = page.read_text("utf-8").partition("\n# Next\n# ----\n")
        assert found, f"{page.stem} has no section Next, see step 9"
        first = re.search("``(plot_.*?)``", text)[1]
        assert first == follows.name, f"Next on {page.stem} begins with {follows.name}"


def test_prose_links_to_other_pages_by_title(pages, html):
    page = pages[html / "auto_tutorials" / "speed" / "plot_when_vmap_pays.html"]
    links = {link.text: link["href"] for link in page.select("p a, li a")}
    assert links["What vmap really runs"] == "plot_what_vmap_runs.html"
    assert "plot_memory.py" not in page.select_one("article").text


def test_formulas_are_drawn_by_the_browser(pages, html):
    page = pages[html / "auto_tutorials" / "speed" / "plot_when_vmap_pays.html"]
    assert page.select(".formula math")
    assert not page.select("script[src*=mathjax]")


def test_downloads(page):
    for place in [".bd-sidebar-secondary", ".sphx-glr-footer"]:
        links = [link["href"] for link in page.select(f"{place} a[download]")]
        assert any(link.endswith(".ipynb") for link in links), place
        assert any(link.endswith(".py") for link in links), place


@pytest.mark.parametrize(("kind", "suffix"), [("jupyter", "ipynb"), ("python", "py")])
def test_one_download_holds_all_pages(html, pages, kind, suffix):
    (link,) = pages[html / "index.html"].select(f"a[download][href$={kind}\\.zip]")
    with zipfile.ZipFile(html / link["href"]) as archive:
        names = {name for name in archive.namelist() if name.endswith(suffix)}
    assert names == {f"{name_of(tutorial)}.{suffix}" for tutorial in TUTORIALS}


def test_names_of_torch_link_to_its_documentation(site, page, tutorial):
    found = json.loads(
        (site / "auto_tutorials" / f"{name_of(tutorial)}.codeobj.json").read_text()
    )
    linked = {
        re.sub(r"\s", "", link.text)
        for link in page.select(".highlight-Python a, .highlight-python a")
    }
    cells = runner.split(tutorial.read_text(encoding="utf-8"))
    code = "\n".join(cell.code for cell in cells)
    missing = []
    for written, candidates in found.items():
        full = f"{candidates[-1]['module']}.{candidates[-1]['name']}"
        is_public_name = full.startswith("torch.") and full.endswith(f".{written}")
        if "." in written:
            is_public_name = full.startswith("torch.") and written.split(".")[0] in {
                "F",
                "nn",
                "torch",
            }
        # Sphinx-Gallery makes no links of decorators.
        called = re.search(rf"(?<!@)\b{re.escape(written)}\b", code)
        is_public_name = is_public_name and "._" not in full and called
        if is_public_name and full not in UNDOCUMENTED and written not in linked:
            missing.append(full)
    assert not missing, f"add to inventories/torch.txt: {missing}"
    assert "vmap" in linked or "torch.func.vmap" in linked


def test_no_leftovers_of_sphinx_gallery(pages):
    for path, page in pages.items():
        assert path.name != "sg_execution_times.html"
        assert "Go to the end" not in page.text, path
        assert "Total running time" not in page.text, path


def test_initials_do_not_make_a_list(pages):
    for path, page in pages.items():
        assert not page.select("ol.upperalpha"), f"{path}: write names without initials"


def test_ids_are_unique(pages):
    for path, page in pages.items():
        ids = [element["id"] for element in page.select("[id]")]
        twice = {name for name in ids if ids.count(name) > 1}
        assert not twice, f"{path}: {twice}"


def test_links_and_anchors_lead_somewhere(pages, html):
    ids = {path: {e["id"] for e in page.select("[id]")} for path, page in pages.items()}
    broken = []
    for path, page in pages.items():
        for link in page.select("a[href], link[href], img[src], script[src]"):
            url = link.get("href") or link.get("src")
            if urlsplit(url).scheme or url == "#":
                continue
            file, anchor = urldefrag(url)
            file = unquote(urlsplit(file).path)
            base = html if file.startswith("/") else path.parent
            target = (base / file.lstrip("/")).resolve() if file else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists() or (anchor and anchor not in ids.get(target, ())):
                broken.append(f"{path.name}: {url}")
    assert not broken


def test_pages_that_stood_once_still_stand(pages, html):
    """Take nothing out of the file: addresses of pages never change."""
    lines = (ROOT / "tests" / "addresses.txt").read_text().splitlines()
    gone = [line for line in lines if html / line not in pages]
    assert not gone, f"add {gone} again, or a page that leads to what took its place"


def test_pages_ask_no_other_host(pages):
    for path, page in pages.items():
        for element in page.select("script[src], img[src], iframe[src], source[src]"):
            assert not urlsplit(element["src"]).netloc, f"{path}: {element}"
        for element in page.select("link[href]"):
            assert not urlsplit(element["href"]).netloc, f"{path}: {element}"
