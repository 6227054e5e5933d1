"""Download data or weights into the layout that the scripts read; run the command again to resume a broken download.

    python tools/download.py pets --output data
    accelerate launch finetune_segmentation.py --path_to_data data/pets --num_classes 2 ...

imagenette  ten easy classes of ImageNet, for pretraining and the classifier
pets        Oxford-IIIT Pet, for all three scripts: 37 breeds, and label maps of pet and background, the border ignored
ade20k      ADE20K's scene parsing data, for the segmenter
mae_*       weights of the original release: the encoder, with its decoder (full), one for pictures (visualize,
            ganloss), or a classifier (finetuned)

Each has its owner's licence and terms. Written without access to the internet: the tests bring a server of their own,
and none of the addresses below has been tried.
"""

import argparse
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storage.files import beside, escape, read_json, remove, user_path, write_json
from storage.labels import read_label_map
from storage.lists import contents
from storage.published import DAMAGED_ARCHIVE, get_file
from storage.transfer import check_disk, private_folder

UNPACKED_RATIO = 1.1  # unpacked size to archive size: images hardly shrink in an archive
STAMP = "download.json"  # in a data set that this tool has finished

IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas"
PETS = "https://www.robots.ox.ac.uk/~vgg/data/pets/data"
ADE20K = "http://data.csail.mit.edu/places/ADEchallenge"
# Checksums of imagenette and pets are torchvision's, that of ade20k is GluonCV's. Of the MAE files the original release
# publishes the first six digits of the MD5, and none for those with a decoder.
MAE_FILES = {
    "pretrain": ("pretrain/mae_pretrain_vit_{}.pth", {"base": "8cad7c", "large": "b8b06e", "huge": "9bdbb0"}),
    "full": ("pretrain/mae_pretrain_vit_{}_full.pth", {"base": None, "large": None, "huge": None}),
    "visualize": ("visualize/mae_visualize_vit_{}.pth", {"base": None, "large": None, "huge": None}),
    "ganloss": ("visualize/mae_visualize_vit_{}_ganloss.pth", {"large": None}),
    "finetuned": ("finetune/mae_finetuned_vit_{}.pth", {"base": "1b25e9", "large": "51f550", "huge": "2541f2"}),
}
SOURCES = {  # by name and variant: addresses, with the algorithm and the published digits of their checksums, or None
    ("imagenette", "160"): {f"{IMAGENETTE}/imagenette2-160.tgz": "md5:e793b78cc4c9e9a4ccc0c1155377a412"},
    ("imagenette", "320"): {f"{IMAGENETTE}/imagenette2-320.tgz": "md5:3df6f0d01a2c9592104656642f5e78a3"},
    ("imagenette", "full"): {f"{IMAGENETTE}/imagenette2.tgz": "md5:fe2fc210e6bb7c5664d602c3cd71e612"},
    ("pets", None): {
        f"{PETS}/images.tar.gz": "md5:5c4f3ee8e5d25df40f4fd59a7f44e54c",
        f"{PETS}/annotations.tar.gz": "md5:95a8c909bbe2e81eed6a22bccdf3f68f",
    },
    ("ade20k", None): {f"{ADE20K}/ADEChallengeData2016.zip": "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"},
} | {
    (f"mae_{size}", kind): {f"https://dl.fbaipublicfiles.com/mae/{path.format(size)}": digits and f"md5:{digits}"}
    for kind, (path, digits_of) in MAE_FILES.items()
    for size, digits in digits_of.items()
}
TRIMAP_CLASSES = np.array([-1, 1, 2, 0] + 252 * [-1])  # pet 1 and background 2 stay; the border, 3, is ignored: 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True)
    for name in dict.fromkeys(name for name, _ in SOURCES):
        command = names.add_parser(name)
        command.add_argument(
            "--output", type=user_path, required=True, help="folder to put it in; made if it is not there"
        )
        command.set_defaults(variant=None)
        variants = [variant for of, variant in SOURCES if of == name]
        if name == "imagenette":
            about = "short side in pixels (default: 320)"
            command.add_argument("--size", dest="variant", choices=variants, default="320", help=about)
        elif name.startswith("mae_"):
            about = "pretrain (default): encoder; full, visualize, ganloss: with decoder; finetuned: classifier"
            command.add_argument("--kind", dest="variant", choices=variants, default="pretrain", help=about)
    return parser.parse_args(argv)


def arrange_pets(unpacked: Path, target: Path) -> None:
    """Arrange the pets twice, as breeds in train/ and val/ and as ADE20K's pairs, by the publishers' own split."""
    for listing, split, ade_split in (("trainval.txt", "train", "training"), ("test.txt", "val", "validation")):
        images, label_maps = (target / kind / ade_split for kind in ("images", "annotations"))
        images.mkdir(parents=True)
        label_maps.mkdir(parents=True)
        for line in tqdm((unpacked / "annotations" / listing).read_text().splitlines(), desc=split):
            stem = line.partition(" ")[0]
            if stem in ("", "..") or Path(stem).name != stem:
                raise ValueError(f"{listing} lists {stem!r}, which is no name of an image")
            breed = target / split / stem.rsplit("_", 1)[0]
            breed.mkdir(parents=True, exist_ok=True)
            image = (unpacked / "images" / f"{stem}.jpg").rename(images / f"{stem}.jpg")
            try:
                os.link(image, breed / image.name)
            except OSError:  # a file system without hard links, such as exFAT and some network disks
                shutil.copyfile(image, breed / image.name)
            trimap = unpacked / "annotations" / "trimaps" / f"{stem}.png"
            Image.fromarray(read_label_map(trimap, TRIMAP_CLASSES)).save(label_maps / trimap.name)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or a tar file, once name, type and size of all that it holds are checked; ValueError otherwise."""
    is_zip = archive.suffix == ".zip"
    try:
        with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as content:
            if is_zip:  # of the kinds 4 is a folder, 8 a plain file, 0 not recorded
                entries = content.infolist()
                members = [(e.filename, e.file_size, e.external_attr >> 28 in (0, 4, 8)) for e in entries]
            else:
                entries = content.getmembers()
                members = [(e.name, e.size, e.isfile() or e.isdir()) for e in entries]
            for name, _, plain in members:
                path = Path(name.replace("\\", "/"))
                if not plain or path.is_absolute() or ".." in path.parts:
                    found = f"{archive} holds {name!r}, which is a link, a device or outside its folder"
                    raise ValueError(f"{found}; nothing was unpacked. Remove the archive if you do not trust it")
            check_disk(folder, sum(size for _, size, _ in members), f"unpacking {archive.name}")
            content.extractall(folder, tqdm(entries, desc=archive.name), **({} if is_zip else {"filter": "data"}))
    except DAMAGED_ARCHIVE as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise ValueError(f"{archive} cannot be unpacked: {reason}; remove it and run the command again") from error


def get_data(sources: dict[str, str | None], target: Path, work: Path) -> None:
    """Make a data set beside its place, so that its name means whole."""
    for url, checksum in sources.items():
        get_file(url, checksum, work / Path(url).name, work, 1 + UNPACKED_RATIO)
    unpacked = work / "unpacked"
    remove(unpacked)  # of a run that was killed
    try:
        unpacked.mkdir()
        for url in sources:
            unpack(work / Path(url).name, unpacked)
        folder = unpacked / target.name
        if target.name == "pets":
            arrange_pets(unpacked, folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"the archive holds no folder {folder.name}, but {contents(unpacked)}")
        write_json(folder / STAMP, {"sources": list(sources)})
        folder.rename(target)
    finally:
        remove(unpacked)


def is_complete(sources: dict[str, str | None], target: Path) -> bool:
    """Tell whether this tool has finished a data set; FileExistsError where anything else has its name."""
    if not os.path.lexists(target):
        return False
    if not ((target / STAMP).is_file() and read_json(target / STAMP) == {"sources": list(sources)}):
        raise FileExistsError(f"{target} exists and is not from this tool; move it away or choose another --output")
    return True


def main(args: argparse.Namespace) -> None:
    """Get one file or one data set, as the only run; the lock ends with the process, however that ends."""
    sources = SOURCES[args.name, args.variant]
    first, checksum = next(iter(sources.items()))
    args.output.mkdir(parents=True, exist_ok=True)
    weights = args.name.startswith("mae_")
    target = args.output / ("pets" if args.name == "pets" else Path(first).name if weights else Path(first).stem)
    work = beside(target, "download")
    complete = os.path.lexists(target) if weights else is_complete(sources, target)
    if complete and not os.path.lexists(work):  # nothing to write, in a folder that may be read-only
        get_file(first, checksum, target, work) if weights else print(f"{target} is complete")
        return
    with private_folder(work):
        if weights:
            get_file(first, checksum, target, work)
        elif not is_complete(sources, target):
            get_data(sources, target, work)
        for entry in work.iterdir():  # also of a run that was killed at the very end
            if entry.name != "lock":
                remove(entry)
    if not weights:
        print(f"{target} is complete")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(escape(f"error: {error}"))  # a server's words may hold control characters
    except KeyboardInterrupt:
        sys.exit("interrupted; run the command again to go on")
