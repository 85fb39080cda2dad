from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dovetail.core.engine.api import CompletionDelta, EngineStats, RequestDelta
from dovetail.core.engine.messages import Outputs, decode_from_engine, encode
from dovetail.core.engine.outputs import OutputAccumulator, OutputProcessor, ProcessResult
from dovetail.core.errors import RequestError, RequestFailedError
from dovetail.core.request import PromptTokens, SamplingParams
from dovetail.core.tokenizer import Tokenizer, load_tokenizer
from dovetail.core.update import TokenAlternatives, Update
from tests.core.tokenizer.folders import llama3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(llama3(tmp_path_factory.mktemp("llama3")))


@pytest.fixture
def processor(tokenizer: Tokenizer) -> OutputProcessor:
    return OutputProcessor(tokenizer)


def add(
    processor: OutputProcessor, tokenizer: Tokenizer, ids: Sequence[int] = (1,), **params: Any
) -> PromptTokens:
    prompt = PromptTokens(text="Say", token_ids=tokenizer.encode("Say"))
    eos = tokenizer.eos_token_id
    assert eos is not None
    given = SamplingParams(n=len(ids), max_tokens=1000, **params)
    processor.add("r", prompt, given, list(ids), [eos, *(given.stop_token_ids or [])])
    return prompt


def only(result: ProcessResult) -> CompletionDelta:
    """The one completion of the one delta."""
    [(request_id, delta)] = result.deltas
    assert request_id == "r"
    assert isinstance(delta, RequestDelta)
    [completion] = delta.completions
    return completion


def one_by_one(
    processor: OutputProcessor, ids: list[int], reason: str | None = None
) -> list[CompletionDelta]:
    """Send the tokens in an update each, until the completion has ended."""
    deltas = []
    for i, token_id in enumerate(ids, 1):
        finish = reason if i == len(ids) else None
        deltas.append(only(processor.process([Update(1, [token_id], finish)])))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


@pytest.mark.parametrize("text", [" hello, world", "日本語 👋🏽 ok", "def f(x):\n\treturn x\n"])
@pytest.mark.parametrize("at_once", [True, False])
def test_text_adds_up(
    processor: OutputProcessor, tokenizer: Tokenizer, text: str, at_once: bool
) -> None:
    add(processor, tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if at_once:
        deltas = [only(processor.process([Update(1, ids, "length")]))]
    else:
        deltas = one_by_one(processor, ids, "length")
    assert "".join(delta.text for delta in deltas) == text
    assert [i for delta in deltas for i in delta.token_ids] == ids
    assert deltas[-1].finish_reason == "length"
    assert not any("\ufffd" in delta.text for delta in deltas)
    assert not processor.is_open(1)


def test_an_unfinished_character_is_flushed_at_the_end(
    processor: OutputProcessor, tokenizer: Tokenizer
) -> None:
    add(processor, tokenizer)
    ids = tokenizer.encode("ab☃", add_special_tokens=False)[:-1]
    deltas = one_by_one(processor, ids, "length")
    assert "".join(delta.text for delta in deltas) == "ab\ufffd"


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_the_token_that_stops_has_no_text(
    processor: OutputProcessor, tokenizer: Tokenizer, include: bool, skip: bool
) -> None:
    add(processor, tokenizer, include_stop_str_in_output=include, skip_special_tokens=skip)
    eos = tokenizer.eos_token_id
    assert eos is not None
    ids = [*tokenizer.encode("abc", add_special_tokens=False), eos]
    deltas = one_by_one(processor, ids, "stop")
    shown = "<|eot_id|>" if include and not skip else ""
    assert "".join(delta.text for delta in deltas) == "abc" + shown
    assert deltas[-1].token_ids == [eos]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", None)


def test_a_stop_token_of_the_request_is_named(
    processor: OutputProcessor, tokenizer: Tokenizer
) -> None:
    [comma] = tokenizer.encode(",", add_special_tokens=False)
    add(processor, tokenizer, stop_token_ids=[comma])
    ids = tokenizer.encode("abc", add_special_tokens=False)
    processor.process([Update(1, ids)])
    last = only(processor.process([Update(1, [comma], "stop", comma)]))
    assert (last.text, last.token_ids, last.stop_reason) == ("", [comma], comma)


@pytest.mark.parametrize("stop", ["END", "语", "👋🏽!", "x\ufffd", "a", "b END"])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_stop_strings(
    processor: OutputProcessor, tokenizer: Tokenizer, stop: str, include: bool, at_once: bool
) -> None:
    text = "ok b ENb END 汉语 👋🏽👋🏽! x\ufffd a more"
    add(processor, tokenizer, stop=[stop], include_stop_str_in_output=include, logprobs=0)
    ids = tokenizer.encode(text, add_special_tokens=False)
    scores = [TokenAlternatives([i], [-1.0], 1) for i in ids]
    if at_once:
        results = [processor.process([Update(1, ids, logprobs=scores)])]
    else:
        results = [
            processor.process([Update(1, [i], logprobs=[score])])
            for i, score in zip(ids, scores, strict=True)
        ]
    deltas = [only(result) for result in results if result.deltas]
    end = text.index(stop)
    assert "".join(delta.text for delta in deltas) == text[: end + len(stop) if include else end]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
    assert [abort for result in results for abort in result.aborts] == [1]
    shown = [i for delta in deltas for i in delta.token_ids]
    whole = tokenizer.decode(shown)
    assert stop in whole
    assert stop not in tokenizer.decode(shown[:-1])
    assert sum(len(delta.logprobs or ()) for delta in deltas) == len(shown)
    assert processor.process([Update(1, [5])]) == ProcessResult([], [])


def test_no_abort_if_the_engine_knows_the_end(
    processor: OutputProcessor, tokenizer: Tokenizer
) -> None:
    add(processor, tokenizer, stop=["c"])
    ids = tokenizer.encode("abc", add_special_tokens=False)
    result = processor.process([Update(1, ids, "length")])
    assert only(result).finish_reason == "stop"
    assert result.aborts == []


def test_held_back_text_comes_with_the_end(
    processor: OutputProcessor, tokenizer: Tokenizer
) -> None:
    add(processor, tokenizer, stop=["abcX"])
    ids = tokenizer.encode("abc", add_special_tokens=False)
    assert only(processor.process([Update(1, ids)])).text == ""
    assert only(processor.process([Update(1, [], "length")])).text == "abc"


def test_stop_strings_wait_for_min_tokens(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("1a2a3a4", add_special_tokens=False)
    assert len(ids) == 7
    add(processor, tokenizer, stop=["a"], min_tokens=2)
    deltas = one_by_one(processor, ids)
    assert "".join(delta.text for delta in deltas) == "1a2"


def test_completions_of_one_prompt_end_on_their_own(
    processor: OutputProcessor, tokenizer: Tokenizer
) -> None:
    prompt = add(processor, tokenizer, [7, 8, 9], stop=["!"], logprobs=1)
    words = {
        i: tokenizer.encode(t, add_special_tokens=False) for i, t in enumerate(["a", "b!", "cd"])
    }
    accumulator = OutputAccumulator("r", prompt)
    aborts, finished = [], []

    def step(updates: list[Update]) -> None:
        for update in updates:
            update.logprobs = [
                TokenAlternatives([i, 3], [-0.5, -0.25], 2) for i in update.token_ids
            ]
        result = processor.process(updates)
        aborts.extend(result.aborts)
        for _, delta in result.deltas:
            assert isinstance(delta, RequestDelta)
            accumulator.add(delta)
            finished.append(delta.finished)

    step([Update(8, words[1][:1], num_cached_tokens=3), Update(7, words[0], num_cached_tokens=2)])
    step([Update(8, words[1][1:]), Update(9, words[2])])
    snapshot = accumulator.output()
    step([Update(7, words[0], "length"), Update(8, words[1])])
    step([Update(9, words[2])])
    step([Update(9, words[2], "length")])
    output = accumulator.output()
    assert [c.text for c in output.outputs] == ["aa", "b", "cdcdcd"]
    assert [c.finish_reason for c in output.outputs] == ["length", "stop", "length"]
    assert [c.stop_reason for c in output.outputs] == [None, "!", None]
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert (aborts, finished) == ([8], [False, False, False, False, True])
    assert output.finished and not snapshot.finished
    assert [c.text for c in snapshot.outputs] == ["a", "b", "cd"]
    assert output.num_cached_tokens == 2
    for completion in output.outputs:
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
        assert completion.cumulative_logprob == -0.5 * len(completion.token_ids)


def test_logprobs_name_the_chosen_token_first(
    processor: OutputProcessor, tokenizer: Tokenizer
) -> None:
    add(processor, tokenizer, logprobs=2)
    a, b, c = (tokenizer.encode(t, add_special_tokens=False)[0] for t in "abc")
    scores = [
        TokenAlternatives([a, b, a], [-2.0, -0.1, -2.0], 2),
        TokenAlternatives([c, a, b], [-9.0, -1.0, -2.0], 30),
    ]
    delta = only(processor.process([Update(1, [a, c], logprobs=scores)]))
    assert delta.logprobs is not None
    first, second = delta.logprobs
    assert [(i, v.logprob, v.rank, v.decoded_token) for i, v in first.items()] == [
        (a, -2.0, 2, "a"),
        (b, -0.1, 1, "b"),
    ]
    assert [(i, v.rank) for i, v in second.items()] == [(c, 30), (a, 1), (b, 2)]


def test_prompt_logprobs_come_once_and_whole(
    processor: OutputProcessor, tokenizer: Tokenizer
) -> None:
    prompt = add(processor, tokenizer, [1, 2], prompt_logprobs=0)
    rest = prompt.token_ids[1:]
    scores = [TokenAlternatives([i], [-float(i)], 1) for i in rest]
    assert len(scores) >= 2
    assert processor.process([Update(1, [], prompt_logprobs=scores[:1])]).deltas == []
    # A new engine process starts from the beginning.
    assert processor.emitted(1) == []
    assert processor.process([Update(1, [], prompt_logprobs=scores[:1])]).deltas == []
    result = processor.process(
        [Update(1, [5], prompt_logprobs=scores[1:]), Update(2, [5], prompt_logprobs=scores)]
    )
    [(_, delta)] = result.deltas
    assert isinstance(delta, RequestDelta)
    assert delta.prompt_logprobs is not None
    assert delta.prompt_logprobs[0] is None
    assert [next(iter(entry)) for entry in delta.prompt_logprobs if entry] == rest
    [(_, delta)] = processor.process([Update(1, [5])]).deltas
    assert isinstance(delta, RequestDelta)
    assert delta.prompt_logprobs is None


def test_an_error_ends_the_whole_request(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    prompt = add(processor, tokenizer, [1, 2, 3])
    result = processor.process(
        [Update(1, [5]), Update(2, [], "error", error="no memory"), Update(3, [5])]
    )
    [(request_id, error)] = result.deltas
    assert request_id == "r"
    assert isinstance(error, RequestFailedError)
    assert str(error) == "no memory"
    assert result.aborts == [1, 3]
    assert processor.process([Update(1, [5])]).deltas == []
    accumulator = OutputAccumulator("r", prompt)
    accumulator.end("error")
    assert [c.finish_reason for c in accumulator.output().outputs] == ["error"]


def test_abort(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    add(processor, tokenizer, [1, 2, 3])
    processor.process([Update(2, [5, 6], "length"), Update(1, [5])])
    processor.process([Update(1, [6, 7])])
    assert processor.emitted(1) == [5, 6, 7]
    assert [processor.is_open(i) for i in (1, 2, 3)] == [True, False, True]
    assert processor.abort("r") == [1, 3]
    assert processor.abort("r") == []
    assert processor.process([Update(1, [5])]) == ProcessResult([], [])
    assert not processor.is_open(1)


def test_without_a_tokenizer_there_are_only_ids(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(None)
    add(processor, tokenizer, logprobs=0)
    scores = [TokenAlternatives([5], [-1.0], 1)]
    delta = only(processor.process([Update(1, [5], "length", logprobs=scores)]))
    assert (delta.text, delta.token_ids) == ("", [5])
    assert delta.logprobs is not None
    assert delta.logprobs[0][5].decoded_token is None
    with pytest.raises(RequestError, match="stop_token_ids"):
        add(processor, tokenizer, stop=["x"])
    assert not processor.is_open(1)


def test_detokenize_false_gives_no_text(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    add(processor, tokenizer, detokenize=False)
    assert only(processor.process([Update(1, [5], "length")])).text == ""


def test_updates_survive_the_wire(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    add(processor, tokenizer, logprobs=0)
    scores = [TokenAlternatives([5], [float("-inf")], 1)]
    message = Outputs(updates=[Update(1, [5], logprobs=scores)], stats=EngineStats(num_running=1))
    received = decode_from_engine(encode(message))
    assert received == message
    assert isinstance(received, Outputs)
    assert only(processor.process(received.updates)).token_ids == [5]


def test_accumulating_is_linear() -> None:
    accumulator = OutputAccumulator("r", PromptTokens(text=None, token_ids=[1]))
    for i in range(20_000):
        new = CompletionDelta(index=0, text="word ", token_ids=[i])
        accumulator.add(RequestDelta(completions=[new], finished=False, num_prompt_tokens=1))
    assert accumulator.output().outputs[0].text == "word " * 20_000
