"""Where the images and label maps of a split lie below a root. What is in the folders is the task of pairs.py."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SPLIT_NAMES = {"training": ("training", "train"), "validation": ("validation", "val", "valid")}
KNOWN_FOLDERS = (("images", "annotations"), ("img_dir", "ann_dir"), ("images", "masks"), ("images", "labels"))
ADE20K_FOLDER = "ADEChallengeData2016"
EXPECTED = """expected
  <root>/images/{training,validation}/*.jpg  and  <root>/annotations/{training,validation}/*.png  (ADEChallengeData2016)
with a label map of the same name and size for every image. Also found: train and val, img_dir and ann_dir, images and
masks or labels, <root>/train/images and <root>/train/masks. For others give --image_folder and --label_folder (below
the root; {split} in it stands for the split), and what ends the names: --image_suffix _img, --label_suffix _mask"""


class PairLayout(NamedTuple):
    """Where images and label maps lie, None as in KNOWN_FOLDERS, and what their names end in that is not common."""

    image_folder: str | None = None
    label_folder: str | None = None
    image_suffix: str = ""
    label_suffix: str = ""

    def kinds(self) -> tuple[tuple[str, str], ...]:
        """Give the folders to look for, of images and of label maps; with suffixes they may be one."""
        if self.image_folder is not None:
            return ((self.image_folder, self.label_folder or self.image_folder),)
        return KNOWN_FOLDERS + ((".", "."),) * bool(self.image_suffix or self.label_suffix)


AS_KNOWN = PairLayout()


class PairFolders(NamedTuple):
    """The folders of a split, relative to their root."""

    root: Path
    images: str
    label_maps: str


def candidates(layout: PairLayout, split: str) -> list[tuple[str, str]]:
    """Give the pairs of folders in which a split may lie, relative to the root."""
    found = []
    for kinds in layout.kinds():
        for name in SPLIT_NAMES.get(split, (split,)):
            if any("{split}" in kind for kind in kinds):
                found.append([kind.replace("{split}", name) for kind in kinds])
            else:
                found += [os.path.join(kind, name) for kind in kinds], [os.path.join(name, kind) for kind in kinds]
    return list(dict.fromkeys(tuple(map(os.path.normpath, kinds)) for kinds in found))


def present(root: Path, options: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [kinds for kinds in options if all((root / kind).is_dir() for kind in kinds)]


def find_root(root: Path, layout: PairLayout) -> Path:
    """Give ADE20K's folder for the one above it."""
    is_above = layout.image_folder is None and not (root / "images").is_dir() and (root / ADE20K_FOLDER).is_dir()
    return root / ADE20K_FOLDER if is_above else root


def list_pair_folders(root: Path, split: str, layout: PairLayout = AS_KNOWN) -> list[PairFolders]:
    """List the folders in which a split, "training" or "validation", may lie; two are better than one for both.

    Folders that are not divided into splits are training's.
    """
    root = find_root(root, layout)
    found = present(root, candidates(layout, split))
    if not found and split == "training":
        names = [name for names in SPLIT_NAMES.values() for name in names]
        divided = [os.path.join(kind, name) for kinds in layout.kinds() for kind in kinds for name in names]
        if not any((root / folder).is_dir() for folder in divided):
            found = present(root, layout.kinds())
    found = [kinds for kinds in found if kinds[0] != kinds[1]] or found
    return [PairFolders(root, *map(os.path.normpath, kinds)) for kinds in found]


def find_pair_folders(root: Path, split: str, layout: PairLayout) -> PairFolders | None:
    """Find the folders of a split, None where there are none; ValueError where there are several."""
    found = list_pair_folders(root, split, layout)
    if len(found) > 1:
        named = " and ".join(f"{folders.images} with {folders.label_maps}" for folders in found)
        raise ValueError(
            f"{root} has several folders for {split}: {named}; say which by --image_folder and --label_folder, with "
            "{split} in the place of the split"
        )
    return found[0] if found else None


def describe_missing(root: Path, split: str, layout: PairLayout) -> str:
    """Say which folders of a split are not there, of those that fit best what is."""
    root = find_root(root, layout)

    def fit(kinds: tuple[str, str]) -> tuple[int, int]:
        folders = [root / kind for kind in kinds]
        return sum(folder.is_dir() for folder in folders), sum(folder.parent.is_dir() for folder in folders)

    folders = [str(root / kind) for kind in dict.fromkeys(max(candidates(layout, split), key=fit))]
    missing = [folder for folder in folders if not os.path.isdir(folder)]
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there"
