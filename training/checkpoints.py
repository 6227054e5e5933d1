"""States of a run: chosen, written whole or not at all, and loaded again. How they are found is states.py's."""

import argparse
import json
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from storage.files import (
    checksum_of,
    optional_write,
    publish,
    read_json,
    recover,
    remove,
    rename_aside,
    rename_damaged,
    rename_irregular,
    write_json,
    written_whole,
)
from training.differences import refuse_differences
from training.process import SHARDING
from training.states import (
    BEST_CHECKPOINT,
    CHECKPOINT_NAME,
    LAST_CHECKPOINT,
    MANIFEST_FILE,
    STATE_FILE,
    checkpoint_order,
    find_checkpoint,
    find_checkpoints,
    find_damage,
    newest_whole_checkpoint,
    read_state,
)

DONE_FILE, AVERAGE_FILE = "DONE", "ema.safetensors"
WEIGHTS_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.bin"  # Accelerate's, of a run that is not sharded
MAX_FAILED_SAVES = 3  # in a row, then the run stops
SPACE_FACTOR = 1.2  # free space that a save wants, in sizes of the one before
# What a full or broken disk raises: torch reports it as a RuntimeError, safetensors with an error of its own.
SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)
# What torch and safetensors raise for files that are damaged, or that would run code, under a manifest made to fit.
LOAD_ERRORS = (*SAVE_ERRORS, ValueError, TypeError, LookupError, AttributeError, EOFError, pickle.UnpicklingError)

# ------------------------------------------------------------------------------------------------ choosing one


class Start(NamedTuple):
    """Where a run keeps its files, the checkpoint it goes on from, if any, and the newer ones that are damaged."""

    experiment: Path
    resume_from: Path | None
    damaged: list[Path]


def open_experiment(accelerator: Accelerator, args: argparse.Namespace) -> Start:
    """Choose what to go on from; every process calls this, the main one reads the disk for all.

    Without --resume_from_checkpoint, existing checkpoints are never trained over: FileExistsError. 'latest' is a
    fresh start where there is none, and else the newest whose files are as its manifest says; ValueError where all
    are damaged, or the one that was asked for is. Raises alike on every process.
    """
    found: list = [None]
    if accelerator.is_main_process:
        try:
            found = [choose_start(args)]
        except (ValueError, OSError) as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    start: Start = found[0]
    if start.resume_from is not None and not start.resume_from.is_dir():
        raise FileNotFoundError(
            f"process {accelerator.process_index} cannot see {start.resume_from}, which the first process chose: "
            "--working_directory has to be on a disk that all machines share"
        )
    return start


def choose_start(args: argparse.Namespace) -> Start:
    experiment = Path(args.working_directory) / args.experiment_name
    existing, name, damaged = find_checkpoints(experiment), args.resume_from_checkpoint, []
    if name is None and existing:
        raise FileExistsError(
            f"{experiment} already holds {len(existing)} checkpoints. Add --resume_from_checkpoint latest to go on "
            "with that run, or choose another --experiment_name to start a new one"
        )
    if name is None or (name == "latest" and not existing):
        return Start(experiment, None, [])
    if name == "latest":
        folder, damaged = newest_whole_checkpoint(existing)
    else:
        folder = find_checkpoint(experiment, name)
        if damage := find_damage(folder):
            raise ValueError(f"--resume_from_checkpoint {folder} is damaged: {damage}. 'latest' takes a whole one")
        if newer := [other for other in existing if checkpoint_order(other) > checkpoint_order(folder)]:
            raise FileExistsError(
                f"going on from {folder} would train over {newer[-1]}. Resume from 'latest', or give "
                f"--resume_from_checkpoint {folder} with another --experiment_name"
            )
    epoch = read_state(folder)["epoch"]
    if args.epochs is not None and epoch > args.epochs:
        raise ValueError(f"{folder} has {epoch} epochs behind it, more than --epochs {args.epochs}")
    return Start(experiment, folder, damaged)


def tidy(experiment: Path) -> None:
    """Undo what a kill in the middle of a save left: half folders go, a best checkpoint renamed aside comes back."""
    recover(experiment / BEST_CHECKPOINT)
    for half in (*experiment.glob("*checkpoint*.tmp"), *experiment.glob("*.unfinished.tmp")):
        remove(half)


def take_over(start: Start) -> None:
    """Clear the folder, once it is held, of what a kill left: damaged checkpoints that were passed over are renamed.

    BlockingIOError when another run has written a checkpoint since this one looked.
    """
    experiment, resume_from, damaged = start
    tidy(experiment)
    rename_irregular(experiment / DONE_FILE)
    (experiment / DONE_FILE).unlink(missing_ok=True)
    for folder in filter(Path.exists, damaged):
        rename_damaged(folder, find_damage(folder), "passed over")
    newest = find_checkpoints(experiment)[-1:]
    if newest and (resume_from is None or checkpoint_order(newest[0]) > checkpoint_order(resume_from)):
        raise BlockingIOError(f"another run has just written {newest[0]}; start this one again")
    if newest and resume_from.samefile(newest[0]) and CHECKPOINT_NAME.fullmatch(newest[0].name):
        with optional_write(experiment / LAST_CHECKPOINT):  # a kill right after the save left the older one
            point_last_checkpoint(newest[0])


# ------------------------------------------------------------------------------------------------ writing them


def check_weights(accelerator: Accelerator, model: nn.Module, experiment: Path, step: int) -> None:
    """Raise FloatingPointError if a weight or a running statistic of any process is not finite; every process calls."""
    tensors = [getattr(tensor, "to_local", lambda t=tensor: t)() for tensor in (*model.parameters(), *model.buffers())]
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
    if accelerator.reduce(finite.int(), "sum").item() < accelerator.num_processes:
        advice = advise_on_nonfinite(experiment)
        raise FloatingPointError(f"the weights are not finite at step {step}, and not saved. {advice}")


def advise_on_nonfinite(experiment: Path) -> str:
    """Say what to do with a run whose numbers are no longer finite."""
    checkpoints = find_checkpoints(experiment)
    last = f"Go on from {checkpoints[-1]}" if checkpoints else "There is no checkpoint: start again"
    return f"{last} with a lower learning rate, --max_grad_norm 1, or bf16 instead of fp16"


def point_last_checkpoint(folder: Path) -> None:
    """Make last_checkpoint the link to this one; a folder of that name, or a link elsewhere, is renamed aside."""
    last, link = (folder.with_name(f"{LAST_CHECKPOINT}{end}") for end in ("", ".tmp"))
    link.symlink_to(folder.name)
    if not (last.is_symlink() and CHECKPOINT_NAME.fullmatch(os.readlink(last))):
        rename_aside(last)
    os.replace(link, last)


def save_state(accelerator: Accelerator, folder: Path) -> None:
    """Write what Accelerate does; of a run under FSDP2 no weights and no optimizer, which are then written whole.

    So their files are those of a plain run, and either goes on from the other's.
    """
    if not accelerator.is_fsdp2:
        accelerator.save_state(folder)
        return
    place = dict(process_index=accelerator.process_index, step=0, scaler=accelerator.scaler)
    save_accelerator_state(folder, model_states=[], optimizers=[], schedulers=[], dataloaders=[], **place)


def whole_optimizer_state(accelerator: Accelerator) -> dict:
    """Give a sharded optimizer's state as a plain one has it, by the numbers of the parameters, on the main process."""

    def whole(value: Tensor) -> Tensor:
        full = getattr(value, "full_tensor", lambda: value)()
        return full.cpu() if accelerator.is_main_process else value  # others need not hold it

    (optimizer,) = accelerator._optimizers
    state = optimizer.state_dict()
    entries = {index: {name: whole(v) for name, v in entry.items()} for index, entry in state["state"].items()}
    return {**state, "state": entries}


class Checkpoints:
    """Write the states of a run: whole or not at all, each with a manifest, the newest and those kept for good.

    Not a cure for a broken disk: a save that fails costs a message and the run goes on, until MAX_FAILED_SAVES of them
    fail in a row. Every process calls the methods; the disk has to be one that all of them see.
    """

    def __init__(self, accelerator: Accelerator, experiment: Path, keep: int):
        self.accelerator, self.experiment, self.keep = accelerator, experiment, keep
        self.failures, self.size, self.saved_at = 0, 0, time.monotonic()

    def find_failure(self, act: Callable, *args: object, everywhere: bool = False) -> str | None:
        """Do something on the main process, or `everywhere`; give all what failed on any, None when nothing did."""
        failure = None
        try:
            if everywhere or self.accelerator.is_main_process:
                act(*args)
        except SAVE_ERRORS as error:
            failure = f"{type(error).__name__}: {error}"
        return next(filter(None, gather_object([failure])), None)

    def save(
        self,
        model: nn.Module,
        config: Mapping,
        state: Mapping,
        *,
        epoch_ends: bool = False,
        for_good: bool = False,
        average: nn.Module | None = None,
    ) -> bool:
        """Write weights with their sizes (model.safetensors, config.json) and all that an exact resume needs.

        The name is checkpoint_<epoch> when the epoch is complete, evaluation included, else checkpoint_<epoch>_step_
        <step>, epoch being the number of complete ones. `average`, a moving average of the weights, goes into
        ema.safetensors. Gives whether it was written; FloatingPointError for weights that are not finite, OSError
        when saving has failed too often.
        """
        name = f"checkpoint_{state['epoch']}" + ("" if epoch_ends else f"_step_{state['step']}")
        folder, temporary = self.experiment / name, self.experiment / f"{name}.tmp"
        check_weights(self.accelerator, model, self.experiment, state["step"])
        failure = self.find_failure(self.begin, temporary)
        failure = failure or self.find_failure(save_state, self.accelerator, temporary, everywhere=True)
        tensors = {AVERAGE_FILE: average.state_dict()} if average is not None else {}
        if failure is None and self.accelerator.distributed_type in SHARDING:  # saved in pieces; weights go on whole
            tensors[WEIGHTS_FILE] = self.accelerator.get_state_dict(model)
        if failure is None and self.accelerator.is_fsdp2:
            tensors[OPTIMIZER_FILE] = whole_optimizer_state(self.accelerator)
        records = {"config.json": config, STATE_FILE: {**state, "for_good": for_good}}
        failure = failure or self.find_failure(self.complete, temporary, folder, tensors, records)
        self.saved_at = time.monotonic()
        if failure is None:
            self.failures = 0
            if failure := self.find_failure(self.make_room, folder):
                self.accelerator.print(f"{name} is written, but older ones could not be removed ({failure})")
            return True
        self.failures += 1
        if self.accelerator.is_main_process:
            tidy(self.experiment)
        if self.failures == MAX_FAILED_SAVES:
            raise OSError(f"{self.failures} saves in a row failed, the last one with {failure}; earlier ones are kept")
        self.accelerator.print(f"{name} could not be written ({failure}); earlier ones are kept, and the run goes on")
        return False

    def begin(self, temporary: Path) -> None:
        """Make the folder of a save; OSError where the disk has no room for as much as the last one took."""
        tidy(self.experiment)
        temporary.mkdir()
        free = shutil.disk_usage(self.experiment).free
        if free < SPACE_FACTOR * self.size:
            raise OSError(f"{free / 1e9:.2f} GB are free, the last checkpoint has {self.size / 1e9:.2f} GB")

    def complete(self, temporary: Path, folder: Path, tensors: Mapping, records: Mapping) -> None:
        """Write what Accelerate does not, then the manifest of all, and give the folder its name."""
        for name, content in tensors.items():
            (torch.save if name == OPTIMIZER_FILE else save_file)(content, temporary / name)
        for name, content in records.items():
            write_json(temporary / name, content)
        files = {
            file.relative_to(temporary).as_posix(): {"bytes": file.stat().st_size, "crc32": checksum_of(file)}
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        write_json(temporary / MANIFEST_FILE, {"files": files})
        self.size = sum(entry["bytes"] for entry in files.values())
        if os.path.lexists(folder):
            damage = find_damage(folder)
            if damage is None and checkpoint_order(folder) == checkpoint_order(temporary):  # and so the same
                remove(temporary)
                return
            rename_damaged(folder, damage) if damage else rename_aside(folder)  # it may be a link to another one
        publish(temporary, folder)

    def make_room(self, newest: Path) -> None:
        """Remove checkpoints that are neither among the newest nor kept for good; what cannot be read is left alone."""
        point_last_checkpoint(newest)
        for folder in find_checkpoints(self.experiment)[: -self.keep]:
            try:
                kept = read_state(folder).get("for_good", True)
            except (OSError, ValueError):
                continue
            if not kept and CHECKPOINT_NAME.fullmatch(folder.name) and not folder.is_symlink():
                leaving = folder.with_name(f"{folder.name}.tmp")  # so that a kill leaves no half of it under its name
                remove(leaving)
                os.rename(folder, leaving)
                remove(leaving)

    def save_weights(self, model: nn.Module, name: str, config: Mapping) -> bool:
        """Write weights to hand on in the place of older ones; False when the disk refused, and these are left."""
        folder, state_dict = self.experiment / name, self.accelerator.get_state_dict(model)

        def write() -> None:
            with written_whole(folder) as temporary:
                temporary.mkdir()
                tensors = {name: value.contiguous() for name, value in state_dict.items()}
                save_file(tensors, temporary / WEIGHTS_FILE)
                write_json(temporary / "config.json", config)

        if failure := self.find_failure(write):
            self.accelerator.print(f"{folder} could not be written ({failure}); the run goes on")
        return failure is None


def time_save(
    accelerator: Accelerator, place: Path, keep: int, model: nn.Module, config: Mapping, average: nn.Module | None
) -> float:
    """Write a state into a new folder at `place`, remove it, and give the seconds; every process calls this."""
    folder = [None]
    if accelerator.is_main_process:
        place.mkdir(parents=True, exist_ok=True)
        folder = [tempfile.mkdtemp(prefix="check-", dir=place)]
    broadcast_object_list(folder)
    began = time.perf_counter()
    try:
        Checkpoints(accelerator, Path(folder[0]), keep).save(model, config, {"epoch": 0, "step": 0}, average=average)
        return time.perf_counter() - began
    finally:
        if accelerator.is_main_process:
            remove(Path(folder[0]))


# ------------------------------------------------------------------------------------------------ loading them


def load_state(accelerator: Accelerator, folder: Path) -> None:
    """Load what `save_state` wrote; under FSDP2 each process takes its slices of the files of a plain run."""
    in_pieces = (folder / "optimizer_0").is_dir()  # as Accelerate writes it, and our older states have it
    if in_pieces and accelerator.distributed_type not in SHARDING:
        raise ValueError("a sharded run saved it in pieces; go on from it sharded as well, as with configs/fsdp.yaml")
    if in_pieces or not accelerator.is_fsdp2:
        accelerator.load_state(folder)
        return
    (model,), (optimizer,) = accelerator._models, accelerator._optimizers
    weights, current = load_file(folder / WEIGHTS_FILE), model.state_dict()
    model.load_state_dict({name: sliced(value, current.get(name)) for name, value in weights.items()})
    saved = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", mmap=True, weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in saved["state"].items():
        saved["state"][index] = {name: sliced(value, parameters[index]) for name, value in entry.items()}
    optimizer.load_state_dict(saved)
    place = dict(process_index=accelerator.process_index, scaler=accelerator.scaler)
    load_accelerator_state(folder, models=[], optimizers=[], schedulers=[], dataloaders=[], **place)


def sliced(value: Tensor, like: Tensor | None) -> Tensor:
    """Cut a whole tensor as `like` is cut, where it is; the first process's counts, and all call this together."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # seconds, for sharded runs alone

    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value


def resume(
    accelerator: Accelerator,
    folder: Path,
    config: Mapping,
    identity: Mapping,
    *,
    average: nn.Module | None = None,
    keeps_best: bool = False,
    start_flag: str | None = None,
) -> dict:
    """Load a checkpoint into everything that was prepared, and into `average`; every process calls this.

    Gives its state: `epoch`, `step`, the `row` that waits for an evaluation, and the `best` figure so far where the
    script `keeps_best`. ValueError names every difference in the sizes or in `identity` that would make the run go on
    as another one.
    """
    state = read_state(folder)
    saved = read_json(folder / "config.json") | {key: state.get(key) for key in identity}
    current = json.loads(json.dumps({**config, **identity}))
    refuse_differences(folder, saved, current, start_flag)
    if not isinstance(state.get("row"), dict) or (keeps_best and not isinstance(state.get("best"), int | float)):
        raise ValueError(f"{folder / STATE_FILE} does not hold the row that waits and the best figure of a run")
    try:
        load_state(accelerator, folder)
        if average is not None:
            average.load_state_dict(load_file(folder / AVERAGE_FILE))
    except LOAD_ERRORS as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else ""
        raise ValueError(f"{folder} cannot be loaded ({type(error).__name__}: {reason})") from error
    accelerator.step = 0  # its position inside an accumulation; checkpoints lie between optimizer steps
    return state
