"""Drawn scenes: a data set that needs no download, for the demos of the three scripts.

Only drawing and writing; the scenes are read like any other folder of images.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from storage.files import hold, read_json, write_json, written_whole

# One large object of ten kinds before a gradient and a pattern. Colour, place, size and tilt are drawn without regard
# to the kind, so only the outline gives it away. A scene follows from (seed, kind, size) alone.
DEMO_KINDS = ("circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent", "house", "tree")
# The index is the value in a label map. 0 is ADE20K's "other", which training and metrics ignore:
# here the rim of a shape, where antialiasing mixes two regions in one pixel.
DEMO_LABEL_NAMES = ("other", "background", *DEMO_KINDS, "clutter")
DEMO_OVERSAMPLING = 4  # drawn this many times larger, then averaged: antialiased edges
DEMO_VAL_SEED = 2_000_000  # training scenes have the seeds below, validation scenes those from here on
STAMP = "demo.json"  # the recipe of the data, in their folder
DEMO_VERSION = 1  # raise it with every change to the drawing: data on disk is reused only if it agrees


def demo_outlines(kind: str) -> list[np.ndarray]:
    """Give the polygon of a kind, and that of its hole if it has one; (points, 2) in [-1, 1], y down."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if kind == "circle":
        return [circle]
    if kind == "ring":
        return [circle, 0.5 * circle]
    if kind == "crescent":
        return [circle, 0.8 * circle + (0.5, 0)]
    if kind == "heart":
        x, y = np.sin(turn) ** 3, -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
        return [np.stack([x, (y - 2.5) / 15], axis=1)]
    if kind == "star":
        radius = np.where(np.arange(10) % 2, 0.45, 1.05)
        angle = np.pi * np.arange(10) / 5
        return [np.stack([radius * np.sin(angle), 0.08 - radius * np.cos(angle)], axis=1)]
    points = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
        "cross": [(-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35),
                  (0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35)],
        "house": [(0, -1), (1, -0.1), (0.75, -0.1), (0.75, 0.95), (-0.75, 0.95), (-0.75, -0.1), (-1, -0.1)],
        "tree": [(0, -1), (0.6, -0.2), (0.35, -0.2), (0.9, 0.5), (0.2, 0.5), (0.2, 1),
                 (-0.2, 1), (-0.2, 0.5), (-0.9, 0.5), (-0.35, -0.2), (-0.6, -0.2)],
    }  # fmt: skip
    return [np.array(points[kind])]


def draw_coverage(outlines: list[np.ndarray], center: np.ndarray, radius: float, tilt: float, size: int) -> np.ndarray:
    """Give how much of each pixel a shape covers, (size, size) in [0, 1]; center and radius in image widths."""
    side = size * DEMO_OVERSAMPLING
    rotation = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    canvas = Image.new("L", (side, side))
    for outline, fill in zip(outlines, (255, 0), strict=False):  # the second outline is a hole
        points = (center + radius * outline @ rotation.T) * side
        ImageDraw.Draw(canvas).polygon([tuple(point) for point in points.tolist()], fill=fill)
    return np.asarray(canvas.reduce(DEMO_OVERSAMPLING), dtype=np.float32) / 255


def draw_gradient(
    rng: np.random.Generator, color: np.ndarray, strength: float, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Give a colour that brightens by `strength` across the image in a random direction, (3, size, size)."""
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)
    tint = rng.uniform(0.4, 1, size=3)  # unequal channels, so that the hue drifts as well
    return color[:, None, None] + (strength * tint)[:, None, None] * ramp


def draw_pattern(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Give soft stripes, checks or waves in [-1, 1], (size, size)."""
    waves_across = rng.uniform(1, 2.5)
    phase_u, phase_v = rng.uniform(0, 2 * np.pi, size=2)
    angle = rng.uniform(0, np.pi)
    u = 2 * np.pi * waves_across * (np.cos(angle) * x + np.sin(angle) * y) + phase_u
    v = 2 * np.pi * waves_across * (np.cos(angle) * y - np.sin(angle) * x) + phase_v
    style = rng.integers(3)
    if style == 0:
        return np.sin(u)
    if style == 1:
        return np.sin(u) * np.sin(v)
    return np.sin(u + np.sin(v / 2))


def draw_demo_scene(seed: int, kind: int, size: int = 80) -> tuple[Image.Image, Image.Image]:
    """Draw a scene and its label map, modes RGB and L; see DEMO_KINDS and DEMO_LABEL_NAMES."""
    rng = np.random.default_rng([seed, kind])
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size

    # Three colours at a distance, or an object might not stand out.
    while True:
        ground, body, clutter = rng.uniform(0.1, 0.9, size=(3, 3))
        if min(np.linalg.norm(ground - body), np.linalg.norm(ground - clutter)) > 0.5:
            break
    scene = draw_gradient(rng, ground, rng.uniform(0.1, 0.35), x, y)
    scene += rng.uniform(0.02, 0.06) * draw_pattern(rng, x, y)
    labels = np.full((size, size), DEMO_LABEL_NAMES.index("background"), dtype=np.uint8)

    # The clutter first, so that the object may hide some of it and never the reverse.
    radius = rng.uniform(0.29, 0.4)
    center = rng.uniform(radius, 1 - radius, size=2)
    shapes = []
    for _ in range(rng.integers(1, 4)):
        outlines = demo_outlines(("circle", "square", "triangle")[rng.integers(3)])
        spot = (outlines, rng.uniform(0.06, 0.94, size=2), rng.uniform(0.035, 0.055), rng.uniform(-np.pi, np.pi))
        shapes.append((spot, clutter, DEMO_LABEL_NAMES.index("clutter")))
    main = (demo_outlines(DEMO_KINDS[kind]), center, radius, rng.uniform(-0.2, 0.2))
    shapes.append((main, body, DEMO_LABEL_NAMES.index(DEMO_KINDS[kind])))

    for shape, color, label in shapes:
        coverage = draw_coverage(*shape, size)
        fill = draw_gradient(rng, color, rng.uniform(0.05, 0.2), x, y)
        scene += coverage * (fill - scene)
        labels[coverage > 0.25] = 0
        labels[coverage > 0.75] = label
    pixels = (scene.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), Image.fromarray(labels)


def write_demo_data(root: Path, num_train: int = 3000, num_val: int = 400) -> None:
    """Write the scenes below `root` as imagefolder/ and as ADEChallengeData2016/, unless they are there already.

    While another process draws them, this one waits. FileExistsError where `root` holds anything else.
    """
    recipe = {"version": DEMO_VERSION, "num_train": num_train, "num_val": num_val}
    if holds_demo_data(root, recipe):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with hold(root.with_name(f".{root.name}.lock"), waits=True):  # what a killed drawing left is nobody's, and removed
        if not holds_demo_data(root, recipe):
            draw_demo_data(root, recipe)


def holds_demo_data(root: Path, recipe: dict) -> bool:
    """Tell whether the scenes of a recipe are there; FileExistsError where anything else is."""
    if (root / STAMP).is_file() and read_json(root / STAMP) == recipe:
        return True
    if root.exists():
        raise FileExistsError(f"{root} exists and is not the demo data for {recipe}; remove it or name another folder")
    return False


def draw_demo_data(root: Path, recipe: dict) -> None:
    splits = (("train", "training", recipe["num_train"], 0), ("val", "validation", recipe["num_val"], DEMO_VAL_SEED))
    with written_whole(root, flush=False) as partial:
        for split, ade_split, num_scenes, first_seed in splits:
            classes = [partial / "imagefolder" / split / kind for kind in DEMO_KINDS]
            ade = partial / "ADEChallengeData2016"
            images, annotations = ade / "images" / ade_split, ade / "annotations" / ade_split
            for folder in (*classes, images, annotations):
                folder.mkdir(parents=True)
            for index in range(num_scenes):
                kind, stem = index % len(DEMO_KINDS), f"demo_{split}_{index:06d}"
                image, labels = draw_demo_scene(first_seed + index, kind)
                image.save(images / f"{stem}.jpg", quality=92, subsampling=0)  # 4:4:4, or thin shapes lose their colour
                shutil.copyfile(images / f"{stem}.jpg", classes[kind] / f"{stem}.jpg")
                labels.save(annotations / f"{stem}.png")
        write_json(partial / STAMP, recipe)
