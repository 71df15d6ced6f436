"""Imported once by the server of warm.py: the libraries, and the classes that the trainer takes of them."""

from __future__ import annotations

import gc

import accelerate.commands  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
from diffusers import (  # noqa: F401
    AutoencoderKL,
    ControlNetModel,
    HunyuanDiTPipeline,
    IFPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel  # noqa: F401

gc.collect()
gc.freeze()  # the collector need not go through these in every program
