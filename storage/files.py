"""Files written whole or not at all, checked JSON, checksums: once, for everybody.

What lies in the files is known elsewhere.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import reprlib
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path


def unused_name(path: Path, suffix: str) -> Path:
    """Give the first of path_1, path_2, ... with a suffix that does not exist."""
    numbered = (path.with_name(f"{path.name}_{number}{suffix}") for number in itertools.count(1))
    return next(name for name in numbered if not name.exists())


def rename_aside(file: Path) -> None:
    """Rename what an earlier run without a checkpoint left under this name, so that nothing is overwritten."""
    if file.exists():
        file.rename(unused_name(file.with_suffix(""), file.suffix))


CHUNK_BYTES = 1 << 24


def checksum_of(file: Path) -> str:
    """Give the CRC-32 of a file's content. It is there to find damage, not forgery, and reads 1 to 2 GB a second."""
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(target: Path, ending: str) -> Path:
    """Give TARGET.tmp, where a target is written until it is whole, or TARGET.old, what it replaces meanwhile."""
    return target.with_name(f"{target.name}.{ending}")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def recover(target: Path) -> None:
    """Undo what a kill in the middle of `written_whole` left: an older folder comes back, a half-written one goes."""
    old = beside(target, "old")
    if old.exists():
        remove(old) if os.path.lexists(target) else os.rename(old, target)
    remove(beside(target, "tmp"))


def publish(temporary: Path, target: Path, *, flush: bool = True) -> None:
    """Give a file or folder that was written under another name its own, when all of it is on the disk.

    An older folder of that name is there until then, and comes back by `recover` after a kill in between.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in [temporary, *temporary.rglob("*")]:
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors lets nobody else read
        if flush:
            sync_to_disk(path)
    if target.is_dir():  # a folder cannot be renamed over another
        os.rename(target, beside(target, "old"))
    os.replace(temporary, target)
    sync_to_disk(target.parent)
    remove(beside(target, "old"))


@contextlib.contextmanager
def written_whole(target: Path, *, unique: bool = False, flush: bool = True) -> Iterator[Path]:
    """Give a name beside `target` to write a file or a folder under; at the end it takes the target's place, flushed.

    An error in between leaves the target as it was and nothing beside it. `unique` is for targets that several
    processes may write at once: of folders the first stays, and so does what a kill leaves. `flush` off is for what
    can be made again after a power cut: 10,000 small files take 40 s to flush.
    """
    temporary = beside(target, f"{secrets.token_hex(4)}.tmp" if unique else "tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not unique:
        recover(target)
    try:
        yield temporary
        if not (unique and target.is_dir()):
            publish(temporary, target, flush=flush)
    finally:
        remove(temporary)
        if not unique:
            recover(target)


def write_json(file: Path, content: Mapping) -> None:
    """Write a table as JSON, in place: into a folder that is published later, or inside `written_whole`."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def random_key(*parts: int | str) -> int:
    """Hash (seed, epoch, index, ...) into 64 bits, alike in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def fingerprint(content: bytes) -> str:
    """Hash bytes into 16 hexadecimal digits, by which a resumed run tells whether its data is still the same."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_json(file: Path) -> dict:
    """Read a JSON file of entries by name; ValueError names a file that holds anything else."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not entries by name")
    return content


def is_whole(value: object, least: int = 1) -> bool:
    return type(value) is int and value >= least


def is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_list(value: object, check: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(check(item) for item in value)


def is_numbered(value: object) -> bool:
    """Say whether this is a table of texts by "0", "1" and so on, in any order."""
    return (
        isinstance(value, dict)
        and value.keys() == set(map(str, range(len(value))))
        and all(map(is_text, value.values()))
    )


CHECKS = {
    "a whole number above 0": is_whole,
    "a whole number above 0, or null": lambda value: value is None or is_whole(value),
    "a number of at least 0": lambda value: is_number(value) and value >= 0,
    "true or false": lambda value: isinstance(value, bool),
    "a text": is_text,
    "gelu, as in all models here": lambda value: value == "gelu",
    "a table": lambda value: isinstance(value, dict),
    "a table of texts": lambda value: isinstance(value, dict) and is_list(list(value.values()), is_text),
    "a list of texts": lambda value: is_list(value, is_text),
    "texts by number from 0": lambda value: is_list(value, is_text) or is_numbered(value),
    "a list of numbers": lambda value: is_list(value, is_number),
    "a list of whole numbers": lambda value: is_list(value, lambda item: is_whole(item, 0)),
    "one or two whole numbers above 0": lambda value: is_whole(value) or (is_list(value, is_whole) and len(value) == 2),
}


# What entries of config.json and the like have to be, here, in transformers and in timm
ENTRIES = {
    "one or two whole numbers above 0": "img_size image_size",
    "a whole number above 0": "patch_size input_channels encoder_embed_dim encoder_depth encoder_num_heads "
    "decoder_embed_dim decoder_depth decoder_num_heads num_channels hidden_size num_hidden_layers num_attention_heads "
    "decoder_hidden_size decoder_num_hidden_layers decoder_num_attention_heads num_heads",
    "a whole number above 0, or null": "channels",  # of a segmenter, null is the encoder's width
    "a number of at least 0": "encoder_mlp_ratio decoder_mlp_ratio layer_norm_eps mask_ratio",
    "true or false": "norm_pix_loss rel_pos_bias ignore_zero",
    "a text": "architecture global_pool norm",
    "gelu, as in all models here": "hidden_act act_layer",
    "a table": "config pretrained_cfg model_args",
    "a table of texts": "weight_map",
    "a list of texts": "class_names",
    "texts by number from 0": "id2label label_names",
    "a list of numbers": "image_mean image_std mean std",
    "a list of whole numbers": "taps resize_to",
}


def check_entries(file: Path, entries: Mapping[str, object]) -> None:
    """Raise ValueError, naming file and entry, where an entry of a JSON file is not of the kind it has to be."""
    for kind, names in ENTRIES.items():
        for name in names.split():
            if name in entries and not CHECKS[kind](entries[name]):
                raise ValueError(f"{name} in {file} has to be {kind}, not {reprlib.repr(entries[name])}")
            if kind == "a table" and name in entries:
                check_entries(file, entries[name])
