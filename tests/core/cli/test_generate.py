import io
import json

import pytest

from dovetail.core.cli import main
from dovetail.core.errors import EngineDeadError


def test_one_prompt_streams(engine, capsys):
    assert main(["generate", "abc", "--temperature", "0", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "cba\n"
    assert "using the bundled" in shown.err
    _, params = engine.asked[0]
    assert (params.temperature, params.max_tokens) == (0.0, 128)
    assert engine.config.device == "cpu"
    assert engine.closed


def test_stdin_is_the_prompt(engine, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("xy"))
    assert main(["generate", "--model", "m"]) == 0
    assert capsys.readouterr().out == "yx\n"
    assert engine.config.model == "m"


def test_several_prompts_keep_their_order(engine, capsys):
    assert main(["generate", "long prompt", "ab", "--max-tokens", "7"]) == 0
    assert capsys.readouterr().out == "--- 1: long prompt\ntpmorp gnol\n--- 2: ab\nba\n"
    assert {params.max_tokens for _, params in engine.asked} == {7}


def test_json_lines(engine, capsys):
    assert main(["generate", "--json", "--n", "2", "ab", "c", "--stop", "x", "--stop", "y"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["prompt"] == "ab"
    assert [part["text"] for part in first["completions"]] == ["ba", "ba"]
    assert first["completions"][0]["finish_reason"] == "length"
    assert (second["index"], second["num_prompt_tokens"]) == (1, 1)
    assert engine.asked[0][1].stop == ["x", "y"]


@pytest.mark.parametrize(
    ("words", "message", "status"),
    [
        (["", "a"], "the prompt is empty", 2),
        (["a", "--skip-tokenizer-init"], "generate needs the tokenizer", 2),
        (["a", "--top-p", "7"], "top_p must be", 1),
    ],
)
def test_wrong_wishes(engine, capsys, words, message, status):
    assert main(["generate", *words]) == status
    assert message in capsys.readouterr().err


def test_an_engine_that_cannot_start(engine, capsys):
    engine.failure = EngineDeadError("no such platform")
    assert main(["generate", "a"]) == 1
    assert capsys.readouterr().err.endswith("dovetail: error: no such platform\n")
    assert engine.closed


def test_the_seed_is_that_of_the_answer(engine):
    assert main(["generate", "ab", "--seed", "7"]) == 0
    assert main(["generate", "ab"]) == 0
    assert [params.seed for _, params in engine.asked] == [7, None]
