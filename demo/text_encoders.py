"""Train the demo's text encoders: what they give for a caption must tell apart its two colours and its shape."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from demo.pictures import COLOURS, SHAPES, Scene

STEPS = 300
LEARNING_RATE = 2e-3
ENCODERS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))


def train(pipeline: StableDiffusionXLPipeline, *, seed: int = 0) -> float:
    """Train both text encoders in place => the share of attributes that linear readers get right, of all captions.

    The readers are thrown away. They read just what SDXL's U-Net is given: the last but one hidden layer of both encoders and the
    pooled projection of the second.
    """
    torch.manual_seed(seed)
    scenes = [
        Scene(shape, foreground, background)
        for shape, foreground, background in itertools.product(SHAPES, COLOURS, COLOURS)
        if foreground != background
    ]
    labels = [torch.tensor(column) for column in zip(*map(_labels, scenes), strict=True)]
    captions = [scene.caption for scene in scenes]
    for _, name in ENCODERS:
        _set_spread(getattr(pipeline, name), _hidden(pipeline, name, captions))
    widths = [feature.shape[1] for feature in _features(pipeline, captions)]
    readers = nn.ModuleList(nn.Linear(width, 2 * len(COLOURS) + len(SHAPES)) for width in widths)
    parameters = [*pipeline.text_encoder.parameters(), *pipeline.text_encoder_2.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(STEPS):
        logits = [reader(feature) for reader, feature in zip(readers, _features(pipeline, captions), strict=True)]
        loss = torch.stack([F.cross_entropy(part, label) for row in logits for part, label in zip(_split(row), labels, strict=True)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for _, name in ENCODERS:
        _set_spread(getattr(pipeline, name), _hidden(pipeline, name, captions))
    right = [part.argmax(1) == label for row in logits for part, label in zip(_split(row), labels, strict=True)]
    return torch.stack(right).float().mean().item()


def _labels(scene: Scene) -> tuple[int, int, int]:
    colours = list(COLOURS)
    return colours.index(scene.foreground), colours.index(scene.background), SHAPES.index(scene.shape)


def _split(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.split([len(COLOURS), len(COLOURS), len(SHAPES)], dim=1)


def _tokens(pipeline: StableDiffusionXLPipeline, name: str, captions: list[str]) -> Tensor:
    """Ids without padding: all captions have as many words, and CLIP never looks ahead."""
    tokenizer = getattr(pipeline, dict((encoder, tokenizer) for tokenizer, encoder in ENCODERS)[name])
    return torch.tensor(tokenizer(captions).input_ids)


def _hidden(pipeline: StableDiffusionXLPipeline, name: str, captions: list[str]) -> Tensor:
    """(captions, tokens, width): the last but one hidden layer, which SDXL conditions on."""
    with torch.no_grad():
        return getattr(pipeline, name)(_tokens(pipeline, name, captions), output_hidden_states=True).hidden_states[-2]


def _features(pipeline: StableDiffusionXLPipeline, captions: list[str]) -> list[Tensor]:
    """What the readers see, each (captions, width): the end-of-text position of both hidden layers, and the pooled projection."""
    outputs = [getattr(pipeline, name)(_tokens(pipeline, name, captions), output_hidden_states=True) for _, name in ENCODERS]
    return [*(output.hidden_states[-2][:, -1] for output in outputs), outputs[1].text_embeds]


def _set_spread(encoder: nn.Module, hidden: Tensor) -> None:
    """Scale an encoder so that its hidden layers have unit standard deviation, as U-Net weights at their start expect.

    All that adds to the residual stream is scaled alike; the layer norms in front of everything that reads it take the factor out
    again, so nothing else changes.
    """
    factor = 1 / hidden.std().item()
    writers = ("token_embedding.weight", "position_embedding.weight", "out_proj.weight", "out_proj.bias", "fc2.weight", "fc2.bias")
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(writers):
                parameter.mul_(factor)
