"""Write the features of whole images, with file names and labels, for a notebook; draw what the cls token attends to.

    python tools/features.py --checkpoint work_dir/MAEPretraining --path_to_data DATA --output features.npz

On several processes by `accelerate launch`. Killed and started again with the same command, it goes on. An .npz has
`features` float32 (images, D), or (images, L, D) of patches, `labels` (-1 without classes), `paths`, `split` (train and
val, or all) and `classes`; a .parquet has a row for each image. A file that cannot be read is named on stderr and left
out; the exit code is then 1.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storage import explained_errors
from storage.files import beside, checksum_of, escape, hold, read_json, remove, replace_json, user_path, written_whole

POOLS = {"avg": "mean", "cls": "cls"}  # what --pool calls a model's global_pool
SUFFIXES = (".npz", ".parquet")
PART_BATCHES = 16  # of which a part consists: what a kill costs
HEADS_IN_A_ROW = 4


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = "checkpoint or experiment folder of any of the three scripts, weight file, or hf:OWNER/NAME[@REVISION]"
    parser.add_argument("--checkpoint", type=user_path, required=True, help=source)
    data = "folder with or without train/ and val/, packs, or data set of the Hub (hf:OWNER/NAME), as of the scripts"
    parser.add_argument("--path_to_data", type=os.path.expanduser, required=True, help=data)
    parser.add_argument("--output", type=user_path, help="table to write, .npz or .parquet (needs pip install pyarrow)")
    pool = "cls token, mean of the patch tokens, or all of these (default: as the classifier, else mean)"
    parser.add_argument("--pool", choices=("cls", "mean", "patches"), help=pool)
    parser.add_argument("--block", type=int, help="raw output of this block, from 0 (default: the encoder's output)")
    parser.add_argument("--attention", type=user_path, metavar="FOLDER", help="draw attention of cls, head by head")
    parser.add_argument("--attention_images", type=int, default=16, help="of each split, spread (default: 16)")
    parser.add_argument("--img_size", type=int, nargs="+", help="one number, or height and width (default: as trained)")
    parser.add_argument("--batch_size", type=int, default=32, help="images of a forward pass (default: 32)")
    parser.add_argument("--num_workers", type=int, default=8, help="that decode, at most the cores (default: 8)")
    parser.add_argument("--image_column", help="of a data set of the Hub (default: the only one of images)")
    parser.add_argument("--label_column", help="of a data set of the Hub (default: the only one of classes)")
    parser.add_argument("--working_directory", default="work_dir", help="for lists of files (default: work_dir)")
    parser.add_argument("--show_channels", type=int, nargs=3, default=[0, 1, 2], help="bands that --attention shows")
    parser.add_argument("--rescan_data", action="store_true", help="list the files anew")
    parser.add_argument("--overwrite", action="store_true", help="allow --output and --attention to exist")
    args = parser.parse_args(argv)
    # What else the scripts ask when they look for data, at their defaults
    args.shard_cache_gb, args.timeout_minutes, args.val_fraction = 100.0, 30.0, None
    for name, least in (("batch_size", 1), ("attention_images", 1), ("num_workers", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if args.output is None and args.attention is None:
        parser.error("give --output FILE for features, --attention FOLDER for pictures, or both")
    if args.output is not None and args.output.suffix not in SUFFIXES:
        parser.error(f"--output {args.output} has to end in {' or '.join(SUFFIXES)}")
    if (args.output and args.output.is_dir()) or (args.attention and args.attention.is_file()):
        parser.error("--output takes a file and --attention a folder, and the other is there under that name")
    for path in filter(None, (args.output, args.attention)):
        if os.path.lexists(path) and not args.overwrite:
            parser.error(f"{path} exists; choose another name or add --overwrite")
    if args.output and args.output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        parser.error(".parquet needs a package: pip install pyarrow; or write an .npz")
    return args


if __name__ == "__main__":  # --help and refusals come before the imports that take seconds
    parse_args()

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.utils import AttentionExtract
from torch import Tensor
from tqdm import tqdm

import dataset
from model import VisionTransformer, load_classifier, load_pretrained_encoder, load_segmenter, read_sizes
from storage.lists import FileList, as_text, check_same_classes
from storage.sizes import MAEConfig
from storage.values import ImageReader
from storage.weights import find_weights, read_state_dict
from storage.workers import Loader
from training.data import choose_value_range, list_splits
from training.pictures import draw_rows, show_values
from training.process import build_accelerator, cap_workers

# ------------------------------------------------------------------------------------------------ encoder


def open_encoder(checkpoint: Path) -> tuple[VisionTransformer, dict]:
    """Load the encoder of any checkpoint, with the head of a classifier, and its config.json."""
    record, names = read_sizes(checkpoint), read_state_dict(find_weights(checkpoint)).keys()
    if {"head.weight", "head.1.weight"} & names:
        return load_classifier(checkpoint)
    if record.get("architecture") == "ViTMAEForSegmentation":
        return load_segmenter(checkpoint)[0].backbone, record
    model = VisionTransformer(MAEConfig(**record["config"]))
    load_pretrained_encoder(model, checkpoint)
    return model, record


def encode(model: VisionTransformer, images: Tensor, pool: str, block: int | None) -> Tensor:
    """Encode normalised images (N, C, H, W): (N, D), or the patch tokens (N, L, D)."""
    if block is None and pool == POOLS[model.global_pool]:
        return model.forward_pooled(images)
    if block is None:
        tokens = model.forward_features(images)  #           (N, 1 + L, D)
    else:
        *_, tokens = model.encode_blocks(images, block)  #   (N, 1 + L, D)
    return {"cls": tokens[:, 0], "patches": tokens[:, 1:], "mean": tokens[:, 1:].mean(dim=1)}[pool]


# ------------------------------------------------------------------------------------------------ parts


class Part(NamedTuple):
    """Images `first` to `last` of a split: what is encoded by one process, and written whole."""

    file: Path
    split: str
    first: int
    last: int


def cut_parts(folder: Path, splits: dict[str, FileList], batch_size: int) -> list[Part]:
    """Cut all images into parts, the same on any number of processes."""
    size, parts = PART_BATCHES * batch_size, []
    for split, files in splits.items():
        for first in range(0, len(files), size):
            parts.append(Part(folder / f"{split}_{first:09d}.npz", split, first, min(first + size, len(files))))
    return parts


def collate_marked(samples: list[dataset.Sample]) -> dataset.Batch:
    """Collate with labels that tell which images are what they should be, and not in the place of a bad file."""
    return dataset.collate([sample._replace(label=int(not sample.bad_files)) for sample in samples])


def write_parts(
    accelerator: Accelerator, model: VisionTransformer, data: dict[str, dataset.ImageDataset], parts: list[Part], args
) -> None:
    """Encode this process's share of the parts that are not there yet."""
    missing = [part for part in parts[accelerator.process_index :: accelerator.num_processes] if not part.file.exists()]
    how = dict(num_workers=cap_workers(args.num_workers), timeout_s=60 * args.timeout_minutes)
    hidden = not accelerator.is_main_process or not sys.stderr.isatty()
    bar = tqdm(total=sum(part.last - part.first for part in missing), unit="image", disable=hidden)
    for split, images in data.items():
        own = [part for part in missing if part.split == split]
        keys = [[dataset.SampleKey(dataset.EVAL_EPOCH, i) for i in range(part.first, part.last)] for part in own]
        batches = [part[i : i + args.batch_size] for part in keys for i in range(0, len(part), args.batch_size)]
        how |= dict(collate_fn=collate_marked, generator=torch.Generator(), batch_sampler=batches)
        loader = iter(Loader(images, **how))
        for part in own:
            found, kept = [], []
            for _ in range(part.first, part.last, args.batch_size):
                batch = next(loader)
                with accelerator.autocast():
                    pixels = dataset.normalize(batch.images.to(accelerator.device), args.mean, args.std)
                    features = encode(model, pixels, args.pool, args.block).float().cpu()
                found.append(features[batch.labels.bool()])
                kept.append(batch.labels.bool())
                bar.update(len(kept[-1]))
            with written_whole(part.file) as temporary, temporary.open("xb") as file:
                np.savez(file, features=torch.cat(found).numpy(), kept=torch.cat(kept).numpy())
    bar.close()


def claim_parts(folder: Path, plan: dict, overwrite: bool) -> TextIO:
    """Begin a folder of parts, or go on with one of the same plan; ValueError names what differs.

    Gives a lock, which holds the folder while it is open; BlockingIOError where another run has it.
    """
    file = folder / "plan.json"
    before = read_json(file) if file.exists() else plan
    differ = [name for name in plan if before.get(name) != plan[name]]
    if differ and not overwrite:
        changes = ", ".join(f"{name} (was {before.get(name)}, is {plan[name]})" for name in differ)
        raise ValueError(
            f"{folder} was begun by another command: {changes}; give that one to go on, choose another --output, or "
            "begin anew with --overwrite"
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = hold(folder / "lock")
    except BlockingIOError as error:
        raise BlockingIOError(f"another run is writing {folder}; wait for it") from error
    for part in folder.glob("*.npz") if differ else ():
        part.unlink()
    replace_json(file, plan)
    return lock


# ------------------------------------------------------------------------------------------------ tables


def read_parts(parts: list[Part], splits: dict[str, FileList]) -> Iterator[tuple[np.ndarray, dict[str, list]]]:
    """Give the features of each part, (n, ...) float32, beside what is known of its images."""
    for part in parts:
        with np.load(part.file) as stored:
            features, kept = stored["features"], stored["kept"]
        files = splits[part.split]
        rows = part.first + np.flatnonzero(kept)
        for row in part.first + np.flatnonzero(~kept):
            print(escape(f"left out: {files.path(row)} cannot be decoded", also_bytes=True), file=sys.stderr)
        paths = [as_text(os.fsdecode(files.paths[row])) for row in rows]
        yield features, dict(split=[part.split] * len(rows), paths=paths, labels=files.labels[rows].tolist())


def write_npz(file: Path, parts: list[Part], splits: dict[str, FileList], about: dict) -> int:
    """Write the arrays that numpy's load gives, all in memory; give the number of images."""
    features, rows = zip(*read_parts(parts, splits), strict=True)
    columns = {name: np.array([value for part in rows for value in part[name]]) for name in rows[0]}
    columns |= {"classes": np.array(next(iter(splits.values())).classes, dtype=str), "about": json.dumps(about)}
    with file.open("xb") as opened:
        np.savez(opened, features=np.concatenate(features), **columns)
    return len(columns["paths"])


def write_parquet(file: Path, parts: list[Part], splits: dict[str, FileList], about: dict) -> int:
    """Write a row for each image, part by part; `about` in the metadata has classes and the shape of a feature."""
    import pyarrow as pa
    from pyarrow import parquet

    shape = np.load(parts[0].file)["features"].shape[1:]
    vector = pa.list_(pa.float32(), int(np.prod(shape)))
    fields = dict(split=pa.string(), paths=pa.string(), labels=pa.int64(), features=vector)
    metadata = {"about": json.dumps(about | {"shape": shape, "classes": next(iter(splits.values())).classes})}
    schema, count = pa.schema(fields.items(), metadata=metadata), 0
    with parquet.ParquetWriter(file, schema) as writer:
        for features, rows in read_parts(parts, splits):
            names = (name.encode("utf-8", "surrogateescape") for name in rows["paths"])
            rows["paths"] = [name.decode("utf-8", "backslashreplace") for name in names]  # .parquet takes UTF-8 alone
            flat = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), vector.list_size)
            writer.write_table(pa.table({**rows, "features": flat}, schema=schema))
            count += len(features)
    return count


# ------------------------------------------------------------------------------------------------ attention


def draw_attention(model: VisionTransformer, data: dict[str, dataset.ImageDataset], args, device) -> None:
    """Draw images, each followed by what the cls token attends to in the last block, or --block, head by head.

    Brightness is the weight of a patch, as a share of the largest of its head.
    """
    model.unfuse_attention()  # torch's fused kernel keeps no weights
    layer = f"blocks.{len(model.blocks) - 1 if args.block is None else args.block}.attn.attn_drop"
    extract = AttentionExtract(model, names=[layer], method="hook")
    for split, images in data.items():
        for sample in dataset.pick_samples(images, args.attention_images):
            pixels = dataset.normalize(sample.image[None].to(device), args.mean, args.std)  #  (1, C, H, W)
            weights = extract(pixels)[layer][0, :, 0, 1:].cpu()  #                              (heads, L)
            maps = (weights / weights.amax(dim=1, keepdim=True)).unflatten(1, model.grid_of(pixels))
            maps = F.interpolate(maps[:, None], pixels.shape[-2:])  #                           (heads, 1, H, W)
            shown = show_values([dataset.denormalize(pixels.cpu(), args.mean, args.std)], args.show_channels)[0]
            rows = {as_text(images.files.path(sample.key.index)): shown}
            for first in range(0, len(maps), HEADS_IN_A_ROW):
                heads = maps[first : first + HEADS_IN_A_ROW]
                rows[f"heads {first} to {first + len(heads) - 1} of {layer.rpartition('.')[0]}"] = heads
            with written_whole(args.attention / f"{split}_{sample.key.index:09d}.png") as temporary:
                draw_rows(rows).save(temporary, format="PNG")


# ------------------------------------------------------------------------------------------------ the command


def write_table(
    accelerator: Accelerator, model: VisionTransformer, data: dict[str, dataset.ImageDataset], plan: dict, args
) -> int:
    """Encode all images, or those that an earlier run of this plan has not, and give how many could not be read."""
    splits, folder = {split: images.files for split, images in data.items()}, beside(args.output, "parts")
    lock = claim_parts(folder, plan, args.overwrite) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    parts = cut_parts(folder, splits, args.batch_size)
    if done := sum(part.file.exists() for part in parts):
        accelerator.print(f"{'going on':<16}{done} of {len(parts)} parts are there")
    for files in splits.values():
        accelerator.print(f"{'encoding':<16}{files.describe()}")
    write_parts(accelerator, model, data, parts, args)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return 0
    write = write_npz if args.output.suffix == ".npz" else write_parquet
    with written_whole(args.output) as temporary:
        count = write(temporary, parts, splits, plan)
    remove(folder)
    lock.close()
    print(f"{args.output}: {args.pool} features of {count:,} images")
    return sum(map(len, splits.values())) - count


@torch.no_grad()
def main(args: argparse.Namespace) -> int:
    """Write what was asked for, and give the exit code: 1 where a file could not be read, else 0."""
    accelerator = build_accelerator(timeout_minutes=args.timeout_minutes)
    weights = find_weights(args.checkpoint)
    model, record = open_encoder(args.checkpoint)
    model.to(accelerator.device).eval()
    accelerator.print(f"{'weights':<16}{weights}")
    if args.block is not None and not 0 <= args.block < len(model.blocks):
        raise ValueError(f"--block {args.block} must lie in 0..{len(model.blocks) - 1}, as the encoder has no other")
    args.pool = args.pool or POOLS[model.global_pool]
    given = {"img_size": args.img_size[0] if len(args.img_size) == 1 else tuple(args.img_size)} if args.img_size else {}
    config = MAEConfig(**record["config"] | given)
    reader = ImageReader(config.input_channels, record)  # which knows what stands in for a mean that is not recorded
    args.mean, args.std, args.input_channels = reader.mean, reader.std, config.input_channels
    args.value_range, args.statistics_given = record.get("value_range"), "image_mean" in record
    found = list_splits(accelerator, args.path_to_data, args)
    splits = {"all": found[0]} if found[1] is None else {"train": found[0], "val": found[1]}
    if found[1] is not None and found[0].classes and found[1].classes:  # whose numbers are written as labels
        check_same_classes(found[1].classes, found[0].classes, found[1].root, str(found[0].root))
    try:
        choose_value_range(accelerator, args, found[0])
    except ValueError as error:
        way_out = "here they are read beside the weights, where tools/convert_weights.py writes what its flags tell"
        raise ValueError(f"{error}; {way_out}") from error
    values = dataset.build_values(args.value_range, args.mean, args.std)
    options = dict(channels=config.input_channels, values=values)
    data = {split: dataset.build_eval_images(files, config.image_hw, **options) for split, files in splits.items()}
    bad = 0
    if args.output is not None:
        plan = {"weights": f"{weights} {checksum_of(weights)}", "pool": args.pool, "block": args.block}
        plan |= {"img_size": config.image_hw, "batch_size": args.batch_size, "mean": args.mean, "std": args.std}
        plan |= {"value_range": args.value_range, "precision": accelerator.mixed_precision}
        plan |= {"data": {split: f"{files.root} {files.fingerprint()}" for split, files in splits.items()}}
        bad = write_table(accelerator, model, data, json.loads(json.dumps(plan)), args)
    if args.attention is not None and accelerator.is_main_process:
        draw_attention(model, data, args, accelerator.device)
        print(f"{args.attention}: attention of {args.attention_images} images of a split at most")
    accelerator.end_training()
    return 1 if bad else 0


if __name__ == "__main__":
    with explained_errors():
        sys.exit(main(parse_args()))
