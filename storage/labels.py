"""Label maps: what their files hold, which class a value or a colour is, and ADE20K's names and colours.

Pairing them with images, and checking the pairs, is the task of pairs.py.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from storage.decoding import KIND_NAMES, load_file, open_image, read_layout
from storage.files import escape, read_text
from storage.lists import name_some
from storage.sizes import ADE20K_NUM_CLASSES

IGNORE_INDEX = 255  # in a label map as this project uses it: counts neither in training nor in a metric

# Names and colours of the 150 classes, in the order of the label values (CSAILVision/sceneparsing, BSD-3).
ADE20K_NAMES = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
    armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest
    of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool
    table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
    bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus,
    towel, light, truck, tower, chandelier, awning, streetlight, booth, television, airplane, dirt track, apparel,
    pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven,
    ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture,
    hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower,
    radiator, glass, clock, flag
"""
ADE20K_CLASS_NAMES = tuple(" ".join(name.split()) for name in ADE20K_NAMES.split(","))
ADE20K_COLOURS = """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652
    8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0
    ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff
    8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff
    00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff
    ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff
    00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
    5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500
    0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff
    b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""
ADE20K_PALETTE = np.frombuffer(bytes.fromhex(ADE20K_COLOURS), dtype=np.uint8).reshape(-1, 3)
LABEL_COLOURS = np.resize(ADE20K_PALETTE, (IGNORE_INDEX, 3))  # of any data set; from the 151st class on they repeat

LABEL_FORMATS = ("PNG", "BMP", "TIFF", "GIF")
# How Pillow calls one channel of up to 8 bits: of 1, 2, 4 or 8, I where white is 0, R where bits come in reverse
RAW_MODE = re.compile(r"(?:(?P<one>1)|[LP])(?:;(?P<bits>[124])?(?P<inverted>I)?R?)?")
WIDE_MODE = re.compile(r"I;16[BLN]?")  # one of 16 bits
COLOUR_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
LOSSY = ("jpeg", "webp", "jp2k")  # parts of the names of a TIFF's compressions
NUM_VALUES, NUM_COLOURS = 1 << 16, 1 << 24  # that a label map can hold; a colour is the number 0xrrggbb
NEEDED = "a label map has one channel of class numbers, of 8 or 16 bits"
IGNORED_NAME = "ignore"  # in --label_values: no class
COLOUR = re.compile(r"#[0-9a-f]{6}")
VALUES_FORM = (
    "--label_values takes VALUE=NAME,VALUE=NAME,... in the order of the classes, or a file with "
    f"VALUE<TAB>NAME on every line; a value is a number of 0 to {NUM_VALUES - 1} or a colour #rrggbb; {IGNORED_NAME} "
    "as a name leaves it out"
)


# ------------------------------------------------------------------------------------------------ classes of values


def label_table(num_classes: int, ignore_zero: bool, label_values: Mapping[str, str] | None = None) -> np.ndarray:
    """Give the class of every value of a label map; IGNORE_INDEX, or -1 where no such value may be.

    ADE20K: 0 is "other" and ignored, 1 to 150 are the classes 0 to 149. Without `ignore_zero` raw values are classes.
    255 is ignored either way. With `label_values`, names by value as `parse_label_values` gives them, these decide
    alone; where they are colours the table has an entry for each of 2^24 (32 MB), which forked workers share.
    """
    if label_values:
        return table_of_values(tuple(label_values.items()))
    first = int(ignore_zero)
    if not 1 <= num_classes <= IGNORE_INDEX - first:
        raise ValueError(f"num_classes must lie between 1 and {IGNORE_INDEX - first}, not {num_classes}")
    table = np.full(NUM_VALUES, -1, dtype=np.int16)
    table[[0, IGNORE_INDEX]] = IGNORE_INDEX
    table[first : first + num_classes] = np.arange(num_classes)
    return table


@functools.cache
def table_of_values(items: tuple[tuple[str, str], ...]) -> np.ndarray:
    names = class_names_of(dict(items))
    table = np.full(NUM_COLOURS if items[0][0].startswith("#") else NUM_VALUES, -1, dtype=np.int16)
    for value, name in items:
        table[number_of(value)] = IGNORE_INDEX if name == IGNORED_NAME else names.index(name)
    return table


def number_of(value: str) -> int:
    return int(value[1:], 16) if value.startswith("#") else int(value)


def class_names_of(label_values: Mapping[str, str]) -> list[str]:
    """Give the names of the classes in their order; values of one name are one class."""
    return [name for name in dict.fromkeys(label_values.values()) if name != IGNORED_NAME]


def parse_label_values(text: str) -> dict[str, str]:
    """Read --label_values, names by value or colour as "7" or "#00ff7f"; ValueError says what is wrong with it."""
    path = Path(text).expanduser()
    if "=" in text and not path.is_file():
        rows, form = [row.partition("=") for row in text.split(",") if row.strip()], "VALUE=NAME"
    else:
        try:
            content = read_text(path)
        except OSError as error:
            raise ValueError(
                f"--label_values {text} cannot be read ({error.strerror or error}); {VALUES_FORM}"
            ) from error
        rows, form = [line.partition("\t") for line in content.splitlines() if line.strip()], "VALUE<TAB>NAME"
    found: dict[str, str] = {}
    for value, separator, name in rows:
        given, value, name = f"{value}{separator}{name}".strip(), value.strip().lower(), name.strip()
        is_value = re.fullmatch("[0-9]{1,5}", value, re.ASCII) and int(value) < NUM_VALUES
        if not name or not (is_value or COLOUR.fullmatch(value)):
            raise ValueError(f"--label_values has {given!r}, which is no {form}; {VALUES_FORM}")
        value = str(int(value)) if is_value else value
        if value in found:
            raise ValueError(f"--label_values has {value} twice, as {found[value]} and as {name}; keep one")
        found[value] = name
    if len({value.startswith("#") for value in found}) > 1:
        raise ValueError("--label_values mixes numbers and colours; label maps are read as the ones or as the others")
    num_classes = len(class_names_of(found))
    if not 2 <= num_classes <= IGNORE_INDEX:
        raise ValueError(
            f"--label_values names {num_classes} classes (without {IGNORED_NAME}); 2 to {IGNORE_INDEX} are possible. "
            "Name the background too, where it is to be told from the rest"
        )
    return found


def read_label_flags(given: dict[str, object], names: list[str] | None) -> dict[str, object]:
    """Read the --label_values that was given, and give what follows from it; ValueError where that cannot be.

    `names` are the classes of a segmenter that is to be evaluated.
    """
    given["label_values"] = parse_label_values(given["label_values"])
    found = class_names_of(given["label_values"])
    for name in ("ignore_zero", "class_names"):
        if name in given:
            raise ValueError(f"--label_values says which value is which class, and its name; leave --{name} out")
    if given.get("num_classes", len(found)) != len(found):
        raise ValueError(
            f"--num_classes {given['num_classes']}, but --label_values names {len(found)} classes: {', '.join(found)}. "
            "Leave --num_classes out"
        )
    if names is not None and found != names:
        raise ValueError(
            f"--label_values names the classes {', '.join(found)}; the segmenter has {', '.join(names)}. Give the same "
            "names in the same order"
        )
    return {"num_classes": len(found), "class_names": found, "ignore_zero": False}


def name_classes(
    given: list[str] | str | None, num_classes: int, ignore_zero: bool, drawn: tuple[str, ...] | None = None
) -> list[str]:
    """Give the names of the classes: those that are known, of the file of --class_names, ADE20K's, the demo's."""
    if isinstance(given, list):
        return given
    if given is not None:
        names = [line.strip() for line in read_text(Path(given)).splitlines() if line.strip()]
        if len(names) != num_classes:
            raise ValueError(f"--class_names {given} has {len(names)} names for {num_classes} classes")
        return names
    if num_classes == ADE20K_NUM_CLASSES and ignore_zero:
        return list(ADE20K_CLASS_NAMES)
    return list(drawn or (f"class {index}" for index in range(num_classes)))


# ------------------------------------------------------------------------------------------------ reading


def read_raw_labels(source: str | Path | BinaryIO, *, colours: bool = False) -> np.ndarray:
    """Read the samples of a label map as they lie in the file, uint8 or uint16 (H, W), or its colours, uint32 (H, W).

    Pillow spreads greys of 1, 2 and 4 bits over 0 to 255, and inverts those of a TIFF whose white is 0. Colours are
    what a person sees, 0xrrggbb, without regard to transparency. ValueError where it is no label map.
    """
    file = load_file(source) if isinstance(source, str | Path) else source
    with open_image(file) as image:
        if image.format not in LABEL_FORMATS:
            raise ValueError(
                f"{source} is a {image.format}, whose compression changes values and colours, and so makes up classes; "
                "make the label maps anew as PNG (converting this file keeps its errors)"
            )
        layout = read_layout(image) if image.format == "TIFF" else None
        if layout and any(name in str(image.info.get("compression")) for name in LOSSY):
            raise ValueError(f"{source} is compressed as {image.info['compression']}, which makes up class numbers")
        if layout and layout.kind != "u":
            raise ValueError(f"{source} has {KIND_NAMES[layout.kind]} samples; {NEEDED}")
        arguments = image.tile[0].args if image.tile and image.format != "GIF" else "P"
        mode = arguments if isinstance(arguments, str) else str(arguments[0])
        if colours:
            return read_colours(image, mode, source)
        if WIDE_MODE.fullmatch(mode) and not (layout and layout.white_is_zero):
            return np.asarray(image).astype(np.uint16)
        form = RAW_MODE.fullmatch(mode)
        if image.mode not in ("1", "L", "P") or form is None:
            raise ValueError(f"{source} is of mode {image.mode}; {NEEDED}{name_colours(image, mode, source)}")
        raw = np.asarray(image).astype(np.uint8)
    bits = 1 if form["one"] else int(form["bits"] or 8)
    if image.mode == "P":
        return raw
    white = 1 if image.mode == "1" else 255
    return (white - raw if form["inverted"] else raw) // (white // (2**bits - 1))


def read_colours(image: Image.Image, raw_mode: str, source: object) -> np.ndarray:
    """Give the colours of an opened label map as numbers 0xrrggbb, uint32 (H, W)."""
    if image.mode not in COLOUR_MODES or "16" in raw_mode:
        raise ValueError(f"{source} is of mode {raw_mode}; colours of label maps have 8 bits a channel")
    rgb = np.asarray(image.convert("RGBA").convert("RGB"), dtype=np.uint32)  # (H, W, 3)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def name_colours(image: Image.Image, raw_mode: str, source: object) -> str:
    """Say what to do about a label map of colours; empty for one that has none."""
    if image.mode not in COLOUR_MODES or "16" in raw_mode:
        return ""
    pixels = count_values(read_colours(image, raw_mode, source))
    first = ",".join(f"{show_value(value, True)}=NAME" for value in sorted(pixels)[:2])
    return f". If its colours are the classes, give --label_values '{first},...'; found: {name_values(pixels, True)}"


def read_label_map(source: str | Path | BinaryIO, table: np.ndarray) -> np.ndarray:
    """Read a label map as classes, uint8 (H, W); ValueError names the file and what is wrong with it."""
    raw = read_raw_labels(source, colours=has_colours(table))
    classes = table.take(raw)  # in half of the time of table[raw]
    if classes.min() < 0:
        unknown = [show_value(value, has_colours(table)) for value in np.unique(raw[classes < 0])]
        raise ValueError(f"{source} has the label values {name_some(unknown, 10)}, which are no classes here")
    return classes.astype(np.uint8)


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest, by torch's rule: anything else would make up classes. (H, W) -> size."""
    places = (torch.arange(side, dtype=torch.float32)[None, None] for side in labels.shape)
    rows, columns = (F.interpolate(p, n)[0, 0].int().numpy() for p, n in zip(places, size, strict=True))
    return torch.from_numpy(labels.numpy().take(rows, 0).take(columns, 1))


# ------------------------------------------------------------------------------------------------ what occurs


def has_colours(table: np.ndarray) -> bool:
    return len(table) == NUM_COLOURS


def count_values(raw: np.ndarray) -> dict[int, int]:
    """Give the pixels of each value of a label map."""
    if raw.dtype == np.uint32:
        values, counts = np.unique(raw, return_counts=True)
    else:
        counts = np.bincount(raw.ravel())
        values = np.flatnonzero(counts)
        counts = counts[values]
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def show_value(value: int, colours: bool) -> str:
    return f"#{value:06x}" if colours else str(value)


def name_values(pixels: Mapping[int, int], colours: bool = False) -> str:
    """Name values with their pixels: the commonest colours, or all numbers in their order."""
    order = sorted(pixels, key=lambda value: -pixels[value]) if colours else sorted(pixels)
    return name_some([f"{show_value(value, colours)} on {pixels[value]:,} pixels" for value in order], 10)


def name_table(table: np.ndarray) -> str:
    """Name the values that a table allows, runs of numbers by their ends."""
    allowed, colours = np.flatnonzero(table >= 0), has_colours(table)
    runs = np.split(allowed, np.flatnonzero(np.diff(allowed) != 1) + 1)
    ends = [[show_value(value, colours) for value in dict.fromkeys((run[0], run[-1]))] for run in runs]
    return name_some([" to ".join(run) for run in ends], 10)


def count_classes(pixels: Mapping[int, int], table: np.ndarray, num_classes: int) -> np.ndarray:
    """Turn pixels of each raw value into pixels of each class, int64 (K,)."""
    counts = np.zeros(num_classes, dtype=np.int64)
    for value, count in pixels.items():
        if 0 <= table[value] < IGNORE_INDEX:
            counts[table[value]] += count
    return counts


def describe_labels(pixels: Mapping[int, int], table: np.ndarray, names: list[str]) -> str:
    """Say how many pixels are ignored, which classes they are of, and which classes never occur."""
    counts, names = count_classes(pixels, table, len(names)), [escape(name, also_bytes=True) for name in names]
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda k: -counts[k])
    shares = [f"{names[k]} {counts[k] / counts.sum():.1%}" for k in order]
    text = f"{len(order)} of {len(names)} classes occur: {name_some(shares, 10)}"
    absent = [names[k] for k in np.flatnonzero(counts == 0)]
    if absent:
        text += f"; never: {name_some(absent, 10)}"
    return f"{text}; {1 - counts.sum() / sum(pixels.values()):.1%} of the pixels are ignored"


def refuse_one_class(pixels: Mapping[int, int], table: np.ndarray, num_classes: int, folder: str) -> None:
    """Refuse labels of fewer than two classes: every answer would be right; ValueError says what may be wrong."""
    if (count_classes(pixels, table, num_classes) > 0).sum() > 1:
        return
    total, colours = sum(pixels.values()), has_colours(table)
    values = ", ".join(f"{show_value(raw, colours)} on {pixels[raw] / total:.1%}" for raw in sorted(pixels))
    ignored = [raw for raw in sorted(pixels) if table[raw] == IGNORE_INDEX]
    message = f"only one of --num_classes {num_classes} occurs in {folder}. Raw label values: {values} of the pixels"
    if ignored:
        named = " and ".join(show_value(raw, colours) for raw in ignored)
        given = ",".join(f"{show_value(raw, colours)}=NAME" for raw in sorted(pixels))
        message += (
            f"; {named} {'is' if len(ignored) == 1 else 'are'} ignored. If all are classes, give --label_values {given}"
        )
    raise ValueError(message)


def raw_labels(classes: np.ndarray, record: Mapping) -> np.ndarray:
    """Turn classes (H, W) into the values of the training's label maps, (H, W), or their colours, (H, W, 3).

    `record` is the config.json of a segmenter. Of several values of a class it is the first.
    """
    given = record.get("label_values")
    if not given:
        return (classes + int(record["ignore_zero"])).astype(np.uint8)
    first = [next(value for value, name in given.items() if name == wanted) for wanted in class_names_of(given)]
    values = np.array([number_of(value) for value in first])
    if first[0].startswith("#"):
        values = np.stack([values >> 16, values >> 8 & 255, values & 255], axis=-1)
    return values.astype(np.uint8 if values.max() < 256 else np.uint16)[classes]
