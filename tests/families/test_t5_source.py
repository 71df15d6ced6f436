"""A T5 from elsewhere (--pretrained_t5_model_name_or_path): found in every layout, told to the network, handed over with it, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5TokenizerFast

from helpers.choices import known_axes
from helpers.config.options import AdapterOptions
from helpers.config.read import read_config
from helpers.errors import ConfigError, ModelError
from helpers.families.miniatures.parts import WORDS
from helpers.families.miniatures.t5 import t5_config, unigram_tokenizer
from helpers.methods.full import FullFineTune
from helpers.protocols import ModelFamily
from tests.families.conftest import CPU, Tried, family_name, open_family
from tests.families.original_layout import write_single_file

READ_T5 = {"sd3": "_3", "sd35": "_3", "pixart_sigma": "", "deepfloyd_1": "", "deepfloyd_2": "", "hunyuan_dit": "_2"}
WIDTHS = {"sd3": 64, "sd35": 64}  # of the states that a miniature's network reads; of the others 32
COMMIT = "c" * 40


@dataclass(frozen=True)
class Other:
    """A T5 that no miniature has, in memory, and its tokenizer, to which other words are one token."""

    encoder: T5EncoderModel
    tokenizer: T5TokenizerFast

    @classmethod
    def of(cls, width: int) -> Other:
        tokenizer = unigram_tokenizer([*WORDS, "harbour"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return cls(T5EncoderModel(t5_config(len(tokenizer), width)).eval(), tokenizer)

    def alone(self, folder: Path) -> Path:
        """As a repository of T5 alone, everything at its root."""
        self.encoder.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def states(self, captions: Sequence[str], length: int, masked: bool) -> torch.Tensor:
        """By transformers alone."""
        tokens = self.tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        with torch.no_grad():
            return self.encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None).last_hidden_state


def other_for(miniature: str) -> Other:
    return Other.of(WIDTHS.get(miniature, 32))


def opened(miniature: str, base: Path, tmp_path: Path, source: Path | str, **options: Any) -> ModelFamily:
    return open_family(family_name(miniature), base, tmp_path / "cache", pretrained_t5_model_name_or_path=str(source), **options)


def without_t5(base: Path, suffix: str, target: Path) -> Path:
    """A base model that neither has T5 nor names it."""
    shutil.copytree(base, target, ignore=shutil.ignore_patterns(f"text_encoder{suffix}", f"tokenizer{suffix}"))
    index = json.loads((target / "model_index.json").read_text())
    index |= {f"text_encoder{suffix}": [None, None], f"tokenizer{suffix}": [None, None]}
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def as_hub(folder: Path, hub: Path, name: str) -> Path:
    """A folder as the hub's cache holds it once it was fetched."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, repository / "snapshots" / COMMIT))


# -- told to the network, and handed over with it ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", READ_T5)
def test_captions_are_read_by_it_and_it_is_in_the_pipeline_that_is_handed_over(
    name: str, miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    """With a base model that has no T5: the pipeline opens in diffusers, and its network gets the same inputs as ours."""
    suffix, captions = READ_T5[name], ["a red circle", "harbour"]
    other = other_for(name)
    base = without_t5(miniature(name), suffix, tmp_path / "base")
    family = opened(name, base, tmp_path, other.alone(tmp_path / "other"))
    assert not any("without T5" in note for note in family.notes)
    with family.text_encoders(CPU) as encoders:
        ours = encoders.encode(captions)
    key = next(key for key in ("t5", "prompt_embeds_2", "prompt_embeds") if key in ours)
    expected = other.states(captions, ours[key].shape[1], masked=key != "t5")
    assert torch.allclose(ours[key].float(), expected, atol=1e-5)
    assert family.caption_lengths().token_counts(["harbour"]) == [2]

    method = FullFineTune(AdapterOptions(), family)
    sampler = list(Tried(name, base, family).objective().samplers.values())[-1]
    method.export(method.attach(family.load(torch.float32)), tmp_path / "out", {**family.scheduler_config, "_class_name": sampler}, None)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    exported = getattr(pipeline, f"text_encoder{suffix}").state_dict()
    assert isinstance(getattr(pipeline, f"text_encoder{suffix}"), T5EncoderModel)
    assert all(torch.equal(tensor, exported[key]) for key, tensor in other.encoder.state_dict().items())
    assert getattr(pipeline, f"tokenizer{suffix}")(captions).input_ids == other.tokenizer(captions).input_ids


def test_it_stands_in_for_the_t5_that_the_base_model_has(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    own = open_family("sd3", miniature("sd3"), tmp_path / "cache")
    other = opened("sd3", miniature("sd3"), tmp_path, Other.of(64).alone(tmp_path / "other"))
    with own.text_encoders(CPU) as mine, other.text_encoders(CPU) as theirs:
        before, after = mine.encode(["a cat"]), theirs.encode(["a cat"])
        assert torch.equal(before["clip"], after["clip"]) and not torch.equal(before["t5"], after["t5"])
        assert mine.fingerprint != theirs.fingerprint
    assert own.caption_lengths().fingerprint != other.caption_lengths().fingerprint


def test_a_single_file_of_stable_diffusion_3_without_t5_gains_one(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    base, other = without_t5(miniature("sd3"), "_3", tmp_path / "base"), Other.of(64)
    file = write_single_file(base, tmp_path / "model.safetensors", ["text_encoder_3"])
    family = opened("sd3", file, tmp_path, other.alone(tmp_path / "other"), single_file_config=str(base))
    with family.text_encoders(CPU) as encoders:
        assert torch.allclose(encoders.encode(["harbour"])["t5"], other.states(["harbour"], 256, masked=False), atol=1e-5)


def test_the_t5_in_a_single_file_is_left_out_where_another_one_is_named(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    base, other = miniature("sd3"), Other.of(64)
    file = write_single_file(base, tmp_path / "model.safetensors")
    family = opened("sd3", file, tmp_path, other.alone(tmp_path / "other"), single_file_config=str(base))
    [folder] = (tmp_path / "cache" / "converted").iterdir()
    assert (folder / "text_encoder_2").is_dir() and not list(folder.glob("*_3"))
    with family.text_encoders(CPU) as encoders:
        assert torch.allclose(encoders.encode(["harbour"])["t5"], other.states(["harbour"], 256, masked=False), atol=1e-5)
    own = open_family("sd3", file, tmp_path / "cache", single_file_config=str(base))
    with own.text_encoders(CPU) as encoders:
        assert not torch.allclose(encoders.encode(["harbour"])["t5"], other.states(["harbour"], 256, masked=False), atol=1e-2)


def test_what_the_cache_holds_is_known_again_wherever_the_same_t5_lies(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    """The base model's own, a copy of that pipeline, and the two folders' files side by side are one T5, whatever else is there."""
    base = miniature("pixart_sigma")
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    alone = Path(shutil.copytree(base / "text_encoder", tmp_path / "alone"))
    shutil.copytree(base / "tokenizer", alone, dirs_exist_ok=True)
    (alone / "README.md").write_text("T5")
    (alone / "generation_config.json").write_text("{}")
    families = [
        open_family("pixart_sigma", base, tmp_path / "cache"),
        *(opened("pixart_sigma", base, tmp_path, at) for at in (copy, alone)),
    ]
    fingerprints = set()
    for family in families:
        with family.text_encoders(CPU) as encoders:
            fingerprints.add((encoders.fingerprint, family.caption_lengths().fingerprint))
    assert len(fingerprints) == 1


def test_models_that_share_a_t5_and_a_cache_do_not_share_what_they_read_differently(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    """PixArt looks past the padding, which its records are without; DeepFloyd looks at it."""
    source = Other.of(32).alone(tmp_path / "other")
    one = opened("pixart_sigma", miniature("pixart_sigma"), tmp_path, source, tokenizer_max_length=77)
    two = opened("deepfloyd_1", miniature("deepfloyd_1"), tmp_path, source)
    with one.text_encoders(CPU) as masked, two.text_encoders(CPU) as padded:
        assert masked.fingerprint != padded.fingerprint


# -- found in every layout --------------------------------------------------------------------------------------------------


def in_a_pipeline(other: Other, folder: Path, suffix: str) -> Path:
    """With an encoder of another kind before it, unless its suffix is the first."""
    other.encoder.save_pretrained(folder / f"text_encoder{suffix}")
    other.tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    if suffix:
        (folder / "text_encoder").mkdir()
        (folder / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    return folder


def named_by_an_index(other: Other, folder: Path) -> Path:
    """What model_index.json does not name is left alone, though it may lie there."""
    in_a_pipeline(other, folder, "_2")
    T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(folder / "text_encoder")
    index = {
        "text_encoder": [None, None],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer_2": ["transformers", "T5Tokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def with_a_tokenizer_folder(other: Other, folder: Path) -> Path:
    other.encoder.save_pretrained(folder)
    other.tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def with_one_tokenizer_at_the_root(other: Other, folder: Path) -> Path:
    other.encoder.save_pretrained(folder / "text_encoder")
    other.tokenizer.save_pretrained(folder)
    return folder


def with_a_decoder(other: Other, folder: Path) -> Path:
    """As the authors released it: encoder and decoder in one model."""
    config = t5_config(len(other.tokenizer), other.encoder.config.d_model)
    whole = T5ForConditionalGeneration(config)
    whole.load_state_dict(other.encoder.state_dict(), strict=False)
    whole.save_pretrained(folder)
    other.tokenizer.save_pretrained(folder)
    return folder


def of_mt5(other: Other, folder: Path) -> Path:
    other.alone(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mt5", "architectures": ["MT5EncoderModel"]}))
    return folder


def in_shards(other: Other, folder: Path) -> Path:
    other.encoder.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    other.tokenizer.save_pretrained(folder)
    return folder


LAYOUTS: dict[str, Callable[[Other, Path], Path]] = {
    "alone": Other.alone,
    "first of a pipeline": lambda other, folder: in_a_pipeline(other, folder, ""),
    "third of a pipeline": lambda other, folder: in_a_pipeline(other, folder, "_3"),
    "named by an index": named_by_an_index,
    "alone, tokenizer in its folder": with_a_tokenizer_folder,
    "encoder in its folder, tokenizer not": with_one_tokenizer_at_the_root,
    "with a decoder": with_a_decoder,
    "mT5": of_mt5,
    "in shards": in_shards,
}


@pytest.mark.parametrize("hub", [False, True], ids=["folder", "hub"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_found(layout: str, hub: bool, miniature: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder, and as a name that the hub's cache knows; what is handed over reads as it does, and is no more than the encoder."""
    other = Other.of(32)
    source: Path | str = LAYOUTS[layout](other, tmp_path / "other")
    if hub:
        as_hub(tmp_path / "other", tmp_path / "hub", "someone/t5")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        source = "someone/t5"
    family = opened("pixart_sigma", miniature("pixart_sigma"), tmp_path, source)
    with family.text_encoders(CPU) as encoders:
        assert torch.allclose(encoders.encode(["harbour"])["prompt_embeds"], other.states(["harbour"], 300, masked=True), atol=1e-5)
    out = tmp_path / "out"
    family.export_pipeline(miniature("pixart_sigma") / "transformer", {"_class_name": "DDIMScheduler"}, out)
    exported = T5EncoderModel.from_pretrained(out / "text_encoder")
    tensors = exported.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in other.encoder.state_dict().items())
    stored = {name for file in (out / "text_encoder").glob("*.safetensors") for name in load_file(file)}
    assert stored == set(tensors) - {"encoder.embed_tokens.weight"}
    assert T5TokenizerFast.from_pretrained(out / "tokenizer")("harbour").input_ids == other.tokenizer("harbour").input_ids


def test_nothing_but_t5_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of T5 nothing but what is loaded: not the weights in another precision, unless they are asked for."""
    from helpers.families.text import t5_source

    snapshot = as_hub(in_a_pipeline(Other.of(32), tmp_path / "other", "_2"), tmp_path / "hub", "someone/flux")
    half = snapshot / "text_encoder_2" / "model.fp16.safetensors"
    shutil.copy(snapshot / "text_encoder_2" / "model.safetensors", half)
    asked: list[str] = []

    def fetch(option: str, name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
        assert revision == (COMMIT if asked else None)  # or two commits might be mixed
        asked.extend(patterns)
        return snapshot

    monkeypatch.setattr("helpers.families.loading.folder.fetch", fetch)
    plain, fp16 = "text_encoder_2/model.safetensors", "text_encoder_2/model.fp16.safetensors"
    assert t5_source.locate("someone/flux", None) == (snapshot / "text_encoder_2", snapshot / "tokenizer_2")
    assert plain in asked and fp16 not in asked and not any("*" in pattern for pattern in asked)
    asked.clear()
    t5_source.locate("someone/flux", "fp16")
    assert fp16 in asked and plain not in asked
    asked.clear()
    half.unlink()
    t5_source.locate("someone/flux", "fp16")
    assert plain in asked
    asked.clear()
    (snapshot / plain).unlink()
    assert t5_source.locate("someone/flux", None, needs_weights=False) == (snapshot / "text_encoder_2", snapshot / "tokenizer_2")
    assert not [name for name in asked if "safetensors" in name]  # of a look at the data


def test_the_t5_of_a_base_model_that_reads_another_one_is_not_fetched(
    miniature: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache knows of all files, and lacks those of T5's encoder: offline that is enough, where another one is named."""
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

    base = miniature("sd3")
    snapshot = as_hub(base, tmp_path / "hub", "someone/sd3")
    files = {path.relative_to(base).as_posix(): TreeCacheEntry(path.stat().st_size, "0" * 40) for path in base.rglob("*") if path.is_file()}
    write_tree_cache(str(snapshot.parents[1]), COMMIT, files)
    shutil.rmtree(snapshot / "text_encoder_3")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options = {"cache": tmp_path / "cache", "model": Path("someone/sd3")}
    with pytest.raises(ModelError, match="not all that is needed lies in the cache"):
        open_family("sd3", **options)
    family = open_family("sd3", **options, pretrained_t5_model_name_or_path=str(Other.of(64).alone(tmp_path / "other")))
    assert (family.name, list(family.notes)) == ("someone/sd3", [])


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_of_weights_in_several_precisions_those_that_are_loaded_are_handed_over_under_plain_names(
    sharded: bool, miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of T5 and of what the base model brings beside it: a pipeline that anybody opens without saying a variant."""
    base = Path(shutil.copytree(miniature("deepfloyd_1"), tmp_path / "base"))
    encoder = T5EncoderModel.from_pretrained(base / "text_encoder")
    half = T5EncoderModel.from_pretrained(base / "text_encoder", dtype=torch.float16)
    half.save_pretrained(base / "text_encoder", variant="fp16", max_shard_size="40KB" if sharded else "1GB")
    (base / "text_encoder" / "pytorch_model.bin").write_bytes(b"weights once more")
    for variant, expected in ((None, encoder), ("fp16", half)):
        family = open_family("deepfloyd_1", base, tmp_path / "cache", variant=variant)
        out = tmp_path / f"out {variant}"
        family.export_pipeline(base / "unet", {**family.scheduler_config, "_class_name": "DDPMScheduler"}, out)
        pipeline = DiffusionPipeline.from_pretrained(out, safety_checker=None, feature_extractor=None, watermarker=None)
        found = T5EncoderModel.from_pretrained(out / "text_encoder", dtype=torch.float32).state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.float().state_dict().items())
        assert pipeline.text_encoder.num_parameters() == encoder.num_parameters()
        names = {path.name for path in (out / "text_encoder").iterdir()}
        assert not any("fp16" in name or name.endswith(".bin") for name in names)
        assert len([name for name in names if name.endswith(".safetensors")]) == 1 or (sharded and variant)


# -- refused ----------------------------------------------------------------------------------------------------------------


def refusal(miniature: str, base: Path, tmp_path: Path, source: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        opened(miniature, base, tmp_path, source)
    said = str(caught.value)
    assert said.startswith("--pretrained_t5_model_name_or_path: ") and said.endswith(".") and "\n" not in said
    return said


@pytest.mark.parametrize("name", [name for name in READ_T5 if name != "sd35"])
def test_another_width_is_refused_before_anything_is_encoded(name: str, miniature: Callable[[str], Path], tmp_path: Path) -> None:
    said = refusal(name, miniature(name), tmp_path, Other.of(48).alone(tmp_path / "other"))
    assert f"have width 48, but {miniature(name)} needs width {WIDTHS.get(name, 32)}" in said


def test_what_is_no_whole_t5_is_refused(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    base = miniature("pixart_sigma")
    said = refusal("pixart_sigma", base, tmp_path, miniature("sdxl"))
    assert (
        "is not a T5 (clip_text_model, clip_text_model)" in said
        and "Name a T5, or a pipeline in diffusers layout with a T5 encoder" in said
    )
    assert "is not a T5." in refusal("pixart_sigma", base, tmp_path, tmp_path)

    other = Other.of(32)
    other.encoder.save_pretrained(tmp_path / "mute")
    assert "no tokenizer (spiece.model or tokenizer.json)" in refusal("pixart_sigma", base, tmp_path, tmp_path / "mute")

    pickled = other.alone(tmp_path / "pickled")
    weights = (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "formats that run code are not opened" in refusal("pixart_sigma", base, tmp_path, pickled)
    weights.unlink()
    assert "does not contain all weights of the T5 as .safetensors" in refusal("pixart_sigma", base, tmp_path, pickled)

    shards = in_shards(other, tmp_path / "shards")
    next(iter(sorted(shards.glob("*.safetensors")))).unlink()
    assert "does not contain all weights of the T5" in refusal("pixart_sigma", base, tmp_path, shards)

    cut = other.alone(tmp_path / "cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "is cut off" in refusal("pixart_sigma", base, tmp_path, cut)


def test_umt5_is_no_t5(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    """Each of its layers has positions of its own, which the encoder of T5 would leave out."""
    source = Other.of(32).alone(tmp_path / "other")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "umt5"}))
    assert "is not a T5 (umt5)" in refusal("pixart_sigma", miniature("pixart_sigma"), tmp_path, source)


def test_a_name_that_is_nowhere_is_refused(miniature: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "is no folder here, and of a model of this name" in refusal("pixart_sigma", miniature("pixart_sigma"), tmp_path, "no/such")


def test_families_without_t5_refuse_it_and_those_with_it_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text("[]")
    settings = ["--pretrained_model_name_or_path=some/model", "--pretrained_t5_model_name_or_path=google/t5-v1_1-xxl"]
    facts = known_axes()
    refused = []
    for name in (name for name in facts.families if name != "sdxl_refiner"):
        with pytest.raises(ConfigError) as caught:
            read_config([*settings, f"--model_family={name}"], {}, facts)
        refused += [name for problem in caught.value.problems if "pretrained_t5" in problem and "is for Stable Diffusion 3" in problem]
    assert sorted(refused) == ["sd2x", "sdxl"]
