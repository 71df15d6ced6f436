"""Captions of more than 77 tokens in chunks. The expected side knows transformers, diffusers and the numbers written here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from helpers.data.base.padding import stacked, without_padding
from tests.families.conftest import CLIP_ALONE, CPU, Tried, family_name, open_family

SHORT, LONG, LONGER = "a red circle", "a photo of a cat on the sea " * 20, "blue square and green star " * 40
ROOM, LENGTH = 75, 77
ENCODERS = {"sd1": ("",), "sd2": ("",), "sdxl": ("", "_2"), "sdxl_refiner": ("_2",)}


@pytest.fixture(params=CLIP_ALONE)
def chunked(request: pytest.FixtureRequest, miniature: Callable[[str], Path], tmp_path: Path) -> Tried:
    folder = miniature(request.param)
    family = open_family(family_name(request.param), folder, tmp_path / "cache", long_captions="chunk")
    return Tried(request.param, folder, family)


def expected(tried: Tried, caption: str) -> dict[str, Tensor]:
    """Chunks of 75 tokens between their marks, encoded one by one; the states one after another, the pooled text of the first."""
    states, pooled = [], torch.empty(0)
    tokenized = []
    for suffix in ENCODERS[tried.miniature]:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(tried.folder / f"tokenizer{suffix}")
        ids = tokenizer(caption, add_special_tokens=False).input_ids
        tokenized.append((suffix, tokenizer, [ids[at : at + ROOM] for at in range(0, max(1, len(ids)), ROOM)]))
    count = max(len(pieces) for _, _, pieces in tokenized)
    for suffix, tokenizer, pieces in tokenized:
        folder = tried.folder / f"text_encoder{suffix}"
        kind = transformers.CLIPTextModelWithProjection if tried.miniature.startswith("sdxl") and suffix else transformers.CLIPTextModel
        encoder: Any = kind.from_pretrained(folder, dtype=torch.float32).eval()
        of_chunks = []
        for piece in [*pieces, *[[]] * (count - len(pieces))]:
            row = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
            row += [tokenizer.pad_token_id] * (LENGTH - len(row))
            with torch.no_grad():
                output = encoder(torch.tensor([row]), output_hidden_states=True)
            of_chunks.append(output)
        penultimate = tried.miniature.startswith("sdxl")
        states.append(torch.cat([(each.hidden_states[-2] if penultimate else each.last_hidden_state)[0] for each in of_chunks]))
        pooled = of_chunks[0].text_embeds[0] if hasattr(of_chunks[0], "text_embeds") else torch.empty(0)
    told = {"prompt_embeds": torch.cat(states, -1)}
    return {**told, "pooled": pooled} if tried.miniature.startswith("sdxl") else told


def test_chunks_are_encoded_one_by_one_and_stand_one_after_another(chunked: Tried) -> None:
    captions = [SHORT, LONG, "", LONGER]
    with chunked.family.text_encoders(CPU) as encoders:
        given = encoders.encode(captions)
        assert encoders.truncated == 0
    for index, caption in enumerate(captions):
        record = without_padding({name: tensor[index] for name, tensor in given.items()})
        for name, tensor in expected(chunked, caption).items():
            assert record[name].shape == tensor.shape
            assert torch.allclose(record[name], tensor, atol=1e-5)
    assert without_padding({name: tensor[3] for name, tensor in given.items()})["prompt_embeds"].shape[0] >= 3 * LENGTH


def test_what_fits_into_77_tokens_is_told_as_without_chunks(chunked: Tried, tmp_path: Path) -> None:
    plain = open_family(family_name(chunked.miniature), chunked.folder, tmp_path / "other")
    with chunked.family.text_encoders(CPU) as ours, plain.text_encoders(CPU) as usual:
        assert ours.fingerprint != usual.fingerprint
        given, as_usual = ours.encode([SHORT, ""]), usual.encode([SHORT, ""])
    for name, tensor in as_usual.items():
        assert torch.allclose(given[name], tensor, atol=1e-5)


def answers(tried: Tried, network: Any, captions: list[str]) -> Tensor:
    """The network's answer under captions as they come from a cache: without padding, and joined again."""
    batch = tried.batch(captions)
    text = stacked([without_padding({name: tensor[index] for name, tensor in batch.text.items()}) for index in range(len(captions))])
    conditioning = tried.family.conditioning(dataclasses.replace(batch, text=text), CPU)
    with torch.no_grad():
        return tried.family.predict(network, batch.latents, torch.tensor([500] * len(captions)), conditioning)


def test_a_caption_does_not_care_what_stands_beside_it(chunked: Tried) -> None:
    network = chunked.family.load(torch.float32).denoiser.eval()
    together = answers(chunked, network, [SHORT, LONGER])
    assert torch.allclose(together[:1], answers(chunked, network, [SHORT]), atol=1e-5)
    cut_off = answers(chunked, network, [SHORT, LONGER.rpartition(" green")[0][: len(SHORT)]])
    assert (together[1] - cut_off[1]).abs().max() > 1e-5


def test_a_pipeline_is_told_equally_many_states_and_makes_of_them_what_the_network_does(chunked: Tried) -> None:
    with chunked.family.text_encoders(CPU) as encoders:
        long, negative = ({name: tensor[0] for name, tensor in encoders.encode([caption]).items()} for caption in (LONG, SHORT))
    arguments = chunked.family.prompt_arguments(long, negative)
    assert arguments["prompt_embeds"].shape == arguments["negative_prompt_embeds"].shape
    network = chunked.family.load(torch.float32).denoiser.eval()
    batch = chunked.batch([SHORT])
    text = {**batch.text, "prompt_embeds": arguments["negative_prompt_embeds"]}
    text["prompt_embeds_mask"] = torch.ones(1, text["prompt_embeds"].shape[1], dtype=torch.bool)
    conditioning = chunked.family.conditioning(dataclasses.replace(batch, text=text), CPU)
    with torch.no_grad():
        repeated = chunked.family.predict(network, batch.latents, torch.tensor([500]), conditioning)
    assert torch.allclose(repeated, answers(chunked, network, [SHORT]), atol=1e-5)


def test_captions_are_of_any_length(chunked: Tried) -> None:
    lengths = chunked.family.caption_lengths()
    assert lengths.limit is None and lengths.token_counts([LONGER])[0] > 2 * LENGTH
