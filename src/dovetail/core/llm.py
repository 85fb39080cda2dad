"""``LLM``: a model in this process, for offline use."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, cast

from tqdm import tqdm

from dovetail.core.config.checkpoint import read_facts
from dovetail.core.config.env import read_environment, with_environment
from dovetail.core.config.schema import EngineConfig
from dovetail.core.engine.api import EngineStats
from dovetail.core.engine.beam_search import (
    BeamSearchOutput,
    BeamSearchParams,
    beam_search_output,
)
from dovetail.core.engine.build import Progress, build_engine
from dovetail.core.engine.collector import calm
from dovetail.core.engine.core import EngineCore
from dovetail.core.engine.intake import CacheRoom, Intake, model_info, read_tokenizer
from dovetail.core.engine.listeners import Listeners
from dovetail.core.engine.outputs import OutputAccumulator, OutputProcessor
from dovetail.core.errors import ConfigError, RequestError
from dovetail.core.faults import arm
from dovetail.core.plugins.selection import environment, select_platform
from dovetail.core.request import PromptTokens, Request, RequestOutput, SamplingParams
from dovetail.core.tokenizer import Tokenizer

__all__ = ["LLM", "Prompt"]

_log = logging.getLogger(__name__)

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or a mapping with ``prompt`` or ``prompt_token_ids``."""


class LLM:
    """Runs a model in this process. One thread may use it at a time.

    Args:
        model: A folder, or a name on the Hugging Face hub; None is the bundled demonstration model.
        settings: Any field of ``EngineConfig``, by the names that ``dovetail serve`` has as flags.

    Raises:
        ConfigError: A setting is unknown or wrong.
        SelectionError: No platform is usable, or not the one that was named.
        CheckpointError: The model cannot be found or read.
        OutOfMemoryError: The model or its cache does not fit.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        arm()
        config = EngineConfig.from_kwargs(model=model, **settings)
        config = with_environment(config, read_environment(os.environ))
        with ThreadPoolExecutor(1) as pool:  # Child processes are waited for meanwhile.
            selecting = pool.submit(select_platform, config.device, os.environ)
            facts = read_facts(config)
            self._tokenizer = read_tokenizer(config, facts)
            selection = selecting.result()
        for name, value in environment(selection.name, os.environ).items():
            os.environ.setdefault(name, value)
        built = build_engine(config, selection.name, _log_progress())
        self.config = built.config
        self.platform = built.platform
        self._core = built.core
        self._outputs = OutputProcessor(self._tokenizer)
        self._listeners = Listeners.installed(os.environ)
        self._intake = Intake(model_info(facts, config), self._tokenizer, seed=built.config.seed)
        room = CacheRoom(num_blocks=built.num_blocks, block_size=built.config.block_size)
        self._intake.settle(built.config.max_model_len, built.features, room)
        self._next_name = 0
        _log.info("device %s: %s", selection.name, selection.reason)
        for topic, line in built.banner.items():
            _log.info("%s: %s", topic, line)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, as many at a time as there is room for.

        Args:
            prompts: One prompt or several.
            sampling_params: For all, or one for each prompt; None takes the model's defaults.
            use_tqdm: Show a progress bar.
            priority: One number for each prompt; smaller goes first.
            timeout: Seconds after which what has not ended is ended, with what it has so far and
                ``finish_reason`` ``timeout``. Looked at between steps.

        Returns:
            One output per prompt, in the order of the prompts. A request that the engine had to
            give up has ``finish_reason`` ``error``; the others are complete.

        Raises:
            RequestError: A prompt or its parameters are wrong; nothing has been run then.
        """
        items = _as_list(prompts)
        params = self._params_for(items, sampling_params)
        tokens = [self._tokenise(item) for item in items]
        ranks = list(priority) if priority is not None else [0] * len(items)
        if len(ranks) != len(items):
            raise RequestError(
                f"{len(items)} prompts, but {len(ranks)} priorities.", param="priority"
            )
        requests = [
            self._intake.requests(
                t, p, priority=rank, cap_max_tokens=True, grammar=self._intake.grammar(p)
            )
            for t, p, rank in zip(tokens, params, ranks, strict=True)
        ]
        return self._run(tokens, params, requests, use_tqdm, timeout)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; each is a list of messages with role and content.

        Raises:
            RequestError: The model has no chat template, or the template refuses the messages.
        """
        tokenizer = self.get_tokenizer()
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = cast(
            "Sequence[Sequence[Mapping[str, Any]]]", messages if several else [messages]
        )
        prompts = [
            tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template=chat_template,
                template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        encoded: list[Prompt] = [
            {"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False), "prompt": text}
            if isinstance(text, str)
            else text
            for text in prompts
        ]
        return self.generate(encoded, sampling_params, use_tqdm=use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """Find the likeliest continuations of prompts.

        Returns:
            One output per prompt, in the order of the prompts, each with ``beam_width`` sequences,
            best first; none where the engine had to give the request up.

        Raises:
            RequestError: A prompt or the parameters are wrong; nothing has been run then.
        """
        outputs = self.generate(prompts, params.sampling_params(), use_tqdm=use_tqdm)
        return [beam_search_output(output, self._tokenizer) for output in outputs]

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ConfigError if ``skip_tokenizer_init`` was set."""
        if self._tokenizer is None:
            raise ConfigError("skip_tokenizer_init is set: give prompts as token ids.")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request uses where it says nothing: the model's ``generation_config.json``."""
        return self._intake.info.default_params

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes that no request uses."""
        self._core.scheduler.pool.forget_cached()

    @property
    def core(self) -> EngineCore:
        """The engine itself, for those who measure it; requests go through ``generate``."""
        return self._core

    @property
    def stats(self) -> EngineStats:
        """Counters since start, and gauges of now."""
        return self._core.stats()

    def close(self) -> None:
        """Give memory back. The object cannot be used afterwards."""
        self._intake.close()
        self._core.close()

    def _params_for(
        self, items: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None:
            return [self.get_default_sampling_params()] * len(items)
        if isinstance(params, SamplingParams):
            return [params] * len(items)
        if len(params) != len(items):
            raise RequestError(
                f"{len(items)} prompts, but {len(params)} sampling parameters.",
                param="sampling_params",
            )
        return list(params)

    def _tokenise(self, prompt: Prompt) -> PromptTokens:
        if isinstance(prompt, str):
            return PromptTokens(text=prompt, token_ids=self.get_tokenizer().encode(prompt))
        if isinstance(prompt, Mapping):
            if prompt.get("prompt_token_ids") is None:
                text = prompt.get("prompt")
                if not isinstance(text, str):
                    raise RequestError(
                        "A prompt given as a mapping needs 'prompt' (a text) or"
                        f" 'prompt_token_ids'; it has {sorted(prompt)}.",
                        param="prompts",
                    )
                return self._tokenise(text)
            return PromptTokens(
                text=prompt.get("prompt"), token_ids=_ids(prompt["prompt_token_ids"])
            )
        return PromptTokens(text=None, token_ids=_ids(prompt))

    def _run(
        self,
        prompts: list[PromptTokens],
        params: list[SamplingParams],
        requests: list[list[Request]],
        use_tqdm: bool,
        timeout: float | None,
    ) -> list[RequestOutput]:
        end = None if timeout is None else time.monotonic() + timeout
        accumulators: dict[str, OutputAccumulator] = {}
        for prompt, param, group in zip(prompts, params, requests, strict=True):
            name = str(self._next_name)
            self._next_name += 1
            ids = [request.id for request in group]
            self._outputs.add(name, prompt, param, ids, group[0].stop_token_ids)
            self._listeners.started(name, group)
            accumulators[name] = OutputAccumulator(name, prompt)
            for request in group:
                self._core.add(request)
        try:
            bar = tqdm(total=len(prompts), desc="Processed prompts", disable=not use_tqdm)
            with calm(), bar:
                while self._core.has_work():
                    if end is not None and time.monotonic() >= end:
                        self._time_out(accumulators)
                    self._deliver(accumulators, bar)
        except BaseException:
            for name in accumulators:
                self._core.abort(self._outputs.abort(name))
                self._listeners.ended(name, "abort")
            raise
        return [accumulator.output() for accumulator in accumulators.values()]

    def _time_out(self, accumulators: dict[str, OutputAccumulator]) -> None:
        """End everything that has not ended."""
        for name, accumulator in accumulators.items():
            if ids := self._outputs.abort(name):
                self._core.abort(ids)
                self._listeners.ended(name, "timeout")
                accumulator.end("timeout")

    def _deliver(self, accumulators: dict[str, OutputAccumulator], bar: Any) -> None:
        """One step, and what it produced."""
        result = self._outputs.process(self._core.step())
        self._listeners.stepped(self._core.stats)
        for name, item in result.deltas:
            if isinstance(item, Exception):
                _log.error("request %s failed: %s", name, item)
                accumulators[name].end("error")
                self._listeners.ended(name, "error")
                bar.update(1)
                continue
            accumulators[name].add(item)
            self._listeners.delivered(name, item)
            if item.finished:
                bar.update(1)
        if result.aborts:
            self._core.abort(result.aborts)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _ids(value: Any) -> list[int]:
    ids = list(value)
    if not set(map(type, ids)) <= {int}:
        raise RequestError("prompt_token_ids must be a list of integers.", param="prompt_token_ids")
    return ids


def _log_progress() -> Progress:
    """Show the loading as a progress bar, if standard error is a terminal."""
    bars: dict[str, Any] = {}

    def progress(name: str, done: int, total: int) -> None:
        stage, _, part = name.partition(": ")
        bar = bars.get(stage)
        if bar is None:
            unit = "B" if stage == "loading weights" else " parts"
            bar = bars[stage] = tqdm(
                total=total or None, desc=stage, unit=unit, unit_scale=True, disable=None
            )
        bar.set_postfix_str(part, refresh=False)
        bar.update(done - bar.n)
        if total and done >= total:
            bar.close()

    return progress
