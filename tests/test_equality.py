"""One process, accumulation, two processes, and one that goes on where two stopped make the same run, in each script.

All random draws are on. The runs are in double precision (see in_float64.py), of 50 optimizer steps with --full and
else of a dozen; in single precision tests/test_pretrain_mae.py and its neighbours compare them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import launch, rows
from safetensors.torch import load_file

COMMON = """--experiment_name run --num_workers 0 --log_interval 5 --img_size 16 --patch_size 4 --encoder_embed_dim 64
 --encoder_num_heads 4 --encoder_mlp_ratio 2 --gradient_accumulation_steps 1"""
SCRIPTS = {
    "pretrain_mae": """--encoder_depth 2 --decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2
        --warmup_epochs 1 --base_learning_rate 0.2""",
    "finetune_classifier": """--encoder_depth 2 --drop_path 0.5 --random_erasing 0.5 --layer_decay 0.75 --ema_decay 0.9
        --warmup_epochs 1 --learning_rate 5e-3 --eval_interval 25""",
    # Group norm, because synchronised batch norm exists on GPUs alone: on the CPU each process has statistics of its
    # own, and two processes are another run than one.
    "finetune_segmentation": """--encoder_depth 4 --from_scratch --norm group --num_classes 4 --channels 128
        --drop_path 0.3 --taps 0 1 2 3 --warmup_iterations 5 --learning_rate 5e-4 --eval_interval 25""",
}


def run(script: str, folder: Path, runs: list[str], num_processes: int) -> None:
    (folder / "flags.json").write_text(json.dumps([flags.split() for flags in runs]))
    launch("tests/in_float64.py", [script, str(folder / "flags.json")], num_processes=num_processes)


@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_do_not_depend_on_processes_nor_accumulation(script, drawn_images, drawn_pairs, tmp_path, request):
    data, steps_per_epoch = (drawn_pairs, 2) if "segmentation" in script else (drawn_images, 6)
    num_steps = 50 if request.config.getoption("--full") else 12
    epochs = -(-num_steps // steps_per_epoch)
    epoch = epochs // 2  # from whose checkpoint one process goes on alone
    flags = f"{COMMON} {SCRIPTS[script]} --epochs {epochs} --save_checkpoint_interval {epoch} --path_to_data {data}"
    whole, half = (f"{flags} --per_gpu_batch_size {size}" for size in (4, 2))
    one, sums, two, resumed = (tmp_path / name for name in ("one", "sums", "two", "resumed"))

    run(script, tmp_path, [f"{half} --working_directory {two}"], num_processes=2)
    shutil.copytree(two / "run" / f"checkpoint_{epoch}", resumed / "run" / f"checkpoint_{epoch}")
    accumulated = f"{whole} --gradient_accumulation_steps 2 --working_directory"
    others = [f"{accumulated} {sums}", f"{accumulated} {resumed} --resume_from_checkpoint latest"]
    run(script, tmp_path, [f"{whole} --working_directory {one}", *others], num_processes=1)

    expected = load_file(one / "run" / "last_checkpoint" / "model.safetensors")
    assert rows(one / "run")[-1]["step"] >= num_steps
    for other in (sums, two, resumed):
        found = load_file(other / "run" / "last_checkpoint" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert {value.dtype for value in found.values()} == {torch.float64}
        difference, name = max(((found[name] - value).abs().max().item(), name) for name, value in expected.items())
        print(f"{script}, {other.name}: largest difference {difference:.1e}, in {name}")
        assert difference < 1e-6
    rates = [{row["step"]: row["learning_rate"] for row in rows(work / "run")} for work in (one, sums, two)]
    assert rates[0] == rates[1] == rates[2]
