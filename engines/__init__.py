"""Geometry, windows, bundles and the engines that run their stages."""

import os

# Read when ONNX Runtime is imported, which otherwise (1.31 does, on Linux too) leaves a session id
# in the temporary folder and reports its use to its makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
