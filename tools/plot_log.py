"""Draw the curves of one or several runs from their log.jsonl: one panel for each figure asked for.

python tools/plot_log.py work_dir/MAEPretraining/log.jsonl --output curve.png
"""

import argparse
import itertools
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f6fb4", "#d1495b", "#3a8f4d", "#8e5ea2", "#c98a1b", "#444444")
PANEL_SIZE = (560, 320)
MARGIN = {"left": 70, "right": 16, "top": 34, "bottom": 40}
NUM_TICKS = 5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="log.jsonl files; each is one colour")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    parser.add_argument("--overwrite", action="store_true", help="allow --output to exist")
    parser.add_argument("--x", default="epoch", help="horizontal axis (default: epoch)")
    figures = "figures, a panel each; several joined by + share one (default: training_loss testing_loss)"
    parser.add_argument("--y", nargs="+", default=["training_loss", "testing_loss"], help=figures)
    return parser.parse_args(argv)


def read_rows(log: Path) -> list[dict]:
    rows, lines = [], log.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {log} is no JSON: {error}") from error
            print(f"{log}: the last line was cut off and is passed over")
    return rows


def draw_panel(series: dict[str, list[tuple[float, float | None]]], caption: str) -> Image.Image:
    """Draw named series of points as lines over common axes; a value of None is a gap in its line."""
    left, right = MARGIN["left"], PANEL_SIZE[0] - MARGIN["right"]
    top, bottom = MARGIN["top"], PANEL_SIZE[1] - MARGIN["bottom"]
    picture = Image.new("RGB", PANEL_SIZE, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    xs, ys = zip(*(point for points in series.values() for point in points if point[1] is not None), strict=True)
    (x_low, x_high), (y_low, y_high) = ((min(v), max(v) if max(v) > min(v) else min(v) + 1) for v in (xs, ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - up * (bottom - top)

    for tick in range(NUM_TICKS + 1):
        share = tick / NUM_TICKS
        x, y = x_low + share * (x_high - x_low), y_low + share * (y_high - y_low)
        draw.line([place(x_low, y), place(x_high, y)], fill="#e0e0e0")
        draw.text((left - 6, place(x, y)[1]), f"{y:.4g}", fill="black", font=font, anchor="rm")
        draw.text((place(x, y)[0], bottom + 6), f"{x:.4g}", fill="black", font=font, anchor="mt")
    draw.text((PANEL_SIZE[0] / 2, PANEL_SIZE[1] - 12), caption, fill="black", font=font, anchor="mm")
    legend_x = right
    for colour, (name, points) in reversed(list(zip(COLOURS, series.items(), strict=False))):
        places = [None if y is None else place(x, y) for x, y in points]
        for start, end in itertools.pairwise(places):
            if start and end:
                draw.line([start, end], fill=colour, width=2)
        for dot in filter(None, places):  # a point between two gaps has no line
            draw.circle(dot, 2, fill=colour)
        draw.text((legend_x, 10), name, fill=colour, font=font, anchor="rm")
        legend_x -= draw.textlength(name, font=font) + 14
    return picture


def main(args: argparse.Namespace) -> None:
    args.output, args.logs = args.output.expanduser(), [log.expanduser() for log in args.logs]
    if args.output.exists() and not args.overwrite:
        raise FileExistsError(f"{args.output} exists; choose another --output or add --overwrite")
    panels, logs = [], [(log.parent.name, read_rows(log)) for log in args.logs]
    for figures in args.y:
        series, names = {}, figures.split("+")
        for (run, rows), name in itertools.product(logs, names):
            points = [(row[args.x], row[name]) for row in rows if row.get(args.x) is not None and name in row]
            if any(value is not None for _, value in points):
                series[" ".join([run] * (len(logs) > 1) + [name] * (len(names) > 1)) or name] = points
        if not series:
            raise ValueError(f"no row of {', '.join(map(str, args.logs))} has both {args.x!r} and {figures!r}")
        if len(series) > len(COLOURS):
            raise ValueError(f"{len(series)} curves are more than the {len(COLOURS)} colours of one panel")
        panels.append(draw_panel(series, f"{', '.join(names)} over {args.x}"))
    columns = min(2, len(panels))
    sheet = Image.new("RGB", (columns * PANEL_SIZE[0], math.ceil(len(panels) / columns) * PANEL_SIZE[1]), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index % columns * PANEL_SIZE[0], index // columns * PANEL_SIZE[1]))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)
    print(f"{args.output}: {len(panels)} panels")


if __name__ == "__main__":
    main(parse_args())
