"""The doctor's findings from a machine's files and its libraries' answers, recorded or
simulated."""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.machine import diagnosis
from edge_runtime.machine.diagnosis import Check, examine
from edge_runtime.machine.probes import Answer
from engines.bundle import shipped_bundle

BOARDS = Path(__file__).resolve().parents[3] / "jetson" / "boards"
NANO = BOARDS / "orin-nano-8gb-jetpack-6.2"
THOR = BOARDS / "agx-thor-jetpack-7.1"
CONTAINER = BOARDS / "orin-container-without-devices"
PC = BOARDS / "x86-workstation"

MISSING = Answer(missing=True)
NO_DRIVER = Answer(error="no NVIDIA driver is installed here")
ORIN = Answer(
    {
        "name": "Orin",
        "count": 1,
        "compute_capability": "8.7",
        "driver": "540.4.0",
        "cuda": "12.6",
        "memory_bytes": 7_990_000_000,
        "integrated": True,
    }
)
RTX_4090 = Answer(
    {
        "name": "NVIDIA GeForce RTX 4090",
        "count": 2,
        "compute_capability": "8.9",
        "driver": "550.163.01",
        "cuda": "12.4",
        "memory_bytes": 25_250_000_000,
        "integrated": False,
    }
)
PYCUDA = Answer({"version": "2026.1", "free_bytes": 20_000_000_000, "total_bytes": 25_000_000_000})
CPU = "ONNX Runtime on the CPU"


def ort(cuda: str | None = None, stderr: str = "") -> Answer:
    providers = ["CPUExecutionProvider"]
    if cuda is not None:
        providers.insert(0, "CUDAExecutionProvider")
    return Answer({"version": "1.23.2", "providers": providers, "cuda": cuda}, stderr=stderr)


def library(*version: int) -> Answer:
    return Answer({"version": list(version)})


def bundle(path: Path) -> Answer:
    return Answer({"path": str(path), "model": "tiny", "precision": "fp32"})


def engines(*warnings: str, mend: str = "", **opened: str) -> Answer:
    told = [{"text": text, "mend": mend} for text in warnings]
    return Answer({"opened": opened or {"tail": CPU}, "warnings": told})


Examined = Callable[..., dict[str, Check]]


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> Examined:
    """Examine a tree. Libraries answer as given; the others are not installed."""

    def go(root: Path, require: Iterable[Any] = (), **answers: Answer) -> dict[str, Check]:
        given = {
            "packages": Answer({"versions": {"numpy": "2.2.6"}, "curve": True}),
            "onnxruntime": ort(),
            "tensorrt": MISSING,
            "tensorrt-rtx": MISSING,
            "gpu": NO_DRIVER,
            "pycuda": MISSING,
            "cuda-python": MISSING,
            "bundle": bundle(shipped_bundle()),
            "engines": engines(),
            **{name.replace("_", "-"): answer for name, answer in answers.items()},
        }
        monkeypatch.setattr("edge_runtime.machine.probes.ask", lambda probes, timeout_s: given)
        monkeypatch.setattr(diagnosis, "_version", lambda name: builds.get(name))
        checks = examine(root, require=require)
        for check in checks:
            assert "\n" not in check.detail + (check.mend or "")
        assert len({check.id for check in checks}) == len(checks)
        return {check.id: check for check in checks}

    builds: dict[str, str] = {"onnxruntime": "1.23.2"}
    go.builds = builds  # type: ignore[attr-defined]
    return go


def statuses(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.status for name, check in checks.items()}


def test_a_complete_jetson_is_ok(examined: Examined) -> None:
    checks = examined(
        THOR,
        gpu=Answer({**(ORIN.facts or {}), "name": "Thor", "cuda": "13.0"}),
        tensorrt=library(10, 13, 3),
        pycuda=PYCUDA,
        cuda_python=Answer({"version": "13.0.3"}),
        engines=engines(stack="TensorRT", tail="TensorRT", decoder=CPU),
        require=["tensorrt"],
    )
    bad = {name: s for name, s in statuses(checks).items() if s not in ("ok", "none")}
    assert bad == {}
    assert checks["board"].detail.startswith("NVIDIA Jetson AGX Thor Developer Kit")
    assert checks["jetpack"].detail == "7.1, L4T 38.4.0"
    assert checks["gpu"].detail.startswith("Thor, compute capability")
    assert checks["driver"].detail == "L4T 38.4.0, for CUDA up to 13.0"
    assert checks["cuda"].detail == "toolkit 13.0.2"
    assert checks["memory"].detail.endswith("free, shared with the GPU; swap none")
    assert checks["power"].detail == "MAXN (mode 0)"
    assert checks["tensorrt"].detail == "10.13.3"
    assert checks["engines"].detail == f"TensorRT: stack, tail; {CPU}: decoder"
    assert checks["require-tensorrt"].status == "ok"
    assert [check.mend for check in checks.values() if check.mend] == []


def test_the_fastest_mode_is_given_with_this_board_s_number(examined: Examined) -> None:
    assert examined(NANO)["power"].mend.startswith("sudo nvpmodel -m 2 ")  # type: ignore[union-attr]
    power = examined(BOARDS / "agx-orin-64gb-jetpack-6.1")["power"]
    assert (power.status, "MODE_30W (mode 2); MAXN is" in power.detail) == ("warn", True)
    assert "nvpmodel -m 0 " in (power.mend or "")


def test_heat_is_reported(examined: Examined) -> None:
    heat = examined(BOARDS / "agx-orin-64gb-jetpack-6.1")["heat"]
    assert (heat.status, heat.detail) == (
        "warn",
        "cpu-thermal 100 °C: hot enough to be slowed down",
    )
    assert examined(NANO)["heat"] == Check("heat", "ok", "heat", "tj-thermal 49 °C")


def test_a_jetson_without_jetpack_s_packages(examined: Examined) -> None:
    jetpack = examined(BOARDS / "agx-orin-64gb-jetpack-6.1", gpu=ORIN)["jetpack"]
    assert jetpack.status == "none"
    assert jetpack.detail.startswith("6.1, L4T 36.4.0; its packages")
    assert jetpack.mend == "sudo apt update && sudo apt install nvidia-jetpack"


def test_an_outdated_jetson(examined: Examined, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R35 (release), REVISION: 4.1, GCID: 1")
    jetpack = examined(tmp_path)["jetpack"]
    assert (jetpack.status, jetpack.detail[:22]) == ("warn", "5.1.2, L4T 35.4.1: old")


def test_a_container_without_the_gpu(examined: Examined) -> None:
    gpu = examined(CONTAINER)["gpu"]
    assert gpu.status == "warn"  # the CPU suffices, unless more is required
    assert (gpu.mend or "").startswith("docker run --runtime nvidia")
    assert examined(CONTAINER)["jetpack"].status == "none"
    required = examined(CONTAINER, require=["cuda"])["require-cuda"]
    assert (required.status, required.mend) == ("fail", gpu.mend)


def test_no_gpu_at_all_is_fine(examined: Examined, tmp_path: Path) -> None:
    checks = examined(tmp_path)
    assert set(statuses(checks).values()) <= {"ok", "none"}
    assert "everything runs on the CPU" in checks["gpu"].detail
    assert checks["gpu"].mend is None


def test_a_gpu_that_the_driver_cannot_use(examined: Examined) -> None:
    gpu = examined(PC, gpu=Answer(error="the NVIDIA driver failed in cuInit: unknown (error 999)"))
    assert gpu["gpu"].status == "fail"
    assert "error 999" in gpu["gpu"].detail
    assert (gpu["gpu"].mend or "").startswith("sudo dmesg")


def test_a_gpu_without_permission_for_this_user(
    examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    # root has permission, so the answer is simulated
    monkeypatch.setattr("os.access", lambda path, mode: False)
    gpu = examined(NANO, gpu=Answer(error="operation not supported"))["gpu"]
    assert gpu.status == "fail"
    assert "/dev/nvgpu/igpu0/ctrl" in gpu.detail
    assert 'usermod -aG video,render "$USER"' in (gpu.mend or "")


def test_a_driver_older_than_cuda(examined: Examined) -> None:
    cuda = examined(PC, gpu=RTX_4090)["cuda"]
    assert (cuda.status, cuda.detail) == (
        "warn",
        "13.0.2 needs driver 580 or newer, this one is 550.163.01",
    )
    assert "ubuntu-drivers install" in (cuda.mend or "")


def test_little_memory_is_reported(examined: Examined, tmp_path: Path) -> None:
    tree = shutil.copytree(NANO, tmp_path / "root")
    (tree / "proc/meminfo").write_text("MemTotal: 7802840 kB\nMemAvailable: 600000 kB\n")
    memory = examined(tree)["memory"]
    assert memory.status == "warn"
    assert memory.detail == "0.6 GB of 8.0 GB free, shared with the GPU; swap none"
    assert (memory.mend or "").startswith("sudo init 3")


def test_a_graphics_card_has_its_own_memory(examined: Examined) -> None:
    checks = examined(PC, gpu=RTX_4090, pycuda=PYCUDA)
    assert "of the GPU's 20.0 GB of 25.0 GB" in checks["memory"].detail
    assert "RTX 4090 (the first of 2)" in checks["gpu"].detail


class TestTensorrt:
    def test_a_known_defect_names_its_source_and_verify(self, examined: Examined) -> None:
        check = examined(NANO, gpu=ORIN, tensorrt=library(10, 3, 0))["tensorrt"]
        assert check.status == "warn"
        assert check.detail.startswith("10.3.0 has known defects: ")
        assert "https://github.com/NVIDIA/TensorRT/issues/" in check.detail
        assert (check.mend or "").startswith("edge-runtime verify ")

    def test_the_system_s_package_is_hidden_from_this_virtual_environment(
        self, examined: Examined, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            diagnosis, "_python_here", lambda: ("3.10", Path("/venv"), Path("/usr"))
        )
        check = examined(NANO, gpu=ORIN)["tensorrt"]
        assert check.status == "warn"
        assert check.detail.startswith("10.3.0.30 belongs to the system's Python 3.10; ")
        assert "include-system-site-packages = true" in (check.mend or "")

    @pytest.mark.parametrize(
        "here",
        [
            ("3.11", "/venv", "/usr"),  # of another version
            ("3.10", "/venv", "/opt/python"),  # of another installation
            ("3.10", "/opt/conda", "/opt/conda"),  # no virtual environment
        ],
    )
    def test_the_system_s_package_is_hidden_from_another_python(
        self, examined: Examined, monkeypatch: pytest.MonkeyPatch, here: tuple[str, str, str]
    ) -> None:
        said = (here[0], Path(here[1]), Path(here[2]))
        monkeypatch.setattr(diagnosis, "_python_here", lambda: said)
        mend = examined(NANO, gpu=ORIN)["tensorrt"].mend or ""
        assert mend.startswith("/usr/bin/python3.10 -m venv --system-site-packages ")

    @pytest.mark.process
    def test_the_suggested_command_opens_the_environment(self, tmp_path: Path) -> None:
        """Run the sed line on a real virtual environment."""
        venv.create(tmp_path / "v", with_pip=False)
        subprocess.run(
            diagnosis.OPEN_VENV,
            shell=True,
            check=True,
            env={**os.environ, "VIRTUAL_ENV": str(tmp_path / "v")},
        )
        done = subprocess.run(
            [
                tmp_path / "v/bin/python",
                "-c",
                "import site, sys; print(sys.base_prefix in site.PREFIXES)",
            ],
            capture_output=True,
            check=True,
            text=True,
        )
        assert done.stdout == "True\n"

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            (
                Answer(error="crashed the process (SIGSEGV)", end="crashed"),
                "crashed the process (SIGSEGV)",
            ),
            (Answer(error="gave no answer within 20 s", end="late"), "gave no answer within 20 s"),
            (Answer(error="ImportError: libnvinfer.so.10: …"), "fails: ImportError: libnvinfer"),
        ],
    )
    def test_a_broken_tensorrt_fails(self, examined: Examined, answer: Answer, said: str) -> None:
        check = examined(NANO, gpu=ORIN, tensorrt=answer)["tensorrt"]
        assert check.status == "fail"
        assert said in check.detail
        assert "apt install --reinstall python3-libnvinfer" in (check.mend or "")
        check = examined(PC, gpu=RTX_4090, tensorrt_rtx=answer)["tensorrt-rtx"]
        assert check.status == "fail"
        assert check.mend == "pip install --force-reinstall tensorrt-rtx-cu13"

    def test_tensorrt_is_suggested_where_it_would_help(
        self, examined: Examined, tmp_path: Path
    ) -> None:
        assert examined(PC, gpu=RTX_4090)["tensorrt-rtx"].mend == "pip install tensorrt-rtx-cu13"
        assert examined(tmp_path)["tensorrt-rtx"].mend is None
        bare = examined(BOARDS / "agx-orin-64gb-jetpack-6.1", gpu=ORIN)
        assert "python3-libnvinfer" in (bare["tensorrt"].mend or "")
        assert bare["tensorrt-rtx"].mend is None

    def test_tensorrt_rtx_on_an_unsupported_gpu(self, examined: Examined) -> None:
        h200 = Answer({**(RTX_4090.facts or {}), "compute_capability": "9.0"})
        checks = examined(PC, ["tensorrt"], gpu=h200, tensorrt_rtx=library(1, 7, 1), pycuda=PYCUDA)
        assert checks["tensorrt-rtx"].status == "warn"
        assert checks["tensorrt-rtx"].mend is None
        assert "9.0" in checks["tensorrt-rtx"].detail
        assert checks["require-tensorrt"].status == "fail"

    def test_pycuda_is_suggested_only_where_it_would_run(
        self, examined: Examined, tmp_path: Path
    ) -> None:
        pycuda = examined(NANO, gpu=ORIN, tensorrt=library(10, 5, 0))["pycuda"]
        assert (pycuda.status, pycuda.mend) == (
            "warn",
            "PATH=/usr/local/cuda/bin:$PATH pip install pycuda",
        )
        assert examined(tmp_path, tensorrt_rtx=library(1, 7, 1))["pycuda"].status == "none"

    def test_pycuda_without_a_gpu_is_no_failure(self, examined: Examined, tmp_path: Path) -> None:
        answer = Answer(error="LogicError: cuInit failed: no CUDA-capable device is detected")
        assert examined(tmp_path, pycuda=answer)["pycuda"].status == "none"
        assert examined(NANO, pycuda=answer)["pycuda"].status == "fail"

    def test_cuda_python_for_a_newer_cuda_than_the_drivers(self, examined: Examined) -> None:
        check = examined(NANO, gpu=ORIN, cuda_python=Answer({"version": "13.5.0"}))["cuda-python"]
        assert (check.status, check.mend) == (
            "warn",
            "pip install --force-reinstall 'cuda-python==12.*'",
        )
        check = examined(NANO, gpu=ORIN, cuda_python=Answer({"version": "12.6.2"}))["cuda-python"]
        assert check.status == "ok"

    def test_cuda_python_is_suggested(self, examined: Examined) -> None:
        check = examined(NANO, gpu=ORIN, tensorrt=library(10, 5, 0))["cuda-python"]
        assert (check.status, check.mend) == ("none", "pip install 'cuda-python==12.*'")


class TestOnnxruntime:
    def test_two_builds_in_one_folder_are_reported(self, examined: Examined) -> None:
        examined.builds["onnxruntime-gpu"] = "1.23.2"  # type: ignore[attr-defined]
        check = examined(PC, gpu=RTX_4090)["onnxruntime"]
        assert check.status == "warn"
        assert "onnxruntime and onnxruntime-gpu are both installed" in check.detail
        assert check.mend == (
            "pip uninstall -y onnxruntime onnxruntime-gpu && "
            "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )

    def test_cuda_with_a_missing_library_is_reported(self, examined: Examined) -> None:
        answer = ort("could not start", "[E:…] libcudnn.so.9: cannot open shared object file: No")
        check = examined(PC, gpu=RTX_4090, onnxruntime=answer)["onnxruntime"]
        assert check.status == "fail"
        assert check.detail.endswith("but CUDA fails: libcudnn.so.9 is missing")
        assert check.mend == "pip install 'onnxruntime-gpu[cuda,cudnn]'"

    def test_the_gpu_build_without_a_gpu_is_fine(self, examined: Examined, tmp_path: Path) -> None:
        check = examined(tmp_path, onnxruntime=ort("could not start"))["onnxruntime"]
        assert check.status == "ok"

    def test_the_cpu_build_beside_a_gpu_is_reported(self, examined: Examined) -> None:
        assert examined(PC, gpu=RTX_4090)["onnxruntime"].status == "warn"
        # There is no other build for a Jetson.
        assert examined(NANO, gpu=ORIN)["onnxruntime"].status == "ok"

    def test_a_missing_onnxruntime_fails(self, examined: Examined) -> None:
        check = examined(PC, onnxruntime=MISSING)["onnxruntime"]
        assert (check.status, check.mend) == ("fail", "pip install --force-reinstall onnxruntime")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(error="ImportError: numpy"), "ImportError: numpy"),
        (Answer({"versions": {"pyzmq": "27"}, "curve": False}), "no CURVE"),
    ],
)
def test_required_packages_are_checked(examined: Examined, answer: Answer, said: str) -> None:
    check = examined(PC, packages=answer)["packages"]
    assert check.status == "fail"
    assert said in check.detail
    assert "pip install --force-reinstall" in (check.mend or "")


def test_missing_curve_is_attributed_to_libzmq(examined: Examined) -> None:
    versions = {"pyzmq": "27", "libzmq": "4.3.5", "Pillow": "13"}
    check = examined(PC, packages=Answer({"versions": versions, "curve": True}))["packages"]
    assert check.detail == "pyzmq 27, libzmq 4.3.5 with CURVE, Pillow 13"


def test_a_bundle_is_not_blamed_for_missing_packages(examined: Examined) -> None:
    error = Answer(error="ModuleNotFoundError: No module named 'msgspec'")
    checks = examined(PC, packages=error, bundle=error, engines=error)
    assert checks["packages"].status == "fail"
    assert checks["bundle"].status == "none"
    assert "engines" not in checks


def test_a_damaged_bundle_is_reported_once(examined: Examined) -> None:
    error = Answer(error="tail.onnx is damaged")
    checks = examined(PC, bundle=error, engines=error)
    assert checks["bundle"].status == "fail"
    assert "--no-deps ." in (checks["bundle"].mend or "")
    assert "engines" not in checks


def test_the_remedy_of_an_error_is_shown_as_it_is(examined: Examined, tmp_path: Path) -> None:
    error = Answer(error="there is no plan", mend="edge-runtime build b --stage tail")
    check = examined(NANO, engines=error)["engines"]
    assert (check.status, check.detail, check.mend) == ("fail", error.error, error.mend)


def test_a_probe_that_is_too_slow_names_a_command_with_more_time(examined: Examined) -> None:
    late = Answer(error="gave no answer within 20 s", end="late")
    assert (examined(NANO, bundle=late)["bundle"].mend or "").startswith("edge-runtime info ")
    assert (examined(NANO, engines=late)["engines"].mend or "").endswith(" --timeout 200")


def test_a_plan_that_is_passed_over_names_what_helps(examined: Examined) -> None:
    said, mend = "TensorRT is passed over: stale", "edge-runtime build b --stage tail"
    check = examined(NANO, engines=engines(said, mend=mend, tail=CPU))["engines"]
    assert (check.status, check.mend) == ("warn", mend)
    assert check.detail.startswith(f"{CPU} runs every stage. TensorRT is passed over")


def test_a_read_only_bundle_is_reported(
    examined: Examined, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert examined(tmp_path)["disk"].status == "none"
    disk = examined(tmp_path, tensorrt_rtx=library(1, 7, 1))["disk"]
    assert disk.status == "warn"
    assert (disk.mend or "").startswith("cp -r ")


def test_a_full_disk_is_reported(
    examined: Examined, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert examined(tmp_path)["disk"].detail.startswith("0.3 GB free where")
    assert examined(tmp_path)["disk"].status == "warn"


@pytest.mark.parametrize(
    ("answers", "ok", "says"),
    [
        ({}, False, "no GPU can be used"),
        ({"gpu": ORIN}, False, "TensorRT: "),
        ({"gpu": ORIN, "tensorrt": library(10, 5, 0)}, False, "pycuda: not installed"),
        ({"gpu": ORIN, "tensorrt": library(10, 5, 0), "pycuda": PYCUDA}, True, "can run"),
        ({"gpu": ORIN, "tensorrt": library(10, 3, 0), "pycuda": PYCUDA}, True, "`verify` measures"),
    ],
)
def test_requiring_tensorrt_names_the_first_missing_part(
    examined: Examined, answers: dict[str, Answer], ok: bool, says: str
) -> None:
    check = examined(NANO, require=["tensorrt", "tensorrt"], **answers)["require-tensorrt"]
    assert (check.status == "ok") is ok
    assert says in check.detail
    assert (check.mend is None) is ok


def test_requiring_cuda(examined: Examined) -> None:
    assert examined(PC, ["cuda"], gpu=RTX_4090, onnxruntime=ort(""))["require-cuda"].status == "ok"
    lacking = examined(PC, ["cuda"], gpu=RTX_4090, onnxruntime=ort())["require-cuda"]
    assert lacking.status == "fail"
    assert "onnxruntime-gpu" in (lacking.mend or "")


class TestItNeverRaises:
    def boom(self, *args: object, **options: object) -> Any:
        raise LookupError("surprise")

    def test_with_unexpected_files(
        self, examined: Examined, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(diagnosis, "read_board", self.boom)
        checks = examined(NANO)
        assert checks["files"].status == "fail"
        assert "LookupError: surprise (a bug)" in checks["files"].detail
        assert checks["packages"].status == "ok"

    def test_when_no_child_process_can_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edge_runtime.machine.probes.ask", self.boom)
        checks = {check.id: check for check in examine(NANO, require=["cuda", "tensorrt"])}
        assert "LookupError: surprise" in checks["probes"].detail
        assert checks["board"].status == "ok"
        assert checks["packages"].detail == "was not asked"

    @pytest.mark.parametrize("name", diagnosis._CHECKS)
    def test_when_a_check_raises(
        self, examined: Examined, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setitem(diagnosis._CHECKS, name, self.boom)
        checks = examined(NANO, ["cuda", "tensorrt"], gpu=ORIN)
        assert checks[name].status == "fail"
        assert checks[name].detail.startswith("this check failed: LookupError: surprise")
        assert checks["board" if name != "board" else "memory"].status == "ok"

    def test_when_a_probe_answers_nonsense(self, examined: Examined) -> None:
        checks = examined(NANO, **dict.fromkeys(("gpu", "tensorrt", "onnxruntime"), Answer({})))
        for name in ("gpu", "tensorrt", "onnxruntime"):
            assert "KeyError" in checks[name].detail

    @pytest.mark.parametrize("tree", sorted(p.name for p in BOARDS.iterdir() if p.is_dir()))
    def test_on_any_board(self, examined: Examined, tree: str) -> None:
        checks = examined(BOARDS / tree, ["cuda", "tensorrt"])
        assert not any("(a bug)" in check.detail for check in checks.values())


def test_lines_are_printable_short_and_without_the_home_folder(
    examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/canary")
    error = Answer(error="\x1b[31mImportError: /home/canary/v/x.so: " + "long " * 1000)
    detail = examined(NANO, tensorrt=error)["tensorrt"].detail
    assert "\x1b" not in detail
    assert "ImportError: ~/v/x.so: long" in detail
    assert len(detail) <= 600
    # A folder that only shares the prefix is another one.
    other = examined(NANO, tensorrt=Answer(error="/home/canary2/x"))["tensorrt"].detail
    assert "/home/canary2/x" in other
