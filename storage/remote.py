"""Packs in object stores: indexes come here at the start, whole shards when they are needed, and as many as fit.

s3://BUCKET/PACK and whatever else the package `fsspec` opens. A pack that is elsewhere has a folder here, with its
pack.json, its indexes, and source.json, which says where the shards are.
"""

import contextlib
import os
import re
import time
from pathlib import Path

from storage.console import DataError
from storage.decoding import DECODE_ERRORS
from storage.files import fingerprint, hold, is_text, is_whole, read_json, remove, write_json, written_whole
from storage.packs import INDEX_SUFFIX, PACK_FILE, Pack, open_shard, read_pack_header

SOURCE_FILE = "source.json"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
SPLITS = ("", "train", "val", "validation", "training")
PAUSES_S = (1, 5, 25)  # before a file is asked for again
FEWEST_SHARDS = 2  # that are kept, however large: one is read while the next comes


def is_url(place: str | Path) -> bool:
    return URL.match(str(place)) is not None


def open_store(url: str) -> tuple:
    """Give the file system of an address, and the path there; ImportError and DataError say what is lacking."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{url} needs a package: {error}") from error
    except ValueError as error:
        raise DataError(f"{url} cannot be opened: {error}") from error


def mirror(url: str, cache: Path, cache_gb: float) -> Path:
    """Copy the headers and indexes of the packs below an address, and give the folder, which stands for them.

    DataError where there is no pack. What is there from an earlier start is compared, and copied anew where it differs.
    """
    store, root = open_store(url)
    folder, found = cache / fingerprint(url.encode()), 0
    for split in SPLITS:
        there, here = f"{root}/{split}".rstrip("/"), folder / split
        try:
            header = store.cat_file(f"{there}/{PACK_FILE}")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{url} cannot be read: {type(error).__name__}: {error}") from error
        found += 1
        if not (here / PACK_FILE).is_file() or (here / PACK_FILE).read_bytes() != header:
            for old in here.glob("shard-*"):
                remove(old)
            with written_whole(here / PACK_FILE, unique=True) as temporary:  # several machines may share the folder
                temporary.write_bytes(header)
        with written_whole(here / SOURCE_FILE, unique=True) as temporary:
            write_json(temporary, {"url": f"{url.rstrip('/')}/{split}".rstrip("/"), "cache_bytes": int(cache_gb * 1e9)})
        for shard in read_pack_header(here)["shards"]:
            index = Path(shard["file"]).with_suffix(INDEX_SUFFIX)
            copy(store, f"{there}/{index}", here / index)
    if not found:
        raise DataError(f"{url} holds no {PACK_FILE}, nor does train/ or validation/; tools/pack_dataset.py makes one")
    return folder


def copy(store, there: str, target: Path) -> None:
    """Copy a file of a store, unless it is here; DataError where it does not come, also after some pauses.

    That is for errors that would pass for a bad image, OSError first of all; others end the run as they are.
    """
    for pause_s in () if target.is_file() else (*PAUSES_S, None):
        try:
            with written_whole(target, unique=True, flush=False) as temporary:
                store.get_file(there, str(temporary))
            return
        except DECODE_ERRORS as error:
            if pause_s is None or isinstance(error, FileNotFoundError | PermissionError):
                raise DataError(f"{there} does not come from its store: {type(error).__name__}: {error}") from error
            time.sleep(pause_s)


class RemoteShards:
    """The shards of a pack that is elsewhere, of which those used last are kept in a folder here."""

    def __init__(self, folder: Path):
        self.folder, record = folder, read_json(folder / SOURCE_FILE)
        if not is_text(record.get("url")) or not is_whole(record.get("cache_bytes"), 0):
            raise ValueError(f"{folder / SOURCE_FILE} is damaged; remove {folder}")
        self.url, self.cache_bytes = record["url"], record["cache_bytes"]

    def open(self, name: str, size: int) -> int:
        """Open a shard, which comes here first; DataError where it does not, or is not the one that was packed."""
        path, descriptor = self.folder / name, None
        with hold(self.folder / f".{name}.lock", waits=True):  # one process fetches it, others wait
            while descriptor is None:
                try:
                    descriptor = open_shard(path)
                except FileNotFoundError:  # not here yet, or removed to make room for what another process needs
                    store, root = open_store(self.url)
                    copy(store, f"{root}/{name}", path)
            found = os.fstat(descriptor).st_size
            if found != size:
                os.close(descriptor)
                path.unlink(missing_ok=True)
                raise DataError(f"{self.url}/{name} has {found:,} bytes, not {size:,}; pack the folder again")
            os.utime(descriptor)
        self.make_room()
        return descriptor

    def make_room(self) -> None:
        """Remove the shards that were used longest ago; a process that reads one of them keeps it to the end."""
        found, total = [], 0
        for path in self.folder.glob("shard-*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process makes room as well
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        for number, (_, size, path) in enumerate(sorted(found, reverse=True)):
            total += size
            if number >= FEWEST_SHARDS and total > self.cache_bytes:
                path.unlink(missing_ok=True)


def open_pack(folder: Path, kind: str) -> Pack:
    """Open a pack, here or elsewhere; ValueError for one of another kind."""
    pack = Pack(folder, RemoteShards(folder) if (folder / SOURCE_FILE).exists() else None)
    if pack.header["kind"] != kind:
        raise ValueError(f"{folder} is a pack of {pack.header['kind']}, here {kind} are needed")
    return pack
