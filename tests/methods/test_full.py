"""A full fine-tune is handed over as a model that other tools load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.config.options import AdapterOptions
from helpers.families.sdxl import SDXL
from helpers.methods.full import FullFineTune
from helpers.protocols import Trainable
from tests.methods.conftest import ask


def trained(family: SDXL) -> tuple[FullFineTune, Trainable]:
    method = FullFineTune(AdapterOptions(), family)
    trainable = method.attach(family.load(torch.float32))
    generator = torch.Generator().manual_seed(0)
    trainable.put({n: w.detach() + 0.02 * torch.randn(w.shape, generator=generator) for n, w in trainable.parameters.items()})
    return method, trainable


@pytest.mark.slow
def test_the_pipeline_opens_in_diffusers_with_the_trained_weights_and_schedule(
    family: SDXL, tmp_path: Path, elsewhere: Callable[[str, torch.Tensor], str]
) -> None:
    method, trainable = trained(family)
    schedule = {**family.scheduler_config, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    schedule["timestep_spacing"] = "trailing"
    average = {name: torch.zeros_like(weights) for name, weights in trainable.parameters.items()}
    assert [path.name for path in method.export(trainable, tmp_path, schedule, None)] == ["pipeline"]
    said = elsewhere(
        f"""
        pipeline = StableDiffusionXLPipeline.from_pretrained({str(tmp_path / "pipeline")!r})
        config = pipeline.scheduler.config
        print(difference(pipeline.unet), config.prediction_type, config.rescale_betas_zero_snr, config.timestep_spacing)
        image = pipeline("a red circle", width=64, height=64, num_inference_steps=2, output_type="pt").images
        print(tuple(image.shape), image.isfinite().all().item())
        """,
        ask(family, trainable.denoiser),
    )
    difference, *config = said.splitlines()[-2].split()
    assert float(difference) < 1e-5
    assert config == ["v_prediction", "True", "trailing"]
    assert said.splitlines()[-1] == "(1, 3, 64, 64) True"
    both = [path.name for path in method.export(trainable, tmp_path, schedule, average)]
    assert both == ["pipeline", "unet_live"]


def test_tokenizers_of_the_pipeline_can_be_read_by_older_tools(family: SDXL, tmp_path: Path) -> None:
    for tokenizer in ("tokenizer", "tokenizer_2"):
        for name in ("vocab.json", "merges.txt"):
            (family.base.folder / tokenizer / name).unlink(missing_ok=True)  # a base model that transformers 5 saved
    method, trainable = trained(family)
    method.export(trainable, tmp_path, family.scheduler_config, None)
    from tokenizers import CharBPETokenizer, Tokenizer

    for tokenizer in ("tokenizer", "tokenizer_2"):
        folder = tmp_path / "pipeline" / tokenizer
        old = CharBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<|endoftext|>", lowercase=True)
        new = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert old.encode("a red circle").ids == new.encode("a red circle", add_special_tokens=False).ids


def test_what_was_saved_is_read_back_bit_for_bit(family: SDXL, tmp_path: Path) -> None:
    method, trainable = trained(family)
    method.save(trainable, tmp_path)
    stored = method.read(trainable, tmp_path)
    assert all(torch.equal(stored[name], weights) for name, weights in trainable.parameters.items())


def test_weights_are_bf16_only_for_the_optimiser_made_for_them(family: SDXL) -> None:
    method = FullFineTune(AdapterOptions(), family)
    assert method.weights_dtype("bf16", "adamw_bf16") == torch.bfloat16
    assert method.weights_dtype("bf16", "adamw") == torch.float32
    assert method.weights_dtype("no", "adamw_bf16") == torch.float32  # the network is fed float32 there
    assert (method.default_optimizer("bf16"), method.default_optimizer("no")) == ("adamw_bf16", "adamw")
