"""Miniature models: the real architecture and file layout of a family, with random weights, in a megabyte or less.

    ./simpletuner miniature sdxl /tmp/tiny-sdxl

Tests train them, the embedded default (`demo/`) starts from one, and whoever changes the trainer can try a family in seconds. Everything
is made offline and from a seed; the folders load with plain diffusers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.registry import Registry

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTokenizer

MINIATURES: Registry[Callable[..., Path]] = Registry(  # each writes a model into a folder: (folder, seed=) => the folder
    {
        "deepfloyd_1": "helpers.families.miniatures.deepfloyd:write_deepfloyd_1",
        "deepfloyd_2": "helpers.families.miniatures.deepfloyd:write_deepfloyd_2",
        "hunyuan_dit": "helpers.families.miniatures.hunyuan_dit:write_hunyuan_dit",
        "hunyuan_dit_11": "helpers.families.miniatures.hunyuan_dit:write_hunyuan_dit_11",
        "pixart_alpha": "helpers.families.miniatures.pixart:write_pixart_alpha",
        "pixart_sigma": "helpers.families.miniatures.pixart:write_pixart_sigma",
        "sd1": "helpers.families.miniatures.sd:write_sd1",
        "sd2": "helpers.families.miniatures.sd:write_sd2",
        "sd3": "helpers.families.miniatures.sd3:write_sd3",
        "sd35": "helpers.families.miniatures.sd3:write_sd35",
        "sdxl": "helpers.families.tiny:write_sdxl",
        "sdxl_refiner": "helpers.families.miniatures.sd:write_sdxl_refiner",
    }
)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
MAX_TOKENS = 77

WORDS = (
    "a",
    "an",
    "and",
    "at",
    "in",
    "of",
    "on",
    "the",
    "with",
    "photo",
    "picture",
    "painting",
    "background",
    "red",
    "green",
    "blue",
    "yellow",
    "orange",
    "purple",
    "white",
    "black",
    "gray",
    "cyan",
    "pink",
    "brown",
    "circle",
    "square",
    "triangle",
    "cat",
    "dog",
    "person",
    "house",
    "tree",
    "flower",
    "sky",
    "sea",
    "street",
    "small",
    "large",
)

SDXL_SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class SdxlSizes:
    """Widths and depths of a miniature SDXL; the shape of the network (three levels, attention in the lower two) stays SDXL's own."""

    unet_channels: tuple[int, int, int] = (16, 32, 32)
    unet_heads: tuple[int, int, int] = (1, 2, 2)  # attention heads a level; the first level has no attention
    unet_layers: int = 1  # residual blocks a level
    unet_transformers: tuple[int, int, int] = (1, 1, 2)  # transformer blocks in each attention layer, a level
    unet_groups: int = 8
    time_id_width: int = 8  # width of the embedding of each of the six size numbers
    text_width: int = 32
    text_2_width: int = 32
    text_layers: int = 2
    text_heads: int = 2
    pooled_width: int = 32
    vae_channels: tuple[int, ...] = (8, 16, 16, 16)  # four levels: 8 times smaller latents
    vae_groups: int = 4
    vae_layers: int = 1


def write_sdxl(
    folder: str | Path,
    *,
    seed: int = 0,
    vocabulary: Sequence[str] = WORDS,
    sizes: SdxlSizes | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> Path:
    """Write a miniature SDXL with random weights in diffusers layout => the folder, which `StableDiffusionXLPipeline` loads offline.

    `scheduler` holds noise schedule settings that replace SDXL's own. The same arguments give the same weights.
    """
    return save_sdxl(build_sdxl(seed=seed, vocabulary=vocabulary, sizes=sizes, scheduler=scheduler), folder)


def build_sdxl(
    *,
    seed: int = 0,
    vocabulary: Sequence[str] = WORDS,
    sizes: SdxlSizes | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> StableDiffusionXLPipeline:
    """A miniature SDXL in memory, float32, as `write_sdxl` writes it."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    sizes = sizes or SdxlSizes()
    vocab, merges = word_vocabulary(vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusionXLPipeline(
            vae=small_vae(sizes.vae_channels, sizes.vae_groups, sizes.vae_layers, scale=0.13025),
            text_encoder=CLIPTextModel(_text_config(sizes, sizes.text_width, len(vocab), "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(sizes, sizes.text_2_width, len(vocab), "gelu")),
            # SDXL's two tokenizers differ in what they pad with
            tokenizer=clip_tokenizer(vocab, merges, pad=EOS),
            tokenizer_2=clip_tokenizer(vocab, merges, pad="!"),
            unet=_unet(sizes),
            scheduler=EulerDiscreteScheduler(**{**SDXL_SCHEDULE, **(scheduler or {})}),
            add_watermarker=False,
        )


def save_sdxl(pipeline: StableDiffusionXLPipeline, folder: str | Path) -> Path:
    """Write a pipeline of `build_sdxl` as safetensors, with tokenizers that older tools read too."""
    return save_pipeline(pipeline, folder)


def save_pipeline(pipeline: Any, folder: str | Path) -> Path:
    """Write a pipeline as safetensors, with CLIP tokenizers that older tools read too => the folder."""
    folder = Path(folder)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(pipeline, name, None) is not None:
            write_legacy_tokenizer(getattr(pipeline, name), folder / name)
    return folder


def word_vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A CLIP byte-pair vocabulary in which each of `words` is one token => (token to id, merges by priority).

    As in CLIP: all bytes, "!" first as id 0; all bytes that end a word; merged pieces; begin and end of text, which must have
    the highest ids because CLIP pools at the highest id.
    """
    letters = _byte_letters()
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [letters[byte] for byte in word.lower().encode()]
        pieces = _merge([*symbols[:-1], symbols[-1] + END_OF_WORD], merges)
        # A new merge has the lowest priority, so no word that was one token before comes apart.
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merge(pieces, merges)
    alphabet = list(letters.values())
    merged = dict.fromkeys(left + right for left, right in merges)
    tokens = [*alphabet, *(letter + END_OF_WORD for letter in alphabet), *merged, BOS, EOS]
    return {token: number for number, token in enumerate(tokens)}, merges


def write_legacy_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write vocab.json, merges.txt and special_tokens_map.json, which transformers 4 and many interfaces read, beside tokenizer.json."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "unk", "pad")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def _byte_letters() -> dict[int, str]:
    """Byte to visible letter, in CLIP's order: the printable ones as themselves, "!" first; then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _merge(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: apply the merge of highest priority until none fits."""
    priority = {pair: rank for rank, pair in enumerate(merges)}
    while candidates := [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in priority]:
        best = min(candidates, key=priority.__getitem__)
        merged: list[str] = []
        for piece in pieces:
            if merged and (merged[-1], piece) == best:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return pieces


def clip_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], *, pad: str) -> CLIPTokenizer:
    """CLIP's tokenizer over a vocabulary of `word_vocabulary`."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=vocab, merges=merges, bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=pad, model_max_length=MAX_TOKENS
    )


def clip_config(
    tokens: int, width: int, *, layers: int = 2, heads: int = 2, projection: int = 32, activation: str = "quick_gelu"
) -> CLIPTextConfig:
    """A small CLIP text encoder over a vocabulary of `tokens` that ends with begin and end of text."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=activation,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )


def _text_config(sizes: SdxlSizes, width: int, tokens: int, activation: str) -> CLIPTextConfig:
    return clip_config(
        tokens, width, layers=sizes.text_layers, heads=sizes.text_heads, projection=sizes.pooled_width, activation=activation
    )


def _unet(sizes: SdxlSizes) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=sizes.unet_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=sizes.unet_layers,
        transformer_layers_per_block=sizes.unet_transformers,
        attention_head_dim=sizes.unet_heads,  # diffusers' name; for this architecture it counts heads
        norm_num_groups=sizes.unet_groups,
        cross_attention_dim=sizes.text_width + sizes.text_2_width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=sizes.time_id_width,
        projection_class_embeddings_input_dim=sizes.pooled_width + 6 * sizes.time_id_width,
    )


def small_vae(channels: Sequence[int] = (8, 16, 16, 16), groups: int = 4, layers: int = 1, *, scale: float, **more: Any) -> AutoencoderKL:
    """A VAE of as many levels as `channels`; each level but the last halves the edges. `more` are settings of AutoencoderKL."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers,
        norm_num_groups=groups,
        sample_size=64,
        scaling_factor=scale,
        **{"latent_channels": 4, **more},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./simpletuner miniature", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=MINIATURES, help="whose architecture and files")
    parser.add_argument("folder", type=Path, help="where the model is written to")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same weights (default: 0)")
    options = parser.parse_args(arguments)
    print(MINIATURES[options.family](options.folder, seed=options.seed))
    return 0


if __name__ == "__main__":
    main()
