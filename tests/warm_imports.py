"""Imported once by the server of warm.py: the libraries, the classes that the trainer takes of them, and the trainer."""

from __future__ import annotations

import gc
import importlib
import pkgutil

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
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import helpers
import train  # noqa: F401
from helpers.reporting import html_report

for module in pkgutil.walk_packages(helpers.__path__, "helpers."):
    importlib.import_module(module.name)
# What every run makes once: a thousand regular expressions of transformers, and the page of the report.
get_checkpoint_conversion_mapping("clip_text_model")
html_report._template()
gc.collect()
gc.freeze()  # the collector need not go through these in every program
