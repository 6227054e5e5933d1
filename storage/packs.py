"""Many images in few files: tars with an index beside each, as tools/pack_dataset.py writes them; read, never trusted.

A pack is a folder. Its pack.json says what is in it. A shard is a plain tar of image files, or of arrays (.npy, uint8
of (H, W, 3)), each followed by its class (.cls), which webdataset and `tar` read. The .npz of the same name has
path, place, size and checksum of each record, so that one is read without the others. Of a pack of pairs every second
record is a label map. Places and sizes are checked before they are read, and names never lead elsewhere.
"""

import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from storage.decoding import Area, NamedBytes, Picture
from storage.files import fingerprint, is_list, is_text, is_whole, only_regular, open_regular, read_json

PACK_FILE, PACKING_FILE = "pack.json", "packing.json"  # the second while a pack is being made
MAX_OPEN_REMOTE = 4  # shards that a process has open then, as what is open takes room also when it is removed
PACK_VERSION = 2
AGAIN = "pack the folder again: python tools/pack_dataset.py FOLDER --output PACK"
SHARD_NAME = re.compile(r"shard-\d{6}\.tar")
INDEX_SUFFIX, RAW_SUFFIX = ".npz", ".npy"
SHARD_TABLE = np.dtype(
    [("offset", "<u8"), ("size", "<u8"), ("height", "<u4"), ("width", "<u4"), ("label", "<i4"), ("crc", "<u4")]
)
MAX_NAME_BYTES = 1024
MAX_NPY_HEADER = 1024
RECORDS_PER_SAMPLE = {"images": 1, "pairs": 2}
ENCODINGS = ("files", "jpeg", "raw")  # bytes as they were; resized and compressed anew where larger; uint8 (H, W, 3)


def is_packed(folder: Path) -> bool:
    """Tell whether a folder is a pack; ValueError when it is one that was not finished."""
    if (folder / PACKING_FILE).exists() and not (folder / PACK_FILE).exists():
        raise ValueError(f"{folder} was not packed to the end; run tools/pack_dataset.py again, it goes on")
    return (folder / PACK_FILE).is_file()


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file that nobody compressed; OSError, or ValueError for one that is damaged."""
    try:
        with open_regular(file) as opened, np.load(opened, allow_pickle=False) as content:
            if any(entry.compress_type for entry in content.zip.infolist()):  # which may be small and hold gigabytes
                raise ValueError("it is compressed")
            return {name: content[name] for name in content.files}
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error})") from error
    except (MemoryError, NotImplementedError) as error:  # of a header that was made up
        raise ValueError(f"{file} is damaged ({type(error).__name__})") from error


def open_shard(path: Path) -> int:
    """Open a shard to read; OSError for what is no regular file."""
    return only_regular(path, os.O_RDONLY | os.O_NOFOLLOW)


class Remote(Protocol):
    """Where the shards of a pack are that is elsewhere."""

    url: str

    def open(self, name: str, size: int) -> int:
        """Open a shard, once it has come here; DataError where it does not."""


class Pack:
    """The records of a pack, by number; files are opened when first needed, anew in every process.

    ValueError says what is wrong with a pack that is damaged or made up. `read` raises OSError for a record that is.
    """

    def __init__(self, folder: Path, remote: Remote | None = None):
        self.folder, self.remote, self.open_shards = folder, remote, {}
        self.header = read_pack_header(folder)
        parts = [self.read_index(number) for number in range(len(self.header["shards"]))]
        self.names, self.table = (np.concatenate([part[key] for part in parts]) for key in ("paths", "table"))
        self.shards = np.repeat(np.arange(len(parts)), [len(part["paths"]) for part in parts])
        self.digest = fingerprint(f"{self.header['encoding']} {fingerprint(self.table.tobytes())}".encode())
        # 1 for records whose checksum was compared in this run, by whichever of its data workers
        self.compared = torch.zeros(len(self.names), dtype=torch.uint8).share_memory_()
        if not len(self.names):
            raise ValueError(f"{folder} holds no records")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"open_shards": {}}

    def __del__(self):
        for descriptor in self.open_shards.values():
            os.close(descriptor)

    def shard_path(self, number: int) -> Path:
        return self.folder / self.header["shards"][number]["file"]

    def open_shard(self, number: int) -> int:
        if number not in self.open_shards:
            path = self.shard_path(number)
            if self.remote is None:
                self.open_shards[number] = open_shard(path)
            else:
                while len(self.open_shards) >= MAX_OPEN_REMOTE:
                    os.close(self.open_shards.pop(next(iter(self.open_shards))))
                self.open_shards[number] = self.remote.open(path.name, self.header["shards"][number]["bytes"])
        return self.open_shards[number]

    def read_index(self, number: int) -> dict[str, np.ndarray]:
        """Read the index of a shard; ValueError when it is not that of a whole one."""
        path, shard = self.shard_path(number), self.header["shards"][number]

        def refuse_unless(condition: bool, reason: str) -> None:
            if not condition:
                raise ValueError(f"{path} is damaged, or its index is ({reason}); {AGAIN}")

        try:
            size = shard["bytes"] if self.remote else os.fstat(self.open_shard(number)).st_size
            index = read_arrays(path.with_suffix(INDEX_SUFFIX))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} or its index cannot be read ({error}); {AGAIN}") from error
        refuse_unless(size == shard["bytes"], f"{size:,} bytes, not {shard['bytes']:,}")
        refuse_unless({"paths", "table"} <= index.keys(), "other arrays")
        names, table = index["paths"], index["table"]
        refuse_unless(names.dtype.kind == "S" and names.ndim == 1 and table.dtype == SHARD_TABLE, "other columns")
        refuse_unless(all(map(is_inner_path, names.tolist())) and table.shape == names.shape, "its names")
        samples = len(names) / RECORDS_PER_SAMPLE[self.header["kind"]]
        refuse_unless(samples == shard["samples"], f"{samples:,} samples, not {shard['samples']:,}")
        refuse_unless(bool((table["size"] <= size).all()), "a record's size")
        refuse_unless(bool((table["offset"] <= size - table["size"]).all()), "a record's place")
        allowed = range(len(self.header["classes"])) or range(-1, 0)
        refuse_unless(bool(((table["label"] >= allowed.start) & (table["label"] < allowed.stop)).all()), "a label")
        if self.header["encoding"] == "raw":
            pixels = table["height"].astype(np.uint64) * table["width"]
            fitting = (pixels > 0) & (pixels <= Image.MAX_IMAGE_PIXELS) & (pixels * 3 <= table["size"])
            fitting &= table["size"] - pixels * 3 <= MAX_NPY_HEADER
            refuse_unless(bool(fitting.all()), "an image's size")
        return index

    def stamps(self) -> list[tuple[int, int]]:
        """Give size and modification time (ns) of every shard."""
        if self.remote is not None:
            return [(shard["bytes"], 0) for shard in self.header["shards"]]
        statuses = [os.stat(self.shard_path(number)) for number in range(len(self.header["shards"]))]
        return [(status.st_size, status.st_mtime_ns) for status in statuses]

    def describe(self) -> str:
        side = self.header["short_side"]
        place = f", at {self.remote.url}" if self.remote else ""
        return f"packed as {self.header['encoding']}" + f", short side at most {side}" * bool(side) + place

    def path(self, record: int) -> str:
        """Name a record as if it were a file in the pack's folder."""
        return os.path.join(self.folder, os.fsdecode(self.names[record]))

    def read(self, record: int) -> NamedBytes:
        """Read a record that is a file; OSError when it is not what was packed.

        Unlike a memory map, a failing disk is no crash.
        """
        row, number = self.table[record], int(self.shards[record])
        data = os.pread(self.open_shard(number), int(row["size"]), int(row["offset"]))
        self.refuse_unless_whole(len(data) == row["size"], number)
        self.compare(record, data)
        return NamedBytes(data, self.path(record))

    def refuse_unless_whole(self, is_whole: bool, number: int) -> None:
        if not is_whole:
            raise OSError(f"{self.shard_path(number)} is cut off")

    def compare(self, record: int, data: bytes | np.ndarray) -> None:
        if zlib.crc32(data) != self.table[record]["crc"]:
            raise OSError(f"damaged since it was packed: {self.path(record)}")

    def read_rows(self, record: int, top: int, count: int) -> Tensor:
        """Read rows of uncompressed pixels, uint8 (3, count, W), interleaved; OSError where a record is damaged.

        At its first touch in a run all of a record is read and compared, from then on no more than the rows.
        """
        row, number, is_first = self.table[record], int(self.shards[record]), not self.compared[record]
        height, width, size = int(row["height"]), int(row["width"]), int(row["size"])
        line, start = width * 3, size - height * width * 3  # of the pixels, behind the header
        shape, start = ((size,), 0) if is_first else ((count, width, 3), start + top * line)
        rows = np.empty(shape, dtype=np.uint8)
        read = os.preadv(self.open_shard(number), [rows], int(row["offset"]) + start)
        self.refuse_unless_whole(read == rows.nbytes, number)
        if is_first:
            self.compare(record, rows)
            self.compared[record] = 1
            rows = rows[-height * line :].reshape(height, width, 3)[top : top + count]
        return torch.from_numpy(rows).permute(2, 0, 1)


def is_inner_path(name: bytes) -> bool:
    """Tell whether a name is a relative path of reasonable length that stays below where it starts."""
    parts = name.split(b"/")
    return 0 < len(name) <= MAX_NAME_BYTES and not any(part in (b"", b".", b"..") for part in parts)


def is_shard(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and is_text(entry.get("file"))
        and SHARD_NAME.fullmatch(entry["file"]) is not None
        and is_whole(entry.get("bytes"), 0)
        and is_whole(entry.get("samples"), 0)
    )


def read_pack_header(folder: Path) -> dict:
    """Read pack.json; ValueError names the fields that are not as tools/pack_dataset.py writes them."""
    path = folder / PACK_FILE
    try:
        header = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {AGAIN}") from error
    if header.get("version") != PACK_VERSION:
        raise ValueError(f"{path} is of version {header.get('version')!r}, this code reads {PACK_VERSION}; {AGAIN}")
    short_side, classes, shards = (header.get(name) for name in ("short_side", "classes", "shards"))
    checks = {
        "kind": header.get("kind") in RECORDS_PER_SAMPLE,
        "encoding": header.get("encoding") in ENCODINGS,
        "short_side": short_side is None or is_whole(short_side, 0),
        "classes": is_list(classes, is_text) and len(set(classes)) == len(classes),
        "shards": is_list(shards, is_shard) and len(shards) > 0,
    }
    wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise ValueError(f"{path} is damaged or not a pack: {', '.join(wrong)} not as it should be")
    return header


class PackedRows(Picture):
    """Uncompressed pixels in a pack, of which no more rows are read than the cut needs."""

    def __init__(self, pack: Pack, record: int):
        self.pack, self.record = pack, record
        self.height, self.width = (int(pack.table[record][name]) for name in ("height", "width"))

    def cut(self, area: Area) -> Tensor:
        return self.pack.read_rows(self.record, area.top, area.height)[:, :, area.left : area.left + area.width]

    def decoded(self) -> Picture:
        return Picture(self.pack.read_rows(self.record, 0, self.height))
