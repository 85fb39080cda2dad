import asyncio
import threading

import pytest

from dovetail.core.cli.loop_thread import LoopThread


async def double(number):
    return 2 * number


async def fail():
    raise ValueError("no")


class Endless:
    """A coroutine that only a cancellation ends, and what became of it."""

    def __init__(self):
        self.began = threading.Event()
        self.ended = threading.Event()

    async def run(self):
        try:
            self.began.set()
            await asyncio.sleep(60)
        finally:
            self.ended.set()


def test_results_and_errors():
    with LoopThread() as loop:
        assert loop.run(double(2)) == 4
        with pytest.raises(ValueError, match="no"):
            loop.run(fail())
        assert loop.run(double(3)) == 6


@pytest.mark.parametrize("scheduled", [True, False])
def test_an_interrupt_while_work_is_handed_over(scheduled, monkeypatch):
    """It comes before anything shows whether the loop has the coroutine."""
    work, given, hand_over = Endless(), [], asyncio.BaseEventLoop.call_soon_threadsafe

    def interrupted(loop, *arguments, **settings):
        given.append(arguments)
        if len(given) > 1:
            return hand_over(loop, *arguments, **settings)
        if scheduled:
            hand_over(loop, *arguments, **settings)
            assert work.began.wait(60)
        raise KeyboardInterrupt

    with LoopThread() as loop:
        monkeypatch.setattr(asyncio.BaseEventLoop, "call_soon_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.run(work.run())
        assert work.began.is_set() == work.ended.is_set() == scheduled
        assert loop.run(double(4)) == 8
