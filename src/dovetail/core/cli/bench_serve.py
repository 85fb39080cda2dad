"""``dovetail bench serve``: what clients of a running server see."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.core.cli.api_key import key_header
from dovetail.core.cli.bench import (
    add_workload_arguments,
    draw_samples,
    number,
    percentile_list,
    with_defaults,
    write_json,
)
from dovetail.core.cli.config_file import add_config_argument
from dovetail.core.cli.console import Progress, emit, note
from dovetail.core.cli.parser import Parser, UsageError, checked
from dovetail.core.config.parsers import mapping
from dovetail.core.errors import UserError

if TYPE_CHECKING:
    from dovetail.core.bench.client import ServedModel
    from dovetail.core.bench.http import HttpClient
    from dovetail.core.bench.load import Load
    from dovetail.core.bench.workloads import Sample
    from dovetail.core.tokenizer import Tokenizer

__all__ = ["add_arguments", "run"]

_ROUTES = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
_POLL_SECONDS = 1.0


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""
    _add_server_arguments(parser)
    _add_load_arguments(parser)
    _add_result_arguments(parser)
    add_config_argument(parser)
    add_workload_arguments(parser)


def _add_server_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("Server")
    group.add_argument("--base-url", "--url", metavar="URL", help="Such as http://host:8000.")
    group.add_argument("--host", default="127.0.0.1", help="Default: 127.0.0.1.")
    group.add_argument("--port", type=int, default=8000, help="Default: 8000.")
    group.add_argument(
        "--backend",
        choices=tuple(_ROUTES),
        default="openai",
        help="Which route: completions or chat completions. Default: openai.",
    )
    group.add_argument("--endpoint", metavar="PATH", help="The route's path, if it is another.")
    group.add_argument("--model", help="Default: the first model that the server offers.")
    group.add_argument("--api-key", metavar="KEY", help="Default: DOVETAIL_API_KEY.")
    group.add_argument(
        "--tokenizer", metavar="MODEL", help="Default: the served model's, if it is found here."
    )
    group.add_argument("--insecure", action="store_true", help="Accept any certificate.")
    group.add_argument(
        "--ready-check-timeout-sec",
        type=number("--ready-check-timeout-sec", 0),
        default=600,
        metavar="S",
        help="Seconds to wait for the server. Default: 600.",
    )


def _add_load_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("Load")
    group.add_argument(
        "--request-rate",
        type=float,
        default=float("inf"),
        metavar="R",
        help="Requests per second; inf sends all at once. Default: inf.",
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="1 is a Poisson process, less comes in bursts, more is more even. Default: 1.",
    )
    group.add_argument(
        "--max-concurrency",
        type=number("--max-concurrency"),
        metavar="N",
        help="The most requests under way. Default: no limit.",
    )
    group.add_argument("--num-warmups", type=number("--num-warmups", 0), default=0, metavar="N",
                       help="Requests before the measurement. Default: 0.")  # fmt: skip
    group.add_argument("--ignore-eos", action="store_true", help="Generate the full length.")
    group.add_argument("--temperature", type=float, help="Default: the server's.")
    group.add_argument(
        "--extra-body",
        type=checked("--extra-body", mapping),
        default={},
        metavar="JSON",
        help="Further entries of each request.",
    )
    group.add_argument("--seed", type=int, default=0, help="Of prompts and arrivals. Default: 0.")


def _add_result_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("Result")
    group.add_argument(
        "--percentile-metrics",
        default="ttft,tpot,itl",
        metavar="LIST",
        help="Of ttft, tpot, itl, e2el. Default: ttft,tpot,itl.",
    )
    group.add_argument(
        "--metric-percentiles",
        type=checked("--metric-percentiles", percentile_list),
        default=[99.0],
        metavar="LIST",
        help="Default: 99.",
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="Limits in milliseconds that a good request keeps, such as ttft:200 tpot:50.",
    )
    group.add_argument("--save-result", action="store_true", help="Write the result as JSON.")
    group.add_argument(
        "--save-detailed", action="store_true", help="With an entry per request; implies the above."
    )
    group.add_argument("--result-dir", default=".", metavar="DIR", help="Default: here.")
    group.add_argument("--result-filename", metavar="FILE", help="Default: from date and model.")
    group.add_argument("--label", help="A name for the run, kept in the result.")
    group.add_argument("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="Kept too.")


def run(namespace: argparse.Namespace) -> int:
    """Measure and report; returns 1 if no request was served."""
    from dovetail.core.bench.metrics import METRICS, parse_goodput
    from dovetail.core.bench.report import serve_report

    namespace = with_defaults(namespace)
    metrics = [name for name in namespace.percentile_metrics.split(",") if name]
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise UsageError(f"--percentile-metrics: there is no {unknown[0]!r}, of {list(METRICS)}")
    goodput = parse_goodput(namespace.goodput)
    result = asyncio.run(_measure(namespace, metrics, goodput))
    emit(serve_report(result, metrics=metrics, percentiles=namespace.metric_percentiles))
    failures = [error for error in result["errors"] if error]
    for error in failures[:3]:
        note(f"dovetail: warning: a request failed: {error}")
    if namespace.save_result or namespace.save_detailed:
        write_json(_result_file(namespace, result), _kept(namespace, result))
    return 0 if result["completed"] else 1


async def _measure(
    namespace: argparse.Namespace, metrics: list[str], goodput: dict[str, float]
) -> dict[str, Any]:
    import numpy as np

    from dovetail.core.bench.arrivals import arrival_times
    from dovetail.core.bench.http import HttpClient
    from dovetail.core.bench.load import Load, run_load
    from dovetail.core.bench.metrics import details, summarise

    client = HttpClient(
        namespace.base_url or f"http://{namespace.host}:{namespace.port}",
        headers=key_header(namespace.api_key),
        verify=not namespace.insecure,
    )
    served = await wait_for_server(client, namespace.ready_check_timeout_sec)
    load = Load(
        route=namespace.endpoint or _ROUTES[namespace.backend],
        model=namespace.model or served.id,
        max_concurrency=namespace.max_concurrency,
        ignore_eos=namespace.ignore_eos,
        extra=_extra(namespace),
    )
    samples = _samples(namespace, load, served)
    await _warm_up(client, load, samples[: namespace.num_warmups])
    rng = np.random.default_rng(namespace.seed + 1)
    times = arrival_times(
        len(samples), namespace.request_rate, rng, burstiness=namespace.burstiness
    )
    progress = Progress()
    traces, duration = await run_load(
        client, load, samples, times, lambda n: progress.show(f"finished {n} of {len(samples)}")
    )
    progress.clear()
    await client.close()
    summary = summarise(
        traces,
        duration,
        percentiles=namespace.metric_percentiles,
        metrics=metrics,
        goodput=goodput,
    )
    return {**_about(namespace, load, served), **summary, **details(traces)}


async def wait_for_server(client: HttpClient, timeout: float) -> ServedModel:
    """The first model of a server that may still be starting.

    Raises:
        HttpClientError: It could not be reached within ``timeout`` seconds, or refuses.
    """
    from dovetail.core.bench.client import first_model
    from dovetail.core.bench.http import HttpClientError

    end = time.monotonic() + timeout
    progress = Progress()
    while True:
        try:
            model = await first_model(client)
            break
        except HttpClientError as error:
            if time.monotonic() >= end or error.status not in (None, 503):
                raise
            progress.show(f"waiting for {client.base_url}: {error}")
        await asyncio.sleep(_POLL_SECONDS)
    progress.clear()
    return model


def _extra(namespace: argparse.Namespace) -> dict[str, Any]:
    extra = dict(namespace.extra_body)
    if namespace.temperature is not None:
        extra["temperature"] = namespace.temperature
    return extra


def _samples(namespace: argparse.Namespace, load: Load, served: ServedModel) -> list[Sample]:
    import dataclasses

    tokenizer = _tokenizer(namespace, served)
    samples = draw_samples(
        namespace, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer, seed=namespace.seed
    )
    if load.route == _ROUTES["openai-chat"]:
        samples = [
            dataclasses.replace(s, text=s.text or tokenizer.decode(s.token_ids)) for s in samples
        ]
    longest = max(sample.prompt_len + sample.output_len for sample in samples)
    if served.max_model_len is not None and longest > served.max_model_len:
        note(
            f"dovetail: warning: the longest request has {longest} tokens, and the model's"
            f" limit is {served.max_model_len}: lower --input-len or --output-len"
        )
    return samples


def _tokenizer(namespace: argparse.Namespace, served: ServedModel) -> Tokenizer:
    """The tokenizer that was named, else that of the served model, if it is on this machine."""
    from dovetail.core.config.locate import locate, locate_locally
    from dovetail.core.tokenizer import load_tokenizer

    if namespace.tokenizer:
        return load_tokenizer(locate(namespace.tokenizer, tokenizer_only=True))
    for name in (served.root, namespace.model, served.id):
        if not name:
            continue
        try:
            return load_tokenizer(locate_locally(name, tokenizer_only=True))
        except UserError as error:
            reason = str(error)
    raise UsageError(f"the served model's tokenizer is not here ({reason}); name one: --tokenizer")


async def _warm_up(client: HttpClient, load: Load, samples: list[Sample]) -> None:
    from dovetail.core.bench.load import run_load

    if samples:
        await run_load(client, load, samples, [0.0] * len(samples))


def _about(namespace: argparse.Namespace, load: Load, served: ServedModel) -> dict[str, Any]:
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": namespace.backend,
        "backend": namespace.backend,
        "label": namespace.label,
        "model_id": load.model,
        "tokenizer_id": namespace.tokenizer or served.root or load.model,
        "num_prompts": namespace.num_prompts,
        "request_rate": namespace.request_rate if namespace.request_rate < float("inf") else "inf",
        "burstiness": namespace.burstiness,
        "max_concurrency": namespace.max_concurrency,
    }


def _result_file(namespace: argparse.Namespace, result: dict[str, Any]) -> Path:
    model = result["model_id"].rstrip("/").rpartition("/")[2]
    limit = f"-concurrency{namespace.max_concurrency}" if namespace.max_concurrency else ""
    name = f"{namespace.backend}-{result['request_rate']}qps{limit}-{model}-{result['date']}.json"
    return Path(namespace.result_dir) / (namespace.result_filename or name)


def _kept(namespace: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """What goes into the file: the details only if they were asked for."""
    per_request = () if namespace.save_detailed else (
        "input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times",
        "generated_texts", "errors",
    )  # fmt: skip
    kept = {key: value for key, value in result.items() if key not in per_request}
    for entry in namespace.metadata:
        key, equals, value = entry.partition("=")
        if not equals:
            raise UsageError(f"--metadata takes KEY=VALUE, not {entry!r}")
        kept[key] = value
    return json.loads(json.dumps(kept))  # type: ignore[no-any-return]
