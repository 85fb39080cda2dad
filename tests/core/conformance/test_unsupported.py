from types import SimpleNamespace

import pytest

from tests.core.conformance.unsupported import pytest_runtest_makereport


def reported(platform, name, outcome, **fields):
    """What becomes of the report of a check."""
    parameters = {"platform": platform, "check": SimpleNamespace(name=name)}
    item = SimpleNamespace(callspec=SimpleNamespace(params=parameters))
    report = SimpleNamespace(outcome=outcome, longrepr="as it was", **fields)
    hook = pytest_runtest_makereport(item)
    next(hook)
    with pytest.raises(StopIteration) as end:
        hook.send(report)
    assert end.value.value is report
    return report


@pytest.mark.parametrize("platform", ["reference", "cpu"])
def test_what_is_unsupported_all_of_a_sudden_fails(platform):
    report = reported(platform, "attention.sdpa.window.float32", "skipped")
    assert report.outcome == "failed"
    assert report.longrepr.startswith("attention.sdpa.window.float32 ran before")


@pytest.mark.parametrize(
    ("platform", "name", "outcome", "fields"),
    [
        ("reference", "features.deterministic", "skipped", {}),
        ("cpu", "attention.sdpa.alibi.float32", "skipped", {}),
        ("cpu", "tokens.llama", "skipped", {"wasxfail": "a known gap"}),
        ("cpu", "tokens.llama", "passed", {}),
        ("another", "tokens.llama", "skipped", {}),
    ],
)
def test_other_reports_stay_as_they_are(platform, name, outcome, fields):
    report = reported(platform, name, outcome, **fields)
    assert (report.outcome, report.longrepr) == (outcome, "as it was")
