"""The documentation that ``make docs`` has built, in a browser: every page, the navigation, anchors and the search."""

import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

api = pytest.importorskip("playwright.sync_api", reason="`make docs` runs this in an environment that has playwright")
SITE = Path(__file__).parents[2] / "build" / "site"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")

pytestmark = [
    pytest.mark.slow,  # a browser opens every page
    pytest.mark.skipif(not SITE.exists(), reason="`make docs` builds the site"),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def root() -> Iterator[str]:
    with ThreadingHTTPServer(("localhost", 0), partial(Quiet, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def faults() -> list[str]:
    return []


@pytest.fixture
def page(root: str, faults: list[str]) -> Iterator["api.Page"]:
    """A page that notes what goes wrong: console, exceptions, failed requests, anything loaded from elsewhere."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no browser: apt-get install --no-install-recommends chromium-headless-shell")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser).new_page()
        opened.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
        opened.on("pageerror", lambda error: faults.append(str(error)))
        opened.on("response", lambda answer: answer.ok or answer.status == 304 or faults.append(answer.url))
        opened.on("request", lambda request: request.url.startswith(root) or faults.append(request.url))
        yield opened


def built_pages(root: str) -> set[str]:
    return {root + path.parent.relative_to(SITE).as_posix().removeprefix(".") for path in SITE.rglob("index.html")}


def test_the_navigation_and_the_links_lead_to_every_page_and_anchor(
    page: "api.Page", root: str, faults: list[str]
) -> None:
    """Clicks from each page to the next, then opens what only links lead to."""
    empty = json.loads((SITE / "search" / "search_index.json").read_text(encoding="utf-8")) | {"docs": []}
    page.route("**/search_index.json", lambda route: route.fulfill(json=empty))  # indexing takes longer than a page
    anchors: dict[str, set[str]] = {}
    links: set[tuple[str, str]] = set()

    def read() -> None:
        assert faults == [], page.url
        assert page.locator("h1").count() == 1, page.url
        anchors[page.url] = set(page.eval_on_selector_all("[id]", "found => found.map(each => each.id)"))
        targets = page.eval_on_selector_all("a[href]", "links => links.map(link => link.href)")
        links.update(urldefrag(unquote(target)) for target in targets if target.startswith(root))

    page.goto(root)
    read()
    following = page.locator(".md-footer__link--next")
    while following.count():
        following.click()
        page.wait_for_load_state()
        assert page.url not in anchors
        read()
    assert len(anchors) > 20
    while unread := {target for target, _ in links if target.endswith("/")} - set(anchors):
        page.goto(unread.pop())
        read()
    assert {url.rstrip("/") for url in anchors} == {url.rstrip("/") for url in built_pages(root)}
    assert len(links) > 200
    assert not [link for link in links if link[1] and link[1] not in anchors[link[0]]]


def test_the_search_finds_an_option(page: "api.Page", root: str, faults: list[str]) -> None:
    page.goto(root)
    page.locator(".md-search__input").first.click()
    page.keyboard.type("convert_state")
    page.locator(".md-search-result__item").first.wait_for(timeout=20_000)
    assert "convert_state" in page.locator(".md-search-result__list").inner_text()
    assert faults == []
