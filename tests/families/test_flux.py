"""FLUX.1 against its pipeline of diffusers, and formulas written here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

import train
from helpers.config.options import AdapterOptions
from helpers.errors import ConfigError, ModelError
from helpers.families.lora import kohya_file
from helpers.families.original import flux_file
from helpers.families.original.flux_names import flux_names
from helpers.families.original.transformer_names import kohya_transformer_name
from helpers.methods.lora import Lora
from helpers.methods.lora_layouts import to_kohya
from helpers.protocols import FusedPart, SwappedHalves
from tests.families.conftest import CAPTIONS, CPU, Tried, open_family

BOTH = ("flux", "flux_schnell")
TOKENS = {"flux": 512, "flux_schnell": 256}
LONG = "a photo of a cat " * 150


def encoded(pipeline: Any, captions: list[str], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's states (B, tokens, D) and pooled outputs (B, P)."""
    with torch.no_grad():
        states, pooled, _ = pipeline.encode_prompt(captions, device=CPU, max_sequence_length=tokens)
    return states, pooled


@pytest.mark.parametrize("tried", BOTH, indirect=True)
def test_captions_are_encoded_as_the_pipeline_encodes_them(tried: Tried) -> None:
    """The padding too, which neither T5 nor the network masks."""
    captions = [*CAPTIONS, LONG]
    with tried.family.text_encoders(CPU) as encoders:
        ours = encoders.encode(captions)
        assert encoders.truncated == 1
    states, pooled = encoded(FluxPipeline.from_pretrained(tried.folder), captions, TOKENS[tried.miniature])
    assert states.shape[1] == TOKENS[tried.miniature]
    assert torch.allclose(ours["prompt_embeds"], states, atol=1e-5) and torch.allclose(ours["pooled"], pooled, atol=1e-5)


@pytest.mark.parametrize("tried", BOTH, indirect=True)
def test_prediction_target_and_loss_are_those_of_flow_matching(tried: Tried) -> None:
    """x_s = (1 - s) x_0 + s e; the network gets packs of 2 x 2, s, positions and, for dev, guidance 1; the target is e - x_0."""
    batch, pipeline = tried.batch(), FluxPipeline.from_pretrained(tried.folder)
    with torch.no_grad():
        losses, corrupted = train.train_step(tried.family, tried.objective(), tried.family.load(torch.float32).denoiser, batch, CPU)
        noise, share = batch.draws.normal("noise", *batch.latents.shape[1:]), corrupted.timesteps / 1000
        noisy = (1 - share.view(-1, 1, 1, 1)) * batch.latents + share.view(-1, 1, 1, 1) * noise
        states, pooled = encoded(pipeline, list(CAPTIONS), TOKENS[tried.miniature])
        answer = pipeline.transformer(
            hidden_states=FluxPipeline._pack_latents(noisy, 4, 16, 8, 8),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=share,
            img_ids=FluxPipeline._prepare_latent_image_ids(4, 4, 4, CPU, torch.float32),
            txt_ids=torch.zeros(states.shape[1], 3),
            guidance=torch.ones(4) if tried.miniature == "flux" else None,
        ).sample
        answer = FluxPipeline._unpack_latents(answer, 64, 64, 8)
    assert torch.allclose(corrupted.noisy, noisy, atol=1e-5)
    assert torch.allclose(losses, ((answer - (noise - batch.latents)) ** 2).mean(dim=(1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("tried", BOTH, indirect=True)
def test_the_schedule_of_dev_is_shifted_by_the_size_of_the_image_and_that_of_schnell_is_not(tried: Tried) -> None:
    objective: Any = tried.objective()
    found = [objective.shift(tokens) for tokens in (256, 1024, 4096)]
    by_size = [math.exp(mu) for mu in (0.5, 0.63, 1.15)]
    assert found == pytest.approx(by_size if tried.miniature == "flux" else [1, 1, 1])
    fixed: Any = tried.objective(flow_shift=2.0)
    assert fixed.shift(4096) == 2 and not fixed.scheduler_config["use_dynamic_shifting"]


@pytest.mark.parametrize("tried", BOTH, indirect=True)
def test_validation_samples_as_the_pipeline_does_from_the_words(tried: Tried) -> None:
    whole = FluxPipeline.from_pretrained(tried.folder)
    whole.set_progress_bar_config(disable=True)
    with tried.family.text_encoders(CPU) as encoders:
        text, negative = ({name: tensor[0] for name, tensor in encoders.encode([caption]).items()} for caption in ("a cat", "blurry"))
    ours = tried.family.pipeline(whole.transformer, whole.scheduler)
    usual: dict[str, Any] = {"width": 64, "height": 96, "num_inference_steps": 2, "guidance_scale": 3.5}
    found = ours(**tried.family.prompt_arguments(text, negative), generator=torch.manual_seed(1), output_type="latent", **usual).images
    with tried.family.image_codec(CPU) as codec:
        image = codec.decode(found) / 2 + 0.5
    tokens = TOKENS[tried.miniature]
    expected = whole("a cat", generator=torch.manual_seed(1), output_type="pt", max_sequence_length=tokens, **usual).images
    assert found.shape == (1, 16, 12, 8)
    assert torch.allclose(image, expected, atol=1e-4)


def test_guidance_is_trained_for_dev_and_refused_for_schnell(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    tried = Tried("flux", miniature("flux"), open_family("flux", miniature("flux"), tmp_path, flux_guidance=2.5))
    assert tried.family.conditioning(tried.batch(), CPU)["guidance"].tolist() == [2.5] * 4
    with pytest.raises(ConfigError, match=r"--flux_guidance=1: .* is FLUX.1 schnell, whose network has no input for guidance; remove it"):
        open_family("flux", miniature("flux_schnell"), tmp_path, flux_guidance=1.0)
    schnell: Any = open_family("flux", miniature("flux_schnell"), tmp_path)
    assert schnell.notes and not tried.family.notes


PUBLISHED = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19, "num_single_layers": 38}
WIDTH = 3072
SIZES = {  # in, out of the layers of both kinds of blocks
    "ff.net.0.proj": (WIDTH, 4 * WIDTH),
    "ff.net.2": (4 * WIDTH, WIDTH),
    "norm1.linear": (WIDTH, 6 * WIDTH),
    "proj_mlp": (WIDTH, 4 * WIDTH),
    "proj_out": (5 * WIDTH, WIDTH),
    "norm.linear": (WIDTH, 3 * WIDTH),
}
DOUBLE = "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_add_out"
SINGLE = "attn.to_q attn.to_k attn.to_v"
MLP = "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2 norm1.linear norm1_context.linear"


@pytest.mark.parametrize(
    ("double", "single"),
    [(DOUBLE, SINGLE), (f"{DOUBLE} {MLP}", f"{SINGLE} proj_mlp proj_out norm.linear"), ("attn.to_k", "proj_mlp")],
    ids=["attention", "every layer", "parts of fused layers"],
)
def test_a_kohya_file_of_two_blocks_of_the_published_width_is_read_by_diffusers(double: str, single: str, tmp_path: Path) -> None:
    """The change of each layer is the trained one, and zero for the parts of fused layers that were not trained."""
    layers = [
        *(f"transformer_blocks.7.{layer}" for layer in double.split()),
        *(f"single_transformer_blocks.30.{s}" for s in single.split()),
    ]
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in layers:
        into, out = SIZES.get(layer.split(".", 2)[2].replace("_context", ""), (WIDTH, WIDTH))
        tensors[f"{layer}.lora_A.weight"] = torch.randn(4, into, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
    names = flux_names(PUBLISHED)
    kohya = to_kohya(tensors, dict.fromkeys(layers, 0.5), lambda module: kohya_transformer_name(names, module))
    assert "lora_unet_double_blocks_7_img_attn_qkv.lora_down.weight" in kohya
    assert kohya["lora_unet_single_blocks_30_linear1.lora_up.weight"].shape[0] == 7 * WIDTH
    save_file({name: tensor.contiguous() for name, tensor in kohya.items()}, tmp_path / "lora.safetensors")
    theirs: Any = FluxPipeline.lora_state_dict(tmp_path, weight_name="lora.safetensors")
    ours, scales = kohya_file.read(tmp_path / "lora.safetensors", names)
    assert set(scales) == set(layers)
    for layer in {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in theirs}:
        a, b = (theirs[f"transformer.{layer}.lora_{side}.weight"] for side in "AB")
        x = torch.randn(a.shape[1], generator=generator)
        trained = torch.zeros(len(b))
        if layer in layers:
            trained = 0.5 * tensors[f"{layer}.lora_B.weight"] @ (tensors[f"{layer}.lora_A.weight"] @ x)
            read = scales[layer] * ours[f"{layer}.lora_B.weight"] @ (ours[f"{layer}.lora_A.weight"] @ x)
            assert (read - trained).norm() <= 1e-5 * trained.norm(), layer
        assert (b @ (a @ x) - trained).norm() <= 1e-5 * trained.norm(), layer


@pytest.mark.parametrize("tried", ["flux"], indirect=True)
def test_a_lora_on_attention_is_written_and_read_in_both_layouts(tried: Tried, tmp_path: Path) -> None:
    """Of a miniature too, whose width diffusers' reader of kohya files does not know."""
    method = Lora(AdapterOptions(lora_rank=4, lora_alpha=8.0), tried.family)
    trainable = method.attach(tried.family.load(torch.float32))
    for parameter in trainable.parameters.values():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    plain, kohya = method.save(trainable, tmp_path)
    names = {name.partition(".")[0] for name in load_file(kohya)}
    assert {
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_double_blocks_0_txt_attn_proj",
        "lora_unet_single_blocks_1_linear1",
    } <= names
    assert all(name.startswith("transformer.") for name in load_file(plain))


def write_original(network: Path, config: dict[str, Any], path: Path, prefix: str = "") -> Path:
    """A network of diffusers in one file with the names and layers of Black Forest Labs."""
    names, fused, tensors = flux_names(config), {}, {}
    for name, tensor in load_file(network).items():
        module, _, kind = name.rpartition(".")
        original: Any = names[module]
        if isinstance(original, FusedPart):
            fused.setdefault(f"{original.layer}.{kind}", {})[original.index] = tensor
        elif isinstance(original, SwappedHalves):
            tensors[f"{original.layer}.{kind}"] = torch.cat(tensor.chunk(2)[::-1])
        else:
            tensors[f"{original}.{'scale' if original.endswith('_norm') else kind}"] = tensor
    tensors |= {layer: torch.cat([parts[index] for index in sorted(parts)]) for layer, parts in fused.items()}
    save_file({f"{prefix}{name}": tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(("name", "prefix"), [("flux", ""), ("flux_schnell", "model.diffusion_model.")])
def test_a_network_in_one_file_is_trained_with_the_other_parts_of_a_folder(
    name: str, prefix: str, miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, kind = miniature(name), flux_file.WEIGHTS
    config = json.loads((folder / "transformer" / "config.json").read_text())
    file = write_original(folder / "transformer" / kind, config, tmp_path / "flux1.safetensors", prefix)
    family: Any = open_family("flux", file, tmp_path / "cache", single_file_config=str(folder))
    found, expected = load_file(family.base.folder / "transformer" / kind), load_file(folder / "transformer" / kind)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert family.vae.folder.parent != folder and family.is_dev == (name == "flux")
    with pytest.raises(ModelError, match="holds the network of FLUX.1 alone: name with --single_file_config a model folder"):
        open_family("flux", file, tmp_path / "cache")
    other = miniature("flux_schnell" if name == "flux" else "flux")
    with pytest.raises(ModelError, match=f"--single_file_config: {other} is a model of FLUX.1 .*; name a folder of FLUX.1"):
        open_family("flux", file, tmp_path / "cache", single_file_config=str(other))


def test_a_published_file_is_read_as_diffusers_converts_it(tmp_path: Path) -> None:
    """Names and rows of the published network, which diffusers' converter knows; one column of each weight is enough."""
    config = {**PUBLISHED, "num_layers": 1, "num_single_layers": 1}
    rows = {"mod.lin": 6, "modulation.lin": 3, "attn.qkv": 3, "mlp.0": 4, "linear1": 7, "adaLN_modulation.1": 2}
    generator, checkpoint = torch.Generator().manual_seed(1), {}
    for original in flux_names(config).values():
        layer = original if isinstance(original, str) else original.layer
        many = WIDTH * next((count for ending, count in rows.items() if layer.endswith(ending)), 1)
        if layer.endswith("_norm"):
            checkpoint[f"{layer}.scale"] = torch.randn(128, generator=generator)
        else:
            checkpoint[f"{layer}.weight"], checkpoint[f"{layer}.bias"] = torch.randn(2, many, generator=generator).unbind()
    save_file({name: tensor.clone() for name, tensor in checkpoint.items()}, tmp_path / "flux1.safetensors")
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(checkpoint))
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    found = dict(flux_file.read_network(tmp_path / "flux1.safetensors", "", flux_names(config), shapes))
    assert len(found) == len(expected) > 50
    assert all(torch.equal(found[name], expected[name]) for name in expected)
