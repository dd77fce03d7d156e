"""The search page in a real browser: Chromium, driven by playwright.

    apt-get install -y chromium && pip install playwright
    python -m pytest -m slow tests/serve/test_page.py

`EHI_SERVE_RESULTS` names a folder that keeps what the browser showed.
"""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from serve_cases import NUM, command, make_folder

from ehi.index import open_index

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium"),
]
HOSTILE = "<img src=x onerror=window.harmed=1><script>window.harmed=1</script>"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        # The sandbox of Chromium does not start for root.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents whose texts would do harm if they were read as HTML, or run wide."""
    about = [{"lang": "de" if i % 3 else "en"} for i in range(NUM)]
    documents = [{"title": f"{HOSTILE} {i}", "line": "wide" * 100} for i in range(NUM)]
    path = tmp_path_factory.mktemp("page") / "index"
    return make_folder(path, metadata=about, documents=documents)


@contextlib.contextmanager
def opened(browser, port, *, width=1000, path="/"):
    """The page; it must ask nobody else, report no error, and run no text."""
    context = browser.new_context(viewport={"width": width, "height": 800})
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console",
        lambda said: (
            said.type == "error"
            and "status of 4" not in said.text  # answers that refuse
            and wrong.append(said.text)
        ),
    )
    origin = f"http://127.0.0.1:{port}/"
    page.on(
        "request",
        lambda sent: (
            sent.url.startswith((origin, "data:")) or wrong.append(f"asks {sent.url}")
        ),
    )
    page.set_default_timeout(20_000)
    page.goto(f"{origin.rstrip('/')}{path}")
    yield page
    assert wrong == []
    assert page.evaluate("window.harmed") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def keep(page, name):
    folder = os.environ.get("EHI_SERVE_RESULTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png")


@pytest.mark.parametrize("width", [1000, 375])
def test_results_paths_and_the_documents_of_a_leaf(browser, folder, width):
    index = open_index(folder)
    hits = index.search_text("a b c")
    with command(folder) as (_, port), opened(browser, port, width=width) as page:
        page.get_by_text(f"{NUM} documents").wait_for()
        page.fill("#box", "a b c")
        page.keyboard.press("Enter")
        items = page.locator("#hits > li")
        items.first.wait_for()
        rows = [row for row in hits.rows[0].tolist() if row >= 0]
        assert items.count() == len(rows)
        titles = [index.document(row)["title"] for row in rows]
        assert page.locator("#hits h2").all_text_contents() == titles
        scores = [f"{score:.4f}" for score in hits.scores[0][: len(rows)]]
        assert page.locator(".score").all_text_contents() == scores
        leaf = int(hits.leaves[0][0])
        path = " › ".join(map(str, index.leaf_path(leaf)))
        assert f"in 1 leaf: {path}" in page.text_content("#note")
        button = items.first.locator("button.path")
        assert button.text_content() == f"leaf {path}"
        button.click()
        box = items.first.locator(".leaf")
        box.locator("li").first.wait_for()
        members = index.contents.rows_in_leaf(leaf)
        assert f"{len(members)} documents in leaf {path}" in box.text_content()
        while box.locator("button").count():
            before = box.locator("li").count()
            box.locator("button").click()
            page.wait_for_function(
                f"document.querySelectorAll('.leaf li').length > {before}"
            )
        others = [i for i in members.tolist() if i != rows[0]]
        shown = box.locator("li").all_text_contents()
        assert [text.split(" wide")[0] for text in shown] == [
            index.document(row)["title"] for row in others
        ]
        keep(page, f"hostile-{width}")
        button.click()
        assert box.is_hidden()


def test_links_filters_and_mistakes(browser, folder):
    with command(folder) as (process, port):
        with opened(browser, port, path="/#hello%20there") as page:
            page.locator("#hits > li").first.wait_for()
            assert page.input_value("#box") == "hello there"
            page.fill("#where", "lang == 'en'")
            page.keyboard.press("Enter")
            page.wait_for_function(
                "[...document.querySelectorAll('.about')]"
                ".every(about => about.textContent === 'lang: en')"
            )
            page.fill("#where", "lang == ")
            page.keyboard.press("Enter")
            page.get_by_text("cannot be read").wait_for()
            assert page.locator("#hits > li").count() == 0
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_text(f"{NUM} documents").wait_for()
        process.kill()
        process.wait()
        page.fill("#box", "a")
        page.keyboard.press("Enter")
        page.get_by_text("The service does not answer.").wait_for()
        page.close()


def test_the_token_is_asked_for_once(browser, folder):
    with (
        command(folder, EHI_TOKEN="sesame") as (_, port),
        opened(browser, port) as page,
    ):
        page.fill("#box", "a b")
        page.keyboard.press("Enter")
        page.get_by_text("This service asks for a token.").wait_for()
        keep(page, "token")
        for token, words in (("wrong", "the token is wrong"), ("sesame", "Visited")):
            page.fill("#token", token)
            page.keyboard.press("Enter")
            page.get_by_text(words).first.wait_for()
        assert page.locator("#access").is_hidden()
        page.reload()
        page.locator("#hits > li").first.wait_for()


def test_an_index_of_vectors_says_so(browser, tmp_path):
    folder = make_folder(tmp_path / "index", words=False)
    with command(folder) as (_, port), opened(browser, port) as page:
        page.get_by_text("can't be asked in words").wait_for()
        assert page.locator("#box").is_disabled()
