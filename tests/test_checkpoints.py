"""States of a run: found, chosen, damaged, written and loaded, in hand-made folders and of tiny models."""

import argparse
import errno
import json
import math

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY
from safetensors.torch import load_file

from model import ViTMAEForPreTraining
from storage.files import checksum_of
from training.checkpoints import Checkpoints, check_weights, open_experiment, resume, tidy
from training.states import find_checkpoint, find_checkpoints, find_damage

# -------------------------------------------------------------------------------- finding them


def run_flags(folder, **changes):
    flags = {"working_directory": str(folder), "experiment_name": "run", "epochs": 10, "resume_from_checkpoint": None}
    return argparse.Namespace(**{**flags, **changes})


def add_checkpoint(folder, epoch, step=None, **state):
    """Write a checkpoint of nothing but its records, whole."""
    checkpoint = folder / "run" / (f"checkpoint_{epoch}" + (f"_step_{step}" if step else ""))
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "state.json").write_text(json.dumps({"epoch": epoch, "step": step or 10 * epoch, **state}))
    files = {f.name: {"bytes": f.stat().st_size, "crc32": checksum_of(f)} for f in checkpoint.iterdir()}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))
    return checkpoint


def test_open_experiment_refuses_to_train_over_checkpoints(tmp_path):
    accelerator, latest = Accelerator(cpu=True), run_flags(tmp_path, resume_from_checkpoint="latest")
    fresh = (tmp_path / "run", None, [])
    assert open_experiment(accelerator, run_flags(tmp_path)) == open_experiment(accelerator, latest) == fresh
    third = add_checkpoint(tmp_path, 3)
    with pytest.raises(FileExistsError, match=r"--resume_from_checkpoint latest.*another --experiment_name"):
        open_experiment(accelerator, run_flags(tmp_path))
    assert open_experiment(accelerator, latest) == (tmp_path / "run", third, [])
    within = add_checkpoint(tmp_path, 3, step=35)
    with pytest.raises(FileExistsError, match=r"would train over .*checkpoint_3_step_35.*another --experiment_name"):
        open_experiment(accelerator, run_flags(tmp_path, resume_from_checkpoint="checkpoint_3"))
    assert open_experiment(accelerator, latest).resume_from == within
    elsewhere = run_flags(tmp_path, resume_from_checkpoint=str(third), experiment_name="branch")
    assert open_experiment(accelerator, elsewhere) == (tmp_path / "branch", third, [])


def test_open_experiment_refuses_a_checkpoint_beyond_the_last_epoch(tmp_path):
    add_checkpoint(tmp_path, 12)
    with pytest.raises(ValueError, match="has 12 epochs behind it, more than --epochs 10"):
        open_experiment(Accelerator(cpu=True), run_flags(tmp_path, resume_from_checkpoint="latest"))


def test_damaged_checkpoints_are_passed_over_and_never_all_of_them(tmp_path):
    accelerator, latest = Accelerator(cpu=True), run_flags(tmp_path, resume_from_checkpoint="latest")
    third, within, fourth = add_checkpoint(tmp_path, 3), add_checkpoint(tmp_path, 3, 35), add_checkpoint(tmp_path, 4)
    (fourth / "config.json").write_text("[]")  # as long as before
    (within / "state.json").unlink()
    assert open_experiment(accelerator, latest) == (tmp_path / "run", third, [fourth, within])
    with pytest.raises(ValueError, match=r"checkpoint_4 is damaged: config.json has another content.*'latest'"):
        open_experiment(accelerator, run_flags(tmp_path, resume_from_checkpoint="checkpoint_4"))
    (third / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"(?s)every checkpoint in .* is damaged.*checkpoint_3: manifest.json cannot"):
        open_experiment(accelerator, latest)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"files": {"../outside": {"bytes": 2, "crc32": "00000000"}}}, "names '../outside', which is not inside"),
        ({"files": {"/etc/passwd": {"bytes": 2, "crc32": "00000000"}}}, "names '/etc/passwd', which is not inside"),
        ({"files": {}}, "does not name config.json, state.json"),
        ({"files": {"config.json": 3}}, "cannot be read"),
        ({"files": ["config.json"]}, "cannot be read"),
        ([], "cannot be read"),
    ],
)
def test_manifest_that_is_wrong_is_damage(tmp_path, manifest, message):
    checkpoint = add_checkpoint(tmp_path, 3)
    assert find_damage(checkpoint) is None
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert message in find_damage(checkpoint)


def test_checkpoints_are_ordered_by_epoch_and_step(tmp_path):
    steps = [(12, None), (3, None), (3, 35), (2, 29), (0, 4)]
    for epoch, step in steps:
        add_checkpoint(tmp_path, epoch, step)
    for name in ("checkpoint_99.tmp", "checkpoint_99_1.damaged", "best_checkpoint"):  # none of them
        (tmp_path / "run" / name).mkdir()
    (tmp_path / "run" / "last_checkpoint").symlink_to("checkpoint_12")
    assert [folder.name for folder in find_checkpoints(tmp_path / "run")] == [
        "checkpoint_0_step_4", "checkpoint_2_step_29", "checkpoint_3", "checkpoint_3_step_35", "checkpoint_12",
    ]  # fmt: skip


def test_links_to_checkpoints_are_ordered_by_what_they_lead_to(tmp_path):
    """Folders elsewhere with names of their own; each is listed once."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for epoch in (2, 3, 4):
        add_checkpoint(elsewhere, epoch).rename(tmp_path / f"of_{epoch}")
    add_checkpoint(tmp_path, 1)
    (run / "checkpoint_0").symlink_to(tmp_path / "of_3")
    (run / "checkpoint_2").symlink_to(tmp_path / "of_2")
    (run / "checkpoint_9").symlink_to("checkpoint_1")
    (run / "last_checkpoint").symlink_to("checkpoint_0")
    named = ["checkpoint_1", "checkpoint_2", "checkpoint_0"]
    assert [folder.name for folder in find_checkpoints(run)] == named
    (run / "last_checkpoint").unlink()
    (run / "last_checkpoint").symlink_to(tmp_path / "of_4")
    assert [folder.name for folder in find_checkpoints(run)] == [*named, "last_checkpoint"]
    accelerator, latest = Accelerator(cpu=True), run_flags(tmp_path, resume_from_checkpoint="latest")
    assert open_experiment(accelerator, latest).resume_from == run / "last_checkpoint"
    with pytest.raises(FileExistsError, match=r"would train over .*last_checkpoint"):
        open_experiment(accelerator, run_flags(tmp_path, resume_from_checkpoint="checkpoint_0"))
    (tmp_path / "of_4" / "state.json").write_text('{"epoch": 0, "step": 0}')  # damaged: it is ordered by its name
    assert [folder.name for folder in find_checkpoints(run)] == ["last_checkpoint", *named]


def test_saves_leave_what_lies_behind_links_alone(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    checkpoints = Checkpoints(accelerator, run, 1)
    run.mkdir()
    for epoch in (1, 2, 3):
        checkpoints.save(model, {}, {"epoch": epoch, "step": 10 * epoch}, epoch_ends=True)
        (run / f"checkpoint_{epoch}").rename(tmp_path / f"of_{epoch}")
    (run / "checkpoint_1").symlink_to(tmp_path / "of_1")
    (run / "checkpoint_5").symlink_to(tmp_path / "of_2")  # the name of a save to come
    (run / "checkpoint_6").symlink_to(elsewhere)  # of another one; it leads to nothing
    (run / "last_checkpoint").unlink()
    (run / "last_checkpoint").symlink_to(tmp_path / "of_3")
    for epoch in (4, 5, 6):
        assert checkpoints.save(model, {}, {"epoch": epoch, "step": 10 * epoch}, epoch_ends=True)
        assert find_damage(run / f"checkpoint_{epoch}") is None and not (run / f"checkpoint_{epoch}").is_symlink()
    assert all(find_damage(tmp_path / f"of_{epoch}") is None for epoch in (1, 2, 3)) and not elsewhere.exists()
    assert {entry.name for entry in run.iterdir()} == {
        "checkpoint_1", "checkpoint_5_1", "checkpoint_6", "checkpoint_6_1.damaged", "last_checkpoint",
        "last_checkpoint_1",
    }  # fmt: skip
    assert (run / "last_checkpoint_1").resolve() == tmp_path / "of_3"


def test_find_checkpoint_takes_a_name_a_folder_and_the_link(tmp_path):
    third, twelfth = add_checkpoint(tmp_path, 3), add_checkpoint(tmp_path, 12)
    (tmp_path / "run" / "last_checkpoint").symlink_to("checkpoint_12")
    assert find_checkpoint(tmp_path / "run", "checkpoint_3") == third
    assert find_checkpoint(tmp_path / "run", "last_checkpoint") == twelfth
    assert find_checkpoint(tmp_path / "elsewhere", str(third)) == third
    with pytest.raises(FileNotFoundError, match=r"checkpoint_4: no checkpoint.*checkpoint_3, checkpoint_12"):
        find_checkpoint(tmp_path / "run", "checkpoint_4")


# -------------------------------------------------------------------------------- writing them


def test_checkpoint_with_weights_that_are_not_finite_is_not_written(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(ViTMAEForPreTraining(TINY))
    checkpoints = Checkpoints(accelerator, tmp_path, 2)
    assert checkpoints.save(model, {"a": 1}, {"epoch": 1, "step": 5}, epoch_ends=True)
    assert json.loads((tmp_path / "checkpoint_1" / "config.json").read_text()) == {"a": 1}
    assert find_damage(tmp_path / "checkpoint_1") is None
    assert len({file.stat().st_mode for file in (tmp_path / "checkpoint_1").iterdir()}) == 1  # alike for all readers
    with torch.no_grad():
        model.decoder_pred.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"not finite at step 9, and not saved\. Go on from .*checkpoint_1"):
        checkpoints.save(model, {"a": 1}, {"epoch": 2, "step": 9}, epoch_ends=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint_1", "last_checkpoint"]


def test_running_statistics_that_are_not_finite_are_not_saved(tmp_path):
    accelerator, model = Accelerator(cpu=True), torch.nn.BatchNorm1d(2)
    check_weights(accelerator, model, tmp_path, 1)
    model.running_var[1] = math.inf
    with pytest.raises(FloatingPointError, match="no checkpoint: start again"):
        check_weights(accelerator, model, tmp_path, 1)


def test_newest_checkpoints_and_those_for_good_are_kept(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    checkpoints = Checkpoints(accelerator, tmp_path, 2)
    for epoch in range(1, 7):
        state = {"epoch": epoch, "step": 10 * epoch}
        checkpoints.save(model, {}, state, epoch_ends=epoch != 5, for_good=epoch == 2)
        assert (tmp_path / "last_checkpoint").resolve() == find_checkpoints(tmp_path)[-1]
    names = [folder.name for folder in find_checkpoints(tmp_path)]
    assert names == ["checkpoint_2", "checkpoint_5_step_50", "checkpoint_6"]
    assert len(list(tmp_path.iterdir())) == 4  # and the link, no litter


def test_save_that_fails_costs_nothing_but_itself_until_three_did(tmp_path, monkeypatch, capsys):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    checkpoints = Checkpoints(accelerator, tmp_path, 2)
    assert checkpoints.save(model, {}, {"epoch": 1, "step": 1}, epoch_ends=True)

    def full(*_):
        raise RuntimeError("unexpected pos 64 vs 0")  # torch's words for a full disk

    with monkeypatch.context() as patched:
        patched.setattr(accelerator, "save_state", full)
        for epoch in (2, 3):
            assert not checkpoints.save(model, {}, {"epoch": epoch, "step": epoch}, epoch_ends=True)
    assert "checkpoint_3 could not be written (RuntimeError: unexpected pos" in capsys.readouterr().out
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint_1", "last_checkpoint"]
    assert checkpoints.save(model, {}, {"epoch": 4, "step": 4}, epoch_ends=True)  # the space is back
    monkeypatch.setattr(accelerator, "save_state", full)
    for epoch in (5, 6):
        assert not checkpoints.save(model, {}, {"epoch": epoch, "step": epoch}, epoch_ends=True)
    with pytest.raises(OSError, match="3 saves in a row failed"):
        checkpoints.save(model, {}, {"epoch": 7, "step": 7}, epoch_ends=True)
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["checkpoint_1", "checkpoint_4"]


def test_save_wants_more_free_space_than_the_one_before_took(tmp_path, monkeypatch, capsys):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    checkpoints = Checkpoints(accelerator, tmp_path, 2)
    assert checkpoints.save(model, {}, {"epoch": 1, "step": 1}, epoch_ends=True)
    usage = argparse.Namespace(free=checkpoints.size)
    monkeypatch.setattr("training.checkpoints.shutil.disk_usage", lambda _: usage)
    assert not checkpoints.save(model, {}, {"epoch": 2, "step": 2}, epoch_ends=True)
    assert "GB are free" in capsys.readouterr().out


def test_state_of_the_same_step_is_not_written_twice(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    checkpoints = Checkpoints(accelerator, tmp_path, 2)
    state = {"epoch": 1, "step": 1}
    checkpoints.save(model, {}, state, epoch_ends=True)
    inode = (tmp_path / "checkpoint_1").stat().st_ino
    checkpoints.save(model, {}, state, epoch_ends=True)
    assert (tmp_path / "checkpoint_1").stat().st_ino == inode
    (tmp_path / "checkpoint_1" / "state.json").write_text("{}")
    checkpoints.save(model, {}, state, epoch_ends=True)
    assert find_damage(tmp_path / "checkpoint_1") is None
    assert (tmp_path / "checkpoint_1_1.damaged" / "state.json").read_text() == "{}"  # nothing is lost


def test_best_weights_take_the_place_of_older_ones_whenever_the_run_dies(tmp_path):
    accelerator = Accelerator(cpu=True)
    checkpoints, model = Checkpoints(accelerator, tmp_path, 2), torch.nn.Linear(2, 2)
    for value in (1.0, 2.0):
        torch.nn.init.constant_(model.weight, value)
        assert checkpoints.save_weights(model, "best_checkpoint", {})
        assert [entry.name for entry in tmp_path.iterdir()] == ["best_checkpoint"]
        assert load_file(tmp_path / "best_checkpoint" / "model.safetensors")["weight"].unique().item() == value
    (tmp_path / "best_checkpoint").rename(
        tmp_path / "best_checkpoint.replaced.old"
    )  # as a kill between two renames leaves it
    (tmp_path / "best_checkpoint.unfinished.tmp").mkdir()
    tidy(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["best_checkpoint"]


def test_best_weights_that_a_disk_refuses_leave_the_older_ones_and_are_reported(tmp_path, monkeypatch, capsys):
    checkpoints, model = Checkpoints(Accelerator(cpu=True), tmp_path, 2), torch.nn.Linear(2, 2)
    checkpoints.save_weights(model, "best_checkpoint", {"epoch": 1})
    written = (tmp_path / "best_checkpoint" / "model.safetensors").read_bytes()

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    torch.nn.init.zeros_(model.weight)
    with monkeypatch.context() as patch:
        patch.setattr("training.checkpoints.save_file", refuse)
        assert not checkpoints.save_weights(model, "best_checkpoint", {"epoch": 2})
    assert "best_checkpoint could not be written" in capsys.readouterr().out
    assert (tmp_path / "best_checkpoint" / "model.safetensors").read_bytes() == written
    assert checkpoints.save_weights(model, "best_checkpoint", {"epoch": 3})  # what was left half-written is no obstacle
    assert load_file(tmp_path / "best_checkpoint" / "model.safetensors")["weight"].count_nonzero() == 0


# -------------------------------------------------------------------------------- loading them


def test_resume_restores_what_was_saved_and_names_every_difference(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(ViTMAEForPreTraining(TINY))
    config, identity = {"config": {"depth": 3, "width": 8}, "image_mean": (0.5,)}, {"seed": 0}
    state = {**identity, "epoch": 2, "step": 7, "row": {}}
    Checkpoints(accelerator, tmp_path, 2).save(model, config, state, epoch_ends=True)
    saved = model.decoder_pred.bias.detach().clone()
    with torch.no_grad():
        model.decoder_pred.bias += 1
    assert resume(accelerator, tmp_path / "checkpoint_2", config, identity)["epoch"] == 2
    assert torch.equal(model.decoder_pred.bias, saved)
    config["config"]["depth"] = 4
    message = r"(?s)config\.depth: 3 in the checkpoint, 4 now.*seed: 0 in the checkpoint, 1 now"
    with pytest.raises(ValueError, match=message):
        resume(accelerator, tmp_path / "checkpoint_2", config, {"seed": 1})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", r"config\.json is no JSON"),
        ("config.json", b"[" * 100_000, r"config\.json is no JSON"),
        ("config.json", b"[]", r"config\.json holds a list"),
        ("state.json", b"\xff", r"state\.json is no JSON"),
        ("state.json", b'{"epoch": 1, "step": true}', r"state\.json does not hold an epoch and a step"),
        ("state.json", b'{"epoch": 1, "step": 1, "best": 5.0}', r"state\.json does not hold the row that waits"),
        ("state.json", b'{"epoch": 1, "step": 1, "row": {}}', r"state\.json does not hold .* the best figure"),
    ],
)
def test_resume_names_a_record_that_is_none(name, content, message, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "state.json").write_text('{"epoch": 1, "step": 1, "row": {}, "best": 5.0}')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        resume(Accelerator(cpu=True), tmp_path, {}, {}, keeps_best=True)


def test_resume_refuses_pieces_of_a_sharded_optimizer_in_a_plain_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "state.json").write_text('{"epoch": 1, "step": 1, "row": {}}')
    (tmp_path / "optimizer_0").mkdir()
    with pytest.raises(ValueError, match="a sharded run saved it in pieces; go on from it sharded as well"):
        resume(Accelerator(cpu=True), tmp_path, {}, {})
