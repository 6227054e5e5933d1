"""Many images in few files: what tools/pack_dataset.py writes, read by number and never trusted.

A pack is a folder with pack.json, which says what is in it, and shards. A shard is all its records (image files, or
uncompressed pixels) one after the other, a table with a row for each, their names, and a trailer. Of a pack of pairs
every second record is a label map. Places and sizes are checked before they are read, and names never lead elsewhere.
"""

import errno
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from storage.decoding import Area, NamedBytes, Picture
from storage.files import fingerprint, is_list, is_text, is_whole, read_json

PACK_FILE, PACKING_FILE = "pack.json", "packing.json"  # the second while a pack is being made
PACK_VERSION = 1
SHARD_NAME = re.compile(r"\d{5}\.shard")
SHARD_MAGIC = b"MAEPACK1"
SHARD_TRAILER = struct.Struct("<QQI8s")  # number of records, bytes of the names, CRC-32 of table and names, magic
SHARD_TABLE = np.dtype(
    [("offset", "<u8"), ("size", "<u8"), ("height", "<u4"), ("width", "<u4"), ("label", "<i4"), ("crc", "<u4")]
)
MAX_NAME_BYTES = 1024
ENCODINGS = ("files", "jpeg", "raw")  # bytes as they were; resized and compressed anew where larger; uint8 (H, W, 3)


def is_packed(folder: Path) -> bool:
    """Tell whether a folder is a pack; ValueError when it is one that was not finished."""
    if (folder / PACKING_FILE).exists() and not (folder / PACK_FILE).exists():
        raise ValueError(f"{folder} was not packed to the end; run tools/pack_dataset.py again, it goes on")
    return (folder / PACK_FILE).is_file()


class Pack:
    """The records of a pack, by number; files are opened when first needed, anew in every process.

    ValueError says what is wrong with a pack that is damaged or made up. `read` raises OSError for a record that is.
    """

    def __init__(self, folder: Path):
        self.folder, self.open_shards = folder, {}
        self.digest = fingerprint((folder / PACK_FILE).read_bytes())
        self.header = read_pack_header(folder)
        parts = [self.read_index(number) for number in range(len(self.header["shards"]))]
        self.table = np.concatenate([table for table, _ in parts])
        self.shards = np.repeat(np.arange(len(parts)), [len(table) for table, _ in parts])
        self.names = np.array([name for _, names in parts for name in names])
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
            if path.is_symlink() or not path.is_file():  # which a pipe would block
                raise OSError(errno.EINVAL, "no regular file", str(path))
            self.open_shards[number] = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        return self.open_shards[number]

    def read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        """Read a part of a shard; OSError when it is not there. Unlike a memory map, a failing disk is no crash."""
        found = os.pread(self.open_shard(shard), size, offset)
        if len(found) != size:
            raise OSError(f"{self.shard_path(shard)} is cut off")
        return found

    def read_index(self, number: int) -> tuple[np.ndarray, list[bytes]]:
        """Read the table and the names of a shard; ValueError when they are not those of a whole one."""
        path, shard = self.shard_path(number), self.header["shards"][number]

        def refuse_unless(condition: bool, reason: str) -> None:
            if not condition:
                raise ValueError(f"{path} is damaged ({reason}); pack the folder again")

        try:
            size = os.fstat(self.open_shard(number)).st_size
        except OSError as error:
            raise ValueError(f"{path} cannot be opened ({error.strerror}); pack the folder again") from error
        refuse_unless(size == shard["bytes"] and size >= SHARD_TRAILER.size, f"{size:,} bytes, not {shard['bytes']:,}")
        trailer = self.read_bytes(number, size - SHARD_TRAILER.size, SHARD_TRAILER.size)
        count, names_size, checksum, magic = SHARD_TRAILER.unpack(trailer)
        index_size = count * SHARD_TABLE.itemsize + names_size
        end = size - SHARD_TRAILER.size - index_size
        refuse_unless(magic == SHARD_MAGIC and end >= 0 and count == shard["records"], "its trailer")
        index = self.read_bytes(number, end, index_size)
        refuse_unless(zlib.crc32(index) == checksum, "the checksum of its table")
        table = np.frombuffer(index, SHARD_TABLE, count)
        names = index[count * SHARD_TABLE.itemsize :].split(b"\0") if count else []
        refuse_unless(len(names) == count and all(is_inner_path(name) for name in names), "its names")
        refuse_unless(bool((table["size"] <= end).all()), "a record's size")
        refuse_unless(bool((table["offset"] <= end - table["size"]).all()), "a record's place")
        allowed = range(len(self.header["classes"])) or range(-1, 0)
        refuse_unless(bool(((table["label"] >= allowed.start) & (table["label"] < allowed.stop)).all()), "a label")
        if self.header["encoding"] == "raw":
            pixels = table["height"].astype(np.uint64) * table["width"]
            fitting = (pixels > 0) & (pixels <= Image.MAX_IMAGE_PIXELS) & (pixels * 3 == table["size"])
            refuse_unless(bool(fitting.all()), "an image's size")
        return table, names

    def path(self, record: int) -> str:
        """Name a record as if it were a file in the pack's folder."""
        return os.path.join(self.folder, os.fsdecode(self.names[record]))

    def read(self, record: int) -> NamedBytes:
        """Read a record that is a file; OSError when it is not what was packed."""
        row = self.table[record]
        data = self.read_bytes(int(self.shards[record]), int(row["offset"]), int(row["size"]))
        self.compare(record, data)
        return NamedBytes(data, self.path(record))

    def compare(self, record: int, data: bytes | np.ndarray) -> None:
        if zlib.crc32(data) != self.table[record]["crc"]:
            raise OSError(f"damaged since it was packed: {self.path(record)}")

    def read_rows(self, record: int, top: int, count: int) -> Tensor:
        """Read rows of uncompressed pixels, uint8 (3, count, W), interleaved; OSError where a record is damaged.

        At its first touch in a run all of a record is read and compared, from then on no more than the rows.
        """
        row = self.table[record]
        is_first = not self.compared[record]
        first_row, num_rows = (0, int(row["height"])) if is_first else (top, count)
        line = int(row["width"]) * 3
        shard, offset = int(self.shards[record]), int(row["offset"]) + first_row * line
        rows = np.empty((num_rows, int(row["width"]), 3), dtype=np.uint8)
        if os.preadv(self.open_shard(shard), [rows], offset) != rows.nbytes:
            raise OSError(f"{self.shard_path(shard)} is cut off")
        if is_first:
            self.compare(record, rows)
            self.compared[record] = 1
            rows = rows[top : top + count]
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
        and is_whole(entry.get("records"), 0)
    )


def read_pack_header(folder: Path) -> dict:
    """Read pack.json; ValueError names the fields that are not as tools/pack_dataset.py writes them."""
    path = folder / PACK_FILE
    try:
        header = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; pack the folder again") from error
    if header.get("version") != PACK_VERSION:
        raise ValueError(f"{path} is of version {header.get('version')!r}, this code reads {PACK_VERSION}")
    short_side, classes, shards = (header.get(name) for name in ("short_side", "classes", "shards"))
    checks = {
        "kind": header.get("kind") in ("images", "pairs"),
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
        self.height, self.width = int(pack.table[record]["height"]), int(pack.table[record]["width"])

    def cut(self, area: Area) -> Tensor:
        return self.pack.read_rows(self.record, area.top, area.height)[:, :, area.left : area.left + area.width]

    def decoded(self) -> Picture:
        return Picture(self.pack.read_rows(self.record, 0, self.height))


def open_pack(folder: Path, kind: str) -> Pack:
    pack = Pack(folder)
    if pack.header["kind"] != kind:
        raise ValueError(f"{folder} is a pack of {pack.header['kind']}, here {kind} are needed")
    return pack
