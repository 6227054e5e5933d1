"""A run in one page: what it reads and escapes, and, in a browser, that it works and runs nothing of a hostile run."""

import base64
import hashlib
import html
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT, load_tool
from PIL import Image

from training.logs import choose_evenly, find_confusions, find_marks, read_run, read_table, subsample

HOSTILE = "</script><b><img src=x onerror=alert(1)>{{data}}"
NAME = HOSTILE.replace("/", "")  # of a folder
DARK, LIGHT = "rgb(18, 22, 28)", "rgb(246, 247, 249)"  # --back in the template


def write_run(folder: Path, word: str = "plain", *, epochs: int = 3) -> Path:
    """Write what a run of 10 steps an epoch leaves: pictures, scores, a resume, a skipped step, bad files."""
    best, pictures = folder / "best_checkpoint", folder / "predictions"
    best.mkdir(parents=True)
    pictures.mkdir()
    rows = [
        {
            "step": step,
            "epoch": step / 10,
            "training_loss": 3 / step,
            "learning_rate": 1e-4,
            "bad_files": 2 * (step > 5),
        }
        for step in range(1, 10 * epochs + 1)
    ]
    for row in rows[9::10]:
        row |= {"testing_loss": 4 / row["step"], "testing_top1_acc": 50 + row["epoch"], f"odd {word}": 1.0}
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {"epochs": epochs, "seed": 0, "path_to_data": word, "mean": [0.5, 0.5], "pin_memory": True}
    made = {"commit": "abc1234", "hardware": word, "torch": "2.0"}
    record = {**args, "changed_flags": ["epochs", "path_to_data"], "environment": made}
    (folder / "args.json").write_text(json.dumps(record))
    (folder / "args_from_checkpoint_1.json").write_text(json.dumps(record | {"seed": 1}))
    (folder / "args_from_checkpoint_1_step_15.json").write_text(json.dumps(record | {"path_to_data": f"new {word}"}))
    (folder / "nonfinite_steps.jsonl").write_text(json.dumps({"step": 7, "images": [word]}) + "\n")
    (folder / "bad_files.txt").write_text(f"{word}.jpg\tit is no image: {word}\nb.jpg\tempty\nc.j")  # cut by a crash
    for epoch in range(1, epochs + 1):
        Image.new("RGB", (900, 60), (80 * epoch, 0, 0)).save(pictures / f"epoch_{epoch}.png")
    table = [
        ("class", "name", "images", "top1"),
        (word, word, 4, "75.00"),
        ("b", "b", 4, "100.00"),
        ("c", "c", 0, "nan"),
    ]
    confusion = [("true class", word, "b", "c"), (word, 3, 1, 0), ("b", 0, 4, 0), ("c", 0, 0, 0)]
    for name, lines in (("per_class", table), ("confusion", confusion)):
        (best / f"{name}.tsv").write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))
    return folder


def build(*folders: Path, plotly: str = "", max_bytes: float = 1e6) -> str:
    tool = load_tool("report")
    return tool.build_page([read_run(folder, folder.name) for folder in folders], plotly, max_bytes)


class Elements(HTMLParser):
    """The elements of a page, as a parser that is not ours finds them: (tag, attributes), and the scripts' texts."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.scripts, self.texts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        (self.scripts if self.cdata_elem == "script" else self.texts).append(data)


# -------------------------------------------------------------------------------- what is read


def test_marks_are_resumes_skipped_steps_and_new_bad_files_in_the_order_of_steps(tmp_path):
    marks = find_marks(read_run(write_run(tmp_path / "run"), "run"))
    assert [(mark.kind, mark.step) for mark in marks] == [("bad", 6), ("skipped", 7), ("resumed", 10), ("resumed", 15)]
    assert marks[2].text == "resumed, --seed 1 (was 0)"
    assert marks[3].text == "resumed, --path_to_data new plain (was plain)"


def test_long_curves_keep_their_spikes_and_gaps():
    points = [(x, math.sin(x)) for x in range(50_000)]
    points[1234], points[40_000], points[7] = (1234, 99.0), (40_000, -99.0), (7, None)
    kept = subsample(points)
    assert len(kept) <= 2000 and kept == sorted(kept) and {points[1234], points[40_000]} <= set(kept)
    assert subsample(points[:100]) == points[:100]
    assert subsample([(x, None) for x in range(5000)])[0] == (0, None)


def test_confusions_come_most_frequent_first(tmp_path):
    file = tmp_path / "confusion.tsv"
    file.write_text("true\ta\tb\tc\na\t1\t2\t1\nb\t0\t5\t0\nc\t6\t0\t2\n")
    assert find_confusions(file) == [("c", "a", 6, "75.0"), ("a", "b", 2, "50.0"), ("a", "c", 1, "25.0")]
    for content, words in (("true\ta\na\tx\n", "no table of counts"), ("a\tb\nc\n", "equally long"), ("", "equally")):
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"confusion\.tsv is .*{words}"):
            find_confusions(file)
    file.write_bytes(b"a\xff\tb\n")
    assert read_table(file) == [["a\\xff", "b"]]


def test_a_folder_is_not_replaced_by_the_page(tmp_path, capsys):
    (tmp_path / "kept.html").mkdir()
    with pytest.raises(SystemExit):
        load_tool("report").parse_args(["run", "--output", str(tmp_path / "kept.html"), "--overwrite"])
    assert "is a folder, or has no ending of a page" in capsys.readouterr().err


def test_a_pictures_size_is_asked_for_once(tmp_path):
    """3,000 of them took 14 s, and with --watch so again every time."""

    class File:
        asked = 0

        def stat(self) -> os.stat_result:
            File.asked += 1
            return tmp_path.stat()

    assert choose_evenly([(epoch, File()) for epoch in range(40)], 1) == [] and File.asked == 40


def test_pictures_above_a_size_are_chosen_evenly_with_the_last(tmp_path):
    files = [(epoch, tmp_path / str(epoch)) for epoch in range(1, 11)]
    for _, file in files:
        file.write_bytes(bytes(10))
    assert choose_evenly(files, 100) == files
    assert [epoch for epoch, _ in choose_evenly(files, 45)] == [1, 4, 7, 10]
    assert [epoch for epoch, _ in choose_evenly(files, 10)] == [10] and choose_evenly(files, 9) == []
    page = build(write_run(tmp_path / "run"), max_bytes=2.5 * 400)
    assert "pictures, evenly over the epochs: --picture_mb allows no more" in page


def test_run_that_is_none_is_refused_by_name(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "log.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match=r"run/log\.jsonl has a row without step or epoch"):
        build(run)
    (run / "log.jsonl").write_text('{"step": 1, "epoch": 1}\n')
    (run / "predictions" / "epoch_2.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(ValueError, match=r"epoch_2\.png is neither PNG nor JPEG"):
        build(run)
    with pytest.raises(FileNotFoundError, match="no log at"):
        build(tmp_path)


# -------------------------------------------------------------------------------- the page


def test_flags_that_differ_come_first_and_then_all(tmp_path):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    args = json.loads((other / "args.json").read_text())
    (other / "args.json").write_text(json.dumps(args | {"seed": 5}))
    text = " ".join(Elements(build(one, other)).texts)
    places = [
        text.index(part) for part in ("from the defaults", "--epochs 3 3", "differ between", "--seed 0 5", "All 5")
    ]
    assert places == sorted(places)
    first = text[places[0] : places[2]]
    assert "--path_to_data plain plain" in first and "--seed" not in first and "--mean" not in first
    assert "--mean 0.5 0.5 0.5 0.5" in text[places[-1] :] and "--pin_memory yes yes" in text[places[-1] :]
    assert "abc1234" in text and "changed_flags" not in text
    del args["changed_flags"], args["environment"]  # as before they were recorded
    (other / "args.json").write_text(json.dumps(args))
    text = " ".join(Elements(build(other)).texts)
    assert "did not record which do; all are below" in text and "--seed 0" in text


def test_nothing_of_a_hostile_run_becomes_an_element(tmp_path):
    plain, hostile = (Elements(build(write_run(tmp_path / name, word))) for name, word in (("a", "b"), (NAME, HOSTILE)))
    assert [tag for tag, _ in hostile.found] == [tag for tag, _ in plain.found]
    assert not any(name.startswith("on") for _, attributes in hostile.found for name in attributes)
    assert any(f"{HOSTILE}.jpg" in text for text in hostile.texts)
    data = json.loads(hostile.scripts[0])
    assert data["runs"] == [{"name": NAME, "steps_per_epoch": 10.0}]
    assert data["charts"][-1]["title"] == f"odd {HOSTILE}"


def test_only_the_scripts_of_the_template_may_run(tmp_path):
    page = build(write_run(tmp_path / "run"), plotly="let plotly = 1;")
    elements = Elements(page)
    (policy,) = (a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in elements.scripts[1:]]
    assert elements.scripts[1] == "let plotly = 1;" and len(digests) == 2
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digests[0]}' 'sha256-{digests[1]}';")


def test_card_has_last_best_and_test_figures_and_how_far_a_run_is(tmp_path):
    run = write_run(tmp_path / "run")
    record = {"testing_top1_acc": 53.0, "test_top1_acc": 41.25, "test_data": "x"}
    (run / "best_checkpoint" / "evaluation.json").write_text(json.dumps(record))
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 31, "epoch": 3.1, "training_loss": 0.5, "testing_loss": None}) + "\n")
    text = "|".join(Elements(build(run)).texts)
    assert "State|not complete: epoch 3.1 of 3|Steps|31|training loss|0.5 (best 0.1)|" in text
    assert "testing top1 acc|53|" in text and "|test top1 acc|41.25|" in text
    (run / "DONE").touch()
    assert "State|complete|" in "|".join(Elements(build(run)).texts)


def test_tabs_are_those_that_the_run_has(tmp_path):
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "predictions")
    shutil.rmtree(run / "best_checkpoint")
    found = [a["id"] for tag, a in Elements(build(run)).found if a.get("role") == "tab"]
    assert found == ["tab-overview", "tab-curves"]


# -------------------------------------------------------------------------------- the command


def test_missing_plotly_is_one_sentence_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"a report needs plotly, which is not installed: pip install plotly$"):
        load_tool("report").load_plotly()


def test_flags_that_cannot_be_are_refused(tmp_path, capsys):
    tool = load_tool("report")
    run = str(write_run(tmp_path / "run"))
    for flags, words in (("report.png", "no ending of a page"), ("a.html --watch 0", "at least 1 second")):
        with pytest.raises(SystemExit):
            tool.parse_args([run, "--output", *flags.split()])
        assert words in capsys.readouterr().err
    (tmp_path / "a.html").touch()
    with pytest.raises(FileExistsError, match="--overwrite"):
        tool.main(tool.parse_args([run, "--output", str(tmp_path / "a.html")]))


@pytest.mark.parametrize("end", ["done", "interrupted"])
def test_watch_writes_anew_until_the_end(tmp_path, monkeypatch, end):
    run, output, tool = write_run(tmp_path / "run"), tmp_path / "out" / "a.html", load_tool("report")
    pages = []

    def wait(seconds):
        assert seconds == 5
        pages.append(json.loads(Elements(output.read_text()).scripts[0]))
        with (run / "log.jsonl").open("a") as log:
            log.write(json.dumps({"step": 30 + len(pages), "epoch": 3 + len(pages) / 10, "training_loss": 0.1}) + "\n")
        if len(pages) == 2 and end == "interrupted":
            raise KeyboardInterrupt
        if len(pages) == 2:
            (run / "DONE").touch()

    monkeypatch.setattr(tool.time, "sleep", wait)
    monkeypatch.setattr(tool, "load_plotly", lambda: "")
    tool.main(tool.parse_args([str(run), "--output", str(output), "--watch", "5"]))
    pages.append(json.loads(Elements(output.read_text()).scripts[0]))
    assert [page["refresh_s"] for page in pages] == [5, 5, None]
    assert [page["charts"][0]["curves"][0]["x"][-1] for page in pages] == [30, 31, 32]
    assert [file.name for file in output.parent.iterdir()] == ["a.html"]


def test_report_starts_without_torch(tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed: pip install plotly")
    code = "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__'); assert 'torch' not in sys.modules"
    command = f"import sys; sys.argv = sys.argv[1:]; {code}"
    arguments = [str(ROOT / "tools" / "report.py"), str(write_run(tmp_path / "run")), "--output", "a.html"]
    subprocess.run([sys.executable, "-c", command, *arguments], check=True, timeout=60, cwd=tmp_path)
    assert "plotly.js" in (tmp_path / "a.html").read_text()


# -------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator:
    for package in ("plotly", "playwright"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {package}")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium refuses to root
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(browser, tmp_path_factory) -> Path:
    """A report of two runs, one of them hostile."""
    folder, tool = tmp_path_factory.mktemp("report"), load_tool("report")
    runs = [write_run(folder / "a"), write_run(folder / NAME, HOSTILE)]
    tool.main(tool.parse_args([*map(str, runs), "--output", str(folder / "report.html")]))
    return folder / "report.html"


@pytest.fixture
def view(browser, report) -> Iterator:
    """Give a function that opens the report at a width, and see that nothing was fetched, said or complained of."""
    events, contexts = [], []

    def view(width: int, scheme: str = "light", **device: bool):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **device))
        page = contexts[-1].new_page()
        page.on("dialog", lambda dialog: (events.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda message: events.append(f"console {message.text}"))
        page.on("pageerror", lambda error: events.append(f"error {error}"))
        page.on("request", lambda request: events.append(request.url[:60]))
        page.goto(report.as_uri())
        return page

    yield view
    for context in contexts:
        context.close()
    allowed = (report.parent.as_uri()[:60], "data:image/png")
    assert [event for event in events if not event.startswith(allowed)] == []


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for what the page does a moment later; its policy forbids playwright's own wait_for_function."""
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def open_tab(page, name: str) -> None:
    page.locator(f"#tab-{name}").click()
    page.wait_for_selector(f"#panel-{name}.open")


@pytest.mark.parametrize("width", [1280, 360])
def test_every_tab_opens_and_fits_the_width(view, width):
    page = view(width)
    for name in ("overview", "curves", "pictures", "classes"):
        open_tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator(".panel.open").count() == 1
    page.locator("summary").first.evaluate("summary => summary.click()")
    assert page.locator("img[src=x]").count() == 0 and html.escape(NAME) in page.locator("h1").inner_html()


def test_hovering_a_curve_shows_its_value_and_a_mark_what_it_is(view):
    page = view(1280)
    open_tab(page, "curves")
    plot = page.locator(".plot").first
    box, shown = plot.locator(".nsewdrag").bounding_box(), plot.locator(".hoverlayer")
    page.mouse.move(box["x"] + 1, box["y"] + 5)
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2)
    wait_until(lambda: "a training_loss: 0.1" in shown.text_content())
    assert "testing_loss: 0.13333" in shown.text_content() and f"{NAME} training" in shown.text_content()
    page.mouse.move(box["x"] + box["width"] * (15 - 1) / 29, box["y"] + 0.97 * box["height"])
    wait_until(lambda: f"{NAME}: resumed, --path_to_data new {HOSTILE}" in shown.text_content())


def test_a_tap_on_a_phone_shows_the_value_and_leaves_the_page_to_scroll(view):
    page = view(360, has_touch=True, is_mobile=True)
    open_tab(page, "curves")
    plot = page.locator(".plot").first
    box = plot.locator(".nsewdrag").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    wait_until(lambda: "a training_loss: 0.1" in plot.locator(".hoverlayer").text_content())
    assert plot.evaluate("plot => plot._fullLayout.dragmode") is False


def test_a_curve_is_zoomed_by_dragging_and_its_run_hidden(view):
    page = view(1280)
    open_tab(page, "curves")
    limits = "document.querySelector('.plot')._fullLayout.xaxis.range"
    before = page.evaluate(limits)
    box = page.locator(".plot .nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 160, steps=4)
    page.mouse.up()
    wait_until(lambda: page.evaluate(limits)[0] > before[0])
    page.mouse.dblclick(box["x"] + 100, box["y"] + 60)
    wait_until(lambda: page.evaluate(limits) == pytest.approx(before))
    lines = "document.querySelectorAll('.plot')[0].querySelectorAll('.scatterlayer .js-line').length"
    assert page.evaluate(lines) == 4
    page.locator(".tools .c1 input").uncheck()
    assert page.evaluate(lines) == 2


def test_tables_sort_by_numbers_with_nan_last(view):
    page = view(360)
    open_tab(page, "classes")
    table = page.locator(".sorts table").first
    column = "table => [...table.tBodies[0].rows].map(row => row.cells[3].textContent)"
    for order in (["100.00", "75.00", "nan"], ["75.00", "100.00", "nan"]):
        table.locator("th button").nth(3).click()
        assert table.evaluate(column) == order
    table.locator("th button").nth(0).click()
    assert table.evaluate(column.replace("3", "0")) == ["b", "c", "plain"]


def test_slider_turns_over_the_epochs(view):
    page = view(1280)
    open_tab(page, "pictures")
    slides = page.locator(".slides").first
    seen = []
    for _ in range(3):
        seen.append((slides.locator("output").inner_text(), slides.locator("img:visible").get_attribute("alt")))
        assert slides.locator("img:visible").evaluate("image => image.naturalWidth") == 900
        slides.locator("input").press("ArrowLeft")
    assert seen == [(f"epoch {epoch}", f"predictions of a, epoch {epoch}") for epoch in (3, 2, 1)]


def test_colours_follow_dark_mode(view):
    page, back = view(360, "dark"), "getComputedStyle(document.body).backgroundColor"
    open_tab(page, "curves")
    ticks = "getComputedStyle(document.querySelector('.xtick text')).fill"
    assert page.evaluate(back) == DARK and page.evaluate(ticks) == "rgb(228, 232, 238)"
    page.emulate_media(color_scheme="light")
    wait_until(lambda: page.evaluate(ticks) == "rgb(28, 36, 48)")
    assert page.evaluate(back) == LIGHT


def test_page_of_a_watched_run_reloads_until_somebody_looks_closer(view, report):
    tool = load_tool("report")
    runs = [str(folder) for folder in report.parent.iterdir() if folder.is_dir()]
    watched = report.with_name("watched.html")
    tool.write_page(tool.parse_args([*runs, "--output", str(watched)]), tool.load_plotly(), 1)
    page = view(1280)
    assert not page.locator("#live").is_visible()
    page.goto(watched.as_uri())
    open_tab(page, "pictures")
    loads = []
    page.on("load", lambda page: loads.append(page))
    with page.expect_event("load"):
        pass
    page.wait_for_selector("#panel-pictures.open")  # the tab stays
    page.locator(".slides input").first.press("ArrowLeft")
    before = len(loads)
    page.wait_for_timeout(2500)
    assert len(loads) == before and not page.locator("#live input").is_checked()
