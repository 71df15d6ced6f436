"""Every method in real processes: a run in two lives ends in the bytes of one that never stopped, with its average."""

from __future__ import annotations

import os

import pytest

from tests.harness import Trainer

METHODS: dict[str, dict[str, object]] = {
    "PiSSA": {"lora_init_type": "pissa", "lora_dropout": 0, "lora_rank": 4},
    "OLoRA": {"lora_init_type": "olora", "lora_dropout": 0, "lora_rank": 4},
    "orthogonal": {"lora_init_type": "orthogonal"},
    "rank-stabilised DoRA": {"use_dora": True, "use_rslora": True},
    "LoCon": {"lora_algorithm": "locon", "lora_rank": 4},
    "LoKr": {"lora_algorithm": "lokr", "lora_dropout": 0, "lokr_factor": 4, "lora_rank": 2},
    "LoHa": {"lora_algorithm": "loha", "lora_dropout": 0, "lora_rank": 4},
    "nf4 base": {"base_quantization": "nf4"},
    "LoftQ": {"base_quantization": "nf4", "lora_init_type": "loftq", "lora_rank": 4},
    "BitFit": {"model_type": "full", "use_bitfit": True, "lora_dropout": None},
}
SHORT = ("LoftQ", "BitFit")  # the former has a pair of matrices that stands still, and a base that is rounded anew in each life
SELECTED = METHODS if os.environ.get("SIMPLETUNER_TEST_LONG") else SHORT
HANDED_OVER = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_live.kohya.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("method", SELECTED)
def test_a_run_in_two_lives_ends_in_the_same_bytes(method: str, trainer: Trainer) -> None:
    """The other methods too with SIMPLETUNER_TEST_LONG=1."""
    usual = {**METHODS[method], "learning_rate": 1e-3, "validation_steps": 0, "validation_prompt": None}
    whole = trainer.finish("whole", max_train_steps=4, **usual)
    trainer.finish(max_train_steps=2, **usual)
    again = trainer.finish(max_train_steps=4, **usual)
    assert "resuming from checkpoint-2" in again.printed
    assert again.losses == whole.losses
    kept = sorted(path.relative_to(whole.folder) for path in (whole.folder / "checkpoint-4").rglob("*.safetensors"))
    assert len(kept) >= 3  # the live weights, the average, the optimiser
    handed_over = ("pipeline/unet/diffusion_pytorch_model.safetensors",) if method == "BitFit" else HANDED_OVER
    for name in (*kept, *handed_over):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora_targets": "to_nothing"}, "--lora_targets: no module name of this model ends with to_nothing"),
        ({"lora_algorithm": "lokr", "lora_dropout": 0, "lora_targets": "norm1"}, "--lora_targets=norm1 matches no linear layer"),
        ({"lora_init_type": "pissa", "lora_dropout": 0, "lora_rank": 1024}, "lower --lora_rank"),
    ],
    ids=["no layer fits", "no layer fits LyCORIS", "a rank above the layer's"],
)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_encoded(
    settings: dict[str, object], says: str, trainer: Trainer
) -> None:
    ended = trainer.run(**settings)
    assert ended.code == 2 and says in ended.printed, ended.printed
    assert not list(ended.folder.glob("cache/**/*.safetensors"))
