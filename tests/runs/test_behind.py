"""Training that begins while latents are still encoded, and cuts drawn anew each epoch: killed or not, the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import NO_VALIDATION, Ended, Trainer, draw_images, lines, same_weights, wait_for, without_loss
from tests.runs.evidence import unwrapped

BEHIND = {"vae_cache_preprocess": False}
WRAPPER = "train_sdxl.sh"
TWO = {"TRAINING_NUM_PROCESSES": "2"}
long = pytest.mark.skipif(not os.environ.get("SIMPLETUNER_TEST_LONG"), reason="SIMPLETUNER_TEST_LONG=1 runs it")


def with_slow_encoder(seconds: float) -> dict[str, list[str]]:
    """For `Trainer.start`: the VAE takes so long for each batch."""
    return {"through": [str(Path(__file__).with_name("slow_encoder.py")), str(seconds)]}


def slow_encoder_of_rank(rank: str, folder: Path, seconds: float) -> dict[str, str]:
    """Variables under which the VAE of one rank takes so long for each batch, however its process is started."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "import importlib.abc, importlib.util\n"
        "class Slow(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name != 'helpers.families.loading.vae':\n"
        "            return None\n"
        "        sys.meta_path.remove(self)\n"
        "        spec = importlib.util.find_spec(name)\n"
        "        run = spec.loader.exec_module\n"
        "        def exec_module(module):\n"
        "            run(module)\n"
        "            encode = module.VaeCodec.encode\n"
        "            def slowly(self, pixels):\n"
        f"                time.sleep({seconds})\n"
        "                return encode(self, pixels)\n"
        "            module.VaeCodec.encode = slowly\n"
        "        spec.loader.exec_module = exec_module\n"
        "        return spec\n"
        f"if os.environ.get('RANK') == {rank!r}:\n"
        "    sys.meta_path.insert(0, Slow())\n"
    )
    return {"PYTHONPATH": str(folder)}


@pytest.mark.slow
def test_behind_training_the_same_bytes_come_out_and_the_first_step_does_not_wait_for_all(trainer: Trainer, finished: Ended) -> None:
    behind = trainer.finish(**BEHIND, **with_slow_encoder(0.1))
    assert "latents 14 needed, 0 cached; the rest is encoded while training runs" in unwrapped(behind.printed)
    assert behind.rows("samples.jsonl") == finished.rows("samples.jsonl")
    assert behind.losses == finished.losses
    assert same_weights(finished, behind)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["behind", "redrawn", pytest.param("both", marks=long)])
def test_killed_while_encoding_behind_training_it_ends_in_the_same_bytes(way: str, trainer: Trainer) -> None:
    trainer.settings = NO_VALIDATION
    trainer.dataloader(crop_aspect="square", vae_cache_clear_each_epoch=way != "behind")
    undisturbed = trainer.finish("undisturbed", max_train_steps=8)
    settings = {"max_train_steps": 8, "vae_cache_preprocess": way == "redrawn"}
    for steps in (1, 5):
        process = trainer.start(**with_slow_encoder(0.3), **settings)
        wait_for(lambda steps=steps: lines(trainer.folder / "out" / "metrics.jsonl") >= steps, process)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = trainer.finish(**settings)
    assert again.rows("samples.jsonl") == undisturbed.rows("samples.jsonl")
    assert again.losses == undisturbed.losses
    assert same_weights(undisturbed, again)
    if way != "behind":
        crops = {(row["key"], *row["crop"]) for row in again.rows("samples.jsonl")}
        assert len(crops) > len({key for key, *_ in crops})


@pytest.mark.slow
def test_two_processes_behind_training_are_as_one(trainer: Trainer, finished: Ended) -> None:
    two = trainer.finish_on(2, gradient_accumulation_steps=1, **BEHIND)
    assert without_loss(two) == without_loss(finished)
    assert same_weights(finished, two)


@pytest.mark.slow
def test_an_image_that_turns_out_broken_leaves_an_empty_place_in_both_ways(trainer: Trainer) -> None:
    trainer.images = draw_images(trainer.folder / "images")
    broken = trainer.images / "a_red_circle_05.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    trainer.settings = {**NO_VALIDATION, "train_batch_size": 1, "max_train_steps": 8}
    cached, behind = trainer.finish("cached"), trainer.finish("behind", **BEHIND)
    assert behind.rows("samples.jsonl") == cached.rows("samples.jsonl")
    assert same_weights(cached, behind)
    steps = [row["samples"] for row in cached.rows("metrics.jsonl")]
    assert sorted(set(steps)) == [1, 2] and "a_red_circle_05.png" not in {row["key"] for row in cached.rows("samples.jsonl")}
    for ended in (cached, behind):
        assert "1 more left out, found while encoding (1 unreadable)" in unwrapped(ended.printed)
    new = trainer.finish("new", cache_dir=trainer.folder / "cached" / "cache", max_train_steps=2)
    assert "14 files = 13 used + 1 left out (1 unreadable)" in unwrapped(new.printed)


def ranks_below(process: subprocess.Popen[str]) -> Iterator[tuple[str, int]]:
    """(rank, process id) of the trainers that a launcher has started."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != process.pid:
            try:
                variables = dict(part.split("=", 1) for part in (folder / "environ").read_bytes().decode().split("\0") if "=" in part)
            except OSError:
                continue
            if variables.get("SIMPLETUNER_LAUNCHER_PID") == str(process.pid) and "RANK" in variables:
                yield variables["RANK"], int(folder.name)


@pytest.mark.slow
def test_a_signal_to_a_rank_that_waits_for_the_others_encoding_stops_all(trainer: Trainer) -> None:
    variables = {**TWO, **slow_encoder_of_rank("1", trainer.folder / "slow", 30.0)}
    process = trainer.start_plain(wrapper=WRAPPER, variables=variables, gradient_accumulation_steps=1)
    latents = trainer.folder / "out" / "cache" / "latents"
    wait_for(lambda: any(latents.glob("*.safetensors")), process)  # rank 0 is through with its share
    asked = time.monotonic()
    os.kill(dict(ranks_below(process))["0"], signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert time.monotonic() - asked < 60  # rank 1 ends the batch at hand, not its share
    assert "Traceback" not in said
