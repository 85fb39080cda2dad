import os
import subprocess
import sys

import pytest

from dovetail.core.cli import entry, main
from dovetail.core.errors import (
    CheckpointError,
    InvariantError,
    OutOfMemoryError,
    PluginError,
)

HEAVY = ("torch", "transformers", "numpy", "starlette", "uvicorn", "zmq", "tokenizers", "yaml")


def command(monkeypatch, action):
    """Make ``dovetail platforms`` do something else."""

    class Module:
        @staticmethod
        def add_arguments(parser):
            parser.add_argument("--number", type=int)

        @staticmethod
        def run(namespace):
            return action(namespace)

    monkeypatch.setattr(entry.importlib, "import_module", lambda name: Module)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], ["bench", "--help"]])
def test_overview(words, capsys):
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: dovetail")
    assert "serve" in shown


def test_without_a_command_the_overview_is_shown_and_the_status_is_2(capsys):
    assert main([]) == 2
    assert main(["bench"]) == 2
    assert "commands:" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dovetail 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sevre"], "unknown command 'sevre'; did you mean `dovetail serve`?"),
        (["zzz"], "unknown command 'zzz'; there are serve, generate, chat, bench, platforms"),
        (["--frob"], "unknown flag '--frob'; there are"),
        (["bench", "trougput"], "did you mean `dovetail bench throughput`?"),
        (["generate", "--max-model-length", "4"], "unknown flag --max-model-length; did you mean"
         " --max-model-len?"),
        (["generate", "--zzz"], "unknown flag --zzz; see `dovetail generate --help=all`"),
        (["generate", "--dtype", "int4"], "argument --dtype: must be one of auto, float32,"
         " bfloat16, float16, not 'int4'; see `dovetail generate --help`"),
        (["generate", "--max-model-len", "lots"], "must be a whole number of at least 1"),
        (["generate", "--max-model-len"], "argument --max-model-len: expected one argument"),
        (["serve", "a", "b"], "unexpected argument 'b'"),
        (["platforms", "--config", "x.yaml"], "unknown flag --config"),
    ],
)  # fmt: skip
def test_usage_errors_are_one_line_and_status_2(words, message, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("dovetail: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [CheckpointError("no\nsuch model"), OutOfMemoryError("no such"), PluginError("no such")],
)
def test_errors_of_dovetail_are_one_line_and_status_1(error, monkeypatch, capsys):
    def fail(namespace):
        raise error

    command(monkeypatch, fail)
    assert main(["platforms"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("dovetail: error: no such")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError(), InvariantError("engine", "x")])
def test_bugs_keep_their_traceback(error, monkeypatch):
    def fail(namespace):
        raise error

    command(monkeypatch, fail)
    with pytest.raises(type(error)):
        main(["platforms"])


def test_interrupt(monkeypatch, capsys):
    def interrupt(namespace):
        raise KeyboardInterrupt

    command(monkeypatch, interrupt)
    assert main(["platforms"]) == 130
    assert capsys.readouterr().err == ""


def test_status_of_the_command(monkeypatch):
    command(monkeypatch, lambda namespace: namespace.number)
    assert main(["platforms", "--number=7"]) == 7


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["serve", "--help"], ["bench", "serve", "--help=all"]]
)
def test_help_loads_nothing_heavy(words):
    found = run_python(
        "import sys; from dovetail.core.cli import main; status = main("
        f"{words!r}); print(); print([m for m in {HEAVY!r} if m in sys.modules], status)"
    )
    assert found.splitlines()[-1] == "[] 0"


@pytest.mark.parametrize(
    "code", ["import dovetail", "from dovetail.core.cli import main; main(['-h'])"]
)
def test_starts_within_three_tenths_of_a_second(code):
    """Counts the processor's time, since other programs share the machine."""
    times = []
    for _ in range(3):
        before = os.times()
        run_python(code)
        after = os.times()
        user = after.children_user - before.children_user
        times.append(user + after.children_system - before.children_system)
    assert min(times) < 0.3


def test_a_reader_that_goes_away_is_no_error():
    code = "import sys; from dovetail.core.cli import main; sys.exit(main(['serve', '--help=all']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(timeout=30)
