"""Starts runs for tests, on a miniature and a folder of images: in a process, on several, through a wrapper, or in this process."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, ImageDraw

from tests.warm import Program

if TYPE_CHECKING:
    from helpers.config.config import Config

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = ROOT / "demo" / "model"  # a true SDXL whose images mean something; no run may change it
SIZES = [(64, 64), (96, 64), (64, 96), (160, 80)]

# Everything random is switched on.
USUAL: Mapping[str, object] = {
    "model_type": "lora",
    "max_train_steps": 6,
    "num_train_epochs": 0,
    "checkpointing_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler": "constant",
    "train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "caption_dropout_probability": 0.3,
    "lora_dropout": 0.2,
    "validation_prompt": "a red circle",
    "validation_disable_unconditional": True,
    "validation_steps": 4,
    "validation_num_inference_steps": 2,
    "record_samples": True,
    "use_ema": True,
    "report_to": "none",
}
NO_VALIDATION: Mapping[str, object] = {"validation_prompt": None}


def draw_images(folder: Path, count: int = 14) -> Path:
    """Discs on plain grounds in four shapes, captioned by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        image = Image.new("RGB", (width, height), (number * 17 % 256, number * 53 % 256, number * 101 % 256))
        ImageDraw.Draw(image).ellipse((8, 8, 48, 48), fill=(number * 71 % 256, 255 - number * 13 % 256, number * 29 % 256))
        image.save(folder / f"a_red_circle_{number:02}.png")
    return folder


@dataclass(frozen=True)
class Ended:
    """A run that has ended: its exit code, what it printed, and its OUTPUT_DIR."""

    code: int
    printed: str
    folder: Path

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows("metrics.jsonl")]


def same_weights(one: Ended, other: Ended) -> bool:
    """Whether two runs ended in the same bytes: weights, average, optimizer state."""
    last = max(one.folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    names = [path.relative_to(one.folder) for path in last.glob("*.safetensors")]
    assert len(names) >= 3
    return all((one.folder / name).read_bytes() == (other.folder / name).read_bytes() for name in names)


@dataclass
class Trainer:
    """Starts `train.py` with the settings USUAL; `settings` win over those, and a call's own over all."""

    images: Path
    folder: Path
    model: Path = DEMO_MODEL
    settings: Mapping[str, object] = field(default_factory=dict)

    def dataloader(self, **keys: object) -> Path:
        entry = {
            "id": "images",
            "type": "local",
            "instance_data_dir": str(self.images),
            "resolution": 64,
            "resolution_type": "pixel",
            "caption_strategy": "filename",
            "crop": True,
            "crop_style": "random",
            "crop_aspect": "preserve",
            "flip": True,
            **keys,
        }
        path = self.folder / "dataloader.json"
        path.write_text(json.dumps([entry]), encoding="utf-8")
        return path

    def flags(self, output: Path, **settings: Any) -> list[str]:
        values: dict[str, object] = {
            "pretrained_model_name_or_path": self.model,
            "data_backend_config": self.folder / "dataloader.json",
            "output_dir": output,
            **USUAL,
            **self.settings,
            **settings,
        }
        return [f"--{name}={value}" for name, value in values.items() if value is not None]

    def start(
        self, output: str = "out", *, variables: Mapping[str, str] | None = None, through: Sequence[str] = (), **settings: Any
    ) -> Program:
        """Start a run that writes to the folder `output`, in a process that is forked (see warm.py).

        `through` is a script with arguments that does something and then becomes the program whose path and arguments follow.
        """
        return Program([*through, str(ROOT / "train.py"), *self._flags_of_run(output, settings)], self.folder, variables)

    def start_plain(
        self,
        output: str = "out",
        *,
        wrapper: str = "",
        python: str = sys.executable,
        variables: Mapping[str, str] | None = None,
        command: Sequence[str] = (sys.executable,),
        **settings: Any,
    ) -> subprocess.Popen[str]:
        """The same in a process that begins from nothing: by a wrapper, such as train_sdxl.sh, as users do, or by a command.

        `python` is what the wrapper calls: warm_python() is quicker where no import matters.
        """
        program = ["bash", str(ROOT / wrapper)] if wrapper else [*command, str(ROOT / "train.py")]
        flags = self._flags_of_run(output, settings)
        settings_file = self.folder / "empty-env.sh"
        settings_file.touch()
        environment = {**os.environ, "ENV_FILE": str(settings_file), "SIMPLETUNER_PYTHON": python, **(variables or {})}
        return subprocess.Popen(
            [*program, *flags], cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, output: str = "out", **settings: Any) -> Ended:
        """A run to its end."""
        return self._ended(self.start(output, **settings), output)

    def run_plain(self, output: str = "out", **settings: Any) -> Ended:
        return self._ended(self.start_plain(output, **settings), output)

    def finish(self, output: str = "out", **settings: Any) -> Ended:
        """Run, and insist that it went well."""
        return succeeded(self.run(output, **settings))

    def finish_on(self, processes: int, output: str = "out", **settings: Any) -> Ended:
        """The same on several processes."""
        ranks = [self._ended(program, output) for program in self.start_on(processes, output, **settings)]
        return succeeded(Ended(max(abs(rank.code) for rank in ranks), "".join(rank.printed for rank in ranks), ranks[0].folder))

    def start_on(self, processes: int, output: str = "out", **settings: Any) -> list[Program]:
        """Start a run on several processes, which find one another as torchrun has them do."""
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
        variables = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        return [self.start(output, variables=own, **settings) for own in variables]

    def _flags_of_run(self, output: str, settings: Mapping[str, object]) -> list[str]:
        if not (self.folder / "dataloader.json").exists():
            self.dataloader()
        return self.flags(self.folder / output, **settings)

    def _ended(self, process: Program | subprocess.Popen[str], output: str) -> Ended:
        printed, _ = process.communicate(timeout=300)
        return Ended(process.wait(), printed, self.folder / output)


def succeeded(ended: Ended) -> Ended:
    assert ended.code == 0, ended.printed
    return ended


def run_here(config: Config) -> Ended:
    """A run in this process, a quarter of a second: for many runs that differ in a setting. What it raises is raised here."""
    import train
    from helpers.reporting import Reporters
    from helpers.training.stopping import StopRequest
    from tests.data.toys import Story

    story = Story()
    with alone_in_this_process():
        try:
            train.train(config, StopRequest(), Reporters(story))
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the locks on the run's folders
            raise
    return Ended(0, "\n".join(story.lines), config.run.output_dir)


@contextmanager
def alone_in_this_process() -> Iterator[None]:
    """A run sets what belongs to the whole process: accelerate's state, TF32, the garbage collector. It is put back."""
    import torch
    from accelerate.state import AcceleratorState

    from helpers.training.memory import choose_attention

    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Half of the time of such a run, and no option changes it.
            patch.setattr("helpers.reporting.loss_curve.write_loss_curve", lambda folder: None)
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        choose_attention("auto")
        gc.unfreeze()
        gc.enable()


def wait_for(condition: Callable[[], object], process: Program | subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until a condition holds, while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def lines(path: Path) -> int:
    """Lines of a file; 0 while there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def without_loss(ended: Ended) -> list[dict[str, object]]:
    """What a run recorded of its samples, all but the losses."""
    return [{key: value for key, value in row.items() if key != "loss"} for row in ended.rows("samples.jsonl")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
