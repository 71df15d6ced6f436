"""Finding a model in diffusers layout, in a local folder or on the hub, and reading its settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.errors import ModelError
from helpers.families.loading import integrity
from helpers.foreign_json import parse_json

# Errors of the hub's HTTP libraries that mean that it was not reached, by the names of their classes.
NO_CONNECTION = (
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "NetworkError",
    "ConnectionError",
    "gaierror",
    "ProxyError",
    "NameResolutionError",
)


def locate(name: str, revision: str | None = None, variant: str | None = None, without: tuple[str, ...] = ()) -> Path:
    """The folder of a model: `name` itself, or a download from the hub. Raises ModelError if it is neither.

    Components of the classes in `without` are not downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelError(f"--pretrained_model_name_or_path: {folder} is not a model in diffusers layout: {_no_index(folder)}.")
        return folder
    return _fetch(name, revision, variant, without)


def _no_index(folder: Path) -> str:
    """What a folder without model_index.json may be, and the remedy."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".safetensors")
    if (folder / "config.json").is_file():
        return "it has no model_index.json and is one part of a model; name the folder above it"
    if files:
        return f"it has no model_index.json; to use a file in it, name the file: {files[0]}"
    below = sorted(path.parent for path in folder.glob("*/model_index.json"))
    return f"it has no model_index.json, but {below[0]} has; name that" if below else "it has no model_index.json"


@functools.cache  # asked once a process: the hub's answer takes a second
def _fetch(name: str, revision: str | None, variant: str | None, without: tuple[str, ...]) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        index = read_json(Path(hf_hub_download(name, "model_index.json", revision=revision))) if without else {}
        left_out = dict.fromkeys(part for part, value in index.items() if isinstance(value, list) and value[-1] in without)
        return Path(DiffusionPipeline.download(name, revision=revision, variant=variant, use_safetensors=True, **left_out))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise _not_had("--pretrained_model_name_or_path", name, error) from error


def _not_had(option: str, name: str, error: Exception) -> ModelError:
    """Explain why the model was not found. Offline, the libraries only report a blocked request."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ModelError(
            f"{option}: {name!r} is no folder here, and of a model of this name on the Hugging Face Hub not all that is needed lies in the "
            "cache: check the path, or start once without HF_HUB_OFFLINE to have it fetched."
        )
    return ModelError(f"{option}: {name!r} is no folder here, and {_refusal_of_the_hub(name, error)}.")


def _refusal_of_the_hub(name: str, error: BaseException) -> str:
    """Why the hub did not give us a model, and the remedy. The libraries wrap the error that says it."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = list(_causes(error))

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if any_is(GatedRepoError):
        terms = f"https://huggingface.co/{name}"
        return f"the Hugging Face Hub gives it to those who accepted its terms: do so on {terms}, then run `hf auth login`"
    if any_is(RevisionNotFoundError):
        return "the Hugging Face Hub has it without that --revision: correct or remove it"
    if any_is(RepositoryNotFoundError):
        return (
            "the Hugging Face Hub has no model of this name that we may see: check the spelling, or run `hf auth login` for a private one"
        )
    if any_is(HFValidationError):
        return "it is no name of a model on the Hugging Face Hub (owner/name): check the path"
    if any_is(EntryNotFoundError) and not any_is(LocalEntryNotFoundError):
        return (
            "on the Hugging Face Hub it has no model_index.json: download its .safetensors file and name that, or name a model in "
            "diffusers layout"
        )
    if any(type(cause).__name__ in NO_CONNECTION or isinstance(cause, ConnectionError | TimeoutError) for cause in causes):
        return "the Hugging Face Hub cannot be reached: connect this machine to the network, or name a folder or a .safetensors file on it"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"the Hugging Face Hub does not give us a model of this name ({reason}): check the name, or name a folder"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def locate_component(option: str, name: str, component: str) -> Path:
    """The folder of a model's component that an option names: a folder, a folder that contains the component, or a name on the hub.

    Raises ModelError, naming the option, if it is none of them.
    """
    found = Path(name).expanduser()
    if found.is_dir():
        return found / component if (found / component).is_dir() else found
    return fetch(option, name, ("*.json", "*.safetensors"))


def fetch(option: str, name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Download the files of a model on the hub that match `patterns` => the folder of the snapshot.

    If `revision` is a commit whose files are in the local cache, the hub is not asked. Raises ModelError, naming the option, if files are
    neither on the hub nor in the local cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise _not_had(option, name, error) from error


def model_index(folder: Path) -> dict[str, Any]:
    return read_json(folder / "model_index.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises ModelError naming the file when it is missing or broken."""
    if problem := integrity.problem_with(path):
        raise ModelError(problem)
    content = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object: {integrity.remedy(path)}.")
    return content


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a component: its JSON file, and the defaults of its class for what the file does not contain.

    Files of early models lack settings that were added to the classes later: the VAEs of Stable Diffusion 1 have no scaling factor, their
    schedulers no prediction type. The defaults in diffusers and transformers are what these models were trained with.
    Raises ModelError, naming the file, if it is missing or damaged.
    """
    settings = read_json(path)
    return {**_defaults(settings), **settings}


def _defaults(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    import diffusers
    from transformers import CONFIG_MAPPING

    if (model_type := settings.get("model_type")) in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type]().to_dict()
    kind = getattr(diffusers, str(settings.get("_class_name")).removeprefix("Flax"), None)  # many were written by Flax's classes
    if not isinstance(kind, type):
        return {}
    parameters = inspect.signature(kind).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
