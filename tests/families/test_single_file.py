"""A base model that is one file is the same model as the folder it was made of."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.config.options import CacheOptions, ModelOptions
from helpers.errors import ModelError
from helpers.families.loading.file_facts import FileFacts, read_facts
from helpers.families.loading.recognize import recognize
from helpers.families.miniatures.sdxl import SdxlSizes, write_sdxl
from tests.families.conftest import CPU, Tried, family_name, open_family
from tests.families.original_layout import write_single_file


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl_refiner", "sd3", "sd35"])
def test_a_single_file_predicts_what_its_folder_predicts(name: str, miniature: Callable[[str], Path], tmp_path: Path) -> None:
    folder = miniature(name)
    if name == "sdxl":  # diffusers tells its two encoders apart by their width
        folder = write_sdxl(tmp_path / "sdxl", sizes=SdxlSizes(text_2_width=48))
    elif family_name(name) == "sd3":
        folder = as_released(folder, tmp_path / "sd3")
    require_same_answers(name, write_single_file(folder, tmp_path / "model.safetensors"), folder, tmp_path / "cache")


def as_released(folder: Path, target: Path) -> Path:
    """A miniature of Stable Diffusion 3 whose first encoder projects nothing, which is why files do not hold that projection."""
    shutil.copytree(folder, target)
    weights = target / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["text_projection.weight"] = torch.eye(len(tensors["text_projection.weight"]))
    save_file(tensors, weights, {"format": "pt"})
    return target


@pytest.mark.parametrize(
    "lacking", [("text_encoder_3",), ("text_encoder", "text_encoder_2"), ("text_encoder", "text_encoder_2", "text_encoder_3")]
)
def test_encoders_that_a_file_of_stable_diffusion_3_lacks_come_from_the_folder_beside_it(
    lacking: tuple[str, ...], miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = as_released(miniature("sd3"), tmp_path / "sd3")
    require_same_answers("sd3", write_single_file(folder, tmp_path / "model.safetensors", lacking), folder, tmp_path / "cache")


def test_a_file_of_stable_diffusion_3_does_without_t5_where_there_is_none(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    """And is made anew when the folder beside it brings T5 after all."""
    folder = as_released(miniature("sd3"), tmp_path / "sd3")
    file = write_single_file(folder, tmp_path / "model.safetensors", ["text_encoder_3"])
    shutil.move(folder / "text_encoder_3", tmp_path / "aside")
    require_same_answers("sd3", file, folder, tmp_path / "cache")
    [made] = (tmp_path / "cache" / "converted").iterdir()
    assert not (made / "text_encoder_3").exists()
    shutil.move(tmp_path / "aside", folder / "text_encoder_3")
    require_same_answers("sd3", file, folder, tmp_path / "cache")


@pytest.mark.parametrize(("config", "lacking"), [(False, "text_encoder and text_encoder_2"), (True, "text_encoder_2")])
def test_a_clip_encoder_that_is_in_neither_is_named(config: bool, lacking: str, miniature: Callable[[str], Path], tmp_path: Path) -> None:
    folder = as_released(miniature("sd3"), tmp_path / "sd3")
    file = write_single_file(folder, tmp_path / "model.safetensors", ["text_encoder", "text_encoder_2"])
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    said = refusal(file, tmp_path, folder if config else None, "sd3")
    assert f"is without the text encoders of Stable Diffusion 3 ({lacking} of" in said
    assert "with --single_file_config a model folder on this machine that has them" in said


def require_same_answers(name: str, file: Path, folder: Path, cache: Path) -> None:
    single = Tried(name, file, open_family(family_name(name), file, cache, single_file_config=str(folder)))
    whole = Tried(name, folder, open_family(family_name(name), folder, cache))
    answers = []
    for tried in (single, whole):
        batch = tried.batch()
        denoiser = tried.family.load(torch.float32).denoiser
        with torch.no_grad(), tried.family.image_codec(CPU) as codec:
            conditioning = tried.family.conditioning(batch, CPU)
            pixels = codec.decode(batch.latents)
            answers.append((tried.family.predict(denoiser, batch.latents, torch.tensor([0, 1, 500, 999]), conditioning), pixels))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*answers, strict=True))


def test_a_file_is_converted_once_and_again_when_it_changes(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_single_file(miniature("sd1"), tmp_path / "model.safetensors")

    def found() -> set[Path]:
        open_family("sd2x", file, tmp_path / "cache", single_file_config=str(miniature("sd1")))
        return set((tmp_path / "cache" / "converted").iterdir())

    [first] = found()
    made = (first / "model_index.json").stat().st_mtime_ns
    assert found() == {first} and (first / "model_index.json").stat().st_mtime_ns == made
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert len(found()) == 2


@pytest.mark.parametrize(
    ("network", "vae", "text"),
    [("bfloat16", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float8_e4m3fn")],
)
def test_weights_keep_the_precision_they_have(network: str, vae: str, text: str, miniature: Callable[[str], Path], tmp_path: Path) -> None:
    folder = as_released(miniature("sd3"), tmp_path / "sd3")
    file = write_single_file(folder, tmp_path / "model.safetensors")
    precisions = {"model.": network, "first_stage_model.": vae, "text_encoders.": text}
    stored = {
        name: tensor.to(getattr(torch, kind))
        for name, tensor in load_file(file).items()
        for beginning, kind in precisions.items()
        if name.startswith(beginning)
    }
    save_file(stored, file)
    open_family("sd3", file, tmp_path / "cache", single_file_config=str(folder))
    [made] = (tmp_path / "cache" / "converted").iterdir()
    expected = {"transformer": network, "vae": vae, **{f"text_encoder{suffix}": text for suffix in ("", "_2", "_3")}}
    for part, kind in expected.items():
        [weights] = (made / part).glob("*.safetensors")
        kept = load_file(weights)
        assert {tensor.dtype for tensor in kept.values()} == {getattr(torch, kind.replace("float8_e4m3fn", "float16"))}
    [weights] = (made / "transformer").glob("*.safetensors")
    assert torch.equal(load_file(weights)["context_embedder.weight"], stored["model.diffusion_model.context_embedder.weight"])


MARKED = {name: torch.tensor([]) for name in ("v_pred", "ztsnr")}


@pytest.mark.parametrize(
    ("name", "tensors", "metadata", "prediction", "zero_snr"),
    [
        ("sd1", MARKED, {}, "v_prediction", True),
        ("sd1", {"v_pred": torch.tensor([])}, {"modelspec.prediction_type": "epsilon"}, "v_prediction", False),
        ("sd1", {}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ("sd1", {}, {"modelspec.prediction_type": "v-prediction", "ss_zero_terminal_snr": "True"}, "v_prediction", True),
        ("sd2", {}, {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
        ("sd2", {}, {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", False),
    ],
)
def test_a_file_is_trained_as_it_says_it_predicts(
    name: str,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    prediction: str,
    zero_snr: bool,
    miniature: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Beside a config that says otherwise; zero terminal SNR reaches the noise schedule."""
    file = write_single_file(miniature(name), tmp_path / "model.safetensors", metadata=metadata, added=tensors)
    family = open_family("sd2x", file, tmp_path / "cache", single_file_config=str(miniature(name)))
    objective = Tried(name, file, family).objective(rescale_betas_zero_snr=None)
    assert objective.scheduler_config["prediction_type"] == prediction
    assert bool(objective.scheduler_config["rescale_betas_zero_snr"]) == zero_snr
    facts = facts_in(tmp_path / "cache")
    assert facts.notes[0].startswith(f"model.safetensors says: {prediction}")
    against = "epsilon" if prediction == "v_prediction" else "v_prediction"
    [warning] = facts.contradicted_by(file.name, against, None)
    assert f"--prediction_type={against} contradicts model.safetensors" in warning
    assert not list(facts.contradicted_by(file.name, prediction, None))
    assert len(list(facts.contradicted_by(file.name, prediction, False))) == zero_snr


def facts_in(cache: Path) -> FileFacts:
    [made] = (cache / "converted").iterdir()
    facts = read_facts(made)
    assert facts is not None
    return facts


def test_what_a_conversion_leaves_out_is_named(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    """Tensors that are not used, metadata that contradicts the tensors; but not what every published file brings."""
    added = {
        "model_ema.diffusion_modeltime_embed0bias": torch.zeros(1),
        "model_ema.decay": torch.zeros(1),
        "alphas_cumprod": torch.zeros(1000),
        "model.diffusion_model.extra_adapter.weight": torch.zeros(1),
    }
    metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.resolution": "1024x1024"}
    file = write_single_file(miniature("sd1"), tmp_path / "model.safetensors", metadata=metadata, added=added)
    open_family("sd2x", file, tmp_path / "cache", single_file_config=str(miniature("sd1")))
    notes = "\n".join(facts_in(tmp_path / "cache").notes)
    assert "modelspec.architecture 'stable-diffusion-xl-v1-base', but its tensors are those of a StableDiffusionPipeline" in notes
    assert "modelspec.resolution 1024x1024, but its config is for 64x64" in notes
    assert "does not say what it predicts: epsilon by its config" in notes
    assert "tensors that are not used: model.diffusion_model.extra_adapter.weight" in notes
    assert "an EMA of its network (1 tensors" in notes and "alphas" not in notes


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl_refiner", "sd3"])
def test_a_plain_file_leaves_nothing_out(name: str, miniature: Callable[[str], Path], tmp_path: Path) -> None:
    folder = as_released(miniature(name), tmp_path / "model") if name == "sd3" else miniature(name)
    file = write_single_file(folder, tmp_path / "model.SAFETENSORS")
    open_family(family_name(name), file, tmp_path / "cache", single_file_config=str(folder))
    assert not any("not used" in note for note in facts_in(tmp_path / "cache").notes)


@pytest.mark.parametrize(
    ("added", "metadata", "said"),
    [
        ({"edm_mean": torch.zeros(1), "edm_std": torch.zeros(1)}, {}, "is an EDM model (its tensor edm_mean)"),
        ({"edm_vpred.sigma_max": torch.tensor(120.0)}, {}, "is an EDM model (its tensor edm_vpred.sigma_max)"),
        ({}, {"modelspec.prediction_type": "edm"}, "is an EDM model (its metadata modelspec.prediction_type is 'edm')"),
        ({}, {"modelspec.title": "Playground v2.5 aesthetic"}, "is an EDM model"),
        ({}, {"modelspec.prediction_type": "rectified flow"}, "was trained by flow matching"),
        ({"scaled_fp8": torch.zeros(1)}, {}, "quantized weights"),
        (
            {"model.diffusion_model.out.2.bias": torch.tensor([0.0, float("nan"), 0.0, 0.0])},
            {},
            "not finite, in model.diffusion_model.out.2",
        ),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, {}, "is a model for inpainting"),
    ],
)
def test_files_that_cannot_be_trained_are_refused_by_name(
    added: dict[str, torch.Tensor], metadata: dict[str, str], said: str, miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_single_file(miniature("sd1"), tmp_path / "model.safetensors", metadata=metadata, added=added)
    assert said in refusal(file, tmp_path, miniature("sd1"), "sd2x")


def refusal(path: Path, tmp_path: Path, config: Path | None = None, family: str = "sdxl") -> str:
    options = ModelOptions(pretrained_model_name_or_path=str(path), single_file_config=str(config) if config else None)
    with pytest.raises(ModelError) as caught:
        recognize(family, options, dataclasses.replace(CacheOptions(), cache_dir=tmp_path / "cache"))
    return str(caught.value)


def test_a_file_of_another_family_names_its_wrapper(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_single_file(miniature("sd1"), tmp_path / "model.safetensors")
    assert "train it with ./train_sd2x.sh" in refusal(file, tmp_path, miniature("sd1"))


def test_settings_that_cannot_be_fetched_are_asked_for(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    """Offline, and without a folder to take them from."""
    file = write_single_file(miniature("sdxl"), tmp_path / "model.safetensors")
    assert "unless --single_file_config names a model folder of the same kind" in refusal(file, tmp_path)
    assert not list((tmp_path / "cache" / "converted").iterdir())


def test_files_that_are_no_whole_model_are_named(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}, lora)
    assert "is no complete model but a LoRA: name its base model here, and the file with --init_lora" in refusal(lora, tmp_path)
    part = tmp_path / "part.safetensors"
    for names, reason in {
        ("model.diffusion_model.out.2.bias",): "has no VAE (first_stage_model...) and no text encoder",
        ("model.diffusion_model.out.2.bias", "cond_stage_model.x"): "has no VAE (first_stage_model...). Name a file",
        ("joint_blocks.0.context_block.attn.qkv.weight",): "but a network alone, without VAE and text encoder",
        ("decoder.conv_in.weight",): "but a VAE",
        ("control_model.input_blocks.0.0.bias",): "but a ControlNet",
    }.items():
        save_file({name: torch.zeros(1) for name in names}, part)
        assert reason in refusal(part, tmp_path)
    for start, reason in {b"<!DOCTYPE html><html>": "is a web page", b"PK\x03\x04": "in spite of its name", b"GGUF": "GGUF"}.items():
        part.write_bytes(start + bytes(1000))
        assert reason in refusal(part, tmp_path)
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"\x80\x04")
    assert "is no .safetensors file" in refusal(pickled, tmp_path)
    short = write_single_file(miniature("sd1"), tmp_path / "short.safetensors")
    short.write_bytes(short.read_bytes()[:-10])
    assert "is cut off" in refusal(short, tmp_path)
