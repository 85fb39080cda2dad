import io
import logging

import pytest

from dovetail.core.cli.console import Progress, start_logging


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_the_line_is_written_over():
    stream = Terminal()
    progress = Progress(stream)
    progress.show("loading 1%")
    progress.show("loading 1%")
    progress.show("loading 2%")
    progress.clear()
    assert stream.getvalue() == "\r\x1b[Kloading 1%\r\x1b[Kloading 2%\r\x1b[K"


def test_elsewhere_there_is_a_line_per_stage_and_per_ten_seconds():
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(stream, clock=lambda: now[0])
    for seconds, text in ((0, "loading 1%"), (1, "loading 9%"), (2, "warming 1"), (11, "warming 2"),
                      (12, "warming 3"), (21, "warming 4"), (22, "")):  # fmt: skip
        now[0] = seconds
        progress.show(text)
    progress.clear()
    assert stream.getvalue().splitlines() == ["loading 1%", "warming 1", "warming 3"]


@pytest.fixture
def logger():
    kept = logging.getLogger("dovetail")
    state = (kept.handlers[:], kept.level, kept.propagate)
    yield kept
    kept.handlers[:], kept.propagate = state[0], state[2]
    kept.setLevel(state[1])


def test_log_lines(logger, capsys):
    start_logging("info")
    start_logging("info")
    logging.getLogger("dovetail.x").info("hello")
    logging.getLogger("dovetail.x").warning("beware")
    logging.getLogger("dovetail.x").debug("hidden")
    assert capsys.readouterr().err == "hello\ndovetail: warning: beware\n"
