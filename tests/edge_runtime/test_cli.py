"""The `edge-runtime` command itself: help, dispatch, errors and exit codes."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_common import signals
from edge_common.errors import ConfigError
from edge_common.options import SECONDS, SEED, SHARE, THREADS, Parser
from edge_runtime import cli


@pytest.fixture(autouse=True)
def _keep_core_dumps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in this process must not change the process for good."""
    monkeypatch.setattr("edge_common.process.disable_core_dumps", lambda: None)


def command(monkeypatch: pytest.MonkeyPatch, behaviour: object) -> None:
    """Replace the code of `edge-runtime info`."""

    def run(args: object) -> int:
        if isinstance(behaviour, BaseException):
            raise behaviour
        return int(behaviour)  # type: ignore[call-overload]

    module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)


@pytest.mark.process
def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from edge_runtime.cli import main; code = main(['--help']);"
            "print([m for m in ('torch', 'onnxruntime', 'numpy', 'zmq', 'PIL', 'rich')"
            " if m in sys.modules], file=sys.stderr); sys.exit(code)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.strip() == "[]"
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout
    for taught in ("--local", "init --node", "--config edge.toml"):
        assert taught in done.stdout


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_crash_of_a_command_writes_no_memory_to_disk() -> None:
    code = (
        "import ctypes, sys; from edge_runtime.cli import main; main(['segment', '--help']);"
        "PR_GET_DUMPABLE = 3; sys.exit(ctypes.CDLL(None).prctl(PR_GET_DUMPABLE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists(name: str) -> None:
    assert importlib.util.find_spec(cli.COMMANDS[name].module) is not None


@pytest.mark.parametrize("name", ["init", "nodes"])
def test_help_of_each_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: edge-runtime {name}" in text
    assert "examples:" in text
    assert cli.main(["help", name]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_numbers_have_the_same_bounds_in_all_commands(name: str) -> None:
    parser = Parser()
    importlib.import_module(cli.COMMANDS[name].module).add_arguments(parser)
    alike = {"--threads": THREADS, "--max-exposure": SHARE, "--seed": SEED}
    alike |= {"--timeout": SECONDS, "--deadline": SECONDS}
    for action in parser._actions:
        assert action.type not in (int, float), action.option_strings
        for option in action.option_strings:
            assert action.type is alike.get(option, action.type), option


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("edge-runtime 0.")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "usage: edge-runtime"),
        (["segmnet"], "did you mean segment?"),
        (["--versoin"], "did you mean --version?"),
        (["qqq"], "--help` lists"),
        (["nodes", "--nonsense"], "unrecognized arguments"),
    ],
)
def test_usage_errors_exit_with_2(
    arguments: Sequence[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err


@pytest.mark.parametrize(
    ("behaviour", "code", "says"),
    [
        (0, 0, ""),
        (3, 3, ""),
        (ConfigError("it is wrong"), 1, "error: it is wrong\n"),
        (ConfigError("it is wrong", mend="correct it"), 1, "error: it is wrong\n  -> correct it\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            1,
            "error: this command needs torch, which is not installed\n"
            "  -> run `pip install '.[export]'` in a checkout of edge-runtime\n",
        ),
        (
            FileNotFoundError(2, "No such file or directory", "x.jpg"),
            1,
            "error: No such file or directory: x.jpg\n",
        ),
        (
            ValueError("odd"),
            1,
            "error: unexpected ValueError: odd\n"
            "  -> this is a bug: please report it with what --debug prints\n",
        ),
    ],
)
def test_every_error_becomes_one_line_and_an_exit_code(
    behaviour: object,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(monkeypatch, behaviour)
    assert cli.main(["info"]) == code
    assert capsys.readouterr().err == says


def test_with_json_an_error_has_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "nowhere", "--json"]) == 1
    said = capsys.readouterr()
    fields = json.loads(said.out)
    assert fields.keys() == {"error", "code", "mend"}
    assert fields["code"] == "missing"
    assert said.err.startswith(f"error: {fields['error']}")


@pytest.mark.parametrize("arguments", [["--debug", "info"], ["info", "--debug"]])
def test_debug_shows_the_traceback(
    arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(monkeypatch, ConfigError("mend this"))
    with pytest.raises(ConfigError):
        cli.main(arguments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_command_and_the_handlers_are_restored(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwound = []

    def run(args: object) -> int:
        try:
            signal.raise_signal(number)
        finally:
            unwound.append(number)
        return 0

    module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(["info"])
        assert stop.value.code == 128 + number
        assert unwound == [number]
        assert signal.getsignal(number) == signal.SIG_DFL
        # otherwise the next command's errors would end as this signal
        assert signals.received() is None
        signal.signal(number, signal.SIG_IGN)  # as under nohup
        assert cli.main(["info"]) == 0
    finally:
        signal.signal(number, before)


@pytest.mark.process
def test_missing_torch_is_no_traceback_in_a_real_process(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("some")
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['edge-runtime', 'export', "
        f"'--model', 'tiny', '--checkpoint', '{tmp_path}/x.pt', '--out', '{tmp_path}/y'];"
        "from edge_runtime.cli import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    *_, found, mend = done.stderr.splitlines()
    assert found.startswith("error: this command needs ")
    assert mend == "  -> run `pip install '.[export]'` in a checkout of edge-runtime"


@pytest.mark.process
def test_a_closed_output_pipe_is_no_error() -> None:
    shell = f"{sys.executable} -m edge_runtime.cli --help | head -n 1"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage:")
    assert done.stderr == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
        for action in parser._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                for each in action.choices.values():
                    yield from options(each)

    parser = argparse.ArgumentParser()
    importlib.import_module(cli.COMMANDS[name].module).add_arguments(parser)
    silent = [
        action.option_strings or action.dest
        for action in options(parser)
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert not silent
    assert parser.epilog
    assert "edge-runtime " + name in parser.epilog
