"""Measure how many JPEG images a second engines for more data than a disk holds give to one process.

    OMP_NUM_THREADS=1 python benchmarks/engines.py --path_to_data PHOTOGRAPHS

Each reads the same files, packed its own way, all once and shuffled as it shuffles, from the page cache, with Pillow's
decoding and without it; processor time of all threads, in turns. Engines that are not installed are left out. What
else they can do is in engine_trials.py.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import CPU, ROOT, alternate, build_parser, describe_machine, print_table, spread
from PIL import Image, ImageOps

import dataset
from storage.packs import Pack
from storage.remote import mirror, open_pack

SIDE, PER_SHARD = 256, 100


def sample(path: str) -> dict:
    return {"index": int(Path(path).stem), "jpeg": Path(path).read_bytes()}


class Ours:
    module = "dataset"

    def write(self, files: list[str], place: Path) -> None:
        tool = [sys.executable, str(ROOT / "tools/pack_dataset.py"), str(Path(files[0]).parents[2]), "--output"]
        options = ["--short_side", str(SIDE), "--images_per_shard", str(PER_SHARD), "--num_workers", "1"]
        subprocess.run([*tool, str(place), *options], check=True, capture_output=True)

    def open(self, place: Path, cache: Path | None = None, limit: int = 10**9, size: int = 1) -> Pack:
        return open_pack((mirror(f"file://{place}", cache, limit / 1e9) if cache else place) / "train", "images")

    def sampler(self, pack: Pack, size: int = 1, **options) -> dataset.StepSampler:
        return dataset.StepSampler(len(pack.names), size, shards=pack.shards if pack.remote else None, **options)

    def jpegs(self, pack: Pack) -> Iterator[bytes]:
        return (pack.read(key.index).getvalue() for (key,) in self.sampler(pack))


class LitData:
    package = module = "litdata"

    def write(self, files: list[str], place: Path) -> None:
        self.library().optimize(sample, files, str(place), chunk_size=PER_SHARD, num_workers=1, reorder_files=False)

    def library(self):
        return importlib.import_module(self.module)

    def open(self, place: Path, cache: Path | None = None, limit: int | None = None, size: int = 1):
        where = {"input_dir": f"local:{place}", "cache_dir": str(cache)} if cache else {"input_dir": str(place)}
        return self.library().StreamingDataset(**where, max_cache_size=limit, shuffle=True, drop_last=True)

    def jpegs(self, data) -> Iterator[bytes]:
        return (entry["jpeg"] for entry in data)


class Mosaic(LitData):
    package, module = "mosaicml-streaming", "streaming"

    def write(self, files: list[str], place: Path) -> None:
        size = PER_SHARD * sum(os.path.getsize(file) for file in files) // len(files)
        columns = {"index": "int", "jpeg": "bytes"}
        with self.library().MDSWriter(out=str(place), columns=columns, size_limit=size) as writer:
            for file in files:
                writer.write(sample(file))

    def open(self, place: Path, cache: Path | None = None, limit: int | None = None, size: int = 1):
        where = {"remote": str(place), "local": str(cache)} if cache else {"local": str(place)}
        order = dict(shuffle=True, shuffle_block_size=2 * PER_SHARD)  # by default it is all, which hangs under a limit
        self.library().base.util.clean_stale_shared_memory()
        return self.library().StreamingDataset(**where, cache_limit=limit, batch_size=size, **order)


class WebDataset(LitData):
    package = module = "webdataset"

    def write(self, files: list[str], place: Path) -> None:
        Ours().write(files, place)  # plain tars

    def open(self, place: Path, cache: Path | None = None, limit: int = -1, size: int = 1):
        urls = [f"pipe:cat {tar}" if cache else str(tar) for tar in sorted(place.rglob("*.tar"))]
        where = {"cache_dir": str(cache), "cache_size": limit} if cache else {}
        split = self.library().split_by_node
        return self.library().WebDataset(urls, shardshuffle=False, nodesplitter=split, empty_check=False, **where)

    def jpegs(self, data) -> Iterator[bytes]:
        return (entry["jpg"] for entry in data.shuffle(PER_SHARD))


class Datasets(LitData):
    package = module = "datasets"

    def write(self, files: list[str], place: Path) -> None:
        for start in range(0, len(files), PER_SHARD):
            rows = [sample(file) for file in files[start : start + PER_SHARD]]
            self.library().Dataset.from_list(rows).to_parquet(place / f"{start:06d}.parquet")

    def open(self, place: Path, cache: Path | None = None, limit: int | None = None, size: int = 1):
        files = sorted(map(str, place.glob("*.parquet")))
        return self.library().load_dataset("parquet", data_files=files, split="train", streaming=True)

    def jpegs(self, data) -> Iterator[bytes]:
        return (row["jpeg"] for row in data.shuffle(seed=0, buffer_size=PER_SHARD))


ENGINES = {"ours": Ours(), "litdata": LitData(), "mosaicml-streaming": Mosaic(), "webdataset": WebDataset()}
ENGINES["datasets, streaming"] = Datasets()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__, rounds=7)
    parser.add_argument("--path_to_data", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--images", type=int, default=1000, help="(default: 1000)")
    return parser.parse_args(argv)


def write_sets(source: Path, root: Path, count: int) -> dict[str, Path]:
    """Write photographs as JPEG files of SIDE x SIDE, and them as each engine has it; give the folders by engine."""
    originals, folder = sorted(source.rglob("*.JPEG")), root / "files/train/a"
    folder.mkdir(parents=True)
    for index, original in zip(range(count), itertools.cycle(originals), strict=False):
        image = ImageOps.fit(Image.open(original).convert("RGB"), (SIDE, SIDE))
        image.save(folder / f"{index:06d}.jpg", quality=90)
    places = {}
    for name, engine in ENGINES.items():
        if importlib.util.find_spec(engine.module) is None:
            print(f"{name} is not installed and left out")
            continue
        places[name] = root / engine.module
        places[name].mkdir()
        engine.write([str(file) for file in sorted(folder.iterdir())], places[name])
    return places


def read_all(jpegs: Iterator[bytes], count: int, decodes: bool) -> None:
    images = 0
    for data in jpegs:
        images += 1
        if decodes:
            Image.open(io.BytesIO(data)).load()
    assert images == count, images


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as root:
        places, ways = write_sets(args.path_to_data, Path(root), args.images), ("read", "read and decoded")
        opened = {name: ENGINES[name].open(place, size=64) for name, place in places.items()}
        runs = {
            (name, way): lambda n=name, w=way: read_all(ENGINES[n].jpegs(opened[n]), args.images, w != "read")
            for name, way in itertools.product(places, ways)
        }
        seconds = alternate(runs, args.rounds)
    rows = []
    for name in places:
        version = "" if name == "ours" else f" {importlib.metadata.version(ENGINES[name].package)}"
        rows.append([name + version, *(spread([args.images / s for s in seconds[name, way]], ",.0f") for way in ways)])
    print_table(
        f"{args.images} files; {describe_machine(CPU)}", ["engine", *(f"{way}, images/s" for way in ways)], rows
    )


if __name__ == "__main__":
    main(parse_args())
