"""Drawn scenes: a data set that needs no download, for the demos of the three scripts.

Only drawing and writing; the scenes are read like any other folder of images.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from storage.files import hold, read_json, write_json, written_whole

DEMO_OVERSAMPLING = 4  # drawn this many times larger, then averaged: antialiased edges
DEMO_VAL_SEED = 2_000_000  # training scenes have the seeds below, validation scenes those from here on
STAMP = "demo.json"  # the recipe of the data, in their folder
DEMO_VERSION = 2  # raise it with every change to the drawing: data on disk is reused only if it agrees


def disc(x: float, y: float, width: float, height: float, first: float = 0, last: float = 360) -> np.ndarray:
    """Give an ellipse of these half axes, or its part between two angles (degrees, clockwise from the right)."""
    turn = np.radians(np.linspace(first, last, 32))
    return np.stack([x + width * np.cos(turn), y + height * np.sin(turn)], axis=1)


def box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


# A scene is a landscape of seven kinds in the light of a sun or moon, and before it one large object of ten kinds.
# Landscape, colour, place, size and tilt are drawn without regard to the kind, so only the shape gives it away. A scene
# follows from (seed, kind, size) alone.
# What a kind is made of: polygons (points, 2) in [-1, 1], y down; the second list is painted in another shade.
ROOF = np.array([(0, -1), (1, -0.05), (-1, -0.05)])
LEFT_SPIRE, RIGHT_SPIRE = (np.array([(side, -0.45), (0.67 * side, -1), (0.35 * side, -0.45)]) for side in (-1, 1))
LEFT_EAR, RIGHT_EAR = (np.array([(0.82 * side, 0.1), (0.8 * side, -0.95), (0.1 * side, -0.45)]) for side in (-1, 1))
LEFT_FIN, RIGHT_FIN = (np.array([(0.42 * side, 0.15), (0.9 * side, 0.9), (0.42 * side, 0.6)]) for side in (-1, 1))
TAIL = np.array([(0.4, 0), (1, -0.55), (0.85, 0), (1, 0.55)])
STALK = np.array([(-0.28, 0.05), (0.28, 0.05), (0.4, 0.95), (-0.4, 0.95)])
HULL = np.array([(-1, 0.5), (1, 0.5), (0.65, 0.95), (-0.65, 0.95)])
PETALS = [disc(0.58 * np.sin(turn), -0.25 - 0.58 * np.cos(turn), 0.4, 0.4) for turn in np.arange(5) * 2 * np.pi / 5]
SHAPES = {
    "balloon": (
        [np.concatenate([disc(0, -0.28, 0.74, 0.72, 150, 390), [(0.2, 0.7), (-0.2, 0.7)]]), box(-0.2, 0.6, 0.2, 1)],
        [box(-0.2, 0.7, 0.2, 1), disc(0, -0.26, 0.3, 0.74)],
    ),
    "castle": (
        [box(-0.95, -0.5, -0.4, 1), box(0.4, -0.5, 0.95, 1), box(-0.5, 0, 0.5, 1), LEFT_SPIRE, RIGHT_SPIRE],
        [LEFT_SPIRE, RIGHT_SPIRE, disc(0, 0.6, 0.25, 0.25), box(-0.25, 0.6, 0.25, 1)],
    ),
    "cat": (
        [disc(0, 0.2, 0.85, 0.75), LEFT_EAR, RIGHT_EAR],
        [disc(-0.35, 0.1, 0.14, 0.2), disc(0.35, 0.1, 0.14, 0.2), np.array([(-0.16, 0.42), (0.16, 0.42), (0, 0.6)])],
    ),
    "fish": (
        [disc(-0.2, 0, 0.75, 0.52), TAIL],
        [TAIL, disc(-0.58, -0.1, 0.12, 0.12), np.array([(-0.1, 0), (0.2, -0.22), (0.2, 0.22)])],
    ),
    "flower": (
        [*PETALS, disc(0, -0.25, 0.4, 0.4), box(-0.1, 0, 0.1, 1), disc(0.3, 0.75, 0.3, 0.14)],
        [disc(0, -0.25, 0.3, 0.3), box(-0.1, 0.55, 0.1, 1), disc(0.3, 0.75, 0.3, 0.14)],
    ),
    "house": (
        [ROOF, box(-0.78, -0.1, 0.78, 0.95)],
        [ROOF, box(-0.5, 0.3, -0.05, 0.95), box(0.2, 0.25, 0.55, 0.6)],
    ),
    "mushroom": (
        [disc(0, 0.05, 0.98, 1, 180, 360), STALK],
        [STALK, disc(-0.45, -0.3, 0.17, 0.17), disc(0.1, -0.62, 0.17, 0.17), disc(0.5, -0.2, 0.17, 0.17)],
    ),
    "rocket": (
        [np.concatenate([disc(0, -0.1, 0.42, 0.9, 180, 360), [(0.42, 0.6), (-0.42, 0.6)]]), LEFT_FIN, RIGHT_FIN],
        [LEFT_FIN, RIGHT_FIN, disc(0, -0.3, 0.2, 0.2)],
    ),
    "sailboat": (
        [np.array([(0, -1), (0.9, 0.4), (0, 0.4)]), np.array([(0, -0.75), (0, 0.4), (-0.8, 0.4)]), HULL,
         box(-0.08, -0.95, 0.08, 0.6)],
        [HULL, box(-0.08, -0.95, 0.08, 0.5)],
    ),
    "tree": (
        [np.array([(0, -1), (0.55, -0.3), (-0.55, -0.3)]), np.array([(0, -0.7), (0.75, 0.2), (-0.75, 0.2)]),
         np.array([(0, -0.3), (0.95, 0.65), (-0.95, 0.65)]), box(-0.18, 0.6, 0.18, 1)],
        [box(-0.18, 0.65, 0.18, 1)],
    ),
}  # fmt: skip
DEMO_KINDS = tuple(SHAPES)
# The index is the value in a label map. 0 is ADE20K's "other", which training and metrics ignore:
# here the rim of a region, where antialiasing mixes two in one pixel.
DEMO_LABEL_NAMES = ("other", "sky", "land", *DEMO_KINDS)
# Red, green and blue of the top of the sky, the sky at the horizon, the far hills and the near ones
LANDSCAPES = np.array([
    [(90, 155, 230), (215, 235, 250), (125, 170, 150), (70, 135, 60)],  # meadow
    [(70, 60, 130), (250, 165, 110), (125, 85, 125), (55, 45, 75)],  # dusk
    [(125, 195, 225), (250, 225, 190), (215, 165, 115), (195, 120, 65)],  # desert
    [(25, 30, 75), (85, 105, 165), (50, 65, 110), (20, 30, 55)],  # night
    [(165, 190, 215), (235, 240, 245), (185, 205, 225), (225, 235, 245)],  # snow
    [(245, 160, 150), (255, 225, 175), (150, 130, 160), (70, 110, 115)],  # dawn
    [(60, 150, 190), (190, 235, 225), (60, 150, 160), (25, 85, 130)],  # sea
])  # fmt: skip
BODIES = np.array([
    (225, 60, 50), (245, 195, 55), (245, 245, 240), (130, 60, 150), (40, 60, 140), (240, 125, 40), (45, 140, 110),
    (235, 110, 150),
])  # fmt: skip
SUNLIGHT = np.array((255, 247, 217))
NUM_HILLS = 3


def draw_coverage(polygons: list[np.ndarray], matrix: np.ndarray, center: np.ndarray, size: int) -> np.ndarray:
    """Give how much of each pixel polygons cover, (size, size) in [0, 1]; matrix and center in image widths."""
    side = size * DEMO_OVERSAMPLING
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        draw.polygon(((polygon @ matrix + center) * side).ravel().tolist(), fill=255)
    return np.asarray(canvas.reduce(DEMO_OVERSAMPLING), dtype=np.float32) / 255


def jitter(rng: np.random.Generator, colors: np.ndarray) -> np.ndarray:
    """Change colours (..., 3) of 0 to 255 a little, and give them as (..., 3, 1, 1) in [0, 1]."""
    return (colors / 255 + rng.uniform(-0.06, 0.06, size=colors.shape)).clip(0, 1)[..., None, None]


def draw_demo_scene(seed: int, kind: int, size: int = 80) -> tuple[Image.Image, Image.Image]:
    """Draw a scene and its label map, modes RGB and L; see DEMO_KINDS and DEMO_LABEL_NAMES."""
    rng = np.random.default_rng([seed, kind])
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size
    regions = []  # coverage, fill and label of what lies over the sky, from the back to the front

    # Sky, and the sun or moon with its glow
    top, low, far, near = jitter(rng, LANDSCAPES[rng.integers(len(LANDSCAPES))])
    horizon = rng.uniform(0.45, 0.7)
    scene = top + (low - top) * np.minimum(y / horizon, 1) ** 1.3
    sun = np.array([rng.uniform(0.1, 0.9), rng.uniform(0.1, horizon - 0.05)])
    distance = np.hypot(x - sun[0], y - sun[1])
    glow = np.maximum(0.55 * np.exp(-distance / 0.18), ((0.07 - distance) * size + 0.5).clip(0, 1))
    scene += glow * (SUNLIGHT[:, None, None] / 255 - scene)

    # Hills, darker from ridge to foot
    for depth in np.linspace(0, 1, NUM_HILLS):
        height, waves, phase = rng.uniform(0.02, 0.07), rng.uniform(0.6, 1.6), rng.uniform()
        ridge = horizon + 0.62 * (1 - horizon) * depth + height * np.sin(2 * np.pi * (waves * x + phase))
        fill = (far + (near - far) * depth) * (1 - 0.35 * (y - ridge).clip(0, 0.4))
        regions.append((((y - ridge) * size + 0.5).clip(0, 1), fill, "land"))

    # The object, lighter towards the sun, in a colour that stands out
    while True:
        body = jitter(rng, BODIES[rng.integers(len(BODIES))])
        if min(np.abs(body - color).max() for color in (top, low, far, near)) > 0.25:
            break
    other_shade = body / 2 if body.mean() > 0.45 else body / 2 + 0.5
    radius, tilt, mirror = rng.uniform(0.37, 0.42), rng.uniform(-0.06, 0.06), rng.choice((-1, 1))
    center = 0.5 + rng.uniform(-0.04, 0.04, size=2)
    matrix = radius * np.array([[mirror * np.cos(tilt), mirror * np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    outline, marks = (draw_coverage(part, matrix, center, size) for part in SHAPES[DEMO_KINDS[kind]])
    towards = (sun - center) / np.linalg.norm(sun - center)
    light = 1 + 0.45 * ((x - center[0]) * towards[0] + (y - center[1]) * towards[1])
    regions.append((outline, (body + marks * (other_shade - body)) * light, DEMO_KINDS[kind]))

    labels = np.full((size, size), DEMO_LABEL_NAMES.index("sky"), dtype=np.uint8)
    for coverage, fill, name in regions:
        label = DEMO_LABEL_NAMES.index(name)
        scene += coverage * (fill - scene)
        labels[(coverage > 0.25) & (labels != label)] = 0
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
