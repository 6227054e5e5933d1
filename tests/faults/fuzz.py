"""Read mutated files in a process of its own and write what became of each: fuzz.py KIND SEED COUNT FOLDER

For every case a line of JSON: the case, "read" or the class of the error, its text, how long it took. A case that ends
the process leaves no line. What the interpreter is asked to do meanwhile (start a program, open a connection, write a
file outside FOLDER) is looked at by an audit hook and is written down as a violation.
"""

import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from accelerate import Accelerator

from dataset import ImageDataset, SampleKey, build_pretraining_transform
from model import MAEConfig, ViTMAEForPreTraining, load_pretrained_mae
from storage import decoding
from storage.decoding import DECODE_ERRORS, read_image
from storage.files import checksum_of
from storage.labels import label_table, read_label_map
from storage.lists import ListCache, list_images
from storage.pairs import list_pairs
from tools import pack_dataset
from training.checkpoints import Checkpoints, resume
from training.states import find_checkpoints, find_damage, newest_whole_checkpoint

SECONDS_A_CASE = 60  # more is a hang, on the busiest machine
REFUSALS = (ValueError, OSError)  # what a sentence is written for; FileNotFoundError and the like are among them
LAUNCHES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


# ------------------------------------------------------------------------------------------------ mutations


def mutate(data: bytes, draw: random.Random, other: bytes) -> bytes:
    """Damage a file in one of the ways of disks, transfers and attackers."""
    found = bytearray(data)
    size = len(found)
    place = draw.randrange(size)
    length = draw.choice((1, 2, 4, 16, 64, 512, 4096))
    way = draw.randrange(9)
    if way == 0:  # bits
        for _ in range(draw.choice((1, 1, 3, 30))):
            found[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif way == 1:  # cut off
        del found[place:]
    elif way == 2:  # a hole
        found[place : place + length] = bytes(min(length, size - place))
    elif way == 3:  # lost in the middle
        del found[place : place + length]
    elif way == 4:  # noise in the middle
        found[place:place] = draw.randbytes(length)
    elif way == 5:  # the end of another file
        found[place:] = other[draw.randrange(len(other)) :]
    elif way == 6:  # an extreme number in the head, where sizes are written
        place = draw.randrange(min(size, 200))
        number = draw.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f"))
        found[place : place + 4] = number
    elif way == 7:  # a part twice
        found[place:place] = found[max(0, place - length) : place]
    else:  # a digit or a letter of a text
        places = [i for i in range(min(size, 20_000)) if chr(found[i]).isalnum()] or [0]
        found[draw.choice(places)] = ord(draw.choice('0123456789aZ-.{}[]"'))
    return bytes(found)


# ------------------------------------------------------------------------------------------------ images


def draw_image(draw: random.Random) -> Image.Image:
    coarse = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((draw.randrange(20, 90), draw.randrange(20, 90)), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def image_seeds(draw: random.Random) -> list[bytes]:
    """Give sound files of every format, mode and kind that the project reads."""
    exif = Image.Exif()
    exif[274] = 6
    grey16 = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    seeds = [encode(draw_image(draw), "JPEG", quality=q, subsampling=s) for q in (30, 90) for s in (0, 2)]
    seeds += [encode(draw_image(draw), "JPEG", progressive=True), encode(draw_image(draw), "JPEG", exif=exif)]
    seeds += [encode(draw_image(draw).convert(mode), "JPEG") for mode in ("L", "CMYK")]
    seeds += [encode(draw_image(draw).convert(mode), "PNG") for mode in ("RGB", "L", "P", "RGBA", "LA", "1")]
    seeds += [encode(grey16, "PNG"), encode(grey16, "TIFF"), encode(draw_image(draw), "TIFF", compression="tiff_lzw")]
    seeds += [encode(draw_image(draw), form) for form in ("WEBP", "BMP", "TIFF", "GIF")]
    return [*seeds, encode(draw_image(draw), "WEBP", lossless=True)]


def image_cases(draw: random.Random, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Read a mutated file in the three ways that scripts do: a training crop, a whole picture, a label map."""
    seeds = image_seeds(draw)
    path = folder / "images" / "case.jpg"
    path.parent.mkdir()
    path.write_bytes(seeds[0])
    transform = build_pretraining_transform((32, 32), 0.2)
    data = ImageDataset(list_images(path.parent), transform, replace_bad_files=False, noise_size=4)
    table = label_table(150, ignore_zero=True)
    while True:
        seed = draw.randrange(len(seeds))
        path.write_bytes(mutate(seeds[seed], draw, draw.choice(seeds)))
        epoch = draw.randrange(1000)

        def read(epoch: int = epoch) -> None:
            reasons = []
            try:
                sample = data[SampleKey(epoch, 0)]
                assert sample.image.shape == (3, 32, 32) and sample.image.dtype == torch.uint8
            except REFUSALS as error:
                reasons.append(error)
            try:
                assert read_image(path).mode == "RGB"
            except DECODE_ERRORS as error:
                reasons.append(error)
            with contextlib.suppress(*DECODE_ERRORS):
                read_label_map(path, table)
            assert len(reasons) in (0, 2), f"one way reads what another refuses: {reasons}"
            if reasons:
                raise reasons[0]

        yield f"image {seed}", read


# ------------------------------------------------------------------------------------------------ checkpoints

TINY = MAEConfig(
    img_size=16, patch_size=8, encoder_embed_dim=16, encoder_depth=1, encoder_num_heads=2, decoder_embed_dim=16,
    decoder_depth=1, decoder_num_heads=2,
)  # fmt: skip
IDENTITY = {"seed": 0, "effective_batch_size": 4}


def checkpoint_cases(draw: random.Random, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Resume from, and take the weights of, a checkpoint with one mutated file; half have a manifest that fits it."""
    record = {"architecture": "ViTMAEForPreTraining", "config": TINY.__dict__}
    accelerator = Accelerator(cpu=True)
    model = ViTMAEForPreTraining(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model(torch.zeros(1, 3, 16, 16)).loss.backward()
    optimizer.step()
    model, optimizer = accelerator.prepare(model, optimizer)
    average = copy.deepcopy(model)
    sound = folder / "sound"
    sound.mkdir()
    checkpoints = Checkpoints(accelerator, sound, 2)
    for epoch in (1, 2):
        state = IDENTITY | {"epoch": epoch, "step": epoch, "best": 50.0, "row": {}}
        checkpoints.save(model, record, state, epoch_ends=True, average=average)
    files = sorted(file.name for file in (sound / "checkpoint_2").iterdir())
    contents = {name: (sound / "checkpoint_2" / name).read_bytes() for name in files}
    while True:
        experiment = folder / "experiment"
        shutil.rmtree(experiment, ignore_errors=True)
        shutil.copytree(sound, experiment, symlinks=True)
        newest, name = experiment / "checkpoint_2", draw.choice(files)
        (newest / name).write_bytes(mutate(contents[name], draw, contents[draw.choice(files)]))
        fits = draw.random() < 0.5 and name != "manifest.json"
        if fits:
            manifest = json.loads(contents["manifest.json"])
            size = (newest / name).stat().st_size
            manifest["files"][name] = {"bytes": size, "crc32": checksum_of(newest / name)}
            (newest / "manifest.json").write_text(json.dumps(manifest))
        same = (newest / name).read_bytes() == contents[name]

        def read(experiment: Path = experiment, newest: Path = newest, fits: bool = fits, same: bool = same) -> None:
            chosen, damaged = newest_whole_checkpoint(find_checkpoints(experiment))
            if not fits and not same:
                # Spaces and the like in the manifest itself may change and change nothing.
                assert damaged == [newest] or find_damage(newest) is None, "damage was not seen"
            try:
                load_pretrained_mae(newest)
            finally:
                resume(accelerator, chosen, record, IDENTITY, average=average, keeps_best=True)

        yield f"checkpoint {name}{', manifest made to fit' if fits else ''}", read


# ------------------------------------------------------------------------------------------------ packs and lists


def pack_cases(draw: random.Random, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Read every record of a pack with one mutated file, and a mutated list of files."""
    source = folder / "source"
    for split in ("train", "val"):
        for name in ("cats", "dogs"):
            (source / split / name).mkdir(parents=True)
            for index in range(3):
                draw_image(draw).save(source / split / name / f"{index}.jpg")
    for kind in ("images", "annotations"):
        for split in ("training", "validation"):
            (folder / "pairs" / kind / split).mkdir(parents=True)
            for index in range(2):
                image = draw_image(draw).resize((24, 20))
                end = "jpg" if kind == "images" else "png"
                file = folder / "pairs" / kind / split / f"{index}.{end}"
                (image if kind == "images" else image.convert("L").point(lambda v: v % 151)).save(file)
    packs = {"jpeg": (source, []), "raw": (source, ["--raw"]), "pairs": (folder / "pairs", [])}
    sound = folder / "sound"
    for name, (origin, flags) in packs.items():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            arguments = [str(origin), "--output", str(sound / name), "--short_side", "32", "--num_workers", "1"]
            pack_dataset.main(pack_dataset.parse_args([*arguments, *flags]))
    list_images(source / "train", ListCache(sound / "lists"))
    places = sorted(file.relative_to(sound) for file in sound.rglob("*") if file.is_file())
    transform, table = build_pretraining_transform((16, 16), 0.2), label_table(150, ignore_zero=True)
    while True:
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(sound, case)
        place = draw.choice(places)
        content = (sound / place).read_bytes()
        (case / place).write_bytes(mutate(content, draw, (sound / draw.choice(places)).read_bytes()))

        def read(case: Path = case, place: Path = place) -> None:
            if place.parts[0] == "lists":
                files = list_images(source / "train", ListCache(case / "lists"))
                assert len(files) == 6 and files.classes == ("cats", "dogs"), "a damaged list was believed"
                return
            if place.parts[0] == "pairs":
                for split in ("training", "validation"):
                    pairs = list_pairs(case / "pairs", split)
                    for index in range(len(pairs)):
                        read_label_map(pairs.label_file(index), table)
                        read_image(pairs.image_file(index))
                return
            for split in ("train", "val"):
                files = list_images(case / place.parts[0] / split)
                data = ImageDataset(files, transform, replace_bad_files=False)
                for index in range(len(files)):
                    data[SampleKey(0, index)]
                    files.open_picture(index, 3).whole()

        yield f"pack {place}", read


CASES = {"images": image_cases, "checkpoints": checkpoint_cases, "packs": pack_cases}


# ------------------------------------------------------------------------------------------------ the process


def watch_interpreter(folder: Path, violations: list[str]) -> None:
    allowed = (str(folder) + os.sep, "/dev/null", "/dev/shm")

    def look(event: str, details: tuple) -> None:
        if event == "open" and isinstance(details[0], str) and (details[2] or 0) & WRITING:
            if not os.path.abspath(details[0]).startswith(allowed):
                violations.append(f"writes {details[0]}")
        elif event in LAUNCHES:
            violations.append(f"{event} {details!r}")

    sys.addaudithook(look)


def stop(*_: object) -> None:
    raise TimeoutError(f"took longer than {SECONDS_A_CASE} s")


def main(kind: str, seed: int, count: int, folder: Path) -> None:
    folder = folder.resolve()
    os.environ["TMPDIR"] = str(folder)
    draw = random.Random(seed)
    cases = CASES[kind](draw, folder)
    decoding.load_nvimgcodec()
    signal.signal(signal.SIGALRM, stop)
    out = os.fdopen(os.dup(1), "w")
    violations: list[str] = []
    watching = False
    for number in range(count):
        name, read = next(cases)
        if not watching:
            watch_interpreter(folder, violations)
            watching = True
        started = time.perf_counter()
        signal.alarm(SECONDS_A_CASE)
        try:
            read()
            outcome, text = "read", ""
        except TimeoutError as error:
            outcome, text = "hang", str(error)
        except BaseException as error:
            outcome, text = type(error).__name__, str(error)
            if isinstance(error, REFUSALS):
                outcome = "refused"
        signal.alarm(0)
        row = {"number": number, "case": name, "outcome": outcome, "text": text[:300], "violations": violations.copy()}
        violations.clear()
        out.write(json.dumps(row | {"seconds": time.perf_counter() - started}) + "\n")
        out.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
