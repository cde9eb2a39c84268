"""The errors users of edge-runtime meet.

Every error the software raises on purpose derives from :class:`EdgeRuntimeError`. Its text is
written for the person at the terminal: what was found, what was expected, and the command or
setting that mends it. The command line prints it after ``error:`` and exits with the class's
``exit_code``.
"""

from __future__ import annotations


class EdgeRuntimeError(Exception):
    """Base of all expected failures."""

    exit_code = 1


class BundleError(EdgeRuntimeError):
    """A bundle is missing, damaged, of another schema, or not the kind a command needs."""


class EngineError(EdgeRuntimeError):
    """An inference engine cannot be opened or was fed something that does not fit it."""


class PlanError(EngineError):
    """A TensorRT plan is missing, damaged, built for something else, or may not serve."""


class BuildError(EdgeRuntimeError):
    """A TensorRT plan could not be built, or came out as something that was not asked for."""


class ImageError(EdgeRuntimeError):
    """An image cannot be read or is outside the limits."""


class PromptError(EdgeRuntimeError):
    """A point, box or mask prompt is malformed or outside the image."""


class ConfigError(EdgeRuntimeError):
    """A configuration file or a combination of settings is wrong."""


class OutputError(EdgeRuntimeError):
    """A file or folder that the user asked for cannot be written."""


class KeyFileError(EdgeRuntimeError):
    """A key file is missing, malformed or readable by others."""


class PlacementError(EdgeRuntimeError):
    """The nodes at hand cannot satisfy the exposure budget."""


class OffloadError(EdgeRuntimeError):
    """A node was missing, late, refused the work or answered wrongly."""


class ProtocolError(EdgeRuntimeError):
    """A message that came over a socket is not one of ours."""


class CheckpointError(EdgeRuntimeError):
    """A SAM checkpoint is missing, truncated, or of another model than named."""


class ExportError(EdgeRuntimeError):
    """An export missed its tolerance or could not be written."""
