"""Processes, device and precision of a run, and the operations that involve all of its processes."""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env

from helpers.config.rules import VALIDATION_FOLDER
from helpers.data.base.draws import seed_of
from helpers.errors import ConfigError, Interrupted, StorageError, UserError
from helpers.library_settings import in_effect
from helpers.ranks import FOLDER_VARIABLE, PROCESSES_VARIABLE, announce_rank
from helpers.storage.atomic import remove_leftovers, remove_leftovers_below
from helpers.storage.full_disk import wait_for_space
from helpers.training.lock import lock_folder
from helpers.training.meeting import ANSWER_WITHIN, Alone, Meeting
from helpers.training.stopping import StopRequest

if TYPE_CHECKING:
    from helpers.config.options import RunOptions

# A collective may have to wait while another process validates or saves. The launcher ends hung processes.
PATIENCE = timedelta(days=7)


@dataclass
class Runtime:
    """This process: its device, precision and rank, and the few operations it shares with the others."""

    accelerator: Accelerator
    stop: StopRequest
    mixed_precision: str  # "no", "bf16" or "fp16", as the device allows
    notes: list[str]  # adjustments to this machine, to show to the user
    locks: list[IO[str]]  # held by the main process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the network computes in."""
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
        """Seed torch's global generators, which libraries draw from, with a number that depends on the address only, not on history."""
        number = seed_of(name, *address)
        # Not torch.manual_seed: it formats a stack trace for every unused kind of device, which takes a millisecond per call.
        torch.default_generator.manual_seed(number)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(number)

    def wait_for_everyone(self) -> None:
        self.accelerator.wait_for_everyone()

    def sum(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes, in float64."""
        total = torch.tensor(numbers, dtype=torch.float64, device="cpu" if self.device.type != "mps" else None)
        if self.world_size == 1:
            return total.tolist()
        total = total.to(self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in rank order, on every process. They travel as JSON: what arrives cannot run code."""
        if self.world_size == 1:
            return [value]
        own = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        torch.distributed.all_gather(lengths, torch.tensor([len(own)], device=self.device))
        longest = max(int(length) for length in lengths)
        texts = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.world_size)]
        torch.distributed.all_gather(texts, torch.nn.functional.pad(own, (0, longest - len(own))))
        return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths, strict=True)]

    def meet(self) -> Meeting | Alone:
        """Exchange of short texts between all processes during work that may take hours. Every process must call it.

        On one machine it goes through a file that only this user can open. On several, a store listens on the network: there every key
        begins with a secret that the processes share, so that nobody else can ask the run to stop.
        """
        if self.world_size == 1:
            return Alone(self.stop)
        folder = tempfile.mkdtemp(prefix="simpletuner-", dir=os.environ.get(FOLDER_VARIABLE)) if self.is_main else ""  # mode 0700
        secret, folder = self.gather([secrets.token_hex(32), folder])[0]
        if all(self.gather(os.path.isdir(folder))):
            file = torch.distributed.FileStore(os.path.join(folder, "store"), -1)
            file.set_timeout(ANSWER_WITHIN)
            return Meeting(self.rank, self.world_size, file, self.stop)
        return Meeting(self.rank, self.world_size, torch.distributed.PrefixStore(secret, self._network_store()), self.stop)

    def _network_store(self) -> torch.distributed.TCPStore:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        port = 0  # the system picks one
        if self.is_main:
            store = torch.distributed.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=ANSWER_WITHIN)
            port = store.port
        port = self.gather(port)[0]
        if not self.is_main:
            store = torch.distributed.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=ANSWER_WITHIN)
        return store

    def clear_cache(self) -> None:
        """Return PyTorch's cached memory to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        wait_for_space(None)
        # If all processes finish or are interrupted, they exit together: closing the process group while others still use it aborts
        # them. After any other error the others may never get here; the launcher ends them.
        if kind is None or issubclass(kind, Interrupted):
            self.wait_for_everyone()
            self.accelerator.end_training()


def start_runtime(options: RunOptions, cache_dir: Path, chosen: Collection[str], stop: StopRequest) -> Runtime:
    """Join the other processes, resolve the precision for the device, and lock the run's folders, OUTPUT_DIR and that of the caches.

    `chosen` are the options that the user set. Raises UserError if a folder is in use or not writable, or if the device does not support
    the precision.
    """
    configure_logging()
    # Without `cpu=True`, accelerate treats each process of a CPU group as a run of one process.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    wanted = int(os.environ.get(PROCESSES_VARIABLE) or os.environ.get("WORLD_SIZE") or state.num_processes)
    if state.num_processes != wanted:
        # Otherwise each process would train alone and overwrite the others' files.
        if PROCESSES_VARIABLE not in os.environ:
            raise UserError(
                f"WORLD_SIZE={wanted} in the environment says that {wanted} processes train, but this one is alone: unset it, or start the "
                "run by its wrapper, which starts TRAINING_NUM_PROCESSES processes."
            )
        raise RuntimeError(f"{wanted} processes were requested, but the launcher started a group of {state.num_processes}.")
    announce_rank(os.environ)
    mixed_precision, note = resolve_precision(options.mixed_precision, "mixed_precision" in chosen, state.device)
    accelerator = make_accelerator(mixed_precision, state.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.allow_tf32
    notes = [note] if note else []
    if kernels := in_effect(os.environ):
        notes.append(f"kernels of torch are chosen by the environment: {kernels}")
    runtime = Runtime(accelerator, stop, mixed_precision, notes, [])
    wait_for_space((lambda: stop.asked) if options.disk_full == "wait" else None)
    refusals = runtime.gather(_take_locks(runtime, options.output_dir, cache_dir))
    if refusal := next(filter(None, refusals), None):
        raise UserError(refusal)
    return runtime


def _take_locks(runtime: Runtime, output: Path, cache: Path) -> str | None:
    """Lock the folders on the main process, and remove what killed runs left half-written there, before any process writes to them.

    => why that failed, which all processes get, so that none waits for one that has exited
    """
    if not runtime.is_main:
        return None
    for option, folder in (("--output_dir", output), ("--cache_dir", cache)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            runtime.locks.append(lock_folder(folder, option))
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{option}={folder} is not writable: {error.strerror}."
    runtime.notes.extend(_remove_leftovers(output, cache))
    return None


def _remove_leftovers(output: Path, cache: Path) -> Iterator[str]:
    """=> sentences about what could not be removed"""
    flat = [folder for folder in (output, output / VALIDATION_FOLDER) if folder.is_dir()]
    for remove, folder in [(remove_leftovers_below, cache), *((remove_leftovers, folder) for folder in flat)]:
        try:
            remove(folder)
        except StorageError as error:
            yield str(error)


def resolve_precision(asked: str, chosen: bool, device: torch.device) -> tuple[str, str | None]:
    """The precision to train in on this device, and a note for the user if it changed. Raises ConfigError for fp16 on a CPU."""
    if device.type != "cpu" or asked == "no":
        return asked, None
    if asked == "fp16":
        raise ConfigError("--mixed_precision=fp16 does not work on a CPU: use no or bf16.")
    if chosen:
        return asked, None
    return "no", "mixed_precision is no: this machine trains on its CPU, where float32 is faster than bf16"


def make_accelerator(mixed_precision: str, device: torch.device) -> Accelerator:
    """Raises ConfigError if the device does not support the precision."""
    # Without the plugin, accelerate reads the number of steps from the environment and divides every gradient by it.
    plugin = GradientAccumulationPlugin(num_steps=1)
    try:
        return Accelerator(mixed_precision=mixed_precision, gradient_accumulation_plugin=plugin)
    except ValueError as error:
        if mixed_precision == "no":
            raise
        raise ConfigError(
            f"--mixed_precision={mixed_precision} does not work on this {device.type} device ({error}): use --mixed_precision=no."
        ) from error


def configure_logging() -> None:
    """Set our log level from SIMPLETUNER_LOG_LEVEL. Libraries log warnings, except two that do not concern users."""
    level = os.environ.get("SIMPLETUNER_LOG_LEVEL", "INFO").upper()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("helpers").setLevel(level)
    # transformers warns on every import that torchvision is missing. We do not use it.
    logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "torchvision" not in record.getMessage())
    # bitsandbytes looks for a 4-bit matrix product for CPUs. We dequantize the weights before multiplying.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.getMessage())


@contextmanager
def undisturbed(*modules: torch.nn.Module) -> Iterator[None]:
    """Restores train/eval modes and random states, so that what happens inside has no effect on training."""
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
