"""Decoding, file lists, random numbers, samplers: hand-made cases, round trips and invariances."""

import csv
import dataclasses
import io
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from torchvision.transforms import InterpolationMode, v2

import dataset
from dataset import (
    EVAL_EPOCH,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ADE20KDataset,
    ImageDataset,
    PairMixing,
    ResizeCenterCrop,
    Sample,
    SampleKey,
    SegmentationTransform,
    SingleTryResizedCrop,
    StepSampler,
    build_eval_loader,
    build_finetuning_transform,
    build_pretraining_transform,
    build_probing_transform,
    build_training_loader,
    denormalize,
    distort_colours,
    eval_crop_ratio,
    fit_within,
    keep_size,
    normalize,
    seeded,
)
from storage import decoding, files
from storage.decoding import DECODE_ERRORS, Area, JPEGPicture, NamedBytes, describe_decoder, open_picture, read_image
from storage.demo import DEMO_KINDS, draw_demo_scene, write_demo_data
from storage.lists import check_same_classes, find_splits, list_images, scan_images
from storage.pairs import (
    ADE20K_CLASS_NAMES,
    ADE20K_NUM_CLASSES,
    ADE20K_PALETTE,
    IGNORE_INDEX,
    check_pairs,
    label_table,
    list_pairs,
    read_label_map,
)

# -------------------------------------------------------------------------------- decoding


def save(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff", "gif"])
def test_read_image_opens_every_named_format(tmp_path, suffix):
    path = save(Image.new("RGB", (6, 4), (200, 200, 200)), tmp_path / f"image.{suffix}")
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (6, 4)
    assert np.abs(np.asarray(image).astype(int) - 200).max() <= 2


def test_read_image_turns_a_rotated_photograph_upright(tmp_path):
    stored = Image.new("RGB", (40, 20), "black")
    stored.paste("white", (0, 0, 20, 20))  # left half white; turned a quarter clockwise it is on top
    exif = Image.Exif()
    exif[0x0112] = 6
    image = np.asarray(read_image(save(stored, tmp_path / "turned.jpg", exif=exif)))
    assert image.shape == (40, 20, 3)
    assert image[:15].min() > 240 and image[-15:].max() < 15


def test_read_image_scales_16_bit_grey(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    path = save(Image.fromarray(values), tmp_path / "deep.png")
    assert np.asarray(read_image(path))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 51.0, 200.0], [0, 51, 200]), ([0.0, 51.0 * 257, 65535.0], [0, 51, 255])],
)
def test_read_image_scales_float_grey(tmp_path, values, expected):
    path = save(Image.fromarray(np.array([values], dtype=np.float32)), tmp_path / "float.tiff")
    assert np.asarray(read_image(path, channels=1))[0].tolist() == expected


def test_read_image_lays_transparent_pixels_on_white(tmp_path):
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    path = save(rgba, tmp_path / "clear.png")
    assert np.asarray(read_image(path))[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert np.asarray(read_image(path, channels=4))[0, 1].tolist() == [0, 0, 0, 0]
    palette = save(rgba.convert("P"), tmp_path / "palette.png", transparency=rgba.convert("P").getpixel((1, 0)))
    assert np.asarray(read_image(palette))[0, 1].tolist() == [255, 255, 255]


def test_read_image_shows_cmyk_in_its_colours(tmp_path):
    path = save(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), tmp_path / "cyan.jpg")
    red, green, blue = np.asarray(read_image(path))[4, 4]
    assert red < 60 and green > 120 and blue > 120


def test_read_image_gives_the_asked_number_of_channels(tmp_path):
    path = save(Image.new("RGB", (5, 5), "red"), tmp_path / "red.png")
    assert [np.asarray(read_image(path, channels=c)).shape for c in (1, 3, 4)] == [(5, 5), (5, 5, 3), (5, 5, 4)]


def test_read_image_refuses_decompression_bombs_before_decoding(tmp_path, monkeypatch):
    path = save(Image.new("L", (100, 100)), tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)  # Pillow alone only warns up to twice its limit
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(Image.DecompressionBombError, match="100 x 100"):
        read_image(path)


def test_read_image_finds_the_range_of_32_bit_integers(tmp_path):
    for top, factor in ((200, 1), (200 * 257, 257)):
        path = save(Image.fromarray(np.array([[0, top]], dtype=np.int32)), tmp_path / f"{top}.tiff")
        assert np.asarray(read_image(path, channels=1))[0].tolist() == [0, top // factor]


def test_read_image_refuses_formats_that_are_not_pictures_of_ours(tmp_path):
    path = tmp_path / "program.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(DECODE_ERRORS):
        read_image(path)


def read_manifest(photographs):
    with (photographs / "bad_images" / "MANIFEST.tsv").open() as file:
        return {row["file"]: row for row in csv.DictReader(file, delimiter="\t")}


def test_every_awkward_file_decodes_or_is_refused_as_its_manifest_says(photographs):
    manifest = read_manifest(photographs)
    assert len(manifest) >= 40
    wrong = []
    for name, row in manifest.items():
        try:
            image = read_image(photographs / "bad_images" / name)
        except DECODE_ERRORS:
            decoded = "no"
        else:
            decoded = "yes"
            width, height = (int(side) for side in row["size"].split("x"))
            turned = row["exif_orientation"] in {"5", "6", "7", "8"}
            assert image.size == ((height, width) if turned else (width, height)), name
        if decoded != row["decodable"]:
            wrong.append(name)
    assert not wrong


# -------------------------------------------------------------------------------- one result from three decoders


@pytest.fixture(params=["nvimgcodec", "torchcodec", "Pillow"])
def decoder(request, monkeypatch):
    """What decodes training crops, where it is installed."""
    if request.param == "nvimgcodec" and decoding.load_nvimgcodec() is None:
        pytest.skip("nvimgcodec is not installed")
    if request.param == "torchcodec" and decoding.decode_jpeg is None:
        pytest.skip("torchcodec is not installed")
    if request.param != "nvimgcodec":
        monkeypatch.setattr(dataset, "load_nvimgcodec", lambda: None)
    if request.param == "Pillow":
        monkeypatch.setattr(dataset, "decode_jpeg", None)
    return request.param


def encode(image: Image.Image, image_format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def draw_picture(mode: str = "RGB", size: tuple[int, int] = (90, 70)) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def pixels_of(picture, area) -> np.ndarray:
    pixels = picture.cut(area).permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


AREAS = [Area(0, 0, 70, 90), Area(0, 0, 1, 1), Area(13, 21, 40, 33), Area(69, 0, 1, 90), Area(31, 47, 39, 43)]
PLAIN_JPEGS = {
    "4:2:0": dict(subsampling="4:2:0"),
    "4:2:2": dict(subsampling="4:2:2"),
    "4:4:4": dict(subsampling="4:4:4", quality=30),
    "progressive": dict(progressive=True),
    "restarts": dict(restart_marker_blocks=3),
    "RGB": dict(keep_rgb=True),
}


@pytest.mark.parametrize("name", PLAIN_JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_decoder_gives_pillows_pixels_bit_for_bit(decoder, name, mode, channels):
    options = {key: value for key, value in PLAIN_JPEGS[name].items() if mode == "RGB" or key != "keep_rgb"}
    data = encode(draw_picture(mode), **options)
    whole = np.asarray(read_image(io.BytesIO(data), channels))
    for area in AREAS:
        encoded = open_picture(NamedBytes(data, "x"), channels)
        for picture in (encoded, encoded.decoded()):
            expected = whole[area.top : area.top + area.height, area.left : area.left + area.width]
            assert np.array_equal(pixels_of(picture, area), expected), area


def test_every_decoder_takes_and_refuses_the_same_awkward_files(decoder, photographs):
    for path in sorted((photographs / "bad_images").iterdir()):
        try:
            expected = np.asarray(read_image(path))
        except DECODE_ERRORS as error:
            with pytest.raises(type(error)) as refusal:
                open_picture(NamedBytes(path.read_bytes(), str(path))).decoded()
            assert str(refusal.value) == str(error)
        else:
            picture = open_picture(NamedBytes(path.read_bytes(), str(path)))
            height, width = expected.shape[:2]
            area = Area(height // 3, width // 4, height - height // 3, width // 2 + 1)
            cut = expected[area.top :, area.left : area.left + area.width]
            assert np.array_equal(pixels_of(picture, area), cut[:, : area.width]), path.name


@pytest.mark.parametrize("name", ["rotated", "CMYK", "palette", "16-bit", "transparent", "disguised"])
def test_what_decoders_might_see_differently_is_left_to_pillow(name, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = {
        "rotated": encode(draw_picture(), exif=exif),
        "CMYK": encode(draw_picture("CMYK")),
        "palette": encode(draw_picture("P"), "PNG"),
        "16-bit": encode(Image.fromarray(np.full((70, 90), 30_000, dtype=np.uint16)), "PNG"),
        "transparent": encode(draw_picture("RGBA"), "PNG"),
        "disguised": encode(draw_picture(), "WEBP"),
    }[name]
    monkeypatch.setattr(dataset, "decode_jpeg", lambda *_, **__: pytest.fail("torchcodec was asked"))
    picture = open_picture(NamedBytes(data, "name.jpg"))
    assert np.array_equal(picture.decoded().pixels.permute(1, 2, 0), read_image(io.BytesIO(data)))


def test_orientations_that_only_torchcodec_would_read_are_left_to_pillow(decoder):
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (
        encode(draw_picture(), exif=exif).replace(b"Exif\0\0", b"Exit\0\0"),
        encode(draw_picture(), xmp=b'<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>'),
    ):
        expected = np.asarray(read_image(io.BytesIO(data)))
        assert np.array_equal(open_picture(NamedBytes(data, "x")).decoded().pixels.permute(1, 2, 0), expected)


def test_plain_jpegs_are_not_decoded_by_pillow(decoder, monkeypatch):
    if decoder == "Pillow":
        pytest.skip("it is Pillow's turn")
    data = encode(draw_picture())
    monkeypatch.setattr(dataset, "read_image", lambda *_: pytest.fail("Pillow was asked"))
    picture = open_picture(NamedBytes(data, "x"))
    assert isinstance(picture, JPEGPicture)
    if decoder == "nvimgcodec":
        monkeypatch.setattr(dataset, "decode_jpeg", lambda *_, **__: pytest.fail("torchcodec was asked"))
        picture.cut(Area(5, 5, 20, 20))
    else:
        picture.decoded()


@pytest.mark.parametrize("damage", ["cut off", "cut off and closed by an end", "a marker in between"])
def test_damage_below_the_crop_counts_as_in_pillow(decoder, damage):
    data = encode(draw_picture(size=(200, 400)), quality=95)
    place = len(data) * 3 // 4
    data = {
        "cut off": data[:place],
        "cut off and closed by an end": data[:place] + b"\xff\xd9",
        "a marker in between": data[:place] + b"\xff\xc7\x00\x04" + data[place:],
    }[damage]
    area = Area(3, 5, 60, 70)
    try:
        expected = np.asarray(read_image(io.BytesIO(data)))[3:63, 5:75]
    except DECODE_ERRORS:
        with pytest.raises(DECODE_ERRORS):
            open_picture(NamedBytes(data, "x")).cut(area)
    else:
        assert damage == "cut off and closed by an end"
        assert np.array_equal(pixels_of(open_picture(NamedBytes(data, "x")), area), expected)


def test_bombs_are_refused_before_any_decoder_sees_them(decoder, monkeypatch):
    data = encode(draw_picture())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_299)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(Image.DecompressionBombError, match="90 x 70"):
        open_picture(NamedBytes(data, "x"))


def test_errors_name_the_file_and_not_a_place_in_memory():
    with pytest.raises(OSError, match=r"^cannot identify image file 'folder/name\.jpg'$"):
        open_picture(NamedBytes(b"<html>404</html>", "folder/name.jpg"))


def test_samples_and_replacements_are_the_same_with_every_decoder(decoder, image_folder, monkeypatch):
    bad = image_folder / "train" / "cats" / "003.jpg"
    bad.write_bytes(bad.read_bytes()[:-20])  # the header is sound: the failure comes after a crop may have been drawn
    data = build_dataset(image_folder)
    samples = [data[SampleKey(epoch, index)] for epoch in range(3) for index in range(24)]
    assert sum(len(sample.bad_files) for sample in samples) >= 3
    monkeypatch.setattr(dataset, "decode_jpeg", None)
    monkeypatch.setattr(dataset, "load_nvimgcodec", lambda: None)
    for sample in samples:
        expected = data[sample.key]
        assert torch.equal(sample.image, expected.image) and sample.bad_files == expected.bad_files


def test_replacement_is_drawn_as_if_no_crop_had_been(image_folder):
    bad = image_folder / "train" / "cats" / "003.jpg"
    bad.write_bytes(bad.read_bytes()[:-20])
    data = build_dataset(image_folder)
    with seeded(5, 1, 3):
        torch.rand(16)  # the noise
        expected = data.transform(read_image(data.files.path(int(torch.randint(24, ())))))
    sample = data[SampleKey(1, 3)]
    assert "truncated" in sample.bad_files[0].reason  # so a crop was drawn before the failure
    assert torch.equal(sample.image, expected)


def test_pillow_takes_over_where_a_decoder_gives_another_size(monkeypatch):
    data = encode(draw_picture())
    monkeypatch.setattr(dataset, "decode_jpeg", lambda *_, **__: torch.zeros(3, 90, 70, dtype=torch.uint8))
    picture = open_picture(NamedBytes(data, "x")).decoded()
    assert np.array_equal(picture.pixels.permute(1, 2, 0), read_image(io.BytesIO(data)))


def test_decoder_works_in_forked_workers_after_it_was_used(decoder, image_folder):
    data, sampler = build_dataset(image_folder), StepSampler(24, 4)
    expected = [torch.stack([data[key].image for key in keys]) for keys in sampler]
    loader = build_training_loader(data, sampler, 2, pin_memory=False)
    assert all(torch.equal(batch.images, images) for batch, images in zip(loader, expected, strict=True))


def test_without_torchcodec_pillow_decodes():
    program = "import sys; sys.modules['torchcodec'] = None; import dataset; print(decoding.describe_decoder())"
    environment = {**os.environ, "PYTHONPATH": str(Path(dataset.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "Pillow (faster with: pip install torchcodec)" in done.stdout


def test_decoder_is_named_as_it_is(decoder):
    assert describe_decoder().startswith({"nvimgcodec": "nvimgcodec (only the crop), "}.get(decoder, decoder))


def test_crops_are_drawn_as_torchvision_draws_them():
    reference = v2.RandomResizedCrop((8, 8), scale=(0.2, 1.0))
    transform = build_pretraining_transform((8, 8), 0.2)
    for index, (height, width) in enumerate([(1, 1), (30, 400), (400, 30), (375, 500), (3, 2), (1, 90)] * 50):
        with seeded(0, index):
            expected, draw = reference.make_params([torch.zeros(1, height, width)]), torch.rand(1)
        with seeded(0, index, torch_only=True):
            assert transform.draw_area(height, width)._asdict() == expected and torch.rand(1) == draw


def test_crops_look_as_pillow_makes_them(image_folder):
    """What differs is the rounding between the two passes of the resize: far less than a grey value on average."""
    files = list_images(image_folder / "train")
    pillow = v2.Compose(
        [
            v2.RandomResizedCrop((48, 48), scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    transform = build_pretraining_transform((48, 48), 0.2)
    for index in range(len(files)):
        image = read_image(files.path(index))
        with seeded(1, index):
            expected = pillow(image)
        with seeded(1, index):
            found = transform(image)
        difference = (found.float() - expected.float()).abs()
        assert difference.mean() < 0.15 and difference.max() <= 2, index
        error = (difference / 255).square().mean().item()
        assert error == 0 or -10 * math.log10(error) > 50


# -------------------------------------------------------------------------------- file lists


def test_find_splits_takes_either_name_of_the_validation_folder(tmp_path):
    (tmp_path / "train").mkdir()
    assert find_splits(tmp_path) == (tmp_path / "train", None)
    (tmp_path / "validation").mkdir()
    assert find_splits(tmp_path) == (tmp_path / "train", tmp_path / "validation")
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="both val/ and validation/"):
        find_splits(tmp_path)


def test_find_splits_takes_a_tree_without_splits_as_training_images(tmp_path):
    assert find_splits(tmp_path) == (tmp_path, None)
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match=r"(?s)is not a folder; expected one of.*: here/"):
        find_splits(tmp_path / "nowhere")


def test_list_images_finds_classes_and_labels(image_folder):
    files = list_images(image_folder / "train")
    assert files.classes == ("cats", "dogs") and len(files) == 24
    assert [files.classes[files.labels[i]] in files.path(i) for i in range(24)] == [True] * 24


def test_list_images_takes_any_letter_case_depth_and_strange_names(tmp_path):
    names = ["a.JPEG", "deep/er/b.PnG", "deep/with space é.Tif", "deep/readme.txt", "deep/c.jpg.bak"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = list_images(tmp_path)
    assert [os.path.relpath(files.path(i), tmp_path) for i in range(len(files))] == sorted(names[:3])
    assert files.classes == () and set(files.labels) == {-1}


def test_list_images_shows_expected_and_found_when_there_is_nothing(tmp_path):
    (tmp_path / "archive.tar").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"(?s)no images below.*expected one of.*what is there: archive\.tar, empty/"
    ):
        list_images(tmp_path)


def test_list_images_passes_over_hidden_files_and_folders(image_folder):
    train = image_folder / "train"
    (train / "cats" / "._000.jpg").touch()
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (train / name).mkdir()
        (train / name / "copy.jpg").touch()
    files = list_images(train)
    assert len(files) == 24 and files.classes == ("cats", "dogs")


def test_scan_images_survives_a_link_back_up(image_folder):
    (image_folder / "train" / "cats" / "loop").symlink_to(image_folder / "train")
    assert len(scan_images(image_folder / "train")[0]) == 24


def test_list_images_reads_the_cached_list_while_nothing_changed(image_folder, tmp_path, monkeypatch):
    first = list_images(image_folder / "train", tmp_path / "lists")
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "scan_images", lambda root: pytest.fail("scanned although the list was cached"))
        second = list_images(image_folder / "train", tmp_path / "lists")
    assert second.classes == first.classes and second.fingerprint() == first.fingerprint()
    assert np.array_equal(second.labels, first.labels)


def test_list_images_scans_again_after_a_change_a_damage_or_when_asked(image_folder, tmp_path, monkeypatch):
    train, lists = image_folder / "train", tmp_path / "lists"
    first = list_images(train, lists)
    (train / "dogs" / "new.png").touch()
    changed = list_images(train, lists)
    assert len(changed) == 25 and changed.fingerprint() != first.fingerprint()
    (cache,) = lists.iterdir()
    for damage in (cache.read_bytes()[:200], b"", b"no list"):
        cache.write_bytes(damage)
        assert len(list_images(train, lists)) == 25
    scans = []
    monkeypatch.setattr(dataset, "scan_images", lambda root: scans.append(root) or scan_images(root))
    list_images(train, lists, rescan=True)
    assert len(scans) == 1


# -------------------------------------------------------------------------------- randomness


def draws():
    return torch.rand(2).tolist(), random.random(), np.random.rand()


def test_seeded_draws_are_a_function_of_the_key_and_leave_no_trace():
    before = draws.__name__, torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    with seeded(1, 2, 3):
        first = draws()
    assert torch.equal(torch.get_rng_state(), before[1]) and random.getstate() == before[2]
    assert np.array_equal(np.random.get_state()[1], before[3])
    with seeded(1, 2, 3):
        assert draws() == first
    for other in [(0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 23), (12, 3)]:
        with seeded(*other):
            assert draws() != first


def build_dataset(root, **options):
    return ImageDataset(
        list_images(root / "train"), build_pretraining_transform((16, 16), 0.2), seed=5, noise_size=16, **options
    )


def test_sample_is_a_function_of_seed_epoch_and_index(image_folder):
    data = build_dataset(image_folder)
    first = data[SampleKey(3, 7)]
    data[SampleKey(3, 8)]
    torch.manual_seed(99)
    again = data[SampleKey(3, 7)]
    assert torch.equal(first.image, again.image) and torch.equal(first.noise, again.noise)
    assert first.image.dtype == torch.uint8 and first.image.shape == (3, 16, 16)
    other_epoch = data[SampleKey(4, 7)]
    assert not torch.equal(first.image, other_epoch.image) and not torch.equal(first.noise, other_epoch.noise)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_the_samples_of_its_sampler_with_any_number_of_workers(image_folder, num_workers):
    data, sampler = build_dataset(image_folder), StepSampler(24, 4, accumulation_steps=2, seed=1)
    loader = build_training_loader(data, sampler, num_workers, pin_memory=False)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        for keys, batch in zip(list(sampler), loader, strict=True):
            expected = torch.stack([data[key].image for key in keys])
            assert torch.equal(batch.images, expected) and {key.epoch for key in keys} == {epoch}


def test_loader_does_not_touch_the_global_generator(image_folder):
    loader = build_training_loader(build_dataset(image_folder), StepSampler(24, 4), 0, pin_memory=False)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_dataset_refuses_channel_counts_that_files_cannot_give(image_folder):
    with pytest.raises(ValueError, match="--input_channels 6"):
        build_dataset(image_folder, channels=6)


# -------------------------------------------------------------------------------- bad files


def test_bad_file_is_replaced_by_the_same_sample_each_time_and_reported(image_folder):
    bad = image_folder / "train" / "cats" / "003.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    data = build_dataset(image_folder)
    index = [data.files.path(i) for i in range(24)].index(str(bad))
    sample, again = data[SampleKey(0, index)], data[SampleKey(0, index)]
    assert [entry.path for entry in sample.bad_files] == [str(bad)]
    assert torch.equal(sample.image, again.image) and sample.image.float().std() > 0
    assert data[SampleKey(0, (index + 1) % 24)].bad_files == []


def test_nothing_but_bad_files_is_an_error_that_names_one(image_folder):
    for path in (image_folder / "train").rglob("*.jpg"):
        path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"100 files in a row cannot be decoded; the last is .*jpg: Unidentified"):
        build_dataset(image_folder)[SampleKey(0, 0)]


def test_awkward_files_train_or_are_skipped_and_no_worker_dies(photographs):
    files = list_images(photographs / "bad_images")
    transform = build_pretraining_transform((16, 16), 0.2)
    data = ImageDataset(files, transform, seed=0, noise_size=16)
    sampler = StepSampler(len(files), 4)
    loader = build_training_loader(data, sampler, 2, pin_memory=False)
    found, images = set(), 0
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in loader:
            images += len(batch.images)
            found |= {os.path.basename(bad.path) for bad in batch.bad_files}
    assert images == 2 * (len(files) // 4) * 4
    assert found == {name for name, row in read_manifest(photographs).items() if row["decodable"] == "no"}


# -------------------------------------------------------------------------------- samplers


def global_steps(num_images, per_process, accumulation_steps, world_size, epoch=2, crops_per_image=1):
    """Give the set of indices of every optimizer step, put together from all processes."""
    steps = []
    for rank in range(world_size):
        sampler = StepSampler(
            num_images, per_process // accumulation_steps, accumulation_steps=accumulation_steps, rank=rank,
            world_size=world_size, seed=3, crops_per_image=crops_per_image,
        )  # fmt: skip
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        for step in range(sampler.steps_per_epoch):
            if rank == 0:
                steps.append([])
            for batch in batches[step * accumulation_steps : (step + 1) * accumulation_steps]:
                steps[step] += [key.index for key in batch]
    return [sorted(step) for step in steps]


def test_step_sampler_gives_the_same_steps_to_any_number_of_processes():
    serial = global_steps(50, 12, 1, 1)
    assert len(serial) == 4 and all(len(step) == 12 for step in serial)
    assert len({index for step in serial for index in step}) == 48  # disjoint
    assert serial == global_steps(50, 12, 3, 1) == global_steps(50, 6, 1, 2) == global_steps(50, 4, 2, 3)


def test_step_sampler_leaves_out_another_remainder_each_epoch():
    left_out = [
        set(range(50)) - {index for step in global_steps(50, 12, 1, 1, epoch) for index in step} for epoch in range(20)
    ]
    assert all(len(indices) == 2 for indices in left_out) and len(set().union(*left_out)) > 20


def test_step_sampler_fills_one_step_from_a_small_data_set():
    (step,) = global_steps(10, 24, 2, 1)
    counts = np.bincount(np.array(step) % 10, minlength=10)
    assert len(set(step)) == 24 and counts.min() >= 2 and counts.max() <= 3


def test_eval_loaders_of_all_processes_give_every_image_once(image_folder):
    files = list_images(image_folder / "val")
    data = ImageDataset(files, ResizeCenterCrop((16, 16)), seed=0, noise_size=16)
    expected = torch.stack([data[SampleKey(EVAL_EPOCH, index)].noise for index in range(8)])
    for world_size in (1, 3):
        loaders = [build_eval_loader(data, 2, 0, rank, world_size) for rank in range(world_size)]
        noise = torch.cat([batch.noise for loader in loaders for batch in loader])
        assert torch.equal(noise.sort(dim=0).values, expected.sort(dim=0).values)


# -------------------------------------------------------------------------------- transforms


def test_resize_center_crop_equals_resize_256_and_crop_224():
    generator = np.random.default_rng(0)
    reference = v2.Compose(
        [v2.Resize(256, interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()]
    )
    for width, height in [(300, 400), (500, 333), (224, 224), (100, 90), (750, 375), (333, 999)]:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert torch.equal(ResizeCenterCrop((224, 224), 224 / 256)(image), reference(image))


def test_resize_center_crop_covers_rectangles_without_padding():
    image = Image.new("RGB", (30, 100), "white")
    for size in [(16, 48), (48, 16), (7, 7)]:
        cropped = ResizeCenterCrop(size)(image)
        assert cropped.shape == (3, *size) and cropped.min() == 255


def test_normalize_and_denormalize():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    normalized = normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    reference = v2.functional.normalize(images / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(normalized, reference)
    torch.testing.assert_close(denormalize(normalized, IMAGENET_MEAN, IMAGENET_STD), images / 255)


def test_normalizing_puts_its_constants_on_the_device_once(monkeypatch):
    """Each time would make the host wait for the GPU, at every step."""
    images, mean, std = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), [0.11, 0.12, 0.13], [0.21, 0.22, 0.23]
    first = normalize(images, mean, std)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a tensor was made of the host's values"))
    assert torch.equal(normalize(images, tuple(mean), tuple(std)), first)


def test_eval_crop_ratio_is_the_original_rule():
    assert eval_crop_ratio((224, 224)) == eval_crop_ratio((64, 64)) == 0.875 and eval_crop_ratio((448, 448)) == 1.0


def test_finetuning_transform_is_normalised_and_follows_its_key_alone():
    image, _ = draw_demo_scene(0, 3)
    transform = build_finetuning_transform((32, 48), 9, 0.5, IMAGENET_MEAN, IMAGENET_STD)

    def draw(key):
        with seeded(0, *key):
            return transform(image)

    draws = [draw((0, index)) for index in range(20)]
    assert all(d.shape == (3, 32, 48) and d.dtype == torch.float32 for d in draws)
    assert len({d.sum().item() for d in draws}) == 20
    torch.rand(1), np.random.rand(), random.random()
    assert all(torch.equal(draw((0, index)), draws[index]) for index in range(20))


def test_finetuning_transform_has_the_settings_of_the_original_release():
    steps = build_finetuning_transform((32, 32), 9, 0.25, IMAGENET_MEAN, IMAGENET_STD).transforms
    names = [type(step).__name__ for step in steps]
    assert names[:3] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment"]
    assert names[-2:] == ["Normalize", "RandomErasing"]
    assert steps[0].interpolation == InterpolationMode.BICUBIC and tuple(steps[0].scale) == (0.08, 1.0)
    assert steps[2].num_layers == 2
    assert {op.magnitude for op in steps[2].ops} == {9} and {op.magnitude_std for op in steps[2].ops} == {0.5}
    assert {"PosterizeIncreasing", "ColorIncreasing", "SolarizeIncreasing"} <= {op.name for op in steps[2].ops}
    erasing = steps[-1]
    assert (erasing.probability, erasing.rand_color, erasing.per_pixel, erasing.max_count) == (0.25, False, True, 1)


def test_random_augmentation_and_erasing_can_be_turned_off():
    white = Image.new("RGB", (40, 40), "white")
    value = torch.tensor([(1 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])
    plain = build_finetuning_transform((32, 32), 0, 0.0, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(plain(white), value[:, None, None].expand(3, 32, 32))
    erasing = build_finetuning_transform((32, 32), 0, 1.0, IMAGENET_MEAN, IMAGENET_STD)(white)
    erased = (erasing - value[:, None, None]).abs().amax(dim=0) > 1e-3
    assert 0.01 < erased.float().mean() < 0.5 and erasing[:, erased].std() == pytest.approx(1, abs=0.3)


def test_single_try_crop_draws_once_and_is_cut_to_the_image():
    tall = torch.zeros(3, 400, 20)
    crop = SingleTryResizedCrop((16, 16), scale=(0.5, 1.0))
    for seed in range(50):
        torch.manual_seed(seed)
        params = crop.make_params([tall])
        torch.manual_seed(seed)
        area = 8000 * torch.empty(1).uniform_(0.5, 1.0).item()
        ratio = torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).exp().item()
        assert params["width"] == 20  # the drawn width, at least 54, is more than there is
        assert params["height"] == min(400, round((area / ratio) ** 0.5))
        assert 0 <= params["top"] <= 400 - params["height"] and params["left"] == 0
    probing = build_probing_transform((16, 24), IMAGENET_MEAN, IMAGENET_STD)(Image.new("RGB", (50, 40), "white"))
    value = torch.tensor([(1 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])
    torch.testing.assert_close(probing, value[:, None, None].expand(3, 16, 24))


# -------------------------------------------------------------------------------- mixing


def constant_samples(values: list[float], labels: list[int]) -> list[Sample]:
    pairs = enumerate(zip(values, labels, strict=True))
    return [
        Sample(SampleKey(0, i), torch.full((3, 8, 8), value), label, torch.zeros(0), []) for i, (value, label) in pairs
    ]


def test_pair_mixing_mixes_images_as_it_mixes_targets():
    """Neighbours are 0 and 1 everywhere, so that an image's mean is the share of the second label in it."""
    shares = []
    for alphas in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mixing = PairMixing(4, *alphas, 0.0, seed=0)
        batch = mixing(constant_samples([0.0, 1.0] * 50, [0, 3] * 50))
        mean = batch.images.mean(dim=(1, 2, 3))
        torch.testing.assert_close(batch.labels[:, 3], mean)
        torch.testing.assert_close(batch.labels[:, 0], 1 - mean)
        torch.testing.assert_close(mean[::2] + mean[1::2], torch.ones(50))
        assert len(set(mean[::2].tolist())) > 10  # a lambda for each pair
        whole = ((batch.images == 0) | (batch.images == 1)).flatten(1).all(dim=1)
        shares.append(whole.float().mean().item())
    assert shares[0] < 0.2 and shares[1] == 1.0 and 0.3 < shares[2] < 0.8  # mixup, CutMix, one or the other


def test_pair_mixing_does_not_depend_on_how_a_step_is_cut():
    mixing = PairMixing(4, 0.2, 1.0, 0.1, seed=0)
    samples = constant_samples([float(value) for value in range(8)], [0, 1, 2, 3] * 2)
    whole, parts = mixing(samples), [mixing(samples[i : i + 2]) for i in range(0, 8, 2)]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
    again = PairMixing(4, 0.2, 1.0, 0.1, seed=1)(samples)
    assert not torch.equal(again.images, whole.images)


def test_smoothing_is_applied_once_and_odd_batches_keep_their_last_image():
    samples = constant_samples([1.0, 2.0, 3.0], [0, 1, 2])
    for alphas in ((0.0, 0.0), (0.2, 1.0)):
        batch = PairMixing(4, *alphas, 0.1, seed=0)(samples)
        torch.testing.assert_close(batch.labels.sum(dim=1), torch.ones(3))
        torch.testing.assert_close(batch.labels[2], torch.tensor([0.025, 0.025, 0.925, 0.025]))
        assert torch.equal(batch.images[2], samples[2].image)
        torch.testing.assert_close(batch.labels.min(), torch.tensor(0.025))


# -------------------------------------------------------------------------------- classes


def test_classes_that_differ_are_refused_with_the_difference(tmp_path):
    check_same_classes(("a", "b"), ("a", "b"), tmp_path, "training")
    with pytest.raises(ValueError, match=r"1 classes in .* are not the 2 of training: it lacks b\. Every class"):
        check_same_classes(("a",), ("a", "b"), tmp_path, "training")
    with pytest.raises(ValueError, match=r"it lacks b, c, d, e, f and 2 more; it adds x"):
        check_same_classes(("a", "x"), tuple("abcdefgh"), tmp_path, "training")
    with pytest.raises(ValueError, match="images outside class folders"):
        check_same_classes((), ("a",), tmp_path, "training")


def test_thinned_list_keeps_every_class(image_folder):
    files = list_images(image_folder / "train")
    few = files.subsample(6)
    assert len(few) == 6 and np.bincount(few.labels).tolist() == [3, 3] and files.subsample(100) is files
    assert {few.path(i) for i in range(6)} <= {files.path(i) for i in range(24)}


def test_undecodable_file_stops_an_evaluation_with_its_name(image_folder):
    (image_folder / "val" / "cats" / "broken.jpg").write_text("no picture")
    files = list_images(image_folder / "val")
    data = ImageDataset(files, ResizeCenterCrop((16, 16)), replace_bad_files=False)
    with pytest.raises(ValueError, match=r"cannot decode .*broken\.jpg"):
        list(build_eval_loader(data, 4, 0))


# -------------------------------------------------------------------------------- label maps


def test_label_rule_on_every_value():
    ade = label_table(ADE20K_NUM_CLASSES, True)
    assert ade[0] == IGNORE_INDEX and ade[255] == IGNORE_INDEX
    assert [ade[raw] for raw in range(1, 151)] == list(range(150)) and set(ade[151:255]) == {-1}
    plain = label_table(19, False)
    assert [plain[raw] for raw in range(19)] == list(range(19)) and plain[255] == IGNORE_INDEX and plain[19] == -1
    assert label_table(1, False)[0] == 0 and label_table(254, True)[254] == 253
    for num_classes, ignore_zero in ((0, True), (255, True), (256, False)):
        with pytest.raises(ValueError, match="num_classes must lie between 1 and"):
            label_table(num_classes, ignore_zero)


def test_class_names_and_colours_are_ade20ks(photographs):
    with (photographs / "meta" / "ade20k_objectInfo150.txt").open() as file:
        names = [line.rstrip("\n").split("\t")[-1].split(",")[0].strip() for line in list(file)[1:]]
    with (photographs / "meta" / "ade20k_palette150.csv").open() as file:
        colours = [[int(row[channel]) for channel in "rgb"] for row in csv.DictReader(file)]
    assert list(ADE20K_CLASS_NAMES) == names and ADE20K_PALETTE.tolist() == colours
    assert (ADE20K_CLASS_NAMES[0], ADE20K_CLASS_NAMES[149], len(names)) == ("wall", "flag", ADE20K_NUM_CLASSES)


def write_pair(root: Path, split: str, stem: str, labels: np.ndarray, size: tuple[int, int] | None = None) -> None:
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size or labels.shape[::-1]).save(root / "images" / split / f"{stem}.jpg")
    Image.fromarray(labels).save(root / "annotations" / split / f"{stem}.png")


@pytest.fixture
def pairs_root(tmp_path) -> Path:
    root = tmp_path / "ADEChallengeData2016"
    for index in range(3):
        write_pair(root, "training", f"scene_{index}", np.full((6, 8), index, dtype=np.uint8))
    return root


def test_pairs_are_found_by_name_also_from_the_folder_above(pairs_root):
    for root in (pairs_root, pairs_root.parent):
        pairs = list_pairs(root, "training")
        assert [os.path.basename(pairs.path(i)) for i in range(3)] == [f"scene_{i}.jpg" for i in range(3)]
        assert [os.path.basename(pairs.label_path(i)) for i in range(3)] == [f"scene_{i}.png" for i in range(3)]
    check_pairs(pairs, label_table(150, True), 2)
    with pytest.raises(FileNotFoundError, match=r"images/validation is not there; expected"):
        list_pairs(pairs_root, "validation")


@pytest.mark.parametrize(
    ("kind", "what"), [("images", "no image for scene_1.png"), ("annotations", "no label map for")]
)
def test_files_without_a_partner_are_named(pairs_root, kind, what):
    next((pairs_root / kind / "training").glob("scene_1.*")).unlink()
    with pytest.raises(FileNotFoundError, match=rf"training: {what}.*expected"):
        list_pairs(pairs_root, "training")


def test_label_maps_that_cannot_be_used_are_all_named(pairs_root):
    table, folder = label_table(150, True), pairs_root / "annotations" / "training"
    write_pair(pairs_root, "training", "wrong_size", np.ones((6, 8), dtype=np.uint8), size=(9, 6))
    write_pair(pairs_root, "training", "wrong_value", np.full((6, 8), 151, dtype=np.uint8))
    write_pair(pairs_root, "training", "colour", np.ones((6, 8), dtype=np.uint8))
    Image.new("RGB", (8, 6)).save(folder / "colour.png")
    write_pair(pairs_root, "training", "lossy", np.ones((6, 8), dtype=np.uint8))
    Image.new("L", (8, 6)).save(folder / "lossy.png", format="JPEG")
    with pytest.raises(ValueError, match="label maps or images that cannot be used") as error:
        check_pairs(list_pairs(pairs_root, "training"), table, 2)
    lines = sorted(str(error.value).splitlines()[1:])
    assert len(lines) == 4
    for line, words in zip(
        lines,
        ("colour.png is of mode RGB", "lossy.png: cannot identify", "wrong_size.png: 8 x 6 pixels", "values 151"),
        strict=True,
    ):
        assert words in line


def test_checked_pairs_are_remembered_until_a_file_changes(pairs_root, tmp_path, monkeypatch):
    pairs, table = list_pairs(pairs_root, "training"), label_table(150, True)
    check_pairs(pairs, table, 1, tmp_path / "cache")
    calls = []
    monkeypatch.setattr(dataset, "check_pair", lambda *args: calls.append(args) or pairs.PairCheck(None, True))
    check_pairs(pairs, table, 1, tmp_path / "cache")
    assert calls == []
    check_pairs(pairs, label_table(2, True), 1, tmp_path / "cache")  # other classes: not the same question
    assert len(calls) == 3
    os.utime(pairs.label_path(0), ns=(1, 1))
    check_pairs(pairs, table, 1, tmp_path / "cache")
    assert len(calls) == 6
    check_pairs(pairs, table, 1, tmp_path / "cache", rescan=True)
    assert len(calls) == 9


def test_transposed_label_map_is_refused(pairs_root):
    write_pair(pairs_root, "training", "turned", np.ones((6, 8), dtype=np.uint8), size=(6, 8))
    with pytest.raises(ValueError, match=r"turned\.png: 8 x 6 pixels, but its image has 6 x 8"):
        check_pairs(list_pairs(pairs_root, "training"), label_table(150, True), 1)


def test_image_that_cannot_be_decoded_is_named_where_it_cannot_be_replaced(pairs_root):
    write_pair(pairs_root, "training", "broken", np.ones((6, 8), dtype=np.uint8))
    (pairs_root / "images" / "training" / "broken.jpg").write_text("<html>404</html>")
    pairs, table = list_pairs(pairs_root, "training"), label_table(150, True)
    check_pairs(pairs, table, 1)
    with pytest.raises(ValueError, match=r"broken\.jpg: UnidentifiedImageError"):
        check_pairs(pairs, table, 1, decode=True)


def test_data_without_a_labelled_pixel_is_refused(tmp_path):
    write_pair(tmp_path, "validation", "one", np.zeros((6, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match="not one pixel has a label"):
        check_pairs(list_pairs(tmp_path, "validation"), label_table(150, True), 1)


def test_palette_label_maps_are_read_as_numbers_not_as_colours(tmp_path):
    labels = np.array([[0, 1], [150, 255]], dtype=np.uint8)
    image = Image.fromarray(labels, "P")
    image.putpalette([value for index in range(256) for value in (255 - index, 0, index)])
    image.save(tmp_path / "palette.png")
    assert read_label_map(tmp_path / "palette.png", label_table(150, True)).tolist() == [[255, 0], [149, 255]]


def test_label_map_of_a_rotated_photograph_may_lie_either_way(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    pixels = np.zeros((6, 8, 3), dtype=np.uint8)
    pixels[:3] = 255
    for name, shape in (("stored", (6, 8)), ("upright", (8, 6))):
        write_pair(tmp_path, "training", name, np.ones(shape, dtype=np.uint8))
        Image.fromarray(pixels).save(tmp_path / "images" / "training" / f"{name}.jpg", exif=exif)
    pairs, table = list_pairs(tmp_path, "training"), label_table(150, True)
    check_pairs(pairs, table, 1)
    data = ADE20KDataset(pairs, keep_size, table)
    for index in range(2):
        sample = data[SampleKey(EVAL_EPOCH, index)]
        assert sample.image.shape[1:] == sample.label.shape


@pytest.mark.parametrize(
    ("size", "expected"), [((300, 400), (512, 683)), ((200, 1000), (410, 2048)), ((512, 512), (512, 512))]
)
def test_fit_within_keeps_the_ratio_under_both_bounds(size, expected):
    assert fit_within(*size, 2048, 512) == expected


def blocks_of_classes() -> tuple[Image.Image, np.ndarray]:
    """A picture whose grey value is ten times its class, in blocks of 16 pixels."""
    classes = np.random.default_rng(0).integers(0, 20, (5, 7)).astype(np.uint8)
    labels = classes.repeat(16, axis=0).repeat(16, axis=1)
    return Image.fromarray(np.repeat(labels[..., None] * 10, 3, axis=2)), labels


def test_image_and_label_map_move_together_through_every_random_transform():
    image, labels = blocks_of_classes()
    transform = SegmentationTransform((48, 64), (0, 0, 0), (1, 1, 1), 4 * 64, 64, distort=False)
    padded = 0
    for index in range(40):
        with seeded(0, 0, index):
            moved, classes = transform(image, labels)
        assert moved.shape == (3, 48, 64) and classes.shape == (48, 64)
        outside = classes == IGNORE_INDEX
        padded += bool(outside.any())
        assert not moved[:, outside].any()  # black was subtracted as the mean, so the padding is the mean
        windows = torch.nn.functional.pad(classes.float()[None, None], (3, 3, 3, 3), value=-1)
        windows = windows.unfold(2, 7, 1).unfold(3, 7, 1)[0, 0].flatten(2)
        inner = (windows.amin(dim=2) == windows.amax(dim=2)) & ~outside  # away from edges, which are blended
        assert inner.sum() >= 20
        torch.testing.assert_close(moved[0][inner] * 255, classes[inner].float() * 10, rtol=0, atol=1.01)
    assert 0 < padded < 40


@pytest.mark.parametrize("magnitude", range(11))
def test_every_operation_of_randaugment_works_at_every_magnitude(magnitude):
    """9 with a deviation of 0.5 is 10 in one draw of forty, where timm and Pillow 13 disagree about posterizing."""
    transform = build_finetuning_transform((16, 16), 9, 0.0, IMAGENET_MEAN, IMAGENET_STD)
    (augment,) = (step for step in transform.transforms if isinstance(step, RandAugment))
    pixels = np.random.default_rng(0).integers(1, 256, (16, 16, 3), dtype=np.uint8)
    assert len(augment.ops) > 10
    for operation in augment.ops:
        operation.prob, operation.magnitude, operation.magnitude_std = 1, magnitude, 0
        result = operation(Image.fromarray(pixels))
        assert result.size == (16, 16) and result.mode == "RGB"
        if operation.name == "PosterizeIncreasing":
            kept = 4 - int(magnitude / 10 * 4)
            assert np.array_equal(np.asarray(result), pixels & (0xFF00 >> kept & 0xFF))


def test_crop_avoids_what_is_nearly_all_one_class():
    labels = np.zeros((64, 200), dtype=np.uint8)
    labels[:, 100:110] = 1
    transform = SegmentationTransform((64, 24), (0, 0, 0), (1, 1, 1), 200, 64, factors=(1.0, 1.0), distort=False)
    shares = []
    for index in range(60):
        with seeded(0, 0, index):
            _, classes = transform(Image.new("RGB", (200, 64)), labels)
        shares.append((classes == 1).float().mean().item())
    assert sum(share > 0.25 for share in shares) > 30
    plain = dataclasses.replace(transform, crop_tries=0)
    found = 0
    for index in range(60):
        with seeded(0, 0, index):
            found += (plain(Image.new("RGB", (200, 64)), labels)[1] == 1).float().mean().item() > 0.25
    assert found < 20  # a share of 0.25 covers 22 of 177 places


def test_colour_distortion_is_bounded_and_leaves_a_grey_picture_grey():
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    values = []
    for index in range(200):
        with seeded(0, 0, index):
            out = distort_colours(grey)
        assert out.dtype == torch.uint8 and (out[0] == out[1]).all() and (out[1] == out[2]).all()
        values.append(int(out[0, 0, 0]))
    assert min(values) < 55 and max(values) > 165 and sum(value == 100 for value in values) > 20
    assert min(values) >= (100 - 32) // 2 and max(values) <= (100 + 32) * 1.5
    red = torch.tensor([200, 40, 40], dtype=torch.uint8)[:, None, None].expand(3, 4, 4).contiguous()
    hues = set()
    for index in range(60):
        with seeded(1, 0, index):
            pixel = distort_colours(red)[:, 0, 0].tolist()
        hues.add((pixel[1] > pixel[2]) - (pixel[1] < pixel[2]))
        assert pixel[0] >= max(pixel[1:])  # a tenth of the circle leaves red the strongest
    assert hues == {-1, 0, 1}


def test_pairs_of_the_dataset_follow_their_key_alone(photographs):
    pairs, table = list_pairs(photographs / "ade20k", "training"), label_table(150, True)
    check_pairs(pairs, table, 2)
    assert (len(pairs), len(list_pairs(photographs / "ade20k", "validation"))) == (54, 18)
    transform = SegmentationTransform((64, 64), IMAGENET_MEAN, IMAGENET_STD, 256, 64)
    data = ADE20KDataset(pairs, transform, table, seed=3, noise_size=4)
    first = data[SampleKey(1, 5)]
    random.random(), torch.rand(1)
    again = data[SampleKey(1, 5)]
    assert torch.equal(first.image, again.image) and torch.equal(first.label, again.label)
    assert first.image.dtype == torch.float32 and first.label.dtype == torch.uint8
    assert not torch.equal(first.image, data[SampleKey(2, 5)].image)
    classes = set(first.label.unique().tolist())
    assert classes <= {*range(150), IGNORE_INDEX} and len(classes) > 1


# -------------------------------------------------------------------------------- several crops of an image


@pytest.mark.parametrize(("per_process", "accumulation_steps", "world_size"), [(24, 1, 1), (12, 1, 2), (24, 3, 1)])
def test_repeated_sampling_fills_the_same_steps_on_any_number_of_processes(per_process, accumulation_steps, world_size):
    def steps(epoch, *shape):
        return global_steps(50, *shape, epoch=epoch, crops_per_image=4)

    for epoch in range(5):
        assert steps(epoch, per_process, accumulation_steps, world_size) == steps(epoch, 8, 1, 3)


def test_repeated_sampling_visits_all_images_in_as_many_epochs():
    plain, repeated = StepSampler(50, 8, seed=3), StepSampler(50, 8, seed=3, crops_per_image=4)
    assert len(plain) == len(repeated) == 6
    keys = []
    for epoch in range(4):
        repeated.set_epoch(epoch)
        batches = list(repeated)
        for batch in batches:
            images = [key.index % 50 for key in batch]
            assert len(set(images)) == 2 and images == sorted(images, key=images.index)  # four in a row
        keys += [key for batch in batches for key in batch]
    assert len(set(keys)) == len(keys) == 4 * 48  # as many samples as without, no random draw twice
    assert sorted(np.bincount([key.index % 50 for key in keys], minlength=50).tolist()) == [0, 0, *[4] * 48]
    repeated.set_epoch(4)
    again = [key.index % 50 for batch in repeated for key in batch]
    assert again[::4] != [key.index % 50 for key in keys[:48]][::4]  # the next round has another order


def test_one_crop_of_each_image_is_the_order_of_before():
    sampler = StepSampler(10, 4, seed=3)
    sampler.set_epoch(2)
    generator = torch.Generator().manual_seed(files.random_key(3, 2, "order"))
    assert sampler.order() == torch.randperm(10, generator=generator)[:8].tolist()


def test_crops_of_a_set_smaller_than_a_step_all_differ():
    sampler = StepSampler(3, 16, crops_per_image=2)
    (batch,) = sampler
    assert len(set(batch)) == 16 and {key.index % 3 for key in batch} == {0, 1, 2}


def test_repeated_sampling_refuses_batches_that_groups_cannot_fill():
    with pytest.raises(ValueError, match="--repeated_sampling 4 does not divide the 6 images"):
        StepSampler(24, 6, crops_per_image=4)


def test_crops_of_one_decoded_image_are_those_of_each_key_alone(decoder, image_folder, monkeypatch):
    sampler = StepSampler(24, 8, crops_per_image=4)
    data, alone = build_dataset(image_folder, keep_decoded=True), build_dataset(image_folder)
    opened = []
    monkeypatch.setattr(dataset, "open_picture", lambda *args: opened.append(args) or open_picture(*args))
    samples = [data[key] for keys in sampler for key in keys]
    assert len(opened) == len(samples) // 4
    assert all(torch.equal(sample.image, alone[sample.key].image) for sample in samples)
    assert len({sample.image.numpy().tobytes() for sample in samples}) == len(samples)


# -------------------------------------------------------------------------------- demo data


def test_demo_scene_is_a_function_of_seed_and_kind():
    image, labels = draw_demo_scene(7, 4)
    again, again_labels = draw_demo_scene(7, 4)
    assert image.tobytes() == again.tobytes() and labels.tobytes() == again_labels.tobytes()
    assert draw_demo_scene(8, 4)[0].tobytes() != image.tobytes()
    assert (image.mode, labels.mode) == ("RGB", "L") and image.size == labels.size


@pytest.mark.parametrize("kind", range(10))
def test_demo_labels_mark_the_object_on_its_background(kind):
    image, labels = (np.asarray(picture) for picture in draw_demo_scene(3, kind))
    assert set(np.unique(labels)) <= {0, 1, 2 + kind, 12}
    inside, outside = labels == 2 + kind, labels == 1
    assert 0.05 < inside.mean() < 0.6 and outside.mean() > 0.3
    assert np.abs(image[inside].mean(axis=0) - image[outside].mean(axis=0)).max() > 20  # it can be seen


def test_demo_data_has_both_layouts_and_is_written_once(tmp_path):
    write_demo_data(tmp_path / "demo", num_train=20, num_val=10)
    (train, val) = find_splits(tmp_path / "demo" / "imagefolder")
    files = list_images(train)
    assert files.classes == tuple(sorted(DEMO_KINDS)) and np.bincount(files.labels).tolist() == [2] * 10
    assert len(list_images(val)) == 10
    ade = tmp_path / "demo" / "ADEChallengeData2016"
    for split, count in (("training", 20), ("validation", 10)):
        stems = [sorted(p.stem for p in (ade / part / split).iterdir()) for part in ("images", "annotations")]
        assert stems[0] == stems[1] and len(stems[0]) == count
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")}
    write_demo_data(tmp_path / "demo", num_train=20, num_val=10)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")} == before
    with pytest.raises(FileExistsError, match="is not the demo data"):
        write_demo_data(tmp_path / "demo", num_train=30, num_val=10)


def test_demo_data_of_two_runs_at_once_is_written_by_one(tmp_path, monkeypatch):
    def draw_while_another_run_finishes(seed, kind):
        monkeypatch.undo()
        write_demo_data(tmp_path / "demo", num_train=20, num_val=10)
        return draw_demo_scene(seed, kind)

    monkeypatch.setattr(dataset, "draw_demo_scene", draw_while_another_run_finishes)
    write_demo_data(tmp_path / "demo", num_train=20, num_val=10)
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"]


def test_demo_data_that_was_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(seed, kind):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "draw_demo_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_demo_data(tmp_path / "demo", num_train=20, num_val=10)
    assert list(tmp_path.iterdir()) == []
