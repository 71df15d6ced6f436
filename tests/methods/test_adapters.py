"""Every kind of adapter: it begins as the base model, is kept to the bit, goes on as if it had not stopped, and opens elsewhere."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import mse_loss

from helpers.config.options import AdapterOptions, EmaOptions, OptimizerOptions
from helpers.errors import ConfigError
from helpers.families.sdxl import SDXL
from helpers.methods.lora import Lora
from helpers.methods.lycoris import Lycoris
from helpers.protocols import LIVE, Trainable, TrainingMethod
from helpers.training.ema import Average
from helpers.training.optimizers import NamedOptimizer
from tests.methods.conftest import QUESTION, ask

Elsewhere = Callable[[str, torch.Tensor], str]
Options = dict[str, Any]
long = pytest.mark.skipif(not os.environ.get("SIMPLETUNER_TEST_LONG"), reason="SIMPLETUNER_TEST_LONG=1 runs it; others take the same path")
CONVOLUTIONS = ("to_q", "conv1", "conv_shortcut")

LORA: dict[str, Options] = {
    "rank 8, alpha 2": {"lora_rank": 8, "lora_alpha": 2.0},
    "rank-stabilised": {"use_rslora": True, "lora_rank": 3},
    "LoCon": {"lora_algorithm": "locon"},
    "gaussian": {"lora_init_type": "gaussian"},
    "orthogonal": {"lora_init_type": "orthogonal"},
    "PiSSA": {"lora_init_type": "pissa"},
    "PiSSA, rank-stabilised": {"lora_init_type": "pissa", "use_rslora": True, "lora_rank": 3, "lora_targets": CONVOLUTIONS},
    "OLoRA": {"lora_init_type": "olora"},
}
DORA: dict[str, Options] = {
    "DoRA": {"use_dora": True},
    "DoRA on convolutions, rank-stabilised": {"use_dora": True, "use_rslora": True, "lora_targets": CONVOLUTIONS},
}
LYCORIS: dict[str, Options] = {
    "LoKr": {"lora_algorithm": "lokr"},
    "LoKr, factor 4": {"lora_algorithm": "lokr", "lokr_factor": 4, "lora_rank": 2},
    "LoHa": {"lora_algorithm": "loha"},
    "LoHa on convolutions, rank-stabilised": {"lora_algorithm": "loha", "use_rslora": True, "lora_targets": CONVOLUTIONS},
}
EVERY = {**LORA, **DORA, **LYCORIS}


def method_of(family: SDXL, **chosen: Any) -> Lora | Lycoris:
    usual = {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0}
    options = dataclasses.replace(AdapterOptions(), **{**usual, **chosen})
    return (Lycoris if options.lora_algorithm in ("lokr", "loha") else Lora)(options, family)


def attached(
    family: SDXL, dtype: torch.dtype = torch.float32, *, base: SDXL | None = None, **chosen: Any
) -> tuple[Lora | Lycoris, Trainable]:
    """`base` loads the network, where that is not to be as the family does it."""
    method = method_of(family, **chosen)
    torch.manual_seed(0)
    return method, method.attach((base or family).load(dtype))


def moved(trainable: Trainable, size: float = 0.05) -> Trainable:
    """With weights as training might leave them."""
    generator = torch.Generator().manual_seed(1)
    parameters = trainable.parameters.items()
    trainable.put({name: weights.detach() + size * torch.randn(weights.shape, generator=generator) for name, weights in parameters})
    return trainable


@pytest.fixture
def untouched(family: SDXL) -> torch.Tensor:
    return ask(family, family.load(torch.float32).denoiser.requires_grad_(False))


# -- where it begins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_a_fresh_adapter_is_the_base_model(kind: str, family: SDXL, untouched: torch.Tensor) -> None:
    """To the last bit where the second matrix is zero; where a large B A is taken away again, but for rounding."""
    method, trainable = attached(family, **EVERY[kind])
    begun = ask(family, trainable.denoiser)
    if method.options.lora_init_type in ("pissa", "olora", "orthogonal"):
        assert (begun - untouched).abs().max() < 5e-6
    else:
        assert torch.equal(begun, untouched)
    assert {weights.dtype for weights in trainable.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("kind", EVERY)
def test_every_weight_that_moves_has_a_gradient_and_no_other(kind: str, family: SDXL) -> None:
    _, trainable = attached(family, **EVERY[kind])
    loss(family, moved(trainable)).backward()
    graded = {name for name, parameter in trainable.denoiser.named_parameters() if parameter.grad is not None}
    assert graded == set(trainable.parameters)


def test_pissa_begins_with_the_largest_directions_of_the_weights(family: SDXL) -> None:
    method, trainable = attached(family, lora_init_type="pissa", use_rslora=True)
    layer = trainable.denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    both = method.factor * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    u, s, v = torch.linalg.svd(layer.get_base_layer().weight.float())
    assert torch.allclose(both, u[:, :4] * s[:4] @ v[:4], atol=2e-3)
    assert method.factor == 4.0  # alpha 8 / sqrt(4)


def test_olora_begins_with_orthonormal_columns_that_give_back_a_part_of_the_weights(family: SDXL) -> None:
    _, trainable = attached(family, lora_init_type="olora")
    layer = trainable.denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    assert torch.allclose(b.T @ b, torch.eye(4), atol=1e-5)
    assert torch.allclose((b @ a)[:, :4], layer.get_base_layer().weight[:, :4], atol=1e-5)


def test_a_rank_above_a_layers_width_cannot_begin_with_its_directions(family: SDXL) -> None:
    with pytest.raises(ConfigError, match=r"at least --lora_rank=40 inputs and outputs, and .* has 32; lower --lora_rank"):
        attached(family, lora_init_type="pissa", lora_rank=40)


def test_the_base_model_stays_as_it_is(family: SDXL) -> None:
    before = family.load(torch.float32).denoiser.state_dict()
    for kind in ("PiSSA", "DoRA", "LoKr"):
        _, trainable = attached(family, **EVERY[kind])
        after = {name.replace(".base_layer", ""): weights for name, weights in trainable.denoiser.named_parameters()}
        assert all(torch.equal(after[name], weights) for name, weights in before.items())


@pytest.mark.parametrize("kind", ["LoKr", "LoHa"])
def test_a_small_change_is_not_lost_in_a_half_precision_model(kind: str, family: SDXL) -> None:
    """As it would be, added to weights of bfloat16: 1 + 0.001 is 1 there. The layer's own output is 0 here."""
    _, trainable = attached(family, torch.bfloat16, **EVERY[kind])
    layer = trainable.denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    layer.weight.data.fill_(1)
    moved(trainable, 1e-3)
    asked = torch.tensor([[1.0, -1.0] * (layer.in_features // 2)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert 0 < layer(asked).float().abs().mean() < 0.02


def test_locon_is_on_every_linear_layer_and_convolution(family: SDXL) -> None:
    _, trainable = attached(family, lora_algorithm="locon")
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = {name for name, module in family.load(torch.float32).denoiser.named_modules() if isinstance(module, kinds)}
    assert {name.partition(".lora_")[0] for name in trainable.parameters} == layers


@pytest.mark.parametrize("algorithm", ["lora", "lokr"])
def test_targets_of_every_kind_can_be_an_expression_and_must_fit(algorithm: str, family: SDXL) -> None:
    _, trainable = attached(family, lora_algorithm=algorithm, lora_targets=(r"mid_block\..*\.to_q",))
    assert all("mid_block" in name and ".to_q." in name for name in trainable.parameters)
    with pytest.raises(ConfigError, match="to_nothing"):
        attached(family, lora_algorithm=algorithm, lora_targets=("to_nothing",))
    with pytest.raises(ConfigError, match=r"no module name of this model ends with to_qq \(did you mean to_q\?\); correct it"):
        attached(family, lora_algorithm=algorithm, lora_targets=("to_k", "to_qq"))


def test_lycoris_computes_by_pytorch_itself_on_a_gpu_too(family: SDXL) -> None:
    """What it would compile there depends on the shapes that a process meets first, and so on where a run was resumed."""
    from lycoris.kernels.dispatch import resolve_backend

    attached(family, lora_algorithm="lokr")
    assert resolve_backend(device=torch.device("cuda:0")) == "torch"


# -- how it is kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_what_was_saved_is_read_back_bit_for_bit(kind: str, family: SDXL, tmp_path: Path) -> None:
    method, trainable = attached(family, **EVERY[kind])
    method.save(moved(trainable), tmp_path)
    kept = {**trainable.parameters, **trainable.fixed}
    stored = method.read(trainable, tmp_path)
    assert stored.keys() == kept.keys()
    assert all(torch.equal(stored[name], weights) for name, weights in kept.items())
    for name, parameter in kept.items():
        parameter.data.zero_()
        assert not torch.equal(stored[name], parameter)
    trainable.put(stored)
    assert all(torch.equal(stored[name], weights) for name, weights in kept.items())


def loss(family: SDXL, trainable: Trainable, step: int = 0) -> torch.Tensor:
    """As of one step of training; the answer to learn is drawn for the step."""
    conditioning = {name: QUESTION[name] for name in ("prompt_embeds", "pooled", "time_ids")}
    trainable.denoiser.train()
    answer = family.predict(trainable.denoiser, QUESTION["noisy"], QUESTION["timesteps"], conditioning)
    return mse_loss(answer, torch.randn(answer.shape, generator=torch.Generator().manual_seed(step)))


def trained_on(family: SDXL, kind: Options, folder: Path, first: int, last: int, base: SDXL | None = None) -> tuple[Trainable, Average]:
    """Steps from `first` to `last` of a run that keeps everything in `folder` and begins with what is there."""
    torch.manual_seed(first)  # what an adapter begins with is drawn anew in every life, and must not matter
    method = method_of(family, **kind)
    trainable = method.attach((base or family).load(torch.float32))
    optimizer = NamedOptimizer(OptimizerOptions(optimizer="adamw"), trainable.parameters, 1e-2)
    average = Average(trainable.parameters, EmaOptions())
    if first:
        trainable.put(method.read(trainable, folder, LIVE))
        average.restore(method.read(trainable, folder))
        optimizer.restore(load_file(folder / "optimizer.safetensors"), json.loads((folder / "optimizer.json").read_bytes()))
    for step in range(first, last):
        loss(family, trainable, step).backward()
        optimizer.step(1e-2)
        optimizer.torch_optimizer.zero_grad()
        average.update(step + 1)
    method.save(trainable, folder, label=LIVE)
    method.save(trainable, folder, average.shadow)
    tensors, values = optimizer.state()
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps(values))
    return trainable, average


@pytest.mark.parametrize(
    "kind", ["PiSSA", "DoRA", "LoKr", *(pytest.param(kind, marks=long) for kind in ("OLoRA", "orthogonal", "LoCon", "LoHa"))]
)
def test_a_run_that_stopped_goes_on_as_if_it_had_not(kind: str, family: SDXL, tmp_path: Path) -> None:
    for name in ("at once", "twice"):
        (tmp_path / name).mkdir()
    at_once, its_average = trained_on(family, EVERY[kind], tmp_path / "at once", 0, 4)
    trained_on(family, EVERY[kind], tmp_path / "twice", 0, 2)
    twice, other_average = trained_on(family, EVERY[kind], tmp_path / "twice", 2, 4)
    assert all(torch.equal(weights, twice.parameters[name]) for name, weights in at_once.parameters.items())
    assert all(torch.equal(weights, other_average.shadow[name]) for name, weights in its_average.shadow.items())
    assert not all(torch.equal(weights, its_average.shadow[name]) for name, weights in at_once.parameters.items())
    for path in (tmp_path / "at once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()


# -- what others make of it -------------------------------------------------------------------------------------------------


def hand_over(family: SDXL, kinds: dict[str, Options], folder: Path) -> None:
    """A folder for each kind, the live model's answers in one file, and what kohya's names of layers are in lycoris' files."""
    answers = {}
    for number, chosen in enumerate(kinds.values()):
        method, trainable = attached(family, **chosen)
        method.export(moved(trainable), folder / str(number), {}, None)
        answers[str(number)] = ask(family, trainable.denoiser)
    save_file(answers, folder / "answers.safetensors")
    modules = [name for name, module in family.load(torch.float32).denoiser.named_modules() if hasattr(module, "weight")]
    names = {}
    for module in modules:
        try:
            names[family.kohya_name(module)] = "lycoris_" + module.replace(".", "_")
        except KeyError:
            continue  # a layer that the layout has no name for
    (folder / "names.json").write_text(json.dumps(names))


IN_DIFFUSERS = """
    import warnings
    answers = load_file({folder!r} + "/answers.safetensors")
    for number in sorted(answers, key=int):
        for name in {files}:
            pipeline = StableDiffusionXLPipeline.from_pretrained({model!r})
            pipeline.load_lora_weights({folder!r} + "/" + number, weight_name=name)
            print("read", number, (answer(pipeline.unet) - answers[number]).abs().max().item())
        for parameter_name, parameter in pipeline.unet.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.zero_()
        print("zero", number, (answer(pipeline.unet) - answers[number]).abs().max().item())
    """
IN_LYCORIS = """
    import json
    from lycoris import create_lycoris_from_weights
    answers = load_file({folder!r} + "/answers.safetensors")
    names = json.load(open({folder!r} + "/names.json"))
    for number in sorted(answers, key=int):
        for name in {files}:
            unet = StableDiffusionXLPipeline.from_pretrained({model!r}).unet
            weights = load_file({folder!r} + "/" + number + "/" + name)
            if "kohya" in name:
                weights = {{names[key.partition(".")[0]] + "." + key.partition(".")[2]: value for key, value in weights.items()}}
            layers = {{key.partition(".")[0] for key in weights}}
            network, _ = create_lycoris_from_weights(1.0, "", unet, weights)
            assert {{adapter.lora_name for adapter in network.loras}} == layers
            base = answer(unet)
            network.apply_to()
            print("read", number, (answer(unet) - answers[number]).abs().max().item())
            print("zero", number, (base - answers[number]).abs().max().item())
    """
DIFFUSERS, KOHYA = "pytorch_lora_weights.safetensors", "pytorch_lora_weights.kohya.safetensors"


def require_same_answers(said: str, kinds: dict[str, Options], files: int) -> None:
    """What was read predicts as the live model did, and an adapter that does nothing fails the same comparison."""
    rows = [line.split() for line in said.splitlines() if line.startswith(("read ", "zero "))]
    read, zero = ([(list(kinds)[int(number)], float(value)) for what, number, value in rows if what == said] for said in ("read", "zero"))
    assert len(read) == files * len(kinds)
    assert [row for row in read if row[1] >= 1e-5] == []
    assert {kind for kind, value in zero if value > 1e-3} == set(kinds)


@pytest.mark.slow
def test_every_lora_opens_in_diffusers_and_predicts_what_the_live_model_predicts(
    family: SDXL, model: Path, tmp_path: Path, elsewhere: Elsewhere
) -> None:
    hand_over(family, LORA, tmp_path)
    said = elsewhere(IN_DIFFUSERS.format(folder=str(tmp_path), files=[DIFFUSERS, KOHYA], model=str(model)), torch.zeros(1))
    require_same_answers(said, LORA, 2)


@pytest.mark.slow
def test_a_dora_opens_in_diffusers_and_its_kohya_layout_in_lycoris(family: SDXL, model: Path, tmp_path: Path, elsewhere: Elsewhere) -> None:
    hand_over(family, DORA, tmp_path)
    said = elsewhere(IN_DIFFUSERS.format(folder=str(tmp_path), files=[DIFFUSERS], model=str(model)), torch.zeros(1))
    require_same_answers(said, DORA, 1)
    said = elsewhere(IN_LYCORIS.format(folder=str(tmp_path), files=[KOHYA], model=str(model)), torch.zeros(1))
    require_same_answers(said, DORA, 1)


@pytest.mark.slow
def test_lokr_and_loha_open_in_lycoris_in_both_layouts_and_so_does_locon(
    family: SDXL, model: Path, tmp_path: Path, elsewhere: Elsewhere
) -> None:
    hand_over(family, LYCORIS, tmp_path)
    said = elsewhere(IN_LYCORIS.format(folder=str(tmp_path), files=[DIFFUSERS, KOHYA], model=str(model)), torch.zeros(1))
    require_same_answers(said, LYCORIS, 2)
    locon = {"LoCon": LORA["LoCon"]}
    hand_over(family, locon, tmp_path / "locon")
    said = elsewhere(IN_LYCORIS.format(folder=str(tmp_path / "locon"), files=[KOHYA], model=str(model)), torch.zeros(1))
    require_same_answers(said, locon, 1)


def test_kohya_files_hold_an_alpha_that_gives_the_same_factor(family: SDXL, tmp_path: Path) -> None:
    """alpha / rank is all that the layout tells; a pair that stands still has doubled the rank."""
    for kind, factor in {"rank 8, alpha 2": 2 / 8, "rank-stabilised": 8 / 3**0.5, "PiSSA": 8 / 4}.items():
        method, trainable = attached(family, **EVERY[kind])
        kohya = load_file(method.save(moved(trainable), tmp_path / kind)[1])
        for name, alpha in kohya.items():
            if name.endswith(".alpha"):
                rank = len(kohya[name.replace(".alpha", ".lora_down.weight")])
                assert alpha.item() / rank == pytest.approx(factor, rel=1e-6)


def test_files_name_their_algorithm(family: SDXL, tmp_path: Path) -> None:
    for kind, module in {"rank 8, alpha 2": "networks.lora", "LoCon": "lycoris.kohya", "LoKr": "lycoris.kohya"}.items():
        method, trainable = attached(family, **EVERY[kind])
        with safe_open(method.save(trainable, tmp_path / kind)[1], "pt") as file:
            metadata = file.metadata()
        assert metadata["ss_network_module"] == module
        assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_a_file_that_does_not_hold_what_was_trained_is_not_handed_over(
    family: SDXL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that gives back other bytes than were written."""
    import safetensors.torch

    for kind in ("DoRA", "LoKr", "LoHa"):
        method, trainable = attached(family, **EVERY[kind])
        moved(trainable)
        method.save(trainable, tmp_path / "right")
        with monkeypatch.context() as patch:
            patch.setattr(
                safetensors.torch, "load_file", lambda *said, **more: {name: 0 * it for name, it in load_file(*said, **more).items()}
            )
            with pytest.raises(RuntimeError, match="does not hold the trained"):
                method.save(trainable, tmp_path / "wrong")


def test_the_average_of_an_adapter_is_handed_over_with_the_live_one_beside_it(family: SDXL, tmp_path: Path) -> None:
    for kind in ("DoRA", "LoKr", "PiSSA"):
        method, trainable = attached(family, **EVERY[kind])
        live = {name: weights.detach().clone() for name, weights in moved(trainable).parameters.items()}
        average = {name: 0.5 * weights for name, weights in live.items()}
        names = [path.name for path in method.export(trainable, tmp_path / kind, {}, average)]
        assert names == [DIFFUSERS, KOHYA, *(name.replace("weights", "weights_live") for name in (DIFFUSERS, KOHYA))]
        for label, expected in (("", average), ("_live", live)):
            stored = method.read(trainable, tmp_path / kind, label)
            assert all(torch.equal(stored[name], weights) for name, weights in expected.items())


def test_methods_are_what_the_protocol_asks_for(family: SDXL) -> None:
    method: TrainingMethod = method_of(family, lora_algorithm="lokr")
    assert (method.default_optimizer("bf16"), method.weights_dtype("bf16", "adamw")) == ("adamw", torch.bfloat16)
