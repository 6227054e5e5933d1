"""Folders of images: splits, classes, lists of files, and what is remembered of them between runs.

Decoding lives in decoding.py, the files of a pack in packs.py, images with label maps in pairs.py.
"""

import dataclasses
import datetime
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from storage.bands import ValuePicture, open_values
from storage.decoding import CHANNEL_MODES, IMAGE_SUFFIXES, Picture, load_file, open_picture, to_pixels
from storage.files import fingerprint, optional_write, random_key, read_json, write_json, written_whole
from storage.held_out import choose_held_out
from storage.packs import Pack, PackedRows, is_inner_path, is_packed, read_arrays
from storage.pair_folders import SPLIT_NAMES, list_pair_folders
from storage.remote import open_pack

LAYOUT = (
    """expected one of
  <path_to_data>/train/<class>/*.jpg  and  <path_to_data>/val/<class>/*.jpg   (or validation/; ImageNet's layout)
  <path_to_data>/any/folders/*.jpg                                           (pretraining only: no classes needed)
  <path_to_data>/images/{training,validation}  beside  annotations/                   (likewise: the images alone)
with files ending in """
    + " ".join(IMAGE_SUFFIXES)
    + ", or in .npy alone"
)
ARRAY_SUFFIX = ".npy"


@dataclass(frozen=True)
class FileList:
    """The images below a folder: relative paths, and where they lie in class folders a label each.

    `paths` is an array of bytes, not a list of strings: worker processes share its pages, and a million strings they
    would copy one reference count at a time.
    """

    root: Path
    paths: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)  # what was left out, and how old the list is

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    @property
    def shards(self) -> np.ndarray | None:
        """Give the shard of each image, where shards have to be fetched; else None."""
        return None

    def open_picture(self, index: int, channels: int) -> Picture:
        return open_picture(load_file(self.path(index)), channels)

    def open_values(self, index: int, channels: int) -> ValuePicture:
        return open_values(self.path(index), channels)

    def fingerprint(self) -> str:
        """Hash the relative paths, so that a resumed run can tell whether its data is still the same."""
        return fingerprint(b"\0".join(self.paths.tolist()))

    def subsample(self, count: int) -> "FileList":
        """Give at most `count` images, spread evenly over the list and so over the classes."""
        if len(self) <= count:
            return self
        return self.subset(np.linspace(0, len(self) - 1, count).round().astype(np.int64))

    def subset(self, indices: np.ndarray) -> "FileList":
        """Give some of the images; classes and labels stay."""
        arrays = {name: value[indices] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return dataclasses.replace(self, **arrays)  # every array has an entry for each image

    def split(self, fraction: float, seed: int) -> tuple["FileList", "FileList"]:
        """Hold out a share of every class; gives the rest and what is held out, as `choose_held_out` says."""
        held_out = choose_held_out(self.paths, self.labels, fraction, seed)
        return self.subset(~held_out), self.subset(held_out)

    def describe(self) -> str:
        classes = f" in {len(self.classes):,} classes" if self.classes else ""
        return f"{len(self):,} images{classes} in {self.root}"


@dataclass(frozen=True)
class PackedImages(FileList):
    """A `FileList` whose images lie in a pack; image i is record `records[i]`."""

    pack: Pack
    records: np.ndarray

    @property
    def shards(self) -> np.ndarray | None:
        return self.pack.shards[self.records] if self.pack.remote else None

    def open_picture(self, index: int, channels: int) -> Picture:
        record = int(self.records[index])
        if self.pack.header["encoding"] != "raw":
            return open_picture(self.pack.read(record), channels)
        rows = PackedRows(self.pack, record)
        if channels == 3:
            return rows
        image = Image.fromarray(rows.whole().permute(1, 2, 0).numpy())
        return Picture(to_pixels(image.convert(CHANNEL_MODES[channels])))

    def open_values(self, index: int, channels: int) -> ValuePicture:
        record = int(self.records[index])
        if self.pack.header["encoding"] != "raw":
            return open_values(self.pack.read(record), channels)
        if channels not in (1, 3):
            raise ValueError(f"{self.root} is packed as colours; --input_channels {channels} needs the folder itself")
        return ValuePicture(self.open_picture(index, channels).whole().numpy())

    def fingerprint(self) -> str:
        return fingerprint(f"{super().fingerprint()} {self.pack.digest}".encode())

    def describe(self) -> str:
        return f"{super().describe()}, {self.pack.describe()}"


class Splits(NamedTuple):
    """The folders of a data set; `notes` say what beside them is not used."""

    train: Path
    val: Path | None
    notes: tuple[str, ...]


def find_splits(path_to_data: str | Path) -> Splits:
    """Find the training and the validation folder of a data root; without train/ the whole root is for training.

    A folder named train is a class like others where folders of images that are no splits lie beside it. Of images with
    label maps it is the folders of the images.
    """
    root = Path(path_to_data)
    if not root.is_dir():
        there = contents(root.parent)
        raise FileNotFoundError(f"--path_to_data {root} is not a folder; {LAYOUT}\nin {root.parent}: {there}")
    if not (root / "train").is_dir() or (root / "train" / "images").is_dir():  # else train/ is what is meant
        of_pairs = [{pair.root / pair.images for pair in list_pair_folders(root, split)} for split in SPLIT_NAMES]
        if len(of_pairs[0]) == 1 and len(of_pairs[1]) < 2:
            train, val = *of_pairs[0], next(iter(of_pairs[1]), None)
            note = f"training images are those in {train} alone" + (f", held-out images those in {val}" if val else "")
            return Splits(train, val, (f"{note}; the label maps beside them are not used",))
    val, others = None, []
    if (root / "train").is_dir():
        val = find_validation(root)
        others = [entry for entry in sorted(root.iterdir()) if entry.is_dir() and entry not in (root / "train", val)]
        others = [folder for folder in others if not folder.name.startswith(".") and holds_image(folder)]
    if not (root / "train").is_dir() or (val is None and any(not is_split_name(other.name) for other in others)):
        similar = [entry.name + "/" for entry in sorted(root.iterdir()) if entry.is_dir() and is_split_name(entry.name)]
        note = f"{name_some(similar)} in {root} taken for classes or folders like others, not for splits"
        return Splits(root, None, (note,) if similar else ())
    beside = [entry.name for entry in sorted(root.iterdir()) if is_image_name(entry.name)]
    beside += [f"{folder.name}/" for folder in others]
    return Splits(root / "train", val, (f"not used, beside train/ in {root}: {name_some(beside)}",) if beside else ())


def is_split_name(name: str) -> bool:
    return re.fullmatch(r"(train|val|valid|validation|test|testing)(ing)?s?", name.lower()) is not None


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def holds_image(folder: Path) -> bool:
    """Tell whether there is an image or an array below a folder."""
    found = (name for _, _, names in os.walk(folder) for name in names)
    return any(is_image_name(name) or name.lower().endswith(ARRAY_SUFFIX) for name in found)


def find_validation(root: Path) -> Path | None:
    """Give the validation folder of a data root, val/ or validation/; None where there is neither."""
    validation = [root / name for name in ("val", "validation") if (root / name).is_dir()]
    if len(validation) > 1:
        raise ValueError(f"{root} holds both val/ and validation/; keep one, so that it is clear which is meant")
    return validation[0] if validation else None


def check_same_classes(classes: tuple[str, ...], expected: tuple[str, ...], folder: Path, expected_from: str) -> None:
    """Refuse a folder whose classes differ from what they have to be; ValueError names the difference.

    A class that is missing or added would shift the label of every class after it.
    """
    if classes == expected:
        return
    if not classes:
        raise ValueError(f"{folder} has images outside class folders, so there are no labels; {LAYOUT}")
    if sorted(map(as_nfc, classes)) == sorted(map(as_nfc, expected)):
        names = name_some(sorted(set(classes) - set(expected)))
        raise ValueError(
            f"the classes in {folder} are those of {expected_from}, but {names} spell accents in other bytes (Unicode "
            "NFC and NFD): rename the folders alike"
        )
    lacking, extra = sorted(set(expected) - set(classes)), sorted(set(classes) - set(expected))
    parts = [f"{what} {name_some(names)}" for what, names in (("it lacks", lacking), ("it adds", extra)) if names]
    reason = "; ".join(parts) or "their order differs"
    raise ValueError(
        f"the {len(classes)} classes in {folder} are not the {len(expected)} of {expected_from}: {reason}. Every class "
        "needs a folder of the same name in both"
    )


def as_nfc(name: str) -> str:
    """Give a name with each accented letter in one piece: a disk of macOS may give it in two."""
    return unicodedata.normalize("NFC", name)


def as_text(name: str) -> str:
    """Give a name from the disk as what UTF-8 says of its bytes, whatever the locale; what is no UTF-8 is escaped.

    For all that is written down or compared; a file is opened by its name as Python gives it, which hangs on the
    locale. In a UTF-8 locale both are the same.
    """
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def name_some(names: list[str], count: int = 5, separator: str = ", ") -> str:
    """Name the first of many, and how many more there are, for messages."""
    named, more = separator.join(names[:count]), len(names) - count
    return f"{named}{' ' if separator == ', ' else separator}and {more} more" if more > 0 else named


def contents(folder: Path) -> str:
    """Name the first ten entries of a folder, for error messages."""
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())[:10]) or "nothing"


class Scan(NamedTuple):
    """What a folder tree holds: relative paths of images, in an order that no locale changes; each folder's
    modification time (ns); what is not used."""

    files: list[str]
    folders: dict[str, int]
    notes: tuple[str, ...]


def scan_images(root: Path) -> Scan:
    """Walk a folder tree, links included. Arrays (.npy) are images where there is no other one.

    Names that begin with a dot are passed over: thumbnails and copies that file managers and notebooks leave. A link
    that leads back up is not followed; two links to one folder are two folders.
    """
    files, arrays, folders, passed_over, loops = [], [], {}, Counter(), []
    above = {str(root): frozenset()}  # device and inode of the folders that each folder lies in
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        relative, ancestors = os.path.relpath(folder, root), above.pop(folder)
        if (status.st_dev, status.st_ino) in ancestors:
            loops.append(relative)
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "__MACOSX"]
        inside = ancestors | {(status.st_dev, status.st_ino)}
        above |= {os.path.join(folder, name): inside for name in subfolders}
        folders[relative] = status.st_mtime_ns
        start = "" if relative == "." else relative + os.sep
        for name in names:
            if is_image_name(name):
                files.append(start + name)
            elif not name.startswith("."):
                suffix = os.path.splitext(name)[1].lower()
                if suffix == ARRAY_SUFFIX:
                    arrays.append(start + name)
                else:
                    passed_over[suffix or "no suffix"] += 1
    if files and arrays:
        passed_over[ARRAY_SUFFIX] += len(arrays)
    notes = []
    if passed_over:
        counts = [f"{count:,} of {suffix}" for suffix, count in passed_over.most_common()]
        notes.append(f"files passed over: {name_some(counts)}")
    if loops:
        notes.append(f"links that lead back up, not followed: {name_some(sorted(loops))}")
    return Scan(sorted(files or arrays, key=as_text), folders, tuple(notes))


@dataclass(frozen=True)
class ListCache:
    """A folder where lists of images, and checks that passed, are remembered until a file or folder changes.

    `rescan` looks again in any case. An entry that is damaged, or of an earlier format, counts as none.
    """

    folder: Path
    rescan: bool = False

    def list_file(self, root: Path) -> Path:
        return self.folder / f"{root.name}-{fingerprint(os.fsencode(root))}.npz"

    def read_list(self, root: Path) -> FileList | None:
        """Give the list of the images below a folder; None where there is none that still holds."""
        if self.rescan:
            return None
        try:
            stored = read_arrays(self.list_file(root))
            unchanged = os.fsdecode(stored["root"].item()) == str(root) and all(
                os.stat(os.path.join(root, os.fsdecode(folder))).st_mtime_ns == time
                for folder, time in zip(stored["folders"], stored["folder_times"], strict=True)
            )
            classes, notes = (tuple(os.fsdecode(name) for name in stored[key]) for key in ("classes", "notes"))
            paths, labels = stored["paths"], stored["labels"]
            right = paths.dtype.kind == "S" and paths.ndim == 1 and labels.shape == paths.shape and len(paths) > 0
            right = right and (-1 if not classes else 0) <= labels.min() and labels.max() < max(1, len(classes))
            if not unchanged or not right or not all(map(is_inner_path, paths.tolist())):
                return None
            made = datetime.datetime.fromtimestamp(os.stat(self.list_file(root)).st_mtime)
            age = f"list of files made on {made:%d %B %Y, %H:%M}; --rescan_data makes it anew"
            return FileList(root, paths, labels, classes, notes=(*notes, age))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_list(self, files: FileList, folders: dict[str, int]) -> None:
        """Remember a list with the modification times (ns) of its folders; a disk that refuses costs a line."""
        entries = dict(
            root=np.array(os.fsencode(files.root)),
            paths=files.paths,
            labels=files.labels,
            classes=np.array([os.fsencode(name) for name in files.classes], dtype=bytes),
            notes=np.array([os.fsencode(note) for note in files.notes], dtype=bytes),
            folders=np.array([os.fsencode(folder) for folder in folders]),
            folder_times=np.array(list(folders.values()), dtype=np.int64),
        )
        archive, target = io.BytesIO(), self.list_file(files.root)
        np.savez(archive, **entries)  # numpy turns what a full disk raises into errors of its own
        with optional_write(target), written_whole(target, unique=True) as temporary, temporary.open("xb") as file:
            file.write(archive.getbuffer())

    def recall(self, *question: object) -> dict | None:
        """Give what a check found; None where it is not remembered. `question` is all that decides its answer."""
        try:
            return None if self.rescan else read_json(self.mark_of(question))
        except (OSError, ValueError):  # not there, or damaged: looked at again
            return None

    def remember(self, answer: Mapping, *question: object) -> None:
        """Remember what a check found; a disk that refuses costs a line."""
        mark = self.mark_of(question)
        with optional_write(mark), written_whole(mark, unique=True) as temporary:
            write_json(temporary, answer)

    def mark_of(self, question: tuple) -> Path:
        return self.folder / f"checked-{random_key(*question):016x}.json"


def find_images(paths: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Give (what a user named, file) of each image, of folders all below them; FileNotFoundError for none."""
    found = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no image or folder at {path}")
        files = [path / name for name in scan_images(path).files] if path.is_dir() else [path]
        found += [(path, file) for file in files]
        if not files:
            raise FileNotFoundError(f"no images below {path} ({LAYOUT.splitlines()[-1]})")
    return found


def list_images(root: Path, cache: ListCache | None = None) -> FileList:
    """List the images below `root`; the first folder of a path is its class, where every image has one.

    A cached list is used while no folder has changed: a million-file tree on a network disk is then a thousand look-ups
    instead of minutes. A folder that tools/pack_dataset.py wrote brings its own list. FileNotFoundError shows the
    expected layout beside what was found.
    """
    root = Path(root).resolve()
    if is_packed(root):
        pack = open_pack(root, "images")
        labels, classes = pack.table["label"].astype(np.int32), tuple(pack.header["classes"])
        return PackedImages(root, pack.names, labels, classes, pack, np.arange(len(pack.names)))
    cached = cache.read_list(root) if cache is not None else None
    if cached is not None:
        return with_text_classes(cached)
    files, folders, notes = scan_images(root)
    if not files:
        raise FileNotFoundError(f"no images below {root}; {LAYOUT}\nfound: {'; '.join([contents(root), *notes])}")
    first_folders = [file.split(os.sep, 1)[0] if os.sep in file else None for file in files]
    classes = () if None in first_folders else tuple(sorted(set(first_folders), key=as_text))
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([index.get(name, -1) for name in first_folders], dtype=np.int32)
    empty = sorted({folder.split(os.sep, 1)[0] for folder in folders} - {*classes, "."}) if classes else []
    if empty:
        notes += (f"folders without an image, no classes: {name_some(empty)}",)
    paths = np.array([os.fsencode(file) for file in files])
    file_list = FileList(root, paths, labels, classes, notes=notes)
    if cache is not None:
        cache.write_list(file_list, folders)
    return with_text_classes(file_list)


def with_text_classes(files: FileList) -> FileList:
    return dataclasses.replace(files, classes=tuple(map(as_text, files.classes)))


def refuse_inside(working_directory: str | Path, train_folder: Path) -> None:
    """Refuse to write into the training images; ValueError."""
    if Path(working_directory).resolve().is_relative_to(train_folder.resolve()):
        raise ValueError(
            f"--working_directory {working_directory} lies in the training images, {train_folder}: the run would train "
            "on its own pictures; choose one outside"
        )
