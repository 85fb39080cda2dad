"""What supervisors and dashboards ask: alive, ready, which version, which figures."""

from __future__ import annotations

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from dovetail.core.server.admission import unavailable
from dovetail.core.server.answers import json_response
from dovetail.core.server.context import Context
from dovetail.core.server.errors import ErrorBody, HttpError, to_failure
from dovetail.core.server.replies import Health, Version

__all__ = ["health", "live", "metrics_endpoint", "ready", "version"]


class _Unready(msgspec.Struct, kw_only=True):
    status: str
    error: ErrorBody


async def live(context: Context, http: Request) -> Response:
    """200 as long as the server can answer at all."""
    return json_response(Health(status="live"))


async def ready(context: Context, http: Request) -> Response:
    """200 if a request sent now would be served; otherwise 503 with the reason."""
    refusal = unavailable(context.client.status, draining=context.admission.draining)
    return json_response(Health(status="ready")) if refusal is None else _unready(refusal)


async def health(context: Context, http: Request) -> Response:
    """The same as ``ready``, under the name that most probes use."""
    refusal = unavailable(context.client.status, draining=context.admission.draining)
    return json_response(Health(status="ok")) if refusal is None else _unready(refusal)


def _unready(refusal: HttpError) -> Response:
    failure = to_failure(refusal)
    body = _Unready(status=refusal.code or "unready", error=failure.envelope().error)
    return Response(
        msgspec.json.encode(body),
        status_code=failure.status,
        headers=dict(failure.headers),
        media_type="application/json",
    )


async def version(context: Context, http: Request) -> Response:
    """The version of Dovetail."""
    return json_response(Version(version=context.version))


async def metrics_endpoint(registry: CollectorRegistry, http: Request) -> Response:
    """Figures for Prometheus."""
    return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})
