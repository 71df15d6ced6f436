"""A base model that lacks something is refused when it is opened, with one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.errors import ModelError
from tests.families.conftest import CPU, open_family


@pytest.fixture
def model(miniature: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the miniature SDXL, to break."""
    return shutil.copytree(miniature("sdxl"), tmp_path / "model")


def refusal(model: Path, tmp_path: Path, **options: str) -> str:
    with pytest.raises(ModelError) as caught:
        open_family("sdxl", model, tmp_path / "cache", **options)
    return str(caught.value)


def test_weights_of_a_variant_alone_are_opened_by_its_name(model: Path, tmp_path: Path) -> None:
    for component in ("unet", "text_encoder_2"):
        for path in (model / component).glob("*.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors"))
    assert refusal(model, tmp_path) == f"The weights in {model / 'unet'} are there as fp16 alone: set --variant=fp16."
    assert "set --variant=fp16" in refusal(model, tmp_path, variant="bf16")
    open_family("sdxl", model, tmp_path / "cache", variant="fp16")


def test_a_variant_that_no_part_has_is_refused_and_one_that_some_have_is_taken_from_these(model: Path, tmp_path: Path) -> None:
    assert refusal(model, tmp_path, variant="fp16").startswith(f"--variant=fp16: {model} has no weights of this variant; leave it out")
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(weights, weights.with_suffix(".fp16.safetensors"))
    open_family("sdxl", model, tmp_path / "cache", variant="fp16")


def test_a_network_without_weights_is_named(model: Path, tmp_path: Path) -> None:
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert refusal(model, tmp_path) == f"There are no weights in {model / 'unet'}: fetch the model again."
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    assert refusal(model, tmp_path) == f"{model / 'unet' / 'one.safetensors'} is missing: fetch the model again."


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SPOILT: Mapping[str, tuple[bytes | None, str]] = {
    "missing": (None, "{file} is missing: fetch the model again."),
    "empty": (b"", "{file} is empty: fetch the model again."),
    "a pointer of Git LFS": (LFS_POINTER, "{file} only points to what Git LFS has not fetched: run `git lfs pull` in the model's folder"),
    "cut off": (b'{"a', "{file} is damaged (Unterminated string"),
    "of other bytes": (b"\xff\xfe\x00", "{file} is damaged ('utf-8' codec"),
    "without content": (b"{}", "{file} holds no settings: fetch the model again."),
}
WITH_SETTINGS = ("scheduler/scheduler_config.json", "vae/config.json", "text_encoder/config.json", "tokenizer_2/tokenizer_config.json")


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_settings_that_cannot_be_used_are_named_with_what_is_wrong(
    name: str, kind: str, miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    content, sentence = SPOILT[kind]
    model = shutil.copytree(miniature(name), tmp_path / "model")
    network = f"{'unet' if name == 'sdxl' else 'transformer'}/config.json"
    for file in (model / path for path in (*WITH_SETTINGS, network)):
        kept = file.read_bytes()
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        with pytest.raises(ModelError) as caught:
            open_family(name, model, tmp_path / "cache")
        assert str(caught.value).startswith(sentence.format(file=file)) and "\n" not in str(caught.value)
        file.write_bytes(kept)
    open_family(name, model, tmp_path / "cache")


def test_a_model_index_that_says_nothing_is_named(model: Path, tmp_path: Path) -> None:
    (model / "model_index.json").write_text("{}")
    assert refusal(model, tmp_path) == f"{model / 'model_index.json'} names no pipeline (_class_name): fetch the model again."


def test_weights_and_vocabularies_that_git_lfs_has_not_fetched_are_told_from_damaged_ones(model: Path, tmp_path: Path) -> None:
    for file in (model / "unet" / "diffusion_pytorch_model.safetensors", model / "tokenizer" / "tokenizer.json"):
        kept = file.read_bytes()
        file.write_bytes(LFS_POINTER)
        assert refusal(model, tmp_path).startswith(f"{file} only points to what Git LFS has not fetched: run `git lfs pull`")
        file.write_bytes(b"<!doctype html>" * 20)
        assert refusal(model, tmp_path).startswith(f"{file} is a web page, which was saved instead of the model: download")
        file.write_bytes(kept)


def test_weights_that_are_not_loaded_may_be_pointers(model: Path, tmp_path: Path) -> None:
    """As `git lfs pull --include` leaves the variants that it was not asked for."""
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(weights, weights.with_suffix(".fp16.safetensors"))
    weights.write_bytes(LFS_POINTER)
    open_family("sdxl", model, tmp_path / "cache", variant="fp16")


def test_a_vae_of_the_users_own_is_looked_at_as_early(model: Path, tmp_path: Path) -> None:
    vae = shutil.copytree(model / "vae", tmp_path / "vae")
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    sentence = f"--pretrained_vae_model_name_or_path: {vae / 'diffusion_pytorch_model.safetensors'} is empty: fetch the model again."
    assert refusal(model, tmp_path, pretrained_vae_model_name_or_path=str(vae)) == sentence


def test_a_model_of_which_only_the_settings_are_in_the_hubs_cache_is_refused_offline(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a look at the data leaves it."""
    repository = tmp_path / "hub" / "models--someone--sdxl"
    snapshot = Path(shutil.copytree(model, repository / "snapshots" / ("c" * 40), ignore=shutil.ignore_patterns("*.safetensors")))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    remedy = "start once without HF_HUB_OFFLINE, and what the cache of the hub has not got is fetched"
    assert refusal(Path("someone/sdxl"), tmp_path) == f"There are no weights in {snapshot / 'unet'}: {remedy}."
    assert refusal(Path("someone/sdxl"), tmp_path, revision="other").endswith("start once without HF_HUB_OFFLINE to have it fetched.")
    with pytest.raises(ModelError, match="is no folder here, and of a model of this name on the Hugging Face Hub not all"):
        open_family("sdxl", Path("someone/sdxl-of-another-name"), tmp_path / "cache")


def test_a_vae_that_is_not_used_need_not_be_there(model: Path, tmp_path: Path) -> None:
    shutil.move(model / "vae", tmp_path / "vae")
    assert "has no vae folder" in refusal(model, tmp_path)
    open_family("sdxl", model, tmp_path / "cache", pretrained_vae_model_name_or_path=str(tmp_path / "vae"))


def test_a_tokenizer_without_a_vocabulary_is_named(model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (model / "tokenizer_2" / name).unlink()
    assert f"The tokenizer in {model / 'tokenizer_2'} is without its vocabulary" in refusal(model, tmp_path)


def without(weights: Path, name: str) -> None:
    tensors = load_file(weights)
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})


def test_a_network_that_lacks_a_weight_is_refused_before_anything_is_encoded(model: Path, tmp_path: Path) -> None:
    without(model / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.bias")
    with pytest.raises(
        ModelError, match=r"The weights in .*unet lack what its config.json asks for \(conv_in.bias\): fetch the model again"
    ):
        open_family("sdxl", model, tmp_path / "cache").load(None)


def test_a_network_of_another_shape_than_its_config_is_refused_before_anything_is_encoded(model: Path, tmp_path: Path) -> None:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(weights), "conv_in.bias": torch.zeros(9)}, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"which makes conv_in.bias \[\d+\] and not \[9\]"):
        open_family("sdxl", model, tmp_path / "cache").load(None)


def test_encoders_that_lack_a_weight_are_not_made_up(model: Path, tmp_path: Path) -> None:
    without(model / "text_encoder" / "model.safetensors", "final_layer_norm.weight")
    without(model / "vae" / "diffusion_pytorch_model.safetensors", "encoder.conv_in.bias")
    family = open_family("sdxl", model, tmp_path / "cache")
    with family.text_encoders(CPU) as encoders, pytest.raises(ModelError, match="text_encoder lack .*final_layer_norm.weight"):
        encoders.encode(["a cat"])
    with family.image_codec(CPU) as codec, pytest.raises(ModelError, match="vae lack .*conv_in.bias"):
        codec.encode(torch.zeros(1, 3, 32, 32))


def test_an_encoder_of_another_shape_than_its_config_is_refused_in_a_sentence(model: Path, tmp_path: Path) -> None:
    config = model / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size"', '"as_it_was"'))
    shapes = r"The weights in .*text_encoder are not of its config.json: their shapes differ."
    with open_family("sdxl", model, tmp_path / "cache").text_encoders(CPU) as encoders, pytest.raises(ModelError, match=shapes):
        encoders.encode(["a cat"])


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2", "another VAE"])
def test_weights_that_are_not_finite_are_refused_with_file_and_tensor(part: str, model: Path, tmp_path: Path) -> None:
    """And the answer is remembered for the file as it is: a mended one is opened."""
    options = {"pretrained_vae_model_name_or_path": str(shutil.copytree(model / "vae", tmp_path / "vae"))} if "another" in part else {}
    [file] = (tmp_path / "vae" if options else model / part).glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name, tensor in weights.items() if tensor.ndim > 1)
    weights[name].view(-1)[-1], kept = float("inf"), weights[name].view(-1)[-1].item()
    save_file(weights, file, {"format": "pt"})
    assert refusal(model, tmp_path, **options) == (
        f"{file} holds numbers that are not finite, in {name}: fetch the model again, or use another."
    )
    weights[name].view(-1)[-1] = kept
    save_file(weights, file, {"format": "pt"})
    open_family("sdxl", model, tmp_path / "cache", **options)


def raised(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_the_reason_why_the_hub_gave_nothing_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Errors as the libraries raise them, wrapped in others."""
    import httpx2 as httpx
    from huggingface_hub import errors

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    answer = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
    outcomes = {
        "cannot be reached: connect this machine": raised(errors.LocalEntryNotFoundError("not cached"), httpx.ConnectError("no route")),
        "cannot be reached: connect": raised(OSError("not cached"), httpx.ConnectTimeout("late")),
        "accepted its terms: do so on https://huggingface.co/someone/": errors.GatedRepoError("403", response=answer),
        "no model of this name that we may see": errors.RepositoryNotFoundError("404", response=answer),
        "without that --revision": errors.RevisionNotFoundError("404", response=answer),
        "it has no model_index.json: download its .safetensors": errors.RemoteEntryNotFoundError("404", response=answer),
        "it is no name of a model": errors.HFValidationError("a b"),
        "does not give us a model of this name (strange)": ValueError("strange"),
    }
    for number, (said, error) in enumerate(outcomes.items()):

        def fail(*arguments: object, error: Exception = error, **named: object) -> None:
            raise error

        monkeypatch.setattr("diffusers.DiffusionPipeline.download", fail)
        told = refusal(Path(f"someone/{number}"), tmp_path)
        assert told.startswith(f"--pretrained_model_name_or_path: 'someone/{number}' is no folder here, and ") and said in told


def test_a_folder_without_an_index_says_what_to_name_instead(model: Path, tmp_path: Path) -> None:
    above = tmp_path / "above"
    shutil.copytree(model, above / "inside")
    (tmp_path / "files").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "files" / "a.safetensors")
    for folder, said in (
        (model / "unet", "is one part of a model; name the folder above it"),
        (above, f"it has no model_index.json, but {above / 'inside'} has; name that"),
        (tmp_path / "files", f"name the file: {tmp_path / 'files' / 'a.safetensors'}"),
    ):
        assert said in refusal(folder, tmp_path)
