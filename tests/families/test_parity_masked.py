"""The training step of the families that mask their text against diffusers. The expected side knows torch, diffusers and numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor
from transformers import T5TokenizerFast

import train
from helpers.config.options import ObjectiveOptions
from helpers.families.text import t5
from helpers.objectives.diffusion import Diffusion
from tests.families.conftest import CAPTIONS, CPU, PEFT_ALONE, Tried
from tests.families.other_losses import other_losses

PIXART = ("pixart_sigma", "pixart_alpha")
SIZES = {"resolution": [768.0, 1344], "aspect_ratio": [768 / 1344]}  # of the target, (height, width): Alpha is told them
META_SIZE = [1920.0, 1157, 1344, 768, 25, 36]  # (width, height) of the file and of the target, (left, top): Hunyuan-DiT 1.1 is told them
LONG = "a photo of a cat " * 80


def embeddings(pipeline: Any, captions: list[str], dropped: bool = False) -> dict[str, Tensor]:
    """What a pipeline of diffusers makes of captions, or of no negative prompt beside them, by our names."""
    with torch.no_grad():
        if "PixArt" in type(pipeline).__name__:
            given = pipeline.encode_prompt(captions, device=CPU, do_classifier_free_guidance=dropped)[2 * dropped :]
            return {"prompt_embeds": given[0], "prompt_embeds_mask": given[1].bool()}
        bert, mt5 = (
            pipeline.encode_prompt(captions, device=CPU, do_classifier_free_guidance=dropped, text_encoder_index=index)[dropped::2]
            for index in (0, 1)
        )
    return {
        "prompt_embeds": bert[0],
        "prompt_embeds_mask": bert[1].bool(),
        "prompt_embeds_2": mt5[0],
        "prompt_attention_mask_2": mt5[1].bool(),
    }


def answer(pipeline: Any, miniature: str, noisy: Tensor, timesteps: Tensor, captions: list[str]) -> Tensor:
    text = embeddings(pipeline, captions)
    named: dict[str, Any] = {"encoder_hidden_states": text["prompt_embeds"]}
    if miniature in PIXART:
        sizes = {name: torch.tensor([row] * len(captions)) for name, row in SIZES.items()}
        named["added_cond_kwargs"] = sizes if miniature == "pixart_alpha" else None
        named["encoder_attention_mask"] = text["prompt_embeds_mask"]
    else:
        base = 512 // 8 // 2  # patches on the edge of the square that positions are laid over
        named["image_rotary_emb"] = get_2d_rotary_pos_embed(16, ((0, 0), (base, base)), (4, 4), output_type="pt")
        named["text_embedding_mask"] = text["prompt_embeds_mask"]
        named["encoder_hidden_states_t5"], named["text_embedding_mask_t5"] = text["prompt_embeds_2"], text["prompt_attention_mask_2"]
        if miniature == "hunyuan_dit_11":
            named["image_meta_size"] = torch.tensor([META_SIZE] * len(captions))
            named["style"] = torch.zeros(len(captions), dtype=torch.long)
    with torch.no_grad():
        given = pipeline.transformer(noisy, timestep=timesteps.float(), **named).sample
    return given.chunk(2, dim=1)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("tried", PEFT_ALONE, indirect=True)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", None])
def test_prediction_target_and_loss_are_those_of_diffusers(tried: Tried, prediction: str | None) -> None:
    objective = Diffusion(ObjectiveOptions(prediction_type=prediction), tried.family.scheduler_config)
    batch = tried.batch()
    denoiser = tried.family.load(torch.float32).denoiser
    with torch.no_grad():
        losses, corrupted = train.train_step(tried.family, objective, denoiser, batch, CPU)

    scheduler: Any = DDPMScheduler.from_pretrained(tried.folder, subfolder="scheduler")
    noise, timesteps = batch.draws.normal("noise", *batch.latents.shape[1:]), corrupted.timesteps
    noisy = scheduler.add_noise(batch.latents, noise, timesteps)
    predicts = prediction or ("epsilon" if tried.miniature in PIXART else "v_prediction")
    velocity = scheduler.get_velocity(batch.latents, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": batch.latents}[predicts]
    predicted = answer(DiffusionPipeline.from_pretrained(tried.folder), tried.miniature, noisy, timesteps, list(CAPTIONS))
    assert torch.allclose(corrupted.noisy, noisy, atol=1e-5)
    assert torch.allclose(corrupted.target, target, atol=1e-5)
    assert torch.allclose(losses, ((predicted - target) ** 2).mean(dim=(1, 2, 3)), rtol=1e-5)
    for ours, expected in other_losses(tried, batch, predicts, predicted, target, scheduler.alphas_cumprod[timesteps]):
        assert torch.allclose(ours, expected, rtol=1e-4)


@pytest.mark.parametrize("tried", PEFT_ALONE, indirect=True)
def test_captions_are_encoded_as_the_pipeline_encodes_them(tried: Tried) -> None:
    captions = [*CAPTIONS, LONG]
    with tried.family.text_encoders(CPU) as encoders:
        ours = encoders.encode(captions)
        assert encoders.truncated == 1
    theirs = embeddings(DiffusionPipeline.from_pretrained(tried.folder), captions)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=1e-5) for name in ours)


@pytest.mark.parametrize("tried", PEFT_ALONE, indirect=True)
def test_a_dropped_caption_is_what_the_pipeline_takes_for_no_negative_prompt(tried: Tried) -> None:
    expected = embeddings(DiffusionPipeline.from_pretrained(tried.folder), ["a cat"], dropped=True)
    with tried.family.text_encoders(CPU) as encoders:
        dropped = tried.family.unconditional(encoders)
    assert dropped.keys() == expected.keys()
    assert all(torch.allclose(dropped[name].float(), expected[name][0].float(), atol=1e-5) for name in expected)


@pytest.mark.parametrize("tried", PIXART, indirect=True)
def test_token_ids_of_t5_end_with_the_end_of_text_or_padding(tried: Tried) -> None:
    tokenizer = T5TokenizerFast.from_pretrained(tried.folder / "tokenizer")
    ids, mask, too_long = t5.tokenize(tokenizer, [*CAPTIONS, LONG], 8)
    assert ids.shape == (5, 8) and too_long == 2
    assert ids[0, 3:].tolist() == [1, 0, 0, 0, 0] and mask[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert ids[4, -1] == 1 and mask[4].all()
