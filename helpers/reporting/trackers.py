"""TensorBoard, Weights & Biases and Comet, through accelerate's trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.libraries import install
from helpers.config.rules import TRACKERS
from helpers.errors import ConfigError
from helpers.protocols import Reporter, StepResult, ValidationImage

if TYPE_CHECKING:
    from helpers.config.options import ReportingOptions

_LOGGED = ("loss", "learning_rate", "text_encoder_lr", "grad_norm", "epoch", "seconds", "data_seconds")


class Trackers(Reporter):
    """Sends metrics and validation images to the chosen trackers. By default, nothing leaves the machine.

    The run resumes after step `resumed_at`. TensorBoard discards what was logged for later steps; the other trackers keep it.
    """

    def __init__(self, options: ReportingOptions, output_dir: Path, run_ids: dict[str, str], resumed_at: int) -> None:
        self._trackers = [_create(name, options, output_dir, run_ids, resumed_at) for name in options.report_to if name != "none"]

    def started(self, settings: Mapping[str, Any], total_steps: int) -> None:
        for tracker in self._trackers:
            tracker.store_init_configuration(
                {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in settings.items()}
            )

    def stepped(self, result: StepResult) -> None:
        for tracker in self._trackers:
            metrics = {f"train/{name}": value for name in _LOGGED if (value := getattr(result, name)) is not None}
            tracker.log(metrics, step=result.step)

    def validated(self, step: int, images: Sequence[ValidationImage]) -> None:
        import numpy as np
        from PIL import Image

        for tracker in self._trackers:
            if not hasattr(tracker, "log_images"):
                continue
            for image in images:
                with Image.open(image.path) as opened:
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}  # NHWC is the others' default
                    tracker.log_images({f"validation/{image.name}": np.asarray(opened)[None]}, step=step, **layout)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def _create(name: str, options: ReportingOptions, output_dir: Path, run_ids: dict[str, str], resumed_at: int) -> Any:
    from accelerate import tracking

    try:
        if name == "tensorboard":
            folder = output_dir / options.logging_dir
            folder.mkdir(parents=True, exist_ok=True)
            tracker: Any = tracking.TensorBoardTracker(options.tracker_run_name, folder, purge_step=resumed_at + 1)
        elif name == "wandb":
            arguments = {"id": run_ids["wandb"], "resume": "allow"} if "wandb" in run_ids else {}
            tracker = tracking.WandBTracker(options.tracker_project_name, name=options.tracker_run_name, dir=str(output_dir), **arguments)
        else:
            arguments = {"experiment_key": run_ids["comet"]} if "comet" in run_ids else {}
            tracker = tracking.CometMLTracker(options.tracker_project_name, **arguments)
    except ImportError as error:
        raise ConfigError(f"--report_to={name} needs a package that cannot be imported ({error}): {install(TRACKERS[name][1])}.") from error
    if hasattr(tracker, "start"):
        tracker.start()
    if name == "wandb":
        run_ids["wandb"] = tracker.run.id
    elif name == "comet":
        run_ids["comet"] = tracker.tracker.get_key()
    return tracker
