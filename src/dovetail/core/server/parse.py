"""From the bytes of a request to a checked struct, or to a refusal that names the field."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from dovetail.core.errors import RequestError
from dovetail.core.server.errors import ClientGoneError, HttpError
from dovetail.core.server.protocol import IGNORED_FIELDS
from dovetail.core.server.settings import Limits

__all__ = ["UnknownFields", "check_depth", "decode", "read_body", "read_json"]

T = TypeVar("T", bound=msgspec.Struct)

_log = logging.getLogger("dovetail.server")
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?:key` in `)?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_INDEX = re.compile(r"\[(\d+)\]")
_KINDS = {"array": "list", "bool": "boolean", "float": "number", "int": "integer", "str": "text"}
_KIND = re.compile(r"`([a-z |]+)`")
_MISSING = re.compile(r"^Object missing required field `(\w+)`$")
_names = msgspec.json.Decoder(dict[str, msgspec.Raw])


class UnknownFields:
    """Warns of each unknown field name once. Bounded, since clients choose the names."""

    def __init__(self, capacity: int = 100) -> None:
        self._seen: set[str] = set()
        self._capacity = capacity

    def warn(self, names: set[str]) -> None:
        """Log those of ``names`` that were not logged before."""
        for name in sorted({name[:64] for name in names} - self._seen):
            if len(self._seen) >= self._capacity:
                return
            self._seen.add(name)
            _log.warning("Unknown request field %r is ignored; is it misspelt?", name)


async def read_json(
    request: Request, kind: type[T], limits: Limits, unknown: UnknownFields | None = None
) -> T:
    """Read and check the body of ``request``.

    Raises:
        HttpError: Wrong content type, too long, or too slow.
        RequestError: Not JSON, or not what ``kind`` allows.
    """
    _check_content_type(request)
    return decode(await read_body(request, limits), kind, unknown)


def _check_content_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    if given.split(";")[0].strip().lower() != "application/json":
        raise HttpError(
            415,
            "The body must be JSON and say so: add -H 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(
            415, "Send the body without compression.", code="unsupported_content_encoding"
        )


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body, never holding more than the limit."""
    announced = request.headers.get("content-length", "0")
    if not announced.isascii() or not announced.isdigit():
        raise HttpError(400, "Content-Length must be a number.", code="invalid_http")
    if len(announced) > 18 or int(announced) > limits.body_bytes:
        raise too_large(limits)
    body = bytearray()
    chunks = request.stream().__aiter__()
    try:
        while True:
            async with asyncio.timeout(limits.body_stall_s):
                chunk = await anext(chunks, None)
            if chunk is None:
                return bytes(body)
            body += chunk
            if len(body) > limits.body_bytes:
                raise too_large(limits)
    except TimeoutError:
        raise HttpError(
            408,
            f"The body stopped coming for {limits.body_stall_s:g} seconds.",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None
    except ClientDisconnect:
        raise ClientGoneError from None


def too_large(limits: Limits) -> HttpError:
    """The refusal of a body beyond the limit."""
    return HttpError(
        413,
        f"The body must not be longer than {limits.body_bytes} bytes.",
        code="request_too_large",
        headers={"connection": "close"},
    )


@functools.cache
def _decoder(kind: type[msgspec.Struct]) -> tuple[msgspec.json.Decoder[Any], frozenset[str]]:
    return msgspec.json.Decoder(kind), frozenset(kind.__struct_fields__)


def decode(body: bytes, kind: type[T], unknown: UnknownFields | None = None) -> T:
    """Check ``body`` against ``kind``.

    Raises:
        RequestError: ``param`` is the dotted path of what is wrong.
    """
    decoder, known = _decoder(kind)
    try:
        body.decode("utf-8")
        value: T = decoder.decode(body)
        names = _names.decode(body)
    except msgspec.ValidationError as exc:
        raise _field_error(str(exc)) from None
    except UnicodeDecodeError as exc:
        message = f"The body is not UTF-8 text (byte {exc.start})."
        raise RequestError(message, code="invalid_json") from None
    except RecursionError:
        raise RequestError("The body is nested too deeply.", code="invalid_json") from None
    except (msgspec.DecodeError, ValueError) as exc:
        message = f"The body is not valid JSON: {exc}."
        raise RequestError(message, code="invalid_json") from None
    if unknown is not None:
        unknown.warn(names.keys() - known - IGNORED_FIELDS)
    return value


def _field_error(text: str) -> RequestError:
    """Translate ``Expected `int`, got `str` - at `$.messages[0].name```."""
    found = _PATH.match(text)
    what, path = (found["what"], found["path"]) if found else (text, "")
    param = _INDEX.sub(r".\1", path or "").replace("[...]", "").strip(".")
    missing = _MISSING.match(what)
    if missing:
        param = f"{param}.{missing[1]}".strip(".")
        return RequestError(f"{param} is required.", param=param)
    message = _KIND.sub(_kind, what.replace("Expected", "expected", 1)).replace("`", "")
    if not param:
        return RequestError(f"The body must be a JSON object: {message}.")
    return RequestError(f"{param}: {message}.", param=param)


def _kind(found: re.Match[str]) -> str:
    """JSON's names for Python's types; null is always allowed and need not be said."""
    names = [name for name in found[1].split(" | ") if name != "null"] or ["null"]
    return " or ".join(_KINDS.get(name, name) for name in names)


def check_depth(value: Any, limit: int, param: str) -> None:
    """Refuse free-form JSON that is nested deeper than ``limit``."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise RequestError(f"{param} is nested deeper than {limit} levels.", param=param)
