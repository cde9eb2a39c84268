"""Settings of a program, declared once: the annotated fields of a msgspec struct.

The options of the command line, the keys of the TOML file, the file that ``init`` writes and the
table in the documentation all come from that struct.
"""

from __future__ import annotations

import argparse
import os
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from edge_common.errors import ConfigError
from edge_common.options import Invalid, Number
from edge_common.permissions import why_untrusted
from edge_common.toml import unknown_key

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", re.IGNORECASE)
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")


@dataclass(frozen=True)
class Kind:
    """A type of value that has a form of its own as text.

    Args:
        read: makes a value of a text, or of another value of a TOML file; raises Invalid.
        show: the value as TOML.
    """

    read: Callable[[Any], Any]
    show: Callable[[Any], str] = lambda value: quoted(str(value))


@dataclass(frozen=True)
class Option:
    """The annotation of a field: how the setting appears to people.

    Args:
        group: heading under which it is listed.
        metavar: of the value, for ``--help``.
        help: one or more sentences.
        unset: what holds when there is no value, for a default of None.
        example: a value to show where the default is None.
        kind: None for numbers, texts and Literals.
        unit: of a number.
    """

    group: str
    metavar: str
    help: str
    unset: str = ""
    example: Any = None
    kind: Kind | None = None
    unit: str = ""


@dataclass(frozen=True)
class Setting:
    """One field of a settings struct; made by :func:`settings_of`.

    Attributes:
        name: key in the file. type: as annotated.
    """

    name: str
    type: Any
    default: Any
    about: Option

    @property
    def option(self) -> str:
        """Name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_path(self) -> bool:
        return self.about.kind is PATH

    @property
    def sample(self) -> Any:
        """The default, or an example where that is None."""
        return self.about.example if self.default is None else self.default

    @property
    def default_text(self) -> str:
        """The default for people."""
        return self.about.unset or self.show(self.default).strip('"')

    def read(self, value: Any, *, text: bool = False) -> Any:
        """A value of the TOML file, or with `text` of the command line, converted and checked.

        Raises:
            Invalid: it is none; the message says what was expected.
        """
        if self.about.kind is not None:
            value = self.about.kind.read(value)
            if not isinstance(value, (int, float)):
                return value
        try:
            return msgspec.convert(value, self.type, strict=not (text or isinstance(value, str)))
        except msgspec.ValidationError:
            raise Invalid(f"expected {self._expected()}") from None

    def show(self, value: Any) -> str:
        """A value as TOML."""
        if self.about.kind is not None:
            return self.about.kind.show(value)
        if isinstance(value, float):
            return format(value, "g")
        return quoted(value) if isinstance(value, str) else str(value)

    def _expected(self) -> str:
        type_, meta = _plain_type(self.type)
        if get_origin(type_) is Literal:
            return " or ".join(get_args(type_))
        if type_ is str:
            return f"a text, such as {self.show(self.sample)}"
        if self.about.kind is SIZE:
            return f"{size_text(meta.ge)} to {size_text(meta.le)}"
        return str(Number(meta.ge, meta.le, self.about.unit, whole=type_ is int))


def _plain_type(hint: Any) -> tuple[Any, Any]:
    """The type inside Annotated and ``| None``, and its msgspec.Meta."""
    meta = None
    while True:
        if get_origin(hint) is Annotated:
            meta = next((m for m in hint.__metadata__ if isinstance(m, msgspec.Meta)), meta)
            hint = get_args(hint)[0]
        elif type(None) in get_args(hint):
            hint = next(arg for arg in get_args(hint) if arg is not type(None))
        else:
            return hint, meta


def settings_of(struct: type[msgspec.Struct]) -> dict[str, Setting]:
    """The settings that a struct declares, by name."""
    hints = get_type_hints(struct, include_extras=True)
    found = {}
    for field in msgspec.structs.fields(struct):
        hint = hints[field.name]
        about = next(each for each in hint.__metadata__ if isinstance(each, Option))
        found[field.name] = Setting(field.name, hint, field.default, about)
    return found


def add_arguments(parser: argparse.ArgumentParser, settings: Mapping[str, Setting]) -> None:
    """Add an option for each setting. Those not given are absent from the parsed arguments."""

    def reader(setting: Setting) -> Callable[[str], Any]:
        def read(text: str) -> Any:
            try:
                return setting.read(text, text=True)
            except Invalid as error:
                raise Invalid(f"{error}, not {text!r}") from None

        return read

    groups: dict[str, Any] = {}
    for setting in settings.values():
        about = setting.about
        if about.group not in groups:
            groups[about.group] = parser.add_argument_group(about.group)
        groups[about.group].add_argument(
            setting.option,
            type=reader(setting),
            default=argparse.SUPPRESS,
            metavar=about.metavar,
            help=f"{about.help} Default: {setting.default_text}.".replace("%", "%%"),
        )


def read_settings(
    file: Path, table: Mapping[str, Any], settings: Mapping[str, Setting]
) -> dict[str, Any]:
    """The checked values of a TOML file. Relative paths are relative to its folder.

    Args:
        table: of the file, from `edge_common.toml.read_toml`.

    Raises:
        ConfigError: naming the file, the key and what was expected; or others may change the file.
    """
    if danger := why_untrusted(file):
        raise danger.error(ConfigError)
    values = {}
    for name, value in table.items():
        if isinstance(value, dict):
            raise ConfigError(
                f"{file}: [{name}] begins a table; expected lines NAME = VALUE without tables"
            )
        if name not in settings:
            raise unknown_key(name, settings).within(str(file))
        try:
            found = settings[name].read(value)
        except Invalid as error:
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            shown = shown if len(shown) < 80 else f"{shown[:76]}..."
            raise ConfigError(f"{file}: {name} is {shown}; {error}") from None
        path = settings[name].is_path
        values[name] = (file.parent / found).absolute() if path else found
    return values


def settings_file(settings: Mapping[str, Setting], values: Mapping[str, Any], base: Path) -> str:
    """A TOML file for the folder `base` that sets `values` and has all other settings as
    comments."""
    parts = []
    for setting in settings.values():
        about = setting.about
        text = f"{about.help} Default: {about.unset}." if about.unset else about.help
        parts.append("\n" + textwrap.fill(text, 98, initial_indent="# ", subsequent_indent="# "))
        if setting.name in values:
            value = values[setting.name]
            value = os.path.relpath(value, base) if setting.is_path else value
            parts.append(f"\n{setting.name} = {setting.show(value)}\n")
        else:
            parts.append(f"\n# {setting.name} = {setting.show(setting.sample)}\n")
    return "".join(parts)


def settings_table(settings: Mapping[str, Setting]) -> str:
    """The table of settings for the documentation, in Markdown."""
    lines = ["| setting | default | |", "|---|---|---|"]
    for setting in settings.values():
        about = setting.about
        default = about.unset or f"`{setting.show(setting.default)}`"
        lines.append(f"| `{setting.name}` | {default} | {about.help} |")
    return "\n".join(lines)


# Kinds of values


def quoted(text: str) -> str:
    """A TOML string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\0-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'


def size_text(size: int) -> str:
    """A number of bytes for people: ``256 MiB``."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor and size % factor == 0:
            return f"{size // factor} {unit}"
    return str(size)


def _read_size(value: Any) -> int:
    if type(value) is int:
        return value
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if not found:
        raise Invalid('expected bytes, or a text such as "256 MiB"')
    number, unit, binary = found.groups()
    factor = (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1 if unit else 0)
    return int(float(number) * factor)


def _show_size(value: int) -> str:
    text = size_text(value)
    return text if text.isdigit() else quoted(text)


def _read_path(value: Any) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise Invalid("expected a path")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise Invalid("expected a path in the home of a user that exists") from None


def _read_address(value: Any) -> str | None:
    if value == "off":
        return None
    if not isinstance(value, str) or not is_address(value):
        raise Invalid('expected off or HOST:PORT, as a text such as "127.0.0.1:9464"')
    return value


def is_address(text: str) -> bool:
    """True if a text is ``HOST:PORT``."""
    found = _ADDRESS.fullmatch(text)
    return found is not None and int(found[2]) <= 65535


def split_address(text: str) -> tuple[str, int]:
    """Host (without brackets) and port of a checked address."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


SIZE = Kind(_read_size, _show_size)
"""Bytes: a number, or a text such as ``256 MiB``."""
PATH = Kind(_read_path)
ADDRESS = Kind(_read_address, lambda value: quoted(value or "off"))
"""``HOST:PORT``, or None for ``off``."""
