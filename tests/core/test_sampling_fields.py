"""Every field of ``SamplingParams`` does what it says, alone and in a batch with all the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dovetail import LLM, RequestOutput, SamplingParams
from tests import processors
from tests.checkpoints import BOS, EOS, VOCAB_SIZE, make_checkpoint

PROMPT = "Once upon a time there was a ship"
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
DRAWN = {"temperature": 1.5, "max_tokens": 12, "ignore_eos": True, "seed": 11, "logprobs": 0}
LONG = {**GREEDY, "max_tokens": 60}
BEAMS = {"use_beam_search": True, "n": 4, "max_tokens": 8}
FORCE = """
import torch
from dovetail.core.contracts.logits import LogitsProcessor
class Force(LogitsProcessor):
    def apply(self, logits_V, output_token_ids, argument):
        logits_V[argument[len(output_token_ids) % len(argument)]] += 1000
        return logits_V
"""


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def text(output: RequestOutput) -> str:
    return output.outputs[0].text


def worst_rank(output: RequestOutput) -> int:
    completion = output.outputs[0]
    pairs = zip(completion.token_ids, completion.logprobs or (), strict=True)
    return max(entry[token].rank for token, entry in pairs)


def total(output: RequestOutput) -> float:
    return output.outputs[0].cumulative_logprob or 0.0


def lengths(output: RequestOutput) -> int:
    return sum(len(c.token_ids) for c in output.outputs)


def distinct(output: RequestOutput) -> int:
    return len(set(tokens(output)))


@dataclass(frozen=True)
class Case:
    """The same request without and with a field, and what is to be seen."""

    base: dict[str, Any]
    value: Any
    seen: Callable[[RequestOutput, RequestOutput], bool]


def choosing() -> dict[str, Case]:
    """Fields that say how tokens and texts are chosen."""
    ends = list(range(3, VOCAB_SIZE, 8))
    return {
        "n": Case(DRAWN, 3, lambda a, b: (len(a.outputs), len(b.outputs)) == (1, 3)),
        "best_of": Case(DRAWN, 8, lambda a, b: total(b) > total(a)),
        "use_beam_search": Case(
            {**GREEDY, "logprobs": 0, "best_of": 5}, True, lambda a, b: total(b) > total(a)
        ),
        "length_penalty": Case(
            {**BEAMS, "stop_token_ids": ends}, 6.0, lambda a, b: lengths(b) > lengths(a)
        ),
        "temperature": Case({**GREEDY, "seed": 3}, 2.0, lambda a, b: tokens(a) != tokens(b)),
        "top_p": Case(DRAWN, 0.2, lambda a, b: worst_rank(b) < worst_rank(a)),
        "top_k": Case(DRAWN, 2, lambda a, b: worst_rank(b) <= 2 < worst_rank(a)),
        "min_p": Case(DRAWN, 0.5, lambda a, b: worst_rank(b) < worst_rank(a)),
        "presence_penalty": Case(LONG, 2.0, lambda a, b: distinct(b) > distinct(a)),
        "frequency_penalty": Case(LONG, 2.0, lambda a, b: distinct(b) > distinct(a)),
        "repetition_penalty": Case(LONG, 3.0, lambda a, b: distinct(b) > distinct(a)),
        "seed": Case(DRAWN, 12, lambda a, b: tokens(a) != tokens(b)),
        "logit_bias": Case(GREEDY, {70: 100.0}, lambda a, b: tokens(b) == [70] * 12),
        "allowed_token_ids": Case(GREEDY, [70, 71], lambda a, b: set(tokens(b)) <= {70, 71}),
        "bad_words_token_ids": Case(
            {**GREEDY, "logit_bias": {70: 100.0, 71: 80.0}},
            [[70, 70]],
            lambda a, b: tokens(a) == [70] * 12 and tokens(b) == [70, 71] * 6,
        ),
        "logits_processors": Case(
            GREEDY, {"force": [50, 60, 70]}, lambda a, b: tokens(b) == [50, 60, 70] * 4
        ),
        "structured_outputs": Case(
            {"temperature": 0.0, "max_tokens": 30},
            {"choice": ["yes", "never"]},
            lambda a, b: text(b) in ("yes", "never"),
        ),
    }


def ending_and_showing(pilot: RequestOutput, llm: LLM) -> dict[str, Case]:
    """Fields that say where a text ends and what of it is shown; the pilot is the greedy answer."""
    said, ids = text(pilot), tokens(pilot)
    stop = said[4:6]
    (the,) = llm.get_tokenizer().encode(" the", add_special_tokens=False)
    to_the_end = {"temperature": 0.0, "max_tokens": 12, "logit_bias": {EOS: 100.0}}
    return {
        "stop": Case(GREEDY, [stop], lambda a, b: text(b) == said[: said.index(stop)]),
        "stop_token_ids": Case(
            GREEDY, [ids[5]], lambda a, b: tokens(b) == ids[: ids.index(ids[5]) + 1]
        ),
        "include_stop_str_in_output": Case(
            {**GREEDY, "stop": [stop]}, True, lambda a, b: text(b) == text(a) + stop
        ),
        "ignore_eos": Case(to_the_end, True, lambda a, b: (lengths(a), lengths(b)) == (1, 12)),
        "max_tokens": Case(GREEDY, 5, lambda a, b: tokens(b) == tokens(a)[:5]),
        "min_tokens": Case(to_the_end, 5, lambda a, b: (lengths(a), lengths(b)) == (1, 6)),
        "logprobs": Case(
            GREEDY,
            3,
            lambda a, b: [len(entry) for entry in b.outputs[0].logprobs or ()] == [3] * 12,
        ),
        "prompt_logprobs": Case(
            GREEDY,
            3,
            lambda a, b: (
                a.prompt_logprobs is None
                and len(b.prompt_logprobs or ()) == len(b.prompt_token_ids)
            ),
        ),
        "bad_words": Case(
            {**GREEDY, "logit_bias": {the: 100.0}},
            ["the"],
            lambda a, b: tokens(a) == [the] * 12 and the not in tokens(b),
        ),
        "detokenize": Case(GREEDY, False, lambda a, b: text(a) != "" == text(b)),
        "skip_special_tokens": Case(
            {**GREEDY, "logit_bias": {BOS: 100.0}},
            False,
            lambda a, b: (text(a), text(b)) == ("", "<s>" * 12),
        ),
    }


FIELDS = sorted(field.name for field in msgspec.structs.fields(SamplingParams))
SPACED = "spaces_between_special_tokens"
"""Has a test of its own: it needs a tokenizer that puts spaces between tokens."""


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with processors.installed(tmp_path_factory.mktemp("plugins"), FORCE, "Force"):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["reference", "cpu"])
def llm(model: Path, request: pytest.FixtureRequest) -> LLM:
    return LLM(model=str(model), device=request.param, dtype="float32")


@pytest.fixture(scope="module")
def table(llm: LLM) -> dict[str, Case]:
    return choosing() | ending_and_showing(answer(llm, GREEDY), llm)


def answer(llm: LLM, fields: dict[str, Any]) -> RequestOutput:
    (output,) = llm.generate(PROMPT, SamplingParams(**fields), use_tqdm=False)
    return output


def test_there_is_a_case_for_every_field(table: dict[str, Case]) -> None:
    assert sorted([*table, SPACED]) == FIELDS


@pytest.mark.parametrize("field", [name for name in FIELDS if name != SPACED])
def test_the_field_has_the_effect_that_it_names(
    llm: LLM, table: dict[str, Case], field: str
) -> None:
    case = table[field]
    without, given = answer(llm, case.base), answer(llm, {**case.base, field: case.value})
    assert case.seen(without, given)
    assert not case.seen(without, without), "this would be seen without the field too"


@pytest.mark.parametrize("steps_ahead", [False, True])
def test_all_of_them_in_one_batch_change_nothing(
    model: Path, llm: LLM, table: dict[str, Case], steps_ahead: bool
) -> None:
    together = LLM(
        model=str(model),
        device="reference",
        dtype="float32",
        async_scheduling=steps_ahead,
        max_num_batched_tokens=64,
    )
    params = [SamplingParams(**{**case.base, name: case.value}) for name, case in table.items()]
    mixed = together.generate([PROMPT] * len(params), params, use_tqdm=False)
    for name, param, output in zip(table, params, mixed, strict=True):
        (alone,) = llm.generate(PROMPT, param, use_tqdm=False)
        for one, other in zip(output.outputs, alone.outputs, strict=True):
            assert one.token_ids == other.token_ids, name
            assert one.text == other.text, name
            assert one.finish_reason == other.finish_reason, name
    assert together.stats.num_free_blocks == together.stats.num_blocks


def test_spaces_between_special_tokens(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    vocabulary = {"<s>": BOS, "</s>": EOS, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB_SIZE)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    llm = LLM(model=str(path), device="reference", dtype="float32")
    shown = {
        "temperature": 0.0,
        "ignore_eos": True,
        "max_tokens": 4,
        "skip_special_tokens": False,
        "bad_words_token_ids": [[BOS, BOS], [EOS, EOS]],
        "logit_bias": {BOS: 100.0, EOS: 80.0},
    }
    prompt = [5, 6]
    spaced, close = (
        llm.generate(prompt, SamplingParams(**shown, **{SPACED: wanted}), use_tqdm=False)[0]
        for wanted in (True, False)
    )
    assert (text(spaced), text(close)) == (" <s> </s> <s> </s>", " <s></s><s></s>")
