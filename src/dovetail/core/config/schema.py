"""What the user wants: one frozen value that flags, arguments and files all end in."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from dovetail.core.config import parsers as p
from dovetail.core.config.foreign import judge_foreign
from dovetail.core.config.option import Option, option, options_of
from dovetail.core.config.speculative import SpeculativeConfig
from dovetail.core.errors import ConfigError

__all__ = ["EngineConfig", "engine_options", "nearest"]

_log = logging.getLogger(__name__)

_MODEL, _PLATFORM, _MEMORY, _SCHEDULING = "Model", "Platform", "Memory", "Scheduling"
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_KV_DTYPES = (*_DTYPES, "fp8_e4m3", "fp8_e5m2", "int8")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The user's intent. None, or ``auto``, leaves a choice to :func:`resolve`.

    Values are normalised on construction: ``max_model_len="25.6k"`` becomes 25600.

    Raises:
        ConfigError: A value is not allowed; names the field and what is.
    """

    model: str | None = option(
        None,
        parse=p.maybe(p.text, words=()),
        group=_MODEL,
        help="Model folder, or the name of a model on the Hugging Face hub. "
        "Without it, the small bundled model is used.",
    )
    served_model_name: tuple[str, ...] = option(
        (),
        parse=p.names,
        group=_MODEL,
        help="Names by which clients may ask for the model, the first of which answers carry. "
        "Default: the model as it was named.",
    )
    tokenizer: str | None = option(
        None,
        parse=p.maybe(p.text, words=()),
        group=_MODEL,
        help="Folder or hub name of the tokenizer. Default: the model's own.",
    )
    skip_tokenizer_init: bool = option(
        False,
        parse=p.flag,
        group=_MODEL,
        help="Load no tokenizer: prompts and answers are token ids.",
    )
    tokenizer_mode: str = option(
        "auto",
        parse=p.text,
        choices=("auto", "slow"),
        synonyms={"fast": "auto", "hf": "auto"},
        group=_MODEL,
        help="slow uses the tokenizer code of the transformers library.",
    )
    trust_remote_code: bool = option(
        False,
        parse=p.flag,
        group=_MODEL,
        help="Run Python code that comes with the model.",
    )
    generation_config: str = option(
        "auto",
        parse=p.text,
        synonyms={"vllm": "dovetail"},
        group=_MODEL,
        help="Where default sampling parameters come from: auto is the model's "
        "generation_config.json, dovetail ignores it, anything else is a folder that holds one.",
    )
    load_format: str = option(
        "auto",
        parse=p.text,
        choices=("auto", "safetensors", "dummy"),
        group=_MODEL,
        help="How the weights are stored; dummy makes random ones and reads none.",
    )
    model_impl: str = option(
        "auto",
        parse=p.text,
        choices=("auto", "native", "transformers"),
        synonyms={"vllm": "native", "dovetail": "native"},
        group=_MODEL,
        help="Whose code computes the model: Dovetail's own (native) or the transformers "
        "library's. auto prefers native.",
    )
    max_model_len: int | None = option(
        None,
        parse=p.maybe(p.count(), words=("auto", "-1")),
        metavar="TOKENS",
        group=_MODEL,
        help="The most tokens in one sequence, prompt and answer: 8192, 25.6k, 1M, or auto for "
        "as many as the model knows and the memory holds.",
    )
    dtype: str = option(
        "auto",
        parse=p.text,
        choices=_DTYPES,
        synonyms={"half": "float16", "float": "float32"},
        group=_MODEL,
        help="Type of weights and activations. auto is the checkpoint's, where the platform has "
        "it and is not slow in it. half is float16, float is float32.",
    )
    quantization: str | None = option(
        None,
        parse=p.maybe(p.text),
        group=_MODEL,
        help="Quantization of the weights. Default: what the checkpoint says.",
    )
    seed: int = option(
        0,
        parse=lambda value: 0 if value is None else p.integer(value),
        group=_MODEL,
        help="Where random choices without a seed of their own start.",
    )
    deterministic: bool = option(
        False,
        parse=p.flag,
        group=_MODEL,
        help="Give a request the same logits, bit for bit, whatever runs beside it, however its "
        "prompt is cut into steps and whatever is cached. Needs a native model.",
    )
    device: str = option(
        "auto",
        parse=p.text,
        group=_PLATFORM,
        help="Platform to run on, such as cpu, cuda or tpu; `dovetail platforms` lists them. "
        "Default: DOVETAIL_DEVICE, else the best one that is usable.",
    )
    attention_backend: str | None = option(
        None,
        parse=p.maybe(p.text, words=("none", "auto")),
        group=_PLATFORM,
        help="Attention implementation to insist on. Default: DOVETAIL_ATTENTION_BACKEND, else "
        "the platform's order.",
    )
    tensor_parallel_size: int = option(
        1,
        parse=p.count(),
        aliases=("tp",),
        metavar="DEVICES",
        group=_PLATFORM,
        help="Devices that share every layer of the model.",
    )
    threads: int | None = option(
        None,
        parse=p.maybe(p.count(), words=("auto",)),
        group=_PLATFORM,
        help="Threads that compute, on platforms that use the host's cores. Default: one per core.",
    )
    options: Mapping[str, Any] = option(
        None,
        parse=p.mapping,
        aliases=("additional_config",),
        metavar="JSON",
        group=_PLATFORM,
        help="Settings of the platform's own, as a JSON object.",
    )
    block_size: int | None = option(
        None,
        parse=p.maybe(p.count(), words=("auto",)),
        metavar="TOKENS",
        group=_MEMORY,
        help="Positions per block of the KV cache. Default: the platform's favourite.",
    )
    kv_cache_dtype: str = option(
        "auto",
        parse=p.text,
        choices=_KV_DTYPES,
        synonyms={"half": "float16", "float": "float32", "fp8": "fp8_e4m3"},
        group=_MEMORY,
        help="Type of the KV cache. auto is the type of the activations. int8 and fp8 hold twice "
        "as many tokens as 16 bits, with a scale per head and token; fp8 is fp8_e4m3.",
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        parse=p.maybe(p.byte_size, words=("auto",)),
        metavar="BYTES",
        group=_MEMORY,
        help="Size of the KV cache in bytes: 2g is 2 x 10^9, 2G is 2 x 2^30. Default: "
        "gpu_memory_utilization decides.",
    )
    num_gpu_blocks_override: int | None = option(
        None,
        parse=p.maybe(p.count(), words=("auto",)),
        aliases=("num_blocks",),
        metavar="BLOCKS",
        group=_MEMORY,
        help="Size of the KV cache in blocks, whatever the memory.",
    )
    gpu_memory_utilization: float = option(
        0.9,
        parse=p.fraction,
        aliases=("memory_utilization", "device_memory_utilization"),
        metavar="FRACTION",
        group=_MEMORY,
        help="Share of the device's free memory, beside weights and activations, that the KV "
        "cache may take.",
    )
    enable_prefix_caching: bool = option(
        True,
        parse=p.flag,
        group=_MEMORY,
        help="Keep the KV cache of prompts, so that a prompt with the same beginning starts "
        "sooner.",
    )
    max_num_seqs: int | None = option(
        None,
        parse=p.maybe(p.count(), words=("auto",)),
        metavar="REQUESTS",
        group=_SCHEDULING,
        help="The most requests in one step. Default: the platform's.",
    )
    max_num_batched_tokens: int | None = option(
        None,
        parse=p.maybe(p.count(), words=("auto",)),
        metavar="TOKENS",
        group=_SCHEDULING,
        help="The most tokens in one step. Larger finishes prompts sooner, smaller keeps running "
        "answers smooth. Default: the platform's.",
    )
    max_logprobs: int = option(
        20,
        parse=lambda value: -1 if value in (-1, "-1") else p.count(0)(value),
        metavar="TOKENS",
        group=_SCHEDULING,
        help="The most alternatives per token that a request may ask for with logprobs and "
        "prompt_logprobs; -1 is the whole vocabulary.",
    )
    max_num_queued_requests: int | None = option(
        None,
        parse=p.maybe(p.count(0)),
        aliases=("max_num_queued_reqs",),
        metavar="REQUESTS",
        group=_SCHEDULING,
        help="Requests that may wait; a further one is refused with status 429. Default: no limit.",
    )
    max_num_queued_tokens: int | None = option(
        None,
        parse=p.maybe(p.count()),
        metavar="TOKENS",
        group=_SCHEDULING,
        help="Prompt tokens that may wait for their first answer token; a request that would go "
        "beyond is refused with status 429. Default: no limit.",
    )
    enable_chunked_prefill: bool = option(
        True,
        parse=lambda value: True if value is None else p.flag(value),
        group=_SCHEDULING,
        help="Compute long prompts in parts, between the steps of running answers.",
    )
    async_scheduling: bool | None = option(
        None,
        parse=p.maybe(p.flag, words=("auto",)),
        group=_SCHEDULING,
        help="Prepare each step while the one before it runs. Default: as the platform likes.",
    )
    scheduling_policy: str = option(
        "fcfs",
        parse=p.text,
        choices=("fcfs", "priority"),
        group=_SCHEDULING,
        help="fcfs serves in order of arrival; priority serves the request with the smallest "
        "priority first.",
    )
    priority_ageing_seconds: float | None = option(
        30.0,
        parse=p.maybe(p.seconds, words=("none", "off", "0", "0.0")),
        metavar="S",
        group=_SCHEDULING,
        help="Under the priority policy, seconds of waiting that are worth one priority, so that "
        "nobody waits for ever; 0: waiting changes nothing. Default: 30.",
    )
    speculative_config: Mapping[str, Any] = option(
        None,
        parse=p.mapping,
        metavar="JSON",
        group=_SCHEDULING,
        help="Guess tokens ahead and confirm several in one step, as a JSON object: "
        '{"method": "ngram"}, {"method": "suffix"} or {"model": DRAFT_MODEL}, each with '
        "num_speculative_tokens if need be. Answers stay the same. Default: no guesses.",
    )
    disable_log_stats: bool = option(
        False,
        parse=p.flag,
        group=_SCHEDULING,
        help="Do not write a line of statistics every ten seconds.",
    )

    def __post_init__(self) -> None:
        for name, entry in engine_options().items():
            value = getattr(self, name)
            try:
                value = entry.normalise(value)
            except ValueError as error:
                raise ConfigError(f"{name} must be {error}, not {value!r:.80}") from None
            object.__setattr__(self, name, value)
        SpeculativeConfig.parse(self.speculative_config)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Make the intent from arguments by vLLM's names, aliases included.

        Arguments of vLLM that have no meaning here are accepted with a warning when their value
        changes nothing, and refused with the reason otherwise.

        Raises:
            ConfigError: An argument is unknown, given twice, or its value is not allowed.
        """
        fields: dict[str, Any] = {}
        for given, value in kwargs.items():
            name = _known_names().get(given)
            if name is None:
                _accept_foreign(given, value)
            elif name in fields:
                raise ConfigError(f"{given}: {name} was given too; they mean the same")
            else:
                fields[name] = value
        return cls(**fields)


@cache
def engine_options() -> dict[str, Option]:
    """The options of :class:`EngineConfig` by field name."""
    return options_of(EngineConfig)


@cache
def _known_names() -> dict[str, str]:
    """Field names by each of their names."""
    pairs = [(name, name) for name in engine_options()]
    pairs += [(alias, name) for name, entry in engine_options().items() for alias in entry.aliases]
    return dict(pairs)


def _accept_foreign(name: str, value: Any) -> None:
    verdict = judge_foreign(name, value)
    if verdict is None:
        raise ConfigError(f"unknown argument {name!r}{nearest(name, _known_names())}")
    harmless, reason = verdict
    if not harmless:
        raise ConfigError(f"{name}={value!r:.80}: {reason}")
    _log.warning("%s=%r has no effect: %s", name, value, reason)


def nearest(name: str, known: Any) -> str:
    """A question with the nearest known name, to end a message with; empty if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
