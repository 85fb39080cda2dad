import pytest

from dovetail.core.bench.metrics import (
    Trace,
    details,
    parse_goodput,
    statistics,
    summarise,
)
from dovetail.core.bench.report import serve_report, table
from dovetail.core.errors import ConfigError


def trace(start, ttft, itls, output_len, *, prompt_len=10, success=True, **more):
    return Trace(
        prompt_len=prompt_len,
        start_time=start,
        ttft=ttft,
        itls=list(itls),
        latency=ttft + sum(itls),
        output_len=output_len,
        success=success,
        error="" if success else "refused",
        **more,
    )


# One request with two chunks of two tokens each, one of a single token, one that failed.
PAIR = trace(100.0, 0.2, [0.3], 4)
SINGLE = trace(100.4, 0.1, [], 1, prompt_len=6)
FAILED = trace(100.0, 0.0, [], 0, success=False)


def test_tpot_is_undefined_for_one_token():
    assert PAIR.tpot == pytest.approx(0.3 / 3)
    assert SINGLE.tpot is None


def test_totals_and_rates():
    result = summarise([PAIR, SINGLE, FAILED], 2.0)
    assert (result["completed"], result["failed"]) == (2, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (16, 5)
    assert result["request_throughput"] == 1.0
    assert result["output_throughput"] == 2.5
    assert result["total_token_throughput"] == 10.5
    assert result["request_goodput"] is None


def test_times_are_in_milliseconds():
    result = summarise(
        [PAIR, SINGLE, FAILED], 2.0, metrics=("ttft", "tpot", "itl", "e2el"), percentiles=(50, 99.9)
    )
    assert result["mean_ttft_ms"] == pytest.approx(150)
    assert result["median_ttft_ms"] == pytest.approx(150)
    assert result["std_ttft_ms"] == pytest.approx(50)
    assert result["mean_tpot_ms"] == pytest.approx(100)
    assert result["mean_itl_ms"] == pytest.approx(300)
    assert result["mean_e2el_ms"] == pytest.approx(300)
    assert result["p50_e2el_ms"] == pytest.approx(300)
    assert result["p99.9_ttft_ms"] == pytest.approx(199.9)


def test_itl_is_over_all_gaps_and_tpot_over_requests():
    long = trace(0, 0.1, [0.1] * 9, 10)
    short = trace(0, 0.1, [1.0], 2)
    result = summarise([long, short], 1.0)
    assert result["mean_itl_ms"] == pytest.approx((9 * 100 + 1000) / 10)
    assert result["mean_tpot_ms"] == pytest.approx((100 + 1000) / 2)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        (["ttft:200"], 2),
        (["ttft:150"], 1),
        (["tpot:50"], 1),
        (["e2el:500", "tpot:100.1"], 2),
        (["ttft:0"], 0),
    ],
)
def test_goodput(limits, good):
    result = summarise([PAIR, SINGLE, FAILED], 2.0, goodput=parse_goodput(limits))
    assert result["request_goodput"] == good / 2


@pytest.mark.parametrize("pair", ["ttft", "ttft:fast", "itl:5", "ttft:-1", "ttft:nan"])
def test_goodput_limits_that_make_no_sense(pair):
    with pytest.raises(ConfigError, match="goodput limits look like"):
        parse_goodput([pair])


def test_peaks():
    first = trace(0.0, 0.5, [0.25, 0.75], 6)  # 2 tokens per chunk, at 0.5, 0.75 and 1.5
    second = trace(1.5, 0.1, [], 1)  # starts when the first ends
    third = trace(0.2, 0.1, [], 1)
    result = summarise([first, second, third], 2.0)
    assert result["max_output_tokens_per_s"] == 2 + 2 + 1
    assert result["max_concurrent_requests"] == 2


def test_nothing_completed():
    result = summarise([FAILED], 2.0)
    assert result["completed"] == 0
    assert result["mean_ttft_ms"] == 0.0
    assert result["max_output_tokens_per_s"] == 0.0


def test_details_have_one_entry_per_request():
    found = details([PAIR, FAILED])
    assert found["output_lens"] == [4, 0]
    assert found["errors"] == ["", "refused"]
    assert {len(values) for values in found.values()} == {2}


def test_statistics_keys():
    assert set(statistics([1.0], [99, 99.9])) == {"mean", "median", "std", "p99", "p99.9"}


def test_reports_are_fifty_wide():
    result = summarise([PAIR], 2.0, goodput={"ttft": 1000})
    text = serve_report(result, metrics=("ttft", "itl"), percentiles=(99,))
    assert "Request goodput (req/s):                 0.50" in text
    assert "P99 TTFT (ms):                           200.00" in text
    assert "-Inter-token Latency-" in text
    assert "TPOT" not in text
    assert {len(line) for line in text.splitlines() if set(line) == {"="}} == {50}
    assert table("T", [("a", 1), ("b", 1.0)]).splitlines()[1:3] == [
        f"{'a':<40} 1",
        f"{'b':<40} 1.00",
    ]
