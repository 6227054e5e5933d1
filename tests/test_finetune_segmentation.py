"""The segmentation run: resumed, accumulated and spread, its scores against brute force, its tests, its refusals."""

import dataclasses
import functools
import itertools
import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, assert_close, launch, load_tool, rows, weights, without_key_bias
from PIL import Image
from safetensors.torch import save_file

import finetune_segmentation
import pretrain_mae
from dataset import (
    IGNORE_INDEX,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ADE20KDataset,
    SampleKey,
    SegmentationTransform,
    collate,
    label_table,
    list_pairs,
    normalize,
    read_label_map,
    resize_labels,
    write_demo_data,
)
from finetune_segmentation import build_config, choose_warmup, compute_loss, main, parse_args, predict
from model import ViTMAEForPreTraining, ViTMAEForSegmentation, load_segmenter
from utils import ConfusionMatrix

ENCODER = dataclasses.replace(TINY, encoder_embed_dim=64, encoder_depth=4, encoder_num_heads=2)
RUN_FLAGS = """--experiment_name run --img_size 32 --num_classes 4 --channels 128 --norm group --epochs 4
 --warmup_iterations 2 --per_gpu_batch_size 4 --learning_rate 1e-4 --eval_interval 2 --save_checkpoint_interval 2
 --num_workers 0 --log_interval 2 --drop_path 0.3"""
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60]], dtype=np.uint8)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "checkpoint_4"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(ViTMAEForPreTraining(ENCODER).state_dict(), folder / "model.safetensors")
    record = {"config": dataclasses.asdict(ENCODER), "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def drawn_pairs(tmp_path_factory) -> Path:
    """Scenes of coloured blocks, whose colour is their class; every fifth row of pixels is not labelled."""
    root, generator = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for split, count in (("training", 10), ("validation", 5)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            height, width = generator.integers(3, 7, 2)
            classes = generator.integers(0, 4, (height, width)).repeat(9, axis=0).repeat(9, axis=1)
            Image.fromarray(COLOURS[classes]).save(root / "images" / split / f"{index}.jpg", quality=95)
            labels = (classes + 1).astype(np.uint8)
            labels[::5] = 0
            Image.fromarray(labels).save(root / "annotations" / split / f"{index}.png")
    return root


def flags(data: Path, work: Path, start: Path | None, more: str = "") -> list[str]:
    given = ["--path_to_data", str(data), "--working_directory", str(work)]
    given += ["--path_to_backbone_checkpoint", str(start)] if start else ["--from_scratch"]
    return [*shlex.split(RUN_FLAGS), *given, *shlex.split(more)]


def train(data: Path, work: Path, start: Path | None, more: str = "") -> Path:
    main(parse_args(flags(data, work, start, more)))
    return work / "run"


@pytest.fixture(scope="module")
def finished(drawn_pairs, pretrained, tmp_path_factory) -> Path:
    """One run of 8 steps, not to be changed."""
    from accelerate.state import AcceleratorState, GradientState

    experiment = train(drawn_pairs, tmp_path_factory.mktemp("work"), pretrained)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return experiment


# -------------------------------------------------------------------------------- what a run leaves


def test_run_leaves_checkpoints_log_and_pictures(finished):
    assert {entry.name for entry in finished.iterdir()} == {
        ".lock", "args.json", "best_checkpoint", "checkpoint_2", "checkpoint_4", "last_checkpoint", "log.jsonl",
        "predictions",
    }  # fmt: skip
    log = rows(finished)
    assert [row["step"] for row in log] == [1, 2, 4, 6, 8]
    assert [row["step"] for row in log if "testing_miou" in row] == [4, 8]
    scores = {f"testing_{name}" for name in ("miou", "macc", "mdice", "aacc")}
    assert all(scores <= row.keys() for row in log if "testing_miou" in row)
    assert all(math.isfinite(row["training_loss"]) and "training_auxiliary_loss" in row for row in log)
    record = json.loads((finished / "best_checkpoint" / "config.json").read_text())
    best = max(row["testing_miou"] for row in log if "testing_miou" in row)
    assert record["testing"]["testing_miou"] == best and record["num_classes"] == 4
    table = (finished / "best_checkpoint" / "per_class.tsv").read_text().splitlines()
    ious = [float(line.split("\t")[3]) for line in table[1:]]
    assert len(ious) == 4 and sum(ious) / 4 == pytest.approx(best, abs=0.01)
    with Image.open(finished / "predictions" / "epoch_4.png") as picture:
        assert picture.width > 4 * 256 and picture.height > 3 * 256


# -------------------------------------------------------------------------------- the same run, otherwise


def test_resumed_run_equals_the_uninterrupted_bit_for_bit(finished, drawn_pairs, pretrained, tmp_path):
    experiment = tmp_path / "run"
    shutil.copytree(finished / "checkpoint_2", experiment / "checkpoint_2")
    shutil.copy(finished / "log.jsonl", experiment)
    torch.rand(3)
    train(drawn_pairs, tmp_path, pretrained, "--resume_from_checkpoint latest --num_workers 1")
    assert_close(weights(experiment / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=0)
    kept = ("step", "training_loss", "learning_rate", "testing_miou")
    assert [[row.get(key) for key in kept] for row in rows(experiment)] == [
        [row.get(key) for key in kept] for row in rows(finished)
    ]


def assert_same_training(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    """After 8 steps of up to 1e-4 the weights agree to a tenth of a step, but for one in a thousand.

    Those have gradients of nearly zero (a random model's attention, group norm of a map pooled to one cell), which are
    mostly rounding, and Adam scales them up to parts of a step. The gradients agree: see two tests below.
    """
    assert ours.keys() == plain.keys()
    ours, plain = without_key_bias(ours), without_key_bias(plain)
    far = sum((ours[key] - plain[key]).abs().gt(1e-5).sum().item() for key in plain)
    assert far <= sum(value.numel() for value in plain.values()) / 1000


def test_accumulated_run_equals_the_plain_one(finished, drawn_pairs, pretrained, tmp_path):
    experiment = train(drawn_pairs, tmp_path, pretrained, "--gradient_accumulation_steps 4")
    assert_same_training(weights(experiment / "checkpoint_4"), weights(finished / "checkpoint_4"))


def test_gradients_of_parts_add_up_to_those_of_the_batch(drawn_pairs):
    size = "--patch_size 4 --encoder_embed_dim 64 --encoder_depth 4 --encoder_num_heads 2"
    args = parse_args(flags(drawn_pairs, drawn_pairs, None, size))
    torch.manual_seed(0)
    model = ViTMAEForSegmentation(build_config(args), 4, channels=64, norm="group", drop_path_rate=0.3).double()
    transform = SegmentationTransform((32, 32), args.mean, args.std, *args.resize_to)
    pairs, table = list_pairs(drawn_pairs, "training"), label_table(4, True)
    data = ADE20KDataset(pairs, transform, table, noise_size=model.noise_size)
    batch = collate([data[SampleKey(0, index)] for index in range(4)])
    found = []
    for size in (4, 1):
        model.zero_grad()
        for part in range(0, 4, size):
            few = slice(part, part + size)
            out = model(batch.images[few].double(), batch.noise[few])
            loss = sum(weight * cross_entropy(x, batch.labels[few]) for weight, x in zip((1, 0.4), out, strict=True))
            (loss * size / 4).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-8, atol=1e-12)


def cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of the script in float64."""
    scores = F.interpolate(scores, labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(scores, labels.long(), ignore_index=IGNORE_INDEX, reduction="sum") / labels.numel()


def test_two_processes_equal_one(finished, drawn_pairs, pretrained, tmp_path):
    arguments = flags(drawn_pairs, tmp_path, pretrained, "--per_gpu_batch_size 2")
    launch("finetune_segmentation.py", arguments, num_processes=2)
    assert_same_training(weights(tmp_path / "run" / "checkpoint_4"), weights(finished / "checkpoint_4"))
    ours, plain = rows(tmp_path / "run")[-1], rows(finished)[-1]
    assert ours["training_loss"] == pytest.approx(plain["training_loss"], abs=1e-5)
    assert ours["testing_miou"] == pytest.approx(plain["testing_miou"], abs=0.5)  # a pixel at a border may tip


def test_iterations_may_end_within_an_epoch(drawn_pairs, tmp_path):
    size = "--patch_size 4 --encoder_embed_dim 64 --encoder_depth 4 --encoder_num_heads 2"
    arguments = [flag for flag in flags(drawn_pairs, tmp_path, None, f"{size} --iterations 5") if flag]
    at = arguments.index("--epochs")
    del arguments[at : at + 2]
    main(parse_args(arguments))
    log = rows(tmp_path / "run")
    assert log[-1]["step"] == 5 and "testing_miou" in log[-1]
    assert (tmp_path / "run" / "checkpoint_3").is_dir()


def test_batch_norm_on_two_processes_of_the_cpu_is_local_and_says_so(drawn_pairs, pretrained, tmp_path):
    more = "--norm batch --per_gpu_batch_size 2 --epochs 2 --channels 48"
    printed = launch("finetune_segmentation.py", flags(drawn_pairs, tmp_path, pretrained, more), num_processes=2)
    assert printed.count("not synchronised: torch has no such layer for the CPU") == 1
    more = "--norm batch --channels 48 --eval_only"
    figures = main(parse_args(flags(drawn_pairs, tmp_path, tmp_path / "run" / "last_checkpoint", more)))
    logged = rows(tmp_path / "run")[-1]
    assert figures == {key: logged[key] for key in figures}


# -------------------------------------------------------------------------------- scores


def test_eval_only_gives_the_logged_figures_to_the_last_digit(finished, drawn_pairs, tmp_path):
    checkpoint = shutil.copytree(finished / "last_checkpoint", tmp_path / "copy")
    figures = main(parse_args(flags(drawn_pairs, tmp_path, checkpoint, "--eval_only")))
    assert figures == {key: rows(finished)[-1][key] for key in figures}
    assert json.loads((checkpoint / "evaluation.json").read_text())["num_images"] == 5


def test_scores_equal_brute_force_at_the_labels_own_size(finished, drawn_pairs, tmp_path):
    checkpoint = shutil.copytree(finished / "last_checkpoint", tmp_path / "copy")
    args = parse_args(flags(drawn_pairs, tmp_path, checkpoint, "--eval_only"))
    figures = main(args)
    model = load_segmenter(checkpoint)[0].eval()
    pairs, table = list_pairs(drawn_pairs, "validation"), label_table(4, True)
    hit, union, labelled = np.zeros(4), np.zeros(4), np.zeros(4)
    for index in range(5):
        labels = read_label_map(pairs.label_path(index), table)
        image = torch.from_numpy(np.array(Image.open(pairs.path(index)))).permute(2, 0, 1)
        with torch.no_grad():
            (answer,) = predict(model, [image], args)
        assert answer.shape == labels.shape == image.shape[1:]
        answer, counted = answer.numpy(), labels != IGNORE_INDEX
        for k in range(4):
            a, b = (answer == k) & counted, labels == k
            hit[k], union[k], labelled[k] = hit[k] + (a & b).sum(), union[k] + (a | b).sum(), labelled[k] + b.sum()
    assert figures["testing_miou"] == pytest.approx(100 * (hit / union).mean(), abs=1e-9)
    assert figures["testing_macc"] == pytest.approx(100 * (hit / labelled).mean(), abs=1e-9)
    assert figures["testing_aacc"] == pytest.approx(100 * hit.sum() / labelled.sum(), abs=1e-9)


def test_metrics_of_one_and_two_processes_are_equal_to_the_last_digit(photographs, tmp_path):
    """18 validation pairs of ADE20K under a random segmenter."""
    size = "--img_size 32 --patch_size 8 --encoder_embed_dim 64 --encoder_depth 4 --encoder_num_heads 2 --channels 64"
    more = f"{size} --num_classes 150 --iterations 1 --warmup_iterations 0 --eval_interval 1"
    data = photographs / "ade20k" / "ADEChallengeData2016"
    arguments = [flag for flag in flags(data, tmp_path, None, more)]
    at = arguments.index("--epochs")
    del arguments[at : at + 2]
    main(parse_args(arguments))
    found = []
    for num_processes in (1, 2):
        checkpoint = shutil.copytree(tmp_path / "run" / "last_checkpoint", tmp_path / f"on_{num_processes}")
        evaluation = ["--path_to_data", str(data), "--path_to_backbone_checkpoint", str(checkpoint), "--eval_only"]
        evaluation += ["--working_directory", str(tmp_path), "--num_workers", "0", "--per_gpu_batch_size", "4"]
        launch("finetune_segmentation.py", evaluation, num_processes=num_processes)
        record = json.loads((checkpoint / "evaluation.json").read_text())
        found.append({key: value for key, value in record.items() if key != "weights"})
    assert found[0] == found[1] and found[0]["num_images"] == 18


@pytest.mark.parametrize("more", ["--no-slide", "--multi_scale --flip", "--no-slide --flip"])
def test_other_tests_score_too(finished, drawn_pairs, tmp_path, more):
    checkpoint = shutil.copytree(finished / "last_checkpoint", tmp_path / "copy")
    figures = main(parse_args(flags(drawn_pairs, tmp_path, checkpoint, f"--eval_only {more}")))
    assert 0 <= figures["testing_miou"] <= 100


def test_no_scale_of_a_windowed_test_is_smaller_than_a_window(finished, tmp_path, monkeypatch):
    checkpoint = finished / "last_checkpoint"
    args = parse_args(flags(tmp_path, tmp_path, checkpoint, "--eval_only --multi_scale --resize_to 128 32"))
    model = load_segmenter(checkpoint)[0].eval()
    crop, seen = model.backbone.config.image_hw, []

    def score_nothing(predict, views, crop_size, stride, batch_size):
        seen.extend(tuple(view.shape[-2:]) for view in views)
        return [torch.zeros(model.decode_head.conv_seg.out_channels, *view.shape[-2:]) for view in views]

    monkeypatch.setattr(finetune_segmentation, "slide_inference", score_nothing)
    predict(model, [torch.zeros(3, 40, 60, dtype=torch.uint8)], args)
    assert crop == (32, 32)
    assert seen == [(32, 48), (32, 48), (32, 48), (40, 60), (48, 72), (56, 84)]  # short side 32 x 0.5 ... 1.75


def test_flipped_test_of_a_mirrored_image_is_the_mirror_image(finished, tmp_path):
    checkpoint = finished / "last_checkpoint"
    args = parse_args(flags(tmp_path, tmp_path, checkpoint, "--eval_only --flip --no-slide"))
    model = load_segmenter(checkpoint)[0].eval()
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        (answer,), (mirrored,) = (predict(model, [x], args) for x in (image, image.flip(-1)))
    assert (answer.flip(-1) == mirrored).float().mean() > 0.99


def test_overfits_four_real_pairs(photographs):
    """Four scenes of ADE20K, as they are, at 64 pixels: model, label rule and loss let them be learned by heart."""
    pairs, table = list_pairs(photographs / "ade20k", "training"), label_table(150, True)
    images, labels = [], []
    for index in range(4):
        image = Image.open(pairs.path(index)).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        whole = torch.from_numpy(read_label_map(pairs.label_path(index), table))
        labels.append(resize_labels(whole, (64, 64)).long())
    inputs, labels = normalize(torch.stack(images), IMAGENET_MEAN, IMAGENET_STD), torch.stack(labels)
    torch.manual_seed(0)
    config = dataclasses.replace(ENCODER, img_size=64, patch_size=8)
    model = ViTMAEForSegmentation(config, 150, channels=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        logits, auxiliary = model(inputs)
        (compute_loss(logits, labels) + 0.4 * compute_loss(auxiliary, labels)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    confusion = ConfusionMatrix(150, ignore_index=IGNORE_INDEX)
    model.eval()
    with torch.no_grad():
        scores = F.interpolate(model(inputs).logits, (64, 64), mode="bilinear", align_corners=False)
    confusion.update(labels, scores.argmax(dim=1))
    assert confusion.figures()["testing_aacc"] > 95


# -------------------------------------------------------------------------------- loss


def test_loss_of_a_crop_without_labels_is_zero_and_has_gradients():
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = compute_loss(scores, torch.full((2, 16, 16), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0 and scores.grad.abs().max() == 0


def test_loss_is_the_mean_over_all_pixels_at_the_labels_size():
    scores, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 16, 16))
    labels[0, :8] = IGNORE_INDEX
    large = F.interpolate(scores, (16, 16), mode="bilinear", align_corners=False)
    single = F.cross_entropy(large, labels, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(compute_loss(scores, labels), single.mean())
    halves = [compute_loss(scores[i : i + 1], labels[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(sum(halves) / 2, single.mean())  # accumulated passes add up


# -------------------------------------------------------------------------------- flags


def test_two_flags_suffice_and_give_the_published_recipe(pretrained):
    args = parse_args(["--path_to_data", "nowhere", "--path_to_backbone_checkpoint", str(pretrained)])
    assert (args.img_size, args.iterations, args.per_gpu_batch_size) == (512, 160_000, 16)
    assert choose_warmup(args, 1263, 160_000) == 1500
    assert (args.learning_rate, args.weight_decay, args.layer_decay, args.drop_path) == (1e-4, 0.05, 0.65, 0.1)
    assert (args.num_classes, args.ignore_zero, args.resize_to, args.auxiliary_weight) == (150, True, [2048, 512], 0.4)
    assert args.encoder_embed_dim == 64 and args.taps == [0, 1, 2, 3] and args.max_grad_norm == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--norm batch --per_gpu_batch_size 1", "needs two images in a forward pass, and there is one"),
        ("--num_classes 300", "num_classes must lie between 1 and 254, not 300"),
        ("--encoder_depth 5", "--encoder_depth 5, but"),
        ("--eval_only --from_scratch", "--eval_only judges weights"),
        ("--layer_decay 2", "--layer_decay must lie between 0 and 1"),
        ("--iterations 0", "--iterations must be at least 1"),
    ],
)
def test_impossible_flags_are_refused_before_any_work(pretrained, more, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--path_to_data", "nowhere", "--path_to_backbone_checkpoint", str(pretrained), *shlex.split(more)])
    assert message in capsys.readouterr().err


def test_neither_checkpoint_nor_from_scratch_is_an_error_that_names_both(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--path_to_data", "nowhere"])
    error = capsys.readouterr().err
    assert "--path_to_backbone_checkpoint" in error and "--from_scratch" in error


def test_label_maps_are_checked_before_training(drawn_pairs, pretrained, tmp_path):
    root = shutil.copytree(drawn_pairs, tmp_path / "data")
    labels = np.array(Image.open(root / "annotations" / "training" / "3.png"))
    labels[0, 0] = 9
    Image.fromarray(labels).save(root / "annotations" / "training" / "3.png")
    with pytest.raises(ValueError, match=r"3\.png has the label values 9, which are no classes here"):
        train(root, tmp_path, pretrained)
    assert not (tmp_path / "run").exists()


def test_resume_as_another_run_is_refused(finished, drawn_pairs, pretrained, tmp_path):
    for more, message in (
        ("--channels 96", "channels: 128 in the checkpoint, 96 now"),
        ("--epochs 6", "total_steps: 8"),
    ):
        shutil.copytree(finished / "checkpoint_2", tmp_path / "run" / "checkpoint_2", dirs_exist_ok=True)
        with pytest.raises(ValueError, match=message):
            train(drawn_pairs, tmp_path, pretrained, f"--resume_from_checkpoint latest {more}")


def test_demo_in_small(tmp_path, monkeypatch):
    few = functools.partial(write_demo_data, num_train=32, num_val=10)
    for script in (pretrain_mae, finetune_segmentation):
        monkeypatch.setattr(script, "write_demo_data", few)
    short = ["--demo", "--epochs", "2", "--num_workers", "0", "--working_directory", str(tmp_path)]
    pretrain_mae.main(pretrain_mae.parse_args(short))
    figures = main(parse_args(short))
    assert figures["testing_aacc"] > 0
    names = (tmp_path / "demo_segmentation" / "best_checkpoint" / "per_class.tsv").read_text()
    assert all(name in names for name in itertools.islice(["background", "circle", "tree", "clutter"], 4))


# -------------------------------------------------------------------------------- tools


def test_segment_labels_images_of_any_size(finished, drawn_pairs, tmp_path, capsys):
    tool = load_tool("segment")
    folder, output = tmp_path / "images", tmp_path / "out"
    (folder / "more").mkdir(parents=True)
    Image.open(drawn_pairs / "images" / "validation" / "0.jpg").save(folder / "a.png")
    Image.new("RGB", (70, 9), (200, 60, 60)).save(folder / "more" / "b.png")
    arguments = ["--checkpoint", str(finished / "last_checkpoint"), str(folder), "--output", str(output)]
    tool.main(tool.parse_args(arguments))
    printed = capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {
        f"{name}_{kind}.png" for name in ("a", "more_b") for kind in ("overlay", "labels")
    }
    labels = np.array(Image.open(output / "more_b_labels.png"))
    assert labels.shape == (9, 70) and labels.min() >= 1 and labels.max() <= 4
    shares = [float(line.split("%")[0]) for line in printed.splitlines() if "%" in line]
    assert sum(shares) == pytest.approx(200, abs=0.1)
    model = load_segmenter(finished / "last_checkpoint")[0].eval()
    args = parse_args(flags(drawn_pairs, tmp_path, finished / "last_checkpoint", "--eval_only"))
    image = torch.from_numpy(np.array(Image.open(folder / "a.png"))).permute(2, 0, 1)
    with torch.no_grad():
        expected = predict(model, [image], args)[0].numpy() + 1
    assert np.array_equal(np.array(Image.open(output / "a_labels.png")), expected)
    with pytest.raises(FileExistsError, match="--overwrite"):
        tool.main(tool.parse_args(arguments))
    (folder / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"cannot decode .*text\.jpg"):
        tool.main(tool.parse_args([*arguments, "--overwrite"]))
    with pytest.raises(FileNotFoundError, match=r"no image or folder at .*absent\.jpg; nothing was written"):
        absent = str(tmp_path / "absent.jpg")
        tool.main(tool.parse_args([absent if argument == str(folder) else argument for argument in arguments]))
    with pytest.raises(SystemExit):
        tool.parse_args([*arguments, "--opacity", "1.5"])
