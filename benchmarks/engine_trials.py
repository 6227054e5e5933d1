"""Try what engines for more data than a disk holds can do, each with the same JPEG files from a folder elsewhere.

    python benchmarks/engine_trials.py --path_to_data PHOTOGRAPHS

What is read and fetched for one image out of the middle; which images come twice and which never, where two processes
stop within an epoch and one goes on with the first one's state; how full the cache gets under a limit.
"""

import argparse
import collections
import importlib
import itertools
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.distributed
from engines import ENGINES, PER_SHARD, write_sets
from measure import build_parser, print_table

IMAGES, BATCH, STEPS, MIDDLE, LIMIT_SHARDS = 1000, 8, 50, 555, 4.5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--path_to_data", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="(default: all)")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ what each is asked


def one_ours(data, index: int) -> bytes:
    return data.read(index).getvalue()


def one_by_index(data, index: int) -> bytes:
    data._on_demand_bytes = False  # the range that litdata 0.2.76 fetches from a folder comes empty
    return data[index]["jpeg"]


def one_in_order(data, index: int) -> bytes:
    return next(itertools.islice(data, index, None))["jpg"]


def one_skipping(data, index: int) -> bytes:
    return next(iter(data.skip(index)))["jpeg"]


def part_ours(data, rank: int, world_size: int, done: int | None, steps: int) -> tuple:
    sampler = ENGINES["ours"].sampler(data, BATCH // world_size, rank=rank, world_size=world_size)
    sampler.set_epoch(0, done or 0)
    return [key.index for keys in itertools.islice(sampler, steps) for key in keys], steps


def part_of_loader(data, rank: int, world_size: int, state: dict | None, steps: int) -> tuple:
    loader = sys.modules[type(data).__module__.split(".")[0]].StreamingDataLoader(data, batch_size=BATCH // world_size)
    if state:
        loader.load_state_dict(state)
    return [i for batch in itertools.islice(loader, steps) for i in batch["index"].tolist()], loader.state_dict()


def part_without_state(data, rank: int, world_size: int, state: None, steps: int) -> tuple:
    return [int(Path(e["__key__"]).name) for e in itertools.islice(data, steps * BATCH // world_size)], None


def part_of_iterable(data, rank: int, world_size: int, state: dict | None, steps: int) -> tuple:
    data = importlib.import_module("datasets.distributed").split_dataset_by_node(data, rank, world_size)
    if state:
        data.load_state_dict(state)
    return [row["index"] for row in itertools.islice(data, steps * BATCH // world_size)], data.state_dict()


ASKED = {
    "ours": (one_ours, part_ours),
    "litdata": (one_by_index, part_of_loader),
    "mosaicml-streaming": (one_by_index, part_of_loader),
    "webdataset": (one_in_order, part_without_state),
    "datasets, streaming": (one_skipping, part_of_iterable),
}

# ------------------------------------------------------------------------------------------------ trials


def held_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def read_bytes() -> int:
    """Give what this process has read so far (Linux); what is copied from file to file, or mapped, is not in it."""
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


def read_one(rank: int, world_size: int, name: str, place: Path, cache: Path, expected: bytes) -> tuple[int, int]:
    """Give the bytes that are read, and that come into the cache, for an image in the middle, after the first."""
    data = ENGINES[name].open(place, cache)
    one, _ = ASKED[name]
    one(data, 0)
    read, held = read_bytes(), held_bytes(cache)
    assert one(data, MIDDLE) == expected
    return read_bytes() - read, held_bytes(cache) - held


def read_part(rank: int, world_size: int, name: str, place: Path, port: int, state: object, steps: int) -> tuple:
    """Give the images of some steps, from a state on, and the state after them."""
    own = dict(RANK=rank, GLOBAL_RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    os.environ |= {key: str(value) for key, value in own.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    data = ENGINES[name].open(place, size=BATCH // world_size)
    return ASKED[name][1](data, rank, world_size, state, steps)


def fill_cache(rank: int, world_size: int, name: str, place: Path, cache: Path, limit: int) -> int:
    """Give the most bytes that the cache holds while everything is read."""
    data = ENGINES[name].jpegs(ENGINES[name].open(place, cache, limit))
    return max(held_bytes(cache) for _ in data)


def in_processes(count: int, trial: Callable, *arguments: object) -> list:
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        return pool.starmap(trial, [(rank, count, *arguments) for rank in range(count)], chunksize=1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def try_engine(name: str, place: Path, root: Path) -> list[str]:
    caches, expected = (root / "one" / name, root / "full" / name), root / f"files/train/a/{MIDDLE:06d}.jpg"
    for cache in caches:
        cache.mkdir(parents=True)
    ((read, fetched),) = in_processes(1, read_one, name, place, caches[0], expected.read_bytes())
    first = in_processes(2, read_part, name, place, free_port(), None, STEPS)
    rest = in_processes(1, read_part, name, place, free_port(), first[0][1], IMAGES)
    seen = collections.Counter(index for indices, _ in first + rest for index in indices)
    limit = LIMIT_SHARDS * PER_SHARD / IMAGES * held_bytes(place)
    largest = in_processes(1, fill_cache, name, place, caches[1], int(limit))[0] / limit
    twice = sum(count > 1 for count in seen.values())
    print(f"{name}: {[len(indices) for indices, _ in first + rest]} images of two processes, then one", flush=True)
    return [
        name,
        f"{read:,}",
        f"{fetched:,}",
        f"{twice}",
        f"{IMAGES - len(seen)}",
        f"{largest:.2f}" if largest else "none",
    ]


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        places = write_sets(args.path_to_data, root, IMAGES)
        rows = [try_engine(name, place, root) for name, place in places.items() if name in args.engines]
    header = ["engine", "bytes read for an image", "fetched", "seen twice", "never", "largest cache / limit"]
    print_table(f"{IMAGES} images in shards of {PER_SHARD}", header, rows)


if __name__ == "__main__":
    main(parse_args())
