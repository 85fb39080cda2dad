import asyncio
import io
import os
import signal
import threading
import time

import pytest

from dovetail.core.cli import main
from dovetail.core.cli.chat import converse, template_text
from dovetail.core.cli.loop_thread import LoopThread
from dovetail.core.errors import RequestError
from tests.core.bench.servers import DONE, event, scripted

SLOW_S = 20


class Echo:
    """Answers with the number of messages, slowly if it is asked to."""

    name = "echo"
    notice = ""

    def __init__(self):
        self.heard = []
        self.ended = []
        self.slow = threading.Event()

    async def answer(self, messages):
        self.heard.append(list(messages))
        if messages[-1]["content"] == "fail":
            raise RequestError("too long")
        try:
            for piece in ("it", "em ", str(len(messages))):
                yield piece
                if messages[-1]["content"] == "slow":
                    self.slow.set()
                    await asyncio.sleep(SLOW_S)
        finally:
            self.ended.append(len(messages))

    async def close(self):
        self.heard.append("closed")


def talk(lines, talker=None, **settings):
    """Hold a conversation; an exception among the lines is raised in its place."""
    talker = talker or Echo()
    script = iter([*lines, EOFError()])

    def read():
        line = next(script)
        if isinstance(line, BaseException):
            raise line
        return line

    with LoopThread() as loop:
        converse(talker, loop, read, **settings)
    return talker


def test_the_conversation_grows_and_starts_anew(capsys):
    talker = talk(["a", "", "b", "/reset", "c", "/what", "/exit", "never"], system_prompt="s")
    assert [len(messages) for messages in talker.heard] == [2, 4, 2]
    assert [m["role"] for m in talker.heard[1]] == ["system", "user", "assistant", "user"]
    assert talker.heard[1][2]["content"] == "item 2"
    shown = capsys.readouterr()
    assert shown.out == "item 2\nitem 4\nitem 2\n"
    assert "starts anew" in shown.err


def test_a_failed_turn_is_forgotten(capsys):
    talker = talk(["fail", "a"])
    assert [len(messages) for messages in talker.heard] == [1, 1]
    assert "dovetail: error: too long" in capsys.readouterr().err


def test_interrupt_at_the_prompt_explains_and_then_leaves(capsys):
    talk([KeyboardInterrupt(), "a", KeyboardInterrupt()])
    assert capsys.readouterr().err.count("/exit") == 2
    with pytest.raises(KeyboardInterrupt):
        talk([KeyboardInterrupt(), KeyboardInterrupt()])


@pytest.fixture
def interruptible():
    """A shell has its background jobs ignore Ctrl-C, and these tests may be run by one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def to_the_process():
    os.kill(os.getpid(), signal.SIGINT)


def to_a_thread_that_does_not_wait():
    """As a system may choose to. The thread that waits is not woken by it."""
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)


@pytest.mark.parametrize("send", [to_the_process, to_a_thread_that_does_not_wait])
@pytest.mark.usefixtures("interruptible")
def test_interrupt_stops_the_answer_only(send, capsys):
    talker = Echo()

    def interrupt():
        talker.slow.wait()
        send()

    thread = threading.Thread(target=interrupt)
    thread.start()
    start = time.monotonic()
    talk(["slow", "a"], talker)
    thread.join()
    assert time.monotonic() - start < SLOW_S / 2
    assert talker.ended == [1, 3]
    assert talker.heard[1][1] == {"role": "assistant", "content": "it"}
    assert capsys.readouterr().out == "it [stopped]\nitem 3\n"


def test_chat_with_an_engine(engine, capsys, monkeypatch):
    engine.tokenizer.chat_template = "yes"
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n"))
    assert main(["chat", "--system-prompt", "s", "--temperature", "0"]) == 0
    prompt, params = engine.asked[0]
    assert prompt.text == "<system>s<user>ab<assistant>"
    assert (params.temperature, params.max_tokens) == (0.0, 1024)
    assert capsys.readouterr().out == prompt.text[::-1] + "\n"
    assert engine.closed


def test_chat_without_a_template(engine, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n"))
    assert main(["chat"]) == 0
    shown = capsys.readouterr()
    assert "has no chat template" in shown.err
    assert shown.out == "ba\n"


def test_chat_with_a_server(capsys, monkeypatch):
    def script(method, path, body):
        if method == "GET":
            return (200, {"data": [{"id": "m"}]})
        return [event(choices=[{"delta": {"content": p}}]) for p in ("he", "llo")] + [DONE]

    ready, stop = threading.Event(), threading.Event()
    found = {}

    async def serve():
        async with scripted(script) as server:
            found["server"] = server
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    ready.wait()
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    try:
        url = found["server"].url + "/v1"
        assert main(["chat", "--url", url, "--api-key", "k", "--max-tokens", "5"]) == 0
    finally:
        stop.set()
        thread.join()
    assert capsys.readouterr().out == "hello\n"
    _, path, headers, body = found["server"].requests[-1]
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer k"
    assert (body["model"], body["max_tokens"]) == ("m", 5)
    assert body["messages"] == [{"role": "user", "content": "hi"}]


def test_nobody_listens(capsys):
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err


def test_templates(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{{ x }}")
    assert template_text(str(file)) == "{{ x }}"
    assert template_text("{{ y }}") == "{{ y }}"
    assert template_text("tool_use") == "tool_use"
    assert template_text(None) is None
