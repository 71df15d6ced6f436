"""The training step against closed forms. The expected side uses numbers and formulas written here, never ours."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from helpers.choices import known_axes
from helpers.config.options import ObjectiveOptions
from helpers.data.base.draws import StepDraws
from helpers.errors import ConfigError
from helpers.objectives.diffusion import Diffusion
from helpers.objectives.timesteps import trained_timesteps
from helpers.objectives.weights import loss_weight

OPTIONS = known_axes().options

SDXL_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
}


def diffusion(**options: object) -> Diffusion:
    return Diffusion(dataclasses.replace(ObjectiveOptions(), **options), SDXL_SCHEDULE)


def draws(samples: int = 4, step: int = 7) -> StepDraws:
    return StepDraws(seed=1, step=step, places=tuple(range(samples)), step_samples=samples)


def alphas_cumprod() -> torch.Tensor:
    """The SD schedule, in float64: betas linear in their square root."""
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


LATENTS = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def test_schedule_is_the_one_of_stable_diffusion() -> None:
    assert torch.allclose(diffusion().alphas_cumprod.double(), alphas_cumprod(), rtol=1e-4)
    assert diffusion().alphas_cumprod[0].item() == pytest.approx(0.99915, abs=1e-7)


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_exact_answer_has_no_loss_and_recovers_the_latents(prediction_type: str, loss: str) -> None:
    objective = diffusion(prediction_type=prediction_type, loss=loss)
    corrupted = objective.corrupt(LATENTS, draws())
    assert objective.loss(corrupted.target, corrupted).tolist() == [0.0] * 4
    kept = alphas_cumprod()[corrupted.timesteps].view(-1, 1, 1, 1)
    a, s = kept.sqrt(), (1 - kept).sqrt()
    noisy, target = corrupted.noisy.double(), corrupted.target.double()
    recovered = {"epsilon": (noisy - s * target) / a, "v_prediction": a * noisy - s * target, "sample": target}
    assert torch.allclose(recovered[prediction_type], LATENTS.double(), atol=2e-3)


def test_losses_of_the_parametrisations_differ_by_the_signal_to_noise_ratio() -> None:
    """eps-MSE = S x0-MSE and v-MSE = (S + 1) x0-MSE: at t = 400 S is 0.737568."""
    kept = alphas_cumprod()[400]
    a, s = kept.sqrt(), (1 - kept).sqrt()
    generator = torch.Generator().manual_seed(3)
    x0, noise, error = (torch.randn(64, dtype=torch.float64, generator=generator) for _ in range(3))
    noisy = a * x0 + s * noise
    wrong_x0 = x0 + 0.1 * error
    wrong_noise = (noisy - a * wrong_x0) / s
    x0_mse = ((wrong_x0 - x0) ** 2).mean()
    noise_mse = ((wrong_noise - noise) ** 2).mean()
    v_mse = (((a * wrong_noise - s * wrong_x0) - (a * noise - s * x0)) ** 2).mean()
    assert (noise_mse / x0_mse).item() == pytest.approx(0.737568, abs=1e-6)
    assert (v_mse / x0_mse).item() == pytest.approx(1.737568, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        ("epsilon", {0: 0.004254, 100: 0.591445, 250: 1.0, 999: 1.0}),
        ("v_prediction", {0: 0.004250, 100: 0.528884, 250: 0.673792, 500: 0.276332, 999: 0.004660}),
        ("sample", {0: 5.0, 100: 5.0, 400: 0.737568, 999: 0.004682}),
    ],
)
def test_min_snr_weights_are_those_of_the_paper(prediction_type: str, expected: dict[int, float]) -> None:
    weights = loss_weight("min_snr", alphas_cumprod(), 5.0, prediction_type)
    for timestep, weight in expected.items():
        assert weights[timestep].item() == pytest.approx(weight, abs=5e-6), timestep


PREDICTIONS = {"sample": lambda snr: 1.0, "epsilon": lambda snr: 1 / snr, "v_prediction": lambda snr: 1 / (snr + 1)}


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("soft_min_snr", {0.1: 0.0980, 1.0: 0.8333, 5.0: 2.5, 50.0: 4.5455}),  # S gamma / (S + gamma)
        ("debiased", {0.04: 0.2, 1.0: 1.0, 25.0: 5.0}),  # sqrt(S): of the noise 1 / sqrt(S)
    ],
)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_other_weights_are_those_of_their_papers(weighting: str, expected: dict[float, float], prediction_type: str) -> None:
    """Whatever is predicted, it is one weight of the picture's error: the noise's is S times as large, the velocity's S + 1 times."""
    for snr, weight in expected.items():
        kept = torch.tensor(snr / (1 + snr), dtype=torch.float64)
        ours = loss_weight(weighting, kept, 5.0, prediction_type).item()
        assert ours == pytest.approx(weight * PREDICTIONS[prediction_type](snr), rel=1e-3)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_soft_min_snr_is_the_weight_of_the_preconditioned_loss(sigma_data: float) -> None:
    """(s d)^2 / (s^2 + d^2)^2 of the answer that is scaled by s d / sqrt(s^2 + d^2), with s = sqrt((1 - abar) / abar)."""
    kept = alphas_cumprod()
    sigma = ((1 - kept) / kept).sqrt()
    of_answer = (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2) ** 2
    scale = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    assert torch.allclose(loss_weight("soft_min_snr", kept, 1 / sigma_data**2, "sample"), of_answer / scale**2)


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "debiased"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_weights_are_numbers_where_only_noise_is_left(weighting: str, prediction_type: str) -> None:
    objective = diffusion(prediction_type=prediction_type, rescale_betas_zero_snr=True, loss_weighting=weighting, snr_gamma=5.0)
    weights = loss_weight(weighting, objective.alphas_cumprod.double(), 5.0, prediction_type)
    assert weights[-1] == 0 and (weights[:-1] > 0).all() and weights.isfinite().all()


def test_debiased_weights_without_a_limit_are_refused() -> None:
    """1 / sqrt(S) of a cosine schedule, which ends in a signal of 2.4e-9, would be 20,000 at the end."""
    cosine = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
    options = ObjectiveOptions(loss_weighting="debiased")
    with pytest.raises(ConfigError, match="a weight of 20,"):
        Diffusion(options, cosine)
    Diffusion(dataclasses.replace(options, prediction_type="v_prediction"), cosine)
    Diffusion(dataclasses.replace(options, refiner_training=True), cosine)  # trains no timestep near the end
    assert loss_weight("debiased", alphas_cumprod(), None, "epsilon").max().item() == pytest.approx(14.615, abs=1e-3)


def test_huber_is_square_below_delta_and_linear_above() -> None:
    objective = diffusion(loss="huber", huber_delta=0.5)
    corrupted = objective.corrupt(LATENTS, draws())
    for error, distance in ((0.1, 0.01), (-0.1, 0.01), (0.5, 0.25), (2.0, 0.5 * (2 * 2.0 - 0.5)), (-10.0, 0.5 * (2 * 10.0 - 0.5))):
        losses = objective.loss(corrupted.target + error, corrupted)
        assert losses.tolist() == pytest.approx([distance] * 4, rel=1e-4)
    answer = corrupted.target + 0.5 * torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(5))
    expected = 2 * torch.nn.functional.huber_loss(answer, corrupted.target, reduction="none", delta=0.5).mean(dim=(1, 2, 3))
    assert torch.allclose(objective.loss(answer, corrupted), expected)


def test_min_snr_weighs_each_sample_of_the_loss() -> None:
    plain, weighted = diffusion(), diffusion(loss_weighting="min_snr", snr_gamma=5.0)
    corrupted, corrupted_weighted = plain.corrupt(LATENTS, draws()), weighted.corrupt(LATENTS, draws())
    snr = alphas_cumprod()[corrupted.timesteps] / (1 - alphas_cumprod()[corrupted.timesteps])
    ratio = weighted.loss(LATENTS, corrupted_weighted).double() / plain.loss(LATENTS, corrupted).double()
    assert torch.allclose(ratio, snr.clamp(max=5) / snr, rtol=1e-3)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_start() -> None:
    objective = diffusion(prediction_type="v_prediction", rescale_betas_zero_snr=True, loss_weighting="min_snr", snr_gamma=5.0)
    assert objective.alphas_cumprod[-1].item() == 0.0
    assert objective.alphas_cumprod[0].item() == pytest.approx(0.99915, abs=1e-6)
    assert loss_weight("min_snr", objective.alphas_cumprod.double(), 5.0, "v_prediction")[-1].item() == 0.0


def test_zero_terminal_snr_with_epsilon_is_refused() -> None:
    with pytest.raises(ConfigError, match="--rescale_betas_zero_snr cannot be used with a model that predicts the noise"):
        diffusion(rescale_betas_zero_snr=True)


def test_the_models_own_schedule_holds_unless_the_user_says_otherwise() -> None:
    ends_in_noise = {**SDXL_SCHEDULE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert Diffusion(ObjectiveOptions(), ends_in_noise).alphas_cumprod[-1].item() == 0.0
    usual = dataclasses.replace(ObjectiveOptions(), prediction_type="epsilon", rescale_betas_zero_snr=False)
    objective = Diffusion(usual, ends_in_noise)
    assert objective.alphas_cumprod[-1].item() == pytest.approx(0.0047, abs=1e-4)
    assert objective.prediction_type == objective.scheduler_config["prediction_type"] == "epsilon"


def test_offset_noise_has_the_variance_of_its_formula() -> None:
    """The mean of a channel has variance 1/HW + a^2 = 0.013906 for 16 x 16 and a = 0.1; each sample has an offset of its own."""
    objective = diffusion(offset_noise=True, noise_offset=0.1, noise_offset_probability=1.0)
    many = torch.zeros(500, 4, 16, 16)
    noise = objective.corrupt(many, draws(500)).target
    assert noise.mean(dim=(2, 3)).var().item() == pytest.approx(1 / 256 + 0.01, rel=0.1)
    assert noise.var().item() == pytest.approx(1.01, rel=0.02)


def test_offset_noise_is_given_in_its_share_of_the_steps() -> None:
    with_offset, without = diffusion(offset_noise=True, noise_offset=1.0, noise_offset_probability=0.25), diffusion()
    given = sum(
        not torch.equal(with_offset.corrupt(LATENTS[:1], draws(1, step)).noisy, without.corrupt(LATENTS[:1], draws(1, step)).noisy)
        for step in range(400)
    )
    assert abs(given - 100) < 3 * math.sqrt(400 * 0.25 * 0.75)


def test_input_perturbation_leaves_the_target_alone() -> None:
    plain, perturbed = diffusion().corrupt(LATENTS, draws()), diffusion(input_perturbation=0.1).corrupt(LATENTS, draws())
    assert torch.equal(plain.target, perturbed.target)
    assert not torch.equal(plain.noisy, perturbed.noisy)


def test_timesteps_of_a_step_lie_in_different_strata() -> None:
    timesteps = diffusion().corrupt(torch.zeros(8, 4, 2, 2), draws(8)).timesteps
    assert sorted((timesteps // 125).tolist()) == list(range(8))


def test_timesteps_are_uniform_over_many_steps_and_no_place_is_favoured() -> None:
    objective = diffusion()
    chosen = torch.stack([objective.corrupt(torch.zeros(4, 1, 1, 1), draws(4, step)).timesteps for step in range(1500)]).float()
    assert chosen.min() >= 0
    assert chosen.max() <= 999
    for place in range(4):
        assert chosen[:, place].mean().item() == pytest.approx(499.5, abs=3 * 288.7 / math.sqrt(1500))


def test_a_sample_gets_the_same_noise_and_timestep_wherever_it_is_computed() -> None:
    """The step's samples together, or one by one as on other processes: the same numbers."""
    objective = diffusion(offset_noise=True, noise_offset_probability=0.5)
    together = objective.corrupt(LATENTS, draws(4))
    for place in range(4):
        alone = objective.corrupt(LATENTS[place : place + 1], StepDraws(1, 7, (place,), 4))
        assert torch.equal(alone.noisy[0], together.noisy[place])
        assert alone.timesteps[0] == together.timesteps[place]


# -- the part of the schedule that is trained -------------------------------------------------------------------------------


def judged(**settings: object) -> list[str]:
    return list(Diffusion.facts.judge({**{name: item.default for name, item in OPTIONS.items()}, **settings}))


@pytest.mark.parametrize(("strength", "border"), [(0.2, 200), (0.35, 350), (0.001, 1), (0.999, 999)])
def test_two_experts_share_the_schedule_without_overlap_or_gap(strength: float, border: int) -> None:
    experts = [
        trained_timesteps(
            ObjectiveOptions(refiner_training=True, refiner_training_strength=strength, refiner_training_invert_schedule=inverted), 1000
        )
        for inverted in (False, True)
    ]
    assert experts == [range(border), range(border, 1000)]


@pytest.mark.parametrize("samples", [1, 2, 8])
@pytest.mark.parametrize(("inverted", "low", "high"), [(False, 0, 199), (True, 200, 999)])
def test_an_expert_sees_its_own_timesteps_only_and_all_of_them(samples: int, inverted: bool, low: int, high: int) -> None:
    """At any number of samples in a step, and one from each of as many equal strata."""
    objective = diffusion(refiner_training=True, refiner_training_invert_schedule=inverted)
    seen = set()
    for step in range(2000 // samples):
        timesteps = objective.corrupt(torch.zeros(samples, 1, 1, 1), draws(samples, step)).timesteps
        seen.update(timesteps.tolist())
        strata = (timesteps - low) * samples // (high - low + 1)
        assert sorted(strata.tolist()) == list(range(samples))
    assert low <= min(seen) <= low + 4
    assert high - 4 <= max(seen) <= high


def test_the_whole_schedule_is_trained_by_default() -> None:
    assert diffusion().distribution.interval == range(1000)


def test_a_part_without_timesteps_is_refused() -> None:
    with pytest.raises(ConfigError, match="refiner_training_strength=0.0001 leaves no timestep"):
        diffusion(refiner_training=True, refiner_training_strength=0.0001)
    [problem] = judged(refiner_training=True, refiner_training_strength=1.0, refiner_training_invert_schedule=True)
    assert "leaves no timestep to train" in problem


def test_settings_of_a_part_that_is_not_trained_are_refused() -> None:
    assert judged(refiner_training=True, refiner_training_strength=0.3, refiner_training_invert_schedule=True) == []
    assert judged(refiner_training_strength=0.3) == ["--refiner_training_strength needs --refiner_training."]
    assert judged(refiner_training_invert_schedule=True) == ["--refiner_training_invert_schedule needs --refiner_training."]


# -- timesteps that are drawn more often -------------------------------------------------------------------------------------


def drawn_timesteps(objective: Diffusion, samples: int, steps: int) -> torch.Tensor:
    """(steps, samples)"""
    return torch.stack([objective.corrupt(torch.zeros(samples, 1, 1, 1), draws(samples, step)).timesteps for step in range(steps)])


BIASES = {
    "earlier": ({"timestep_bias_strategy": "earlier"}, range(0, 250)),
    "later": ({"timestep_bias_strategy": "later", "timestep_bias_portion": 0.1}, range(900, 1000)),
    "range": ({"timestep_bias_strategy": "range", "timestep_bias_begin": 300, "timestep_bias_end": 500}, range(300, 500)),
}


@pytest.mark.parametrize("samples", [1, 2, 8])
@pytest.mark.parametrize("strategy", BIASES)
def test_a_part_is_drawn_as_much_more_often_as_asked(strategy: str, samples: int) -> None:
    options, part = BIASES[strategy]
    chosen = drawn_timesteps(diffusion(timestep_bias_multiplier=3.0, **options), samples, 4000 // samples).flatten()
    inside = (chosen >= part.start) & (chosen < part.stop)
    expected = 3 * len(part) / (3 * len(part) + 1000 - len(part))
    assert inside.double().mean().item() == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / 4000))
    assert chosen[inside].double().mean().item() == pytest.approx((part.start + part.stop - 1) / 2, abs=len(part) / 20)
    assert chosen.min() >= 0 and chosen.max() <= 999 and (~inside).any()


@pytest.mark.parametrize("strategy", BIASES)
def test_a_step_has_one_timestep_of_each_equally_likely_part_of_a_bias(strategy: str) -> None:
    """Strata follow the cumulative of the biased density, so that every step has the part's share to the nearest sample."""
    options, part = BIASES[strategy]
    share = 3 * len(part) / (3 * len(part) + 1000 - len(part))
    chosen = drawn_timesteps(diffusion(timestep_bias_multiplier=3.0, **options), 16, 50)
    counts = ((chosen >= part.start) & (chosen < part.stop)).sum(dim=1)
    assert (counts - 16 * share).abs().max() < 2
    assert len({tuple(row.argsort().tolist()) for row in chosen}) > 45  # dealt anew each step


def test_a_bias_is_of_the_timesteps_that_are_trained() -> None:
    """Of the expert for 200 to 999 the later half is 600 to 999, and no timestep of the other expert is drawn."""
    half = {"timestep_bias_strategy": "later", "timestep_bias_portion": 0.5, "timestep_bias_multiplier": 9.0}
    chosen = drawn_timesteps(diffusion(refiner_training=True, refiner_training_invert_schedule=True, **half), 10, 100)
    assert chosen.min() >= 200
    assert (chosen >= 600).sum(dim=1).tolist() == [9] * 100


def test_without_strata_every_timestep_is_drawn_by_itself() -> None:
    objective = diffusion(disable_segmented_timestep_sampling=True, refiner_training=True)
    chosen = drawn_timesteps(objective, 4, 1000)
    assert chosen.min() >= 0 and 195 <= chosen.max() <= 199
    in_order = (chosen // 50).sort(dim=1).values
    together = (in_order == torch.arange(4)).all(dim=1).double().mean().item()
    assert together == pytest.approx(24 / 256, abs=0.03)  # 4! / 4^4, where strata make it always
    alone = objective.corrupt(torch.zeros(1, 1, 1, 1), StepDraws(1, 5, (2,), 4)).timesteps
    assert alone[0] == chosen[5, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_bias_strategy": "range", "timestep_bias_end": 1001}, "timestep_bias_end=1001 is beyond"),
        ({"timestep_bias_strategy": "range"}, "selects all of the 1000 trained timesteps"),
        ({"timestep_bias_strategy": "range", "timestep_bias_begin": 500, "refiner_training": True}, "selects none of the 200"),
        ({"timestep_bias_strategy": "earlier", "timestep_bias_portion": 0.0001}, "selects none"),
    ],
)
def test_a_bias_that_prefers_nothing_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        diffusion(timestep_bias_multiplier=2.0, **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timestep_bias_strategy": "later"}, "needs a --timestep_bias_multiplier"),
        ({"timestep_bias_strategy": "later", "timestep_bias_portion": 0.0, "timestep_bias_multiplier": 2.0}, "nothing of"),
        ({"timestep_bias_strategy": "earlier", "timestep_bias_portion": 1.0, "timestep_bias_multiplier": 2.0}, "all of"),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_begin": 9, "timestep_bias_end": 9, "timestep_bias_multiplier": 2.0},
            "is not below",
        ),
        ({"prediction_type": "sample", "validation_noise_scheduler": "euler-a"}, "cannot sample"),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "needs --prediction_type=v_prediction"),
        ({"rescale_betas_zero_snr": True, "offset_noise": True}, "cannot be used with zero terminal SNR"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(settings: dict[str, object], message: str) -> None:
    [problem] = judged(**settings)
    assert message in problem


def test_a_model_that_ends_in_noise_refuses_offset_noise() -> None:
    with pytest.raises(ConfigError, match="--offset_noise cannot be used with zero terminal SNR"):
        Diffusion(ObjectiveOptions(offset_noise=True), {**SDXL_SCHEDULE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True})


def test_every_sampler_that_is_named_samples_what_is_predicted() -> None:
    """From pure noise to one picture: a network that always knows it leads there, whatever it answers with."""
    import diffusers

    picture = LATENTS[:1]
    for prediction in ("epsilon", "v_prediction", "sample"):
        objective = diffusion(prediction_type=prediction)
        assert ("euler-a" in objective.samplers) == (prediction != "sample")
        for name, kind in objective.samplers.items():
            scheduler = getattr(diffusers, kind).from_config({**objective.scheduler_config, "clip_sample": False})
            scheduler.set_timesteps(20)
            x = torch.randn(picture.shape, generator=torch.Generator().manual_seed(2)) * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                seen = scheduler.scale_model_input(x, t)
                kept = alphas_cumprod()[int(t)].float()
                noise = (seen - kept.sqrt() * picture) / (1 - kept).sqrt()
                velocity = kept.sqrt() * noise - (1 - kept).sqrt() * picture
                answer = {"epsilon": noise, "v_prediction": velocity, "sample": picture}[prediction]
                x = scheduler.step(answer, t, x).prev_sample
            assert (x - picture).abs().max() < 0.15, (prediction, name)
