"""``dovetail serve``: a model over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

from dovetail.core.cli.arguments import add_engine_arguments, engine_config
from dovetail.core.cli.banner import curl_line, heading, ready_lines
from dovetail.core.cli.chat import template_text
from dovetail.core.cli.config_file import add_config_argument
from dovetail.core.cli.console import note
from dovetail.core.cli.loading import bundled_model, show_loading
from dovetail.core.cli.parser import Parser, UsageError
from dovetail.core.cli.stats_line import stats_line
from dovetail.core.config.schema import EngineConfig
from dovetail.core.errors import EngineDeadError

if TYPE_CHECKING:
    from dovetail.core.engine.async_engine import AsyncEngine
    from dovetail.core.server.settings import ServerSettings

__all__ = ["add_arguments", "run", "server_settings"]

_STATS_SECONDS = 10.0
_FAILED = 1
_log = logging.getLogger("dovetail.stats")


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""
    parser.add_argument(
        "model_given_first", nargs="?", metavar="MODEL", help="As --model, which see."
    )
    add_config_argument(parser)
    _add_address_arguments(parser)
    _add_api_arguments(parser)
    add_engine_arguments(parser)


def _add_address_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("Server")
    group.add_argument("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 is every"
                       " one of this machine. Default: 127.0.0.1.")  # fmt: skip
    group.add_argument(
        "--port", type=int, default=8000, help="0 takes any free one. Default: 8000."
    )
    group.add_argument("--uds", metavar="PATH", help="Unix socket, in place of host and port.")
    group.add_argument(
        "--admin-socket",
        metavar="PATH",
        help="Unix socket, for the owner only, that answers GET /debug/state. Default: none.",
    )
    group.add_argument("--ssl-certfile", metavar="FILE", help="Certificate, for HTTPS.")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="The certificate's key.")
    group.add_argument("--ssl-ca-certs", metavar="FILE", help="Clients must be signed by these.")
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="Seconds that running requests have after SIGTERM. Default: 30.",
    )
    group.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error", "critical"),
        default="info",
        help="Default: info.",
    )


def _add_api_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("API")
    group.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="Key that clients must send; may be given several times. Default: DOVETAIL_API_KEY.",
    )
    group.add_argument(
        "--public-paths",
        nargs="+",
        default=[],
        metavar="PATH",
        help="Further routes that need no key, such as /metrics.",
    )
    group.add_argument(
        "--root-path", default="", metavar="PATH", help="Path that a proxy strips from requests."
    )
    group.add_argument(
        "--chat-template", metavar="FILE", help="Template, or a file that holds one."
    )
    group.add_argument(
        "--trust-request-chat-template",
        action="store_true",
        help="Let requests bring their own template: only for clients that you trust.",
    )
    group.add_argument(
        "--response-role", default="assistant", metavar="ROLE", help="Default: assistant."
    )
    group.add_argument(
        "--request-timeout",
        type=float,
        default=None,
        metavar="S",
        help="Seconds after which a request that names no timeout is ended with status 504. "
        "Default: never.",
    )
    group.add_argument(
        "--disable-access-log", action="store_true", help="Write no line per request."
    )


def run(namespace: argparse.Namespace) -> int:
    """Serve until told to stop; returns the exit status.

    0 after all requests were finished, 75 if some had to be ended, 70 if the engine died.
    """
    from dovetail.core.server.listen import bind, new_event_loop

    began = time.monotonic()
    config = engine_config(_with_model(namespace))
    settings = server_settings(namespace, config)
    listener = bind(namespace.host, namespace.port, uds=namespace.uds)
    with listener, asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_serve(namespace, config, settings, listener, began))


def _with_model(namespace: argparse.Namespace) -> argparse.Namespace:
    """The model that was given without a flag takes the flag's place."""
    first = namespace.model_given_first
    if first is None:
        return namespace
    if namespace.config is None and getattr(namespace, "model", first) != first:
        raise UsageError(f"two models: {first} and --model {namespace.model}")
    return argparse.Namespace(**{**vars(namespace), "model": first})


def server_settings(namespace: argparse.Namespace, config: EngineConfig) -> ServerSettings:
    """How the server presents the model. Raises ConfigError."""
    from dovetail.core.server.settings import ServerSettings

    return ServerSettings(
        served_model_names=config.served_model_name,
        api_keys=tuple(namespace.api_key) if namespace.api_key else None,
        public_paths=tuple(namespace.public_paths),
        chat_template=template_text(namespace.chat_template),
        trust_request_chat_template=namespace.trust_request_chat_template,
        response_role=namespace.response_role,
        root_path=namespace.root_path,
        request_timeout_s=namespace.request_timeout,
        access_log=not namespace.disable_access_log,
    )


async def _serve(
    namespace: argparse.Namespace,
    config: EngineConfig,
    settings: ServerSettings,
    listener: socket.socket,
    began: float,
) -> int:
    from dovetail.core.engine.async_engine import AsyncEngine

    engine = await AsyncEngine.start(config)
    note(heading(version("dovetail"), engine.selection.name, engine.selection.reason))
    if config.model is None:
        note(bundled_model())
    companion: asyncio.Task[None] | None = None

    def on_listening(url: str) -> None:
        nonlocal companion
        note(f"Listening on {url}, loading the model")
        companion = asyncio.create_task(_accompany(engine, settings, url, began))

    try:
        # The engine process loads meanwhile.
        from dovetail.core.server.run import EXIT_ENGINE_DEAD, serve

        status = await serve(
            engine,
            settings,
            listener=listener,
            ssl_certfile=namespace.ssl_certfile,
            ssl_keyfile=namespace.ssl_keyfile,
            ssl_ca_certs=namespace.ssl_ca_certs,
            shutdown_timeout=namespace.shutdown_timeout,
            admin_path=namespace.admin_socket,
            on_listening=on_listening,
        )
    finally:
        if companion is not None:
            companion.cancel()
            await asyncio.gather(companion, return_exceptions=True)
        await engine.close()  # a second time, for the most part: that does nothing
    never_ready = status == EXIT_ENGINE_DEAD and not engine.banner
    return _FAILED if never_ready else status


async def _accompany(engine: AsyncEngine, settings: ServerSettings, url: str, began: float) -> None:
    """Show the loading, then the banner, then a line of statistics now and then."""
    try:
        await show_loading(engine)
    except EngineDeadError:
        return  # the server says so, and ends
    names = settings.served_model_names or (engine.info.name,)
    template = settings.chat_template or (engine.tokenizer and engine.tokenizer.chat_template)
    try_it = curl_line(
        url,
        names[0],
        chat=bool(template),
        needs_key=bool(settings.resolve_api_keys()),
        insecure=url.startswith("https:"),
    )
    seconds = time.monotonic() - began
    for line in ready_lines(engine.banner, url, seconds=seconds, try_it=try_it):
        note(line)
    if not engine.config.disable_log_stats:
        await _log_stats(engine)


async def _log_stats(engine: AsyncEngine) -> None:
    before, then = engine.stats, time.monotonic()
    while True:
        await asyncio.sleep(_STATS_SECONDS)
        now = time.monotonic()
        line = stats_line(before, engine.stats, now - then)
        if line is not None:
            _log.info("%s", line)
        before, then = engine.stats, now
