"""A site whose address and repository are known: how it is found and shared."""

import sys

import pytest
from bs4 import BeautifulSoup
from conftest import run
from PIL import Image
from small import make_small

import noxfile

ADDRESS = "https://example.org/ensembles"
KNOWN = {"SITE_URL": ADDRESS, "REPOSITORY": "someone/ensembles"}


@pytest.fixture(scope="session")
def shared(once):
    """A small site with an address and a repository."""

    def build_it(site):
        command = [sys.executable, "-m", "sphinx", *noxfile.sphinx_options("html")]
        done = run(*command, ".", "_build/html", cwd=make_small(site), **KNOWN)
        assert done.returncode == 0, done.stderr

    return once("shared", build_it)


def soup(site, name):
    path = site / "_build" / "html" / f"{name}.html"
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def test_pages_have_an_address_and_a_card(shared):
    name = "auto_tutorials/basics/plot_alpha"
    page = soup(shared, name)
    assert page.select_one("link[rel=canonical]")["href"] == f"{ADDRESS}/{name}.html"
    tags = {tag["property"]: tag["content"] for tag in page.select("meta[property]")}
    assert tags["og:url"] == f"{ADDRESS}/{name}.html"
    picture = tags["og:image"].removeprefix(f"{ADDRESS}/")
    with Image.open(shared / "_build" / "html" / picture) as image:
        assert image.size == (1200, 630)
        assert image.convert("L").getextrema()[0] < 100, "nothing is drawn"
    assert "alpha" in picture, "each page has its own"
    assert tags["og:image:alt"] == "alpha"


def test_search_engines_find_every_page(shared):
    html = shared / "_build" / "html"
    listed = set((html / "sitemap.txt").read_text().split())
    found = {f"{ADDRESS}/{path.relative_to(html)}" for path in html.rglob("*.html")}
    left_out = {f"{ADDRESS}/{name}.html" for name in ["404", "search"]}
    assert listed == {name for name in found - left_out if "_static" not in name}


def test_a_wrong_address_leads_back_from_any_depth(shared):
    page = soup(shared, "404")
    for place in ["index.html", "auto_tutorials/index.html", "search.html"]:
        assert page.select(f"article a[href='/ensembles/{place}']"), place
    for key in ["href", "src", "action"]:
        for tag in page.select(f"[{key}]"):
            assert tag[key].startswith(("/ensembles/", "#", ADDRESS)), tag
    assert not page.select("base"), "the link to the content would leave the page"


def test_links_to_the_repository(shared, built_once):
    alpha = soup(shared, "auto_tutorials/basics/plot_alpha")
    links = {a.text: a["href"] for a in alpha.select(".bd-sidebar-secondary a[href]")}
    main = "github.com/someone/ensembles/blob/main"
    assert links["Source on GitHub"].endswith(f"{main}/tutorials/basics/plot_alpha.py")
    assert "plot_alpha" in links["Report a problem on this page"]
    notebook = "recordings/gpu/basics/plot_alpha.ipynb"
    assert links["Open in Colab"].endswith(notebook)
    assert (shared / notebook).exists()
    beta = soup(shared, "auto_tutorials/basics/plot_beta")  # not recorded
    assert "Open in Colab" not in beta.text
    unknown = soup(built_once, "auto_tutorials/basics/plot_alpha")
    assert not unknown.select("a[href*=github], a[href*=colab]")


def test_notebooks_link_to_the_pages_of_the_site(shared):
    notebook = (shared / "auto_tutorials/basics/plot_beta.ipynb").read_text()
    assert f"[`plot_alpha.py`]({ADDRESS}/auto_tutorials/basics/plot_alpha" in notebook
