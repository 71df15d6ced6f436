"""What the header of a LoRA file says of its shape, read without torch: rank, scale, and whether it is a DoRA."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from helpers.config.model_names import address_problem, is_address
from helpers.foreign_json import parse_json

T = TypeVar("T")

_DOWN = re.compile(r"(lora_A(\.\w+)?|lora_down|lora\.down)\.weight$")  # peft's, kohya's and diffusers' older name of the first matrix
_OF_TEXT = ("lora_te", "text_encoder", "te1.", "te2.")
_ALPHA = {"F64": "d", "F32": "f", "F16": "e"}  # as struct knows them; bfloat16 is the upper half of a float32
_LARGEST_HEADER = 100_000_000  # bytes: safetensors' own limit


@dataclass(frozen=True)
class LoraFile:
    """The options that a LoRA file settles, by their names. Rank and alpha are those of most layers."""

    lora_rank: int
    lora_alpha: float
    use_dora: bool
    use_rslora: bool
    train_text_encoder: bool
    differing: str = field(default="", compare=False)  # "ranks 4 and 8" where layers differ; each keeps its own


def read_lora_file(path: Path) -> LoraFile:
    """ValueError, a sentence with the path, where it is no LoRA that training can continue."""
    if is_address(str(path)):
        raise ValueError(f"{address_problem(str(path))}.")
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = parse_json(file.read(min(length, _LARGEST_HEADER)))
            metadata = header.pop("__metadata__", {})
            stored_alphas = list(_alphas(file, length, header))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; check the path.") from error
    except (struct.error, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a .safetensors file; convert it, or name another.") from error
    if any(mark in name for name in header for mark in (".lokr_", ".hada_", ".lora_mid")):
        raise ValueError(f"{path} is a LyCORIS file, from which a run cannot start; name a LoRA.")
    ranks = [int(tensor["shape"][0]) for name, tensor in header.items() if _DOWN.search(name)]
    if not ranks:
        raise ValueError(f"{path} holds no LoRA; name a file in diffusers' or kohya's layout.")
    settings = _settings(metadata)
    rank = _most_common(ranks)
    alphas = stored_alphas or [float(settings.get("lora_alpha", rank)), *map(float, (settings.get("alpha_pattern") or {}).values())]
    alpha = _most_common(alphas) if stored_alphas else alphas[0]
    several = (f"{what} {_numbers(values)}" for what, values in (("ranks", ranks), ("alphas", alphas)) if len(set(values)) > 1)
    differing = " and ".join(several)
    dora = any(name.endswith((".dora_scale", ".lora_magnitude_vector")) for name in header)
    of_text = any(name.startswith(_OF_TEXT) for name in header)
    return LoraFile(rank, alpha, dora, bool(settings.get("use_rslora")) and not stored_alphas, of_text, differing)


def _most_common(values: Sequence[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def _numbers(values: Iterable[float]) -> str:
    *first, last = (f"{value:g}" for value in sorted(set(values)))
    return f"{', '.join(first)} and {last}" if first else last


def _alphas(file: Any, length: int, header: Mapping[str, Any]) -> Iterator[float]:
    """Of kohya's layout: a number beside each layer."""
    for name, tensor in header.items():
        if not name.endswith(".alpha"):
            continue
        begin, end = tensor["data_offsets"]
        file.seek(8 + length + begin)
        data = file.read(end - begin)
        if tensor["dtype"] == "BF16":
            yield struct.unpack("<f", b"\0\0" + data)[0]
        else:
            yield struct.unpack(f"<{_ALPHA[tensor['dtype']]}", data)[0]


def _settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings of the network's adapter, as diffusers writes them: `unet.r`, `unet.lora_alpha` ..."""
    settings = parse_json(metadata.get("lora_adapter_metadata", "{}"))
    return {name.rpartition(".")[2]: value for name, value in settings.items() if not name.startswith("text_encoder")}
