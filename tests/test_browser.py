"""The pages in a real browser: themes, widths, keyboard-free basics, no other host."""

import io
import shutil
from pathlib import Path

import conftest
import pytest
from audit import serve
from axe_playwright_python.sync_playwright import Axe
from conftest import GPU, TUTORIALS, name_of
from PIL import Image
from playwright.sync_api import sync_playwright

import runner

PAGES = ["index", "404", "auto_tutorials/index"] + [
    f"auto_tutorials/{name_of(tutorial)}" for tutorial in TUTORIALS
]
TUTORIAL = "auto_tutorials/basics/plot_ensembling"
HERE = runner.short_name(runner.this_machine())
FOR_AXE = PAGES if conftest.ALL else ["index", "404", "auto_tutorials/index", TUTORIAL]

# Faults of the theme itself, seen in pydata-sphinx-theme 0.24.0.
KNOWN_TO_AXE = {"summary-name"}  # the arrow that unfolds a section has no text


@pytest.fixture(scope="session")
def address(html):
    """Address of the site on this machine."""
    with serve(html) as address:
        yield address


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium: the system's, or else Playwright's own."""
    system = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        if not system and not Path(playwright.chromium.executable_path).exists():
            pytest.fail(
                "no Chromium here: 'apt install chromium', or "
                "'.venv/bin/python -m playwright install chromium'"
            )
        browser = playwright.chromium.launch(
            executable_path=system, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def context(chromium):
    """One for all tests: what all pages load is loaded once."""
    with chromium.new_context() as context:
        context.set_default_timeout(120_000)  # other tests run beside this one
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        yield context


@pytest.fixture
def visit(context, address):
    """Open a page of the site; fail on any error in it and on any other host."""
    opened, problems = [], []

    def on_console(message):
        if message.type == "error":
            problems.append(message.text)

    def on_request(request):
        if not request.url.startswith((address, "data:")):
            problems.append(f"other host: {request.url}")

    def open_page(name, width=1280, theme="light", system_theme="light"):
        page = context.new_page()
        opened.append(page)
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=system_theme)
        page.add_init_script(f"localStorage.setItem('mode', '{theme}')")
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", on_console)
        page.on("requestfailed", lambda request: problems.append(request.url))
        page.on("request", on_request)
        page.goto(f"{address}/{name}", wait_until="load")
        return page

    yield open_page
    for page in opened:
        page.evaluate("localStorage.clear()")
        page.close()
    assert not problems


def faults(page):
    """Faults of accessibility, new ones: name -> an element."""
    found = Axe().run(page, options={"preload": False}).response["violations"]
    new = {fault["id"]: fault["nodes"][0]["html"] for fault in found}
    return {name: new[name] for name in new if name not in KNOWN_TO_AXE}


FIRST_ANSWER = r"""() => {
    const cells = [...document.querySelectorAll('.highlight-Python')];
    const words = /^def |vmap\(|stack_module_state\(/m;
    const first = cells.find(cell => words.test(cell.innerText));
    return first.getBoundingClientRect().top + window.scrollY;
}"""


LOADED = """document.fonts.ready.then(
    () => performance.getEntriesByType('resource').map(entry => entry.name))"""


@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_desktop_and_a_phone(visit, name):
    """One load a page: width, where its lines to copy begin, icons, accessibility."""
    page = visit(f"{name}.html")
    if "plot_" in name:
        top = page.evaluate(FIRST_ANSWER)
        assert top < 1800, f"the lines to copy begin at {top:.0f} pixels: less before"
    # Colors that still fade into place would be taken for the final ones.
    page.add_style_tag(content="*, ::before, ::after { transition: none !important }")
    for width, theme in [(1280, "light"), (360, "dark")]:
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate("name => document.documentElement.dataset.theme = name", theme)
        scroll = page.evaluate("document.documentElement.scrollWidth")
        assert scroll <= width, f"wider than {width} pixels"
        fonts = [name for name in page.evaluate(LOADED) if "fa-solid" in name]
        assert not fonts, "an icon is shown that ICONS in _ext/icons.py does not have"
        if name in FOR_AXE:
            page.wait_for_timeout(
                500
            )  # the theme makes wide boxes reachable after that
            assert not faults(page), f"{theme}, {width} pixels wide"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_follow_the_theme_and_not_the_system(visit, theme):
    system_theme = {"light": "dark", "dark": "light"}[theme]
    page = visit(f"{TUTORIAL}.html", theme=theme, system_theme=system_theme)
    figure = page.locator("img.tutorial-figure").first
    figure.scroll_into_view_if_needed()
    image = Image.open(io.BytesIO(figure.screenshot())).convert("L")
    background, (darkest, brightest) = image.getpixel((1, 1)), image.getextrema()
    if theme == "light":
        assert background > 230
        assert darkest < 80, "no dark ink on a light page"
    else:
        assert background < 50
        assert brightest > 200, "no bright ink on a dark page"


def test_code_has_copy_buttons_and_output_has_none(visit):
    page = visit(f"{TUTORIAL}.html")
    assert page.locator(".highlight button.copybtn").count() > 5
    assert page.locator(".sphx-glr-script-out button.copybtn").count() == 0


WANTED = {
    "stack_module_state": "basics/plot_ensembling",
    "vmap slower than for loop": "speed/plot_what_vmap_runs",
    "different learning rate per model": "training/plot_hyperparameter_sweep",
    "batch norm vmap": "training/plot_state",
    "out of memory": "speed/plot_memory",
    "combine_state_for_ensemble": "basics/plot_from_functorch",
    "randomness error": "basics/plot_what_vmap_refuses",
    "out of distribution": "uncertainty/plot_unknown_inputs",
    "weight decay per model": "training/plot_hyperparameter_sweep",
    "ensemble faster inference": "speed/plot_fastest_ensemble",
    "multiple gpus": "scale/plot_many_devices",
}


def test_search_finds_the_page_among_the_first_three(visit):
    for typed, wanted in WANTED.items():
        page = visit(f"search.html?q={typed.replace(' ', '+')}")
        results = page.locator("#search-results li a")
        results.nth(0).wait_for()
        first = [link.get_attribute("href") for link in results.all()[:3]]
        assert any(wanted in link for link in first), f"{typed}: {first}"


def test_the_layout_does_not_shift(visit):
    page = visit(f"{TUTORIAL}.html")
    shifts = """() => new Promise(resolve => {
        const found = [];
        new PerformanceObserver(list => {
            found.push(...list.getEntries().map(entry => entry.value));
        }).observe({type: "layout-shift", buffered: true});
        setTimeout(() => resolve(found), 500);
    })"""
    assert sum(page.evaluate(shifts)) < 0.01


def test_reader_walks_by_previous_and_next(visit):
    page = visit("index.html")
    for _ in range(3):
        page.locator(".prev-next-area a.right-next").click()
    assert page.url.endswith(f"{TUTORIAL}.html")
    page.locator(".prev-next-area a.left-prev").click()


def test_cards_of_the_gallery_lead_to_their_pages(visit):
    page = visit("auto_tutorials/index.html")
    card = page.locator(".sphx-glr-thumbcontainer").first
    assert "loop over the models" in card.get_attribute("tooltip")
    card.click()
    page.wait_for_load_state()
    assert page.url.endswith(f"{TUTORIAL}.html")


def test_phone_offers_the_downloads(visit):
    page = visit(f"{TUTORIAL}.html", width=390)
    links = page.locator(".sphx-glr-footer a:visible").all_inner_texts()
    assert len(links) == 2, "script and notebook"


def shown(page):
    """Label of the chosen tab of every tab set, without repetition."""
    chosen = page.locator(".machines > input:checked + label").all_inner_texts()
    return {label.strip() for label in chosen}


def test_choosing_a_machine_switches_the_whole_page_and_is_remembered(visit):
    page = visit(f"{TUTORIAL}.html")
    assert page.locator(".machines").count() > 3
    page.locator(".machines > label", has_text=GPU).first.click()
    assert shown(page) == {GPU}
    label = page.locator(".machines > label", has_text=HERE).nth(2)
    label.scroll_into_view_if_needed()
    before = label.bounding_box()["y"]
    label.click()
    assert shown(page) == {HERE}
    assert abs(label.bounding_box()["y"] - before) < 3, "the page jumped"
    page.reload()
    assert shown(page) == {HERE}
    assert "imaginary" not in page.locator("article").inner_text()


@pytest.mark.parametrize("name", ["index", "auto_tutorials/index", TUTORIAL])
def test_text_at_twice_its_size_loses_nothing(visit, name):
    page = visit(f"{name}.html")
    page.add_style_tag(content="html { font-size: 200% !important }")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    cut = """() => [...document.querySelectorAll("article :is(h1, h2, h3, p, li)")]
        .filter(element => element.checkVisibility()
            && getComputedStyle(element).display == "block"
            && element.scrollWidth > element.clientWidth + 1)
        .map(element => element.textContent)"""
    assert not page.evaluate(cut)
    title, link = (
        page.locator(f".bd-header {part}").first.bounding_box()
        for part in (".logo__title", ".nav-link")
    )
    assert title["x"] + title["width"] <= link["x"], "the header's words overlap"


def test_figures_and_text_are_seen_with_forced_colors(visit):
    page = visit(f"{TUTORIAL}.html", system_theme="dark")
    page.emulate_media(forced_colors="active")
    page.locator("img.tutorial-figure").first.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    image = Image.open(io.BytesIO(page.screenshot())).convert("L")
    assert image.getpixel((2, 890)) < 50, "the system's background"
    figure = page.locator("img.tutorial-figure").first.screenshot()
    darkest, brightest = Image.open(io.BytesIO(figure)).convert("L").getextrema()
    assert brightest - darkest > 150, "ink that differs from the background"


def test_code_of_a_figure_is_folded_and_can_be_reached(visit):
    page = visit(f"{TUTORIAL}.html")
    folded = page.locator("details.figure-code").first
    code = folded.locator("pre").first
    assert not code.is_visible()
    folded.locator("summary").focus()
    page.keyboard.press("Enter")
    assert code.is_visible()
    assert folded.locator("button.copybtn").count() == 1


def test_print_shows_every_machine_and_all_code(visit):
    page = visit(f"{TUTORIAL}.html")
    page.emulate_media(media="print")
    panels = page.locator(".machines > .sd-tab-content")
    assert panels.count() > 6
    assert all(panel.is_visible() for panel in panels.all())
    assert page.locator("details.figure-code pre").first.is_visible()
    navigation = ".bd-sidebar-primary, .bd-sidebar-secondary, .prev-next-footer, nav"
    buttons = ".copybtn, .search-button__button, .theme-switch-button"
    shown = page.locator(f":is({navigation}, {buttons}):visible")
    assert not shown.all(), shown.first.evaluate("element => element.outerHTML")
