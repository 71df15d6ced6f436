"""The components of a model folder: checking that they are complete, and loading them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from helpers.errors import ModelError
from helpers.families.loading import integrity
from helpers.families.loading.folder import read_json, read_settings

WEIGHTS_STEMS = ("model", "diffusion_pytorch_model")  # how transformers and diffusers begin the names of weights
ALIGNMENT = 64  # bytes: a cache line, and what torch's own allocator gives on a CPU


def require_components(folder: Path, components: Sequence[str], variant: str | None = None, needs_weights: bool = True) -> None:
    """Raises ModelError if a component is missing or incomplete, before hours are spent on the others."""
    missing = [name for name in components if not (folder / name).is_dir()]
    if missing:
        raise ModelError(f"The model in {folder} has no {', '.join(missing)} folder: it is incomplete or of another family.")
    for name in components:
        if problem := component_problem(folder / name, variant, needs_weights):
            raise ModelError(problem)


def component_problem(component: Path, variant: str | None, needs_weights: bool) -> str | None:
    """The reason why a component cannot be used, as one sentence; None if it can."""
    problem = integrity.unreadable_settings(component) or weights_problem(component, variant)
    return problem or (_absent_weights(component, variant) if needs_weights else None)


def weights_problem(component: Path, variant: str | None) -> str | None:
    """The reason why the weights in a folder cannot be loaded, as one sentence; None if they can, or if there are none."""
    wanted = weight_files(component, variant)
    if not wanted and any(component.glob("*.bin")) and not any(component.glob("*.safetensors")):
        return f"The weights in {component} are no .safetensors; convert them first, formats that run code are not opened."
    return next(filter(None, (integrity.problem_with(path) for path in wanted if path.is_file())), None)


def _absent_weights(component: Path, variant: str | None) -> str | None:
    """Which weights of a network are missing, as one sentence. (Only networks have a config.json.)"""
    if not (component / "config.json").is_file():
        return None
    wanted = weight_files(component, variant)
    if absent := next((path for path in wanted if not path.is_file()), None):
        return integrity.problem_with(absent)
    if wanted:
        return None
    others = {path.name.split(".")[1].partition("-")[0] for path in component.glob("*.*.safetensors")}
    if others:
        return f"The weights in {component} are there as {' and '.join(sorted(others))} alone: set --variant={min(others)}."
    return f"There are no weights in {component}: {integrity.remedy(component)}."


def weight_files(component: Path, variant: str | None) -> list[Path]:
    """The .safetensors files of a component that `load_component` loads, after their index if there is one.

    These are the variant's files, or those without a variant. Empty if the component has no weights.
    """
    for kind in dict.fromkeys((f".{variant}" if variant else "", "")):
        for stem in WEIGHTS_STEMS:
            if (single := component / f"{stem}{kind}.safetensors").is_file():
                return [single]
            if (index := component / f"{stem}.safetensors.index{kind}.json").is_file():
                return [index, *(component / name for name in sorted(set(read_json(index)["weight_map"].values())))]
    return []


def silence_bars() -> None:
    """Turn off the progress bars of diffusers and transformers: for files of a second they would run through ours."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def load_component(kind: Any, folder: Path, subfolder: str, dtype: Any, variant: str | None) -> Any:
    """A module by `from_pretrained`, in the given dtype. If the variant does not exist, the weights without a variant are loaded."""
    silence_bars()
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
    """A module of diffusers without weights (on the meta device), which costs next to nothing.

    Raises ModelError if the weight files, if there are any, do not match its names and shapes. Only their headers are read.
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
    """Copy weights at unaligned addresses, such as views of a file, to where torch itself would allocate them.

    The last bits of a matrix product depend on the alignment, and a resumed run must not depend on the addresses of its weights.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return module
