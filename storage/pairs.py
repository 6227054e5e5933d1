"""Images with label maps: their pairing, checking and reading, and ADE20K's names and colours.

Lists of images alone, and the cache that remembers what was checked, live in lists.py.
"""

import dataclasses
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from storage.bands import ValuePicture, open_values
from storage.decoding import (
    DECODE_ERRORS,
    NamedBytes,
    load_file,
    open_image,
    read_image,
    read_layout,
    rotation_flag,
)
from storage.files import escape, fingerprint, open_regular
from storage.held_out import choose_held_out
from storage.lists import ListCache, as_nfc, as_text, contents, name_some, scan_images
from storage.packs import Pack, is_packed, open_pack

ADE20K_NUM_CLASSES = 150
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

LABEL_FORMATS = ("PNG", "BMP", "TIFF", "GIF")  # a JPEG's compression makes up class ids
# How Pillow calls one channel of up to 8 bits: of 1, 2, 4 or 8, I where white is 0, R where bits come in reverse
RAW_MODE = re.compile(r"(?:(?P<one>1)|[LP])(?:;(?P<bits>[124])?(?P<inverted>I)?R?)?")
LOSSY = ("jpeg", "webp", "jp2k")  # parts of the names of a TIFF's compressions
SWAPPING = (5, 6, 7, 8)  # rotation flags that swap height and width
LABEL_LAYOUT = """expected
  <root>/images/{training,validation}/*.jpg  and  <root>/annotations/{training,validation}/*.png  (ADEChallengeData2016)
with a label map of the same name and size for every image"""


def label_table(num_classes: int, ignore_zero: bool) -> np.ndarray:
    """Give the class of each of the 256 raw values of a label map; IGNORE_INDEX, or -1 where no such value may be.

    ADE20K: 0 is "other" and ignored, 1 to 150 are the classes 0 to 149. Without `ignore_zero` raw values are classes.
    255 is ignored either way. A table, because subtracting one from uint8 would wrap 0 around.
    """
    first = int(ignore_zero)
    if not 1 <= num_classes <= IGNORE_INDEX - first:
        raise ValueError(f"num_classes must lie between 1 and {IGNORE_INDEX - first}, not {num_classes}")
    table = np.full(256, -1, dtype=np.int16)
    table[[0, IGNORE_INDEX]] = IGNORE_INDEX
    table[first : first + num_classes] = np.arange(num_classes)
    return table


def read_raw_labels(source: str | Path | BinaryIO) -> np.ndarray:
    """Read the samples of a label map as they lie in the file, uint8 (H, W); ValueError where it is no label map.

    Pillow spreads greys of 1, 2 and 4 bits over 0 to 255, and inverts those of a TIFF whose white is 0.
    """
    file = load_file(source) if isinstance(source, str | Path) else source
    with open_image(file, LABEL_FORMATS) as image:
        if image.format == "TIFF" and any(name in str(image.info.get("compression")) for name in LOSSY):
            raise ValueError(f"{source} is compressed as {image.info['compression']}, which makes up class numbers")
        if image.format == "TIFF" and read_layout(image).kind == "i":
            raise ValueError(f"{source} has signed samples; a label map has one 8-bit channel of class numbers")
        arguments = image.tile[0].args if image.tile and image.format != "GIF" else "P"
        form = RAW_MODE.fullmatch(arguments if isinstance(arguments, str) else str(arguments[0]))
        if image.mode not in ("1", "L", "P") or form is None:
            raise ValueError(f"{source} is of mode {image.mode}; a label map has one 8-bit channel of class numbers")
        raw = np.asarray(image).astype(np.uint8)
    bits = 1 if form["one"] else int(form["bits"] or 8)
    if image.mode == "P":
        return raw
    white = 1 if image.mode == "1" else 255
    return (white - raw if form["inverted"] else raw) // (white // (2**bits - 1))


def read_label_map(source: str | Path | BinaryIO, table: np.ndarray) -> np.ndarray:
    """Read a label map as classes, uint8 (H, W); ValueError names the file and what is wrong with it."""
    return map_labels(read_raw_labels(source), table, source)


def map_labels(raw: np.ndarray, table: np.ndarray, source: object) -> np.ndarray:
    """Turn raw label values into classes, uint8 (H, W); ValueError names `source` and values that are none."""
    classes = table[raw]
    if classes.min() < 0:
        unknown = np.unique(raw[classes < 0])
        raise ValueError(
            f"{source} has the label values {', '.join(map(str, unknown[:10]))}, which are no classes here"
        )
    return classes.astype(np.uint8)


@dataclass(frozen=True)
class PairList:
    """Images and their label maps, as relative paths; arrays of bytes, as in FileList."""

    root: Path
    images: np.ndarray
    label_maps: np.ndarray
    rotate: bool = dataclasses.field(default=True, kw_only=True)  # label maps lie on images turned by their flags

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.images[index]))

    def label_path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.label_maps[index]))

    def image_file(self, index: int) -> BinaryIO:
        """Open the file of an image; `label_file` likewise."""
        return open_regular(self.path(index))

    def read_image(self, index: int, channels: int) -> Image.Image:
        return read_image(self.path(index), channels, rotate=self.rotate)

    def open_values(self, index: int, channels: int) -> ValuePicture:
        return open_values(self.path(index), channels, rotate=self.rotate)

    def label_file(self, index: int) -> BinaryIO:
        return load_file(self.label_path(index))

    def stamps(self) -> list[tuple[int, int]]:
        """Give size and modification time (ns) of every file."""
        statuses = [os.stat(path(i)) for path in (self.path, self.label_path) for i in range(len(self))]
        return [(status.st_size, status.st_mtime_ns) for status in statuses]

    def fingerprint(self) -> str:
        return fingerprint(b"\0".join([*self.images.tolist(), *self.label_maps.tolist()]))

    def subset(self, indices: np.ndarray) -> "PairList":
        """Give some of the pairs."""
        arrays = {name: value[indices] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return dataclasses.replace(self, **arrays)  # every array has an entry for each pair

    def split(self, fraction: float, seed: int) -> tuple["PairList", "PairList"]:
        """Hold out a share of the pairs; gives the rest and what is held out, as `choose_held_out` says."""
        held_out = choose_held_out(self.images, np.zeros(len(self), dtype=np.int32), fraction, seed)
        return self.subset(~held_out), self.subset(held_out)

    def describe(self) -> str:
        return f"{len(self):,} pairs in {os.path.dirname(self.path(0))}"


@dataclass(frozen=True)
class PackedPairs(PairList):
    """A `PairList` whose files lie in a pack, byte for byte: image i is record `records[i]`, its label map the next."""

    pack: Pack
    records: np.ndarray

    def image_file(self, index: int) -> NamedBytes:
        return self.pack.read(int(self.records[index]))

    def read_image(self, index: int, channels: int) -> Image.Image:
        return read_image(self.image_file(index), channels, rotate=self.rotate)

    def open_values(self, index: int, channels: int) -> ValuePicture:
        return open_values(self.image_file(index), channels, rotate=self.rotate)

    def label_file(self, index: int) -> NamedBytes:
        return self.pack.read(int(self.records[index]) + 1)

    def stamps(self) -> list[tuple[int, int]]:
        statuses = [os.stat(self.pack.shard_path(number)) for number in range(len(self.pack.header["shards"]))]
        return [(status.st_size, status.st_mtime_ns) for status in statuses]

    def fingerprint(self) -> str:
        return fingerprint(f"{super().fingerprint()} {self.pack.digest}".encode())

    def describe(self) -> str:
        return f"{len(self):,} pairs in {self.root}, packed"


def list_pairs(root: str | Path, split: str) -> PairList:
    """Pair the images of a split, "training" or "validation", with their label maps by file name.

    `root` holds images/ and annotations/, or is the folder above, or what tools/pack_dataset.py made of it.
    FileNotFoundError names what has no partner.
    """
    root = Path(root).resolve()
    if is_packed(root / split):
        pack = open_pack(root / split, "pairs")
        if len(pack.names) % 2:
            raise ValueError(f"{pack.folder} holds {len(pack.names)} records, not pairs of them; pack the folder again")
        records = np.arange(0, len(pack.names), 2)
        return PackedPairs(pack.folder, pack.names[0::2], pack.names[1::2], pack, records)
    if not (root / "images").is_dir() and (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    found = []
    for kind in ("images", "annotations"):
        folder = root / kind / split
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there; {LABEL_LAYOUT}\nin {root}: {contents(root)}")
        by_stem = {}
        for file in scan_images(folder).files:
            stem = as_nfc(as_text(os.path.splitext(file)[0]))
            if stem in by_stem:
                raise ValueError(f"{folder} has both {by_stem[stem]} and {file}; keep one")
            by_stem[stem] = file
        found.append(by_stem)
    images, label_maps = found
    for one, other, what in ((images, label_maps, "no label map"), (label_maps, images, "no image")):
        alone = sorted(one.keys() - other.keys())
        if alone:
            names = name_some([one[stem] for stem in alone])
            raise FileNotFoundError(f"{root}, {split}: {what} for {names}; {LABEL_LAYOUT}")
    if not images:
        raise FileNotFoundError(f"no images in {root / 'images' / split}; {LABEL_LAYOUT}")
    paths = [
        np.array([os.fsencode(os.path.join(kind, split, files[stem])) for stem in sorted(images)])
        for kind, files in (("images", images), ("annotations", label_maps))
    ]
    return PairList(root, *paths)


class PairSurvey(NamedTuple):
    """What was found in a split: its pairs, and how many pixels have each raw label value, int64 (256,)."""

    pairs: PairList
    pixels: np.ndarray
    note: str  # on rotation flags; empty where no image has one


def check_pairs(
    pairs: PairList,
    table: np.ndarray,
    num_threads: int,
    cache: ListCache | None = None,
    *,
    decode: bool = False,
    rotate: bool = True,
    channels: int = 3,
    own_units: bool = False,
) -> PairSurvey:
    """Read every label map, and the head of every image (`decode`: all of it), and give what was found.

    The images of the split are all turned by their rotation flags, or none is: what the shapes of those that tell
    say, and `rotate` where none does. `own_units` tells that images are not read as 8-bit pictures.
    ValueError names what cannot be used. Minutes for ADE20K, so `cache` remembers
    a check by the names, sizes and times of all files.
    """
    question = ("survey", pairs.fingerprint(), str(pairs.root), table.tolist(), pairs.stamps(), decode, rotate)
    question += (channels, own_units)
    answer = cache.recall(*question) if cache is not None else None
    if answer is None:
        with ThreadPoolExecutor(max(1, num_threads)) as pool:
            found = list(
                pool.map(lambda i: check_pair(pairs, i, table, decode, channels, own_units), range(len(pairs)))
            )
        problems = [check.problem for check in found if check.problem]
        if problems:
            raise ValueError("label maps or images that cannot be used:\n  " + name_some(problems, 10, "\n  "))
        turned, note = choose_rotation(pairs, found, rotate)
        answer = {"rotate": turned, "note": note, "pixels": sum(check.pixels for check in found).tolist()}
        if not any(answer["pixels"][raw] for raw in np.flatnonzero(table != IGNORE_INDEX)):
            raise ValueError(f"not one pixel has a label in {os.path.dirname(pairs.label_path(0))}: all are ignored")
        if cache is not None:
            cache.remember(answer, *question)
    pixels = np.array(answer["pixels"], dtype=np.int64)
    return PairSurvey(dataclasses.replace(pairs, rotate=answer["rotate"]), pixels, answer["note"])


class PairCheck(NamedTuple):
    """What is wrong with a pair, if anything; the pixels of each raw value (256,); the image's rotation flag.

    `fits` tells whether the label map has the shape of the image as stored, and as its flag turns it.
    """

    problem: str | None
    pixels: np.ndarray | int = 0
    flag: int = 1
    fits: tuple[bool, bool] = (True, True)


def check_pair(
    pairs: PairList, index: int, table: np.ndarray, decode: bool, channels: int, own_units: bool
) -> PairCheck:
    """Look at a pair. Images that cannot be decoded are training's to skip, and a problem only with `decode`."""
    label_path, image_path = pairs.label_path(index), pairs.path(index)
    try:
        raw = read_raw_labels(pairs.label_file(index))
        labels = map_labels(raw, table, label_path)
    except DECODE_ERRORS as error:
        reason = str(error)
        return PairCheck(reason if reason.startswith(label_path) else f"{label_path}: {reason}")
    pixels = np.bincount(raw.ravel(), minlength=256)
    try:
        if own_units:
            picture = dataclasses.replace(pairs, rotate=False).open_values(index, channels)
            flag, size = picture.flag, (picture.width, picture.height)
        else:
            with pairs.image_file(index) as file:  # of which mostly no more than its head is read
                image = open_image(file)
                flag = rotation_flag(image)
                turned = image.format == "TIFF" and flag in SWAPPING  # Pillow gives their size turned
                size = image.size[::-1] if turned else image.size
            if decode:
                pairs.read_image(index, channels)
    except DECODE_ERRORS as error:
        return PairCheck(f"{image_path}: {type(error).__name__}: {error}" if decode else None, pixels)
    fits = labels.shape[::-1] == size, labels.shape[::-1] == (size[::-1] if flag in SWAPPING else size)
    if not any(fits):
        height, width = labels.shape
        return PairCheck(f"{label_path}: {width} x {height} pixels, but its image has {size[0]} x {size[1]}", pixels)
    return PairCheck(None, pixels, flag, fits)


def choose_rotation(pairs: PairList, found: list[PairCheck], otherwise: bool) -> tuple[bool, str]:
    """Decide whether the label maps lie on the images as their rotation flags turn them, and say why.

    ValueError where some pairs tell the one and some the other: then no rule is right for those that do not tell.
    """
    stored, turned = ([i for i, check in enumerate(found) if check.fits == fits] for fits in ((1, 0), (0, 1)))
    if stored and turned:
        raise ValueError(
            f"label maps follow no one rule in {pairs.root}: {len(turned)} have the shape of the image as its rotation "
            f"flag turns it ({pairs.label_path(turned[0])}), {len(stored)} as it is stored "
            f"({pairs.label_path(stored[0])}). Write the images anew without rotation flags (EXIF or TIFF orientation)"
        )
    flagged = sum(check.flag != 1 for check in found)
    if not flagged:
        return otherwise, ""
    rotate = bool(turned) if stored or turned else otherwise
    basis = f"the shapes of {len(stored or turned)} pairs tell" if stored or turned else "no pair tells by its shape"
    how = "turned by them, as a person sees the image" if rotate else "not turned by them, as the labels are drawn"
    return rotate, f"{flagged:,} of {len(found):,} images have a rotation flag: all are {how}; {basis}"


def describe_labels(pixels: np.ndarray, table: np.ndarray, names: list[str]) -> str:
    """Say how many pixels are ignored, which classes they are of, and which classes never occur."""
    counts, names = count_classes(pixels, table, len(names)), [escape(name, also_bytes=True) for name in names]
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda k: -counts[k])
    shares = [f"{names[k]} {counts[k] / counts.sum():.1%}" for k in order]
    text = f"{len(order)} of {len(names)} classes occur: {name_some(shares, 10)}"
    absent = [names[k] for k in np.flatnonzero(counts == 0)]
    if absent:
        text += f"; never: {name_some(absent, 10)}"
    return f"{text}; {1 - counts.sum() / pixels.sum():.1%} of the pixels are ignored"


def count_classes(pixels: np.ndarray, table: np.ndarray, num_classes: int) -> np.ndarray:
    """Turn pixels of each raw value (256,) into pixels of each class, int64 (K,)."""
    classes = (table >= 0) & (table != IGNORE_INDEX)
    return np.bincount(table[classes], pixels[classes], minlength=num_classes).astype(np.int64)


def refuse_one_class(pixels: np.ndarray, table: np.ndarray, num_classes: int, folder: str) -> None:
    """Refuse labels of fewer than two classes: every answer would be right; ValueError says what may be wrong."""
    counts = count_classes(pixels, table, num_classes)
    if (counts > 0).sum() > 1:
        return
    values = ", ".join(f"{raw} on {pixels[raw] / pixels.sum():.1%}" for raw in np.flatnonzero(pixels))
    ignored = [str(raw) for raw in np.flatnonzero(pixels) if table[raw] == IGNORE_INDEX]
    message = f"only one of --num_classes {num_classes} occurs in {folder}. Raw label values: {values} of the pixels"
    if ignored:
        message += f"; {' and '.join(ignored)} {'is' if len(ignored) == 1 else 'are'} ignored"
    if pixels[IGNORE_INDEX]:
        message += ". If 255 is a class, write the label maps anew with 1 in its place: labels[labels == 255] = 1"
    elif pixels[0] and table[0] == IGNORE_INDEX:
        message += ". If 0 is a class, give --no-ignore_zero"
    raise ValueError(message)
