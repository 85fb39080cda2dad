"""Answers of a given form from a real engine: the bundled model, as its users call it."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from dovetail import LLM, SamplingParams, StructuredOutputsParams
from dovetail.core.errors import RequestError
from dovetail.core.request import RequestOutput
from tests.core.structured.cases import check_json
from tests.core.structured.schemas import HAND_WRITTEN, generated
from tests.thorough import every, thorough

SCHEMAS = [*HAND_WRITTEN, *generated(100)]
PROMPT = "def main():\n    return "
SMALL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}


def make(**settings: Any) -> LLM:
    defaults = {"device": "cpu", "dtype": "float32", "threads": 1, "max_model_len": 1024}
    return LLM(**(defaults | settings))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make()


def params(temperature: float = 0.0, seed: int = 1, most: int = 900, **form: Any) -> SamplingParams:
    return SamplingParams(
        temperature=temperature,
        seed=seed,
        max_tokens=most,
        structured_outputs=StructuredOutputsParams(**form) if form else None,
    )


def texts(outputs: list[RequestOutput]) -> list[str]:
    assert all(c.finish_reason == "stop" for o in outputs for c in o.outputs)
    return [completion.text for output in outputs for completion in output.outputs]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


UNBOUNDED = (
    '"number"',
    '"duration"',
    '"time"',
    '"date-time"',
    '"additionalProperties": {',
    '"$ref"',
)
"""Of these a model may want more and more: digits, properties, levels."""


@pytest.mark.parametrize("schemas", [SCHEMAS[::5], pytest.param(SCHEMAS, marks=thorough)])
@pytest.mark.parametrize(("temperature", "most"), [(0.0, 450), (2.0, 900)])
def test_every_schema_gives_valid_json(
    llm: LLM, temperature: float, most: int, schemas: list[Any]
) -> None:
    asked = [params(temperature, most=most, json=schema) for schema in schemas]
    outputs = llm.generate([PROMPT] * len(asked), asked, use_tqdm=False)
    num_complete = 0
    for schema, output in zip(schemas, outputs, strict=True):
        (answer,) = output.outputs
        written = json.dumps(schema)
        if answer.finish_reason == "length" and any(kind in written for kind in UNBOUNDED):
            continue
        assert answer.finish_reason == "stop", written
        num_complete += 1
        try:
            check_json(schema, answer.text)
        except (ValueError, jsonschema.ValidationError) as error:
            pytest.fail(f"{written}\n{answer.text!r}\n{error}")
    assert num_complete >= len(schemas) * 5 // 6
    assert len(llm._core.scheduler.grammars) == 0  # type: ignore[arg-type]


def test_expressions_choices_and_grammars(llm: LLM) -> None:
    forms: list[dict[str, Any]] = [
        {"regex": "[a-f0-9]{4}-[0-9]{2}"},
        {"choice": ["positive", "negative", "neither"]},
        {"grammar": 'root ::= "(" root ")" | "x"'},
        {"grammar": 'start: A ("," A)~1..3\nA: /[a-z]{1,4}/'},
    ]
    patterns = [
        "[a-f0-9]{4}-[0-9]{2}",
        "positive|negative|neither",
        r"\(*x\)*",
        "[a-z]{1,4}(,[a-z]{1,4}){1,3}",
    ]
    asked = [params(1.5, seed, **form) for form in forms for seed in range(8)]
    found = texts(llm.generate([PROMPT] * len(asked), asked, use_tqdm=False))
    for i, text in enumerate(found):
        assert re.fullmatch(patterns[i // 8], text), text


def test_the_likeliest_choice_is_taken(llm: LLM) -> None:
    (free,) = llm.generate(["import os\nimport "], params(most=1), use_tqdm=False)
    likely = free.outputs[0].text
    form = {"choice": ["zzz", likely, "qqq"]}
    (chosen,) = llm.generate(["import os\nimport "], params(**form), use_tqdm=False)
    assert chosen.outputs[0].text == likely


def mixture() -> tuple[list[str], list[SamplingParams]]:
    """Free requests, and ones with a form, in turns."""
    prompts, asked = [], []
    for i in range(12):
        prompts.append(f"def f{i}(self):\n    " + "x = 1\n    " * (3 * i))
        kind = (0.0, 0.9)[i // 2 % 2]
        free = SamplingParams(temperature=kind, top_p=0.9, seed=i, max_tokens=40, logprobs=1)
        asked.append(free if i % 2 else params(kind, i, json=SMALL))
    return prompts, asked


@pytest.fixture(scope="module")
def mixed_tokens(llm: LLM) -> list[list[int]]:
    prompts, asked = mixture()
    return tokens(llm.generate(prompts, asked, use_tqdm=False))


def test_free_requests_notice_nothing_of_their_neighbours(
    llm: LLM, mixed_tokens: list[list[int]]
) -> None:
    prompts, asked = mixture()
    alone = tokens(llm.generate(prompts[1::2], asked[1::2], use_tqdm=False))
    assert mixed_tokens[1::2] == alone


@pytest.mark.parametrize(
    "settings",
    every(
        2,
        [
            {"max_num_batched_tokens": 32},
            {"enable_prefix_caching": False},
            {"num_gpu_blocks_override": 26, "block_size": 16, "max_model_len": 400},
            {"max_num_seqs": 3},
        ],
    ),
)
def test_chunks_caches_and_preemption_change_nothing(
    settings: dict[str, Any], mixed_tokens: list[list[int]]
) -> None:
    prompts, asked = mixture()
    other = make(**settings)
    for _ in range(2):
        assert tokens(other.generate(prompts, asked, use_tqdm=False)) == mixed_tokens
    if "num_gpu_blocks_override" in settings:
        assert other.stats.num_preemptions > 0
    other.close()


def test_several_completions_of_one_prompt(llm: LLM) -> None:
    asked = SamplingParams(
        n=5, temperature=2.0, seed=4, max_tokens=300, structured_outputs={"json": SMALL}
    )
    (output,) = llm.generate([PROMPT * 8], asked, use_tqdm=False)
    answers = texts([output])
    for text in answers:
        check_json(SMALL, text)
    assert len(set(answers)) == 5


def test_an_answer_ends_although_the_end_token_is_ignored(llm: LLM) -> None:
    for regex in ("ab{2}", "ab*"):
        asked = SamplingParams(
            temperature=2.0,
            max_tokens=400,
            ignore_eos=True,
            seed=3,
            structured_outputs={"regex": regex},
        )
        (output,) = llm.generate([PROMPT], asked, use_tqdm=False)
        assert output.outputs[0].finish_reason == "stop"
        assert re.fullmatch(regex, output.outputs[0].text)


def test_an_answer_that_is_cut_off_says_so(llm: LLM) -> None:
    (output,) = llm.generate([PROMPT], params(json=SMALL, most=3), use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(output.outputs[0].text)


def test_forms_go_with_other_wishes(llm: LLM) -> None:
    asked = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        repetition_penalty=1.3,
        min_tokens=5,
        logprobs=2,
        max_tokens=300,
        seed=1,
        logit_bias={50: 3.0},
        structured_outputs=StructuredOutputsParams(json=SMALL),
    )
    (output,) = llm.generate([PROMPT], asked, use_tqdm=False)
    check_json(SMALL, texts([output])[0])
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None and len(logprobs) == len(output.outputs[0].token_ids)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"json": {"type": "strin"}}, "structured_outputs.json"),
        ({"regex": "(a"}, "structured_outputs.regex"),
        ({"json": SMALL, "regex": "a"}, "structured_outputs"),
        ({}, "structured_outputs"),
        ({"jsn": {}}, "structured_outputs"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": ["a", 1]}, "structured_outputs.choice"),
        ({"json": 3}, "structured_outputs.json"),
        ({"json": {"a": object()}}, "structured_outputs.json"),
        ({"regex": ""}, "structured_outputs.regex"),
        ({"json_object": "yes"}, "structured_outputs.json_object"),
    ],
)
def test_a_wrong_form_is_refused_before_anything_runs(
    llm: LLM, form: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as error:
        llm.generate([PROMPT], SamplingParams(structured_outputs=form), use_tqdm=False)  # type: ignore[arg-type]
    assert error.value.param == param
    assert llm.stats.num_running == llm.stats.num_waiting == 0


def test_an_engine_that_cannot_says_so() -> None:
    for settings, lack in [
        ({"device": "null"}, "mask tokens"),
        ({"skip_tokenizer_init": True}, "a tokenizer"),
    ]:
        other = make(**settings) if "device" not in settings else LLM(**settings)
        with pytest.raises(RequestError, match=lack):
            other.generate([[5, 6]], params(regex="a"), use_tqdm=False)
        other.close()
