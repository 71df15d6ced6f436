"""The quick starts for other models than SDXL, and the page on the refiner, work as written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.families.miniatures.sd3 import TEXT_WIDTH
from helpers.families.miniatures.t5 import t5_encoder, t5_tokenizer
from tests.documentation.conftest import Followed, in_two_steps, new_reader
from tests.documentation.pages import Page

SD3 = Page.named("documentation/QUICKSTART_SD3.md")
FLUX = Page.named("documentation/QUICKSTART_FLUX.md")
SD2 = Page.named("documentation/QUICKSTART_SD2.md")
REFINER = Page.named("documentation/REFINER.md")
SIGMA = Page.named("documentation/SIGMA.md")
DEEPFLOYD = Page.named("documentation/DEEPFLOYD.md")
HUNYUAN = Page.named("documentation/HUNYUAN_DIT.md")


@pytest.mark.slow
def test_the_quick_start_for_stable_diffusion_2_trains_a_lora_that_its_sample_loads(
    models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = new_reader(tmp_path, models, "training/images", settings="sd21-env.sh")
    datasets = reader.home / "training" / "multidatabackend_sd2x.json"
    assert f"`/home/user/training/{datasets.name}`" in SD2.text
    datasets.write_text(reader.own(SD2.section("1. ").block("json")), encoding="utf-8")
    copy, settings = (block.text for block in SD2.section("2. ").blocks("bash"))
    reader.type(copy)
    reader.edit(settings)
    assert "finished   2 steps" in reader.type(SD2.section("3. ").block("bash"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(in_two_steps(reader.own(SD2.section("4. ").block("python"))), names)
    assert names["pipeline"].unet.peft_config, "no adapter was loaded"
    assert (tmp_path / "rex.png").stat().st_size > 0
    exec(SD2.section("Zero terminal SNR").block("python"), names)
    assert names["pipeline"].scheduler.config.rescale_betas_zero_snr


@pytest.mark.slow
def test_the_quick_start_for_flux_trains_a_lora_that_its_sample_loads(
    models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = new_reader(tmp_path, models, "training/images", settings="flux-env.sh")
    datasets = reader.home / "training" / "multidatabackend_flux.json"
    assert f"`/home/user/training/{datasets.name}`" in FLUX.text
    datasets.write_text(reader.own(FLUX.section("1. ").block("json")), encoding="utf-8")
    copy, settings = (block.text for block in FLUX.section("2. ").blocks("bash"))
    reader.type(copy)
    reader.edit(settings)
    said = reader.type(FLUX.section("3. ").block("bash"))
    assert "weights in int8" in said and "finished   2 steps" in said
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(reader.own(FLUX.section("4. ").block("python")).replace("guidance_scale", "num_inference_steps=2, guidance_scale"), names)
    assert names["pipeline"].transformer.peft_config, "no adapter was loaded"
    assert (tmp_path / "rex.png").stat().st_size > 0
    assert (reader.home / "training" / "models" / "pytorch_lora_weights.kohya.safetensors").is_file()


@pytest.mark.slow
def test_the_quick_start_for_stable_diffusion_3_trains_a_lora_that_its_sample_loads(
    models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = new_reader(tmp_path, models, "training/images", settings="sd3-env.sh")
    datasets = reader.home / "training" / "multidatabackend_sd3.json"
    assert f"`/home/user/training/{datasets.name}`" in SD3.text
    datasets.write_text(reader.own(SD3.section("1. ").block("json")), encoding="utf-8")
    copy, settings = (block.text for block in SD3.section("2. ").blocks("bash"))
    reader.type(copy)
    reader.edit(settings)
    assert "finished   2 steps" in reader.type(SD3.section("3. ").block("bash"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    use = reader.own(SD3.section("4. ").block("python")).replace("guidance_scale", "num_inference_steps=2, guidance_scale")
    exec(use, names)
    assert names["pipeline"].transformer.peft_config, "no adapter was loaded"
    assert (tmp_path / "rex.png").stat().st_size > 0
    exec(SD3.section("Without T5").block("python"), names)
    assert names["pipeline"].text_encoder_3 is None

    t5 = reader.home / "models" / "t5"
    tokenizer = t5_tokenizer()
    t5_encoder(len(tokenizer), TEXT_WIDTH).save_pretrained(t5)
    tokenizer.save_pretrained(t5)
    elsewhere = SD3.section("T5 from elsewhere")
    reader.edit(elsewhere.block("bash"))
    short = "--max_train_steps=1 --validation_disable_unconditional --validation_prompt='' --output_dir=again"
    assert "finished   1 steps" in reader.type(f"./train_sd3.sh {short}")
    settings_used = json.loads((reader.clone / "again" / "config.json").read_text())["settings"]
    assert settings_used["pretrained_t5_model_name_or_path"]["value"] == str(t5)
    exec(reader.own(elsewhere.block("python")), names)
    assert names["pipeline"].text_encoder_3 is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "datasets", "said"), [(SIGMA, "sigma", "max_grad_norm 0.01 (family pixart_sigma)"), (HUNYUAN, "hunyuan", "Hunyuan-DiT")]
)
def test_the_quick_starts_for_transformers_train_a_lora_that_their_samples_load(
    page: Page, datasets: str, said: str, models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = new_reader(tmp_path, models, "training/images")
    described = reader.home / "training" / f"multidatabackend_{datasets}.json"
    assert f"`/home/user/training/{described.name}`" in page.text
    described.write_text(reader.own(page.section("1. ").block("json")), encoding="utf-8")
    copy, settings = (block.text for block in page.section("2. ").blocks("bash"))
    reader.type(copy)
    reader.edit(settings)
    story = " ".join(reader.type(page.section("3. ").block("bash")).split())
    assert "finished 2 steps" in story and said in story
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(in_two_steps(reader.own(page.section("4. ").block("python"))), names)
    assert any("lora_A" in name for name, _ in names["pipeline"].transformer.named_parameters()), "no adapter was loaded"
    assert (tmp_path / "rex.png").stat().st_size > 0


@pytest.mark.slow
def test_the_quick_start_for_deepfloyd_trains_both_stages_which_its_sample_uses_one_after_the_other(
    models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = new_reader(tmp_path, models, "training/images", settings="sd21-env.sh")
    datasets = reader.home / "training" / "multidatabackend_deepfloyd.json"
    assert f"`/home/user/training/{datasets.name}`" in DEEPFLOYD.text
    datasets.write_text(reader.own(DEEPFLOYD.section("1. ").block("json")), encoding="utf-8")
    copy, settings = (block.text for block in DEEPFLOYD.section("2. ").blocks("bash"))
    reader.type(copy)
    reader.edit(settings)
    one, two = (" ".join(reader.type(DEEPFLOYD.section(part).block("bash")).split()) for part in ("3. ", "4. "))
    assert "DeepFloyd IF stage I ·" in one and "finished 2 steps" in one
    assert "DeepFloyd IF stage II ·" in two and "finished 2 steps" in two
    assert "text 5 needed, 5 cached" in two
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    use = reader.own(DEEPFLOYD.section("5. ").block("python"))
    exec(use.replace("negative_prompt_embeds=without", "negative_prompt_embeds=without, num_inference_steps=2"), names)
    assert names["first"].unet.peft_config and names["second"].unet.peft_config, "no adapter was loaded"
    assert names["small"].shape == (1, 3, 16, 16)
    assert Image.open(tmp_path / "rex.png").size == (64, 64)


@pytest.mark.slow
def test_the_command_and_the_samples_of_the_refiner_work(quick_start: Followed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, output = quick_start.reader, tmp_path / "refined"
    command = REFINER.block("bash").rstrip() + f" --output_dir={output}\n"
    assert "SDXL refiner, by its model_index.json" in reader.type(command)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    Image.new("RGB", (64, 64), "gray").save("rex.png")
    alone, behind_a_base = (reader.own(block.text) for block in REFINER.blocks("python"))
    strong = alone.replace("strength=0.2", "strength=0.2, num_inference_steps=5").replace(str(quick_start.output), str(output))
    exec(strong, names)
    assert names["refiner"].unet.peft_config, "no adapter was loaded"
    assert Path("refined.png").stat().st_size > 0
    before = Path("rex.png").read_bytes()
    exec(behind_a_base.replace("prompt, ", "prompt, num_inference_steps=5, "), names)
    assert Path("rex.png").read_bytes() != before
