"""Logits processors of plug-ins: what they see, and that one that fails harms nobody else."""

import pytest
import torch

from dovetail import LLM
from dovetail.core.errors import RequestError
from dovetail.core.request import SamplingParams
from dovetail.platforms.torch.sampler import Sampler
from tests import processors
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.platforms.torch.sampling_cases import CPU, batch_of, joined, logits_of, noise_of

SOURCE = """
import torch
from dovetail.core.contracts.logits import LogitsProcessor

class Force(LogitsProcessor):
    "Lets only argument[number of output tokens] through."
    def validate(self, argument, vocab_size):
        if not isinstance(argument, list) or not all(0 <= t < vocab_size for t in argument):
            raise ValueError("it takes a list of token ids.")
    def apply(self, logits_V, output_token_ids, argument):
        kept = torch.full_like(logits_V, -torch.inf)
        token = argument[len(output_token_ids) % len(argument)]
        kept[token] = logits_V[token]
        return kept

class Parrot(LogitsProcessor):
    "Repeats what was said last, once anything was."
    def apply(self, logits_V, output_token_ids, argument):
        if output_token_ids:
            logits_V[output_token_ids[-1]] = logits_V.max() + 100
        return logits_V

class Broken(LogitsProcessor):
    def apply(self, logits_V, output_token_ids, argument):
        if len(output_token_ids) < argument["after"]:
            return logits_V
        match argument["how"]:
            case "raise": raise RuntimeError("no such luck")
            case "exit": raise SystemExit(3)
            case "nan": logits_V[3] = torch.nan
            case "inf": logits_V[3] = torch.inf
            case "nothing": logits_V.fill_(-torch.inf)
            case "shape": return logits_V[:-1]
            case "dtype": return logits_V.double()
            case "kind": return logits_V.tolist()
            case "none": return None
        return logits_V

class Revive(LogitsProcessor):
    "Wants the forbidden."
    def apply(self, logits_V, output_token_ids, argument):
        return torch.where(torch.isneginf(logits_V), 50.0, logits_V)

class Foreign(LogitsProcessor):
    family = "jax"
    def apply(self, logits_V, output_token_ids, argument):
        return logits_V

class Unmade(LogitsProcessor):
    def __init__(self):
        raise OSError("no file")
    def apply(self, logits_V, output_token_ids, argument):
        return logits_V
"""
HOW = {
    "raise": "RuntimeError: no such luck",
    "exit": "sys.exit",
    "nan": "NaN",
    "inf": "inf",
    "nothing": "no token to choose",
    "shape": f"shape ({VOCAB_SIZE - 1},)",
    "dtype": "float64",
    "kind": "gave a list",
    "none": "gave a NoneType",
}
NEUTRAL = {"temperature": 1.0, "seed": 4, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory):
    names = ("Force", "Parrot", "Broken", "Revive", "Foreign", "Unmade")
    with processors.installed(tmp_path_factory.mktemp("plugins"), SOURCE, *names):
        yield


@pytest.fixture(scope="module", params=["reference", "cpu"])
def llm(tmp_path_factory, request):
    path = make_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    return LLM(model=str(path), device=request.param, dtype="float32", async_scheduling=True)


def answers(llm, params, prompts=None):
    prompts = prompts or ["the quick brown fox", "Paris", "Once upon", "Hello"][: len(params)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [o.outputs[0] for o in outputs]


def test_a_processor_decides_token_by_token(llm):
    script = [40, 41, 42, 43, 44]
    params = SamplingParams(**NEUTRAL, logits_processors={"force": script})
    (answer,) = answers(llm, [params])
    assert answer.token_ids == [script[i % 5] for i in range(12)]


def test_it_sees_what_was_said(llm):
    (answer,) = answers(llm, [SamplingParams(**NEUTRAL, logits_processors={"parrot": None})])
    said = answer.token_ids
    (plain,) = answers(llm, [SamplingParams(**NEUTRAL)])
    assert said == [plain.token_ids[0]] * 12


@pytest.mark.parametrize(
    "rule", [{"allowed_token_ids": [70, 71]}, {"structured_outputs": {"choice": ["yes", "no"]}}]
)
def test_what_is_forbidden_stays_so(llm, rule):
    revived = SamplingParams(**NEUTRAL, **rule, logits_processors={"revive": None})
    plain, same = answers(llm, [SamplingParams(**NEUTRAL, **rule), revived], ["Hello"] * 2)
    assert same.token_ids == plain.token_ids and same.finish_reason == plain.finish_reason


def test_several_are_applied_in_order(llm):
    both = {"force": [50], "broken": {"after": 99, "how": "raise"}}
    (answer,) = answers(llm, [SamplingParams(**NEUTRAL, logits_processors=both)])
    assert set(answer.token_ids) == {50}


@pytest.mark.parametrize("ahead", [False, True])
def test_what_was_said_is_known_after_preemption(tmp_path, ahead):
    path = make_checkpoint("llama", tmp_path)
    llm = LLM(
        model=str(path),
        device="reference",
        dtype="float32",
        block_size=4,
        num_gpu_blocks_override=24,
        max_model_len=64,
        async_scheduling=ahead,
    )
    scripts = [[40 + i, 50 + i, 60 + i] for i in range(6)]
    words = [[[7, 7], [8, 8]], [[9]]]
    params = [
        SamplingParams(**NEUTRAL | {"max_tokens": 30}, logits_processors={"force": script})
        for script in scripts
    ] + [
        SamplingParams(
            **NEUTRAL | {"max_tokens": 30, "temperature": 0.0},
            logit_bias={7: 100, 8: 90, 9: 95},
            bad_words_token_ids=banned,
        )
        for banned in words
    ]
    outputs = answers(llm, params, ["Once upon a time"] * 8)
    assert llm.stats.num_preemptions > 0
    assert [o.token_ids for o in outputs[:6]] == [script * 10 for script in scripts]
    assert outputs[6].token_ids == [7, 9] * 15
    assert outputs[7].token_ids == [7] * 30


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("how", HOW)
def test_one_that_fails_ends_its_request_alone(llm, how, after, caplog):
    good = [
        SamplingParams(**NEUTRAL, logprobs=2),
        SamplingParams(**NEUTRAL, logits_processors={"force": [7, 8]}),
        SamplingParams(**NEUTRAL, frequency_penalty=1.0),
    ]
    alone = answers(llm, good)
    argument = {"how": how, "after": after}
    bad = SamplingParams(**NEUTRAL, logits_processors={"broken": argument})
    *others, failed = answers(llm, [*good, bad])
    assert failed.finish_reason == "error" and len(failed.token_ids) == after
    assert f"'broken' {'failed: ' if how in ('raise', 'exit') else ''}" in caplog.text
    assert HOW[how] in caplog.text
    assert [o.token_ids for o in others] == [o.token_ids for o in alone]
    assert llm.stats.num_preemptions == 0, "nobody was computed again"
    assert llm.stats.num_free_blocks == llm.stats.num_blocks


def test_one_of_another_family_is_refused_where_it_would_run(llm, caplog):
    (answer,) = answers(llm, [SamplingParams(**NEUTRAL, logits_processors={"foreign": 1})])
    assert answer.finish_reason == "error" and "jax arrays" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"forse": [1]}, "There is no logits processor 'forse'; known: force, "),
        ({"force": "x"}, "'force' refuses its argument: it takes a list"),
        ({"force": [VOCAB_SIZE]}, "refuses its argument"),
        ({"parrot": {"deep": 1 << 70}}, "plain data"),
        ({"parrot": object()}, "plain data"),
    ],
)
def test_what_is_not_there_or_wrong_is_refused_at_the_door(llm, wanted, message):
    before = llm.stats.num_steps
    with pytest.raises(RequestError) as caught:
        answers(llm, [SamplingParams(**NEUTRAL, logits_processors=wanted)])
    assert message in str(caught.value)
    assert str(caught.value.param).startswith("logits_processors")
    assert llm.stats.num_steps == before


def test_one_that_cannot_be_made_is_the_packages_fault(llm):
    from dovetail.core.errors import PluginError

    with pytest.raises(PluginError, match=r"'unmade' \(acme-unmade 1.2"):
        answers(llm, [SamplingParams(**NEUTRAL, logits_processors={"unmade": None})])


def test_only_packages_that_may_run_are_known(llm, monkeypatch):
    from dovetail.core.plugins.logits import LogitsProcessors

    monkeypatch.setenv("DOVETAIL_PLUGINS", "parrot")
    LogitsProcessors().check({"parrot": None}, 10)
    with pytest.raises(RequestError, match="DOVETAIL_PLUGINS does not name it"):
        LogitsProcessors().check({"force": [1]}, 10)


@pytest.mark.parametrize("how", HOW)
def test_the_other_rows_of_the_step_have_the_same_bits(how):
    def step(*third):
        params = [SamplingParams(), SamplingParams(frequency_penalty=1.0), *third]
        sampler = Sampler(VOCAB_SIZE, 3, CPU)
        sampler.join([joined(i, p, output=(5, 6)) for i, p in enumerate(params)])
        batch = batch_of(
            params, VOCAB_SIZE, noise=noise_of(3), num_generated=[2] * 3, num_logprobs=4
        )
        return sampler.sample(logits_of(3, VOCAB_SIZE), batch)

    argument = {"after": 0, "how": how}
    failed = step(SamplingParams(logits_processors={"broken": argument}))
    fine = step(SamplingParams())
    assert list(failed.failures) == [2] and not fine.failures
    assert HOW[how] in failed.failures[2] and "'broken'" in failed.failures[2]
    assert torch.equal(failed.token_ids[:2], fine.token_ids[:2])
    for one, other in zip(failed.logprobs, fine.logprobs, strict=True):
        assert torch.equal(one[:2], other[:2])


def test_the_last_token_is_not_read_before_the_next_step():
    """Reading it at once would make the host wait for the device in every step."""
    params = [SamplingParams(logits_processors={"parrot": None})]
    sampler = Sampler(VOCAB_SIZE, 2, CPU)
    sampler.join([joined(0, params[0])])
    result = sampler.sample(logits_of(1, VOCAB_SIZE), batch_of(params, VOCAB_SIZE))
    (state,) = sampler._shaper._processors._rows.values()
    assert state.output == [] and state.sampled is not None
    again = sampler.sample(
        logits_of(1, VOCAB_SIZE, seed=1),
        batch_of(params, VOCAB_SIZE, num_generated=[1], noise=noise_of(1)),
    )
    assert state.output == result.token_ids.tolist()
    assert torch.isfinite(again.token_ids.float()).all()
