"""Text encoders of Hunyuan-DiT: a bilingual BERT (Chinese and English) that was trained with images, and mT5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from helpers.families.loading.base_model import BaseModel
from helpers.families.loading.hashes import fingerprint
from helpers.families.text.t5 import T5Encoder
from helpers.families.text.t5_source import T5Source


class HunyuanText:
    """The states of both encoders, each with the mask of its tokens. The encoders are loaded when the first caption comes.

    The network replaces padded states with a learned vector, so BERT's padding is not cached. That of mT5 is, because the network also
    pools all of its states, padding included.
    """

    def __init__(self, base: BaseModel, t5: T5Source, length: int, t5_length: int, device: torch.device) -> None:
        self.base = base
        self.length = length
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else torch.float16
        self.t5 = T5Encoder(t5, t5_length, masked=True, device=device)
        weights = base.hash_of("text_encoder", "tokenizer")
        self.fingerprint = fingerprint({"bert": weights, "dtype": str(self.dtype), "length": length, "t5": self.t5.fingerprint})
        self.truncated = 0
        self._loaded: tuple[Any, Any] | None = None

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => tensors by name, on the CPU, each in its encoder's precision:

        prompt_embeds (B, 77, D) and prompt_embeds_mask (B, 77) of BERT, prompt_embeds_2 (B, 256, E) and prompt_attention_mask_2 (B, 256)
        of mT5; masks are booleans. Captions that are too long for mT5, which reads further than BERT, are counted in `truncated`.
        """
        tokenizer, bert = self._load()
        tokens = tokenizer(list(captions), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        mask = tokens.attention_mask.to(self.device)
        states = bert(tokens.input_ids.to(self.device), attention_mask=mask).last_hidden_state
        output = self.t5.encode(captions)
        self.truncated += output.too_long
        return {
            "prompt_embeds": states.cpu(),
            "prompt_embeds_mask": mask.cpu().bool(),
            "prompt_embeds_2": output.states.cpu(),
            "prompt_attention_mask_2": output.mask.cpu().bool(),
        }

    def unload(self) -> None:
        self._loaded = None
        self.t5.unload()

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import BertModel, BertTokenizer

            tokenizer = BertTokenizer.from_pretrained(self.base.folder, subfolder="tokenizer", local_files_only=True)
            encoder = self.base.load(BertModel, "text_encoder", self.dtype)
            self._loaded = tokenizer, encoder.to(self.device).eval().requires_grad_(False)
        return self._loaded


def at_full_length(text: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Text (B, ...) with BERT's states and mask padded with zeros to `length`, which the network was built for."""
    missing = length - text["prompt_embeds"].shape[1]
    return {
        **text,
        "prompt_embeds": pad(text["prompt_embeds"], (0, 0, 0, missing)),
        "prompt_embeds_mask": pad(text["prompt_embeds_mask"], (0, missing)),
    }
