"""What every handler of one server shares."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import time
from dataclasses import dataclass, field

from dovetail.core.engine.api import EngineClient
from dovetail.core.errors import NotFoundError
from dovetail.core.server.admission import Admission
from dovetail.core.server.metrics import Metrics
from dovetail.core.server.parse import UnknownFields
from dovetail.core.server.settings import Limits, ServerSettings

__all__ = ["Context", "build_context"]


@dataclass(frozen=True, kw_only=True)
class Context:
    """One server's engine, settings and books."""

    client: EngineClient
    settings: ServerSettings
    names: tuple[str, ...]
    """Names under which the model is served; the first is the default."""
    version: str
    created: int
    """When the server was made, in seconds since the epoch."""
    fingerprint: str
    """Changes when answers to a seeded request may change."""
    metrics: Metrics
    admission: Admission = field(default_factory=Admission)
    unknown_fields: UnknownFields = field(default_factory=UnknownFields)

    @property
    def limits(self) -> Limits:
        """What one client may cost."""
        return self.settings.limits

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the vocabulary's longest token. The first use reads the vocabulary."""
        tokenizer = self.client.tokenizer
        if tokenizer is None:
            return 1
        return max(1, *(len(tokenizer.token_text(i)) for i in range(tokenizer.vocab_size)))

    def model_name(self, asked: str | None) -> str:
        """The served name that a request means.

        Raises:
            NotFoundError: No model is served under that name; the message lists those that are.
        """
        if asked is None:
            return self.names[0]
        if asked not in self.names:
            served = ", ".join(repr(name) for name in self.names)
            raise NotFoundError(
                f"The model {asked!r:.120} is not served here. Served: {served}.", param="model"
            )
        return asked


def build_context(client: EngineClient, settings: ServerSettings) -> Context:
    """Gather what the handlers of a new server need."""
    version = _version()
    names = settings.served_model_names or (client.info.name,)
    seed = f"{version}\0{client.info.name}\0{client.info.path}"
    return Context(
        client=client,
        settings=settings,
        names=names,
        version=version,
        created=int(time.time()),
        fingerprint=f"dovetail-{version}-{hashlib.sha256(seed.encode()).hexdigest()[:8]}",
        metrics=Metrics(names[0]),
    )


def _version() -> str:
    try:
        return importlib.metadata.version("dovetail")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
