"""Data sets of the Hugging Face Hub, and what their library wrote on a disk: rows, read like files by number.

hf:OWNER/NAME[:CONFIG][@REVISION], hf:FOLDER for a repository on this disk, or a folder of `save_to_disk`. The package
`datasets`, which is imported here alone, reads tables and images and runs no code of a data set.
"""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from storage.console import DataError
from storage.decoding import NamedBytes, load_file
from storage.files import fingerprint
from storage.lists import PackedImages, as_text, name_some
from storage.pairs import PackedPairs

if TYPE_CHECKING:
    import datasets

PREFIX = "hf:"
SPEC = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.+-]+))?(@(?P<revision>[\w./+-]+))?")
COMMIT = re.compile(r"^hf://datasets/[^@]+@([0-9a-f]{40})/")
TRAINING, HELD_OUT = ("train", "training"), ("validation", "val", "valid", "test")
ANNOTATIONS = ("annotation", "annotations", "label", "labels", "mask", "masks", "segmentation", "segmentation_mask")


class Columns(NamedTuple):
    """Names of columns, None for those to be found by their types."""

    image: str | None = None
    label: str | None = None
    annotation: str | None = None


class Tables(NamedTuple):
    """The splits of a data set; its name, with the revision that is used."""

    splits: Mapping[str, "datasets.Dataset"]
    name: str

    def find_split(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in self.splits), None)


def is_table(root: str | Path) -> bool:
    """Tell whether a place is a data set of the Hub, or a folder of `save_to_disk`."""
    folder = Path(root)
    saved = (folder / "dataset_dict.json", folder / "dataset_info.json")
    return str(root).startswith(PREFIX) or any(file.is_file() for file in saved)


def import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{PREFIX} and folders of save_to_disk need a package: pip install datasets") from error
    return datasets


@functools.cache
def load_tables(root: str) -> Tables:
    """Load a data set, from the network where it is not in the cache; DataError says why it cannot be."""
    datasets, place = import_datasets(), str(root).removeprefix(PREFIX)
    found, folder = SPEC.fullmatch(place), Path(place).expanduser()
    if not place or (not folder.exists() and found is None):
        raise DataError(f"--path_to_data {root}: neither a folder nor {PREFIX}OWNER/NAME[:CONFIG][@REVISION]")
    try:
        if folder.exists() and is_table(folder):
            splits, name = datasets.load_from_disk(str(folder)), str(root)
        elif folder.exists():
            splits, name = datasets.load_dataset(str(folder)), str(root)
        else:
            name, config, revision = (found[part] for part in ("name", "config", "revision"))
            builder = datasets.load_dataset_builder(name, config, revision=revision)
            builder.download_and_prepare()
            splits, revision = builder.as_dataset(), find_revision(builder.config.data_files) or revision
            name = PREFIX + name + f":{config}" * bool(config) + f"@{revision}" * bool(revision)
        for table in splits.values() if isinstance(splits, Mapping) else [splits]:
            table.data.validate(full=True)  # a place in a file that is made up would crash the process that reads there
    except (OSError, ValueError, KeyError, TypeError, AttributeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"--path_to_data {root} cannot be loaded: {error}") from error
    return Tables(splits if isinstance(splits, Mapping) else {"train": splits}, name)


def find_revision(data_files: Mapping[str, list[str]] | None) -> str | None:
    """Give the commit of the Hub that files are of, so that the same can be asked for again; None for other files."""
    names = [str(name) for names in (data_files or {}).values() for name in names]
    commits = {found[1] for name in names if (found := COMMIT.search(name))}
    return commits.pop() if len(commits) == 1 else None


class TableRows:
    """The rows of a split as records, of each row one for each image column; reads like a `Pack`."""

    def __init__(self, tables: Tables, split: str, columns: list[str]):
        datasets, table = import_datasets(), tables.splits[split]
        as_bytes = datasets.Image(decode=False)
        self.columns, self.remote = columns, None
        self.parts = [table.select_columns([name]).cast_column(name, as_bytes) for name in columns]
        self.place, self.header = Path(tables.name) / split, {"encoding": "files", "short_side": None}
        self.names = np.array([f"{row:08d}".encode() for row in range(len(table))])
        files = [Path(entry["filename"]) for entry in table.cache_files]
        self.folders = {file.parent.resolve() for file in files} | {Path(tables.name.removeprefix(PREFIX)).resolve()}
        self.folders.add(Path(datasets.config.HF_CACHE_HOME).resolve())
        content = (tables.name.rpartition("@")[2], split, columns, len(table), [file.stat().st_size for file in files])
        self.digest = fingerprint(repr(content).encode())

    def path(self, record: int) -> str:
        """Name a record as if it were a file below its split."""
        row, column = divmod(record, len(self.columns))
        return os.path.join(self.place, f"{row:08d}", self.columns[column])

    def read(self, record: int) -> NamedBytes:
        """Read a record; OSError when there is none, or it is a file elsewhere than the data set lies."""
        row, column = divmod(record, len(self.columns))
        found = self.parts[column][row][self.columns[column]] or {}
        if found.get("bytes") is not None:
            return NamedBytes(found["bytes"], self.path(record))
        if found.get("path") is None:
            raise OSError(f"{self.path(record)} holds no image")
        file = Path(found["path"]).resolve()
        if not any(file.is_relative_to(folder) for folder in self.folders):
            raise OSError(f"{self.path(record)} is a file outside the data set: {as_text(str(file))}")
        return NamedBytes(load_file(str(file)).getvalue(), self.path(record))

    def stamps(self) -> list:
        return [self.digest]

    def describe(self) -> str:
        return f"column {' and '.join(self.columns)}"


def choose_image_column(table: "datasets.Dataset", given: str | None, flag: str = "--image_column") -> str:
    """Give the column of images: the one that was named, or the only one; DataError names the columns."""
    images = [name for name, feature in table.features.items() if isinstance(feature, import_datasets().Image)]
    if given is None and len(images) == 1:
        return images[0]
    if given in table.column_names:
        return given
    raise DataError(f"give {flag}: of the columns {name_some(table.column_names, 20)}, images are {name_some(images)}")


def read_labels(table: "datasets.Dataset", given: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Give the class of every row, int32, and the classes' names; -1 and none where no column is known to hold them."""
    class_label = import_datasets().ClassLabel
    found = [name for name, feature in table.features.items() if isinstance(feature, class_label)]
    if given is not None and given not in table.column_names:
        raise DataError(f"--label_column {given}: there is none; columns are {name_some(table.column_names, 20)}")
    if given is None and len(found) != 1:
        return np.full(len(table), -1, dtype=np.int32), ()
    name = given or found[0]
    values = table.select_columns([name]).with_format("numpy")[:][name]
    if isinstance(table.features[name], class_label):
        return values.astype(np.int32), tuple(table.features[name].names)
    if values.dtype.kind not in "iubUOT":
        raise DataError(f"--label_column {name} holds neither whole numbers nor texts, so no classes")
    classes, labels = np.unique(values.astype(str), return_inverse=True)
    return labels.astype(np.int32), tuple(map(str, classes))


def list_table(tables: Tables, split: str, columns: Columns) -> PackedImages:
    """List the images of a split, with their classes where a column tells them."""
    table = tables.splits[split]
    rows = TableRows(tables, split, [choose_image_column(table, columns.image)])
    labels, classes = read_labels(table, columns.label)
    if len(labels) and classes and not 0 <= labels.min() <= labels.max() < len(classes):
        raise DataError(f"{rows.place} has rows without a class (label {labels.min()}); give another split or column")
    return PackedImages(rows.place, rows.names, labels, classes, rows, np.arange(len(table)))


def list_table_pairs(tables: Tables, split: str, columns: Columns) -> PackedPairs:
    """Pair the images of a split with their label maps, which another column of the same row holds."""
    table = tables.splits[split]
    image, annotation = columns.image, columns.annotation
    if annotation is None:
        named = [name for name in table.column_names if name.lower() in ANNOTATIONS]
        annotation = named[0] if len(named) == 1 else choose_image_column(table, None, "--annotation_column")
    others = table.select_columns([name for name in table.column_names if name != annotation])
    rows = TableRows(tables, split, [choose_image_column(others, image), annotation])
    paths = [np.array([os.fsencode(f"{row:08d}/{name}") for row in range(len(table))]) for name in rows.columns]
    return PackedPairs(rows.place, *paths, pack=rows, records=2 * np.arange(len(table)))
