"""Processes, device and precision of a run, and what all of its processes must agree on."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import parse_flag_from_env

from helpers.data.base.draws import seed_of
from helpers.errors import ConfigError, Interrupted, UserError
from helpers.ranks import PROCESSES_VARIABLE, announce_rank
from helpers.training.lock import lock_folder
from helpers.training.meeting import ANSWER_WITHIN, Alone, Meeting
from helpers.training.stopping import StopRequest

if TYPE_CHECKING:
    from helpers.config.options import RunOptions

# A collective may have to wait for a process that validates or saves for long; hung processes are the launcher's to end.
PATIENCE = timedelta(days=7)


@dataclass
class Runtime:
    """Where this process stands, and the few things it asks the others."""

    accelerator: Accelerator
    stop: StopRequest
    mixed_precision: str  # "no", "bf16" or "fp16", after what the device allows
    notes: list[str]  # what was adjusted to the machine, to be told aloud
    locks: list[IO[str]]  # held by the main process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed_precision, torch.float32)

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def seed(self, name: str, *address: int) -> None:
        """Set torch's global generators for what libraries draw from them next, by address instead of by history."""
        number = seed_of(name, *address)
        # Not torch.manual_seed: for every kind of device that is not in use it formats a stack trace, a millisecond a call.
        torch.default_generator.manual_seed(number)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(number)

    def wait_for_everyone(self) -> None:
        self.accelerator.wait_for_everyone()

    def sum(self, *numbers: float) -> list[float]:
        """Each number added up over all processes, in float64."""
        total = torch.tensor(numbers, dtype=torch.float64, device="cpu" if self.device.type != "mps" else None)
        if self.world_size == 1:
            return total.tolist()
        total = total.to(self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks, on all of them. Plain data only."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def meet(self) -> Meeting | Alone:
        """A meeting of all processes, which may take hours. To be asked for by all of them."""
        if self.world_size == 1:
            return Alone(self.stop)
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        port = 0  # the system chooses
        if self.is_main:
            store = torch.distributed.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=ANSWER_WITHIN)
            port = store.port
        port = self.gather(port)[0]
        if not self.is_main:
            store = torch.distributed.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=ANSWER_WITHIN)
        return Meeting(self.rank, self.world_size, store, self.stop)

    def clear_cache(self) -> None:
        """Give the accelerator's cached memory back to it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # All processes finish or are interrupted together, and then leave together: a process group taken down while others
        # still use it aborts them. After any other error the others may never come; the launcher ends them.
        if kind is None or issubclass(kind, Interrupted):
            self.wait_for_everyone()
            self.accelerator.end_training()


def start_runtime(options: RunOptions, folders: Mapping[str, Path], chosen: Collection[str], stop: StopRequest) -> Runtime:
    """Join the other processes, settle the precision for the device, and lock the folders that are this run's alone.

    `folders` are named by their options; `chosen` are the options the user set, as opposed to defaults. Raises UserError when a
    folder is in use or cannot be written to, or when the precision is impossible here.
    """
    configure_logging()
    # Unless it is told that this is a CPU, accelerate makes each process of a CPU group believe that it is alone.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    wanted = int(os.environ.get(PROCESSES_VARIABLE) or os.environ.get("WORLD_SIZE") or state.num_processes)
    if state.num_processes != wanted:
        # Two runs that each believe they are alone would write over each other.
        raise RuntimeError(f"{wanted} processes were asked for, but the launcher made a group of {state.num_processes}.")
    announce_rank(os.environ)
    mixed_precision, note = settle_precision(options.mixed_precision, "mixed_precision" in chosen, state.device)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.allow_tf32
    runtime = Runtime(accelerator, stop, mixed_precision, [note] if note else [], [])
    refusals = runtime.gather(_take_locks(runtime, folders))
    if refusal := next(filter(None, refusals), None):
        raise UserError(refusal)
    return runtime


def _take_locks(runtime: Runtime, folders: Mapping[str, Path]) -> str | None:
    """The main process locks for all; the refusal goes to everybody, so that no process waits for one that has left."""
    if not runtime.is_main:
        return None
    for option, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            runtime.locks.append(lock_folder(folder, option))
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{option}={folder} cannot be written to: {error.strerror}."
    return None


def settle_precision(asked: str, chosen: bool, device: torch.device) -> tuple[str, str | None]:
    """The precision to train in on this device, and what to tell the user about it. Raises ConfigError for fp16 on a CPU."""
    if device.type != "cpu" or asked == "no":
        return asked, None
    if asked == "fp16":
        raise ConfigError("--mixed_precision=fp16 is not possible on a CPU: use no, or bf16.")
    if chosen:
        return asked, None
    return "no", "mixed_precision settles to no: this machine trains on its CPU, where float32 is the fast precision"


def configure_logging() -> None:
    """Log levels from SIMPLETUNER_LOG_LEVEL; libraries speak from warnings up, less two notes that concern nobody here."""
    level = os.environ.get("SIMPLETUNER_LOG_LEVEL", "INFO").upper()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("helpers").setLevel(level)
    # transformers says on every import that it does image work without torchvision, and so do we.
    logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "torchvision" not in record.getMessage())
    # bitsandbytes looks for a product by 4-bit weights that is made for some CPUs; here weights are made full before they multiply.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.getMessage())


@contextmanager
def undisturbed(*modules: torch.nn.Module) -> Iterator[None]:
    """Whatever happens inside, training goes on bit for bit as if it had not: modes and random states are put back."""
    modes = [(module, module.training) for parent in modules for module in parent.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            for module in modules:
                module.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)
