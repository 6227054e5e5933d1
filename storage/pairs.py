"""Images with label maps: their pairing, and the check that all can be used.

What a label map holds lives in labels.py, where pairs lie in pair_folders.py, lists of images alone, and the cache that
remembers what was checked, in lists.py.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from storage.bands import ValuePicture, open_values
from storage.decoding import DECODE_ERRORS, NamedBytes, Picture, load_file, open_image, open_picture, rotation_flag
from storage.files import fingerprint, open_regular
from storage.held_out import choose_held_out
from storage.labels import (
    IGNORE_INDEX,
    IGNORED_NAME,
    NUM_VALUES,
    count_values,
    has_colours,
    name_table,
    read_raw_labels,
    show_value,
)
from storage.lists import ListCache, as_nfc, as_text, contents, name_some, scan_images
from storage.packs import Pack, is_packed
from storage.pair_folders import AS_KNOWN, EXPECTED, PairLayout, describe_missing, find_pair_folders
from storage.remote import open_pack

SWAPPING = (5, 6, 7, 8)  # rotation flags that swap height and width
EXAMPLES = 3  # label maps that are named for a value
WAY_OUT = f"say what each value is: --label_values VALUE=NAME,..., where the name {IGNORED_NAME} leaves a value out"


@dataclass(frozen=True)
class PairList:
    """Images and their label maps, as relative paths; arrays of bytes, as in FileList."""

    root: Path
    images: np.ndarray
    label_maps: np.ndarray
    rotate: bool = dataclasses.field(default=True, kw_only=True)  # label maps lie on images turned by their flags
    notes: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)  # what was left out

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.images[index]))

    def label_path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.label_maps[index]))

    @property
    def shards(self) -> np.ndarray | None:
        """Give the shard of each pair, where shards have to be fetched; else None."""
        return None

    def image_file(self, index: int) -> BinaryIO:
        """Open the file of an image; `label_file` likewise."""
        return open_regular(self.path(index))

    def open_picture(self, index: int, channels: int) -> Picture:
        return open_picture(load_file(self.path(index)), channels, rotate=self.rotate)

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

    def folder_of(self, paths: np.ndarray) -> str:
        """Give the folder that all images, or all label maps, lie in or below."""
        folders = {os.path.dirname(os.path.join(self.root, os.fsdecode(path))) for path in paths}
        return os.path.commonpath(folders)

    def describe(self) -> str:
        images, label_maps = self.folder_of(self.images), self.folder_of(self.label_maps)
        return f"{len(self):,} pairs in {images}" + f", label maps in {label_maps}" * (images != label_maps)


@dataclass(frozen=True)
class PackedPairs(PairList):
    """A `PairList` whose files lie in a pack, byte for byte: image i is record `records[i]`, its label map the next."""

    pack: Pack
    records: np.ndarray

    @property
    def shards(self) -> np.ndarray | None:
        return self.pack.shards[self.records] if self.pack.remote else None

    def image_file(self, index: int) -> NamedBytes:
        return self.pack.read(int(self.records[index]))

    def open_picture(self, index: int, channels: int) -> Picture:
        return open_picture(self.image_file(index), channels, rotate=self.rotate)

    def open_values(self, index: int, channels: int) -> ValuePicture:
        return open_values(self.image_file(index), channels, rotate=self.rotate)

    def label_file(self, index: int) -> NamedBytes:
        return self.pack.read(int(self.records[index]) + 1)

    def stamps(self) -> list[tuple[int, int]]:
        return self.pack.stamps()

    def fingerprint(self) -> str:
        return fingerprint(f"{super().fingerprint()} {self.pack.digest}".encode())

    def describe(self) -> str:
        return f"{len(self):,} pairs in {self.root}, {self.pack.describe()}"


def list_pairs(root: str | Path, split: str, layout: PairLayout = AS_KNOWN) -> PairList:
    """Pair the images of a split, "training" or "validation", with their label maps by file name.

    `root` holds the folders of `layout`, or is the folder above ADE20K's, or what tools/pack_dataset.py made of it.
    FileNotFoundError names what has no partner.
    """
    root = Path(root).resolve()
    if is_packed(root / split):
        pack = open_pack(root / split, "pairs")
        if layout != AS_KNOWN:
            raise ValueError(f"{pack.folder} is packed, so its pairs are known; leave --image_* and --label_* out")
        records = np.arange(0, len(pack.names), 2)
        return PackedPairs(pack.folder, pack.names[0::2], pack.names[1::2], pack=pack, records=records)
    folders = find_pair_folders(root, split, layout)
    if folders is None:
        raise FileNotFoundError(f"{describe_missing(root, split, layout)}; {EXPECTED}\nin {root}: {contents(root)}")
    root, *kinds = folders
    suffixes = (layout.image_suffix, layout.label_suffix)
    if kinds[0] == kinds[1] and suffixes[0] == suffixes[1]:
        raise ValueError(
            f"images and label maps both lie in {root / kinds[0]}: give --label_suffix, what the names of label maps "
            "alone end in, such as _mask or .png"
        )
    found, notes = [], ()
    for kind, suffix, other in zip(kinds, suffixes, suffixes[::-1], strict=True):
        by_name, left_out = {}, []
        for file in scan_images(root / kind).files:
            name, names_other = name_without(file, suffix), name_without(file, other) is not None
            if kinds[0] == kinds[1] and names_other and (name is None or len(other) > len(suffix)):
                continue  # it is the other of a pair
            if name is None:
                left_out.append(file)
            elif name in by_name:
                raise ValueError(f"{root / kind} has both {by_name[name]} and {file}; keep one")
            else:
                by_name[name] = os.path.normpath(os.path.join(kind, file))
        if left_out:
            notes += (f"{len(left_out):,} files do not end in {suffix}: {name_some(left_out)}",)
        found.append(by_name)
    images, label_maps = found
    alone = []
    for one, other, what in ((images, label_maps, "no label map"), (label_maps, images, "no image")):
        names = [os.path.basename(one[name]) for name in sorted(one.keys() - other.keys())]
        if names:
            alone.append(f"{what} for {name_some(names)}")
    if alone:
        pairs = f"{len(images.keys() & label_maps.keys()):,} pairs found"
        raise FileNotFoundError(f"{root}, {split}: {'; '.join(alone)}; {pairs}; {EXPECTED}")
    if not images:
        endings = "".join(f" that end in {suffix}" for suffix in suffixes[:1] if suffix)
        raise FileNotFoundError(f"no images{endings} in {root / kinds[0]}; {EXPECTED}")
    paths = [np.array([os.fsencode(files[name]) for name in sorted(images)]) for files in found]
    return PairList(root, *paths, notes=notes)


def name_without(file: str, suffix: str) -> str | None:
    """Give the name that a pair has in common: without its ending and suffix (or suffix with ending); None without."""
    stem, suffix = as_nfc(as_text(os.path.splitext(file)[0])), as_nfc(suffix)
    for name in (stem, as_nfc(as_text(file))):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


class PairSurvey(NamedTuple):
    """What was found in a split, whatever the classes: its pairs, and how many pixels have each raw label value."""

    pairs: PairList
    pixels: dict[int, int]
    examples: dict[int, list[int]]  # the first pairs that have a value
    note: str  # on rotation flags; empty where no image has one

    def describe_values(self, values: Iterable[int], colours: bool = False) -> str:
        """Say on how many pixels values are, and in which files, a line each, the commonest first."""
        lines, total = [], sum(self.pixels.values())
        for value in sorted(values, key=lambda value: -self.pixels[value]):
            files = name_some([os.path.basename(self.pairs.label_path(index)) for index in self.examples[value]])
            count = self.pixels[value]
            lines.append(
                f"  {show_value(value, colours)} on {count:,} pixels ({count / total:.2%}), such as in {files}"
            )
        return name_some(lines, 10, "\n")


def check_pairs(
    pairs: PairList, table: np.ndarray, num_threads: int, cache: ListCache | None = None, **options: bool | int
) -> PairSurvey:
    """Survey pairs, as `survey_pairs` with these options, and refuse label values that `table` does not have."""
    survey = survey_pairs(pairs, num_threads, cache, colours=has_colours(table), **options)
    check_values(survey, table)
    return survey


def survey_pairs(
    pairs: PairList,
    num_threads: int,
    cache: ListCache | None = None,
    *,
    colours: bool = False,
    held_out: bool = False,
    rotate: bool = True,
    channels: int = 3,
    own_units: bool = False,
) -> PairSurvey:
    """Read every label map, and the head of every image (`held_out`: each must have one), and give what was found.

    The images of the split are all turned by their rotation flags, or none is: what the shapes of those that tell
    say, and `rotate` where none does. `own_units` tells that images are not read as 8-bit pictures, `colours` that
    label maps are read as colours. ValueError names what cannot be used. Minutes for ADE20K, so `cache` remembers
    a survey by the names, sizes and times of all files. It does not hang on the classes, so these may change.
    """
    question = ("label values", pairs.fingerprint(), str(pairs.root), pairs.stamps(), colours, held_out, rotate)
    question += (channels, own_units)
    answer = cache.recall(*question) if cache is not None else None
    if answer is None:
        with ThreadPoolExecutor(max(1, num_threads)) as pool:
            found = list(
                pool.map(lambda i: check_pair(pairs, i, colours, held_out, channels, own_units), range(len(pairs)))
            )
        problems = [check.problem for check in found if check.problem]
        if problems:
            raise ValueError("label maps or images that cannot be used:\n  " + name_some(problems, 10, "\n  "))
        turned, note = choose_rotation(pairs, found, rotate)
        pixels, examples = Counter(), {}
        for index, check in enumerate(found):
            pixels.update(check.pixels)
            for value in check.pixels:
                if len(examples.setdefault(value, [])) < EXAMPLES:
                    examples[value].append(index)
            if len(pixels) > NUM_VALUES:
                raise ValueError(
                    f"{pairs.label_path(index)} and those before it have more than {NUM_VALUES:,} colours, so they are "
                    "no label maps, or were blurred by resizing or compression"
                )
        values = [[value, count, examples[value]] for value, count in sorted(pixels.items())]
        answer = {"rotate": turned, "note": note, "values": values}
        if cache is not None:
            cache.remember(answer, *question)
    counts, examples = ({value: row[k] for value, *row in answer["values"]} for k in (0, 1))
    return PairSurvey(dataclasses.replace(pairs, rotate=answer["rotate"]), counts, examples, answer["note"])


def check_values(survey: PairSurvey, table: np.ndarray) -> None:
    """Refuse label values that `table` does not have, and labels that are all ignored; ValueError names the way out."""
    folder, colours = survey.pairs.folder_of(survey.pairs.label_maps), has_colours(table)
    unknown = [value for value in survey.pixels if table[value] < 0]
    if unknown:
        listed = ",".join(f"{show_value(value, colours)}={IGNORED_NAME}" for value in unknown[:3])
        raise ValueError(
            f"label maps in {folder} have values that are no classes here; allowed are {name_table(table)}. Found:\n"
            f"{survey.describe_values(unknown, colours)}\nCorrect these files, or {WAY_OUT}: '...,{listed}'"
        )
    if not any(table[value] != IGNORE_INDEX for value in survey.pixels):
        listed = ",".join(f"{show_value(value, colours)}=NAME" for value in survey.pixels)
        raise ValueError(
            f"not one pixel has a label in {folder}, as all values are ignored:\n"
            f"{survey.describe_values(survey.pixels, colours)}\nIf they are classes, give --label_values '{listed}'"
        )


def choose_ignore_zero(survey: PairSurvey, num_classes: int) -> tuple[bool, str]:
    """Decide by the values that occur whether 0 is ignored, and say why; ValueError where they allow neither.

    Values below `num_classes` are the classes themselves. Where one reaches it the classes count from 1.
    """
    pixels = survey.pixels
    beyond = [value for value in pixels if value > num_classes and value != IGNORE_INDEX]
    highest = max((value for value in pixels if value != IGNORE_INDEX), default=0)
    zero = f"covers {pixels[0] / sum(pixels.values()):.1%} of the pixels" if 0 in pixels else "does not occur"
    if beyond:
        folder = survey.pairs.folder_of(survey.pairs.label_maps)
        raise ValueError(
            f"label values in {folder} do not fit --num_classes {num_classes}, whose classes are 0 to "
            f"{num_classes - 1}, or 1 to {num_classes} where 0 is ignored; {IGNORE_INDEX} is always ignored. "
            f"0 {zero}. Beyond it:\n{survey.describe_values(beyond)}\n"
            f"Give the right --num_classes, correct these files, or {WAY_OUT}"
        )
    if highest == num_classes:
        return True, f"0 {zero} and is ignored, because values reach {highest}: 1 to {highest} are the classes"
    return False, f"0 {zero} and is a class, because no value reaches {num_classes}; --ignore_zero leaves it out"


class PairCheck(NamedTuple):
    """What is wrong with a pair, if anything; the pixels of each raw value; the image's rotation flag.

    `fits` tells whether the label map has the shape of the image as stored, and as its flag turns it.
    """

    problem: str | None
    pixels: Mapping[int, int] = {}
    flag: int = 1
    fits: tuple[bool, bool] = (True, True)


def check_pair(pairs: PairList, index: int, colours: bool, held_out: bool, channels: int, own_units: bool) -> PairCheck:
    """Look at a pair. An image without a head that can be read is a problem if `held_out`, else training's to skip."""
    label_path, image_path = pairs.label_path(index), pairs.path(index)
    try:
        labels = read_raw_labels(pairs.label_file(index), colours=colours)
    except DECODE_ERRORS as error:
        reason = str(error)
        return PairCheck(reason if reason.startswith(label_path) else f"{label_path}: {reason}")
    pixels = count_values(labels)
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
    except DECODE_ERRORS as error:
        return PairCheck(f"{image_path}: {type(error).__name__}: {error}" if held_out else None, pixels)
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
