"""Zero terminal SNR is the default for v-prediction of Stable Diffusion 2, as in the June 2024 release."""

from __future__ import annotations

import dataclasses

import pytest

from helpers.config.options import ObjectiveOptions
from helpers.families.sd import StableDiffusion
from helpers.families.sdxl import SDXL
from helpers.objectives.diffusion import Diffusion
from helpers.setup.model import with_zero_snr

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VELOCITY = {**SCHEDULE, "prediction_type": "v_prediction"}
NOISE = {**SCHEDULE, "prediction_type": "epsilon"}


def last_signal(options: ObjectiveOptions, schedule: dict[str, object]) -> float:
    """The signal that the last timestep has: 0 with zero terminal SNR."""
    return Diffusion(with_zero_snr(options, StableDiffusion.facts, schedule), schedule).alphas_cumprod[-1].item()


def test_it_is_on_for_v_prediction_and_off_by_name() -> None:
    assert last_signal(ObjectiveOptions(), VELOCITY) == 0
    assert last_signal(ObjectiveOptions(prediction_type="v_prediction"), NOISE) == 0
    assert last_signal(ObjectiveOptions(rescale_betas_zero_snr=False), VELOCITY) > 0.004


@pytest.mark.parametrize("change", [{"offset_noise": True}, {"prediction_type": "epsilon"}], ids=str)
def test_it_stays_off_where_it_cannot_be(change: dict[str, object]) -> None:
    assert last_signal(dataclasses.replace(ObjectiveOptions(), **change), VELOCITY) > 0.004


def test_other_families_keep_the_schedule_of_their_base_model() -> None:
    assert with_zero_snr(ObjectiveOptions(), SDXL.facts, VELOCITY) == ObjectiveOptions()
