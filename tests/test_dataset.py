"""Random numbers, data sets, transforms, mixing, samplers: hand-made cases, round trips and invariances."""

import csv
import dataclasses
import math
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from test_pairs import write_pair
from timm.data import auto_augment, create_transform
from timm.data.auto_augment import RandAugment
from torchvision.transforms import InterpolationMode, v2

from dataset import (
    EVAL_EPOCH,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ADE20KDataset,
    FinetuningTransform,
    ImageDataset,
    PairMixing,
    ProbingTransform,
    ResizeCenterCrop,
    ResizedCropFlip,
    Sample,
    SampleKey,
    SegmentationTransform,
    StepSampler,
    ValueFinetuningTransform,
    build_eval_loader,
    build_pretraining_transform,
    build_training_loader,
    build_values,
    collate,
    collate_lists,
    denormalize,
    distort_colours,
    eval_crop_ratio,
    fit_within,
    keep_size,
    normalize,
    patches_with_data,
    pick_samples,
    posterize,
    seeded,
)
from storage import files
from storage.decoding import read_image
from storage.demo import draw_demo_scene
from storage.labels import IGNORE_INDEX, label_table, resize_labels
from storage.lists import list_images
from storage.pairs import check_pairs, list_pairs


def read_manifest(photographs):
    with (photographs / "bad_images" / "MANIFEST.tsv").open() as file:
        return {row["file"]: row for row in csv.DictReader(file, delimiter="\t")}


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
    data = ImageDataset(data.files, FinetuningTransform((8, 8), 9, 0.25, IMAGENET_MEAN, IMAGENET_STD), seed=5)
    with seeded(5, 1, 3):  # from random, and not from torch
        expected = data.transform(read_image(data.files.path(int(torch.randint(24, ())))))
    assert torch.equal(data[SampleKey(1, 3)].image, expected)


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


IMBALANCED = np.array([0] * 30 + [1] * 13 + [2] * 5 + [3] * 2)  # 50 images: 48 fill the steps of an epoch


def balanced_epoch(epoch, micro_batch_size=12, first_step=0, **options):
    sampler = StepSampler(50, micro_batch_size, seed=3, labels=IMBALANCED, **options)
    sampler.set_epoch(epoch, first_step)
    batches = [[key.index for key in batch] for batch in sampler]
    assert len(batches) == len(sampler)
    return batches


def test_balanced_sampling_shows_each_class_and_within_it_each_image_equally_often():
    seen = np.zeros(50, dtype=int)
    for epoch in range(40):
        batches = balanced_epoch(epoch)
        order = np.concatenate(batches)
        assert len(batches) == 4 and len(set(order)) == 48  # as many steps as without; repetitions have other crops
        counts = np.bincount(order % 50, minlength=50)
        images = np.bincount(IMBALANCED, counts)
        assert images.tolist() == [12] * 4
        for k in range(4):
            assert np.ptp(counts[k == IMBALANCED]) <= 1
        seen += counts
    assert seen.min() > 0  # of a large class each epoch has another part
    assert balanced_epoch(0) != balanced_epoch(1) and balanced_epoch(5) == balanced_epoch(5)


def test_balanced_sampling_gives_an_epochs_remainder_to_other_classes_each_time():
    labels = np.array([0] * 7 + [1] * 2 + [2])  # 10 images over three classes
    found = set()
    for epoch in range(30):
        sampler = StepSampler(10, 5, seed=0, labels=labels)
        counts = np.bincount(labels[[index % 10 for index in sampler.order(epoch)]], minlength=3)
        assert sorted(counts) == [3, 3, 4]
        found.add(int(counts.argmax()))
    assert found == {0, 1, 2}


def test_balanced_sampling_of_fewer_images_than_classes_takes_no_class_twice():
    labels = np.arange(9)
    order = StepSampler(9, 4, seed=0, labels=labels).order(0)
    assert len(order) == 8 and len(set(order)) == 8


@pytest.mark.parametrize(("accumulation_steps", "world_size"), [(3, 1), (1, 2), (2, 3)])
def test_balanced_sampling_fills_the_same_steps_on_any_number_of_processes(accumulation_steps, world_size):
    whole = [sorted(batch) for batch in balanced_epoch(7)]
    options = dict(accumulation_steps=accumulation_steps, world_size=world_size)
    parts = [
        balanced_epoch(7, 12 // accumulation_steps // world_size, rank=rank, **options) for rank in range(world_size)
    ]
    steps = [
        sorted(index for part in parts for batch in part[i : i + accumulation_steps] for index in batch)
        for i in range(0, len(parts[0]), accumulation_steps)
    ]
    assert steps == whole


def test_balanced_sampling_goes_on_within_an_epoch_and_names_the_images_of_a_step():
    assert balanced_epoch(7, first_step=3) == balanced_epoch(7)[3:]
    sampler = StepSampler(50, 12, seed=3, labels=IMBALANCED)
    assert sampler.images_of(4 * 7 + 2) == [index % 50 for index in balanced_epoch(7)[1]]


def test_eval_loaders_of_all_processes_give_every_image_once(image_folder):
    files = list_images(image_folder / "val")
    data = ImageDataset(files, ResizeCenterCrop((16, 16)), seed=0, noise_size=16)
    expected = torch.stack([data[SampleKey(EVAL_EPOCH, index)].noise for index in range(8)])
    for world_size in (1, 3):
        options = dict(batch_size=2, num_workers=0, world_size=world_size)
        loaders = [build_eval_loader(data, rank=rank, **options) for rank in range(world_size)]
        noise = torch.cat([batch.noise for loader in loaders for batch in loader])
        assert torch.equal(noise.sort(dim=0).values, expected.sort(dim=0).values)


# -------------------------------------------------------------------------------- transforms


def test_resize_center_crop_equals_resize_256_and_crop_224():
    scene, _ = draw_demo_scene(0, 0)
    reference = v2.Compose(
        [v2.Resize(256, interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()]
    )
    for width, height in [(300, 400), (500, 333), (224, 224), (100, 90), (750, 375), (333, 999)]:
        image = scene.resize((width, height))
        differences = (ResizeCenterCrop((224, 224), 224 / 256)(image).int() - reference(image).int()).abs()
        assert differences.max() <= 2 and differences.float().mean() < 0.01  # Pillow rounds its weights more finely


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
    transform = FinetuningTransform((32, 48), 9, 0.5, IMAGENET_MEAN, IMAGENET_STD)

    def draw(key):
        with seeded(0, *key):
            return transform(image)

    draws = [draw((0, index)) for index in range(20)]
    assert all(d.shape == (3, 32, 48) and d.dtype == torch.float32 for d in draws)
    assert len({d.sum().item() for d in draws}) == 20
    torch.rand(1), np.random.rand(), random.random()
    assert all(torch.equal(draw((0, index)), draws[index]) for index in range(20))


def build_timm_transform(img_size: tuple[int, int]) -> v2.Compose:
    """timm's own pipeline at the settings of the original release: main_finetune.py, util/datasets.py."""
    options = dict(interpolation="bicubic", re_prob=0.25, re_mode="pixel", re_count=1, mean=IMAGENET_MEAN)
    policy = "rand-m9-mstd0.5-inc1"
    steps = create_transform(img_size, True, color_jitter=None, auto_augment=policy, std=IMAGENET_STD, **options)
    for operation in steps.transforms[2].ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return steps


@pytest.mark.parametrize("size", [(300, 400), (90, 70), (500, 60), (20, 30)])
def test_finetuning_transform_draws_and_does_what_timm_does(size):
    """Same draws to the last one; without RandAugment, which makes much of a grey level, the same pixels.

    Of a smooth picture: at edges bicubic overshoots, and it matters whether rows or columns are rounded first.
    """
    cells = np.random.default_rng(0).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    image = Image.fromarray(cells).resize((80, 80), Image.Resampling.BICUBIC).resize(size[::-1])
    ours, timms = FinetuningTransform((48, 64), 9, 0.25, IMAGENET_MEAN, IMAGENET_STD), build_timm_transform((48, 64))
    plain = FinetuningTransform((48, 64), 0, 0.25, IMAGENET_MEAN, IMAGENET_STD)
    without = v2.Compose([step for step in timms.transforms if not isinstance(step, RandAugment)])
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    means = []
    for index in range(30):
        draws = []
        for transform in (ours, timms):
            with seeded(0, 0, index):
                transform(image)
                draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
        assert draws[0] == draws[1]
        with seeded(0, 0, index):
            expected = without(image)
        with seeded(0, 0, index):
            means.append((plain(image) - expected).abs() * std * 255)
        assert means[-1].max() < 2.01  # Pillow and torch round halves of a grey level each their way, twice
    assert torch.stack(means).mean() < 0.1


def test_randaugment_is_timms_own_on_the_pixels_that_it_is_given():
    ours, timms = FinetuningTransform((48, 48), 9, 0.25, IMAGENET_MEAN, IMAGENET_STD), build_timm_transform((48, 48))
    pixels = np.array(draw_demo_scene(0, 3)[0].resize((48, 48)))
    _, flip, *rest = timms.transforms
    for index in range(60):
        with seeded(0, 0, index):
            expected = v2.Compose([flip, *rest])(Image.fromarray(pixels))
        with seeded(0, 0, index):  # of its own size a picture is not changed by resizing
            assert torch.equal(ours.resize_and_flip(torch.from_numpy(pixels).permute(2, 0, 1)), expected)


def test_finetuning_takes_images_of_which_timm_would_cut_nothing():
    transform = FinetuningTransform((16, 16), 9, 0.25, IMAGENET_MEAN, IMAGENET_STD)
    for index in range(20):
        with seeded(0, 0, index):
            assert transform(Image.new("RGB", (1, 1 + index % 3))).shape == (3, 16, 16)


def test_random_augmentation_and_erasing_can_be_turned_off():
    white = Image.new("RGB", (40, 40), "white")
    value = torch.tensor([(1 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])
    plain = FinetuningTransform((32, 32), 0, 0.0, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(plain(white), value[:, None, None].expand(3, 32, 32))
    erasing = FinetuningTransform((32, 32), 0, 1.0, IMAGENET_MEAN, IMAGENET_STD)(white)
    erased = (erasing - value[:, None, None]).abs().amax(dim=0) > 1e-3
    assert 0.01 < erased.float().mean() < 0.5 and erasing[:, erased].std() == pytest.approx(1, abs=0.3)


def test_probing_draws_its_crop_once_and_cuts_it_to_the_image():
    probing = ProbingTransform((16, 24), IMAGENET_MEAN, IMAGENET_STD)
    for seed in range(50):
        torch.manual_seed(seed)
        area = probing.draw_area(400, 10)
        torch.manual_seed(seed)
        share = 4000 * torch.empty(1).uniform_(0.08, 1.0).item()
        ratio = torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).exp().item()
        assert area.width == 10  # the drawn width, at least 15, is more than there is
        assert area.height == min(400, round((share / ratio) ** 0.5))
        assert 0 <= area.top <= 400 - area.height and area.left == 0
    value = torch.tensor([(1 - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])
    white = probing(Image.new("RGB", (50, 40), "white"))
    torch.testing.assert_close(white, value[:, None, None].expand(3, 16, 24))


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


def test_undecodable_file_stops_an_evaluation_with_its_name(image_folder):
    (image_folder / "val" / "cats" / "broken.jpg").write_text("no picture")
    files = list_images(image_folder / "val")
    data = ImageDataset(files, ResizeCenterCrop((16, 16)), replace_bad_files=False)
    with pytest.raises(ValueError, match=r"cannot decode .*broken\.jpg"):
        list(build_eval_loader(data, batch_size=4, num_workers=0))


# -------------------------------------------------------------------------------- segmentation


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_label_map_of_a_rotated_photograph_may_lie_either_way(tmp_path, shape):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    write_pair(tmp_path, "training", "one", np.ones(shape, dtype=np.uint8))
    Image.new("RGB", (8, 6)).save(tmp_path / "images" / "training" / "one.jpg", exif=exif)
    pairs, table = list_pairs(tmp_path, "training"), label_table(150, True)
    checked = check_pairs(pairs, table, 1).pairs
    sample = ADE20KDataset(checked, keep_size, table)[SampleKey(EVAL_EPOCH, 0)]
    assert sample.image.shape[1:] == sample.label.shape == shape
    other = dataclasses.replace(checked, rotate=not checked.rotate)
    with pytest.raises(ValueError, match=r"one\.jpg: .* pixels, but its label map has"):
        ADE20KDataset(other, keep_size, table, replace_bad_files=False)[SampleKey(EVAL_EPOCH, 0)]


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
    transform = FinetuningTransform((16, 16), 9, 0.0, IMAGENET_MEAN, IMAGENET_STD)
    (augment,) = transform.augment.transforms
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


def distort_pixels(image: np.ndarray) -> np.ndarray:
    """MMSegmentation's PhotoMetricDistortion step by step on the pixels (H, W, 3), hue and saturation by Pillow."""

    def convert(pixels: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
        return (pixels * np.float32(factor) + np.float32(offset)).clip(0, 255).astype(np.uint8)

    if random.random() < 0.5:
        image = convert(image, offset=random.uniform(-32, 32))
    contrast_first = random.random() < 0.5
    if contrast_first and random.random() < 0.5:
        image = convert(image, random.uniform(0.5, 1.5))
    saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    hue = random.randint(-18, 17) / 180 if random.random() < 0.5 else 0.0
    if saturation != 1.0 or hue:
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        hsv[..., 0] = (hsv[..., 0].astype(int) + round(hue * 256)) % 256
        hsv[..., 1] = convert(hsv[..., 1], saturation)
        image = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    return convert(image, random.uniform(0.5, 1.5)) if not contrast_first and random.random() < 0.5 else image


def test_colour_distortion_gives_the_pixels_of_its_steps():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    for index in range(100):
        with seeded(0, 0, index):
            distorted = distort_colours(image)
        with seeded(0, 0, index):
            assert np.array_equal(distorted.permute(1, 2, 0), distort_pixels(image.permute(1, 2, 0).numpy()))


def test_label_maps_are_resized_as_torch_resizes_the_nearest():
    shapes = np.random.default_rng(0).integers(1, 300, (60, 4))
    for height, width, *size in shapes.tolist():
        labels = torch.randint(0, 256, (height, width), dtype=torch.uint8)
        expected = torch.nn.functional.interpolate(labels[None, None], size, mode="nearest")[0, 0]
        assert torch.equal(resize_labels(labels, size), expected)


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
    generator = torch.Generator().manual_seed(files.random_key(3, 2, "order"))
    assert StepSampler(10, 4, seed=3).order(epoch=2) == torch.randperm(10, generator=generator)[:8].tolist()


def test_crops_of_a_set_smaller_than_a_step_all_differ():
    sampler = StepSampler(3, 16, crops_per_image=2)
    (batch,) = sampler
    assert len(set(batch)) == 16 and {key.index % 3 for key in batch} == {0, 1, 2}


def test_repeated_sampling_refuses_batches_that_groups_cannot_fill():
    with pytest.raises(ValueError, match="--repeated_sampling 4 does not divide the 6 images"):
        StepSampler(24, 6, crops_per_image=4)


# -------------------------------------------------------------------------------- images in their own units

BANDS, SIZE = 13, (12, 20)
OWN_MEAN, OWN_STD = tuple(range(100, 100 + BANDS)), tuple(range(50, 50 + BANDS))


def draw_tiles(folder, suffix: str, dtype: str, count: int = 3, bands: int = BANDS) -> np.ndarray:
    """Write tiles as files of bands and give them, (N, C, H, W)."""
    generator = np.random.default_rng(1)
    tiles = generator.integers(0, 4000, (count, bands, *SIZE)).astype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    for index, tile in enumerate(tiles):
        if suffix == "npy":
            np.save(folder / f"{index}.npy", tile)
        else:
            tifffile.imwrite(folder / f"{index}.tif", tile, planarconfig="separate", photometric="minisblack")
    return tiles


@pytest.mark.parametrize("keep_decoded", [False, True])
@pytest.mark.parametrize("suffix", ["npy", "tif"])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_values_reach_the_model_as_numpy_has_them(tmp_path, suffix, dtype, keep_decoded):
    tiles = draw_tiles(tmp_path, suffix, dtype).astype(np.float64)
    column = (BANDS, 1, 1)
    expected = (tiles - np.reshape(OWN_MEAN, column)) / np.reshape(OWN_STD, column)
    mapped = (tiles / 2000 - 0.25).clip(0, 1)
    mapped = (mapped - np.reshape(OWN_MEAN, column)) / np.reshape(OWN_STD, column)
    for value_range, wanted in (("own", expected), ((500, 2500), mapped)):
        values = build_values(value_range, OWN_MEAN, OWN_STD)
        options = dict(channels=BANDS, values=values, keep_decoded=keep_decoded)
        data = ImageDataset(list_images(tmp_path), ResizeCenterCrop(SIZE), **options)
        for index in range(3):
            image = data[SampleKey(EVAL_EPOCH, index)].image
            assert np.abs(image.numpy() - wanted[index]).max() < 1e-6 * np.abs(wanted).max()
            assert torch.equal(normalize(image[None], OWN_MEAN, OWN_STD)[0], image)


def test_crops_of_values_are_cut_and_resized_as_one_band_alone(tmp_path):
    tiles = draw_tiles(tmp_path / "all", "npy", "float32")
    transform, values = ResizedCropFlip((8, 8), 0.2), build_values("own", (0.0,) * BANDS, (1.0,) * BANDS)
    data = ImageDataset(list_images(tmp_path / "all"), transform, channels=BANDS, values=values, noise_size=2)
    sample = data[SampleKey(3, 1)]
    (tmp_path / "one").mkdir()
    for index, tile in enumerate(tiles):
        np.save(tmp_path / "one" / f"{index}.npy", tile[5])
    single = ImageDataset(
        list_images(tmp_path / "one"), transform, channels=1, values=build_values("own", (0.0,), (1.0,)), noise_size=2
    )[SampleKey(3, 1)]
    assert torch.equal(sample.image[5], single.image[0]) and torch.equal(sample.noise, single.noise)
    assert sample.image.shape == (BANDS, 8, 8)


@pytest.mark.parametrize("transform", [ResizeCenterCrop((12, 16)), ResizedCropFlip((12, 16), 1.0)])
def test_no_data_counts_as_the_mean_and_stays_where_nothing_else_is(tmp_path, transform):
    values = np.full((24, 32, 2), 7.0, np.float32)
    values[:, :16] = (np.nan, np.inf)
    np.save(tmp_path / "a.npy", values)
    to_model = build_values("own", (3.0, 3.0), (2.0, 2.0))
    data = ImageDataset(list_images(tmp_path), transform, channels=2, values=to_model)
    image = data[SampleKey(0, 0)].image
    lost = image.isnan()
    columns = lost.all(dim=1)
    image = image if columns[0, 0] else image.flip(-1)  # as the transform may
    assert image.isnan()[:, :, :7].all() and not image.isnan()[:, :, 9:].any()
    assert (image[:, :, 11:] - 2).abs().max() < 0.2  # (7 - 3) / 2; bicubic overshoots near the edge
    filled = normalize(image[None], (3.0, 3.0), (2.0, 2.0))[0]
    assert (filled[:, :, :7] == 0).all()
    assert patches_with_data(image[None], 4).tolist() == [[0, 1, 1, 1] * 3]
    assert patches_with_data(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 4) is None


def test_long_line_is_cut_before_it_is_resized_to_the_same_pixels():
    generator = np.random.default_rng(0)
    line = np.repeat(generator.integers(0, 256, (2, 50, 3), dtype=np.uint8), 8, axis=1)  # 400 x 2
    transform = ResizeCenterCrop((16, 16), 0.5)
    cut = transform(Image.fromarray(line))
    whole = Image.fromarray(line).resize((6400, 32), Image.Resampling.BICUBIC).crop((3192, 8, 3208, 24))
    assert np.abs(cut.permute(1, 2, 0).numpy().astype(int) - np.asarray(whole)).max() <= 1
    values = transform(torch.from_numpy(line).permute(2, 0, 1).float())
    assert (values - cut).abs().max() <= 1
    assert transform(Image.new("RGB", (200_000, 2))).shape == (3, 16, 16)  # 3,200,000 x 32 pixels whole


def test_errors_of_transforms_name_the_file_and_replace_it(image_folder):
    def fail_once(image):
        fail_once.calls += 1
        if fail_once.calls == 1:
            raise MemoryError("no room")
        return torch.zeros(3, 4, 4)

    fail_once.calls = 0
    files = list_images(image_folder / "train")
    sample = ImageDataset(files, fail_once)[SampleKey(0, 3)]
    assert [tuple(bad) for bad in sample.bad_files] == [(files.path(3), "MemoryError: no room")]
    fail_once.calls = 0
    with pytest.raises(ValueError, match=r"cannot decode .*\.jpg: MemoryError: no room"):
        ImageDataset(files, fail_once, replace_bad_files=False)[SampleKey(0, 3)]


def test_file_that_went_away_is_called_missing(image_folder):
    files = list_images(image_folder / "train")
    os.remove(files.path(0))
    sample = ImageDataset(files, ResizeCenterCrop((8, 8)))[SampleKey(0, 0)]
    assert sample.bad_files[0].reason == "missing since the list of files was made; --rescan_data makes it anew"


@pytest.mark.parametrize("collate_fn", [collate, collate_lists])
def test_batches_are_put_into_shared_memory_by_the_worker_itself(image_folder, monkeypatch, collate_fn):
    def no_room(tensors):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    data = ImageDataset(list_images(image_folder / "train"), ResizeCenterCrop((8, 8)), noise_size=2)
    loader = build_eval_loader(data, batch_size=4, num_workers=1, collate_fn=collate_fn)
    images = [image for batch in loader for image in batch.images]
    assert all(image.is_shared() for image in images) and len(images) == 24
    monkeypatch.setattr("storage.workers.default_collate", no_room)
    with pytest.raises(RuntimeError, match=r"do not fit into the .* free in /dev/shm.*--shm-size.*--num_workers 0"):
        collate_fn([data[SampleKey(0, 0)]])


def test_case_of_a_long_line_from_practice(cases):
    image = read_image(cases / "wide_image_eval" / "line.png")
    assert image.size == (20_000, 2)
    assert ResizeCenterCrop((224, 224), 0.875)(image).shape == (3, 224, 224)


def test_every_draw_of_finetuning_on_values_is_a_function_of_the_key(tmp_path):
    draw_tiles(tmp_path, "npy", "float32")
    values, transform = build_values("own", OWN_MEAN, OWN_STD), ValueFinetuningTransform((8, 8), 1.0)
    data = ImageDataset(list_images(tmp_path), transform, channels=BANDS, values=values)
    images = [data[SampleKey(0, 1)].image for _ in range(3)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert not torch.equal(images[0], data[SampleKey(1, 1)].image)


def test_link_to_nothing_is_called_so(image_folder):
    (image_folder / "train" / "cats" / "!.jpg").symlink_to(image_folder / "nowhere.jpg")
    files = list_images(image_folder / "train")
    assert ImageDataset(files, ResizeCenterCrop((8, 8)))[SampleKey(0, 0)].bad_files[0].reason == "a link to nothing"


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        (None, [0, 3, 6]),
        (np.repeat(np.arange(2, 12), 5), [0, 16, 32]),  # every third shard: 0 to 4, 15 to 19, 30 to 34, 45 to 49
        (np.repeat([7], 5), [0, 1, 2]),
    ],
)
def test_samples_for_pictures_come_from_few_shards_where_these_are_fetched(shards, expected):
    class Data(list):
        files = SimpleNamespace(shards=shards)

        def __getitem__(self, key):
            return key.index

    found = pick_samples(Data(range(10 if shards is None else len(shards))), 3)
    assert found == expected
