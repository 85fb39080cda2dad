"""What ``dovetail serve`` says of itself: what runs where and why, and how to try it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from urllib.parse import urlsplit

__all__ = ["curl_line", "heading", "ready_lines"]

_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
"""Addresses to listen on, with one that they can be reached at."""


def heading(version: str, device: str, reason: str) -> str:
    """The first line: version, platform, and why that one."""
    return f"dovetail {version}  device {device} ({reason})"


def ready_lines(banner: Mapping[str, str], url: str, *, seconds: float, try_it: str) -> list[str]:
    """The lines that follow once requests are served.

    Args:
        banner: The engine's own lines by topic.
        url: Where the server listens.
        seconds: From the start of the command.
        try_it: A command that makes a first request.
    """
    width = max([12, *(len(topic) + 2 for topic in banner)])
    lines = [f"{topic + ':':<{width}}{line}" for topic, line in banner.items()]
    lines.append(f"Ready in {seconds:.1f} s  {url}/v1 (API)  {url}/metrics")
    if urlsplit(url).hostname in _ANYWHERE:
        port = urlsplit(url).port
        lines.append(
            f"Other machines reach it under this one's name; containers at"
            f" http://host.docker.internal:{port}"
        )
    lines.append(f"Try: {try_it}")
    return lines


def curl_line(url: str, model: str, *, chat: bool, needs_key: bool, insecure: bool = False) -> str:
    """A ``curl`` command that works when it is pasted into a shell on this machine.

    Args:
        url: Where the server listens; ``unix:PATH`` for a Unix socket.
        model: A name that the server answers to.
        chat: Whether the model has a chat template; otherwise a completion is asked for.
        needs_key: Whether a key has to be sent.
        insecure: Whether the certificate may be one that curl does not know.
    """
    words = ["curl"]
    base = url
    if url.startswith("unix:"):
        words += ["--unix-socket", shlex.quote(url.removeprefix("unix:"))]
        base = "http://localhost"
    else:
        for anywhere, reachable in _ANYWHERE.items():
            base = base.replace(f"//{anywhere}:", f"//{reachable}:").replace(
                f"//[{anywhere}]:", f"//{reachable}:"
            )
    if insecure:
        words.append("--insecure")
    body: dict[str, object] = {"model": model}
    if chat:
        body["messages"] = [{"role": "user", "content": "Hello!"}]
    else:
        body |= {"prompt": "def fibonacci(n):", "max_tokens": 32, "temperature": 0}
    words.append(base + ("/v1/chat/completions" if chat else "/v1/completions"))
    words.append("-H 'Content-Type: application/json'")
    if needs_key:
        words.append('-H "Authorization: Bearer $DOVETAIL_API_KEY"')
    words.append(f"-d {shlex.quote(json.dumps(body))}")
    return " ".join(words)
