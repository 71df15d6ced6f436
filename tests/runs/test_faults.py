"""Full disks, flipped bits, changed data, two runs at once: named, survived, and the result is what it would have been."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from helpers.config.options import CheckpointOptions
from helpers.errors import StorageError
from helpers.families.miniatures.sdxl import write_sdxl
from helpers.protocols import StepResult
from helpers.reporting.records import METRICS, Records
from helpers.storage.atomic import verify_manifest
from helpers.training.checkpoints import Checkpointer
from tests.harness import Ended, Trainer, same_weights, wait_for
from tests.runs.evidence import damage_records, flip_byte, refusal, unwrapped
from tests.warm import Program

LONG = bool(os.environ.get("SIMPLETUNER_TEST_LONG"))
long = pytest.mark.skipif(not LONG, reason="SIMPLETUNER_TEST_LONG=1 runs it")


@pytest.fixture
def resumable(trainer: Trainer, finished: Ended) -> Trainer:
    """A trainer on images of its own, whose "out" is `finished` as it was after step 2."""
    trainer.images = shutil.copytree(trainer.images, trainer.folder / "images")
    output = shutil.copytree(finished.folder, trainer.folder / "out")
    for step in (4, 6):
        shutil.rmtree(output / f"checkpoint-{step}")
    return trainer


def limit_files_of(process: Program, size: int) -> None:
    """From now on the kernel refuses to let a file of the process grow beyond `size` bytes, as on a full disk."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))


# -- full disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_disk_that_fills_up_while_caching_and_then_while_saving_costs_only_what_was_not_written(
    trainer: Trainer, finished: Ended
) -> None:
    output = trainer.folder / "out"

    process = trainer.start()
    limit_files_of(process, 120_000)  # latents take 13 kB, text 142 kB, the catalogue's journal about as much
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    cache = re.escape(str(output / "cache"))
    texts, catalogue = "text: the cache cannot be written: File too large", "catalogue.sqlite could not be read or written"
    assert re.search(f"{cache}/({texts}|{catalogue})", unwrapped(said))
    assert "Traceback" not in said

    process = trainer.start()
    wait_for((output / "checkpoint-2").exists, process)
    limit_files_of(process, 600_000)  # weights take 440 kB, the optimiser 890 kB
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert "optimizer.safetensors could not be written" in unwrapped(said) and str(output / ".checkpoint-") in unwrapped(said)
    assert "Traceback" not in said
    assert verify_manifest(output / "checkpoint-2") == []
    assert not list(output.glob(".checkpoint-*"))

    again = trainer.finish()
    assert "17 needed, 17 cached" in unwrapped(again.printed)
    assert again.losses == finished.losses
    assert same_weights(finished, again)


def test_metrics_that_cannot_be_written_are_told_in_a_sentence(tmp_path: Path) -> None:
    records = Records(tmp_path, resumed_at=0, record_samples=False)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, records._metrics.fileno())
    os.close(full)
    with pytest.raises(StorageError, match=f"{tmp_path / METRICS} could not be written: No space left on device"):
        records.stepped(StepResult(1, 0, 0.5, 1e-4, 1.0, 1.0, 0.0, 4))
    records.close()


# -- disks that fail ---------------------------------------------------------------------------------------------------------


def on_a_failing_disk(call: str, pattern: str, error: str, times: int = 0) -> dict[str, object]:
    """For `Trainer.run`: Python's `call` fails for paths that hold `pattern`; see failing_disk.py."""
    return {"through": [str(Path(__file__).with_name("failing_disk.py")), call, pattern, error, str(times)]}


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_cache_that_cannot_be_made_durable_is_told_and_keeps_nothing_of_it(call: str, trainer: Trainer, finished: Ended) -> None:
    cut_short = trainer.run(**on_a_failing_disk(call, "/cache/latents/", "EIO"))
    assert cut_short.code == 1, cut_short.printed
    assert f"{cut_short.folder / 'cache' / 'latents'}: the cache cannot be written: Input/output error" in unwrapped(cut_short.printed)
    assert "Traceback" not in cut_short.printed
    assert not list((cut_short.folder / "cache" / "latents").glob("*.safetensors*"))
    if call != "fsync" and not LONG:
        return  # the state is the same, and so is what comes of it
    again = trainer.finish()
    assert "14 needed, 0 cached" in unwrapped(again.printed)
    assert same_weights(finished, again)


@pytest.mark.slow
@pytest.mark.parametrize(("call", "pattern"), [("fsync", "/.checkpoint-4."), ("replace", "/checkpoint-4")])
def test_a_checkpoint_that_cannot_be_made_durable_is_told_and_the_one_before_it_stays(
    call: str, pattern: str, trainer: Trainer, finished: Ended
) -> None:
    cut_short = trainer.run(**on_a_failing_disk(call, pattern, "EIO"))
    assert cut_short.code == 1, cut_short.printed
    assert "could not be written: Input/output error" in unwrapped(cut_short.printed)
    assert "Traceback" not in cut_short.printed
    assert [path.name for path in cut_short.folder.glob("*checkpoint-*")] == ["checkpoint-2"]
    assert verify_manifest(cut_short.folder / "checkpoint-2") == []
    if call != "fsync" and not LONG:
        return  # the state is the same, and so is what comes of it
    again = trainer.finish()
    assert again.losses == finished.losses
    assert same_weights(finished, again)


@pytest.mark.slow
@pytest.mark.parametrize("error", ["EIO", pytest.param("EMFILE", marks=long), pytest.param("ESTALE", marks=long)])
def test_an_image_that_twice_cannot_be_opened_is_tried_again_and_used(error: str, trainer: Trainer, finished: Ended) -> None:
    blinked = trainer.run(**on_a_failing_disk("open", "a_red_circle_03.png", error, times=2))
    assert blinked.code == 0, blinked.printed
    assert "14 files = 14 used + 0 left out" in unwrapped(blinked.printed)
    assert same_weights(finished, blinked)


@pytest.mark.slow
def test_an_image_that_cannot_be_read_at_all_ends_the_run_in_a_sentence(trainer: Trainer) -> None:
    ended = trainer.run(**on_a_failing_disk("open", "a_red_circle_03.png", "EIO"))
    assert ended.code == 1, ended.printed
    assert "a_red_circle_03.png could not be read: Input/output error" in unwrapped(ended.printed)
    assert "Traceback" not in ended.printed


# -- damaged files -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_flipped_byte_in_any_file_of_a_checkpoint_is_named_and_the_next_older_one_is_used(finished: Ended, tmp_path: Path) -> None:
    for step in (2, 4):
        shutil.copytree(finished.folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    files = [path for path in (tmp_path / "checkpoint-4").rglob("*") if path.is_file()]
    assert len(files) >= 7
    for path in files:
        flip_byte(path, path.stat().st_size // 2)
        told: list[str] = []
        found = Checkpointer(CheckpointOptions(), tmp_path, told.append).find()
        assert found is not None and found.step == 2
        assert len(told) == 1 and told[0].startswith("checkpoint-4 is damaged and is skipped:")
        assert path.name in told[0]
        flip_byte(path, path.stat().st_size // 2)
    whole = Checkpointer(CheckpointOptions(), tmp_path, lambda text: pytest.fail(text)).find()
    assert whole is not None and whole.step == 4


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over_and_the_run_still_ends_in_the_same_bytes(trainer: Trainer, finished: Ended) -> None:
    output = shutil.copytree(finished.folder, trainer.folder / "out")
    flip_byte(output / "checkpoint-6" / "pytorch_lora_weights.safetensors", -100)
    (output / "checkpoint-4" / "optimizer.safetensors").unlink()
    again = trainer.finish()
    assert "checkpoint-6 is damaged and is skipped:" in unwrapped(again.printed)
    assert "checkpoint-4 is damaged and is skipped:" in unwrapped(again.printed)
    assert "resuming from checkpoint-2" in unwrapped(again.printed)
    assert again.rows("samples.jsonl") == finished.rows("samples.jsonl")
    assert again.losses == finished.losses
    assert same_weights(finished, again)


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(resumable: Trainer) -> None:
    output = resumable.folder / "out"
    flip_byte(output / "checkpoint-2" / "optimizer.safetensors", -1)
    said = refusal(resumable.run())
    assert f"No checkpoint in {output} is intact: restore one, or choose another --output_dir for a new run." in said
    assert (output / "checkpoint-2").is_dir()


@pytest.mark.slow
def test_flipped_bytes_in_cached_latents_and_text_are_made_again_and_change_nothing(resumable: Trainer, finished: Ended) -> None:
    for cache in ("latents", "text"):
        damage_records(resumable.folder / "out" / "cache" / cache)
    again = resumable.finish()
    assert "a record has changed since it was written, that of images/a_red_circle_" in unwrapped(again.printed)
    assert "a record has changed since it was written, that of the caption" in unwrapped(again.printed)
    assert again.losses == finished.losses
    assert same_weights(finished, again)


# -- what a run may go on with ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_encoded(resumable: Trainer) -> None:
    resumable.model = write_sdxl(resumable.folder / "other", seed=1)
    said = refusal(resumable.run())
    assert "checkpoint-2 was saved with other settings:" in said and "; base_model_hash was " in said
    assert "encoded" not in said


def change_image(trainer: Trainer) -> None:
    Image.new("RGB", (64, 64), "white").save(trainer.images / "a_red_circle_00.png")


def change_captions(trainer: Trainer) -> None:
    trainer.dataloader(prepend_instance_prompt=True, instance_prompt="photo of")


def add_image(trainer: Trainer) -> None:
    Image.new("RGB", (64, 96), "blue").save(trainer.images / "a_blue_image.png")


def remove_image(trainer: Trainer) -> None:
    (trainer.images / "a_red_circle_01.png").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_image, "images"),
        (change_captions, "captions"),
        (add_image, "plan, images, captions"),
        (remove_image, "plan, images, captions"),
    ],
)
def test_changed_data_is_refused_and_named(change: Callable[[Trainer], None], named: str, resumable: Trainer) -> None:
    change(resumable)
    said = refusal(resumable.run())
    assert f"the data has changed since checkpoint-2: {named}." in said
    assert "--accept_changed_data" in said


@pytest.mark.slow
def test_accepted_changed_data_begins_with_a_whole_epoch_and_is_itself_exact(resumable: Trainer) -> None:
    for change in (change_image, change_captions, add_image, remove_image):
        change(resumable)
    shutil.copytree(resumable.folder / "out", resumable.folder / "twice")

    once = resumable.finish(accept_changed_data=True)
    assert "epoch 1 starts at step 3 on the present data" in unwrapped(once.printed)
    rows = [row for row in once.rows("samples.jsonl") if row["step"] in (3, 4, 5)]
    assert sorted(row["key"] for row in rows) == sorted(path.name for path in resumable.images.iterdir())
    assert [row["epoch"] for row in once.rows("metrics.jsonl")] == [0, 0, 1, 1, 1, 2]

    resumable.finish("twice", accept_changed_data=True, max_train_steps=4)
    twice = resumable.finish("twice")  # by now the changed data are the run's own
    assert twice.rows("samples.jsonl") == once.rows("samples.jsonl")
    assert twice.losses == once.losses
    assert same_weights(once, twice)


# -- two at once -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_run_on_the_same_output_folder_is_refused_with_the_first_ones_pid(trainer: Trainer) -> None:
    first = trainer.start()
    try:
        lock = trainer.folder / "out" / ".lock"
        wait_for(lambda: lock.exists() and lock.read_text() == str(first.pid), first)
        os.kill(first.pid, signal.SIGSTOP)  # it holds the lock for as long as the second one takes to start
        said = refusal(trainer.run())
        assert f"is in use by another run (pid {first.pid})" in said
    finally:
        first.kill()
        first.communicate()
