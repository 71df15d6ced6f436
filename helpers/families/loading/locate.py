"""Where the base model of the settings is: a folder, a name on the hub, or a single file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.families.loading import folder as files
from helpers.families.loading import single_file

if TYPE_CHECKING:
    from helpers.config.options import CacheOptions, ModelOptions

T5_CLASSES = ("T5EncoderModel", "MT5EncoderModel")  # as a model_index.json names them: not downloaded where another T5 is named
SETTINGS = ("*.json", "*.txt", "*.model")  # files of a model folder that are no weights: configs, and tables of tokenizers


def locate(options: ModelOptions, cache: CacheOptions) -> Path:
    """The folder of the base model in diffusers layout: downloaded or converted from a single file if needed.

    Raises ModelError where there is none.
    """
    path = Path(options.pretrained_model_name_or_path).expanduser()
    if path.is_file():
        with_t5 = not options.pretrained_t5_model_name_or_path
        return single_file.converted(path, options.single_file_config, cache.cache_dir, with_t5)
    without = T5_CLASSES if options.pretrained_t5_model_name_or_path else ()
    return files.locate(options.pretrained_model_name_or_path, options.revision, options.variant, without)


def without_weights(options: ModelOptions) -> ModelOptions:
    """Options for the dataset report, which needs latent sizes and caption lengths but no weights.

    Models on the hub are replaced by folders with their configs and tokenizers; nothing else is downloaded. Raises ModelError where the
    hub does not provide them.
    """
    revisions = {"pretrained_model_name_or_path": options.revision, "pretrained_vae_model_name_or_path": None}
    named = {option: getattr(options, option) for option in revisions}
    fetched: dict[str, Any] = {
        option: str(files.fetch(f"--{option}", name, SETTINGS, revisions[option]))
        for option, name in named.items()
        if name and not Path(name).expanduser().exists()
    }
    return dataclasses.replace(options, needs_weights=False, **fetched)
