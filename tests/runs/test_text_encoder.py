"""Runs that train the text encoders: in two lives, on two processes, and past the step where the encoders stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.families.miniatures.sd import write_sd2
from tests.harness import Ended, Trainer
from tests.runs.evidence import unwrapped

FULL = {
    "model_family": "sd2x",
    "model_type": "full",
    "lora_dropout": None,
    "freeze_encoder_strategy": "before",
    "freeze_encoder_before": 1,
}
USUAL: dict[str, object] = {
    "train_text_encoder": True,
    "text_encoder_lr": 3e-3,
    "text_encoder_limit": 50,
    "max_train_steps": 6,
    "learning_rate": 1e-3,
    "checkpointing_steps": 1,
    "validation_steps": 0,
    "validation_prompt": None,
}


@pytest.fixture(scope="module")
def trainer(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("runs")
    return Trainer(images, folder, write_sd2(folder / "model"), {**USUAL, **FULL})


@pytest.fixture(scope="module")
def whole(trainer: Trainer) -> Ended:
    """Six steps, of which the encoder trains in three."""
    return trainer.finish("whole")


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def encoder(ended: Ended, folder: str) -> dict[str, torch.Tensor]:
    return load_file(ended.folder / folder / "model.safetensors")


@pytest.mark.slow
def test_a_run_says_what_it_trains_and_caches_no_caption(whole: Ended) -> None:
    assert "captions are encoded in every step, and none is cached" in unwrapped(whole.printed)
    assert "trained up to step 3, at a learning rate of 0.003 at most" in unwrapped(whole.printed)
    assert not (whole.folder / "cache" / "text").exists()


@pytest.mark.slow
def test_the_encoder_stands_still_from_its_step_on_and_did_not_before(whole: Ended, trainer: Trainer) -> None:
    kept = [encoder(whole, f"checkpoint-{step}/text_encoder_live") for step in range(1, 7)]
    changed = [any(bool((one[name] != other[name]).any()) for name in one) for one, other in zip(kept, kept[1:], strict=False)]
    assert changed == [True, True, False, False, False]
    handed_over = encoder(whole, "text_encoder_live")
    torch.testing.assert_close(handed_over, kept[-1], rtol=0, atol=0)
    rates = [(row["learning_rate"], row["text_encoder_lr"]) for row in whole.rows("metrics.jsonl")]
    assert rates == [(1e-3, pytest.approx(3e-3))] * 3 + [(1e-3, 0)] * 3
    base = load_file(trainer.model / "text_encoder" / "model.safetensors")
    frozen = [name for name in handed_over if "embeddings" in name or ".layers.0." in name]
    assert frozen
    assert all(bool((handed_over[name] == base.get(name, base.get(name.removeprefix("text_model.")))).all()) for name in frozen)


@pytest.mark.slow
def test_two_processes_and_a_run_in_two_lives_end_as_one_that_never_stopped(trainer: Trainer, whole: Ended) -> None:
    before = weights(whole.folder / "checkpoint-6")
    assert {name.partition("/")[0] for name in before} == {
        "optimizer.safetensors",
        "unet",
        "unet_live",
        "text_encoder",
        "text_encoder_live",
    }
    again = trainer.finish("whole", resume_from_checkpoint="checkpoint-2")
    assert "resuming from checkpoint-2" in again.printed
    assert weights(again.folder / "checkpoint-6") == before
    shared = trainer.finish_on(2, "shared", gradient_accumulation_steps=1)
    assert shared.losses == pytest.approx(whole.losses, rel=1e-4)
    torch.testing.assert_close(encoder(shared, "text_encoder_live"), encoder(whole, "text_encoder_live"), rtol=1e-3, atol=1e-5)
