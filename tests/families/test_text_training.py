"""Text encoders that are trained: the same function as the cache's, with gradients, and handed over for others to open."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.config.options import AdapterOptions, TextEncoderOptions
from helpers.errors import ConfigError
from helpers.methods.full import FullFineTune
from helpers.methods.lora import Lora
from helpers.methods.text_encoders import add_text_encoders, name_in_files, require_something_to_train
from helpers.protocols import ModelFamily, Parts, TextTrainingFamily, Trainable, can_train_text_encoders
from tests.families.conftest import CPU, family_name, open_family

LORA = dataclasses.replace(AdapterOptions(), lora_rank=2, lora_alpha=3.0, lora_dropout=0.0)
PROMPT = "a red circle"
TRAINED = {"sd1": ("full", "lora", "dora"), "sd2": ("full", "lora", "dora"), "sdxl": ("lora", "dora")}
SHORT = (("sd2", "full"), ("sd1", "lora"), ("sdxl", "lora"), ("sdxl", "dora"))
EVERY = tuple((name, kind) for name, kinds in TRAINED.items() for kind in kinds)
HANDED_OVER = EVERY if os.environ.get("SIMPLETUNER_TEST_LONG") else SHORT
ELSEWHERE = """
import importlib.util, json, sys
assert importlib.util.find_spec("helpers") is None, "this interpreter must not know the project"
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

def difference(pipeline, question):
    told = pipeline.encode_prompt(question["prompt"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    more = {}
    if len(told) > 2:
        more = {"added_cond_kwargs": {"text_embeds": told[2], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}}
    asked = load_file(question["tensors"])
    with torch.no_grad():
        given = pipeline.unet(asked["noisy"], 600, told[0], **more).sample
    return (given - asked["answer"]).abs().max().item()

said = {}
for question in json.load(open(sys.argv[1])):
    pipeline = DiffusionPipeline.from_pretrained(question["folder"])
    if question["lora"]:
        said[question["name"] + " without"] = difference(pipeline, question)
        pipeline.load_lora_weights(question["lora"])
    said[question["name"]] = difference(pipeline, question)
print(json.dumps(said))
"""


@pytest.fixture
def opened(miniature: Callable[[str], Path], tmp_path: Path) -> Callable[[str], ModelFamily]:
    return lambda name: open_family(family_name(name), miniature(name), tmp_path / "cache" / name)


def trainable_text(family: ModelFamily) -> TextTrainingFamily:
    assert can_train_text_encoders(family)
    return family


def loaded(family: ModelFamily, kind: str, **options: Any) -> Parts:
    parts = family.load(torch.float32)
    chosen = dataclasses.replace(TextEncoderOptions(), **options)
    add_text_encoders(parts, trainable_text(family), chosen, torch.float32, freezes=kind == "full")
    return parts


def attached(family: ModelFamily, kind: str, **options: Any) -> tuple[Any, Trainable]:
    method = FullFineTune(LORA, family) if kind == "full" else Lora(dataclasses.replace(LORA, use_dora=kind == "dora"), family)
    return method, method.attach(loaded(family, kind, **options))


@pytest.mark.parametrize("name", TRAINED)
def test_live_text_of_untrained_weights_is_what_the_cache_holds(name: str, opened: Callable[[str], ModelFamily]) -> None:
    family = opened(name)
    captions = [PROMPT, "a photo of a cat on the sea", ""]
    live = trainable_text(family).embed(loaded(family, "full").text_encoders, [*captions, None], CPU)
    with family.text_encoders(CPU) as encoders:
        cached, unconditional = encoders.encode(captions), family.unconditional(encoders)
    assert live.keys() == cached.keys() == unconditional.keys()
    for key, tensor in live.items():
        torch.testing.assert_close(tensor[:3], cached[key])  # close, not equal: another batch size may use another kernel
        torch.testing.assert_close(tensor[3], unconditional[key])


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_all_that_moves_gets_a_gradient_though_every_caption_is_dropped_but_one(
    name: str, kind: str, opened: Callable[[str], ModelFamily]
) -> None:
    family = opened(name)
    _, trainable = attached(family, kind, freeze_encoder=False)
    text = [parameter for parameter in trainable.parameters if parameter.startswith("text_encoder")]
    assert text
    for captions, zero in (([PROMPT, None], False), ([None, None], name == "sdxl")):
        for parameter in trainable.parameters.values():
            parameter.grad = None
        told = trainable_text(family).embed(trainable.text_encoders, captions, CPU)
        sum((tensor.square() * torch.arange(1, 1 + tensor.shape[-1])).sum() for tensor in told.values()).backward()  # type: ignore[union-attr]
        gradients = [trainable.parameters[parameter].grad for parameter in text]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert any(bool(gradient.abs().sum()) for gradient in gradients if gradient is not None) is not zero
    moving = [name for encoder in trainable.text_encoders.values() for name, weight in encoder.named_parameters() if weight.requires_grad]
    assert len(moving) == len(text)  # nothing else would wait for a gradient


@pytest.mark.parametrize(
    ("strategy", "before", "after", "moving"),
    [("before", 1, 9, {1, 2, 3}), ("after", 9, 1, {-1, 0, 1}), ("between", 0, 1, {-1, 2, 3}), ("outside", 1, 1, {1})],
)
def test_the_layers_that_freeze_are_those_that_the_option_names(
    strategy: str, before: int, after: int, moving: set[int], opened: Callable[[str], ModelFamily]
) -> None:
    """The miniature of Stable Diffusion 2 has layers 0 to 2; -1 are its embeddings, 3 is the final norm."""
    options = {"freeze_encoder_strategy": strategy, "freeze_encoder_before": before, "freeze_encoder_after": after}
    _, trainable = attached(opened("sd2"), "full", **options)
    found = set()
    for name in trainable.weights_of("text_encoder", trainable.parameters):
        layer = name.removeprefix("text_model.").removeprefix("encoder.layers.")
        found.add(int(layer[0]) if layer[0].isdigit() else -1 if layer.startswith("embeddings") else 3)
    assert found == moving


def test_freezing_everything_is_refused(opened: Callable[[str], ModelFamily]) -> None:
    everything = dataclasses.replace(TextEncoderOptions(), freeze_encoder_strategy="before", freeze_encoder_before=3)
    family = trainable_text(opened("sd2"))
    with pytest.raises(ConfigError, match=r"--freeze_encoder_before=3 .* leave none of the 3 layers \(0 to 2\)"):
        require_something_to_train(family, everything)
    require_something_to_train(family, dataclasses.replace(everything, freeze_encoder_before=2))
    require_something_to_train(family, dataclasses.replace(everything, freeze_encoder=False))


@pytest.fixture(scope="module")
def elsewhere(miniature: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, float]]:
    """By what was handed over: how far a fresh interpreter's answer under a prompt is from that of the networks in training."""
    folder = tmp_path_factory.mktemp("handed_over")
    questions = []
    for name, kind in HANDED_OVER:
        family = open_family(family_name(name), miniature(name), folder / "cache" / name)
        method, trainable = attached(family, kind, freeze_encoder=False)
        generator = torch.Generator().manual_seed(0)
        trainable.put({key: weight + 0.1 * torch.randn(weight.shape, generator=generator) for key, weight in trainable.parameters.items()})
        place = folder / f"{name} {kind}"
        place.mkdir()
        method.export(trainable, place, family.scheduler_config, None)
        tensors = {"noisy": torch.randn(1, 4, 8, 8, generator=generator)}
        tensors["answer"] = predicted(family, trainable, tensors["noisy"])
        save_file(tensors, place / "asked.safetensors")
        told = {"prompt": PROMPT, "tensors": str(place / "asked.safetensors")}
        if kind == "full":
            questions.append({**told, "name": f"{name} full", "folder": str(place / "pipeline"), "lora": ""})
            questions.append({**told, "name": f"{name} full without", "folder": str(miniature(name)), "lora": ""})
        else:
            for lora in sorted(place.glob("pytorch_lora_weights*.safetensors")):
                if kind == "lora" or "kohya" not in lora.name:  # of a DoRA in kohya's layout diffusers leaves the magnitudes out
                    questions.append({**told, "name": f"{name} {kind} {lora.name}", "folder": str(miniature(name)), "lora": str(lora)})
    (folder / "questions.json").write_text(json.dumps(questions))
    (folder / "ask.py").write_text(ELSEWHERE)
    ended = subprocess.run(
        [sys.executable, "ask.py", "questions.json"],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    yield json.loads(ended.stdout.splitlines()[-1])


def predicted(family: ModelFamily, trainable: Trainable, noisy: torch.Tensor) -> torch.Tensor:
    for module in trainable.modules.values():
        module.eval()
    with torch.no_grad():
        told = trainable_text(family).embed(trainable.text_encoders, [PROMPT], CPU)
        conditioning = {**told, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
        return family.predict(trainable.denoiser, noisy, torch.tensor([600]), conditioning)


@pytest.mark.slow
def test_what_is_handed_over_answers_a_prompt_as_it_was_trained(elsewhere: dict[str, float]) -> None:
    found = {name: value for name, value in elsewhere.items() if not name.endswith("without")}
    assert len(found) >= 6
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_the_base_model_answers_otherwise(elsewhere: dict[str, float]) -> None:
    assert min(value for name, value in elsewhere.items() if name.endswith("without")) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), SHORT)
def test_what_was_saved_is_read_back_bit_for_bit(name: str, kind: str, opened: Callable[[str], ModelFamily], tmp_path: Path) -> None:
    method, trainable = attached(opened(name), kind, freeze_encoder=False)
    method.save(trainable, tmp_path / "kept")
    stored = method.read(trainable, tmp_path / "kept")
    assert stored.keys() == trainable.parameters.keys()
    assert all(torch.equal(stored[key], weights) for key, weights in trainable.parameters.items())


@pytest.mark.parametrize("layout", [0, 1], ids=["diffusers", "kohya"])
@pytest.mark.parametrize(("name", "kind"), [("sd1", "lora"), ("sdxl", "lora"), ("sdxl", "dora")])
def test_a_new_run_starts_where_a_lora_of_network_and_text_encoders_ended(
    name: str, kind: str, layout: int, opened: Callable[[str], ModelFamily], tmp_path: Path
) -> None:
    family = opened(name)
    method, first = attached(family, kind)
    generator = torch.Generator().manual_seed(1)
    first.put({name: weight + 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in first.parameters.items()})
    path = method.save(first, tmp_path)[layout]
    again = Lora(dataclasses.replace(LORA, use_dora=kind == "dora", init_lora=path), family)
    again.check(family.load(None))  # before the text encoders are there
    second = again.attach(loaded(family, kind))
    assert first.parameters.keys() == second.parameters.keys()
    assert all(torch.equal(weights, first.parameters[key].reshape(weights.shape)) for key, weights in second.parameters.items())
    tokens = torch.arange(1, 9)[None]
    for role, encoder in second.text_encoders.items():
        live = first.text_encoders[role].eval()(tokens, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(encoder.eval()(tokens, output_hidden_states=True).hidden_states[-2], live)


def test_a_lora_of_other_text_layers_is_refused(opened: Callable[[str], ModelFamily], tmp_path: Path) -> None:
    family = opened("sdxl")
    method, first = attached(family, "lora")
    tensors = load_file(method.save(first, tmp_path)[0])
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 3.0})}
    lacking = {name: tensor for name, tensor in tensors.items() if not name.startswith("text_encoder_2.")}
    beyond = {name.replace(".layers.0.", ".layers.9."): tensor.clone() for name, tensor in tensors.items() if ".layers.0." in name}
    refused = ((lacking, "has no weights for the text_encoder_2"), ({**tensors, **beyond}, "which no text encoder trained he"))
    for number, (held, said) in enumerate(refused):
        save_file(held, tmp_path / f"{number}.safetensors", header)
        start = dataclasses.replace(LORA, init_lora=tmp_path / f"{number}.safetensors")
        with pytest.raises(ConfigError, match=said):
            Lora(start, family).attach(loaded(family, "lora"))


@pytest.mark.slow
def test_the_kohya_copy_of_a_dora_opens_in_lycoris_with_its_text_encoders(
    miniature: Callable[[str], Path], opened: Callable[[str], ModelFamily], tmp_path: Path
) -> None:
    """Each encoder then answers as the live one does; diffusers leaves the magnitudes out of that layout."""
    from diffusers import DiffusionPipeline
    from lycoris import create_lycoris_from_weights

    method, trainable = attached(opened("sdxl"), "dora")
    trainable.put({name: weight + 0.1 * torch.ones_like(weight) for name, weight in trainable.parameters.items()})
    _, kohya = method.save(trainable, tmp_path)
    stored = load_file(kohya)
    pipeline = DiffusionPipeline.from_pretrained(miniature("sdxl"))
    tokens = torch.arange(1, 9)[None]
    for role, live in trainable.text_encoders.items():
        encoder = getattr(pipeline, role)
        names = {
            f"{'lora_te1' if role == 'text_encoder' else 'lora_te2'}_{name_in_files(module).replace('.', '_')}": module.replace(".", "_")
            for module, layer in encoder.named_modules()
            if isinstance(layer, torch.nn.Linear)
        }
        weights = {
            f"lycoris_{names[module]}.{kind}": tensor
            for module, kind, tensor in ((*name.split(".", 1), tensor) for name, tensor in stored.items())
            if module in names
        }
        before = encoder(tokens, output_hidden_states=True).hidden_states[-2]
        network, _ = create_lycoris_from_weights(1.0, "", encoder, weights)
        network.apply_to()
        found, expected = (it.eval()(tokens, output_hidden_states=True).hidden_states[-2] for it in (encoder, live))
        assert (found - expected).abs().max() < 1e-5 < 1e-2 < (before - expected).abs().max()
