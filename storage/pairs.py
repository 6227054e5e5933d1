"""Images with label maps: their pairing, checking and reading, and ADE20K's names and colours.

Lists of images alone, and the cache that remembers what was checked, live in lists.py.
"""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from storage.decoding import DECODE_ERRORS, IMAGE_FORMATS, NamedBytes, read_image
from storage.files import fingerprint
from storage.lists import ListCache, contents, name_some, scan_images
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


def read_label_map(source: str | Path | io.BytesIO, table: np.ndarray) -> np.ndarray:
    """Read a label map as classes, uint8 (H, W); ValueError names the file and what is wrong with it."""
    with Image.open(source, formats=LABEL_FORMATS) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"{source} is of mode {image.mode}; a label map has one 8-bit channel of class numbers")
        raw = np.asarray(image)
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

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.images[index]))

    def label_path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.label_maps[index]))

    def image_file(self, index: int) -> str | io.BytesIO:
        """Give what an image can be opened from; `label_file` likewise."""
        return self.path(index)

    def label_file(self, index: int) -> str | io.BytesIO:
        return self.label_path(index)

    def stamps(self) -> list[tuple[int, int]]:
        """Give size and modification time (ns) of every file."""
        statuses = [os.stat(path(i)) for path in (self.path, self.label_path) for i in range(len(self))]
        return [(status.st_size, status.st_mtime_ns) for status in statuses]

    def fingerprint(self) -> str:
        return fingerprint(b"\0".join([*self.images.tolist(), *self.label_maps.tolist()]))

    def describe(self) -> str:
        return f"{len(self):,} pairs in {os.path.dirname(self.path(0))}"


@dataclass(frozen=True)
class PackedPairs(PairList):
    """A `PairList` whose files lie in a pack, byte for byte: image i is record 2 i, its label map record 2 i + 1."""

    pack: Pack

    def image_file(self, index: int) -> NamedBytes:
        return self.pack.read(2 * index)

    def label_file(self, index: int) -> NamedBytes:
        return self.pack.read(2 * index + 1)

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
        return PackedPairs(pack.folder, pack.names[0::2], pack.names[1::2], pack)
    if not (root / "images").is_dir() and (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    found = []
    for kind in ("images", "annotations"):
        folder = root / kind / split
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there; {LABEL_LAYOUT}\nin {root}: {contents(root)}")
        files, _ = scan_images(folder)
        by_stem = {}
        for file in files:
            stem = os.path.splitext(file)[0]
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


def check_pairs(
    pairs: PairList, table: np.ndarray, num_threads: int, cache: ListCache | None = None, *, decode: bool = False
) -> None:
    """Open every label map, and the head of every image (`decode`: all of it); ValueError names what cannot be used.

    Minutes for ADE20K, so `cache` remembers a check by the names, sizes and times of all files.
    """
    question = (pairs.fingerprint(), str(pairs.root), table.tolist(), pairs.stamps(), decode)
    if cache is not None and cache.passed(*question):
        return
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        found = list(pool.map(lambda i: check_pair(pairs, i, table, decode), range(len(pairs))))
    problems = [check.problem for check in found if check.problem]
    if problems:
        raise ValueError("label maps or images that cannot be used:\n  " + name_some(problems, 10, "\n  "))
    if not any(check.has_labels for check in found):
        raise ValueError(f"not one pixel has a label in {os.path.dirname(pairs.label_path(0))}: all are ignored")
    if cache is not None:
        cache.remember(*question)


class PairCheck(NamedTuple):
    """What is wrong with a pair, None where nothing is, and whether any pixel has a label that counts."""

    problem: str | None
    has_labels: bool


def check_pair(pairs: PairList, index: int, table: np.ndarray, decode: bool) -> PairCheck:
    """Look at a pair. Images that cannot be decoded are training's to skip, and a problem only with `decode`."""
    label_path, image_path = pairs.label_path(index), pairs.path(index)
    try:
        labels = read_label_map(pairs.label_file(index), table)
    except DECODE_ERRORS as error:
        reason = str(error)
        return PairCheck(reason if reason.startswith(label_path) else f"{label_path}: {reason}", False)
    height, width = labels.shape
    has_labels = bool((labels != IGNORE_INDEX).any())
    try:
        with Image.open(pairs.image_file(index), formats=IMAGE_FORMATS) as image:
            size, turned = image.size, is_turned(image)
        if decode:
            read_image(pairs.image_file(index))
    except DECODE_ERRORS as error:
        return PairCheck(f"{image_path}: {type(error).__name__}: {error}" if decode else None, has_labels)
    if (width, height) != size and not (turned and (height, width) == size):
        reason = f"{width} x {height} pixels, but its image has {size[0]} x {size[1]}"
        return PairCheck(f"{label_path}: {reason}", has_labels)
    return PairCheck(None, has_labels)


def is_turned(image: Image.Image) -> bool:
    """Tell whether the EXIF flag of an opened image swaps its height and width; a damaged block is none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except DECODE_ERRORS:
        return False
