"""Finding a model: a folder in diffusers layout, local or fetched from the hub, and what its weights are."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.errors import ModelError
from helpers.families import whole
from helpers.storage.atomic import write_json

WEIGHTS_STEMS = ("model", "diffusion_pytorch_model")  # how transformers and diffusers begin the names of weights
ALIGNMENT = 64  # bytes: a cache line, and what torch's own allocator gives on a CPU


def locate(name: str, revision: str | None = None, variant: str | None = None, without: tuple[str, ...] = ()) -> Path:
    """The folder of a model, fetched from the hub unless `name` is a folder. Raises ModelError when it is neither.

    Components of the classes in `without` are not fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelError(f"--pretrained_model_name_or_path: {folder} is not a model in diffusers layout: it has no model_index.json.")
        return folder
    return _fetch(name, revision, variant, without)


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
    """Why a model is not to be had, by its name here or on the hub: offline, the libraries only tell that they were not let ask."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ModelError(
            f"{option}: {name!r} is no folder here, and of a model of this name on the Hugging Face Hub not all that is needed lies in the "
            "cache: check the path, or start once without HF_HUB_OFFLINE to have it fetched."
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(f"{option}: {name!r} is neither a folder here nor a model that the Hugging Face Hub gives us ({reason}).")


def locate_component(option: str, name: str, component: str) -> Path:
    """The folder of one part of a model that an option names: a folder, one with the part in it, or a name on the hub.

    Raises ModelError, naming the option, when it is none of them.
    """
    found = Path(name).expanduser()
    if found.is_dir():
        return found / component if (found / component).is_dir() else found
    return fetch(option, name, ("*.json", "*.safetensors"))


def fetch(option: str, name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The snapshot of a model on the hub, with the files that match in it; a commit as `revision` asks the hub no second time.

    Raises ModelError, naming the option, where the hub does not give them and the local cache has not got them.
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
    if problem := whole.damage(path):
        raise ModelError(problem)
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object: {whole.remedy(path)}.")
    return content


def read_settings(path: Path) -> dict[str, Any]:
    """How a component is built, by its JSON file, and by its class where the file leaves something out.

    Files of the first models name what their class did not have yet: the VAEs of Stable Diffusion 1 no scaling factor, their schedulers
    no prediction type. What the classes of diffusers and transformers then take is what these models were trained with.
    Raises ModelError naming the file when it is missing or broken.
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


def require_components(folder: Path, components: Sequence[str], variant: str | None = None, needs_weights: bool = True) -> None:
    """Refuse a folder that lacks a part of the model, before hours are spent on the other parts."""
    missing = [name for name in components if not (folder / name).is_dir()]
    if missing:
        raise ModelError(f"The model in {folder} has no {', '.join(missing)} folder: it is incomplete or of another family.")
    for name in components:
        if problem := component_problem(folder / name, variant, needs_weights):
            raise ModelError(problem)


def component_problem(component: Path, variant: str | None, needs_weights: bool) -> str | None:
    """What keeps a part of a model from being used, as one sentence."""
    problem = whole.unreadable_settings(component) or weights_problem(component, variant)
    return problem or (_absent_weights(component, variant) if needs_weights else None)


def weights_problem(component: Path, variant: str | None) -> str | None:
    """What keeps the weights in a folder from being loaded, as one sentence; weights that are not there are no problem."""
    wanted = weight_files(component, variant)
    if not wanted and any(component.glob("*.bin")) and not any(component.glob("*.safetensors")):
        return f"The weights in {component} are no .safetensors; convert them first, formats that run code are not opened."
    return next(filter(None, (whole.damage(path) for path in wanted if path.is_file())), None)


def _absent_weights(component: Path, variant: str | None) -> str | None:
    """Which weights a network lacks, as one sentence; only a network has a config.json."""
    if not (component / "config.json").is_file():
        return None
    wanted = weight_files(component, variant)
    if absent := next((path for path in wanted if not path.is_file()), None):
        return whole.damage(absent)
    if wanted:
        return None
    others = {path.name.split(".")[1].partition("-")[0] for path in component.glob("*.*.safetensors")}
    if others:
        return f"The weights in {component} are there as {' and '.join(sorted(others))} alone: set --variant={min(others)}."
    return f"There are no weights in {component}: {whole.remedy(component)}."


def weight_files(component: Path, variant: str | None) -> list[Path]:
    """The .safetensors of a component that are loaded, behind the index that lists them where there is one; none where it has none.

    As `load_component` chooses them: the variant's, or else the plain ones.
    """
    for kind in dict.fromkeys((f".{variant}" if variant else "", "")):
        for stem in WEIGHTS_STEMS:
            if (single := component / f"{stem}{kind}.safetensors").is_file():
                return [single]
            if (index := component / f"{stem}.safetensors.index{kind}.json").is_file():
                return [index, *(component / name for name in sorted(set(read_json(index)["weight_map"].values())))]
    return []


def load_component(kind: Any, folder: Path, subfolder: str, dtype: Any, variant: str | None) -> Any:
    """A module by `from_pretrained`, in the dtype asked for; the plain weights when the variant's are not there."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()  # their bars for files of a second would run through ours
    transformers.utils.logging.disable_progress_bar()
    arguments = {"subfolder": subfolder, "local_files_only": True, "use_safetensors": True}
    # diffusers and transformers spell the argument differently.
    arguments["dtype" if kind.__module__.startswith("transformers") else "torch_dtype"] = dtype
    try:
        if variant and any((folder / subfolder).glob(f"*.{variant}*.safetensors")):
            arguments["variant"] = variant
        module, found = kind.from_pretrained(folder, output_loading_info=True, **arguments)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / subfolder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    except RuntimeError as error:  # transformers' answer to shapes that differ, in many lines
        if "mismatch" not in str(error):
            raise
        raise ModelError(f"The weights in {folder / subfolder} are not of its config.json: their shapes differ.") from error
    _refuse_missing(folder / subfolder, found["missing_keys"])  # the libraries make up weights for these, and hardly mention it
    return _aligned(module)


def outline(kind: Any, component: Path, variant: str | None) -> Any:
    """A module of diffusers without weights: names, shapes and kinds of its layers, for next to nothing.

    Raises ModelError where the files of its weights, if there are any, have others. Only their headers are read.
    """
    import torch
    from safetensors import safe_open

    with torch.device("meta"):
        module = kind.from_config(read_settings(component / "config.json"))
    held: dict[str, list[int]] = {}
    for path in weight_files(component, variant):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                held |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
    wanted = module.state_dict()
    if held:
        _refuse_missing(component, wanted.keys() - held.keys())
    for name in sorted(wanted.keys() & held.keys()):
        if (shape := list(wanted[name].shape)) != held[name]:
            raise ModelError(f"The weights in {component} are not of its config.json, which makes {name} {shape} and not {held[name]}.")
    return module


def _refuse_missing(component: Path, names: Iterable[str]) -> None:
    if missing := sorted(names):
        few = ", ".join(missing[:2]) + (f" and {len(missing) - 2:,} more" if len(missing) > 2 else "")
        raise ModelError(f"The weights in {component} lack what its config.json asks for ({few}): fetch the model again.")


def _aligned(module: Any) -> Any:
    """Move weights that lie at odd addresses, as views of a file do, to where torch itself would put them.

    Matrix kernels answer in other last bits for other alignments, and a resumed run must not depend on where its weights lie.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return module


class WeightsHashes:
    """Hashes of weight files, remembered by (path, size, time) so that a warm start reads no weights."""

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        self.known: dict[str, str] = {}
        if memory.is_file():
            try:
                self.known = json.loads(memory.read_text(encoding="utf-8"))
            except ValueError:
                self.known = {}  # only a memory: the files themselves are hashed again

    def of(self, *folders: Path) -> str:
        """One hash over every weight and configuration file of these folders."""
        return self.of_files(
            (str(path.relative_to(folder)), path)
            for folder in folders
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".safetensors", ".json", ".txt", ".model")
        )

    def of_files(self, files: Iterable[tuple[str, Path]]) -> str:
        """One hash over files and the names that they are given."""
        digest = hashlib.sha256()
        for name, path in files:
            digest.update(f"{name} {self.of_file(path)}\n".encode())
        return digest.hexdigest()

    def of_file(self, path: Path) -> str:
        state = path.stat()
        name = f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}"
        if name not in self.known:
            with path.open("rb") as stream:
                self.known[name] = hashlib.file_digest(stream, "sha256").hexdigest()
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.memory, self.known)
        return self.known[name]


def fingerprint(facts: Mapping[str, object]) -> str:
    """A short name for a set of facts; another name for anything else."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
