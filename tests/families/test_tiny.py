from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from helpers.families.miniatures.clip import word_vocabulary
from helpers.families.miniatures.sdxl import write_sdxl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)


def weights_digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.safetensors")))).hexdigest()


def test_a_miniature_loads_in_diffusers_and_makes_a_picture(pipeline: StableDiffusionXLPipeline) -> None:
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline("a red circle", height=64, width=96, num_inference_steps=2, output_type="np").images
    assert pictures.shape == (1, 64, 96, 3)


def test_the_pooled_embedding_depends_on_the_last_word_of_the_prompt(pipeline: StableDiffusionXLPipeline) -> None:
    pooled = [pipeline.encode_prompt(f"a photo of a {word}")[2] for word in ("cat", "dog")]
    assert not torch.allclose(pooled[0], pooled[1])


def test_latents_are_an_eighth_of_the_picture(pipeline: StableDiffusionXLPipeline) -> None:
    assert pipeline.vae.encode(torch.zeros(1, 3, 64, 96)).latent_dist.mean.shape == (1, 4, 8, 12)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    assert weights_digest(write_sdxl(tmp_path / "same", seed=3)) == weights_digest(folder)
    assert weights_digest(write_sdxl(tmp_path / "other", seed=4)) != weights_digest(folder)


def test_writing_a_miniature_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    write_sdxl(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_word_of_the_vocabulary_is_one_token_even_when_words_share_pieces() -> None:
    words = ["an", "orange", "triangle", "range", "ran", "strange", "angel", "naïve"]
    vocab, merges = word_vocabulary(words)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges)
    assert [len(tokenizer.tokenize(word)) for word in words] == [1] * len(words)


def test_words_outside_the_vocabulary_become_known_pieces(pipeline: StableDiffusionXLPipeline) -> None:
    ids = pipeline.tokenizer("Zebra ☂", add_special_tokens=False).input_ids
    assert len(ids) > 2 and pipeline.tokenizer.eos_token_id not in ids


def test_ids_stand_where_clip_has_them(pipeline: StableDiffusionXLPipeline) -> None:
    tokenizer = pipeline.tokenizer_2
    assert tokenizer.convert_tokens_to_ids("!") == 0 == tokenizer.pad_token_id
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id] == [len(tokenizer) - 2, len(tokenizer) - 1]
    assert pipeline.tokenizer.pad_token_id == pipeline.tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_the_old_tokenizer_files_give_the_same_ids_as_the_new_one(folder: Path, tmp_path: Path, name: str) -> None:
    for file in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / name / file).read_bytes())
    old, new = (CLIPTokenizer.from_pretrained(path, local_files_only=True) for path in (tmp_path, folder / name))
    captions = ["a Red circle!", "", "purple  élan 5x"]
    assert old(captions, padding="max_length").input_ids == new(captions, padding="max_length").input_ids


def test_schedule_settings_replace_the_usual_ones(tmp_path: Path) -> None:
    write_sdxl(tmp_path, scheduler={"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert (config["prediction_type"], config["rescale_betas_zero_snr"], config["beta_end"]) == ("v_prediction", True, 0.012)
