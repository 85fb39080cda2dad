"""The OpenAPI document, made from the route table and the message types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dovetail.core.server.context import Context
from dovetail.core.server.errors import ErrorEnvelope

__all__ = ["Endpoint", "describe", "serve_document"]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One route: what it takes and gives."""

    path: str
    method: str
    handler: Any
    """``(Request) -> Response``, asynchronous."""
    summary: str
    request: type[msgspec.Struct] | None = None
    response: type[msgspec.Struct] | None = None
    media_type: str = "application/json"
    streams: type[msgspec.Struct] | None = None
    """What each event of a streamed answer holds."""

    @property
    def name(self) -> str:
        """A unique identifier made of the method and the path."""
        words = self.path.replace("{", "").replace(":path}", "").replace("}", "").split("/")
        return "_".join([self.method.lower(), *filter(None, words)])


def describe(context: Context, endpoints: Sequence[Endpoint], public: frozenset[str]) -> bytes:
    """The document as JSON.

    Args:
        context: The server.
        endpoints: The route table.
        public: Paths that need no key.
    """
    kinds: set[type[msgspec.Struct]] = {ErrorEnvelope}
    kinds.update(k for e in endpoints for k in (e.request, e.response, e.streams) if k)
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    _, components = msgspec.json.schema_components(
        ordered, ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = endpoint.path.replace(":path}", "}")
        operation = _operation(endpoint, is_public=endpoint.path in public)
        paths.setdefault(path, {})[endpoint.method.lower()] = operation
    document = {
        "openapi": "3.1.0",
        "info": {"title": "Dovetail", "version": context.version},
        "servers": [{"url": context.settings.root_path or "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return msgspec.json.encode(document)


def _operation(endpoint: Endpoint, *, is_public: bool) -> dict[str, Any]:
    content: dict[str, Any] = {endpoint.media_type: _schema(endpoint.response)}
    if endpoint.streams is not None:
        content["text/event-stream"] = _schema(endpoint.streams)
    operation: dict[str, Any] = {
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {
                "description": "A refusal or a failure.",
                "content": {"application/json": _schema(ErrorEnvelope)},
            },
        },
        "security": [] if is_public else [{"key": []}],
    }
    if endpoint.request is not None:
        body = {"application/json": _schema(endpoint.request)}
        operation["requestBody"] = {"required": True, "content": body}
    if "{" in endpoint.path:
        name = endpoint.path.partition("{")[2].partition(":")[0]
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation


def _schema(kind: type[msgspec.Struct] | None) -> dict[str, Any]:
    if kind is None:
        return {"schema": {"type": "string"}}
    return {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}


async def serve_document(document: Callable[[], bytes], http: Request) -> Response:
    """GET /openapi.json."""
    return Response(document(), media_type="application/json")
