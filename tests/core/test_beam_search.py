"""``LLM.beam_search`` on a real model, against transformers computing every beam from scratch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dovetail import LLM, SamplingParams
from dovetail.core.engine.beam_search import BeamSearchOutput, BeamSearchParams
from dovetail.core.errors import RequestError
from tests.checkpoints import EOS, make_checkpoint
from tests.core.scheduler.beam_cases import reference

PROMPTS = ["the quick brown fox", "Once upon a time there was a ship", "Paris"]
Scores = Callable[[list[int]], Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def recompute(model: Path) -> Scores:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    known: dict[tuple[int, ...], Any] = {}

    @torch.inference_mode()
    def log_softmax(prefix: list[int]) -> Any:
        key = tuple(prefix)
        if key not in known:
            logits = network(torch.tensor([prefix])).logits[0, -1]
            known[key] = logits.float().log_softmax(-1).numpy()
        return known[key]

    return log_softmax


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one step ahead": {"async_scheduling": True},
    "chunked": {"max_num_batched_tokens": 16, "max_num_seqs": 6},
    "no prefix cache": {"enable_prefix_caching": False},
    "preempted": {"num_gpu_blocks_override": 12, "block_size": 4, "max_model_len": 44},
    "few rows": {"max_num_seqs": 2},
}


@pytest.fixture(scope="module", params=SETTINGS)
def llm(model: Path, request: pytest.FixtureRequest) -> LLM:
    settings = {"device": "reference", "dtype": "float32", "block_size": 16}
    return LLM(model=str(model), **(settings | SETTINGS[request.param]))


@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_the_sequences_are_transformers_own(llm: LLM, recompute: Scores, width: int) -> None:
    params = BeamSearchParams(beam_width=width, max_tokens=14, length_penalty=0.8)
    outputs = llm.beam_search(PROMPTS, params)
    for text, output in zip(PROMPTS, outputs, strict=True):
        prompt = llm.get_tokenizer().encode(text)
        want = reference(prompt, width, 14, recompute, ends=(EOS,), length_penalty=0.8)
        assert [s.tokens for s in output.sequences] == [prompt + tokens for tokens, *_ in want]
        assert [s.finish_reason for s in output.sequences] == [reason for *_, reason in want]
        for sequence, (_, total, _) in zip(output.sequences, want, strict=True):
            assert sequence.cum_logprob == pytest.approx(total, abs=1e-3)
    if llm.config.max_model_len == 44 and width == 7:
        assert llm.stats.num_preemptions > 0
    assert llm.stats.num_free_blocks == llm.stats.num_blocks


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
def test_a_temperature_divides_the_logits(llm: LLM, recompute: Scores, temperature: float) -> None:
    def heated(prefix: list[int]) -> Any:
        row = torch.from_numpy(recompute(prefix)) / (temperature or 1.0)
        return row.log_softmax(-1).numpy()

    params = BeamSearchParams(beam_width=3, max_tokens=10, temperature=temperature)
    beside = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=2)
    output, plain = llm.generate(["Paris"] * 2, [params.sampling_params(), beside], use_tqdm=False)
    want = reference(output.prompt_token_ids, 3, 10, heated, ends=(EOS,))
    assert [c.token_ids for c in output.outputs] == [tokens for tokens, *_ in want]
    for completion, (_, total, _) in zip(output.outputs, want, strict=True):
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)
    scores = plain.outputs[0].logprobs or []
    raw = recompute(plain.prompt_token_ids)
    assert next(iter(scores[0].values())).logprob == pytest.approx(float(raw.max()), abs=1e-4)


def test_the_shape_is_vllms(llm: LLM) -> None:
    (output,) = llm.beam_search("Paris", BeamSearchParams(beam_width=3, max_tokens=6))
    assert isinstance(output, BeamSearchOutput) and len(output.sequences) == 3
    tokenizer = llm.get_tokenizer()
    prompt = tokenizer.encode("Paris")
    for sequence in output.sequences:
        assert sequence.text == tokenizer.decode(sequence.tokens, skip_special_tokens=False)
        new = sequence.tokens[len(prompt) :]
        assert len(sequence.logprobs) == len(new)
        if sequence.finish_reason == "length":
            total = sum(e[t].logprob for e, t in zip(sequence.logprobs, new, strict=True))
            assert sequence.cum_logprob == pytest.approx(total)
    best = [s.cum_logprob for s in output.sequences if s.finish_reason == "length"]
    assert best == sorted(best, reverse=True)


def test_generate_takes_the_wish_too(llm: LLM) -> None:
    params = SamplingParams(n=2, best_of=5, use_beam_search=True, max_tokens=8, logprobs=3)
    (output,) = llm.generate("Paris", params, use_tqdm=False)
    (whole,) = llm.beam_search("Paris", BeamSearchParams(beam_width=5, max_tokens=8))
    size = len(output.prompt_token_ids)
    assert [c.token_ids for c in output.outputs] == [s.tokens[size:] for s in whole.sequences[:2]]
    assert [c.index for c in output.outputs] == [0, 1] and output.finished
    for completion in output.outputs:
        assert completion.cumulative_logprob is not None
        for token, entry in zip(completion.token_ids, completion.logprobs or (), strict=True):
            assert {1, 2, 3} <= {c.rank for c in entry.values()} and token in entry


def test_searches_beside_others_change_nobody(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    beams = SamplingParams(n=3, use_beam_search=True, max_tokens=10)
    drawn = SamplingParams(seed=3, max_tokens=10, ignore_eos=True)
    mixed = llm.generate(PROMPTS, [greedy, beams, drawn], use_tqdm=False)
    alone = [
        llm.generate(prompt, params, use_tqdm=False)[0]
        for prompt, params in zip(PROMPTS, [greedy, beams, drawn], strict=True)
    ]
    for one, other in zip(mixed, alone, strict=True):
        assert [c.token_ids for c in one.outputs] == [c.token_ids for c in other.outputs]


def test_what_beams_cannot_do_is_refused() -> None:
    for field, value in {
        "top_p": 0.9,
        "frequency_penalty": 1.0,
        "stop": ["x"],
        "bad_words": ["x"],
        "prompt_logprobs": 1,
        "min_tokens": 3,
    }.items():
        with pytest.raises(RequestError, match=field) as caught:
            SamplingParams(use_beam_search=True, **{field: value})
        assert caught.value.param == field
    with pytest.raises(RequestError, match="use_beam_search"):
        SamplingParams(length_penalty=2.0)
    with pytest.raises(RequestError, match="smaller than n"):
        SamplingParams(n=3, best_of=2)
