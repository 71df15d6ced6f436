"""The wrappers become this program: judge the settings, then become the trainer, or watch over several of them.

    python helpers/launch.py [flags of train.py]

Only the standard library and the settings are imported, so a mistake is told in a fraction of a second, before torch or accelerate.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # Python put this file's folder first; `helpers` is found from the one above, and nothing in here may hide a library.
    sys.path[0] = str(ROOT)

from helpers.choices import known_axes  # noqa: E402
from helpers.config.options import LaunchOptions  # noqa: E402
from helpers.config.read import read_config  # noqa: E402
from helpers.errors import EXIT_REFUSED, ConfigError  # noqa: E402
from helpers.library_settings import remove_library_settings, remove_ranks  # noqa: E402
from helpers.ranks import PROCESSES_VARIABLE  # noqa: E402
from helpers.streams import make_unfailing  # noqa: E402

# Flags of accelerate launch that choose how processes work together, beside --multi_gpu.
UNAVAILABLE_STRATEGIES = {
    "--use_deepspeed": "DeepSpeed",
    "--use_fsdp": "FSDP",
    "--use_megatron_lm": "Megatron-LM",
    "--use_parallelism_config": "accelerate's parallelism configuration",
    "--tpu": "a TPU",
}
CHECK_ONLY = "SIMPLETUNER_CHECK_ONLY"  # set by the wrappers before the installation: check the settings, and start nothing
AVAILABLE_KINDS = frozenset(("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU"))  # as accelerate's configuration file names them


@dataclass(frozen=True)
class Launch:
    """How to start the trainer under accelerate."""

    arguments: tuple[str, ...]  # of accelerate launch, before the trainer's own
    variables: Mapping[str, str]


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    environ = dict(environ)
    try:
        # The trainer reads the same settings again: a fifth of a second, and it can be started without this program.
        config = read_config(argv, environ, known_axes())
        if environ.get(CHECK_ONLY):
            return 0
        launch = plan_launch(config.launch, environ, wants_file=config.run.demo is None)
        notes = [*remove_library_settings(environ), *remove_ranks(environ)]
    except ConfigError as mistake:
        print(*(f"error: {problem}" for problem in mistake.problems), sep="\n", file=sys.stderr)
        return EXIT_REFUSED
    for note in notes:
        print(f"launch     {note}", file=sys.stderr)
    trainer = [str(ROOT / "train.py"), *argv]
    if launch is None:
        # One process: this one. Its id, and with it signals and the exit code, are the trainer's own.
        os.execve(sys.executable, [sys.executable, *trainer], environ)
    from helpers.supervisor import supervise

    # -P: the caller's folder must not be searched for modules, a file of theirs may be called like one.
    command = [sys.executable, "-P", "-m", "accelerate.commands.launch", *launch.arguments, *trainer]
    return supervise(command, {**environ, **launch.variables})


def plan_launch(options: LaunchOptions, environ: Mapping[str, str], wants_file: bool = True) -> Launch | None:
    """None when one plain process is all that is asked for.

    accelerate's own configuration file, as `accelerate config` writes it, counts when it asks for more than that. Where it is used,
    it also says how many processes there are, unless TRAINING_NUM_PROCESSES says more than one.
    """
    extra = shlex.split(options.accelerate_extra_args)
    named = {word.partition("=")[0] for word in extra}
    file = accelerate_file(environ) if wants_file and "--config_file" not in named else None
    processes, machines = options.training_num_processes, options.training_num_machines
    compiled = options.training_dynamo_backend != "no"
    if processes == 1 and machines == 1 and not extra and file is None and not compiled:
        return None
    require_known_strategy(extra, file)
    has_file = file is not None or "--config_file" in named
    arguments: list[str] = []
    variables: dict[str, str] = {}
    if file is not None:
        print(f"launch     as {file} says", file=sys.stderr)
        arguments += ["--config_file", str(file)]
    if not has_file and "--multi_gpu" not in named:
        arguments += ["--multi_gpu"] if processes > 1 else []
        if not torch_has_a_gpu():
            # accelerate's own --cpu would quietly run a single process.
            variables["ACCELERATE_USE_CPU"] = "true"
    if not has_file:
        # Left out, accelerate warns; the trainer itself says which precision it computes in.
        arguments += ["--mixed_precision", "no"]
        arguments += ["--main_process_port", str(free_port())] if machines == 1 else []
    if not has_file or compiled:
        arguments += ["--dynamo_backend", options.training_dynamo_backend]
    if not has_file or processes > 1:
        arguments += ["--num_processes", str(processes), "--num_machines", str(machines)]
        if "--num_processes" not in named:
            variables[PROCESSES_VARIABLE] = str(processes)
    return Launch((*arguments, *extra), variables)  # accelerate takes the last of two equal flags: the user's


def require_known_strategy(extra: Sequence[str], file: Path | None) -> None:
    """ConfigError where arguments or configuration file of accelerate ask for a strategy that the trainer does not have."""
    for flag, strategy in UNAVAILABLE_STRATEGIES.items():
        if flag in extra:
            raise ConfigError(f"ACCELERATE_EXTRA_ARGS: {flag} asks for {strategy}, which is not available yet; remove it.")
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--config_file", type=Path, default=file)
    file = named.parse_known_args(extra)[0].config_file
    if file is None:
        return
    kind = str(_read_yaml(file).get("distributed_type", "NO")).upper()
    if kind not in AVAILABLE_KINDS:
        raise ConfigError(
            f"{file}: distributed_type {kind} is not available yet; run `accelerate config` again and choose multi-GPU or no distributed "
            "training, or remove the file."
        )


def accelerate_file(environ: Mapping[str, str]) -> Path | None:
    """accelerate's configuration file at its usual place, if it asks for anything but one plain process.

    Raises ConfigError where there is one that cannot be read.
    """
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(environ.get("HF_HOME") or Path(cache) / "huggingface").expanduser() / "accelerate"
    for file in (folder / "default_config.yaml", folder / "default_config.json"):
        if file.is_file():
            asks = _read_yaml(file)
            plain = asks.get("distributed_type", "NO") == "NO" and asks.get("num_processes", 1) == 1
            return None if plain else file
    return None


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read ({' '.join(str(error).split())}): make it anew with `accelerate config`.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no settings of accelerate: make it anew with `accelerate config`.")
    return content


def torch_has_a_gpu() -> bool:
    """Whether the installed torch is built for one; read from its version file, since importing it takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    return re.search(r"^(cuda|hip)\b.*= '", version, re.MULTILINE) is not None


def free_port() -> int:
    """A port of this machine that nothing listens on, so that two runs do not meet on the same one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    make_unfailing()  # so that `--help | head` ends quietly, and a run starts also when nobody can read what is said
    sys.exit(main(sys.argv[1:], os.environ))
