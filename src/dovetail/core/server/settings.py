"""What an operator chooses about the server."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields

from dovetail.core.errors import ConfigError

__all__ = ["API_KEY_VARIABLE", "ALWAYS_PUBLIC", "Limits", "ServerError", "ServerSettings"]

API_KEY_VARIABLE = "DOVETAIL_API_KEY"
"""Environment variable with API keys, separated by commas."""

ALWAYS_PUBLIC = frozenset({"/live", "/ready", "/health", "/version"})
"""Routes that never ask for a key: probes cannot send one."""


class ServerError(ConfigError):
    """The server cannot start: the address is taken, a certificate is unreadable, and so on."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what one client may cost. All are checked before the work they bound."""

    header_bytes: int = 64 * 1024
    """Bytes of request line and headers; more is answered 431."""
    header_count: int = 128
    """Header lines; more is answered 431."""
    header_deadline_s: float = 10.0
    """Seconds from the first byte of a request to the end of its headers; then 408."""
    body_bytes: int = 32 * 1024 * 1024
    """Bytes of a request body; more is answered 413."""
    body_stall_s: float = 60.0
    """Seconds without a further byte of a body; then 408."""
    write_stall_s: float = 60.0
    """Seconds that a client may be behind without reading enough to be sent more; then it is cut
    off. Data is held back while the buffers of the system and 64 KB of our own are full."""
    idle_connection_s: int = 75
    """Seconds that a connection is kept open between two requests."""
    num_prompts: int = 256
    """Prompts in one completion request."""
    num_choices: int = 1024
    """Prompts times ``n`` in one request."""
    num_beams: int = 32
    """Beams of one search; each is computed like a request of its own."""
    num_prompt_logprobs: int = 1 << 20
    """Prompt tokens times alternatives asked for, over all prompts of one request."""
    num_form_chars: int = 1 << 24
    """Characters of a schema or grammar times prompts times ``n``: each sequence has its own."""
    tokenize_chars: int = 4 * 1024 * 1024
    """Characters of a text for ``/tokenize``, which the model's context does not bound."""
    json_depth: int = 64
    """Nesting inside fields of free form, such as tool parameters."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) <= 0:
                raise ConfigError(f"{item.name} must be greater than 0.")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server presents its model.

    Raises:
        ConfigError: A value cannot be used; the message says which and why.
    """

    served_model_names: tuple[str, ...] = ()
    """Names that requests may give as ``model``; empty: the model's own name."""
    api_keys: tuple[str, ...] | None = field(default=None, repr=False)
    """Keys that open the guarded routes. None reads ``DOVETAIL_API_KEY``; empty asks for none."""
    public_paths: tuple[str, ...] = ()
    """Further routes that need no key, such as ``/metrics``."""
    chat_template: str | None = None
    """Template text, or name, in place of the model's own."""
    trust_request_chat_template: bool = False
    """Let a request bring its own template. A template is a program: only for trusted clients."""
    response_role: str = "assistant"
    """The role of what the model says in chat answers."""
    root_path: str = ""
    """Path under which a proxy mounts the server, and which it strips from requests."""
    keep_alive_s: float = 15.0
    """Seconds of silence in a stream after which a comment is sent, so that proxies hold it."""
    request_timeout_s: float | None = None
    """Seconds that a request may take which names no ``timeout`` of its own; None: any number."""
    access_log: bool = True
    """Log one line for each request, on the logger ``dovetail.server.access``."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if any(not key.strip() for key in self.api_keys or ()):
            raise ConfigError("An API key must not be empty: it would let everyone in.")
        if any(not name for name in self.served_model_names):
            raise ConfigError("A served model name must not be empty.")
        for path in self.public_paths:
            if not path.startswith("/"):
                raise ConfigError(f"Public path {path!r} must start with '/'.")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path {self.root_path!r} must look like '/prefix'.")
        if self.request_timeout_s is not None and not 0 < self.request_timeout_s < math.inf:
            raise ConfigError("request_timeout_s must be a number greater than 0.")
        if self.keep_alive_s <= 0:
            raise ConfigError("keep_alive_s must be greater than 0.")

    def resolve_api_keys(self) -> tuple[str, ...]:
        """The keys in force: those given, else those in the environment."""
        if self.api_keys is not None:
            return self.api_keys
        given = os.environ.get(API_KEY_VARIABLE, "").split(",")
        return tuple(key.strip() for key in given if key.strip())
