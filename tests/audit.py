"""Lighthouse and html-validate on the built site, page by page: ``make audit``.

It needs a built site (make html or html-noplot), Node.js with npx, which downloads
both tools, and Chromium. Every page is measured twice, as a phone and as a desktop, and
takes half a minute; ``make audit PAGES=index`` measures those whose address holds that.
"""

import contextlib
import functools
import gzip
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

HTML = Path(__file__).parent.parent / "_build" / "html"
LIGHTHOUSE, HTML_VALIDATE = "lighthouse@12.8.2", "html-validate@10.17.0"
GOALS = {
    "performance": {"mobile": 0.92, "desktop": 0.99},
    "accessibility": {"mobile": 1, "desktop": 1},
    "best-practices": {"mobile": 1, "desktop": 1},
    "seo": {"mobile": 1, "desktop": 1},
}
COMPRESSED = {".html", ".css", ".js", ".svg", ".json", ".txt", ".xml"}


@functools.cache
def compressed(path):
    return gzip.compress(path.read_bytes())


class Handler(http.server.SimpleHTTPRequestHandler):
    """Sends files compressed, as every host does."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        self.send_response(200)
        if path.suffix in COMPRESSED:
            content = compressed(path)
            self.send_header("Content-Encoding", "gzip")
        else:
            content = path.read_bytes()
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "max-age=600")
        self.end_headers()
        return self.wfile.write(content)


@contextlib.contextmanager
def serve(folder):
    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def lighthouse(address, form, report):
    """Lighthouse's report of one page; form is mobile or desktop."""
    options = ["--preset=desktop"] * (form == "desktop")
    flags = "--chrome-flags=--headless --no-sandbox --disable-gpu"
    subprocess.run(
        [
            *["npx", "--yes", LIGHTHOUSE, address, *options, flags, "--quiet"],
            *["--output=json", f"--output-path={report}"],
        ],
        check=True,
    )
    return json.loads(report.read_text(encoding="utf-8"))


def audit(name, address, folder):
    """Print a page's figures; return what misses its goal."""
    missed = []
    for form in ["mobile", "desktop"]:
        report = lighthouse(f"{address}/{name}", form, folder / "report.json")
        scores = {key: part["score"] for key, part in report["categories"].items()}
        facts = [
            report["audits"][key]["displayValue"].replace("\xa0", " ")
            for key in ["first-contentful-paint", "cumulative-layout-shift"]
        ]
        size = report["audits"]["total-byte-weight"]["numericValue"] / 1024
        print(
            f"{name:62} {form:8}",
            *(f"{scores[key] * 100:4.0f}" for key in GOALS),
            f"  {facts[0]:>6} {facts[1]:>6} {size:5.0f} KiB",
            flush=True,
        )
        missed += [
            f"{name}, {form}: {key} {scores[key] * 100:.0f}"
            for key, goals in GOALS.items()
            if scores[key] < goals[form]
        ]
    return missed


def main(words):
    pages = sorted(path.relative_to(HTML).as_posix() for path in HTML.rglob("*.html"))
    # No score for pages that search engines are told not to list, nor for a template.
    left_out = {"search.html", "404.html", "_static/webpack-macros.html"}
    pages = [page for page in pages if page not in left_out]
    pages = [page for page in pages if any(word in page for word in words or [""])]
    if not pages:
        sys.exit(f"no page in {HTML} matches: build the site first (make html)")
    if not shutil.which("npx"):
        sys.exit("make audit needs npx: install Node.js")
    chrome = shutil.which("chromium") or shutil.which("google-chrome")
    if chrome:
        os.environ["CHROME_PATH"] = chrome
    command = ["npx", "--yes", HTML_VALIDATE, "--preset", "standard"]
    valid = subprocess.run([*command, *(str(HTML / page) for page in pages)])
    print(f"{'page':62} form     perf acce best  seo   paint  shift     size")
    with serve(HTML) as address, tempfile.TemporaryDirectory() as folder:
        missed = [
            fault for page in pages for fault in audit(page, address, Path(folder))
        ]
    print("\n".join(missed) or "every page reaches its goals")
    sys.exit(bool(missed) or valid.returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
