"""`./simpletuner COMMAND`: the programs around training, one line each in COMMANDS. A program is imported when it is called."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # Python put this file's folder first, where `datasets` would hide the library of that name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from helpers.config.suggest import did_you_mean  # noqa: E402
from helpers.errors import EXIT_FINISHED, EXIT_REFUSED  # noqa: E402


@dataclass(frozen=True)
class Command:
    """A program of its own: `main` gets the arguments after the command's name and returns the exit code."""

    main: str  # module:function
    summary: str  # what it does, in one line of the list

    def run(self, arguments: Sequence[str]) -> int:
        module, _, function = self.main.partition(":")
        code: int = getattr(importlib.import_module(module), function)(arguments)
        return code


COMMANDS = {
    "cache": Command("toolkit.cache.command:main", "verify, explain, measure and clean the caches of a run"),
    "checkpoints": Command("toolkit.checkpoints:main", "list, verify and clean up the checkpoints of a run"),
    "class-images": Command("toolkit.datasets.class_images:main", "make regularization images of a class with the base model"),
    "experts": Command("toolkit.inference.experts:main", "make images with two experts, each trained on a part of the noise schedule"),
    "selftest": Command("toolkit.selftest:main", "check the training math of this installation against published numbers"),
    "document": Command("toolkit.document:main", "write OPTIONS.md and the schema of the dataloader JSON from the code"),
    "miniature": Command("helpers.families.tiny:main", "write a tiny model of a family with random weights, to try things in seconds"),
}


def main(arguments: Sequence[str]) -> int:
    """Run a command; list them all without one. => the exit code"""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `./simpletuner | head` ends quietly
    name, *rest = arguments or ("--help",)
    if name in ("--help", "-h"):
        print(overview())
        return EXIT_FINISHED
    if name not in COMMANDS:
        print(f"error: ./simpletuner has no command {name!r}{did_you_mean(name, COMMANDS)}; without one it lists them.", file=sys.stderr)
        return EXIT_REFUSED
    return COMMANDS[name].run(rest)


def overview() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        (
            "usage: ./simpletuner COMMAND [arguments]",
            "",
            *(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()),
            "",
            "./simpletuner COMMAND --help explains a command, with an example. To train, use a wrapper: ./train_sdxl.sh --help",
        )
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
