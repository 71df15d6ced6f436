"""Names of models that cannot be one: web addresses, and files where a folder is needed. Each problem is one sentence with its remedy."""

from __future__ import annotations

import os
import re
from pathlib import Path

_ADDRESS = re.compile(r"(?:https?:/|www\.|(?:huggingface\.co|hf\.co|civitai\.com|github\.com)/)", re.IGNORECASE)
_HUB = re.compile(
    r"(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<name>[\w.-]+/[\w.-]+)(?P<file>/(?:blob|resolve|tree|raw)/[^?#]*)?/?(?:[?#].*)?",
    re.IGNORECASE,
)


def is_address(name: str) -> bool:
    """Whether a name is a web address; also of one that was read as a path, which turns // into /."""
    return _ADDRESS.match(name) is not None and not os.path.exists(name)


def address_problem(name: str) -> str:
    """What to do with a web address."""
    found = _HUB.fullmatch(name)
    if re.search(r"(huggingface\.co|hf\.co)/(datasets|spaces|collections|papers)/", name, re.IGNORECASE):
        return (
            f"{name} is the address of something else than a model; name a folder, a file or a model on the Hugging Face Hub (owner/name)"
        )
    if found and not re.search(r"\.\w+$", found["file"] or ""):
        return f"{name} is a web address; write the name of the model alone: {found['name']}"
    return f"{name} is a web address; download the file and name its path"


def model_problem(name: str, may_be_file: bool) -> str | None:
    """What keeps a text from naming a model: a folder, a name on the hub or, where `may_be_file`, a .safetensors file."""
    path = Path(name).expanduser()
    if is_address(name):
        return address_problem(name)
    if _is_path(name) and not os.path.exists(path):
        return f"there is no folder {name}; check the path"
    if path.is_file() and not may_be_file:
        return f"{name} is a file; name a folder in diffusers layout, or a model on the Hugging Face Hub"
    return None


def _is_path(model: str) -> bool:
    """Whether the name of a model can only be a path: `/models/x`, `./x`, `~/x`, `C:\\x`; `owner/name` may be on the hub."""
    return model.startswith(("/", "./", "../", "~")) or model.count("/") > 1 or "\\" in model or model.lower().endswith(".safetensors")
