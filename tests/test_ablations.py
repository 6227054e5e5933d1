"""The study of benchmarks/ablations.py: every row is a command that the scripts take, and the comparison of orders."""

import importlib
import json
import sys

import pytest
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file

import finetune_classifier
import pretrain_mae


@pytest.fixture
def ablations(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("ablations")
    for name in ("ablations", "pretraining_helps", "measure"):
        sys.modules.pop(name, None)


def test_every_row_is_taken_by_both_scripts_and_no_two_rows_train_the_same(ablations, tmp_path):
    folder = ["--path_to_data", str(tmp_path), "--working_directory", str(tmp_path)]
    configs, weights = set(), tmp_path / "weights"
    weights.mkdir()
    save_file({}, weights / "model.safetensors")  # parsing looks at the sizes alone
    for rows in ablations.TABLES.values():
        for row in rows:
            args = pretrain_mae.parse_args([*ablations.PRETRAINING, *row.flags.split(), *folder])
            sizes = pretrain_mae.build_config(args)
            configs.add((row.flags, sizes, args.masking, args.mask_ratio, args.augmentation))
            record = {"architecture": "ViTMAEForPreTraining", "config": sizes.as_record(decoder=True)}
            (weights / "config.json").write_text(json.dumps(record))
            start = ["--path_to_pretrained_mae_weights", str(weights), "--epochs", "5", *folder]
            finetune_classifier.parse_args([*ablations.FINETUNING, *row.finetuning_flags.split(), *start])
    assert len({config[1:] for config in configs}) == len(configs) == 27
    assert sum(map(len, ablations.TABLES.values())) == 39


def test_pairs_in_another_order_than_the_papers_are_named(ablations):
    rows = [ablations.Row(name) for name in "abc"]
    ours = [[50.0, 52.0], [51.0, 53.0], [40.0, 41.0]]
    assert ablations.compare_order(rows, [84.9, 84.8, 84.0], ours, 1.0) == ["a / b (by 1.00, within the seeds' spread)"]
    assert ablations.compare_order(rows, [84.0, 84.8, 84.9], ours, 1.0) == ["c / a (by 10.50)", "c / b (by 11.50)"]
    assert ablations.compare_order(rows, [84.9, 84.9, None], [*ours[:2], [0.0]], 1.0) == []
    assert ablations.show([50.0, 52.0]) == "51.00 (50.00 to 52.00)"


def test_the_default_row_has_its_own_seeds_and_figures_become_pictures(ablations, tmp_path, monkeypatch, capsys):
    started = []

    def score(folder, script, name, epochs, flags, launch):
        assert launch == ["--mixed_precision", "no"]
        started.append(name)
        seed = int(name[-1])
        return {"testing_top1_acc": 50.0 + seed, "knn_top1_acc": 30.0 + seed, "testing_loss": 0.5}

    monkeypatch.setattr(ablations, "run", score)
    flags = ["--path_to_data", "data", "--working_directory", str(tmp_path), "--tables", "1c", "figure 9"]
    ablations.main(ablations.parse_args([*flags, "--default_seeds", "0", "1", "2"]))
    assert sorted(started) == sorted(
        [f"{kind}_default_seed{seed}" for kind in ("pretrained", "finetuned", "linear") for seed in range(3)]
        + [f"{kind}_encode_mask_tokens_seed0" for kind in ("pretrained", "finetuned", "linear")]
        + [f"finetuned_finetune_blocks_{blocks}_seed0" for blocks in ("0", "0.5", "1", "2", "4", "6")]
    )
    printed = capsys.readouterr().out
    scores = "51.00 (50.00 to 52.00) | 51.00 (50.00 to 52.00) | 31.00 (30.00 to 32.00)"
    assert f"| encoder without mask tokens | 84.9 | 73.5 | {scores} | 0.5000 (0.5000 to 0.5000) |" in printed
    assert "1 blocks finetuned / 0.5 blocks finetuned (by 0.00, within the seeds' spread)" in printed
    with Image.open(tmp_path / "figure_9.png") as picture:
        assert len(picture.getcolors(1 << 16)) > 4
