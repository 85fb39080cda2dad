"""``dovetail chat``: talk to a model, here or on a server."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from dovetail.core.cli.api_key import key_header
from dovetail.core.cli.arguments import add_engine_arguments, engine_config
from dovetail.core.cli.config_file import add_config_argument
from dovetail.core.cli.console import emit, note
from dovetail.core.cli.loading import bundled_model, show_loading
from dovetail.core.cli.loop_thread import LoopThread
from dovetail.core.cli.parser import Parser
from dovetail.core.cli.sampling import add_sampling_arguments, given_sampling, sampling_params
from dovetail.core.cli.talkers import EngineTalker, Message, ServerTalker, Talker
from dovetail.core.errors import OverloadedError, RequestError, RequestFailedError

__all__ = ["add_arguments", "converse", "run"]

_MAX_TOKENS = 1024
_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""
    parser.add_argument("--url", help="Server to talk to, such as http://127.0.0.1:8000.")
    parser.add_argument("--api-key", metavar="KEY", help="Key for the server.")
    parser.add_argument(
        "--system-prompt", metavar="TEXT", help="Instruction that precedes the conversation."
    )
    parser.add_argument(
        "--chat-template", metavar="FILE", help="Template, or a file that holds one."
    )
    add_config_argument(parser)
    add_sampling_arguments(parser)
    add_engine_arguments(parser)


def run(namespace: argparse.Namespace) -> int:
    """Hold a conversation until the user leaves; returns the exit status."""
    with LoopThread() as loop:
        start = _from_server if namespace.url else _from_engine
        talker = loop.run(start(namespace))
        try:
            note(f"Chatting with {talker.name}. {_HELP}")
            if talker.notice:
                note(talker.notice)
            converse(talker, loop, _reader(), system_prompt=namespace.system_prompt)
        finally:
            loop.run(talker.close())
    return 0


async def _from_engine(namespace: argparse.Namespace) -> Talker:
    from dovetail.core.engine.async_engine import AsyncEngine

    config = engine_config(namespace)
    if config.model is None:
        note(bundled_model())
    engine = await AsyncEngine.start(config)
    try:
        await show_loading(engine)
        params = sampling_params(namespace, engine.info.default_params, max_tokens=_MAX_TOKENS)
        return EngineTalker(engine, params, chat_template=template_text(namespace.chat_template))
    except BaseException:
        await engine.close()
        raise


async def _from_server(namespace: argparse.Namespace) -> Talker:
    from dovetail.core.bench.client import first_model
    from dovetail.core.bench.http import HttpClient

    address = namespace.url.rstrip("/").removesuffix("/v1")
    client = HttpClient(address, headers=key_header(namespace.api_key))
    model = getattr(namespace, "model", None) or (await first_model(client)).id
    params = given_sampling(namespace)
    if namespace.chat_template:
        params["chat_template"] = template_text(namespace.chat_template)
    return ServerTalker(client, model, params)


def template_text(given: str | None) -> str | None:
    """The text of a template that was given itself, or as a file that holds it."""
    if given is None or "{" in given or not Path(given).is_file():
        return given
    return Path(given).read_text(encoding="utf-8")


def _reader() -> Callable[[], str]:
    """Reads one line: with editing and a prompt on a terminal, else plainly."""
    if not sys.stdin.isatty():
        return lambda: input()
    try:
        importlib.import_module("readline")
    except ImportError:
        note("(no line editing: this Python has no readline)")
    return lambda: input("> ")


def converse(
    talker: Talker, loop: LoopThread, read: Callable[[], str], *, system_prompt: str | None = None
) -> None:
    """Take turns until ``read`` ends or the user leaves.

    Ctrl-C stops an answer, of which what came is kept. At the prompt it shows how to leave, and
    the second time it leaves, by KeyboardInterrupt.
    """
    opening: list[Message] = []
    if system_prompt:
        opening.append({"role": "system", "content": system_prompt})
    messages = list(opening)
    warned = False
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if warned:
                raise
            warned = True
            note(f"\n{_HELP}")
            continue
        warned = False
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages = list(opening)
            note("The conversation starts anew.")
        elif line.startswith("/") and " " not in line:
            note(_HELP)
        elif line:
            _take_turn(talker, loop, messages, line)


def _take_turn(talker: Talker, loop: LoopThread, messages: list[Message], line: str) -> None:
    """Write the answer to a line and add both to the conversation."""
    from dovetail.core.bench.http import HttpClientError

    turn: list[Message] = [*messages, {"role": "user", "content": line}]
    pieces: list[str] = []

    async def speak() -> None:
        answer = talker.answer(turn)
        async for piece in answer:
            pieces.append(piece)
            emit(piece, end="")

    try:
        loop.run(speak())
    except KeyboardInterrupt:
        emit(" [stopped]", end="")
    except (RequestError, RequestFailedError, OverloadedError, HttpClientError) as error:
        emit()
        note(f"dovetail: error: {error}")
        return
    emit()
    messages[:] = [*turn, {"role": "assistant", "content": "".join(pieces)}]
