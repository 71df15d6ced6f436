"""Which network is trained, and which of its weights move."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from helpers.config.declare import FROM_HERE, WITH_THE_DATA, WITH_THE_WEIGHTS, Needs, option

S = TypeVar("S")

LORA: Needs = (("model_type", ("lora",)),)
TEXT: Needs = (("train_text_encoder", (True,)),)
FULL_TEXT: Needs = (*TEXT, ("model_type", ("full",)))
FREEZING: Needs = (*FULL_TEXT, ("freeze_encoder", (True,)))


@dataclass(frozen=True)
class ModelOptions:
    """Model: which network is trained, and where it comes from."""

    model_family: str = option(
        "",
        "Family of the base model. The wrappers set it; families with the same wrapper and settings are recognized from the base model.",
        env="SIMPLETUNER_FAMILY",
    )
    pretrained_model_name_or_path: str = option(
        "",
        "The base model: a folder in diffusers layout, a hub name, or a .safetensors file. Required.",
        env="MODEL_NAME",
        default_text="required",
        on_resume=WITH_THE_WEIGHTS,
    )
    single_file_config: str | None = option(
        None,
        "For a base model in one .safetensors file: a model folder or hub name of the same kind, whose configs and tokenizers are used. "
        "If it is a folder, text encoders that the file lacks are taken from it too.",
        default_text="the model on the hub that diffusers takes the file for",
        on_resume=WITH_THE_WEIGHTS,
    )
    model_type: str = option(
        "full",
        "Train all weights of the network (full) or an adapter (lora; see --lora_algorithm).",  # Axes adds the families' further values
        choices=("full", "lora"),
    )
    revision: str | None = option(None, "Revision of the base model on the hub.", on_resume=WITH_THE_WEIGHTS)
    variant: str | None = option(None, "Variant of the weight files, for example fp16.", on_resume=WITH_THE_WEIGHTS)
    pretrained_vae_model_name_or_path: str | None = option(
        None, "Another VAE, for example one made for fp16.", default_text="the base model's own", on_resume=WITH_THE_DATA
    )
    pretrained_t5_model_name_or_path: str | None = option(
        None,
        "Another T5 encoder with its tokenizer: a folder or hub name of a pipeline or of a T5 alone. A base model without T5 gets it too.",
        default_text="the base model's own",
        some_families=True,
        on_resume=WITH_THE_DATA,
    )
    controlnet: bool = option(
        False,
        "Train a ControlNet: a copy of the network's encoder that follows a second picture, beside the network, which stays as it is."
        " Each image data set names those pictures by conditioning_data.",
    )
    controlnet_model_name_or_path: str | None = option(
        None,
        "ControlNet to start from: a folder as diffusers saves it, or a hub name.",
        default_text="a copy of the network's encoder",
        needs=(("controlnet", (True,)),),
    )
    freeze_unet_strategy: str = option(
        "none",
        "bitfit trains only the parameters whose name contains 'bias'; it needs --model_type=full.",
        choices=("none", "bitfit"),
    )
    use_bitfit: bool = option(False, "Same as --freeze_unet_strategy=bitfit.", alias_of=("freeze_unet_strategy", "bitfit"))
    tokenizer_max_length: int | None = option(
        None,
        "Tokens that T5 reads of a caption.",
        at_least=1,
        default_text="what the family's diffusers pipeline uses",
        some_families=True,
    )
    long_captions: str = option(
        "truncate",
        "Captions of over 77 tokens where CLIP alone reads them: cut off (counted and reported), or encoded in chunks, one after another.",
        choices=("truncate", "chunk"),
        some_families=True,
    )
    needs_weights: bool = True  # not an option: a look at the data is content with settings and tokenizers
    family_sections: tuple[Any, ...] = ()  # not an option: the sections that families declare, with their values

    def section(self, kind: type[S]) -> S:
        """The values of a section that a family declares; its defaults where settings were not read."""
        return next((section for section in self.family_sections if isinstance(section, kind)), None) or kind()


@dataclass(frozen=True)
class AdapterOptions:
    """LoRA: the small matrices that are trained beside the network."""

    lora_algorithm: str = option(
        "lora",
        "How the change of a layer is put together: B A (lora), the same on every linear layer and convolution (locon), "
        "a Kronecker product (lokr), a product of two B A by elements (loha).",
        choices=("lora", "locon", "lokr", "loha"),
        needs=LORA,
    )
    lora_rank: int = option(16, "Rank of the LoRA matrices; more learns more and weighs more.", at_least=1, needs=LORA)
    lora_alpha: float = option(16.0, "The adapter is scaled by lora_alpha / lora_rank.", above=0, needs=LORA)
    use_rslora: bool = option(
        False, "Scale by lora_alpha / sqrt(lora_rank), which keeps large ranks learning (rank-stabilised LoRA).", needs=LORA
    )
    lora_dropout: float = option(
        0.1,
        "Share of the adapter's inputs dropped while training.",
        at_least=0,
        at_most=0.99,
        default_text="0.1; 0 for lokr, loha, pissa and olora",
        needs=LORA,
    )
    lora_init_type: str = option(
        "default",
        "What the matrices start from: kaiming uniform (default) or gaussian, with B zero; orthogonal, with B A zero; the largest "
        "directions of the base model's weights (pissa), the first of its QR decomposition (olora), or the largest directions of what "
        "--base_quantization takes from it (loftq).",
        choices=("default", "gaussian", "orthogonal", "pissa", "olora", "loftq"),
        needs=LORA,
    )
    lora_targets: tuple[str, ...] = option(
        (),
        "Modules that get an adapter: name endings, or one regular expression.",
        default_text="the family's attention projections; every linear layer and convolution for locon",
        needs=LORA,
    )
    init_lora: Path | None = option(
        None,
        "Start the new run from this LoRA file, in diffusers' or kohya's layout; rank and alpha are the file's unless they are set.",
        needs=LORA,
    )
    use_dora: bool = option(False, "DoRA: train the magnitude of the weights beside the LoRA.", needs=LORA)
    lokr_factor: int | None = option(
        None,
        "LoKr: the smaller side of each layer's split, where it divides the layer's width; larger makes smaller files.",
        at_least=1,
        default_text="the split nearest to a square",
        needs=(*LORA, ("lora_algorithm", ("lokr",))),
    )


@dataclass(frozen=True)
class TextEncoderOptions:
    """Text encoder training: CLIP's encoders learn beside the network, and captions are encoded in every step."""

    train_text_encoder: bool = option(
        False,
        "Train the CLIP text encoders too: all or some layers (full), or adapters (lora). No caption is cached then."
        " documentation/TEXT_ENCODER.md lists the families.",
    )
    text_encoder_lr: float | None = option(
        None,
        "Highest learning rate of the text encoders; it follows the same schedule.",
        above=0,
        default_text="--learning_rate",
        needs=TEXT,
        on_resume=FROM_HERE,
    )
    freeze_encoder: bool = option(True, "Leave a part of the text encoder as it is (full); false trains all of it.", needs=FULL_TEXT)
    freeze_encoder_strategy: str = option(
        "after",
        "Layers that stay frozen, counted from 0: those before --freeze_encoder_before, after --freeze_encoder_after, between the two"
        " (both included), or outside them. Embeddings lie before the first layer, the final norm after the last.",
        env="TEXT_ENCODER_FREEZE_STRATEGY",
        choices=("before", "between", "after", "outside"),
        needs=FREEZING,
    )
    freeze_encoder_before: int = option(
        12,
        "Lower layer bound of --freeze_encoder_strategy.",
        env="TEXT_ENCODER_FREEZE_BEFORE",
        at_least=0,
        needs=(*FREEZING, ("freeze_encoder_strategy", ("before", "between", "outside"))),
    )
    freeze_encoder_after: int = option(
        17,
        "Upper layer bound of --freeze_encoder_strategy.",
        env="TEXT_ENCODER_FREEZE_AFTER",
        at_least=0,
        needs=(*FREEZING, ("freeze_encoder_strategy", ("after", "between", "outside"))),
    )
    text_encoder_limit: int = option(
        25, "Percentage of the run's steps after which the text encoders stop training; from 100 on they never do.", at_least=1, needs=TEXT
    )
