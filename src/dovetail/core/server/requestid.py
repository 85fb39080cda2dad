"""The label of a request in logs and headers: the client's own if it can be used, else ours."""

from __future__ import annotations

import re
import uuid

from starlette.types import Scope

__all__ = ["HEADER", "label_request", "request_id"]

HEADER = b"x-request-id"
_KEY = "dovetail.request_id"
_UNSAFE = re.compile(rb"[^A-Za-z0-9._:/+=@-]")
_MAX_BYTES = 128


def label_request(scope: Scope) -> str:
    """Give the request its id. A client's id is cleaned and cut, and never used as a key."""
    given = next((value for name, value in scope["headers"] if name == HEADER), b"")
    label = _UNSAFE.sub(b"", given[: 2 * _MAX_BYTES])[:_MAX_BYTES].decode("ascii")
    scope[_KEY] = label or uuid.uuid4().hex
    return request_id(scope)


def request_id(scope: Scope) -> str:
    """The id that ``label_request`` gave."""
    label: str = scope.get(_KEY, "")
    return label
