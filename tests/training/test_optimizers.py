"""Every optimizer by its name: it learns, and a checkpoint holds everything that its next step needs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from helpers.config.optimizers import ADAMW_DEFAULTS, FINDS_RATE, IS_ADAMW, OPTIMIZERS
from helpers.config.options import OptimizerOptions
from helpers.errors import ConfigError
from helpers.training.optimizers import NamedOptimizer, check_optimizer

NAMED = tuple(OPTIMIZERS)
# A few by their class, with unusual states: lists and dicts of tensors, counters outside of any parameter, an average, a tensor d.
BY_CLASS = tuple(f"pytorch_optimizer:{name}" for name in ("SOAP", "AggMo", "EmoNavi", "ScheduleFreeRAdam", "SPlus", "DAdaptAdan"))
CPU = torch.device("cpu")
INPUTS = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)) / 2

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about their own code


def options(name: str, **more: Any) -> OptimizerOptions:
    """As the settings have them when nobody says anything else."""
    return dataclasses.replace(OptimizerOptions(), **{"optimizer": name, **(ADAMW_DEFAULTS if name in IS_ADAMW else {}), **more})


def usual_rate(name: str) -> float:
    return 1.0 if name in FINDS_RATE or "DAdapt" in name else 1e-3


class Training:
    """A network with convolutions, norms and matrices, some large enough for 8-bit states, and its optimizer."""

    def __init__(self, chosen: OptimizerOptions, rate: float) -> None:
        torch.manual_seed(3)
        narrow, wide = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(64, 80)
        layers = (narrow, nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), wide, nn.Tanh(), nn.Linear(80, 4))
        self.dtype = torch.bfloat16 if chosen.optimizer == "adamw_bf16" else torch.float32
        self.model = nn.Sequential(*layers).to(self.dtype)
        self.rate = rate
        self.optimizer = NamedOptimizer(chosen, dict(self.model.named_parameters()), rate)

    def loss(self) -> torch.Tensor:
        return ((self.model(INPUTS.to(self.dtype)).float() - TARGETS) ** 2).mean()

    def steps(self, start: int, end: int) -> None:
        for step in range(start, end):
            self.model.zero_grad()
            self.loss().backward()
            torch.manual_seed(step)  # as the engine does, for what optimizers draw
            self.optimizer.step(self.rate)

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def file(self) -> tuple[bytes, str]:
        """The state as a checkpoint keeps it."""
        tensors, values = self.optimizer.state()
        return save({name: tensor.contiguous() for name, tensor in tensors.items()}), json.dumps(values)


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_parameter_with_a_factor_learns_at_its_own_rate_and_resumes_bit_for_bit() -> None:
    """SGD moves a weight by rate x gradient; AdamW's step counter and moments are kept for each group."""

    def optimizer(name: str) -> tuple[dict[str, nn.Parameter], NamedOptimizer]:
        weights = {key: nn.Parameter(torch.ones(3)) for key in "abc"}
        return weights, NamedOptimizer(options(name), weights, 0.1, {"b": 0.5, "c": 2.0})

    def step(weights: dict[str, nn.Parameter], chosen: NamedOptimizer, rate: float) -> None:
        for weight in weights.values():
            weight.grad = torch.ones(3)
        chosen.step(rate)

    weights, sgd = optimizer("sgd")
    step(weights, sgd, 0.2)
    assert {key: round(1 - weight[0].item(), 6) for key, weight in weights.items()} == {"a": 0.2, "b": 0.1, "c": 0.4}
    assert sgd.effective(0.2) == 0.2
    whole, adamw = optimizer("adamw")
    step(whole, adamw, 0.2)
    tensors, values = adamw.state()
    resumed, again = optimizer("adamw")
    for key, weight in whole.items():
        resumed[key].data.copy_(weight)
    again.restore({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(values)))
    for each in ((whole, adamw), (resumed, again)):
        step(*each, 0.1)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_an_optimizer_that_estimates_one_rate_refuses_several() -> None:
    with pytest.raises(ConfigError, match=r"cannot train here .*with a learning rate for each layer \(lr_scale in --lora_layers\)"):
        check_optimizer(options("prodigy"), 1.0, CPU, scaled=True)
    check_optimizer(options("adamw"), 1e-3, CPU, scaled=True)


@pytest.mark.parametrize("name", (*NAMED, *BY_CLASS))
def test_it_resumes_from_tensors_and_json_bit_for_bit(name: str) -> None:
    chosen, rate = options(name), usual_rate(name)
    check_optimizer(chosen, rate, CPU)
    whole = Training(chosen, rate)
    whole.steps(0, 5)
    stopped = Training(chosen, rate)
    stopped.steps(0, 3)
    tensors, values = stopped.file()
    with stopped.optimizer.averaged():  # what a checkpoint and validation see, on the way
        shown = stopped.model.state_dict()
        resumed = Training(chosen, rate)
        resumed.model.load_state_dict(shown)
    resumed.optimizer.restore(load(tensors), json.loads(values))
    assert resumed.file() == (tensors, values)
    for training in (stopped, resumed):
        training.steps(3, 5)
        assert equal(training.weights(), whole.weights())
    assert not equal(whole.weights(), Training(chosen, rate).weights())


@pytest.mark.parametrize("name", (*NAMED, *BY_CLASS))
def test_it_lowers_the_loss(name: str) -> None:
    def after(rate: float) -> float:
        training = Training(options(name), rate)
        training.steps(0, 20)
        with training.optimizer.averaged():
            return training.loss().item()

    before = Training(options(name), 1.0).loss().item()
    rates = (1.0, 0.1) if name in FINDS_RATE or "DAdapt" in name else (1e-3, 1e-2, 1e-4, 1.0)  # some are made for others than Adam's
    assert any(after(rate) < before * 0.999 for rate in rates)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_optimizer:Muon", "rejects its settings"),  # of groups of matrices and others
        ("torch.optim:LBFGS", "cannot train here"),  # calls the loss again and again
        ("pytorch_optimizer:AdaHessian", "cannot train here"),  # the gradient of the gradient
        ("pytorch_optimizer:ASGD", "sets its learning rate itself"),
        ("pytorch_optimizer:AdaShift", "a checkpoint cannot store"),  # objects in its state
        ("pytorch_optimizer:StableSPAM", "a resumed run would differ"),  # counts outside of its state
        ("torch.nn:Linear", "is not a class of torch optimizers"),
        ("torch.optim:Nothing", "check module and class"),
        ("no_such_library.optim:Adam", "check module and class"),
    ],
)
def test_a_class_that_cannot_work_here_is_found_by_the_trial(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_optimizer(options(name), usual_rate(name), CPU)


# -- steps in the CPU's memory -----------------------------------------------------------------------------------------------


IN_PLACE = tuple(name for name in NAMED if not name.startswith("paged_"))


@pytest.mark.parametrize("name", IN_PLACE)
def test_steps_taken_with_copies_are_the_same_steps(name: str) -> None:
    rate = usual_rate(name)
    plain, offloaded = Training(options(name), rate), Training(options(name, optimizer_cpu_offload=True), rate)
    own = offloaded.optimizer.stepped
    assert all(own[name] is not parameter for name, parameter in offloaded.model.named_parameters())
    assert set(map(id, own.values())) >= {
        id(weights) for group in offloaded.optimizer.torch_optimizer.param_groups for weights in group["params"]
    }
    for training in (plain, offloaded):
        training.steps(0, 3)
    assert equal(offloaded.weights(), plain.weights())
    assert offloaded.file() == plain.file()  # so a checkpoint of either is one of both


@pytest.mark.parametrize("name", ["adamw", "schedulefree_adamw"])
def test_copies_are_put_back_with_the_weights(name: str) -> None:
    chosen = options(name, optimizer_cpu_offload=True)
    whole, stopped, resumed = (Training(chosen, 1e-2) for _ in range(3))
    whole.steps(0, 5)
    stopped.steps(0, 3)
    tensors, values = stopped.file()
    with stopped.optimizer.averaged():
        shown = {name: tensor.clone() for name, tensor in stopped.model.state_dict().items()}
    assert equal(stopped.weights(), list(shown.values())) is (name == "adamw")
    resumed.model.load_state_dict(shown)
    resumed.optimizer.restore(load(tensors), json.loads(values))
    for training in (stopped, resumed):
        training.steps(3, 5)
        assert equal(training.weights(), whole.weights())


# -- averages ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["schedulefree_adamw", "pytorch_optimizer:ScheduleFreeRAdam", "pytorch_optimizer:SPlus"])
def test_a_schedule_free_optimizer_shows_its_average_and_resumes_from_its_trained_weights(name: str) -> None:
    training = Training(options(name), 1e-2)
    assert training.optimizer.averages
    before = training.weights()
    with training.optimizer.averaged():
        assert equal(training.weights(), before)  # there is no average yet
    training.steps(0, 20)
    trained = training.weights()
    with pytest.raises(InterruptedError), training.optimizer.averaged():
        assert not equal(training.weights(), trained)
        raise InterruptedError
    assert equal(training.weights(), trained)


def test_schedule_free_shows_the_mean_of_its_iterates() -> None:
    """x = (1 - 1/(k+1)) x + z/(k+1) at a constant rate (Defazio et al., 2024, equation 4), so x is the mean of z."""
    weights = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = NamedOptimizer(options("schedulefree_adamw", adam_weight_decay=0.0), {"w": weights}, 0.1)
    iterates = []
    for step in range(6):
        weights.grad = torch.tensor([0.3, -0.1, 0.2]) * (step + 1)
        optimizer.step(0.1)
        iterates.append(optimizer.torch_optimizer.state[weights]["z"].clone())
    with optimizer.averaged():
        assert torch.allclose(weights, torch.stack(iterates).mean(0), atol=1e-6)


# -- learning rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prodigy", "dadaptation", "pytorch_optimizer:DAdaptAdan"])
def test_the_reported_learning_rate_is_the_estimate_times_the_factor(name: str) -> None:
    training = Training(options(name), 1.0)
    training.steps(0, 60)
    [group] = training.optimizer.torch_optimizer.param_groups
    assert training.optimizer.effective(0.5) == 0.5 * float(group["d"]) > 0
    assert training.optimizer.effective(0.5) != 0.5e-6  # it has moved from its first guess


def test_prodigy_uses_the_given_learning_rate() -> None:
    """Its first step is Adam's: d x lr x sign(gradient) with bias correction."""
    weights = nn.Parameter(torch.zeros(3))
    optimizer = NamedOptimizer(options("prodigy", prodigy_weight_decay=0.0, prodigy_epsilon=1e-30), {"w": weights}, 1.0)
    weights.grad = torch.tensor([0.5, -1.0, 2.0])
    reported = optimizer.effective(1.0)
    optimizer.step(1.0)
    assert torch.allclose(weights, -reported * torch.tensor([1.0, -1.0, 1.0]), rtol=1e-4)


def test_adafactors_relative_step_is_reported_instead_of_the_unused_rate() -> None:
    training = Training(options("adafactor", adafactor_relative_step=True), 1e-3)
    other = Training(options("adafactor", adafactor_relative_step=True), 7.0)
    training.steps(0, 3)
    other.steps(0, 3)
    assert equal(training.weights(), other.weights())
    assert training.optimizer.effective(1e-3) == 1e-2  # min(1e-2, 1/sqrt(t)), Shazeer and Stern (2018), section 8
    warmed = Training(options("adafactor", adafactor_relative_step=True, optimizer_args="warmup_init=true"), 1e-3)
    warmed.steps(0, 3)
    assert warmed.optimizer.effective(1e-3) == pytest.approx(4e-6)


# -- arguments --------------------------------------------------------------------------------------------------------------


def settings(chosen: OptimizerOptions) -> dict[str, Any]:
    return Training(chosen, usual_rate(chosen.optimizer)).optimizer.torch_optimizer.param_groups[0]


def test_options_and_arguments_reach_the_optimizer() -> None:
    assert settings(options("adamw", adam_beta1=0.5, adam_epsilon=1e-4))["betas"] == (0.5, 0.999)
    assert settings(options("adamw", optimizer_args="betas=0.8,0.95 amsgrad=true"))["amsgrad"] is True
    assert settings(options("lion"))["betas"] == (0.9, 0.99)  # its own
    assert settings(options("lion", adam_beta2=0.95, adam_weight_decay=0.3))["betas"] == (0.9, 0.95)
    assert settings(options("dadaptation", adam_weight_decay=0.3))["weight_decay"] == 0.3
    assert settings(options("prodigy", prodigy_learning_rate=2.0, prodigy_decouple=False))["d_coef"] == 2.0


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (options("lion", optimizer_args="weight_decy=1"), r"lion has no argument weight_decy \(did you mean weight_decay\?\)"),
        (options("lion", adam_epsilon=1e-6), "adam_epsilon 1e-06: lion has no such setting"),
        (options("adafactor", adam_epsilon=1e-6), "adafactor has no such setting"),  # it has a pair
        (options("adafactor", adam_beta1=0.5), "--adam_beta1: adafactor has no betas"),
        (options("came", adam_beta1=0.5), "--adam_beta1: came has 3 betas; set them with --optimizer_args"),
        (options("adamw", optimizer_args="betas=0.9"), "--optimizer=adamw rejects its settings with --optimizer_args='betas=0.9'"),
    ],
)
def test_arguments_that_an_optimizer_does_not_have_are_refused_at_the_start(chosen: OptimizerOptions, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_optimizer(chosen, 1e-3, CPU)


def test_tables_that_weights_share_are_kept_once_and_shared_again() -> None:
    """The 8-bit states of all weights are read by the same table of 256 values."""
    parameters = {name: nn.Parameter(torch.ones(80, 64)) for name in ("first", "second")}
    optimizer = NamedOptimizer(options("adamw8bit"), parameters, 1e-3)
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    tensors, values = optimizer.state()
    assert sum(name.endswith("qmap1") for name in tensors) == 1
    again = NamedOptimizer(options("adamw8bit"), optimizer.parameters, 1e-3)
    again.restore(tensors, values)
    first, second = (again.torch_optimizer.state[parameter] for parameter in again.parameters.values())
    assert first["qmap1"] is second["qmap1"] and torch.equal(first["qmap1"], tensors["first/qmap1"])
