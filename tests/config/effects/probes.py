"""Probes of a run: each function looks at one thing that a setting may change, and returns something comparable.

Libraries, and what imports them, are imported where they are used: the tables of effects are read while tests are collected.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import shutil
import sys
import types
from collections import Counter
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers.data.base.sample import Size
from helpers.errors import Interrupted
from helpers.launch import plan_launch
from helpers.training.schedules import Schedule
from tests.config.effects.lab import Flags, Lab, refusal
from tests.harness import Ended

if TYPE_CHECKING:
    import torch
    from torch import nn

    from helpers.training.runtime import Runtime

Probe = Callable[[Lab, Flags], Any]
LORA = "pytorch_lora_weights.safetensors"
PICTURES: Flags = ("--validation_prompt=a red circle", "--validation_num_inference_steps=2", "--max_train_steps=1")


# -- the network ------------------------------------------------------------------------------------------------------------


def losses(lab: Lab, flags: Flags) -> object:
    """Of every step, to the last bit: anything that reaches the weights, the data or the noise shows here."""
    return [row["loss"] for row in lab.run(flags).rows("metrics.jsonl")]


def base_weights(lab: Lab, flags: Flags) -> object:
    """Of the U-Net that a run would start from."""
    import torch

    from helpers.families.sdxl import SDXL

    config = lab.config(flags)
    denoiser = SDXL(config.model, config.cache).load(torch.float32).denoiser
    return hashlib.sha256(b"".join(weights.detach().numpy().tobytes() for weights in denoiser.parameters())).hexdigest()


def handed_over(lab: Lab, flags: Flags) -> object:
    """Names of weights in OUTPUT_DIR."""
    names = {path.name for path in lab.run(flags).folder.iterdir()}
    return names & {"pipeline", "pipeline.safetensors", "unet_live", "controlnet", LORA, LORA.replace(".", "_live.")}


def lora_ranks(lab: Lab, flags: Flags) -> object:
    return {min(tensor.shape) for tensor in _tensors(lab.run(flags).folder / LORA).values()}


def lora_modules(lab: Lab, flags: Flags) -> object:
    """Endings of the modules that have an adapter."""
    return {name.rsplit(".lora_", 1)[0].removesuffix(".0").rsplit(".", 1)[1] for name in _tensors(lab.run(flags).folder / LORA)}


def trained_roles(lab: Lab, flags: Flags) -> object:
    """The networks that a LoRA file is for."""
    return {name.partition(".")[0] for name in _tensors(lab.run(flags).folder / LORA)}


def moved_layers(lab: Lab, flags: Flags) -> object:
    """Layers of the text encoder that training changed: -1 are the embeddings, "norm" is what follows the last."""
    import torch

    base = _tensors(lab.folder / "sd1" / "text_encoder" / "model.safetensors")
    moved: set[object] = set()
    for name, tensor in _tensors(lab.run(flags).folder / "pipeline" / "text_encoder" / "model.safetensors").items():
        plain = name.removeprefix("text_model.")
        if not torch.equal(tensor, base[name] if name in base else base[plain]):
            kind, _, rest = plain.removeprefix("encoder.").partition(".")
            moved.add({"embeddings": -1, "layers": int(rest[0]) if rest[0].isdigit() else None}.get(kind, "norm"))
    return moved


def full_weights_dtype(lab: Lab, flags: Flags) -> object:
    return {str(tensor.dtype) for tensor in _tensors(next((lab.run(flags).folder / "pipeline" / "unet").glob("*.safetensors"))).values()}


def exported_scheduler(lab: Lab, flags: Flags) -> dict[str, Any]:
    """The scheduler that diffusers builds from the exported pipeline: its own settings, and the class that the index names."""
    folder = lab.run(flags).folder / "pipeline"
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return {**settings, "index": json.loads((folder / "model_index.json").read_text())["scheduler"][1]}


def exported_spacing(lab: Lab, flags: Flags) -> object:
    return exported_scheduler(lab, flags)["timestep_spacing"]


def calls(kind: str, of: Callable[[tuple[Any, ...]], Any]) -> Probe:
    """How often modules of a class are called in a run, counted by what `of` tells of their arguments."""

    def probe(lab: Lab, flags: Flags) -> object:
        from torch.nn.modules.module import register_module_forward_pre_hook

        seen: Counter[Any] = Counter()

        def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if type(module).__name__ == kind:
                seen[of(arguments)] += 1

        handle = register_module_forward_pre_hook(count)
        try:
            lab.run_again((f"--cache_dir=own/{next(lab.numbers)}", *flags), lab.new_folder())
        finally:
            handle.remove()
        return dict(seen)

    return probe


# -- the data ---------------------------------------------------------------------------------------------------------------


def of_samples(field: str) -> Probe:
    """The different values of a field of samples.jsonl."""

    def probe(lab: Lab, flags: Flags) -> object:
        return {tuple(row[field]) if isinstance(row[field], list) else row[field] for row in lab.run(flags).rows("samples.jsonl")}

    return probe


def encodes_behind_training(lab: Lab, flags: Flags) -> object:
    printed = lab.run_again((f"--cache_dir=own/{next(lab.numbers)}", *flags), lab.new_folder()).printed
    return "the rest is encoded while training runs" in printed


def same_cuts_in_two_epochs(lab: Lab, flags: Flags) -> object:
    rows = lab.run(flags).rows("samples.jsonl")
    first, second = ({row["key"]: row["crop"] for row in rows if (row["step"] > 3) == late} for late in (False, True))
    assert len(first) == len(second) == 6
    return first == second


def same_shapes_in_two_epochs(lab: Lab, flags: Flags) -> object:
    """Of an epoch and the next, however many steps each has."""
    epochs: dict[int, dict[str, object]] = {0: {}, 1: {}}
    run = lab.run(flags)
    epoch_of = {row["step"]: row["epoch"] for row in run.rows("metrics.jsonl")}
    for row in run.rows("samples.jsonl"):
        epochs.setdefault(epoch_of[row["step"]], {}).setdefault(row["key"], row["target_size"])
    shared = epochs[0].keys() & epochs[1].keys()
    assert len(shared) > 3
    return all(epochs[0][key] == epochs[1][key] for key in shared)


def timesteps_below(border: int) -> Probe:
    """Whether every timestep that was trained is below this."""
    return lambda lab, flags: all(row["timestep"] < border for row in lab.run(flags).rows("samples.jsonl"))


def samples_of_a_step(lab: Lab, flags: Flags) -> object:
    return lab.run(flags).rows("metrics.jsonl")[0]["samples"]


def steps(lab: Lab, flags: Flags) -> object:
    return len(lab.run(flags).rows("metrics.jsonl"))


def buckets(lab: Lab, flags: Flags) -> object:
    """Sizes that images are trained at, each with its number of images."""
    return _report(lab, flags)["buckets"]


def images_used(lab: Lab, flags: Flags) -> object:
    return _report(lab, flags)["used"]


def finds_a_new_picture(lab: Lab, flags: Flags) -> object:
    """In the folder of a run that is started once more."""
    flags = (f"--cache_dir=own/{next(lab.numbers)}", *flags)
    new = lab.folder / "images" / "new.png"
    lab.run(flags)
    shutil.copy(lab.folder / "other_images" / "picture_0.png", new)
    try:
        return _report_of(lab.run_again(flags, lab.new_folder()))["used"] == 7
    finally:
        new.unlink()


def target_of_an_image(lab: Lab, flags: Flags) -> object:
    """Of 3000 x 2000 pixels: arithmetic alone, no such image is encoded."""
    from helpers.data.plan.targets import target_size
    from helpers.data.planning import rules_of

    return target_size(Size(3000, 2000), rules_of(lab.config(flags).datasets[0]).resolution)


def size_of_an_image_before_its_cut(lab: Lab, flags: Flags) -> object:
    """Of the same image."""
    from helpers.data.plan.buckets import geometry
    from helpers.data.planning import rules_of

    return geometry(Size(3000, 2000), rules_of(lab.config(flags).datasets[0]).resolution).resized


def has_samples_file(lab: Lab, flags: Flags) -> object:
    return (lab.run(flags).folder / "samples.jsonl").is_file()


def shown_and_trained(lab: Lab, flags: Flags) -> object:
    """Whether a run left the page on its data, and whether anything of a training."""
    left = {path.name for path in lab.run(flags).folder.iterdir()}
    return "dataset_report.html" in left, bool(left - {"dataset_report.html", "dataset_report.json", ".lock"})


def goes_on_with_other_data(lab: Lab, flags: Flags) -> object:
    """Whether a run of one step can be resumed on other pictures."""
    output = lab.run_again(("--max_train_steps=1",), lab.new_folder()).folder
    other = (f"--output_dir={output}", "--data_backend_config=other.json", "--max_train_steps=2")
    return "accept_changed_data" not in refusal(lab, (*other, *flags))


def demo_pictures(lab: Lab, flags: Flags) -> object:
    return lab.config(flags, usual=()).datasets[0].instance_data_dir.name


def cached_dtypes(lab: Lab, flags: Flags) -> object:
    folder = lab.folder / "own" / str(next(lab.numbers))
    lab.run_again((f"--cache_dir={folder}", *flags), lab.new_folder())
    return {str(tensor.dtype) for shard in folder.rglob("*.safetensors") for tensor in _tensors(shard).values()}


def new_folders(lab: Lab, flags: Flags) -> object:
    """Folders beside the data that a run made and put files into."""
    lab.run()  # whose caches all runs share
    before = set(lab.folder.iterdir())
    lab.run_again(flags, lab.new_folder())
    made = [path for path in lab.folder.iterdir() if path not in before and any(file.is_file() for file in path.rglob("*"))]
    return {path.name for path in made}


# -- the run ----------------------------------------------------------------------------------------------------------------


def allows_tf32(lab: Lab, flags: Flags) -> object:
    """As it is when the first batch is asked for."""
    import torch

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers.training.steps.time.perf_counter", lambda: seen.append(torch.backends.cuda.matmul.allow_tf32) or 0.0)
        lab.run_again(flags, lab.new_folder())
    return set(seen)


def cache_clearings(lab: Lab, flags: Flags) -> object:
    from helpers.training.runtime import Runtime

    count = 0

    def clear(runtime: Runtime) -> None:
        nonlocal count
        count += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "clear_cache", clear)  # a CPU has no cache to look into
        lab.run_again(flags, lab.new_folder())
    return count


def attention_kernels(lab: Lab, flags: Flags) -> object:
    """PyTorch's fused kernels for attention that the network of a run called."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from helpers.families.sdxl import SDXL

    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "scaled_dot_product" in (name := func.overloadpacket.__name__) and "backward" not in name:
                seen.add(name)
            return func(*args, **(kwargs or {}))

    lab.run()  # whose caches all runs share: the encoders are not to be seen
    with pytest.MonkeyPatch.context() as patch:
        predict = SDXL.predict

        def watched(*arguments: Any) -> Any:
            with Watch():
                return predict(*arguments)

        patch.setattr(SDXL, "predict", staticmethod(watched))
        lab.run_again(flags, lab.new_folder())
    return seen


def steps_with_copies(lab: Lab, flags: Flags) -> object:
    """Whether the optimiser takes its steps with copies of the weights, or with those of the network."""
    import torch
    from torch import nn

    from helpers.training.optimizers import NamedOptimizer

    return NamedOptimizer(lab.config((*flags, "--optimizer=adamw")).optimizer, {"w": nn.Parameter(torch.zeros(1))}, 1.0).offloaded


def compiled_for(lab: Lab, flags: Flags) -> object:
    """What the network of the pictures is compiled for; compiling itself takes a minute, and is left out here."""
    import torch

    modes: list[str] = []

    def compile_nothing(module: nn.Module, mode: str = "") -> nn.Module:
        if mode:
            modes.append(mode)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile_nothing)
        lab.run_again((*PICTURES, *flags), lab.new_folder())
    return modes


def optimizer_or_refusal(lab: Lab, flags: Flags) -> object:
    """The optimiser's class, or that its library is not installed."""
    import torch
    from torch import nn

    from helpers.training.optimizers import create_optimizer

    if said := refusal(lab, (*flags, "--max_train_steps=1")):
        return said
    options = lab.config(flags).optimizer
    if options.optimizer == "auto":
        return "AdamW"
    return type(create_optimizer(options, {"w": nn.Parameter(torch.zeros(1))}, 1.0)).__name__


def prodigys(setting: str) -> Probe:
    """What Prodigy is made with."""

    def probe(lab: Lab, flags: Flags) -> object:
        import torch
        from torch import nn

        from helpers.training.optimizers import create_optimizer

        options = lab.config(flags).optimizer
        pytest.importorskip("prodigyopt")
        return create_optimizer(options, {"w": nn.Parameter(torch.zeros(1))}, 1.0).param_groups[0][setting]

    return probe


def ends(lab: Lab, flags: Flags) -> object:
    """How a run does."""
    try:
        lab.run_again(flags, lab.new_folder())
    except Interrupted:
        return "stopped"
    return "finished"


def ends_on_a_full_disk(lab: Lab, flags: Flags) -> object:
    """How a run does whose first checkpoint finds the disk full; a moment later there is space."""
    from helpers.errors import StorageError
    from helpers.training import checkpoints

    save, is_full = checkpoints.save_tensors, iter([True])

    def on_a_full_disk(*arguments: Any) -> None:
        if next(is_full, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save_tensors", on_a_full_disk)
        patch.setattr("helpers.storage.full_disk.TRY_SECONDS", 0.0)
        try:
            outcome = ends(lab, flags)
        except StorageError:
            outcome = "stopped"
    gc.collect()  # what caused the error holds frames of the run, and with them its locks
    return outcome


def rates(lab: Lab, flags: Flags) -> object:
    schedule = Schedule.create(lab.config(flags).schedule, total_steps=20)
    return [schedule(step) for step in range(20)]


def rates_of_a_run(lab: Lab, flags: Flags) -> object:
    return [row["learning_rate"] for row in lab.run(flags).rows("metrics.jsonl")]


def average(lab: Lab, flags: Flags) -> object:
    """The averaged weights in the last checkpoint."""
    path = lab.run(("--use_ema", *flags)).folder / "checkpoint-3" / LORA
    return hashlib.sha256(path.read_bytes()).hexdigest()


def average_device(lab: Lab, flags: Flags) -> object:
    """Of weights on torch's "meta" device, which stands for an accelerator here: nothing can be copied from it to a CPU."""
    import torch
    from torch import nn

    from helpers.training.ema import Average

    try:
        return str(Average({"w": nn.Parameter(torch.zeros(1, device="meta"))}, lab.config(flags).ema).shadow["w"].device)
    except NotImplementedError:
        return "cpu"


def checkpoints(lab: Lab, flags: Flags) -> object:
    return {int(path.name.removeprefix("checkpoint-")) for path in lab.run(flags).folder.glob("checkpoint-*")}


def resumed_from(lab: Lab, flags: Flags) -> object:
    """The checkpoint that a second life says it goes on from."""
    every = ("--checkpointing_steps=1", "--max_train_steps=2")
    output = lab.run_again(every, lab.new_folder()).folder
    printed = lab.run_again((*every, *flags), output).printed
    return next(line.rsplit(" ", 1)[1] for line in printed.splitlines() if line.startswith("checkpoint: resuming from"))


# -- pictures and reports ---------------------------------------------------------------------------------------------------


def picture_names(lab: Lab, flags: Flags) -> set[str]:
    return {path.stem.split("_", 2)[2] for path in _pictures(lab.run((*PICTURES, *flags)).folder)}


def begun(count: int) -> set[str]:
    """The names of so many pictures that begin with pictures of the data."""
    return {f"picture_{number}" for number in range(1, count + 1)}


def kinds_of_pictures(lab: Lab, flags: Flags) -> object:
    """Their names without the sizes."""
    return {path.stem.split("_", 2)[2].rpartition("_")[0] for path in _pictures(lab.run((*PICTURES, *flags)).folder)}


def pictures_of_data(lab: Lab, flags: Flags) -> object:
    """The bytes of those that begin with pictures of the data."""
    return {path.read_bytes() for path in _pictures(lab.run((*PICTURES, *flags)).folder) if "_picture_" in path.name}


def picture_steps(lab: Lab, flags: Flags) -> object:
    return {int(path.stem.split("_")[1]) for path in _pictures(lab.run((*PICTURES, "--max_train_steps=3", *flags)).folder)}


def picture_bytes(lab: Lab, flags: Flags) -> object:
    """Of the prompt's picture before training."""
    return _first_picture(lab.run((*PICTURES, *flags)).folder)


def different_pictures_in_two_runs(lab: Lab, flags: Flags) -> object:
    return len({_first_picture(lab.run_again((*PICTURES, *flags), lab.new_folder()).folder) for _ in range(2)})


def channels_last(arguments: tuple[Any, ...]) -> bool:
    """Whether the first argument of a module is laid out so."""
    import torch

    return bool(arguments[0].is_contiguous(memory_format=torch.channels_last))


def event_files(lab: Lab, flags: Flags) -> object:
    """Folders of TensorBoard's curves, relative to OUTPUT_DIR; the settings are in a folder below, named by the time."""
    folder = lab.run(flags).folder
    folders = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    return {path.relative_to(folder).as_posix() for path in folders if path.parent not in folders}


def project_of_wandb(lab: Lab, flags: Flags) -> object:
    """What the real tracker of accelerate tells the wandb library, of which a stand-in listens."""
    told: dict[str, Any] = {}
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", loader=None)
    run = types.SimpleNamespace(id="1", log=lambda *values, **more: None, finish=lambda: None)
    vars(wandb).update(init=lambda **given: told.update(given) or run, config={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        lab.run_again(("--report_to=wandb", "WANDB_MODE=offline", *flags), lab.new_folder())
    return told["project"]


def notes(lab: Lab, flags: Flags) -> object:
    """What is said of settings that do nothing."""
    return lab.config(flags).notes


def launch_arguments(lab: Lab, flags: Flags) -> object:
    """Of accelerate launch; ports are drawn anew each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers.launch.free_port", lambda: 0)
        launch = plan_launch(lab.config(flags).launch, {"HF_HOME": str(lab.folder)})
    return launch and launch.arguments


# -- details ----------------------------------------------------------------------------------------------------------------


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping


def _report(lab: Lab, flags: Flags) -> dict[str, Any]:
    return _report_of(lab.run((*flags, "--max_train_steps=1")))


def _report_of(ran: Ended) -> dict[str, Any]:
    [entry] = json.loads((ran.folder / "dataset_report.json").read_text())["datasets"]
    return entry


def _pictures(folder: Path) -> list[Path]:
    return sorted((folder / "validation_images").glob("step_*.png"))


def _first_picture(folder: Path) -> str:
    return hashlib.sha256(_pictures(folder)[0].read_bytes()).hexdigest()
