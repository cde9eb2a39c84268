"""Adds the hashes of the golden samples to the manifest of a bundle exported without them.

Run as ``python -m engines.rehash BUNDLE ...``. Nothing but ``manifest.json`` is written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from edge_common.errors import EdgeRuntimeError
from engines.bundle import Bundle, hash_file, write_manifest
from engines.samples import golden_samples


def rehash(path: str) -> None:
    """Vouch for the golden samples of the bundle in directory ``path`` as they are now.

    Raises:
        BundleError: a file differs from a hash that the manifest has, or a sample does not fit the
            bundle; then nothing is written.
    """
    bundle = Bundle.load(path)
    bundle.verify_hashes()
    golden = {name: hash_file(bundle.path / name) for name in bundle.manifest.golden}
    manifest = msgspec.structs.replace(bundle.manifest, golden=golden)
    if golden:
        golden_samples(Bundle(bundle.path, manifest))
    write_manifest(bundle.path, manifest)


def main(arguments: Sequence[str]) -> int:
    for path in arguments:
        try:
            rehash(path)
        except EdgeRuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
