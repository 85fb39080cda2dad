"""The application: its routes, and the layers around them."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dovetail.core.engine.api import EngineClient
from dovetail.core.errors import ConfigError
from dovetail.core.server import catalogue, generation, probes, protocol, replies
from dovetail.core.server.auth import AuthMiddleware
from dovetail.core.server.context import Context, build_context
from dovetail.core.server.errors import error_response, to_failure
from dovetail.core.server.exposition import new_registry
from dovetail.core.server.middleware import RequestMiddleware
from dovetail.core.server.openapi import Endpoint, describe, serve_document
from dovetail.core.server.pages import page
from dovetail.core.server.settings import ALWAYS_PUBLIC, ServerSettings

__all__ = ["create_app"]


def create_app(client: EngineClient, settings: ServerSettings | None = None) -> Starlette:
    """An ASGI application that serves ``client``.

    ``app.state.context`` is the server's ``Context``. What runs the application sets
    ``context.admission.draining`` before it stops.

    Raises:
        ConfigError: ``public_paths`` names a route that does not exist.
    """
    context = build_context(client, settings or ServerSettings())
    endpoints = [*_generating(context), *_describing(context), *_probes(context)]
    document = functools.cache(lambda: describe(context, endpoints, public))
    endpoints += _pages(document)
    public = ALWAYS_PUBLIC | _existing(context.settings.public_paths, endpoints)
    app = Starlette(
        routes=[Route(e.path, e.handler, methods=[e.method], name=e.name) for e in endpoints],
        middleware=[
            Middleware(RequestMiddleware, context.metrics, context.settings.access_log),
            Middleware(AuthMiddleware, context.settings.resolve_api_keys(), public),
        ],
        exception_handlers={HTTPException: _routing_refusal},
    )
    app.router.redirect_slashes = False
    app.state.context = context
    return app


def _bound(
    context: Context, handler: Callable[[Context, Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    return functools.partial(handler, context)


def _generating(context: Context) -> list[Endpoint]:
    """The routes that run the model."""
    return [
        Endpoint(
            path="/v1/chat/completions",
            method="POST",
            handler=_bound(context, generation.create_chat_completion),
            summary="Answer a conversation.",
            request=protocol.ChatCompletionRequest,
            response=replies.ChatCompletion,
            streams=replies.ChatChunk,
        ),
        Endpoint(
            path="/v1/completions",
            method="POST",
            handler=_bound(context, generation.create_completion),
            summary="Complete one prompt or several.",
            request=protocol.CompletionRequest,
            response=replies.Completion,
            streams=replies.Completion,
        ),
    ]


def _describing(context: Context) -> list[Endpoint]:
    """The routes about the model and its tokenizer."""
    return [
        Endpoint(
            path="/v1/models",
            method="GET",
            handler=_bound(context, catalogue.list_models),
            summary="The names under which the model is served.",
            response=replies.ModelList,
        ),
        Endpoint(
            path="/v1/models/{model:path}",
            method="GET",
            handler=_bound(context, catalogue.retrieve_model),
            summary="One served model.",
            response=replies.ModelCard,
        ),
        Endpoint(
            path="/tokenize",
            method="POST",
            handler=_bound(context, catalogue.tokenize),
            summary="Token ids of a text or a conversation.",
            request=protocol.TokenizeRequest,
            response=replies.Tokenized,
        ),
        Endpoint(
            path="/detokenize",
            method="POST",
            handler=_bound(context, catalogue.detokenize),
            summary="The text of token ids.",
            request=protocol.DetokenizeRequest,
            response=replies.Detokenized,
        ),
        Endpoint(
            path="/tokenizer_info",
            method="GET",
            handler=_bound(context, catalogue.tokenizer_info),
            summary="Special tokens and chat template.",
            response=replies.TokenizerInfo,
        ),
    ]


def _probes(context: Context) -> list[Endpoint]:
    """The routes for supervisors and dashboards."""
    answers: list[tuple[str, Any, str, Any]] = [
        ("/live", probes.live, "Whether the server answers at all.", replies.Health),
        ("/ready", probes.ready, "Whether a request would be served now.", replies.Health),
        ("/health", probes.health, "The same as /ready.", replies.Health),
        ("/version", probes.version, "The version of Dovetail.", replies.Version),
    ]
    endpoints = [
        Endpoint(path=path, method="GET", handler=_bound(context, handler), summary=s, response=r)
        for path, handler, s, r in answers
    ]
    endpoints.append(
        Endpoint(
            path="/metrics",
            method="GET",
            handler=functools.partial(probes.metrics_endpoint, new_registry(context)),
            summary="Figures for Prometheus.",
            media_type="text/plain",
        )
    )
    return endpoints


def _pages(document: Callable[[], bytes]) -> list[Endpoint]:
    """What a browser opens."""
    return [
        Endpoint(
            path="/openapi.json",
            method="GET",
            handler=functools.partial(serve_document, document),
            summary="This description.",
        ),
        Endpoint(
            path="/docs",
            method="GET",
            handler=page("docs.html"),
            summary="This description, for reading.",
            media_type="text/html",
        ),
        Endpoint(
            path="/",
            method="GET",
            handler=page("chat.html"),
            summary="A page to talk to the model.",
            media_type="text/html",
        ),
    ]


def _existing(paths: tuple[str, ...], endpoints: list[Endpoint]) -> frozenset[str]:
    """``paths``, each of which must be a route."""
    known = sorted({endpoint.path for endpoint in endpoints})
    for path in paths:
        if path not in known:
            near = difflib.get_close_matches(path, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
            raise ConfigError(f"Public path {path!r} is not a route. {hint}")
    return frozenset(paths)


async def _routing_refusal(request: Request, exc: Exception) -> Response:
    return error_response(to_failure(exc))
