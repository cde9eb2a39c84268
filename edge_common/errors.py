"""The errors users of edge-runtime meet, each with a code, what was found and a remedy."""

from __future__ import annotations

from edge_common.text import printable


class EdgeRuntimeError(Exception):
    """Base of all expected failures.

    Args:
        found: what was found and, where that helps, what was expected.
        mend: what the user can do about it: the command alone, where one is enough. May be empty.
        code: which failure it is, for programs; None is the class's own.

    Attributes:
        code: short and stable, so that programs can branch on it. `docs/python-api.md` lists them.
        exit_code: of a command that ends with this error.
    """

    code = "error"
    exit_code = 1

    def __init__(self, found: object = "", *, mend: str = "", code: str | None = None) -> None:
        super().__init__(found)
        self.found = str(found)
        self.mend = mend
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.found}: {self.mend}" if self.mend else self.found

    def within(self, where: str) -> EdgeRuntimeError:
        """This error, saying also where it was found: `raise error.within("edge.toml")`."""
        self.found = f"{where}: {self.found}"
        return self

    def fields(self) -> dict[str, str]:
        """For JSON: `error`, `code` and `mend`."""
        return {"error": self.found, "code": self.code, "mend": self.mend}

    def shown(self) -> str:
        """For a terminal: one line, and a second one with the remedy if there is one."""
        mend = f"\n  -> {self.mend}" if self.mend else ""
        return printable(f"error: {self.found}{mend}")


class BundleError(EdgeRuntimeError):
    """A bundle is missing, damaged, of another schema, or not the kind a command needs."""

    code = "bundle"


class EngineError(EdgeRuntimeError):
    """An inference engine cannot be opened, or its inputs or outputs are wrong."""

    code = "engine"


class PlanError(EngineError):
    """A TensorRT plan is missing, damaged, built for something else, or must not be used."""

    code = "plan"


class BuildError(EdgeRuntimeError):
    """A TensorRT plan could not be built, or is not what was asked for."""

    code = "build"


class ImageError(EdgeRuntimeError):
    """An image cannot be read or is outside the limits."""

    code = "image"


class PromptError(EdgeRuntimeError):
    """A point, box or mask prompt is malformed or outside the image."""

    code = "prompt"


class ConfigError(EdgeRuntimeError):
    """A configuration file or a combination of settings is wrong."""

    code = "config"


class OutputError(EdgeRuntimeError):
    """A file or folder that the user asked for cannot be written."""

    code = "output"


class KeyFileError(EdgeRuntimeError):
    """A key file is missing, malformed or readable by others."""

    code = "key_file"


class PlacementError(EdgeRuntimeError):
    """The nodes cannot satisfy the exposure budget, or a send was not permitted."""

    code = "placement"


class RecordError(EdgeRuntimeError):
    """The record of what nodes may have seen is damaged, in use, or cannot be written."""

    code = "record"


class OffloadError(EdgeRuntimeError):
    """A node was missing, late, refused the work or answered wrongly."""

    code = "offload"


class ProtocolError(EdgeRuntimeError):
    """A message that came over a socket is not one of ours."""

    code = "protocol"


class CheckpointError(EdgeRuntimeError):
    """A SAM checkpoint is missing, truncated, or of another model than named."""

    code = "checkpoint"


class ExportError(EdgeRuntimeError):
    """An export missed its tolerance or could not be written."""

    code = "export"
