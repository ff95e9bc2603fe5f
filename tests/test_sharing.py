"""A site whose address and repository are known: how it is found and shared."""

import re

import pytest
from bs4 import BeautifulSoup
from PIL import Image
from small import build, make_small

ADDRESS = "https://example.org/ensembles"


@pytest.fixture(scope="session")
def shared(once):
    """A small site with an address and a repository; nothing ran."""

    def build_it(site):
        make_small(site)
        options = [f"-Dhtml_baseurl={ADDRESS}/", "-Drepository=someone/ensembles"]
        done = build(site, "-Dplot_gallery=0", *options)
        assert done.returncode == 0, done.output

    return once("shared", build_it)


def soup(site, name):
    path = site / "_build" / "html" / f"{name}.html"
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def test_pages_have_an_address_and_a_card(shared):
    name = "auto_tutorials/basics/plot_alpha"
    page = soup(shared, name)
    assert page.select_one("link[rel=canonical]")["href"] == f"{ADDRESS}/{name}.html"
    assert page.select_one("meta[property='og:url']")["content"].startswith(ADDRESS)
    card = page.select_one("meta[property='og:image']")["content"]
    picture = shared / "_build" / "html" / card.removeprefix(f"{ADDRESS}/")
    with Image.open(picture) as image:
        assert image.size == (1200, 630)
    other = soup(shared, "auto_tutorials/basics/plot_beta")
    assert other.select_one("meta[property='og:image']")["content"] != card


def test_search_engines_find_every_page(shared):
    html = shared / "_build" / "html"
    listed = re.findall("<loc>(.*)</loc>", (html / "sitemap.xml").read_text())
    assert f"{ADDRESS}/auto_tutorials/basics/plot_alpha.html" in listed
    for address in listed:
        assert (html / address.removeprefix(f"{ADDRESS}/")).exists()
    assert f"{ADDRESS}/sitemap.xml" in (html / "robots.txt").read_text()


def test_a_wrong_address_leads_back_from_any_depth(shared):
    page = soup(shared, "404")
    assert page.select_one("base")["href"] == f"{ADDRESS}/"
    for place in ["index.html", "auto_tutorials/index.html", "search.html"]:
        assert page.select(f"article a[href='{place}']"), place


def test_links_to_the_repository(shared):
    alpha = soup(shared, "auto_tutorials/basics/plot_alpha")
    links = {a.text: a["href"] for a in alpha.select(".bd-sidebar-secondary a[href]")}
    home = "github.com/someone/ensembles"
    source = "blob/main/tutorials/basics/plot_alpha.py"
    assert links["Source on GitHub"] == f"https://{home}/{source}"
    assert links["Report a problem on this page"].startswith(f"https://{home}/issues/")
    notebook = links["Open in Colab"].partition("/blob/main/")[2]
    assert (shared / notebook).exists()
    beta = soup(shared, "auto_tutorials/basics/plot_beta")  # not recorded
    assert "Open in Colab" not in beta.text


def test_without_a_repository_nothing_links_to_one(built_once):
    page = soup(built_once, "auto_tutorials/basics/plot_alpha")
    assert not page.select("a[href*=github], a[href*=colab]")


def test_notebooks_link_to_the_pages_of_the_site(shared):
    notebook = (shared / "auto_tutorials/basics/plot_beta.ipynb").read_text()
    assert f"[`plot_alpha.py`]({ADDRESS}/auto_tutorials/basics/plot_alpha" in notebook


def test_the_recorded_notebook_is_offered(shared):
    alpha = soup(shared, "auto_tutorials/basics/plot_alpha")
    link = alpha.select_one(".ran-on a[download]")
    assert (shared / "_build/html/auto_tutorials/basics" / link["href"]).exists()
