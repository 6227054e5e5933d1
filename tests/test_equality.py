"""One process, accumulation, two processes, and one that goes on where two stopped make the same run, in each script.
Also what else all three do alike: which weights decay, and what is copied from pinned memory.

All random draws are on. The runs are in double precision, of 50 optimizer steps with --full and else of a dozen. In
single precision, in which the tests of each script compare such runs, they drift apart by rounding, which Adam scales
up wherever a true gradient is near zero.
"""

import importlib
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import rows
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from dataset import StepSampler

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


# What the paper compares in table 1, each value of each flag once
VARIANTS = [
    "--masking block --target pca --encode_mask_tokens --augmentation random_crop_jitter",
    "--masking grid --target pixels --augmentation fixed_crop",
    "--augmentation none --target normalized_pixels",
]


@pytest.mark.parametrize(
    "script, more", [*((name, "") for name in SCRIPTS), *(("pretrain_mae", flags) for flags in VARIANTS)]
)
def test_runs_do_not_depend_on_processes_nor_accumulation(
    script, more, fork, drawn_images, drawn_pairs, tmp_path, request
):
    data, steps_per_epoch = (drawn_pairs, 2) if "segmentation" in script else (drawn_images, 6)
    num_steps = 50 if request.config.getoption("--full") else 12
    epochs = -(-num_steps // steps_per_epoch)
    epoch = epochs // 2  # from whose checkpoint one process goes on alone
    flags = (
        f"{COMMON} {SCRIPTS[script]} {more} --epochs {epochs} --save_checkpoint_interval {epoch} --path_to_data {data}"
    )
    whole, half = (f"{flags} --per_gpu_batch_size {size}" for size in (4, 2))
    one, sums, two, resumed = (tmp_path / name for name in ("one", "sums", "two", "resumed"))

    def run(flags: str, work: Path, num_processes: int = 1) -> None:
        arguments = [*shlex.split(flags), "--working_directory", str(work)]
        fork(script, arguments, ("in_float64", {}), num_processes=num_processes)

    run(half, two, num_processes=2)
    shutil.copytree(two / "run" / f"checkpoint_{epoch}", resumed / "run" / f"checkpoint_{epoch}")
    run(whole, one)
    run(f"{whole} --gradient_accumulation_steps 2", sums)
    run(f"{whole} --gradient_accumulation_steps 2 --resume_from_checkpoint latest", resumed)

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


class Reached(Exception):  # noqa: N818 - it is no error
    """Ends a run where a test has seen enough of it, and carries that."""


def parsed(script: str, data: Path, work: Path, more: str):
    flags = f"{COMMON} {SCRIPTS[script]} --epochs 10 --per_gpu_batch_size 4 --path_to_data {data} {more}"
    module = importlib.import_module(script)
    return module, module.parse_args([*shlex.split(flags), "--working_directory", str(work)])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "more", ["", "--bias_weight_decay", "--norm_weight_decay", "--bias_weight_decay --norm_weight_decay"]
)
def test_biases_and_norms_decay_where_the_flags_say_so(script, more, drawn_images, drawn_pairs, tmp_path, monkeypatch):
    class Recorder(torch.optim.AdamW):
        def __init__(self, groups, **options):
            super().__init__(groups, **options)
            raise Reached(self.param_groups)

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    data = drawn_pairs if "segmentation" in script else drawn_images
    module, args = parsed(script, data, tmp_path, f"{more} --weight_decay 0.3")
    with pytest.raises(Reached) as reached:
        module.main(args)
    decays = {"norm": set(), "bias": set(), "other": set()}
    for group in reached.value.args[0]:
        for parameter in group["params"]:
            # At the start, weights of norms are ones; what else has one dimension is a bias.
            kind = "other" if parameter.ndim > 1 else "norm" if parameter.eq(1).all() else "bias"
            decays[kind].add(group["weight_decay"])
    assert decays["bias"] == {0.3 if "bias" in more else 0.0}
    assert decays["norm"] == {0.3 if "norm" in more else 0.0}
    assert 0.3 in decays["other"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("more", ["", "--no-pin_memory"])
def test_batches_are_copied_from_pinned_memory_on_a_gpu_unless_the_flag_says_no(
    script, more, drawn_images, drawn_pairs, tmp_path, monkeypatch
):
    def build(self, *_, batch_sampler=None, pin_memory=False, **options):
        if isinstance(batch_sampler, StepSampler):
            raise Reached(pin_memory)
        original(self, *_, batch_sampler=batch_sampler, pin_memory=pin_memory, **options)

    original = DataLoader.__init__
    monkeypatch.setattr(DataLoader, "__init__", build)
    monkeypatch.setattr(Accelerator, "device", torch.device("cuda"))
    data = drawn_pairs if "segmentation" in script else drawn_images
    module, args = parsed(script, data, tmp_path, more)
    with pytest.raises(Reached) as reached:
        module.main(args)
    assert reached.value.args == (more == "",)
