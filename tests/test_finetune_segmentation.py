"""The segmentation run: against plain torch, resumed and spread, its scores by brute force, and its refusals."""

import dataclasses
import functools
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
import model as model_module
import pretrain_mae
import training.data
from dataset import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ADE20KDataset,
    SampleKey,
    SegmentationTransform,
    StepSampler,
    collate,
    keep_size,
    normalize,
    resize_labels,
)
from finetune_segmentation import (
    build_config,
    choose_samples,
    choose_warmup,
    compute_loss,
    label_images,
    main,
    parse_args,
)
from model import MAEConfig, ViTMAEForPreTraining, ViTMAEForSegmentation, load_segmenter
from storage.demo import write_demo_data
from storage.labels import IGNORE_INDEX, label_table, name_classes, read_label_map
from storage.pairs import list_pairs
from utils import ConfusionMatrix

ENCODER = dataclasses.replace(TINY, encoder_embed_dim=64, encoder_depth=4, encoder_num_heads=2)
RUN_FLAGS = """--experiment_name run --img_size 32 --num_classes 4 --channels 128 --norm group --epochs 4
 --warmup_iterations 2 --per_gpu_batch_size 4 --learning_rate 1e-4 --eval_interval 2 --save_checkpoint_interval 2
 --num_workers 0 --log_interval 2 --drop_path 0.3"""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "checkpoint_4"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(ViTMAEForPreTraining(ENCODER).state_dict(), folder / "model.safetensors")
    record = {"config": dataclasses.asdict(ENCODER), "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


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
        ".lock", "DONE", "args.json", "best_checkpoint", "checkpoint_2", "checkpoint_4", "last_checkpoint",
        "log.jsonl", "predictions",
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
        assert picture.height > 3 * 256


def test_pictures_show_images_that_add_classes(tmp_path):
    maps = [{1: 20}, {1: 20}, {1: 10, 2: 10}, {1: 20}, {3: 19, 4: 1}, {1: 8, 2: 8, 3: 4}]  # columns of each class
    for kind in ("images", "annotations"):
        (tmp_path / kind / "validation").mkdir(parents=True)
    for index, columns in enumerate(maps):
        labels = np.repeat(list(columns), list(columns.values())).astype(np.uint8)[None].repeat(20, axis=0)
        if index == 5:
            labels[0, 0] = 4  # too small to be seen
        Image.fromarray(labels * 50).convert("RGB").save(tmp_path / "images" / "validation" / f"{index}.png")
        Image.fromarray(labels).save(tmp_path / "annotations" / "validation" / f"{index}.png")
    data = ADE20KDataset(list_pairs(tmp_path, "validation"), keep_size, label_table(4, True))
    assert [sample.key.index for sample in choose_samples(data, 4)] == [5, 4, 0, 2]
    assert [sample.key.index for sample in choose_samples(data, 9)] == [5, 4, 0, 2, 1, 3]


def test_activation_checkpointing_does_not_change_the_run(finished, drawn_pairs, pretrained, tmp_path, monkeypatch):
    calls, checkpoint = [], model_module.checkpoint
    monkeypatch.setattr(model_module, "checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k))
    experiment = train(drawn_pairs, tmp_path, pretrained, "--activation_checkpointing")
    assert_close(weights(experiment / "checkpoint_4"), weights(finished / "checkpoint_4"), atol=0)
    assert len(calls) == 8 * 4  # once a step and block, never at evaluation


@pytest.mark.parametrize("more", ["--no-rel_pos_bias", "--rel_pos_bias"])
def test_run_at_learning_rate_zero_leaves_the_pretrained_encoder(drawn_pairs, pretrained, tmp_path, more):
    short = "--learning_rate 0 --epochs 1 --warmup_iterations 0 --channels 64"
    experiment = train(drawn_pairs, tmp_path, pretrained, f"{short} {more}")
    ours, expected = weights(experiment / "checkpoint_1"), pretrained_backbone(pretrained, (8, 8))
    tables = {name for name in ours if name.endswith("relative_position_bias_table")}
    assert {name for name in ours if name.startswith("backbone.")} == expected.keys() | tables
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
    assert len(tables) == (4 if more == "--rel_pos_bias" else 0) and not any(ours[name].any() for name in tables)


def pretrained_backbone(pretrained: Path, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Give what a segmenter starts from: the encoder without its final norm, its positions brought to a grid."""
    kept = {k: v for k, v in weights(pretrained).items() if k.startswith(("cls", "pos_embed", "patch_embed", "blocks"))}
    cls_row, table = kept["pos_embed"].split([1, 16], dim=1)  # of 4 x 4 patches
    table = F.interpolate(table.mT.reshape(1, -1, 4, 4), grid, mode="bicubic", align_corners=False)
    kept["pos_embed"] = torch.cat([cls_row, table.flatten(2).mT], dim=1)
    return {f"backbone.{name}": value for name, value in kept.items()}


def test_evaluations_and_checkpoints_are_a_tenth_of_the_run_apart_by_default(drawn_pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_segmentation, "NUM_PICTURES", 1)
    size = "--img_size 8 --patch_size 4 --encoder_embed_dim 16 --encoder_depth 4 --encoder_num_heads 2 --channels 8"
    more = f"{size} --norm batch --epochs 20 --per_gpu_batch_size 10 --log_interval 1"
    arguments = flags(drawn_pairs, tmp_path, None, more)
    main(parse_args(without(arguments, "--eval_interval", "--save_checkpoint_interval", "--warmup_iterations")))
    log = rows(tmp_path / "run")
    assert [row["step"] for row in log if "testing_miou" in row] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    kept = {int(folder.name.split("_")[1]) for folder in (tmp_path / "run").glob("checkpoint_*")}
    assert kept == set(range(2, 21, 2))
    rates = [row["learning_rate"] for row in log]
    assert rates.index(max(rates)) == 2 and max(rates) == 1e-4  # after a warmup of a tenth


def without(arguments: list[str], *names: str) -> list[str]:
    """Leave out flags of one value, wherever they stand."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return [argument for before, argument in pairs if before not in names and argument not in names]


# -------------------------------------------------------------------------------- the same run, otherwise


@pytest.mark.parametrize("more", ["--max_grad_norm 0.5", "--rel_pos_bias --layer_scale"])
def test_run_equals_the_same_steps_in_plain_torch(drawn_pairs, pretrained, tmp_path, more):
    """Replay the recipe by hand, 6 steps of which 2 are warmup, from samples of the data set.

    The weights agree to 1/400 of a step. Left out are the biases of the neck's transposed convolutions and the means of
    the batch norms behind them, which take any shift away again: their true gradient is zero, as of the keys' bias.
    """
    recipe = "--layer_decay 0.6 --weight_decay 0.5 --auxiliary_weight 0.7 --learning_rate 2e-3 --epochs 3"
    given = f"--norm batch --channels 24 --log_interval 1 {recipe} {more}"
    experiment = train(drawn_pairs, tmp_path, pretrained, given)

    torch.manual_seed(0)
    config = dataclasses.replace(ENCODER, img_size=32)
    options = dict(channels=24, drop_path_rate=0.3, rel_pos_bias="pos" in more, layer_scale="scale" in more)
    model = ViTMAEForSegmentation(config, 4, **options)
    model.load_state_dict(model.state_dict() | pretrained_backbone(pretrained, (8, 8)))
    groups = []
    for name, p in model.named_parameters():
        part, kind, number, *_ = f"{name}.".split(".")
        layer = 5 if part != "backbone" else int(number) + 1 if kind == "blocks" else 0
        spared = p.ndim == 1 or kind in ("cls_token", "pos_embed") or "relative_position" in name
        groups.append({"params": [p], "weight_decay": 0.0 if spared else 0.5, "scale": 0.6 ** (5 - layer)})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    pairs, table = list_pairs(drawn_pairs, "training"), label_table(4, True)
    transform = SegmentationTransform((32, 32), IMAGENET_MEAN, IMAGENET_STD, 128, 32)
    data = ADE20KDataset(pairs, transform, table, noise_size=2 * 4 + 24 + 256)  # drop path, dropout of both heads
    sampler, log = StepSampler(10, 4, seed=0), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for keys in sampler:
            samples, step = [data[key] for key in keys], len(log)
            images, labels, noise = (torch.stack(x) for x in list(zip(*samples, strict=True))[1:4])
            scores = [F.interpolate(x, (32, 32), mode="bilinear") for x in model(images, noise)]
            single = [F.cross_entropy(x, labels.long(), ignore_index=255, reduction="none") for x in scores]
            loss, auxiliary = (x.mean() for x in single)
            (loss + 0.7 * auxiliary).backward()
            if "max_grad_norm" in more:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            rate = 2e-3 * ((1e-6 + (1 - 1e-6) * step / 2) if step < 2 else (6 - step) / 4)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.step()
            optimizer.zero_grad()
            log.append((loss.item(), auxiliary.item(), rate))
    keys = ("training_loss", "training_auxiliary_loss", "learning_rate")
    logged = [[row[key] for key in keys] for row in rows(experiment)]
    assert torch.allclose(torch.tensor(logged), torch.tensor(log), rtol=1e-5, atol=1e-12)
    shifts = {f"neck.upsample_{name}.bias" for name in ("4x.0", "4x.3", "2x.0")} | {"neck.upsample_4x.1.running_mean"}
    shifts |= {f"decode_head.lateral_convs.{level}.bn.running_mean" for level in (0, 1)}
    ours, plain = weights(experiment / "checkpoint_3"), model.state_dict()
    assert_close(*({k: v for k, v in x.items() if k not in shifts} for x in (ours, plain)), atol=5e-6)


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
    arguments = flags(drawn_pairs, tmp_path, None, f"{size} --iterations 5")
    launch("finetune_segmentation.py", without(arguments, "--epochs"))
    log = rows(tmp_path / "run")
    assert log[-1]["step"] == 5 and "testing_miou" in log[-1]
    assert (tmp_path / "run" / "checkpoint_3").is_dir()


def test_batch_norm_on_two_processes_of_the_cpu_is_local_and_says_so(fork, drawn_pairs, pretrained, tmp_path):
    more = "--norm batch --per_gpu_batch_size 2 --epochs 2 --channels 48"
    printed = fork("finetune_segmentation.py", flags(drawn_pairs, tmp_path, pretrained, more), num_processes=2)
    assert printed.count("batch norm      not synchronised: torch cannot on the CPU; each process has its own") == 1
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
            (answer,) = label_images(model, [image], args)
        assert answer.shape == labels.shape == image.shape[1:]
        answer, counted = answer.numpy(), labels != IGNORE_INDEX
        for k in range(4):
            a, b = (answer == k) & counted, labels == k
            hit[k], union[k], labelled[k] = hit[k] + (a & b).sum(), union[k] + (a | b).sum(), labelled[k] + b.sum()
    assert figures["testing_miou"] == pytest.approx(100 * (hit / union).mean(), abs=1e-9)
    assert figures["testing_macc"] == pytest.approx(100 * (hit / labelled).mean(), abs=1e-9)
    assert figures["testing_aacc"] == pytest.approx(100 * hit.sum() / labelled.sum(), abs=1e-9)


def test_metrics_of_one_and_two_processes_are_equal_to_the_last_digit(fork, photographs, tmp_path):
    """18 validation pairs of ADE20K under a random segmenter."""
    size = "--img_size 32 --patch_size 8 --encoder_embed_dim 64 --encoder_depth 4 --encoder_num_heads 2 --channels 64"
    more = f"{size} --num_classes 150 --iterations 1 --warmup_iterations 0 --eval_interval 1"
    data = photographs / "ade20k" / "ADEChallengeData2016"
    figures = main(parse_args(without(flags(data, tmp_path, None, more), "--epochs")))
    checkpoint = tmp_path / "run" / "last_checkpoint"
    evaluation = ["--path_to_data", str(data), "--path_to_backbone_checkpoint", str(checkpoint), "--eval_only"]
    evaluation += ["--working_directory", str(tmp_path), "--num_workers", "0", "--per_gpu_batch_size", "4"]
    fork("finetune_segmentation.py", evaluation, num_processes=2)
    record = json.loads((checkpoint / "evaluation.json").read_text())
    assert record == record | figures and record["num_images"] == 18


@pytest.fixture(scope="module")
def opinionated(tmp_path_factory) -> Path:
    """A segmenter for 32 x 24 pixels, not trained, whose answers change from place to place and are sure."""
    folder = tmp_path_factory.mktemp("opinionated")
    torch.manual_seed(0)
    config = MAEConfig(img_size=(32, 24), patch_size=4, encoder_embed_dim=32, encoder_depth=4, encoder_num_heads=2)
    model = ViTMAEForSegmentation(config, 4, channels=16)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=3.0)
    for module in model.modules():  # with the statistics of real maps, else one class has the most everywhere
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 24))
    save_file(model.state_dict(), folder / "model.safetensors")
    record = {
        "architecture": "ViTMAEForSegmentation", "config": dataclasses.asdict(config), "num_classes": 4,
        "ignore_zero": True, "class_names": ["rose", "leaf", "sea", "sand"], "resize_to": [70, 28],
        "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25],
        "taps": [0, 1, 2, 3], "channels": 16, "norm": "batch", "rel_pos_bias": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def evaluation_args(checkpoint: Path, data: Path, more: str = ""):
    given = ["--eval_only", "--path_to_backbone_checkpoint", str(checkpoint), "--path_to_data", str(data)]
    given += ["--working_directory", str(checkpoint / "work"), "--num_workers", "0", "--window_batch_size", "3"]
    return parse_args([*given, *shlex.split(more)])


@pytest.mark.parametrize("mode", ["", "--multi_scale", "--no-slide --flip"])
def test_eval_only_scores_and_records_the_mode_of_its_flags(opinionated, drawn_pairs, tmp_path, monkeypatch, mode):
    """On a root that has only the validation split, under the names that the checkpoint has."""
    checkpoint = shutil.copytree(opinionated, tmp_path / "checkpoint")
    for kind in ("images", "annotations"):
        shutil.copytree(drawn_pairs / kind / "validation", tmp_path / "data" / kind / "validation")
    answers, modes, predict = [], [], finetune_segmentation.predict

    def watch(model, images, *, normalize, **options):
        white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
        assert normalize(white).flatten().tolist() == pytest.approx([0.6 / 0.2, 0.5 / 0.3, 0.4 / 0.25])
        modes.append(options)
        answers.extend(predict(model, images, normalize=normalize, **options))
        return answers[-len(images) :]

    monkeypatch.setattr(finetune_segmentation, "predict", watch)
    figures = main(evaluation_args(checkpoint, tmp_path / "data", mode))
    expected = {name: f"--{name}" in mode for name in ("multi_scale", "flip")} | {"slide": "--no-slide" not in mode}
    expected |= {"resize_to": [70, 28]}
    assert all(used == used | expected | {"crop_size": (32, 24), "batch_size": 3} for used in modes)
    record = json.loads((checkpoint / "evaluation.json").read_text())
    assert record == record | expected | {"path_to_data": str(tmp_path / "data"), "num_images": 5} | figures
    names = [line.split("\t")[1] for line in (checkpoint / "per_class.tsv").read_text().splitlines()[1:]]
    assert names == ["rose", "leaf", "sea", "sand"]

    pairs, table = list_pairs(tmp_path / "data", "validation"), label_table(4, True)
    confusion = ConfusionMatrix(4, ignore_index=IGNORE_INDEX)
    for index, answer in enumerate(answers):
        confusion.update(torch.from_numpy(read_label_map(pairs.label_path(index), table)), answer)
    assert len(answers) == 5 and figures == confusion.figures()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num_classes 5", "--num_classes 5, but {} has 4; leave the flag out"),
        ("--img_size 32", "--img_size 32, but {} has (32, 24); leave the flag out"),
        ("--channels 32", "--channels 32, but {} has 16; leave the flag out"),
        ("--norm group", "--norm group, but {} has batch; leave the flag out"),
        ("--rel_pos_bias", "--rel_pos_bias True, but {} has False; leave the flag out"),
    ],
)
def test_eval_only_refuses_flags_that_contradict_the_segmenter(opinionated, flag, message, capsys):
    with pytest.raises(SystemExit):
        evaluation_args(opinionated, opinionated, flag)
    assert message.format(opinionated) in capsys.readouterr().err


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
        ("--num_classes 300", "--num_classes must be between 2 and 255, not 300"),
        ("--encoder_depth 5", "--encoder_depth 5, but"),
        ("--eval_only --from_scratch", "--eval_only judges weights"),
        ("--layer_decay 2", "--layer_decay must be between 0 and 1, not 2"),
        ("--iterations 0", "--iterations must be at least 1, not 0"),
        ("--num_classes 1", "--num_classes must be between 2 and 255, not 1, for one class before a background give 2"),
        ("--resize_to 512 2048", "--resize_to takes a long and a short side, not 512 2048"),
        ("--learning_rate -1", "--learning_rate must be between 0 and 1, not -1"),
        ("--img_size 4", "--img_size 4 is less than two patches of 4 a side"),
        ("--norm group --channels 32", "32 channels cannot be cut into 32 groups of two or more"),
    ],
)
def test_impossible_flags_are_refused_before_any_work(pretrained, more, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--path_to_data", "nowhere", "--path_to_backbone_checkpoint", str(pretrained), *shlex.split(more)])
    assert message in capsys.readouterr().err


def test_warmup_is_a_tenth_of_a_short_run_and_shorter_than_any(drawn_pairs, pretrained, tmp_path):
    args = parse_args(["--path_to_data", "nowhere", "--path_to_backbone_checkpoint", str(pretrained)])
    assert [choose_warmup(args, 10, steps) for steps in (5, 300, 14_990, 15_000, 20_000)] == [0, 30, 1499, 1500, 1500]
    args.warmup_iterations = 299
    assert choose_warmup(args, 10, 300) == 299
    args.warmup_epochs = 2.5  # counts, where both are given
    assert choose_warmup(args, 10, 300) == 25
    with pytest.raises(ValueError, match="a warmup of 8 steps leaves nothing of the run's 8; give less"):
        train(drawn_pairs, tmp_path, pretrained, "--warmup_iterations 8")
    assert not (tmp_path / "run").exists()


def test_warmup_of_a_fresh_run_is_no_jump_of_the_learning_rate(drawn_pairs, pretrained, tmp_path, capsys):
    experiment = train(drawn_pairs, tmp_path, pretrained, "--warmup_iterations 3 --log_interval 1")
    found = [row["learning_rate"] for row in rows(experiment)[:2]]
    assert found[1] > 1000 * found[0] and "jumps" not in capsys.readouterr().out


def test_class_names_come_from_a_file(drawn_pairs, tmp_path, capsys):
    file = tmp_path / "names.txt"
    file.write_text("rose\nleaf\n\n deep sea \nsand\n")
    size = "--img_size 8 --patch_size 4 --encoder_embed_dim 16 --encoder_depth 4 --encoder_num_heads 2 --channels 8"
    more = f"{size} --norm batch --epochs 1 --warmup_iterations 0 --class_names {file}"
    best = train(drawn_pairs, tmp_path, None, more) / "best_checkpoint"
    names = ["rose", "leaf", "deep sea", "sand"]
    assert [line.split("\t")[1] for line in (best / "per_class.tsv").read_text().splitlines()[1:]] == names
    assert json.loads((best / "config.json").read_text())["class_names"] == names
    file.write_text("rose\nleaf\nsea\n")
    with pytest.raises(SystemExit):
        parse_args(flags(drawn_pairs, tmp_path, None, more))
    assert f"--class_names {file} has 3 names for 4 classes" in capsys.readouterr().err


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
    with pytest.raises(ValueError, match=r"(?s)do not fit --num_classes 4.*  9 on 1 pixels .*, such as in 3\.png"):
        train(root, tmp_path, pretrained)
    with pytest.raises(ValueError, match=r"(?s)allowed are 0 to 4, 255.*  9 on 1 pixels .*, such as in 3\.png"):
        train(root, tmp_path, pretrained, "--ignore_zero")
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
    monkeypatch.setattr(training.data, "write_demo_data", few)
    short = ["--demo", "--epochs", "2", "--num_workers", "0", "--working_directory", str(tmp_path)]
    pretrain_mae.main(pretrain_mae.parse_args(short))
    figures = main(parse_args(short))
    assert figures["testing_aacc"] > 0
    names = (tmp_path / "demo_segmentation" / "best_checkpoint" / "per_class.tsv").read_text()
    assert all(name in names for name in ("sky", "land", "balloon", "tree"))


# -------------------------------------------------------------------------------- labels as people have them

SMALL = "--img_size 16 --patch_size 4 --encoder_embed_dim 16 --encoder_depth 4 --encoder_num_heads 2 --channels 8"
SHORT = f"{SMALL} --norm batch --epochs 1 --warmup_iterations 0 --eval_interval 1"


def draw_cells(root: Path, values: list, *, folders: tuple[str, str] = ("images", "masks"), suffix: str = "") -> None:
    """Draw bright cells on a dark ground, and their masks, whose values or colours are (background, cell)."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        image_folder, label_folder = (root / folder / split for folder in folders)
        for folder in (image_folder, label_folder):
            folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            cells = np.kron(generator.integers(0, 2, (3, 4)), np.ones((8, 8), dtype=int))
            noise = generator.integers(0, 60, (*cells.shape, 3))
            Image.fromarray((150 * cells[..., None] + noise).astype(np.uint8)).save(image_folder / f"{index}.png")
            Image.fromarray(np.array(values, dtype=np.uint8)[cells]).save(label_folder / f"{index}{suffix}.png")


def without_classes(arguments: list[str]) -> list[str]:
    return without(arguments, "--num_classes")


@pytest.mark.parametrize(
    ("values", "given"),
    [([0, 255], "0=background,255=cell"), ([[9, 0, 0], [0, 255, 0]], "#090000=background,#00ff00=cell")],
)
def test_masks_as_they_are_give_a_true_miou_and_the_names_to_all_tools(tmp_path, capsys, values, given):
    draw_cells(tmp_path / "data", values)
    arguments = without_classes(flags(tmp_path / "data", tmp_path, None, f"{SHORT} --label_values {given}"))
    figures = main(parse_args(arguments))
    printed = capsys.readouterr().out
    assert f"labels          {given.replace(',', ' ')}" in printed and "2 of 2 classes occur" in printed
    best = tmp_path / "run" / "best_checkpoint"
    record = json.loads((best / "config.json").read_text())
    assert record["class_names"] == ["background", "cell"] and record["num_classes"] == 2
    assert record["label_values"] == dict(part.split("=") for part in given.split(","))

    # The same figures from the label PNGs that tools/segment.py writes, which have the masks' own values
    tool, out = load_tool("segment"), tmp_path / "out"
    images = tmp_path / "data" / "images" / "val"
    tool.main(tool.parse_args(["--checkpoint", str(best), str(images), "--output", str(out)]))
    assert {line.split("%")[1].strip() for line in capsys.readouterr().out.splitlines() if "%" in line} <= {
        "background", "cell",
    }  # fmt: skip
    hit, union = np.zeros(2), np.zeros(2)
    for index in range(3):
        truth = np.array(Image.open(tmp_path / "data" / "masks" / "val" / f"{index}.png"))
        answer = np.array(Image.open(out / f"{index}_labels.png"))
        assert truth.shape == answer.shape
        for k, value in enumerate(values):
            a, b = ((x == value) if x.ndim == 2 else (x == value).all(axis=2) for x in (answer, truth))
            hit[k], union[k] = hit[k] + (a & b).sum(), union[k] + (a | b).sum()
    assert figures["testing_miou"] == pytest.approx(100 * (hit / union).mean(), abs=1e-9)

    evaluation = ["--eval_only", "--path_to_backbone_checkpoint", str(best), "--path_to_data", str(tmp_path / "data")]
    evaluation += ["--working_directory", str(tmp_path), "--num_workers", "0"]
    assert main(parse_args(evaluation)) == figures
    with pytest.raises(SystemExit):
        parse_args([*evaluation, "--label_values", "255=cell,0=background"])
    assert "the segmenter has background, cell. Give the same names in the same order" in capsys.readouterr().err


def test_choice_for_0_is_made_from_the_values_printed_and_kept_with_the_run(tmp_path, capsys):
    draw_cells(tmp_path / "data", [0, 1])
    arguments = flags(tmp_path / "data", tmp_path, None, f"{SHORT} --num_classes 2")
    main(parse_args(arguments))
    masks = [np.array(Image.open(path)) for path in (tmp_path / "data" / "masks" / "train").iterdir()]
    share = 1 - np.mean(masks)
    words = "and is a class, because no value reaches 2; --ignore_zero leaves it out"
    assert f"label value 0   0 covers {share:.1%} of the pixels {words}" in capsys.readouterr().out
    best = tmp_path / "run" / "best_checkpoint"
    record = json.loads((best / "config.json").read_text())
    assert record["ignore_zero"] is False and "label_values" not in record
    assert json.loads((tmp_path / "run" / "args.json").read_text())["ignore_zero"] is False
    assert (
        parse_args(["--eval_only", "--path_to_backbone_checkpoint", str(best), "--path_to_data", "x"]).ignore_zero
        is False
    )
    with pytest.raises(ValueError, match="only one of --num_classes 2 occurs"):  # although the survey is remembered
        main(parse_args([*arguments, "--experiment_name", "other", "--ignore_zero"]))
    draw_cells(tmp_path / "data", [1, 2])
    with pytest.raises(ValueError, match="ignore_zero: False in the checkpoint, True now"):
        main(parse_args([*arguments, "--resume_from_checkpoint", "latest"]))
    assert "0 does not occur and is ignored, because values reach 2: 1 to 2 are the classes" in capsys.readouterr().out


def test_values_that_are_not_listed_stop_the_run_before_it_begins(tmp_path, capsys):
    draw_cells(tmp_path / "data", [0, 255])
    arguments = without_classes(flags(tmp_path / "data", tmp_path, None, SHORT))
    with pytest.raises(ValueError, match=r"(?s)allowed are 0 to 1\. Found:\n  255 on .*255=ignore"):
        main(parse_args([*arguments, "--label_values", "0=background,1=cell"]))
    with pytest.raises(ValueError, match=r"255 is ignored\. .* give --label_values 0=NAME,255=NAME"):
        main(parse_args([*arguments, "--num_classes", "2"]))
    assert not (tmp_path / "run").exists()


def test_other_layouts_are_found_by_flags(tmp_path, capsys):
    draw_cells(tmp_path / "data", [0, 255], folders=("photos", "cells"), suffix="_mask")
    layout = "--image_folder photos --label_folder cells --label_suffix _mask --label_values 0=background,255=cell"
    main(parse_args(without_classes(flags(tmp_path / "data", tmp_path, None, f"{SHORT} {layout}"))))
    data = tmp_path / "data"
    assert (
        f"checking        6 pairs in {data}/photos/train, label maps in {data}/cells/train" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--label_values 0=a,1=b --num_classes 3", "--num_classes 3, but --label_values names 2 classes: a, b. Leave"),
        (
            "--label_values 0=a,1=b --no-ignore_zero",
            "which value is which class, and its name; leave --ignore_zero out",
        ),
        ("--label_values 0=a,1=b --class_names README.md", "leave --class_names out"),
        ("--label_values 0=a,1=", "--label_values has '1=', which is no VALUE=NAME"),
        ("--label_folder masks", "--label_folder masks says where label maps lie; give --image_folder, too"),
        ("--image_folder photos", "--image_folder photos says where images lie; give --label_folder, too, or --label"),
    ],
)
def test_label_flags_that_contradict_each_other_are_refused(pretrained, more, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--path_to_data", "x", "--path_to_backbone_checkpoint", str(pretrained), *shlex.split(more)])
    assert message in capsys.readouterr().err


def test_broken_validation_image_stops_the_run_before_it_trains_or_in_its_first_epoch(drawn_pairs, tmp_path):
    size = "--patch_size 4 --encoder_embed_dim 64 --encoder_depth 4 --encoder_num_heads 2"
    root = shutil.copytree(drawn_pairs, tmp_path / "pairs")
    image = root / "images" / "validation" / "4.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])  # its head is as it should be
    with pytest.raises(ValueError, match=r"cannot decode .*4\.jpg"):
        train(root, tmp_path, None, f"{size} --log_interval 1")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]  # of the two steps of an epoch
    image.write_text("no picture")
    with pytest.raises(ValueError, match=r"4\.jpg: UnidentifiedImageError"):
        train(root, tmp_path / "other", None, size)
    assert not (tmp_path / "other" / "run" / "log.jsonl").exists()


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
        expected = label_images(model, [image], args)[0].numpy() + 1
    assert np.array_equal(np.array(Image.open(output / "a_labels.png")), expected)
    with pytest.raises(FileExistsError, match="--overwrite"):
        tool.main(tool.parse_args(arguments))
    (folder / "text.jpg").write_text("no picture")
    capsys.readouterr()
    assert tool.main(tool.parse_args([*arguments, "--overwrite"])) == 1
    assert f"cannot decode {folder / 'text.jpg'}" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"no image or folder at .*absent\.jpg$"):
        absent = str(tmp_path / "absent.jpg")
        tool.main(tool.parse_args([absent if argument == str(folder) else argument for argument in arguments]))
    with pytest.raises(SystemExit):
        tool.parse_args([*arguments, "--batch_size", "0"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_class_names_are_read_with_and_without_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "names.txt").write_text("background\nStraße\n", encoding=encoding)
    assert name_classes(str(tmp_path / "names.txt"), 2, True) == ["background", "Straße"]


# -------------------------------------------------------------------------------- other losses, weights of classes


def drawn_maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Coarse scores of 4 classes and labels of 3 of them for two images, a part of one and all of no row ignored."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 15, 18), generator=generator)
    labels[0, :4] = IGNORE_INDEX
    return scores, labels


def loss_by_hand(scores: torch.Tensor, labels: torch.Tensor, kind: str, class_weights: list[float] | None) -> float:
    """Numpy, pixel by pixel: sums over labelled pixels / all pixels; Dice of each image, then the mean."""
    large = F.interpolate(scores, labels.shape[-2:], mode="bilinear", align_corners=False).numpy()
    total, dice = 0.0, []
    for image, truth in zip(large, labels.numpy(), strict=True):
        p = np.exp(image) / np.exp(image).sum(axis=0)
        for y, x in np.argwhere(truth != IGNORE_INDEX):
            own, k = p[truth[y, x], y, x], truth[y, x]
            factor = (1 - own) ** 2 if "focal" in kind else 1
            total -= factor * np.log(own) * (class_weights[k] if class_weights else 1)
        counted, found = truth != IGNORE_INDEX, []
        for k in np.unique(truth[counted]):
            a, b = p[k][counted], (truth[counted] == k).astype(float)
            found.append(2 * (a * b).sum() / ((a**2).sum() + (b**2).sum()))
        dice.append(1 - np.mean(found))
    pixels = 0 if kind == "dice" else total / labels.numel()
    return pixels + (np.mean(dice) if "dice" in kind else 0)


@pytest.mark.parametrize("class_weights", [None, [0.5, 2.0, 0.0, 1.0]])
@pytest.mark.parametrize("kind", finetune_segmentation.LOSSES)
def test_losses_equal_numpy_by_hand_and_accumulated_passes_add_up(kind, class_weights):
    scores, labels = drawn_maps()
    given = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
    loss = compute_loss(scores, labels, kind, given)
    assert loss.item() == pytest.approx(loss_by_hand(scores, labels, kind, class_weights), rel=1e-9)
    halves = [compute_loss(scores[i : i + 1], labels[i : i + 1], kind, given).item() for i in range(2)]
    assert sum(halves) / 2 == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("kind", finetune_segmentation.LOSSES)
def test_losses_have_the_gradients_of_finite_differences_and_none_without_labels(kind):
    scores, labels = drawn_maps()
    scores, weights_of = scores[:, :, :2, :2].clone().requires_grad_(), torch.tensor([0.5, 2.0, 0.3, 1.0]).double()
    assert torch.autograd.gradcheck(lambda x: compute_loss(x, labels[:, :6, :6], kind, weights_of), scores)
    empty = torch.full_like(labels, IGNORE_INDEX)
    loss = compute_loss(scores, empty, kind, weights_of)
    loss.backward()
    assert loss.item() == 0 and not scores.grad.any()


def test_run_with_dice_and_weights_from_the_label_maps_is_the_same_resumed_and_on_two_processes(
    fork, drawn_pairs, pretrained, tmp_path, capsys
):
    more = "--loss cross_entropy+dice --class_weights balanced --epochs 2 --save_checkpoint_interval 1 --channels 64"
    whole = train(drawn_pairs, tmp_path / "whole", pretrained, more)
    pixels = np.zeros(4)
    for index in range(10):
        labels = read_label_map(drawn_pairs / "annotations" / "training" / f"{index}.png", label_table(4, True))
        pixels += np.bincount(labels.ravel(), minlength=256)[:4]
    balanced = pixels.sum() / (4 * pixels)
    ends = [f"{balanced[k]:.3g} (class {k})" for k in (balanced.argmin(), balanced.argmax())]
    assert f"class weights   {' to '.join(ends)}" in capsys.readouterr().out
    shutil.copytree(whole / "checkpoint_1", tmp_path / "resumed" / "run" / "checkpoint_1")
    resumed = train(drawn_pairs, tmp_path / "resumed", pretrained, f"{more} --resume_from_checkpoint latest")
    assert_close(weights(resumed / "checkpoint_2"), weights(whole / "checkpoint_2"), atol=0)
    halves = flags(drawn_pairs, tmp_path / "spread", pretrained, f"{more} --per_gpu_batch_size 2")
    fork("finetune_segmentation.py", halves, num_processes=2)
    losses = [[row["training_loss"] for row in rows(run)] for run in (tmp_path / "spread" / "run", whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--loss dice --class_weights balanced", "dice counts every class alike: leave them out"),
        ("--class_weights 1 2 x 3", "--class_weights 1 2 x 3: give none, balanced, a number for each class"),
        ("--test_split validation", "--test_split validation: after a training, another split than"),
        ("--eval_only --test_split test", "--test_split test: after a training, another split than"),
    ],
)
def test_impossible_losses_and_splits_are_refused_before_any_work(finished, more, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags(finished, finished, finished / "last_checkpoint", more))
    assert message in capsys.readouterr().err


def test_number_of_class_weights_is_checked_before_training(drawn_pairs, pretrained, tmp_path):
    with pytest.raises(ValueError, match="--class_weights has 3 numbers, but there are 4 classes; give as many"):
        train(drawn_pairs, tmp_path, pretrained, "--class_weights 1 2 3")
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------- what is said of the best weights


def evaluation_of(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def test_evaluation_in_the_run_is_what_eval_only_says_of_the_best_weights(finished, drawn_pairs, tmp_path, capsys):
    best = shutil.copytree(finished / "best_checkpoint", tmp_path / "best")
    figures = main(parse_args(flags(drawn_pairs, tmp_path, best, "--eval_only")))
    first, again = json.loads((best / "evaluation_1.json").read_text()), evaluation_of(best)
    assert first == {k: again[k] for k in first} | {"weights": first["weights"]}
    assert first["chose_best_checkpoint"] is True and figures.items() <= again.items()
    assert "best_checkpoint was chosen by its score on 5 pairs in" in capsys.readouterr().out
    for name in ("per_class", "confusion"):
        assert (best / f"{name}.tsv").read_text() == (best / f"{name}_1.tsv").read_text()
    matrix = [line.split("\t") for line in (best / "confusion.tsv").read_text().splitlines()]
    table = [line.split("\t") for line in (best / "per_class.tsv").read_text().splitlines()]
    counts = np.array([row[1:] for row in matrix[1:]], dtype=float)
    hit, true, named = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    scores = {"iou": hit / (true + named - hit), "acc": hit / true, "dice": 2 * hit / (true + named)}
    scores["precision"] = hit / np.maximum(named, 1)
    for name, values in scores.items():
        column = [float(row[table[0].index(name)]) for row in table[1:]]
        assert column == pytest.approx(100 * values, abs=0.01)
        assert figures[f"testing_m{name}"] == pytest.approx(100 * values.mean())
    last = shutil.copytree(finished / "last_checkpoint", tmp_path / "last")
    main(parse_args(flags(drawn_pairs, tmp_path, last, "--eval_only")))
    assert evaluation_of(last)["chose_best_checkpoint"] is False


def test_best_weights_are_scored_once_on_a_split_of_their_own(fork, drawn_pairs, pretrained, tmp_path):
    """As eval_only scores these pairs; again by two processes, where the first end came before the test."""
    data = shutil.copytree(drawn_pairs, tmp_path / "data")
    for kind in ("images", "annotations"):
        (data / kind / "test").mkdir()
        for index in (0, 3, 7):
            name = f"{index}.{'jpg' if kind == 'images' else 'png'}"
            shutil.copy(drawn_pairs / kind / "training" / name, data / kind / "test" / name)
    more = "--epochs 1 --warmup_iterations 0 --test_split test"
    figures = main(parse_args(flags(data, tmp_path, pretrained, more)))
    best = tmp_path / "run" / "best_checkpoint"
    found = {k: v for k, v in evaluation_of(best).items() if k.startswith("test_") and isinstance(v, int | float)}
    assert found.items() <= figures.items() and found["test_num_images"] == 3
    alone = tmp_path / "alone"
    for kind in ("images", "annotations"):
        shutil.copytree(data / kind / "test", alone / kind / "validation")
    copy = shutil.copytree(best, tmp_path / "copy")
    again = main(parse_args(flags(alone, tmp_path, copy, "--eval_only")))
    assert found == {k.replace("testing_", "test_"): v for k, v in again.items()} | {"test_num_images": 3}
    assert (best / "test_confusion.tsv").read_text() == (copy / "confusion.tsv").read_text()
    assert evaluation_of(copy)["chose_best_checkpoint"] is False

    before = (best / "evaluation.json").read_bytes()
    resumed = flags(data, tmp_path, pretrained, f"{more} --resume_from_checkpoint latest --per_gpu_batch_size 2")
    fork("finetune_segmentation.py", resumed, num_processes=2)
    assert (best / "evaluation.json").read_bytes() == before and not (best / "test_confusion_1.tsv").exists()
    without_test = {k: v for k, v in evaluation_of(best).items() if not k.startswith("test_")}
    (best / "evaluation.json").write_text(json.dumps(without_test))
    fork("finetune_segmentation.py", resumed, num_processes=2)
    assert evaluation_of(best) == json.loads(before)
