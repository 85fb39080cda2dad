"""``dovetail generate``: complete one or several prompts."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dovetail.core.cli.arguments import add_engine_arguments, engine_config
from dovetail.core.cli.config_file import add_config_argument
from dovetail.core.cli.console import emit
from dovetail.core.cli.loading import running_engine
from dovetail.core.cli.parser import Parser, UsageError
from dovetail.core.cli.sampling import add_sampling_arguments, sampling_params

if TYPE_CHECKING:
    from dovetail.core.engine.api import EngineClient
    from dovetail.core.request import PromptTokens, RequestOutput, SamplingParams

__all__ = ["add_arguments", "run"]

_MAX_TOKENS = 128


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""
    parser.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="Text to complete; without one, stdin is read."
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Write one JSON object per prompt and line, in the order of the prompts.",
    )
    parser.add_argument("--n", type=int, default=1, help="Completions per prompt. Default: 1.")
    add_config_argument(parser)
    add_sampling_arguments(parser)
    add_engine_arguments(parser)


def run(namespace: argparse.Namespace) -> int:
    """Complete the prompts; returns the exit status."""
    config = engine_config(namespace)
    if config.skip_tokenizer_init:
        raise UsageError("generate needs the tokenizer: leave out --skip-tokenizer-init")
    prompts = namespace.prompt or [sys.stdin.read()]
    if not all(prompts):
        raise UsageError("the prompt is empty; give one as an argument or on stdin")

    async def work() -> None:
        async with running_engine(config) as engine:
            defaults = engine.info.default_params
            params = sampling_params(namespace, defaults, max_tokens=_MAX_TOKENS, n=namespace.n)
            await complete(engine, prompts, params, as_json=namespace.json)

    asyncio.run(work())
    return 0


async def complete(
    engine: EngineClient, prompts: Sequence[str], params: SamplingParams, *, as_json: bool
) -> None:
    """Write the completions of all prompts; a single one appears as it is generated."""
    tokens = [_tokens(engine, prompt) for prompt in prompts]
    if len(prompts) == 1 and params.n == 1 and not as_json:
        async for delta in engine.stream(tokens[0], params):
            emit("".join(part.text for part in delta.completions), end="")
        emit()
        return
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_finish(engine, prompt, params)) for prompt in tokens]
        for index, task in enumerate(tasks):
            output = await task
            emit(json.dumps(_as_json(index, output)) if as_json else _as_text(index, output))


def _tokens(engine: EngineClient, prompt: str) -> PromptTokens:
    from dovetail.core.request import PromptTokens

    if engine.tokenizer is None:
        raise UsageError("the model has no tokenizer: prompts cannot be text")
    return PromptTokens(text=prompt, token_ids=engine.tokenizer.encode(prompt))


async def _finish(
    engine: EngineClient, prompt: PromptTokens, params: SamplingParams
) -> RequestOutput:
    """The last output of a request, which holds all of it."""
    latest = None
    async for output in engine.generate(prompt, params):
        latest = output
    if latest is None:
        raise UsageError("the engine gave no output")
    return latest


def _as_json(index: int, output: RequestOutput) -> dict[str, Any]:
    return {
        "index": index,
        "prompt": output.prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "completions": [
            {
                "index": part.index,
                "text": part.text,
                "finish_reason": part.finish_reason,
                "num_tokens": len(part.token_ids),
            }
            for part in output.outputs
        ],
    }


def _as_text(index: int, output: RequestOutput) -> str:
    head = " ".join((output.prompt or "").split())[:60]
    blocks = []
    for part in output.outputs:
        number = f"{index + 1}" if len(output.outputs) == 1 else f"{index + 1}.{part.index + 1}"
        blocks.append(f"--- {number}: {head}\n{part.text}")
    return "\n".join(blocks)
