r"""Does `--recipe small` suit small data? Pretrain and finetune on 500 and on 3,000 photographs, from three starts.

    python benchmarks/small_data.py --path_to_data IMAGENETTE --working_directory work_dir/small_data

`small` is the recipe; `defaults` is the scripts' default recipe with model, batch, epochs and learning rate scaled by
hand; `init_from` is the recipe from a checkpoint that was pretrained on 1,000 other photographs. At 64 pixels with
patches of 16 and fewer steps than the recipe has, which would take hours each on a CPU. Hours on two cores as it is;
started again, it goes on where it was. Ends with the table of benchmarks/RESULTS.md.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from measure import print_table
from pretraining_helps import run, run_all

SIZE = ["--img_size", "64", "--patch_size", "16"]
MODEL = "mae_vit_tiny_patch16"  # the recipe's
OTHERS, OTHER_EPOCHS = 1000, 100
RATE = 2e-3  # finetuning's default, meant for a batch of 256


class Subset(NamedTuple):
    """How long a subset of photographs is trained on; batches are those that the recipe chooses."""

    pretraining_epochs: int
    pretraining_batch: int
    epochs: int
    batch: int


SUBSETS = {500: Subset(160, 64, 20, 32), 3000: Subset(20, 128, 4, 128)}
STARTS = ("small", "defaults", "init_from")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path_to_data", type=Path, required=True, help="train/ and val/ with class folders")
    parser.add_argument("--working_directory", type=Path, required=True, help="where all runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    parser.add_argument("--rates", nargs="+", default=["1e-3"], help="other --base_learning_rate of small, first seed")
    parser.add_argument("--at_once", type=int, default=2, help="runs side by side, one thread each (default: 2)")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ data


def link_subsets(args: argparse.Namespace) -> None:
    """Lay out links to as many images of every class as a subset has, and to others that none of them has."""
    classes = sorted(folder for folder in (args.path_to_data / "train").iterdir() if folder.is_dir())
    for folder in classes:
        images = sorted(folder.iterdir())
        parts = {number: images[: number // len(classes)] for number in SUBSETS}
        parts[OTHERS] = images[-(OTHERS // len(classes)) :]
        if len(images) < (max(SUBSETS) + OTHERS) // len(classes):
            raise SystemExit(f"{folder} has {len(images)} images, too few; Imagenette's ten classes have enough")
        for number, chosen in parts.items():
            split = data_folder(args, number) / "train" / folder.name
            split.mkdir(parents=True, exist_ok=True)
            for image in chosen:
                if not (split / image.name).is_symlink():
                    (split / image.name).symlink_to(image.resolve())
    for number in (*SUBSETS, OTHERS):
        if not (data_folder(args, number) / "val").is_symlink():
            (data_folder(args, number) / "val").symlink_to((args.path_to_data / "val").resolve())


def data_folder(args: argparse.Namespace, number: int) -> Path:
    return args.working_directory / f"photographs_{number}"


# ------------------------------------------------------------------------------------------------ runs


def pretrain(args: argparse.Namespace, start: str, number: int, seed: int, rate: str = "1e-3") -> dict:
    """Pretrain on a subset, or on the others, and give the last row, with the k-NN probe's score."""
    epochs, batch = SUBSETS[number][:2] if number in SUBSETS else (OTHER_EPOCHS, 64)
    flags = ["--path_to_data", str(data_folder(args, number)), "--seed", str(seed), "--probe_every", str(epochs)]
    flags += ["--per_gpu_batch_size", str(batch), *SIZE]
    if start == "defaults":
        flags += ["--model", MODEL, "--gradient_accumulation_steps", "1"]
    else:
        flags += ["--recipe", "small", "--base_learning_rate", rate]
    if start == "init_from":
        flags += ["--init_from", str(args.working_directory / name_pretraining("small", OTHERS, args.seeds[0]))]
    return run(args.working_directory, "pretrain_mae.py", name_pretraining(start, number, seed, rate), epochs, flags)


def name_pretraining(start: str, number: int, seed: int, rate: str = "1e-3") -> str:
    return f"pretrained_{start}_{number}_rate{rate}_seed{seed}"


def finetune(args: argparse.Namespace, start: str, number: int, seed: int) -> dict:
    """Finetune what was pretrained on a subset on its classes, and give the row of the last evaluation."""
    _, _, epochs, batch = SUBSETS[number]
    flags = ["--path_to_data", str(data_folder(args, number)), "--seed", str(seed), "--per_gpu_batch_size", str(batch)]
    flags += ["--path_to_pretrained_mae_weights", str(args.working_directory / name_pretraining(start, number, seed))]
    flags += ["--learning_rate", f"{RATE * batch / 256:g}"] if start == "defaults" else ["--recipe", "small"]
    return run(args.working_directory, "finetune_classifier.py", f"{start}_{number}_seed{seed}", epochs, flags)


def main(args: argparse.Namespace) -> None:
    link_subsets(args)
    probed, scored = {}, {}
    run_all(args, pretrain, [("small", OTHERS, args.seeds[0])])
    for seed in args.seeds:  # all of the first seed come first
        runs = [(start, number, seed) for number in SUBSETS for start in STARTS]
        probed |= run_all(args, pretrain, runs)
        scored |= run_all(args, finetune, runs)
    rows = []
    for number in SUBSETS:
        for start in STARTS:
            runs = [(start, number, seed) for seed in args.seeds]
            cells = [f"{probed[a_run]['knn_top1_acc']:.2f}" for a_run in runs]
            rows.append([str(number), start, *cells, *(f"{scored[a_run]['testing_top1_acc']:.2f}" for a_run in runs)])
    header = [f"{what}, seed {seed}" for what in ("k-NN", "finetuned") for seed in args.seeds]
    print_table("top-1 on the held-out images, in percent", ["images", "start", *header], rows)

    tried = [("small", number, args.seeds[0], rate) for number in SUBSETS for rate in args.rates]
    found, rows = run_all(args, pretrain, tried), []
    for number in SUBSETS:
        scores = (f"{found['small', number, args.seeds[0], rate]['knn_top1_acc']:.2f}" for rate in args.rates)
        rows.append([str(number), *scores])
    print_table("k-NN top-1 of small, in percent, by base learning rate", ["images", *args.rates], rows)


if __name__ == "__main__":
    main(parse_args())
