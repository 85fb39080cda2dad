"""The benchmark of the CPU, with a model that is there in a moment and peers that are made up."""

import json
import shlex
import sys

import pytest

from benchmarks import cpu, processes
from benchmarks.grid import GRID, Cell, Limits, cells
from dovetail.core.bench.roofline import StepCost
from dovetail.core.contracts.platform import Rates
from tests.checkpoints import make_checkpoint
from tests.thorough import thorough

FAST, PROMPT = Cell(2, 8, 4), Cell(2, 16, 1)
SMALL = ["--rounds", "1", "--repeats", "1", "--cells", f"{FAST},{PROMPT}"]


def says(*lines, status=0):
    """A command that prints these lines."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return shlex.join([sys.executable, "-c", f"print({text!r}); exit({status})"])


def took(cell, seconds, **more):
    return {"requests": cell.requests, "prompt": cell.prompt, "new": cell.new, "s": seconds, **more}


def result(folder):
    return json.loads((folder / "result.json").read_text())


def cell_of(engine, cell):
    (found,) = (entry for entry in engine["cells"] if entry["cell"] == str(cell))
    return found


def test_the_engine_beside_a_peer(tmp_path):
    peer = says("loading", "ready s 0.5", took(FAST, 1e9), took(PROMPT, 1e-9), "{'no': json}")
    words = ["--shape", "tiny", *SMALL, "--peer", f"other={peer}", "--output", str(tmp_path)]
    assert cpu.main(words) == 0
    ours, theirs = result(tmp_path)["engines"]
    assert (ours["name"], theirs["name"]) == ("dovetail", "other")
    for cell in (FAST, PROMPT):
        entry = cell_of(ours, cell)
        assert entry["tokens_per_second"] == pytest.approx(cell.tokens / entry["seconds"][0])
        assert entry["tokens_per_second"] > 1
        assert 0 < entry["limit_fraction"] < 1
    assert cell_of(theirs, FAST)["ratio"] > 1e6
    assert cell_of(theirs, PROMPT)["ratio"] < 1e-6
    assert ours["ready_seconds"][0] > 0.1
    assert theirs["ready_seconds"] == [0.5]
    assert ours["devices"][0]["read_bytes_per_second"] > 1e6
    table = (tmp_path / "result.md").read_text()
    assert "|  | 2x8+4 | 2x16+1 | load to ready, s |" in table
    assert "| other | 0.0 | 32000000000.0 | 0.5 |" in table
    assert "dovetail, of the machine's limit" in table
    assert "benchmarks.grid FOLDER/tiny" in table


@thorough
def test_a_checkpoint_on_disk_and_quantized(tmp_path):
    model = make_checkpoint("llama", tmp_path / "model")
    words = ["--model", str(model), "--quantization", "int8", "--device", "reference"]
    assert cpu.main([*words, *SMALL, "--output", str(tmp_path)]) == 0
    assert cell_of(result(tmp_path)["engines"][0], FAST)["tokens_per_second"] > 1
    table = (tmp_path / "result.md").read_text()
    assert "Model: `model`; dovetail with int8" in table
    assert f"{model} --device reference" in table


@pytest.fixture
def scripted(monkeypatch):
    """Rounds of which each command says what is next in its list."""
    started = []

    def use(**lines):
        def run(command, limit):
            (name,) = command
            started.append(name)
            text = "\n".join(json.dumps(line) for line in lines[name].pop(0))
            return processes.Outcome(status=0, seconds=1.0, output=text, errors="")

        monkeypatch.setattr(cpu, "run", run)
        return started

    return use


def test_rounds_take_turns_and_ratios_are_of_the_same_round(scripted, tmp_path):
    started = scripted(
        us=[[took(FAST, s, limit_s=0.5)] for s in (1.0, 4.0, 2.0)],
        a=[[took(FAST, s)] for s in (3.0, 4.0, 4.0)],
        b=[[took(FAST, s)] for s in (1.0, 2.0, 4.0)],
    )
    words = ["--ours", "us", "--peer", "a=a", "--peer", "b=b", "--rounds", "3"]
    assert cpu.main([*words, "--cells", str(FAST), "--output", str(tmp_path)]) == 0
    assert started == ["us", "a", "b", "a", "b", "us", "b", "us", "a"]
    us, a, b = (cell_of(engine, FAST) for engine in result(tmp_path)["engines"])
    assert us["seconds"] == [1.0, 4.0, 2.0]
    assert us["tokens_per_second"] == 8 / 2.0
    assert us["limit_fraction"] == 0.5 / 2.0
    assert (us["ratio"], a["ratio"], b["ratio"]) == (None, 2.0, 1.0)
    table = (tmp_path / "result.md").read_text()
    assert (a["ratios"], b["ratios"]) == ([3.0, 1.0, 2.0], [1.0, 0.5, 2.0])
    assert "| dovetail / a | 2.00 |  |" in table
    assert all(f">{word}<" in (tmp_path / "result.svg").read_text() for word in ("a", "b", "2.00"))
    assert "| dovetail, of the machine's limit | 25% |  |" in table


def test_rounds_that_are_done_are_written_when_a_later_one_is_given_up(scripted, tmp_path):
    scripted(us=[[took(FAST, 1.0)], [took(FAST, 2.0)]])
    words = ["--ours", "us", "--rounds", "3", "--cells", str(FAST), "--output", str(tmp_path)]
    with pytest.raises(IndexError):  # as Ctrl-C would end it
        cpu.main(words)
    assert result(tmp_path)["rounds"] == 2
    assert cell_of(result(tmp_path)["engines"][0], FAST)["seconds"] == [1.0, 2.0]
    assert "rounds: 2." in (tmp_path / "result.md").read_text()
    assert not (tmp_path / "result.svg").exists(), "nothing is compared"


def test_a_peer_that_fails_does_not_lose_the_others(tmp_path, capsys):
    peers = {
        "broken": says(took(FAST, 2.0), status=3),
        "silent": says("nothing to see"),
        "absent": "/no/such/program",
    }
    words = [word for name, command in peers.items() for word in ("--peer", f"{name}={command}")]
    ours = says("ready s 1.5", took(FAST, 1.0))
    assert cpu.main(["--ours", ours, *words, *SMALL, "--output", str(tmp_path)]) == 1
    table = (tmp_path / "result.md").read_text()
    assert "FAILED: broken in round 1: status 3" in table
    assert "FAILED: silent in round 1: it printed no line for any cell" in table
    assert "FAILED: absent in round 1: it cannot be started" in table
    assert "| dovetail | 8.0 |  | 1.5 |" in table


def test_a_process_that_does_not_end_is_said(monkeypatch):
    slow = processes.Outcome(status=-9, seconds=9.7, output="", errors="", timed_out=True)
    assert cpu.read(slow).error == "not over after 10 s"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--peer", "nameless"], "NAME=COMMAND"),
        (["--peer", "x="], "NAME=COMMAND"),
        (["--peer", "a=b", "--peer", "a=c"], "each name once"),
        (["--peer", "dovetail=x"], "each name once"),
        (["--rounds", "0"], "not a number of at least 1"),
        (["--shape", "tiny", "--model", "x"], "not allowed with"),
        (["--cells", "1x2"], "invalid cells value"),
    ],
)
def test_wrong_wishes(capsys, words, message):
    with pytest.raises(SystemExit):
        cpu.main(words)
    assert message in capsys.readouterr().err


def test_the_limit_is_of_the_rates_around_a_cell():
    measured = [
        Rates(read_bytes_per_second=r, matrix_flops_per_second=1e30) for r in (1e9, 2e9, 4e9)
    ]
    cost = StepCost(weight_bytes=10**9, layer_flops=1, head_flops=1, spans=())
    limits = Limits(cost, iter(measured).__next__)
    assert limits.rates is measured[0]
    assert limits.of(Cell(1, 1, 1)) == pytest.approx((1 + 0.5) / 2)
    assert limits.of(Cell(1, 1, 1)) == pytest.approx((0.5 + 0.25) / 2)
    assert limits.rates is measured[2]


def test_the_grid_is_written_as_it_is_read():
    assert cells(",".join(map(str, GRID))) == GRID
    assert (Cell(4, 512, 1).tokens, Cell(8, 32, 64).tokens) == (2048, 512)
