"""The kernels of fused ops and of the choice, compiled for GPUs that are not here."""

import pytest

from tests.gpu_targets.targets import TARGETS, chosen_targets, compile_all

NUM_KERNELS = 15


@pytest.fixture(scope="module")
def reports():
    return compile_all("tests.gpu_targets.ops_cases")


@pytest.mark.parametrize("target", chosen_targets())
def test_every_kernel_compiles_and_nothing_spills(reports, target):
    mine = [report for report in reports if report.target == target]
    assert len({report.case.split(".")[0] for report in mine}) == NUM_KERNELS
    for report in mine:
        assert not report.error, report
        assert report.spills == 0, report
        assert report.shared <= TARGETS[target].shared_limit, report
