"""The oracle gives the tokens that can be worked out without it, and sees every kind of damage."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

import numpy as np
import pytest

from dovetail.core.batch import Batch, JoinedRow, SamplingBatch, StepOutput, TokenMasks
from dovetail.core.errors import ConfigError, OutOfMemoryError
from dovetail.core.request import SamplingParams
from dovetail.core.sampling.noise import uniform
from dovetail.core.sampling.oracle import Answer, TokenRule, parts
from dovetail.core.scheduler.scheduler import SchedulerConfig
from dovetail.platforms.oracle import PLUGIN, OraclePlatform, OracleRunner
from tests.core.oracle import VOCAB, expected, runner_config

CONFIG = SchedulerConfig(
    num_blocks=17,
    block_size=4,
    max_model_len=64,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    vocab_size=VOCAB,
)
NONE = np.zeros(0, np.int32)


def make_runner(**options: object) -> OracleRunner:
    runner = OracleRunner(runner_config(CONFIG, **options))
    runner.allocate(16)
    return runner


def join(row: int, tokens: list[int], params: SamplingParams | None = None) -> JoinedRow:
    return JoinedRow(
        row=row,
        token_ids=np.array(tokens, np.int32),
        num_prompt_tokens=len(tokens),
        params=params or SamplingParams(temperature=0.0),
        stop_token_ids=(),
    )


def make_batch(
    rows: list[tuple[int, list[int], int, list[int]]], *, drafts: list[int] | None = None, **changes
) -> Batch:
    """Rows of (row, tokens, context, blocks), all of them sampled."""
    width = max(len(blocks) for *_, blocks in rows)
    places = sum(d + 1 for d in drafts) if drafts else len(rows)
    floats = np.zeros(places, np.float32)
    sampling = SamplingBatch(
        temperature=floats,
        top_k=NONE,
        top_p=floats,
        min_p=floats,
        uniform=floats,
        num_generated=np.zeros(places, np.int32),
        all_greedy=True,
        restricts=False,
        shapes_logits=False,
        num_logprobs=None,
    )
    batch = Batch(
        step=1,
        rows=np.array([row for row, *_ in rows], np.int32),
        query_lens=np.array([len(tokens) for _, tokens, *_ in rows], np.int32),
        context_lens=np.array([context for *_, context, _ in rows], np.int32),
        block_tables=np.array([b + [0] * (width - len(b)) for *_, b in rows], np.int32),
        token_ids=np.array([t for _, tokens, *_ in rows for t in tokens], np.int32),
        carried=NONE,
        carried_rows=NONE,
        sampled=np.arange(len(rows), dtype=np.int32),
        num_drafts=None if drafts is None else np.array(drafts, np.int32),
        sampling=sampling,
        copies=np.zeros((0, 2), np.int32),
    )
    return dataclasses.replace(batch, **changes)


def step(runner: OracleRunner, *args, **kwargs) -> StepOutput:
    return runner.step(make_batch(*args, **kwargs)).result()


def test_the_answer_worked_out_in_integers_is_the_one_of_the_arrays() -> None:
    rule = TokenRule(VOCAB, end_token=3, end_rate=0.2)
    prompt = [5, 6, 7]
    for seed in (None, 11):
        answer = Answer(rule, prompt, seed=seed, most=40)
        tokens = list(prompt)
        for index in range(40):
            sums = parts(np.array(tokens), np.arange(len(tokens))).sum(keepdims=True)
            noise = np.zeros(1, np.float32)
            if seed is not None:
                noise = uniform(np.array([seed], np.uint64), np.array([len(tokens)]))
            assert rule.choose(sums, noise)[0] == answer.at(index)
            tokens.append(answer.at(index))
        assert 2 <= answer.token_ids.count(3) <= 16, "a fifth of the tokens end the text"
    assert Answer(rule, prompt, seed=1, most=5).at(4) != Answer(rule, prompt, seed=2, most=5).at(4)


def test_chunks_and_steps_give_what_is_expected() -> None:
    runner, prompt = make_runner(), [9, 8, 7, 6, 5, 4]
    want = expected(prompt, 3)
    none = {"sampled": NONE}
    first = step(runner, [(0, prompt[:4], 0, [3])], joined=(join(0, prompt),), **none)
    assert first.token_ids.shape == (0, 1)
    got = step(runner, [(0, prompt[4:], 4, [3, 5])])
    assert got.token_ids.tolist() == [[want[0]]]
    carried = {"carried": np.array([0], np.int32), "carried_rows": np.array([0], np.int32)}
    got = step(runner, [(0, [0], 6, [3, 5])], **carried)
    assert got.token_ids.tolist() == [[want[1]]]
    got = step(runner, [(0, [want[1]], 7, [3, 5])])
    assert got.token_ids.tolist() == [[want[2]]]
    assert not got.failures


def started() -> OracleRunner:
    """Row 0 with six tokens in blocks 3 and 5, row 1 with five in blocks 7 and 8."""
    runner = make_runner()
    rows = [(0, [1, 2, 3, 4, 5, 6], 0, [3, 5]), (1, [9, 9, 9, 9, 9], 0, [7, 8])]
    output = step(runner, rows, joined=(join(0, rows[0][1]), join(1, rows[1][1])))
    assert not output.failures
    return runner


FIRST, SECOND = expected([1, 2, 3, 4, 5, 6], 1), expected([9] * 5, 1)


@pytest.mark.parametrize(
    ("rows", "row", "what"),
    [
        (
            [(0, FIRST, 6, [7, 5]), (1, SECOND, 5, [7, 8])],
            0,
            "position 3 reads block 7, which hold",
        ),
        ([(0, FIRST, 6, [3, 2]), (1, SECOND, 5, [7, 8])], 0, "position 5 reads block 2, which was"),
        ([(0, FIRST, 6, [3, 5]), (1, SECOND, 5, [7, 5])], 1, "position 4 reads block 5, which hol"),
        ([(0, SECOND, 6, [3, 5]), (1, SECOND, 5, [7, 8])], 0, "position 6 computes token"),
        ([(0, FIRST, 6, [3, 5]), (1, [8, 8], 5, [7, 8])], 1, "position 5 computes token 8"),
        ([(0, FIRST, 6, [3, 5]), (1, SECOND, 9, [7, 8, 9])], 1, "computed beyond the tokens"),
        ([(0, FIRST, 6, [3, 5]), (1, SECOND, 5, [7, 0])], 1, "position 4 reads block 0, which was"),
    ],
)
def test_damage_fails_the_row_that_is_damaged(rows: list, row: int, what: str) -> None:
    output = step(started(), rows)
    assert list(output.failures) == [row]
    assert f"I19: row {row}" in output.failures[row] and what in output.failures[row]


def test_a_row_that_nobody_joined_is_found() -> None:
    output = step(started(), [(0, FIRST, 6, [3, 5]), (2, [4], 0, [9])])
    assert "row 2 at position 0 is computed beyond" in output.failures[1]


def test_block_0_is_never_written() -> None:
    output = step(make_runner(), [(0, [1, 2], 0, [0])], joined=(join(0, [1, 2]),))
    assert "position 0 writes slot 0" in output.failures[0]


def test_undamaged_rows_have_no_failures() -> None:
    assert not step(started(), [(0, FIRST, 6, [3, 5]), (1, SECOND, 5, [7, 8])]).failures


def test_two_tokens_in_one_slot_are_found() -> None:
    runner = started()
    step(runner, [(2, [1, 2], 0, [9])], joined=(join(2, [1, 2]),))
    output = step(runner, [(2, expected([1, 2], 1), 2, [9]), (3, [1, 2, 7], 0, [9])],
                  joined=(join(3, [1, 2, 7]),))  # fmt: skip
    assert "writes slot 38" in output.failures[0]


def test_a_copied_block_is_the_same() -> None:
    rows = [(0, FIRST, 6, [3, 10]), (1, SECOND, 5, [7, 8])]
    output = step(started(), rows, copies=np.array([[5, 10]], np.int32))
    assert not output.failures


def test_damage_in_the_middle_of_a_prompt_is_told_with_the_first_token() -> None:
    runner, prompt = make_runner(), list(range(12))
    step(runner, [(0, prompt[:4], 0, [3])], joined=(join(0, prompt),), sampled=NONE)
    step(runner, [(0, prompt[4:8], 4, [2, 4])], sampled=NONE)
    output = step(runner, [(0, prompt[8:], 8, [2, 4, 5])])
    assert "position 3 reads block 2" in output.failures[0]


def test_drafts_are_accepted_up_to_the_first_wrong_one() -> None:
    runner, prompt = make_runner(), [1, 2, 3]
    want = expected(prompt, 6)
    step(runner, [(0, prompt, 0, [3])], joined=(join(0, prompt),))
    rows = [(0, [want[0], want[1], want[2], 1000], 3, [3, 4])]
    output = step(runner, rows, drafts=[3])
    assert output.num_tokens.tolist() == [3]
    assert output.token_ids[0, :3].tolist() == want[1:4]
    output = step(
        runner,
        [(0, [want[3], 999], 6, [3, 4])],
        drafts=[1],
        num_drafts_wanted=np.array([2], np.int32),
    )
    assert output.token_ids[0, : output.num_tokens[0]].tolist() == [want[4]]
    assert not output.failures
    assert output.drafts is not None and output.drafts.shape == (1, 2)


def test_all_drafts_may_be_right_and_rows_may_have_none() -> None:
    runner = started()
    first, second = expected([1, 2, 3, 4, 5, 6], 3), expected([9] * 5, 2)
    output = step(runner, [(0, first[:2], 6, [3, 5]), (1, second[:1], 5, [7, 8])], drafts=[1, 0])
    assert output.num_tokens.tolist() == [2, 1]
    assert output.token_ids.tolist() == [first[1:], [second[1], 0]]


def test_proposed_drafts_are_right_as_often_as_asked() -> None:
    for quality, share in ((1.0, 1.0), (0.0, 0.0)):
        runner = make_runner(draft_quality=quality)
        output = step(
            runner,
            [(0, [1, 2], 0, [3])],
            joined=(join(0, [1, 2]),),
            num_drafts_wanted=np.array([4], np.int32),
        )
        want = expected([1, 2], 5)[1:]
        assert output.drafts is not None
        right = np.mean(output.drafts[0] == want)
        assert right == share if quality else output.drafts[0, 0] != want[0]


def test_masks_and_row_rules_are_kept() -> None:
    runner, prompt = make_runner(), [1, 2]
    bits = np.zeros((1, -(-VOCAB // 32)), np.int32)
    bits[0, 3] = 1 << 5
    batch = make_batch([(0, prompt, 0, [3])], joined=(join(0, prompt),))
    masks = TokenMasks(places=np.zeros(1, np.int32), bits=bits)
    sampling = dataclasses.replace(batch.sampling, masks=masks)
    output = runner.step(dataclasses.replace(batch, sampling=sampling)).result()
    assert output.token_ids.tolist() == [[3 * 32 + 5]]
    params = SamplingParams(temperature=0.0, allowed_token_ids=[4, 5], min_tokens=1)
    ruled = dataclasses.replace(join(1, prompt, params), stop_token_ids=(5,))
    batch = make_batch([(1, prompt, 0, [4])], joined=(ruled,))
    sampling = dataclasses.replace(batch.sampling, shapes_logits=True)
    output = runner.step(dataclasses.replace(batch, sampling=sampling)).result()
    assert output.token_ids.tolist() == [[4]]


def test_a_step_takes_its_time_and_steps_queue_up() -> None:
    runner = make_runner(step_time=0.5)
    begin = time.monotonic()
    first = runner.step(make_batch([(0, [1], 0, [3])], joined=(join(0, [1]),)))
    second = runner.step(make_batch([(1, [1], 0, [4])], joined=(join(1, [1]),)))
    assert time.monotonic() - begin < 0.5
    second.result()
    assert time.monotonic() - begin >= 1.0
    first.result()


def test_wrong_options_are_refused() -> None:
    for options, message in (
        ({"speed": 1}, "no option 'speed'"),
        ({"step_time": -1}, "step_time must be a number from 0"),
        ({"end_rate": 2}, "end_rate must be a number from 0 to 1"),
        ({"memory": 0}, "memory must be a positive integer"),
    ):
        with pytest.raises(ConfigError, match=message):
            OracleRunner(runner_config(CONFIG, **options))
    with pytest.raises(OutOfMemoryError):
        OracleRunner(runner_config(CONFIG, memory=4096)).allocate(16)


def test_it_needs_no_torch_and_is_never_chosen_by_itself() -> None:
    assert PLUGIN.priority is None and PLUGIN.probe().usable
    assert isinstance(PLUGIN.create(), OraclePlatform)
    code = "import sys, dovetail.platforms.oracle; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
