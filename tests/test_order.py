from pathlib import Path

from tests.conftest import LONGEST


def test_the_files_that_come_first_exist():
    assert [name for name in LONGEST if not Path(__file__).parent.joinpath(name).is_file()] == []
