"""Whether the trackers that send data to a server can log in: asked before hours of caching, and without importing their libraries.

The places are those where the libraries look: https://docs.wandb.ai/guides/track/environment-variables and
https://www.comet.com/docs/v2/guides/experiment-management/configure-sdk. No server is asked, so a wrong key is only found later.
"""

from __future__ import annotations

import configparser
import netrc
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

WANDB_SERVER = "https://api.wandb.ai"
OFFLINE = ("offline", "disabled", "dryrun")
OFF = ("0", "false", "no")

Environ = Mapping[str, str]


def missing_login(tracker: str, environ: Environ) -> str | None:
    """`wandb has no API key ...` with the remedy; None if the tracker has a key, needs none or stays offline."""
    check = _CHECKS.get(tracker)
    return check(environ) if check else None


def _wandb(environ: Environ) -> str | None:
    own = environ.get("WANDB_CONFIG_DIR") or _home(environ) / ".config" / "wandb"
    settings = [Path(own) / "settings", Path(environ.get("WANDB_DIR") or ".") / "wandb" / "settings"]
    modes = [environ.get("WANDB_MODE", ""), *(_value(file, "default", "mode") for file in settings)]
    if any(mode.lower() in OFFLINE for mode in modes) or environ.get("WANDB_DISABLED", "").lower() in ("1", "true"):
        return None
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE") or environ.get("WANDB_ANONYMOUS") in ("allow", "must"):
        return None
    host = urlsplit(environ.get("WANDB_BASE_URL") or WANDB_SERVER).hostname or ""
    home = _home(environ)
    files = [Path(environ["NETRC"])] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    if any(_has_password(file, host) for file in files):
        return None
    return (
        f"wandb has no API key for {host}, and would ask for one only after caching; run `.venv/bin/wandb login`, set WANDB_API_KEY, or "
        "set WANDB_MODE='offline' to log on this machine alone."
    )


def _comet(environ: Environ) -> str | None:
    if environ.get("COMET_API_KEY") or environ.get("COMET_START_ONLINE", "").lower() in OFF:
        return None
    files = [Path(environ["COMET_CONFIG"])] if environ.get("COMET_CONFIG") else []
    if any(_value(file, "comet", "api_key") for file in (*files, Path(".comet.config"), _home(environ) / ".comet.config")):
        return None
    return "comet has no API key, and would ask for one only after caching; run `.venv/bin/comet login`, or set COMET_API_KEY."


_CHECKS: Mapping[str, Callable[[Environ], str | None]] = {"wandb": _wandb, "comet": _comet}


def _home(environ: Environ) -> Path:
    return Path(environ.get("HOME") or Path.home())


def _value(file: Path, section: str, name: str) -> str:
    """A value of an ini file; "" if there is none, or the file cannot be read."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(file, encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError):
        return ""
    return parser.get(section, name, fallback="")


def _has_password(file: Path, host: str) -> bool:
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
