"""Write a report of one or several runs: one page with all that it shows inside, to open by a double click.

python tools/report.py work_dir/MAEPretraining --output report.html

It needs plotly: pip install plotly
"""

import argparse
import base64
import hashlib
import html
import importlib
import json
import re
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storage.console import explained_errors
from storage.files import is_number, read_bytes, read_json, read_text, user_path, written_whole
from training.flags import RECORDED
from training.logs import (
    Mark,
    Record,
    choose_evenly,
    find_changes,
    find_confusions,
    find_marks,
    find_pictures,
    name_runs,
    read_cells,
    read_points,
    read_run,
    read_table,
    show,
    subsample,
)

TEMPLATE = Path(__file__).with_name("report.html")
# Charts by the figures of the log that they show; any other figure has a chart of its own
CHARTS = {
    "Loss": r".*_loss",
    "Error on removed patches": r".*_error",
    "Accuracy, percent": r".*(top\d_acc|macro_f1)",
    "Scores of pixels, percent": r"testing_(m(iou|acc|dice|precision)|aacc)",
    "Learning rate": r"learning_rate",
    "Images per second": r"images_per_second",
    "Share of the time waiting for data": r"data_wait_fraction",
    "Peak memory, GB": r"memory_gb",
}
NOT_DRAWN = ("step", "epoch", "bad_files", "nonfinite_steps", "testing_classes")  # the axes, the marks, a constant
PICTURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}  # by their first bytes
MAX_ROWS = 100  # of bad files
RUN_COLOURS = 8  # in the template


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="experiment folders")
    parser.add_argument("--output", type=user_path, required=True, help="page to write, such as report.html")
    parser.add_argument("--overwrite", action="store_true", help="allow --output to exist")
    watch = "write it anew every so many seconds (default: 30) until the runs are DONE; the open page follows"
    parser.add_argument("--watch", nargs="?", type=float, const=30.0, metavar="SECONDS", help=watch)
    size = "at most so many megabytes of pictures, evenly over the epochs (default: 20)"
    parser.add_argument("--picture_mb", type=float, default=20.0, metavar="MB", help=size)
    args = parser.parse_args(argv)
    if args.output.suffix.lower() not in (".html", ".htm") or args.output.is_dir():
        parser.error(f"--output {args.output} is a folder, or has no ending of a page; give report.html")
    if args.watch is not None and not args.watch >= 1:
        parser.error(f"--watch {args.watch:g} must be at least 1 second")
    if not args.picture_mb >= 0:
        parser.error(f"--picture_mb {args.picture_mb:g} must be at least 0")
    return args


# ------------------------------------------------------------------------------------------------ reading


def build_charts(runs: Sequence[Record]) -> list[dict]:
    """Give the charts that the runs have figures for, each with its curves over the steps."""
    figures: dict[str, list[str]] = {title: [] for title in CHARTS}
    for name in dict.fromkeys(key for run in runs for row in run.rows for key in row):
        if name not in NOT_DRAWN:
            title = next((title for title, pattern in CHARTS.items() if re.fullmatch(pattern, name)), name)
            figures.setdefault(title, []).append(name)
    charts = []
    for title, names in figures.items():
        curves = []
        for index, run in enumerate(runs):
            for name in names:
                points = subsample(read_points(run.folder / "log.jsonl", run.rows, "step", name))
                if any(y is not None for _, y in points):
                    x, y = zip(*points, strict=True)
                    curves.append({"run": index, "figure": name, "x": x, "y": y})
        if curves:
            charts.append({"title": title, "curves": curves})
    return charts


# ------------------------------------------------------------------------------------------------ the page


def text(value: object) -> str:
    return html.escape(show(value))


def build_table(head: Sequence[object], rows: Sequence[Sequence[object]], kind: str = "") -> str:
    """Give a table in HTML; one that "sorts" can be sorted by its columns, and one of "names" keeps its first whole."""
    titles = [f"<button>{text(cell)}</button>" if kind == "sorts" else text(cell) for cell in head]
    numbers = [kind == "sorts" and all(map(is_numeric, column)) for column in zip(*rows, strict=True)]
    sides = [" class=n" if number else "" for number in numbers or [False] * len(head)]
    top = "".join(f"<th{side}>{title}</th>" for side, title in zip(sides, titles, strict=True))
    lines = ("".join(f"<td{side}>{text(cell)}</td>" for side, cell in zip(sides, row, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide {kind}"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def is_numeric(cell: object) -> bool:
    return bool(re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?|nan|", str(cell)))


def build_card(index: int, run: Record) -> str:
    """Say how far a run is, and its last and best figures."""
    last = {key: value for row in run.rows for key, value in row.items() if is_number(value)}
    done, epochs = (run.folder / "DONE").exists(), run.args.get("epochs")
    far = f"epoch {last.get('epoch', 0):.4g}" + (f" of {epochs}" if epochs else "")
    facts = [("State", "complete" if done else f"not complete: {far}"), ("Steps", f"{last.get('step', 0):,}")]
    for name, value in last.items():
        if re.fullmatch(r"(training|testing|knn)_.*|model_error", name) and name != "testing_classes":
            values = [row[name] for row in run.rows if is_number(row.get(name))]
            best = (min if name.endswith(("loss", "error")) else max)(values)
            facts.append((name.replace("_", " "), f"{value:.4g}" + (f" (best {best:.4g})" if best != value else "")))
    file = run.folder / "best_checkpoint" / "evaluation.json"
    scores = read_json(file) if file.is_file() else {}
    tested = {name: value for name, value in scores.items() if name.startswith("test_") and is_number(value)}
    facts += [(name.replace("_", " "), f"{value:.4g}") for name, value in tested.items()]
    speeds = [row["images_per_second"] for row in run.rows if row.get("images_per_second")]
    facts += [("Images per second, median", f"{statistics.median(speeds):,.0f}")] if speeds else []
    facts += [("Peak memory", f"{last['memory_gb']:.2f} GB")] if "memory_gb" in last else []
    items = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts)
    return f'<article><h3><i class="dot c{index % RUN_COLOURS}"></i>{text(run.name)}</h3><dl>{items}</dl></article>'


def build_overview(runs: Sequence[Record], marks: Sequence[list[Mark]]) -> str:
    """Say what was run: state, flags that differ first, versions and hardware, and what went wrong."""
    head = ["", *(run.name for run in runs)]
    parts = ["<section class=cards>", *(build_card(*pair) for pair in enumerate(runs)), "</section>"]
    given = dict.fromkeys(name for run in runs for name in run.args.get("changed_flags", ()))
    unlike = [name for name in find_changes([run.args for run in runs]) if name not in given]
    names = dict.fromkeys(name for run in runs for name in run.args if name not in RECORDED)

    def flags_of(chosen: Iterable[str]) -> str:
        rows = [(f"--{name}", *(run.args.get(name, "") for run in runs)) for name in chosen]
        return build_table(["flag", *head[1:]], rows, "names")

    parts += ["<h2>Flags that differ from the defaults</h2>"]
    recorded = all("changed_flags" in run.args for run in runs)
    parts += [] if recorded else ["<p>A run of an older version did not record which do; all are below.</p>"]
    parts += [flags_of(given)] if given else ["<p>None.</p>"] if recorded else []
    parts += ["<h2>Other flags that differ between the runs</h2>", flags_of(unlike)] if unlike else []
    parts += [f"<details><summary>All {len(names)} flags</summary>{flags_of(names)}</details>"]
    made = [run.args.get("environment") or {} for run in runs]
    keys = dict.fromkeys(key for table in made for key in table)
    rows = [(key, *(table.get(key, "not recorded") for table in made)) for key in keys]
    rows.append(("image decoder", *(run.args.get("decoder") for run in runs)))
    rows.append(("folder", *(str(run.folder.resolve()) for run in runs)))
    parts += ["<h2>Made with</h2>", build_table(head, rows, "names")]
    events = ((run, mark) for run, found in zip(runs, marks, strict=True) for mark in found)
    if events := [(run.name, f"{mark.step:,.0f}", mark.text) for run, mark in events]:
        parts += ["<h2>Interruptions, skipped steps, bad files</h2>", build_table(["run", "step", "what"], events)]
    for run in runs:
        if (file := run.folder / "bad_files.txt").is_file():
            table = [row for row in read_cells(file) if len(row) == 2]  # a crash may have cut the last one
            parts += [f"<details><summary>{len(table)} bad files of {text(run.name)}</summary>"]
            parts += [build_table(["file", "reason"], table[:MAX_ROWS]), "</details>"]
    return "".join(parts)


def embed(file: Path, about: str) -> str:
    """Give a picture as it is, within the page; ValueError for what is neither PNG nor JPEG."""
    content = read_bytes(file)
    kind = next((kind for start, kind in PICTURES.items() if content.startswith(start)), None)
    if kind is None:
        raise ValueError(f"{file} is neither PNG nor JPEG; remove it")
    return f'<img alt="{text(about)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def build_pictures(runs: Sequence[Record], max_bytes: float) -> str:
    """Give a slider over the epochs for each kind of pictures of each run."""
    found = [(run, kind, files) for run in runs for kind, files in find_pictures(run).items()]
    parts = []
    for run, kind, files in found:
        chosen = choose_evenly(files, max_bytes / len(found))
        parts += [f"<h2>{text(kind.capitalize())} <small>{text(run.name)}</small></h2>"]
        if len(chosen) < len(files):
            note = f"{len(chosen)} of {len(files)} pictures, evenly over the epochs: --picture_mb allows no more."
            parts.append(f"<p>{note}</p>")
        pages = [(epoch, embed(file, f"{kind} of {run.name}, epoch {epoch}")) for epoch, file in chosen]
        pages = (f'<figure data-epoch="{epoch}">{image}</figure>' for epoch, image in pages)
        parts += ["<div class=slides>", *pages, "</div>"] if chosen else []
    return "".join(parts)


def build_classes(runs: Sequence[Record]) -> str:
    """Give the tables of classes and the worst confusions of each folder of weights that was evaluated."""
    parts = []
    for run in runs:
        for file in sorted(run.folder.glob("*/*per_class.tsv")):
            if file.parent.is_symlink():  # last_checkpoint
                continue
            prefix, title = file.name.removesuffix("per_class.tsv"), f"{run.name}: {file.parent.name}/{file.name}"
            head, *rows = read_table(file)
            parts += [f"<h2>Classes <small>{text(title)}</small></h2>", build_table(head, rows, "sorts")]
            if (matrix := file.with_name(f"{prefix}confusion.tsv")).is_file():
                head, worst = ["true class", "answer", "times", "percent of the true class"], find_confusions(matrix)
                parts += ["<h2>Worst confusions</h2>", build_table(head, worst, "sorts") if worst else "<p>None.</p>"]
            if (picture := file.with_name(f"{prefix}worst_confusions.png")).is_file():
                parts.append(f"<figure>{embed(picture, 'images of the worst confusions')}</figure>")
    return "".join(parts)


def build_page(runs: Sequence[Record], plotly: str, max_bytes: float, refresh_s: float | None = None) -> str:
    """Put all into the template. What comes from the runs is escaped, and only the template's scripts may run."""
    marks = [find_marks(run) for run in runs]
    charts = build_charts(runs)
    parts = {"overview": build_overview(runs, marks), "curves": "<div id=charts></div>" if charts else ""}
    parts |= {"pictures": build_pictures(runs, max_bytes), "classes": build_classes(runs)}
    template = read_text(TEMPLATE).replace("{{plotly}}", plotly)
    scripts = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    names = [{"name": run.name, "steps_per_epoch": run.steps_per_epoch} for run in runs]
    data = {"runs": names, "charts": charts, "marks": marks, "refresh_s": refresh_s}
    panels = (
        f'<section class=panel id="panel-{name}" role=tabpanel>{part}</section>' for name, part in parts.items() if part
    )
    tabs = (f'<button role=tab id="tab-{name}">{name.capitalize()}</button>' for name, part in parts.items() if part)
    found = {
        "csp": " ".join(f"'sha256-{digest}'" for digest in hashes),
        "title": text(" · ".join(run.name for run in runs)),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "tabs": "".join(tabs),
        "panels": "".join(panels),
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    # In one pass, so that nothing of a run is taken for a place of the template
    return re.sub(r"\{\{(csp|title|written|tabs|panels|data)\}\}", lambda place: found[place[1]], template)


# ------------------------------------------------------------------------------------------------ the command


def load_plotly() -> str:
    """Give plotly's script; ImportError names the command that installs it."""
    try:
        return importlib.import_module("plotly.offline").get_plotlyjs()
    except ImportError as error:
        raise ImportError("a report needs plotly, which is not installed: pip install plotly") from error


def write_page(args: argparse.Namespace, plotly: str, refresh_s: float | None) -> bool:
    """Write the page, and say whether all runs were complete before they were read."""
    names = name_runs([run / "log.jsonl" for run in args.runs])
    done = all((log.parent / "DONE").exists() for log in names)
    runs = [read_run(log.parent, name) for log, name in names.items()]
    page = build_page(runs, plotly, 1e6 * args.picture_mb, None if done else refresh_s)
    with written_whole(args.output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return done


def main(args: argparse.Namespace) -> None:
    if args.output.exists() and not args.overwrite:
        raise FileExistsError(f"{args.output} exists; choose another --output or add --overwrite")
    plotly = load_plotly()
    done = write_page(args, plotly, args.watch)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB", flush=True)
    try:
        while args.watch and not done:
            time.sleep(args.watch)
            try:
                done = write_page(args, plotly, args.watch)
            except OSError as error:  # a run replaces its best weights, say
                print(f"{args.output} is as before ({error})", flush=True)
    except KeyboardInterrupt:
        write_page(args, plotly, None)
        print(f"{args.output} is written for the last time")


if __name__ == "__main__":
    with explained_errors():
        main(parse_args())
