"""The offline class as its users call it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dovetail import LLM, SamplingParams
from dovetail.core.errors import ConfigError, ContextLengthError, RequestError
from tests.checkpoints import make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(model=str(model), device="cpu", dtype="float32", threads=1)


def test_every_form_of_a_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("the quick")
    forms = ["the quick", {"prompt": "the quick"}, {"prompt_token_ids": ids}, ids]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    alone = [llm.generate(form, GREEDY, use_tqdm=False)[0] for form in forms]
    assert {o.outputs[0].text for o in alone} == {outputs[0].outputs[0].text}
    assert outputs[0].prompt == "the quick"
    assert outputs[2].prompt_token_ids == ids


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [
        SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (30, 1, 9, 17)
    ]
    outputs = llm.generate(["a", "b", "c", "d"], params, use_tqdm=False)
    assert [o.prompt for o in outputs] == ["a", "b", "c", "d"]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [30, 1, 9, 17]
    assert all(o.outputs[0].finish_reason == "length" for o in outputs)


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_max_tokens_ends_at_the_context(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=10_000, ignore_eos=True)
    (output,) = llm.generate([[5] * 500], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 12
    assert output.outputs[0].finish_reason == "length"


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    one = llm.chat(messages, GREEDY, use_tqdm=False)
    two = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert len(one) == 1 and len(two) == 2
    assert one[0].prompt == "<s>[user] hello\n[assistant] "
    assert one[0].outputs[0].token_ids == two[1].outputs[0].token_ids


def test_stop_strings_cut_the_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    (whole,) = llm.generate("Once upon", params, use_tqdm=False)
    text = whole.outputs[0].text
    stop = text[10:14]
    (cut,) = llm.generate(
        "Once upon",
        SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, stop=stop),
        use_tqdm=False,
    )
    assert cut.outputs[0].text == text[: text.index(stop)]
    assert cut.outputs[0].finish_reason == "stop"
    assert cut.outputs[0].stop_reason == stop
    assert llm.stats.num_free_blocks == llm.stats.num_blocks


def test_stop_tokens_end_it(llm: LLM) -> None:
    (whole,) = llm.generate("sea", GREEDY, use_tqdm=False)
    token = whole.outputs[0].token_ids[5]
    first = whole.outputs[0].token_ids.index(token)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[token])
    (cut,) = llm.generate("sea", params, use_tqdm=False)
    assert cut.outputs[0].token_ids == whole.outputs[0].token_ids[: first + 1]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", token)


def test_several_completions_of_a_seeded_prompt(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=9, max_tokens=16, ignore_eos=True, logprobs=2)
    (one,) = llm.generate("ship", params, use_tqdm=False)
    others = llm.generate(["sailed", "ship", "brave"], params, use_tqdm=False)
    assert [c.token_ids for c in others[1].outputs] == [c.token_ids for c in one.outputs]
    assert len({tuple(c.token_ids) for c in one.outputs}) == 4
    for completion in one.outputs:
        assert completion.logprobs is not None
        assert [next(iter(entry)) for entry in completion.logprobs] == completion.token_ids
        assert completion.cumulative_logprob == pytest.approx(
            sum(
                e[t].logprob for e, t in zip(completion.logprobs, completion.token_ids, strict=True)
            )
        )


def test_prompt_logprobs_are_those_of_the_answer(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=1)
    (output,) = llm.generate("seven brave", params, use_tqdm=False)
    answer = output.outputs[0]
    assert answer.logprobs is not None
    whole = output.prompt_token_ids + answer.token_ids
    again = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, ignore_eos=True)
    (scored,) = llm.generate([whole], again, use_tqdm=False)
    assert scored.prompt_logprobs is not None
    assert scored.prompt_logprobs[0] is None
    assert len(scored.prompt_logprobs) == len(whole)
    tail = scored.prompt_logprobs[len(output.prompt_token_ids) :]
    for token, entry, want in zip(answer.token_ids, tail, answer.logprobs, strict=True):
        assert entry is not None
        assert entry[token].logprob == pytest.approx(want[token].logprob, abs=1e-4)


def test_wrong_prompts_run_nothing(llm: LLM) -> None:
    before = llm.stats.num_steps
    for prompts, message in (
        (["fine", [1, 999]], "token id 999"),
        (["fine", []], "empty"),
        ([{"text": "x"}], "needs 'prompt'"),
        ([[1.5]], "list of integers"),
        ([[5] * 600], "maximum context length is 512"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.generate(prompts, GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match="2 prompts, but 1 sampling"):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)
    assert llm.stats.num_steps == before


def test_min_tokens_and_penalties_reach_the_sampler(llm: LLM) -> None:
    plain = llm.generate("dog", SamplingParams(temperature=0.0, max_tokens=40), use_tqdm=False)[0]
    repeated = SamplingParams(
        temperature=0.0, max_tokens=40, frequency_penalty=2.0, presence_penalty=2.0, min_tokens=40
    )
    varied = llm.generate("dog", repeated, use_tqdm=False)[0]
    assert len(varied.outputs[0].token_ids) == 40
    counts = [len(set(o.outputs[0].token_ids)) for o in (plain, varied)]
    assert counts[1] > counts[0]


def test_unknown_settings_name_the_nearest(model: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(model=str(model), max_modle_len=12)


def test_without_a_tokenizer_prompts_are_ids(model: Path) -> None:
    llm = LLM(model=str(model), device="cpu", skip_tokenizer_init=True, threads=1)
    (output,) = llm.generate([[5, 6]], GREEDY, use_tqdm=False)
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 12
    with pytest.raises(ConfigError, match="skip_tokenizer_init"):
        llm.generate("text", GREEDY, use_tqdm=False)


def test_a_timeout_ends_everything_with_what_it_has(model: Path) -> None:
    llm = LLM(model=str(model), device="null", max_num_seqs=2, options={"step_us": 10_000})
    params = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
    began = time.monotonic()
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False, timeout=0.3)
    assert 0.3 <= time.monotonic() - began < 2
    assert [o.outputs[0].finish_reason for o in outputs] == ["timeout"] * 3
    assert all(o.finished for o in outputs)
    counts = [len(o.outputs[0].token_ids) for o in outputs]
    assert 5 < counts[0] == counts[1] < 60
    assert counts[2] == 0, "there are two rows, and it is the third"
    assert llm.stats.num_free_blocks == llm.stats.num_blocks
    (short,) = llm.generate("a", GREEDY, use_tqdm=False, timeout=30)
    assert short.outputs[0].finish_reason == "length"


def test_a_prompt_that_no_cache_can_hold_is_refused_with_the_figures(model: Path) -> None:
    llm = LLM(model=str(model), device="null", block_size=16, num_gpu_blocks_override=4)
    with pytest.raises(ContextLengthError) as caught:
        llm.generate([[5] * 70], GREEDY, use_tqdm=False)
    assert "maximum context length is 64 tokens" in str(caught.value)
    assert "need 6 KV cache blocks of 16 tokens, and there are 4" in str(caught.value)
    (output,) = llm.generate([[5] * 63], GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1
