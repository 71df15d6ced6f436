"""Options of the base model, and of which weights are trained."""

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
    """Model: the base model, and which of its weights are trained."""

    model_family: str = option(
        "",
        "Family of the base model. The wrappers set it. Families with the same wrapper and settings are recognized from the model.",
        env="SIMPLETUNER_FAMILY",
    )
    pretrained_model_name_or_path: str = option(
        "",
        "The base model: a folder in diffusers layout, a name on the Hugging Face Hub, or a .safetensors file. Required.",
        env="MODEL_NAME",
        default_text="required",
        on_resume=WITH_THE_WEIGHTS,
    )
    single_file_config: str | None = option(
        None,
        "For a base model in one .safetensors file: a model of the same kind, as a folder or a name on the hub, whose configs and "
        "tokenizers are used. A folder also provides text encoders that the file does not contain.",
        default_text="the model on the hub that diffusers recognizes in the file",
        on_resume=WITH_THE_WEIGHTS,
    )
    model_type: str = option(
        "full",
        "Train all weights of the network (full) or an adapter (lora; see --lora_algorithm).",  # Axes adds the families' further values
        choices=("full", "lora"),
    )
    revision: str | None = option(None, "Revision of the base model on the hub.", on_resume=WITH_THE_WEIGHTS)
    variant: str | None = option(None, "Variant of the weight files, such as fp16.", on_resume=WITH_THE_WEIGHTS)
    pretrained_vae_model_name_or_path: str | None = option(
        None, "Another VAE, such as one that was made for fp16.", default_text="the base model's own", on_resume=WITH_THE_DATA
    )
    pretrained_t5_model_name_or_path: str | None = option(
        None,
        "Another T5 text encoder with its tokenizer, also for base models without T5: a pipeline or a T5, as a folder or hub name.",
        default_text="the base model's own",
        some_families=True,
        on_resume=WITH_THE_DATA,
    )
    controlnet: bool = option(
        False,
        "Train a ControlNet: a copy of the network's encoder whose input is a conditioning image. The base model is frozen. Each image "
        "dataset names its conditioning images with conditioning_data.",
    )
    controlnet_model_name_or_path: str | None = option(
        None,
        "ControlNet to start from: a folder in diffusers layout, or a name on the hub.",
        default_text="a copy of the network's encoder",
        needs=(("controlnet", (True,)),),
    )
    freeze_unet_strategy: str = option(
        "none",
        "bitfit trains only the parameters with 'bias' in their names. It needs --model_type=full.",
        choices=("none", "bitfit"),
    )
    use_bitfit: bool = option(False, "Same as --freeze_unet_strategy=bitfit.", alias_of=("freeze_unet_strategy", "bitfit"))
    tokenizer_max_length: int | None = option(
        None,
        "Number of tokens of a caption that T5 reads.",
        at_least=1,
        default_text="what the family's diffusers pipeline uses",
        some_families=True,
    )
    long_captions: str = option(
        "truncate",
        "Captions of more than 77 tokens, for families that only have CLIP: truncate (the report counts them), or encode in chunks.",
        choices=("truncate", "chunk"),
        some_families=True,
    )
    export_single_file: bool = option(
        False,
        "At the end also write the whole model as OUTPUT_DIR/pipeline.safetensors, for ComfyUI and other tools, with its prediction type.",
        some_families=True,
        needs=(("model_type", ("full",)),),
        on_resume=FROM_HERE,
    )
    needs_weights: bool = True  # not an option: the dataset report only needs configs and tokenizers
    family_sections: tuple[Any, ...] = ()  # not an option: the sections that families declare, with their values

    def section(self, kind: type[S]) -> S:
        """The values of a section that a family declares; its defaults if no settings were read."""
        return next((section for section in self.family_sections if isinstance(section, kind)), None) or kind()


@dataclass(frozen=True)
class AdapterOptions:
    """LoRA: the adapter that is trained while the base model is frozen."""

    lora_algorithm: str = option(
        "lora",
        "Form of the change of each layer: a product B A of two small matrices (lora), the same for all linear layers and convolutions "
        "(locon), a Kronecker product (lokr), or the elementwise product of two B A (loha).",
        choices=("lora", "locon", "lokr", "loha"),
        needs=LORA,
    )
    lora_rank: int = option(
        16, "Rank of the LoRA matrices. A higher rank can learn more, and needs more VRAM and a larger file.", at_least=1, needs=LORA
    )
    lora_alpha: float = option(16.0, "The adapter's output is multiplied by lora_alpha / lora_rank.", above=0, needs=LORA)
    use_rslora: bool = option(False, "Rank-stabilized LoRA, for high ranks: multiply by lora_alpha / sqrt(lora_rank) instead.", needs=LORA)
    lora_dropout: float = option(
        0.1,
        "Share of the adapter's inputs that are dropped in training.",
        at_least=0,
        at_most=0.99,
        default_text="0.1; 0 for lokr, loha, pissa, olora",
        needs=LORA,
    )
    lora_init_type: str = option(
        "default",
        "Initial values. A is Kaiming uniform (default) or Gaussian, and B zero; orthogonal, with B A zero; the principal singular vectors "
        "of the base model's weights (pissa), its QR decomposition (olora), or the principal singular vectors of the error of "
        "--base_quantization (loftq).",
        choices=("default", "gaussian", "orthogonal", "pissa", "olora", "loftq"),
        needs=LORA,
    )
    lora_targets: tuple[str, ...] = option(
        (),
        "Modules that get an adapter: endings of their names, or one regular expression.",
        default_text="the family's attention projections; all linear layers and convolutions for locon",
        needs=LORA,
    )
    lora_layers: Path | None = option(
        None,
        'Rank, alpha and learning rate of some layers: a JSON file of {"regular expression": {"rank": 8, "alpha": 8, "lr_scale": 0.5}}. '
        "The first expression that is found in a layer's name counts. See documentation/LORA.md.",
        default_text="--lora_rank, --lora_alpha and --learning_rate for all layers",
        needs=LORA,
    )
    init_lora: Path | None = option(
        None,
        "Start a new run from this LoRA file, in diffusers or kohya format. Rank and alpha are taken from the file unless they are set.",
        needs=LORA,
    )
    base_lora: Path | None = option(
        None,
        "Add this LoRA to the frozen base model while training, such as the training adapter of a distilled model; in diffusers or kohya "
        "format. The exported files do not contain it.",
        needs=LORA,
    )
    use_dora: bool = option(False, "DoRA: also train the magnitude of each layer's weights.", needs=LORA)
    lokr_factor: int | None = option(
        None,
        "LoKr: the size of the smaller Kronecker factor, if it divides the layer's width. A larger factor makes the file smaller.",
        at_least=1,
        default_text="the divisor nearest to the square root of the width",
        needs=(*LORA, ("lora_algorithm", ("lokr",))),
    )


@dataclass(frozen=True)
class TextEncoderOptions:
    """Text encoder training: the CLIP text encoders are trained together with the network."""

    train_text_encoder: bool = option(
        False,
        "Also train the CLIP text encoders: all or some of their layers (full), or adapters (lora). Captions are then encoded in every "
        "step instead of cached. See documentation/TEXT_ENCODER.md.",
    )
    text_encoder_lr: float | None = option(
        None,
        "Peak learning rate of the text encoders. It follows the same schedule.",
        above=0,
        default_text="--learning_rate",
        needs=TEXT,
        on_resume=FROM_HERE,
    )
    freeze_encoder: bool = option(True, "Freeze some layers of the text encoders; false trains all of them.", needs=FULL_TEXT)
    freeze_encoder_strategy: str = option(
        "after",
        "Frozen layers, numbered from 0: those before --freeze_encoder_before, after --freeze_encoder_after, between the two (both "
        "included), or outside them. Embeddings come before the first layer, the final norm after the last.",
        env="TEXT_ENCODER_FREEZE_STRATEGY",
        choices=("before", "between", "after", "outside"),
        needs=FREEZING,
    )
    freeze_encoder_before: int = option(
        12,
        "Lower bound of --freeze_encoder_strategy, as a layer number.",
        env="TEXT_ENCODER_FREEZE_BEFORE",
        at_least=0,
        needs=(*FREEZING, ("freeze_encoder_strategy", ("before", "between", "outside"))),
    )
    freeze_encoder_after: int = option(
        17,
        "Upper bound of --freeze_encoder_strategy, as a layer number.",
        env="TEXT_ENCODER_FREEZE_AFTER",
        at_least=0,
        needs=(*FREEZING, ("freeze_encoder_strategy", ("after", "between", "outside"))),
    )
    text_encoder_limit: int = option(
        25, "Percentage of the run's steps in which the text encoders are trained; 100 or more for all of them.", at_least=1, needs=TEXT
    )
