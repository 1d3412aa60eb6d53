"""The page of a sweep: one file, escaped, readable without JavaScript and, in Chromium, with it."""

import dataclasses
import json
import re
import shutil
import subprocess
import time
from html import escape, unescape
from html.parser import HTMLParser

import pytest
import synthetic_sweeps
from synthetic_sweeps import Dataset
from test_report import Page

from mtl_jax import sweep_files, sweep_report

MARKER = "<script>alert('x')</script>&amp;<b>"
SETS = (
    Dataset("super_glue_cb", 5, 30, "nli", ("Yes", "No", "Maybe")),
    Dataset("super_glue_copa", 4, 24, "commonsense", ("rain", "sun"), trained=True),
    Dataset("news_summary", 2, 12, "summarisation", words=150),
    Dataset("xnli_en", 2, 40, "nli", ("true", "false"), "en", base=1.0),
    Dataset("xnli_sw", 2, 40, "nli", ("kweli", "uongo"), "sw", base=-1.0),
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "my <sweep>"
    synthetic_sweeps.write_sweep(folder, SETS, marker=MARKER)
    return sweep_report.write(folder)


@pytest.fixture(scope="module")
def text(page):
    return page.read_text(encoding="utf-8")


class Shown(HTMLParser):
    """The text of the rows of each table that are not hidden, as without JavaScript."""

    def __init__(self, text):
        super().__init__()
        self.tables, self._row, self._hidden = {}, None, False
        self._heading = self._in_heading = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "h2":
            self._heading, self._in_heading = "", True
        elif tag == "tr":
            self._row, self._hidden = [], "hidden" in dict(attrs)
        elif tag in ("td", "th") and self._row is not None:
            self._row.append("")

    def handle_endtag(self, tag):
        if tag == "h2":
            self._in_heading = False
        elif tag == "tr":
            if not self._hidden:
                self.tables.setdefault(self._heading, []).append(self._row)
            self._row = None

    def handle_data(self, data):
        if self._in_heading:
            self._heading += data
        elif self._row:
            self._row[-1] += data


def test_one_file_that_fetches_nothing_and_escapes_what_models_say(text):
    page = Page(text)
    assert page.addresses == []
    assert not re.search(r"https?://|url\(|@import", text)
    assert page.tags.count("script") == 1, "the page's own"
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;amp;&lt;b&gt;") > 10
    assert "<title>my &lt;sweep&gt; · mtl_jax</title>" in text
    # Our own script must survive the template's escaping.
    assert "&&" in text[text.index("<script>") : text.index("</script>")]


def test_without_javascript_the_first_choice_is_shown(text):
    tables = Shown(text).tables
    header, *rows = tables["Results"]
    assert header[:4] == ["dataset", "every prompt", "prompts", "median, quartiles"]
    names = [row[0] for row in rows]
    assert sorted(re.match(r"(\w+\*?)p3@400 · ", name)[1] for name in names[:-1]) == [
        *("news_summary", "super_glue_cb", "super_glue_copa*", "xnli_en", "xnli_sw")
    ]
    assert names[-1].startswith("Averagep3@400 · 5 datasets")
    assert all("· 0 shots" in name for name in names)
    assert [row[1:3] for row in tables["Languages"][1:]] == [
        ["2", row[2]] for row in tables["Languages"][1:]
    ]
    expected = {
        *("Results", "T0's table", "Checkpoints side by side", "Protocols side by side"),
        *("Examples in the input", "Families of tasks", "Languages", "Prompt by prompt"),
    }
    assert expected <= tables.keys()
    assert len(tables["T0's table"]) == 3
    assert "Shown is one choice of several (checkpoint: p3@400, shots: 0" in text


def test_strips_have_a_dot_with_the_name_of_every_prompt(text):
    strips = re.findall(r'<svg class="strip".*?</svg>', text)
    assert {strip.count('class="dot"') for strip in strips} == {5, 4, 2}
    first = next(strip for strip in strips if strip.count('class="dot"') == 5)
    assert "<title>GPT-3 style 0: " in first
    assert first.count('class="majority"') == first.count('class="quartiles"') == 1


def test_a_remark_where_fewer_examples_fit_than_asked_for(tmp_path):
    one = (Dataset("rte", 2, 20, "", ("yes", "no"), language=""),)
    folder = synthetic_sweeps.write_sweep(tmp_path / "s", one, {("p3", 5): 0.0}, (0, 2))
    said = re.compile(r"no room for all solved examples .*?: (.*)\.</p>")
    assert not said.search(sweep_report.write(folder).read_text(encoding="utf-8"))
    fitting = {("rte_prompt_0", 2): 1.999, ("rte_prompt_1", 2): 2.0}
    for cell in sweep_files.cell_folders(folder):
        facts = sweep_files.read_facts(cell)
        mean = fitting.get((facts.task, facts.shots), 0.0)
        sweep_files.write_facts(cell, dataclasses.replace(facts, exemplars=mean))
    text = sweep_report.write(folder).read_text(encoding="utf-8")
    assert said.search(text)[1] == "rte_prompt_0 (1.99 of 2)"


def test_a_sweep_of_one_checkpoint_has_nothing_to_compare(tmp_path):
    one = (Dataset("rte", 1, 20, "", ("yes", "no"), language=""),)
    folder = synthetic_sweeps.write_sweep(tmp_path / "s", one, {("p3", 5): 0.0}, (0,))
    text = sweep_report.write(folder).read_text(encoding="utf-8")
    Page(text)
    tables = Shown(text).tables
    assert tables.keys() == {
        "Results",
        "Protocols side by side",
        "Prompt by prompt",
        "Predictions to read",
    }
    assert len(tables["Results"]) == 2
    assert "Average" not in str(tables)


@pytest.mark.slow
def test_a_large_sweep_gives_a_page_of_bounded_size_in_bounded_time(tmp_path):
    """200 prompts x 300 examples; and more lines than the page takes."""
    choices = ("a good one", "a bad one", "neither of them", "unknown")
    sets = [Dataset(f"data_{i}", 20, 300, f"f{i % 3}", choices, words=150) for i in range(10)]
    folder = synthetic_sweeps.write_sweep(tmp_path / "s", sets, {("p3", 1): 0.0}, (0,))
    start = time.process_time()
    page = sweep_report.write(folder)
    assert time.process_time() - start < 20
    assert page.stat().st_size < 5e6
    many = [Dataset(f"d{i}", 2, 4, "f", choices[:2]) for i in range(8)]
    skills = {("p3", step): 0.0 for step in range(10)}
    folder = synthetic_sweeps.write_sweep(tmp_path / "many", many, skills, range(7))
    page = sweep_report.write(folder)
    assert page.stat().st_size < 5e6
    text = page.read_text(encoding="utf-8")
    assert len(Shown(text).tables["Results"]) == 1 + 8 + 1, "the first choice is always there"
    assert "more rows found no place here" in text


# In the browser


def in_browser(page, folder, script, width):
    """What a script returns (as JSON) after the page's own has run in a frame of that width."""
    probe = (
        "<script>parent.document.documentElement.setAttribute('data-told', JSON.stringify((() => {"
        f"{script}}})()));</script></body>"
    )
    inside = page.read_text(encoding="utf-8").replace("</body>", probe)
    frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{escape(inside)}">'
    (folder / "probe.html").write_text(f"<!doctype html>{frame}</iframe>", encoding="utf-8")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900", "--dump-dom"),
            (folder / "probe.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    (told,) = re.findall(r'<html[^>]* data-told="([^"]*)"', done.stdout)
    return json.loads(unescape(told))


@pytest.mark.slow
@in_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(page, tmp_path, width):
    script = (
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        "return [innerWidth, document.documentElement.scrollWidth, "
        "document.querySelector('#controls').hidden];"
    )
    assert in_browser(page, tmp_path, script, width) == [width, width, False]


@pytest.mark.slow
@in_chromium
def test_selectors_and_sorting(page, tmp_path):
    script = """
      const choose = (kind, text) => {
        const select = document.querySelector(`select[data-kind=${kind}]`);
        select.value = [...select.options].find(o => o.text === text).value;
        select.dispatchEvent(new Event("change"));
      };
      const table = [...document.querySelectorAll("h2")]
        .find(h => h.textContent === "Results").parentNode.querySelector("table");
      const rows = () => [...table.rows].slice(1).filter(r => !r.hidden)
        .map(r => [...r.cells].map(c => c.firstChild ? c.firstChild.textContent : ""));
      const told = {first: rows()};
      choose("p", "lm_eval");
      choose("c", "p3@200");
      told.other = rows();
      told.about = [...table.rows].find(r => r.dataset.k && !r.hidden).cells[0].textContent;
      const button = table.tHead.rows[0].cells[4].querySelector("button");
      button.click();
      told.down = [rows(), button.parentNode.getAttribute("aria-sort")];
      button.click();
      told.up = [rows(), button.parentNode.getAttribute("aria-sort")];
      choose("d", "xnli_sw");
      told.one = rows();
      const card = () => [...document.querySelectorAll(".sample dl, .sample table")]
        .filter(e => !e.parentNode.hidden).length;
      choose("c", "p3@400");
      told.all = card();
      choose("r", "wrong");
      told.wrong = card();
      return told;
    """
    told = in_browser(page, tmp_path, script, 1280)
    assert len(told["first"]) == 6
    assert [row[0] for row in told["other"]] == [
        *("super_glue_cb", "super_glue_copa*", "xnli_en", "xnli_sw", "Average")
    ]
    assert "p3@200 · lm_eval" in told["about"]
    means = [float(row[4]) for row in told["other"][:-1]]
    for name, order in (("down", "descending"), ("up", "ascending")):
        rows, said = told[name]
        assert said == order
        assert [float(row[4]) for row in rows[:-1]] == sorted(means, reverse=name == "down")
        assert rows[-1][0] == "Average", "stays at the end"
    assert [row[0] for row in told["one"]] == ["xnli_sw"]
    assert 0 < told["wrong"] < told["all"]
