"""Train the demo's text encoders: their output for a caption must distinguish its two colors and its shape."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from demo.drawings import COLORS, SHAPES, Scene

LEARNING_RATE = 2e-3
CLASSES = [len(COLORS), len(COLORS), len(SHAPES)]  # foreground, background, shape


def train(pipeline: StableDiffusionXLPipeline, *, steps: int = 300, seed: int = 0) -> float:
    """Train both text encoders in place => the share of attributes that linear classifiers predict correctly, over all captions.

    The classifiers are discarded afterwards. Their input is what SDXL's U-Net gets: the second-to-last hidden layer of both encoders, and
    the pooled projection of the second.
    """
    torch.manual_seed(seed)
    scenes = [Scene(shape, *colors) for shape in SHAPES for colors in itertools.permutations(COLORS, 2)]
    labels = [torch.tensor(column) for column in zip(*map(_labels, scenes), strict=True)]
    # Without padding: all captions have the same number of words, and CLIP's attention is causal.
    tokens = [
        torch.tensor(tokenizer([scene.caption for scene in scenes]).input_ids) for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    ]
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    for encoder, ids in zip(encoders, tokens, strict=True):
        _set_spread(encoder, ids)
    classifiers = nn.ModuleList(nn.Linear(feature.shape[1], sum(CLASSES)) for feature in _features(encoders, tokens))
    parameters = [parameter for module in (*encoders, classifiers) for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(steps):
        # three classifiers, each with three outputs
        features = _features(encoders, tokens)
        answers = [classifier(feature).split(CLASSES, dim=1) for classifier, feature in zip(classifiers, features, strict=True)]
        losses = [F.cross_entropy(logits, label) for answer in answers for logits, label in zip(answer, labels, strict=True)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    for encoder, ids in zip(encoders, tokens, strict=True):
        _set_spread(encoder, ids)
    right = [logits.argmax(1) == label for answer in answers for logits, label in zip(answer, labels, strict=True)]
    return torch.stack(right).float().mean().item()


def _labels(scene: Scene) -> tuple[int, int, int]:
    colors = list(COLORS)
    return colors.index(scene.foreground), colors.index(scene.background), SHAPES.index(scene.shape)


def _features(encoders: Sequence[nn.Module], tokens: Sequence[Tensor]) -> list[Tensor]:
    """The classifiers' inputs, each (captions, width): the end-of-text position of both hidden layers, and the pooled projection."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, tokens, strict=True)]
    return [*(output.hidden_states[-2][:, -1] for output in outputs), outputs[1].text_embeds]


def _set_spread(encoder: nn.Module, tokens: Tensor) -> None:
    """Scale an encoder so that its second-to-last hidden layer has unit standard deviation, as newly initialized U-Net weights expect.

    Every weight that adds to the residual stream is scaled by the same factor. Everything that reads the stream has a layer norm in front,
    which removes the factor, so nothing else changes.
    """
    with torch.no_grad():
        hidden = encoder(tokens, output_hidden_states=True).hidden_states[-2]
    factor = 1 / hidden.std().item()
    writers = ("token_embedding.weight", "position_embedding.weight", "out_proj.weight", "out_proj.bias", "fc2.weight", "fc2.bias")
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(writers):
                parameter.mul_(factor)
