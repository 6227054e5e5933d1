"""Look at a data set without training on it: how fast its disk and a data worker are, and which files are bad."""

import contextlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from storage.decoding import DECODE_ERRORS, open_image, refuse_bomb
from storage.files import open_regular
from storage.lists import FileList
from storage.packs import Pack
from storage.pairs import PairList
from storage.workers import Loader


class DiskReads(NamedTuple):
    """What a disk gave: of `looked` images, whose files have `looked_bytes`, those `cold` ones that memory had not."""

    looked: int
    looked_bytes: int
    cold: int
    cold_bytes: int
    seconds: float

    def size_of(self, total: int) -> float:
        """Give the bytes that so many images have, as those that were looked at."""
        return self.looked_bytes / max(1, self.looked) * total


@contextlib.contextmanager
def located(files: FileList | PairList, index: int) -> Iterator[tuple[int, int, int]]:
    """Give descriptor, offset and size of an image, in a pack or in a file of its own."""
    if isinstance(pack := getattr(files, "pack", None), Pack):
        record = int(files.records[index])
        row = pack.table[record]
        yield pack.open_shard(int(pack.shards[record])), int(row["offset"]), int(row["size"])
    else:
        with open_regular(files.path(index)) as file:
            yield file.fileno(), 0, os.fstat(file.fileno()).st_size


def is_cached(descriptor: int, place: int) -> bool:
    """Tell whether a byte of a file is in the page cache; OSError where this disk cannot tell."""
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT))
    except BlockingIOError:
        return False


def read_cold(files: FileList | PairList, indices: Iterable[int], limit_s: float) -> DiskReads | None:
    """Read the images that are not in the page cache, one after the other; None where nobody tells which these are.

    That is on other systems than Linux, on some network disks, and for shards at an address and tables of the Hub.
    """
    pack = getattr(files, "pack", None)
    if not hasattr(os, "RWF_NOWAIT") or (pack is not None and (not isinstance(pack, Pack) or pack.remote)):
        return None
    found, began = DiskReads(0, 0, 0, 0, 0.0), time.perf_counter()
    for index in indices:
        opened = time.perf_counter()
        if opened - began > limit_s:
            break
        try:
            with located(files, index) as (descriptor, offset, size):
                try:
                    cold = size > 0 and not is_cached(descriptor, offset + size - 1)
                except OSError:  # not supported by this disk
                    return None
                read = len(os.pread(descriptor, size, offset)) if cold else 0
        except OSError:  # a bad file, which `find_bad_heads` and the decoding name
            continue
        seconds = time.perf_counter() - opened if cold else 0.0
        found = DiskReads(*(a + b for a, b in zip(found, (1, size, int(cold), read, seconds), strict=True)))
    return found


def open_head(files: FileList | PairList, index: int, channels: int, own_units: bool) -> None:
    """Read as much of an image as tells its kind and size; one of DECODE_ERRORS for one that training would replace."""
    if own_units:
        files.open_values(index, channels)
    elif isinstance(files, PairList):
        with files.image_file(index) as file:
            refuse_bomb(open_image(file))
    elif type(files) is FileList:
        with open_regular(files.path(index)) as file:
            refuse_bomb(open_image(file))
    else:
        files.open_picture(index, channels)


def find_bad_heads(
    files: FileList | PairList, indices: Iterable[int], limit_s: float, channels: int, own_units: bool
) -> tuple[int, dict[str, str]]:
    """Open the heads of images until the time is over; give how many, and of the bad ones path and reason."""
    looked, bad, began = 0, {}, time.perf_counter()
    for index in indices:
        if time.perf_counter() - began > limit_s:
            break
        looked += 1
        try:
            open_head(files, index, channels, own_units)
        except DECODE_ERRORS as error:
            bad[files.path(index)] = f"{type(error).__name__}: {error}"
    return looked, bad


class Decoded(NamedTuple):
    """Samples as one batch, how many of them were timed, in how many seconds, and path and reason of bad files."""

    batch: tuple
    count: int
    seconds: float
    bad_files: list[tuple[str, str]]


def decode_some(loader: Loader, keys: Iterator, piece: int, most: int, limit_s: float) -> Decoded:
    """Let one data worker (none where the loader has none) make samples of keys, `piece` at a time, the first untimed.

    They are transformed and collated as the loader's, which is not used.
    """
    pieces = iter(lambda: list(itertools.islice(keys, piece)), [])
    options = dict(num_workers=min(1, loader.num_workers), collate_fn=loader.collate_fn, timeout_s=loader.timeout_s)
    batches, began = [], 0.0
    for batch in Loader(loader.dataset, batch_sampler=pieces, generator=torch.Generator(), **options):
        batches.append(batch)
        began = began or time.perf_counter()  # now the worker has started
        count, seconds = piece * (len(batches) - 1), time.perf_counter() - began
        if count >= most or (count and seconds > limit_s):
            break
    bad_files = itertools.chain(*(batch.bad_files for batch in batches))
    tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in tensor_names(batch)}
    return Decoded(batch._replace(**tensors), count, seconds, list(bad_files))


def resize_batch(batch: tuple, count: int) -> tuple:
    """Give the first images of a batch, which starts over where it has fewer."""
    order = [index % len(batch.images) for index in range(count)]
    return batch._replace(**{name: getattr(batch, name)[order] for name in tensor_names(batch)})


def tensor_names(batch: tuple) -> Sequence[str]:
    return [name for name, value in batch._asdict().items() if isinstance(value, Tensor)]
