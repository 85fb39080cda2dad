"""API keys: every route asks for one, unless it is listed as public."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Sequence

from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dovetail.core.server.errors import HttpError

__all__ = ["TENANT", "AuthMiddleware", "match_route"]

TENANT = "dovetail.tenant"
"""Scope key of a short digest of the API key in use."""


def match_route(routes: Sequence[BaseRoute], scope: Scope) -> BaseRoute | None:
    """The route that the router will take for ``scope``: the same rule, the same matching."""
    partial = None
    for route in routes:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return route
        if match is Match.PARTIAL and partial is None:
            partial = route
    return partial


class AuthMiddleware:
    """Lets a request pass if its route is public or it brings one of the keys.

    The decision is by the matched route, so no spelling of a path gets around it; a path without
    a route, and a route of another kind, ask for a key like any other.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], public_paths: Collection[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode("utf-8")) for key in keys]
        self._public = frozenset(public_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or raise 401."""
        if scope["type"] == "http" and self._digests:
            route = match_route(scope["app"].routes, scope)
            if route is not None:
                scope["route"] = route
            tenant = self._tenant(scope)
            if tenant is not None:
                scope[TENANT] = tenant
            elif not self._is_public(route):
                raise _refusal()
        await self._app(scope, receive, send)

    def _is_public(self, route: BaseRoute | None) -> bool:
        return isinstance(route, Route) and route.path in self._public

    def _tenant(self, scope: Scope) -> str | None:
        """A digest of the request's key; None if it has no valid one."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return None
        scheme, _, key = given[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:16] if any(matches) else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _refusal() -> HttpError:
    return HttpError(
        401,
        "This server asks for an API key: send the header 'Authorization: Bearer KEY'.",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )
