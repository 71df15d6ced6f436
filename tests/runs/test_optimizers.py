"""Whole runs with optimizers that keep more than moments: stopped, gone on, on two processes, they end in the same bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.harness import Ended, Trainer
from tests.runs.evidence import refusal

LORA = "pytorch_lora_weights.safetensors"
LONG = bool(os.environ.get("SIMPLETUNER_TEST_LONG"))
SETTINGS = {
    "schedulefree_adamw": {"learning_rate": 1e-2, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2},
    "prodigy": {"learning_rate": 1, "optimizer_args": "d0=1e-4"},
    "adafactor": {"adafactor_relative_step": True, "learning_rate": None, "lr_scheduler": None},
    "adamw8bit": {"lora_rank": 64},
    "pytorch_optimizer:SOAP": {},
}


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def usual(name: str) -> dict[str, object]:
    return {"optimizer": name, "use_ema": False, "max_train_steps": 4, "validation_prompt": None, "lora_dropout": 0, **SETTINGS[name]}


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
@pytest.mark.parametrize("name", SETTINGS if LONG else ["schedulefree_adamw", "prodigy"])
def test_begun_on_two_processes_and_gone_on_with_on_one_it_ends_in_the_same_bytes(name: str, trainer: Trainer) -> None:
    undisturbed = trainer.finish("undisturbed", **usual(name))
    pair = trainer.finish_on(2, "stopped", **usual(name) | {"max_train_steps": 2, "gradient_accumulation_steps": 1})
    assert bytes_of(pair.folder / "checkpoint-2") == bytes_of(undisturbed.folder / "checkpoint-2")
    resumed = trainer.finish("stopped", **usual(name) | {"gradient_accumulation_steps": 1})
    assert bytes_of(resumed.folder / "checkpoint-4") == bytes_of(undisturbed.folder / "checkpoint-4")


@pytest.fixture
def averaged(trainer: Trainer) -> Ended:
    return trainer.finish(**usual("schedulefree_adamw") | {"validation_prompt": "a red circle", "learning_rate": 5e-2})


def test_schedule_free_hands_over_the_average_and_trains_on_from_other_weights(averaged: Ended) -> None:
    checkpoint = averaged.folder / "checkpoint-4"
    saved = load_file(checkpoint / LORA)
    handed_over = load_file(averaged.folder / LORA)
    assert saved.keys() == handed_over.keys()
    assert all(torch.equal(saved[name], handed_over[name]) for name in saved)
    trained = {name: tensor for name, tensor in load_file(checkpoint / "optimizer.safetensors").items() if name.startswith("/trained/")}
    assert len(trained) == len(saved)
    assert sum(tensor.double().abs().sum() for tensor in trained.values()) != sum(tensor.double().abs().sum() for tensor in saved.values())


def test_arguments_that_an_optimizer_does_not_have_are_refused_before_anything_is_cached(trainer: Trainer) -> None:
    ended = trainer.run(optimizer="lion", optimizer_args="weight_decy=1")
    assert "lion has no argument weight_decy (did you mean weight_decay?)" in refusal(ended)
    assert not (ended.folder / "cache" / "latents").exists()


def test_the_arguments_of_a_run_stay_what_they_are(trainer: Trainer) -> None:
    trainer.finish(optimizer="lion", max_train_steps=2, validation_prompt=None, learning_rate=1e-3)
    ended = trainer.run(optimizer="lion", max_train_steps=4, optimizer_args="betas=0.8,0.9", learning_rate=1e-3)
    assert "optimizer_args was none and is now betas=0.8,0.9" in refusal(ended)
