"""Reading a settings file in TOML, with errors of one line that name the file or key."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edge_common.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(file: Path, writer: str) -> dict[str, Any]:
    """Read the table of a TOML file.

    Args:
        writer: the command that writes such a file; named in the error when it does not exist.

    Raises:
        ConfigError: it does not exist, cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist", mend=writer, code="missing") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None


def unknown_key(key: str, known: Iterable[str], where: str = "") -> ConfigError:
    """The ConfigError for an unknown key: it names the nearest known key, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(key.replace("-", "_"), names, 1)
    mend = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
    return ConfigError(f"unknown key {key!r}{where}", mend=mend)
