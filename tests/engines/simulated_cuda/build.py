"""Builds a simulated CUDA driver (``libcuda.c`` beside this file) and real pycuda for the tests of
the TensorRT engine.

pycuda has no wheels, so its source distribution is compiled for minutes, with the headers that
torch's dependencies bring. Both are cached in ``~/.cache/edge-runtime-tests`` for all checkouts.
They are rebuilt only when their sources, their headers or the interpreter change. ``python
tests/engines/simulated_cuda/build.py`` builds by hand and prints the environment to use.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The tests set XDG_CACHE_HOME to their own folder, so it is not used here.
CACHE = Path.home() / ".cache" / "edge-runtime-tests" / "simulated-cuda"
PYCUDA = (
    "pycuda==2026.1 "
    "--hash=sha256:759516160628ba06f32ce7e563e3f5b9214691dc9528a03ea99ea1073f4e14ba\n"
)  # of its dependencies, `import pycuda.driver` needs numpy alone
# -O0: compiling takes longer than running the tests. No wheel has the headers of CURAND.
_CONFIGURATION = "CUDA_ENABLE_CURAND = False\nCXXFLAGS = ['-O0', '-g0', '-w']\n"


class Unavailable(Exception):
    """This machine cannot build them. The text says what is missing."""


class Failed(Exception):
    """Compiling failed although all requirements are met."""


def environment() -> dict[str, str]:
    """Build the missing parts and return the environment variables that make Python find them.

    Processes that call this at the same time wait for the first one, which builds.

    Raises:
        Unavailable: no compiler, no headers, or pycuda's source can't be downloaded.
        Failed: the sources did not compile.
    """
    compiler, headers = _tools()
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = _library(compiler, headers, None)
        pycuda = _pycuda(headers, library)
        library = _library(compiler, headers, pycuda)
    return {"LD_LIBRARY_PATH": str(library), "PYTHONPATH": str(pycuda)}


def _tools() -> tuple[str, Path]:
    compiler = shutil.which("gcc")
    missing = [tool for tool in ("gcc", "g++", "nm") if shutil.which(tool) is None]
    if not sys.platform.startswith("linux") or missing or compiler is None:
        raise Unavailable(f"{', '.join(missing) or 'Linux'} is missing")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        raise Unavailable("Python.h is missing: install Python's development files")
    places = [
        Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "include",
        Path("/usr/local/cuda/include"),
    ]
    for place in places:
        if (place / "cuda.h").is_file():
            return compiler, place
    raise Unavailable(f"cuda.h is missing (looked in {' and '.join(map(str, places))})")


def _library(compiler: str, headers: Path, pycuda: Path | None) -> Path:
    """Compile the simulated driver and return its folder.

    With ``pycuda``, also add a stub for every function that pycuda links to and the driver lacks.
    """
    source = HERE / "libcuda.c"
    key = _key(source, headers / "cuda.h", Path(__file__), more=str(pycuda))
    folder = CACHE / f"driver-{key}"
    if (folder / "libcuda.so.1").exists():
        return folder
    temporary = CACHE / f"driver-{key}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    target = temporary / "libcuda.so.1"
    command = [compiler, "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-shared"]
    command += ["-fPIC", f"-I{headers}", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(target)]
    _run([*command, "-pthread", "-ldl"])
    if pycuda is not None:
        extension = next((pycuda / "pycuda").glob("_driver*.so"))
        wanted = _symbols(extension, "--undefined-only") - _symbols(target, "--defined-only")
        stubs = temporary / "stubs.c"
        stubs.write_text(
            "/* Functions pycuda links to and the simulation lacks: 801 is NOT_SUPPORTED. */\n"
            + "".join(f"int {name}(void) {{ return 801; }}\n" for name in sorted(wanted))
        )
        _run([*command, str(stubs), "-pthread", "-ldl"])
    (temporary / "libcuda.so").symlink_to("libcuda.so.1")
    temporary.rename(folder)
    return folder


def _symbols(library: Path, which: str) -> set[str]:
    lines = _run(["nm", "-D", which, str(library)]).splitlines()
    return {name for line in lines if (name := line.split()[-1]).startswith("cu")}


def _pycuda(headers: Path, library: Path) -> Path:
    """Compile pycuda against the simulated driver and return the folder to import it from."""
    ours = sorted(path for path in (HERE / "include").rglob("*") if path.is_file())
    more = PYCUDA + _CONFIGURATION + sys.version
    key = _key(headers / "cuda.h", *ours, more=more)
    folder = CACHE / f"pycuda-{key}"
    if folder.exists():
        return folder
    # pycuda's setup reads options from the home directory, and so does pip.
    home = CACHE / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    for name in (".cache", ".config", ".netrc", ".pip"):
        if (real := Path.home() / name).exists():
            (home / name).symlink_to(real)
    (home / ".aksetup-defaults.py").write_text(_CONFIGURATION)
    requirements = home / "requirements.txt"
    requirements.write_text(PYCUDA)
    temporary = CACHE / f"pycuda-{key}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary=pycuda", "--require-hashes", "--target", str(temporary)]
    command += ["--no-cache-dir"]  # the cache may hold a wheel built on a real driver
    variables = {
        "HOME": str(home),
        "CPLUS_INCLUDE_PATH": f"{headers}:{HERE / 'include'}",
        "LDFLAGS": f"-L{library} -Wl,--no-as-needed",
        # A toolkit on the PATH would supply headers of another version.
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
    }
    try:
        _run([*command, "-r", str(requirements)], variables)
    except Failed as error:
        if "Failed building wheel" in str(error):
            raise
        raise Unavailable(f"pycuda's source cannot be had: {error}") from error
    temporary.rename(folder)
    return folder


def _key(*sources: Path, more: str) -> str:
    digest = hashlib.sha256(more.encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str], more: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, env={**os.environ, **(more or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        text = (done.stdout + done.stderr).strip()[-4000:]
        raise Failed(f"`{' '.join(command)}` failed:\n{text}")
    return done.stdout


if __name__ == "__main__":
    for name, value in environment().items():
        print(f"export {name}={value}")
