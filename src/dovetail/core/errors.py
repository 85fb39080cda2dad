"""Every error that Dovetail raises on purpose.

::

    DovetailError
    ├── UserError                 what was asked for is wrong; the message says what to do
    │   ├── ConfigError           a flag, an argument or an environment variable
    │   ├── CheckpointError       a model folder: a file, a tensor or a setting in it
    │   ├── UnsupportedError      valid, but this platform or model cannot do it
    │   ├── SelectionError        no platform, or no attention backend, fits
    │   └── RequestError          one request; carries the HTTP status, the parameter and a code
    │       ├── ContextLengthError
    │       └── NotFoundError
    ├── PluginError               a plug-in is broken; names its package and version
    ├── OverloadedError           try again later: the queue is full, or the server is draining
    ├── OutOfMemoryError          the device or host has too little memory, with the figures
    ├── RequestFailedError        the engine could not finish one request; the others go on
    ├── RequestTimeoutError       one request was not finished before its deadline
    ├── EngineDeadError           the engine process ended and could not be brought back
    ├── InjectedError             a fault that was ordered, to see that the rest bears it
    └── InvariantError            a bug: the engine found its own state wrong; carries the scope
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DovetailError",
    "EngineDeadError",
    "InjectedError",
    "InvariantError",
    "NotFoundError",
    "OutOfMemoryError",
    "OverloadedError",
    "PluginError",
    "RequestError",
    "RequestFailedError",
    "RequestTimeoutError",
    "SelectionError",
    "UnsupportedError",
    "UserError",
]


class DovetailError(Exception):
    """The root: catch this to catch everything that Dovetail raises on purpose."""


class UserError(DovetailError):
    """The caller can mend it. The message says what was wrong, what is allowed, what to do."""


class ConfigError(UserError):
    """A flag, an argument or an environment variable is wrong."""


class CheckpointError(UserError):
    """A model folder is missing something, or holds something that should not be there."""


class UnsupportedError(UserError):
    """The wish is valid, but the chosen platform or model cannot do it."""


class SelectionError(UserError):
    """No platform or backend fits; the message lists every candidate with its reason."""


class RequestError(UserError, ValueError):
    """One request is wrong. Answered with a 4xx status in the OpenAI error envelope.

    Args:
        message: What was wrong and what is allowed.
        param: Dotted path to the field, such as ``messages.0.content``; None if no one field.
        code: A short stable string that clients may test, such as ``model_not_found``.
    """

    status = 400
    default_code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code if code is not None else self.default_code


class ContextLengthError(RequestError):
    """The prompt, or the prompt and its answer, is longer than the model's context."""

    default_code = "context_length_exceeded"


class NotFoundError(RequestError):
    """A model or another named thing does not exist."""

    status = 404
    default_code = "model_not_found"


class PluginError(DovetailError):
    """A plug-in failed to load or broke its contract. The message names package and version."""


class OverloadedError(DovetailError):
    """No request can be taken now. ``retry_after`` is in seconds; ``status`` is 429 or 503."""

    def __init__(self, message: str, *, status: int = 429, retry_after: int = 1) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class OutOfMemoryError(DovetailError):
    """Too little memory. The message gives what is needed, what there is, and which flag helps."""


class RequestFailedError(DovetailError):
    """The engine could not finish this request. No other request is affected."""


class RequestTimeoutError(DovetailError):
    """The request was not finished before its deadline. Its blocks are free again."""


class EngineDeadError(DovetailError):
    """The engine process ended and could not be brought back."""


class InjectedError(DovetailError):
    """A fault that was ordered by ``DOVETAIL_FAULTS`` or by the simulator."""


class InvariantError(DovetailError):
    """The engine found its own state wrong.

    Args:
        scope: What has to be given up: ``request``, ``pool`` or ``engine``.
        message: The invariant and the values that break it.
    """

    def __init__(self, scope: str, message: str) -> None:
        super().__init__(f"[{scope}] {message}")
        self.scope = scope
