"""Libraries that only some settings need, and how to install them."""

from __future__ import annotations

import importlib.util


def install(package: str) -> str:
    """The command, in the version that is pinned."""
    return f".venv/bin/pip install -c constraints/pins.txt {package}"


def nothing_is_installed() -> bool:
    """Whether the settings are checked by a Python from before the installation, with the standard library alone."""
    return importlib.util.find_spec("torch") is None


def lacking(who: str, module: str, package: str) -> str | None:
    """`nf4 needs the library bitsandbytes; <the command that installs it>`. None if the module can be imported, or nothing is installed."""
    if nothing_is_installed() or importlib.util.find_spec(module) is not None:
        return None
    return f"{who} needs the library {package}; {install(package)}"
