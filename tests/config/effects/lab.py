"""Where effects are looked at: miniature models, folders of images, and complete runs in this process, half a second each.

Libraries are imported where they are used: the tables of effects are read while tests are collected.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from helpers.choices import known_axes
from helpers.config.config import Config
from helpers.config.read import read_config
from helpers.errors import ConfigError, UserError
from tests.harness import Ended, run_here

Flags = tuple[str, ...]
SIZES = [(96, 64), (64, 96), (160, 160)]  # trained at 64 pixels, three shapes of two pictures each: three steps an epoch
ENTRY: Mapping[str, Any] = {"id": "pictures", "instance_data_dir": "images"}
SECOND: Mapping[str, Any] = {**ENTRY, "id": "second", "instance_data_dir": "other_images"}

# Three deterministic steps of a LoRA without images; the flags of an effect come after these, and the later one counts.
USUAL: Flags = (
    "--pretrained_model_name_or_path=model",
    "--data_backend_config=data.json",
    "--cache_dir=cache",
    "--model_type=lora",
    "--lora_rank=2",
    "--lora_targets=to_q",
    "--lora_dropout=0",
    "--resolution=64",
    "--resolution_type=pixel",
    "--train_batch_size=2",
    "--gradient_accumulation_steps=1",
    "--max_train_steps=3",
    "--learning_rate=1e-2",
    "--lr_scheduler=constant",
    "--caption_dropout_probability=0",
    "--validation_disable_unconditional",
    "--validation_num_inference_steps=1",  # ControlNets and refiners sample pictures of the data without being asked
    "--record_samples",
    "--report_to=none",
)


@dataclass
class Lab:
    """Relative paths in flags and datasets are taken from `folder`, which is the working directory of every check."""

    folder: Path
    facts: Any = field(default_factory=known_axes)
    ran: dict[str, Ended] = field(default_factory=dict)  # by what the settings of a run come to
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def config(self, flags: Flags = (), usual: Flags = USUAL) -> Config:
        """What is no flag is a variable, such as `SEED=1`."""
        said = [*usual, *flags]
        variables = dict(word.split("=", 1) for word in said if not word.startswith("--"))
        return read_config([word for word in said if word.startswith("--")], variables, self.facts)

    def run(self, flags: Flags = ()) -> Ended:
        """The run with these flags, or an earlier one whose settings came to the same: a default that is named changes nothing.

        What watches a run while it goes on needs one of its own, by `run_again`.
        """
        comes_to = self._comes_to(flags)
        if comes_to not in self.ran:
            self.ran[comes_to] = self.run_again(flags, self.new_folder())
        return self.ran[comes_to]

    def _comes_to(self, flags: Flags) -> str:
        config = self.config(("--output_dir=runs", *flags))
        values = {name: value for name, value in config.values().items() if name != "data_backend_config"}  # its entries count
        return repr((config.family_name, config.method_name, config.objective_name, values, config.datasets, config.text_caches))

    def run_again(self, flags: Flags, output: Path) -> Ended:
        """A run, or another life of one where `output` is that of an earlier run."""
        return run_here(self.config((f"--output_dir={output}", *flags)))

    def new_folder(self) -> Path:
        """A name under `runs` that nothing has yet."""
        return Path("runs") / str(next(self.numbers))

    def data(self, entries: Sequence[Mapping[str, Any]]) -> str:
        """The flag for a dataloader file with these entries."""
        if not (self.folder / "rows").exists() and any(entry.get("type") == "huggingface" for entry in entries):
            _as_rows(self.folder / "rows", {name: self.folder / name for name in ("images", "other_images")})
        path = self.folder / f"data-{next(self.numbers)}.json"
        path.write_text(json.dumps(entries, default=str), encoding="utf-8")
        return f"--data_backend_config={path.name}"


def build_lab(folder: Path) -> Lab:
    """Models `model`, `other`, `varied`, `refiner`, `sd3`, `flux`, `alpha` and `sd1` (also as a file), `t5` alone;
    images, tables, LoRAs, files.

    The images are in `images`, `other_images` and `tagged`, the tables in `tables`.
    `mapped` is a folder for a run whose user wants 1152x768 in place of what has the aspect 1.5.
    The same images are in the tars `images.tar` and `other_images.tar`, and as splits of a Hugging Face dataset in `rows` once an
    entry asks for one: the library takes seconds to import.
    """
    from helpers.families.miniatures import flux as tiny_flux
    from helpers.families.miniatures import pixart as tiny_pixart
    from helpers.families.miniatures import sd as tiny_sd
    from helpers.families.miniatures import sd3 as tiny_sd3
    from tests.data.toys import picture
    from tests.families.original_layout import write_single_file

    for name in ("cache", "runs"):
        (folder / name).mkdir(parents=True)  # made by the first run otherwise, and seen as its effect
    for seed, name in enumerate(("model", "other")):
        _write_model(folder / name, seed)
    tiny_sd.write_sdxl_refiner(folder / "refiner")
    tiny_sd3.write_sd3(folder / "sd3")
    tiny_flux.write_dev(folder / "flux")
    _write_t5(folder / "t5")
    tiny_pixart.write_pixart_alpha(folder / "alpha")
    write_single_file(tiny_sd.write_sd1(folder / "sd1"), folder / "sd1.safetensors")
    _with_variant(folder)
    _write_loras(folder)
    _write_controlnets(folder)
    for name, first in (("images", 0), ("other_images", 100)):
        for index in range(6):
            picture(folder / name / f"picture_{index}.png", first + index, SIZES[index % 3], f"caption number {index}")
        _in_a_tar(folder / name)
    for index in range(6):
        picture(folder / "tagged" / f"picture_{index}.png", 200 + index, SIZES[index % 3], f"a{index}, b, c, d\ne, f, g")
    _write_captions(folder)
    _write_tables(folder / "tables")
    (folder / "data.json").write_text(json.dumps([ENTRY]))
    table = {"caption_strategy": "parquet", "parquet": {"path": "../tables/left.parquet"}}
    (folder / "table.json").write_text(json.dumps([{**ENTRY, **table}]))
    (folder / "other.json").write_text(json.dumps([SECOND]))
    (folder / "both.json").write_text(json.dumps([ENTRY, SECOND]))
    reshaped = {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [0.5, 1, 2], "vae_cache_clear_each_epoch": True}
    (folder / "reshaped.json").write_text(json.dumps([{**ENTRY, **reshaped}]))
    (folder / "cropped.json").write_text(json.dumps([{**ENTRY, "crop": True}]))
    for place in sorted((folder / "images").glob("*.png")):  # conditioning images of the same names and shapes, one set dark and one light
        for name, shade in (("dark", 0), ("light", 200)):
            (folder / name).mkdir(exist_ok=True)
            size = tuple(2 * edge for edge in Image.open(place).size)
            Image.effect_noise(size, 40).point(lambda value, shade=shade: shade + value // 5).save(folder / name / place.name)
    (folder / "conditioned.json").write_text(json.dumps(conditioned()))
    (folder / "mapped").mkdir()
    (folder / "mapped" / "aspect_resolution_map-1.0.json").write_text(json.dumps({"1.5": [1152, 768]}))
    (folder / "layers.json").write_text(json.dumps({"attn2": {"rank": 5}}))
    (folder / "prompts.json").write_text(json.dumps({"cat": "a cat", "dog": "a dog"}))
    return Lab(folder)


def _write_model(folder: Path, seed: int) -> None:
    """An SDXL of two levels instead of three, which halves the time of a run."""
    import torch
    from diffusers import UNet2DConditionModel

    from helpers.families.miniatures import sdxl as tiny_sdxl

    pipeline = tiny_sdxl.build_sdxl(seed=seed)
    two_levels = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2),
        "transformer_layers_per_block": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline.register_modules(unet=UNet2DConditionModel.from_config({**pipeline.unet.config, **two_levels}))
    tiny_sdxl.save_sdxl(pipeline, folder)


def _in_a_tar(images: Path) -> None:
    with tarfile.open(images.with_suffix(".tar"), "w") as tar:
        for path in sorted(images.iterdir()):
            tar.add(path, path.name)


def _as_rows(folder: Path, splits: Mapping[str, Path]) -> None:
    """Images in the columns `image` and `turned`, captions in `text` and `loud`. `other_rows` has the splits exchanged."""
    import datasets

    tables = {}
    for name, images in splits.items():
        paths = sorted(map(str, images.glob("*.png")))
        captions = [Path(path).with_suffix(".txt").read_text() for path in paths]
        columns = {"image": paths, "turned": paths[::-1], "text": captions, "loud": [caption.upper() for caption in captions]}
        kinds = {"image": datasets.Image(), "turned": datasets.Image(), "text": datasets.Value("string"), "loud": datasets.Value("string")}
        tables[name] = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    datasets.DatasetDict(tables).save_to_disk(folder)
    datasets.DatasetDict(dict(zip(tables, reversed(tables.values()), strict=True))).save_to_disk(folder.with_name("other_rows"))


def _write_captions(folder: Path) -> None:
    """`sidecars`: images with a caption in a .txt, a .caption and a .json each. `apart`: other .txt files of the same names.

    `kohya`: two folders of images, whose names say repeats and a caption.
    """
    from tests.data.toys import picture

    (folder / "apart").mkdir()
    for index in range(6):
        path = folder / "sidecars" / f"picture_{index}.png"
        picture(path, 300 + index, SIZES[index % 3], f"beside {index}")
        path.with_suffix(".caption").write_text(f"written {index}")
        path.with_suffix(".json").write_text(json.dumps({"caption": f"first {index}", "other": f"second {index}"}))
        (folder / "apart" / f"picture_{index}.txt").write_text(f"apart {index}")
        picture(
            folder / "kohya" / ("1_left" if index < 3 else "2_right") / f"picture_{index}.png",
            400 + index,
            SIZES[index % 3],
            f"both {index}",
        )


def _write_tables(folder: Path) -> None:
    """`left` and `right` of each kind: captions of `images`, other ones in the column `other`, half of the names in `file`.

    The sizes of the last image are missing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for side in ("left", "right"):
        rows = [{"id": f"picture_{index}", "description": f"{side} {index}", "other": f"other {index}"} for index in range(6)]
        for index, row in enumerate(rows):
            row |= {"file": row["id"] if index < 3 else "", "width": "", "height": ""}
        for row, (width, height) in zip(rows[:5], SIZES * 2, strict=False):
            row |= {"width": str(width), "height": str(height)}
        columns = list(rows[0])
        pq.write_table(pa.table({name: [row[name] for row in rows] for name in columns}), folder / f"{side}.parquet")
        (folder / f"{side}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / f"{side}.csv").write_text("\n".join(",".join(line) for line in (columns, *(row.values() for row in rows))))


def _write_loras(folder: Path) -> None:
    """`lora_0` and `lora_1`: of rank 2, on the layers that usual runs train, with different weights."""
    import torch
    from safetensors.torch import load_file, save_file

    base = load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, weight in base.items():
            if name.endswith(".to_q.weight"):
                module = f"unet.{name.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=generator)
                tensors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 2, generator=generator)
        save_file(tensors, folder / f"lora_{seed}.safetensors", {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 16.0})})


def _with_variant(folder: Path) -> None:
    """`varied`: the model, its U-Net as a bf16 variant too, and the other model's as its fp16 variant.

    `hub`: both models as revisions in a hub cache.
    """
    shutil.copytree(folder / "model", folder / "varied")
    weights = "unet/diffusion_pytorch_model"
    for model, variant in (("model", "bf16"), ("other", "fp16")):
        shutil.copy(folder / model / f"{weights}.safetensors", folder / "varied" / f"{weights}.{variant}.safetensors")
    repository = folder / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for revision, model, commit in (("main", "model", "a" * 40), ("second", "other", "b" * 40)):
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folder / model, repository / "snapshots" / commit)


@dataclass(frozen=True)
class Effect:
    """What a probe finds under values of one setting, as they are written in a flag.

    `values` is a mapping where the finding is known, else any values under which it must differ. `beside` are flags that the setting
    needs. For keys of datasets: `entries` makes the entries of the file from the key and its value.
    """

    probe: Callable[[Lab, Flags], object]
    values: Sequence[str] | Mapping[str, object]
    beside: Flags = ()
    entries: Callable[[str, Any], list[dict[str, Any]]] = lambda key, value: [{**ENTRY, key: value}]

    def check(self, lab: Lab, flag_of: Callable[[str], str]) -> None:
        """Probe once under each value: the finding is what is expected, or no two are the same. `flag_of` gives a value's flag."""
        found = {value: self.probe(lab, (*self.beside, flag_of(value))) for value in self.values}
        if isinstance(self.values, Mapping):
            assert found == self.values, found
        assert all(one != other for one, other in itertools.combinations(found.values(), 2)), found


def conditioned(**keys: Any) -> list[dict[str, Any]]:
    """The images with the dark conditioning images; `keys` are of their entry."""
    sets = [{"id": name, "dataset_type": "conditioning", "instance_data_dir": name} for name in ("dark", "light")]
    return [{**ENTRY, "conditioning_data": "dark", **keys}, *sets]


def cropped(key: str, value: Any) -> list[dict[str, Any]]:
    return [{**ENTRY, "crop": True, key: value}]


def refusal(lab: Lab, flags: Flags) -> str:
    """What a run is refused with, by its settings or on its way; "" when it went well."""
    try:
        lab.run_again(("--max_train_steps=1", *flags), lab.new_folder())
    except ConfigError as error:
        return "\n".join(error.problems)
    except UserError as error:
        return str(error)
    return ""


def _write_t5(folder: Path) -> None:
    """A T5 for `sd3`, with other weights than its own."""
    import torch

    from helpers.families.miniatures import sd3 as tiny_sd3
    from helpers.families.miniatures import t5 as tiny_t5

    tokenizer = tiny_t5.t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tiny_t5.t5_encoder(len(tokenizer), tiny_sd3.TEXT_WIDTH).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_controlnets(folder: Path) -> None:
    """`controlnet_0` and `controlnet_1`: of `model`, with different weights in a layer that begins as zeros."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    controlnet = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(folder / "model" / "unet"))
    for seed in (0, 1):
        torch.nn.init.normal_(controlnet.controlnet_mid_block.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
        controlnet.save_pretrained(folder / f"controlnet_{seed}")
