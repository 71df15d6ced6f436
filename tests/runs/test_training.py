"""Every way of training ends in finite losses and in files that load; what must not matter does not."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from helpers.families.miniatures.sdxl import write_sdxl
from tests.harness import NO_VALIDATION, Ended, Trainer, same_weights
from tests.runs.evidence import refusal, unwrapped

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_cache")]


def test_a_finished_run_leaves_what_it_promises(finished: Ended) -> None:
    """The files of the README: each step once, each place of a step once, images of every step that was due, no pickle."""
    metrics, samples = finished.rows("metrics.jsonl"), finished.rows("samples.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    for row in metrics:
        of_step = [sample for sample in samples if sample["step"] == row["step"]]
        assert [sample["place"] for sample in of_step] == list(range(row["samples"]))
        assert row["loss"] == pytest.approx(sum(sample["loss"] for sample in of_step) / row["samples"], rel=1e-5)
    names = {path.name for path in (finished.folder / "validation_images").iterdir()}
    wanted = {f"step_{step}_validation_64x64.png" for step in (0, 4, 6)}
    assert wanted | {"contact_sheet.png"} == names
    for name in ("config.json", "dataset_report.json", "loss_curve.png", "pytorch_lora_weights.safetensors"):
        assert (finished.folder / name).is_file()
    assert not [path for path in finished.folder.rglob("*") if path.suffix in {".pt", ".pth", ".pkl", ".bin", ".ckpt"}]
    assert {path.name for path in finished.folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_time_ids_come_from_the_cut_that_was_made(finished: Ended) -> None:
    for row in finished.rows("samples.jsonl"):
        height, width = row["original_size"]
        assert (height, width) in {(64, 64), (64, 96), (96, 64), (80, 160)}
        assert all(offset >= 0 for offset in row["crop"])
        assert min(row["target_size"]) == 64


def test_training_lowers_the_loss_of_random_weights_and_captions_are_dropped_at_their_rate(trainer: Trainer) -> None:
    trainer.model = write_sdxl(trainer.folder / "random")
    usual = {"model_type": "full", "max_train_steps": 60, "learning_rate": 2e-3, "checkpointing_steps": 100, "use_ema": False}
    ended = trainer.finish(**usual, **NO_VALIDATION, caption_dropout_probability=0.5)
    assert sum(ended.losses[-10:]) < 0.8 * sum(ended.losses[:10])
    captions = [row["caption"] for row in ended.rows("samples.jsonl")]
    dropped = captions.count("")
    assert abs(dropped - len(captions) / 2) < 3 * (len(captions) / 4) ** 0.5
    assert {caption for caption in captions if caption} <= {f"a red circle {number:02}" for number in range(14)}


def test_neither_validation_nor_gradient_checkpointing_changes_what_is_trained(trainer: Trainer, finished: Ended) -> None:
    ended = trainer.finish(gradient_checkpointing=True, **NO_VALIDATION)
    assert not (ended.folder / "validation_images").exists()
    assert ended.losses == finished.losses
    assert same_weights(finished, ended)


@pytest.mark.parametrize(
    "settings",
    [
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "optimizer": "adamw"},
        {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "snr_gamma": 5},
    ],
    ids=["bf16 weights", "float32 weights under bf16", "epsilon with min-SNR"],
)
def test_a_full_fine_tune_learns_and_resumes_bit_for_bit(settings: dict[str, object], trainer: Trainer) -> None:
    usual = {"model_type": "full", "learning_rate": 1e-3, "max_train_steps": 4, "validation_steps": 0, **settings}
    undisturbed = trainer.finish("undisturbed", **usual)
    trainer.finish("stopped", **usual | {"max_train_steps": 2})
    resumed = trainer.finish("stopped", **usual)
    assert resumed.losses == undisturbed.losses
    for role in ("unet", "unet_live"):
        name = f"checkpoint-4/{role}/diffusion_pytorch_model.safetensors"
        assert (resumed.folder / name).read_bytes() == (undisturbed.folder / name).read_bytes()
    weights = load_file(undisturbed.folder / "checkpoint-4" / "unet_live" / "diffusion_pytorch_model.safetensors")
    in_bf16 = settings.get("mixed_precision") == "bf16" and "optimizer" not in settings
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16 if in_bf16 else torch.float32}
    average = load_file(undisturbed.folder / "checkpoint-4" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in average.values()} == {torch.float32}
    assert (undisturbed.folder / "pipeline" / "model_index.json").is_file()


def test_latents_can_be_drawn_anew_each_time(trainer: Trainer, finished: Ended) -> None:
    ended = trainer.finish(latent_sampling="sample", max_train_steps=2)
    again = trainer.finish("again", latent_sampling="sample", max_train_steps=2)
    assert ended.losses == again.losses
    assert ended.losses != finished.losses[:2]


def test_fp16_on_a_cpu_is_refused(trainer: Trainer) -> None:
    ended = trainer.run(mixed_precision="fp16")
    assert ended.code == 2
    assert "fp16 does not work on a CPU" in ended.printed


def test_a_longer_run_says_how_its_learning_rate_changes(trainer: Trainer) -> None:
    trainer.finish(max_train_steps=2, lr_scheduler="cosine", lr_warmup_steps=0, lr_end=0)
    longer = trainer.finish(max_train_steps=4, lr_scheduler="cosine", lr_warmup_steps=0, lr_end=0)
    assert "max_train_steps was 2 and is 4, so the run gets another length" in longer.printed
    # Half-way down the cosine over 4 steps; that over 2 steps has ended.
    assert "step 3 has the learning rate 0.005; with the settings and the length of checkpoint-2 it would be 0" in unwrapped(longer.printed)


def test_a_change_of_schedule_is_reported_with_the_rates_of_both(trainer: Trainer) -> None:
    trainer.finish(max_train_steps=2, lr_scheduler="constant")
    longer = trainer.finish(max_train_steps=4, lr_scheduler="cosine", lr_warmup_steps=0, lr_end=0)
    said = unwrapped(longer.printed)
    assert "lr_scheduler was constant and is cosine from step 2 on" in said
    assert "step 3 has the learning rate 0.005; with the settings and the length of checkpoint-2 it would be 0.01" in said


def test_a_setting_of_the_optimizer_cannot_change(trainer: Trainer) -> None:
    trainer.finish(max_train_steps=2, adam_beta1=0.9)
    assert "adam_beta1 was 0.9 and is now 0.5" in refusal(trainer.run(max_train_steps=4, adam_beta1=0.5))


def test_a_drawn_seed_is_kept_for_the_next_life(trainer: Trainer) -> None:
    first = trainer.finish(seed=-1, max_train_steps=2).losses
    longer = trainer.finish(seed=-1, max_train_steps=4).losses
    assert longer[:2] == first
    assert trainer.finish("other", seed=-1, max_train_steps=2).losses != first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_fp16_trains_on_a_gpu(trainer: Trainer) -> None:
    ended = trainer.finish(mixed_precision="fp16", environ={"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")})
    assert len(ended.losses) == 6
