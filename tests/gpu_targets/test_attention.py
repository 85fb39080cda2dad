"""Every launch of the attention backend compiles for every GPU, and fits it."""

from __future__ import annotations

import pytest

from tests.gpu_targets.targets import TARGETS, Report, chosen_targets, compile_all

MEASURED = ("sm_90", "128 seven heads: decode alone", 4)
"""Its tile is the fastest on a GPU, and serves other layers without a byte (full runs only)."""


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return compile_all("tests.gpu_targets.attention_cases")


def test_everything_compiles(reports: list[Report]) -> None:
    assert {report.target for report in reports} == set(chosen_targets())
    assert [report for report in reports if report.error] == []


def test_nothing_takes_more_shared_memory_than_there_is(reports: list[Report]) -> None:
    limits = {name: target.shared_limit for name, target in TARGETS.items()}
    assert [report for report in reports if report.shared > limits[report.target]] == []
    assert any(report.shared for report in reports)


def test_registers_suffice(reports: list[Report]) -> None:
    spilling = {(report.target, report.case, report.spills) for report in reports if report.spills}
    assert spilling - {MEASURED} == set()


def test_products_are_made_by_matrix_units(reports: list[Report]) -> None:
    def multiplies(report: Report) -> bool:
        return "decode" in report.case or "prefill" in report.case

    products = [report for report in reports if multiplies(report) and "fp32" not in report.case]
    assert products and [report for report in products if not report.matrix] == []
    others = [report for report in reports if not multiplies(report)]
    assert others and not any(report.matrix for report in others)
