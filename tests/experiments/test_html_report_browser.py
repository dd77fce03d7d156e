"""The page of a run in a browser: Debian's chromium, driven by playwright.

    python -m pip install -e '.[test,report]' playwright && apt-get install chromium
    EHI_RUN=runs/pydocs python -m pytest -n 0 -s -m slow -k browser tests/experiments

EHI_RUN names a finished run that is opened too; `-s` shows versions and sizes, and
EHI_SCREENSHOTS a folder for pictures. Nothing is downloaded.
"""

import os
import re
import shutil
from pathlib import Path

import page_cases
import pytest

from ehi.eval.records import read_records
from ehi.index import open_index
from experiments.html_report.page import write_html

CHROMIUM = shutil.which("chromium")
MARKUP = "</script><script>"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium"),
]
RUNS = ["by hand", *filter(None, [os.environ.get("EHI_RUN")])]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    plotly = pytest.importorskip("plotly", reason="a page needs the extra `report`")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], headless=True
        )
        print(f"\nchromium {opened.version}, plotly {plotly.__version__}")
        yield opened
        opened.close()


PAGES = {}  # run -> its workdir and page, made once


@pytest.fixture(params=RUNS)
def case(request, tmp_path_factory, make_record):
    """The workdir, and the file of its page."""
    if request.param not in PAGES:
        folder = tmp_path_factory.mktemp("page")
        workdir = Path(request.param)
        if request.param == "by hand":
            workdir = folder / "run"
            page_cases.write_workdir(workdir, make_record)
        path = write_html(folder / "report.html", [workdir])
        PAGES[request.param] = workdir, path
        print(f"\n{workdir.name}: {path.stat().st_size / 1e6:.1f} MB", end=" ")
    return PAGES[request.param]


@pytest.fixture
def page(browser, case):
    """The opened page, after which nothing may have been fetched or complained of."""
    requests, complaints = [], []
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.on("request", lambda found: requests.append(found.url))
    opened.on("console", lambda said: complaints.append(said.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda shown: complaints.append(shown.message))
    opened.goto(case[1].as_uri())
    opened.wait_for_selector("#tree-figure .slice")
    yield opened
    assert complaints == []
    # A data: address holds its picture itself.
    asked = {url for url in requests if not url.startswith("data:")}
    assert asked == {case[1].as_uri()}
    opened.close()


@pytest.mark.parametrize("width", [1280, 375])
def test_the_browser_shows_the_page_without_overflow(page, case, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.reload()
    page.wait_for_selector("#tree-figure .slice")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert case[1].stat().st_size < 10e6
    said = page.locator("#winner-said").inner_text()
    assert said.startswith("At the smallest budget (2% visited)")
    print(f"\n{width} px: {said}", end=" ")
    if folder := os.environ.get("EHI_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{case[0].name}-{width}.png", full_page=True)


def test_hovered_values_in_the_browser_equal_the_records(page, case):
    records = read_records(case[0] / "results.jsonl")
    record = next(r for r in records if (r.system, r.budget) == ("ehi", "visit-2"))
    # Where the point is: the axes of plotly turn data into pixels.
    place = page.evaluate(
        """([x, y]) => {
          const figure = document.getElementById("cost-figure");
          figure.scrollIntoView({block: "center", behavior: "instant"});
          const {xaxis, yaxis} = figure._fullLayout;
          const box = figure.getBoundingClientRect();
          return [box.left + xaxis._offset + xaxis.d2p(x),
                  box.top + yaxis._offset + yaxis.d2p(y)];
        }""",
        [100 * record.docs_visited, record.ndcg_at_10],
    )
    page.mouse.move(place[0] - 30, place[1] - 30)
    page.mouse.move(*place, steps=5)
    shown = page.locator("#cost-figure .hoverlayer .hovertext").first
    shown.wait_for()
    lines = shown.locator("tspan.line")
    text = "\n".join(lines.evaluate_all("all => all.map((one) => one.textContent)"))
    values = record.to_json()
    assert f"nDCG@10: {values['ndcg@10']}" in text and "ehi, 2% visited" in text
    visited = re.search(r"Documents visited: ([\d.]+)%", text)[1]
    assert float(visited) == pytest.approx(100 * values["docs_visited"], rel=1e-6)


def test_a_click_on_the_legend_of_the_browser_hides_a_trace(page):
    toggles = page.locator("#cost-figure .legendtoggle")
    drawn = page.locator("#cost-figure .trace")
    before = drawn.count()
    toggles.first.scroll_into_view_if_needed()
    toggles.first.click()
    fewer = "n => document.querySelectorAll('#cost-figure .trace').length < n"
    page.wait_for_function(fewer, arg=before)
    hidden = "document.getElementById('cost-figure').data[0].visible"
    assert page.evaluate(hidden) == "legendonly"


def test_search_in_the_browser_narrows_the_queries(page):
    page.locator("[data-outcome=all]").click()
    listed = page.locator("#query-list > li")
    before = listed.count()
    assert before > 1
    name = page.evaluate("DATA.queries.names[1]")
    page.locator("#query-search").fill(name)
    assert 1 <= listed.count() < before
    assert name in listed.first.inner_text()
    page.locator("#query-search").fill("no query has these words")
    assert listed.count() == 0
    assert page.locator("#query-count").inner_text().startswith("0 queries")


def test_a_query_opens_in_the_browser_with_hits_and_leaves(page):
    losing = page.locator("[data-outcome=loses]")
    assert losing.get_attribute("aria-pressed") == "true"
    page.locator("#query-list summary").first.click()
    opened = page.locator("#query-list .opened").first
    assert opened.locator("ol.hits").count() == 2
    assert opened.locator(".judged").count() >= 1
    button = opened.locator(".leaves button").first
    name = button.inner_text()
    button.click()
    assert page.locator("#leaf-shown h3").inner_text().startswith(f"leaf {name} of ehi")


def test_a_click_on_a_leaf_in_the_browser_lists_its_documents(page, case):
    page.locator("#tree-figure").scroll_into_view_if_needed()
    tile = page.locator("#tree-figure .slice", has_text="leaf ").first
    name = tile.locator("tspan.line").first.text_content().removeprefix("leaf ")
    leaf = int(name)  # a tree of one level
    tile.click()
    page.wait_for_function(
        "leaf => document.getElementById('leaf').value === String(leaf)", arg=leaf
    )
    name = page.evaluate("DATA.trees[document.getElementById('tree-name').value].name")
    paths = (case[0] / "indexes" / name, case[0] / "index")
    index = open_index(next(path for path in paths if path.exists()))
    expected = list(index.external_ids(index.contents.rows_in_leaf(leaf)))
    items = page.locator("#leaf-shown li")
    shown = items.evaluate_all("found => found.map((item) => item.dataset.id)")
    assert shown == [str(doc_id) for doc_id in expected] and shown


def test_markup_in_ids_stays_text_in_the_browser(page, case):
    if case[0].name != "run":
        pytest.skip("the ids of this run have no markup")
    page.locator("#leaf").select_option("0")  # its first document is the hostile one
    first = page.locator("#leaf-shown li").first
    assert "<i>socket</i> 0" in first.inner_text() and MARKUP in first.inner_text()
    assert first.locator("i, b, script").count() == 0
    assert "<u>" in page.locator("#query-list summary").first.inner_text()


def test_a_click_in_the_browser_sorts_the_table(page, case):
    head = page.locator("#result-table th", has=page.get_by_text("nDCG@10", exact=True))
    column = page.locator("#result-table tbody tr td:nth-child(6)")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    values = [float(text.split()[0]) for text in column.all_inner_texts()]
    assert values == sorted(values, reverse=True)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    values = [float(text.split()[0]) for text in column.all_inner_texts()]
    assert values == sorted(values) and len(values) == len(
        read_records(case[0] / "results.jsonl")
    )
