"""The engine of the offline benchmarks: ``LLM`` fed with token ids and fixed answer lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dovetail.core.cli.console import note
from dovetail.core.config.schema import EngineConfig

if TYPE_CHECKING:
    from dovetail.core.bench.roofline import Roofline
    from dovetail.core.bench.steps import MeteredRunner
    from dovetail.core.bench.workloads import Sample
    from dovetail.core.llm import LLM
    from dovetail.core.request import RequestOutput
    from dovetail.core.tokenizer import Tokenizer

__all__ = ["Offline", "start_offline"]


@dataclass(frozen=True, kw_only=True)
class Offline:
    """An engine in this process, and what is needed to make up prompts for it."""

    llm: LLM
    vocab_size: int
    tokenizer: Tokenizer | None
    meter: MeteredRunner
    """In front of the engine's runner."""

    def generate(
        self, samples: Sequence[Sample], temperature: float, *, detokenize: bool, show: bool = False
    ) -> int:
        """Generate exactly the lengths that are asked for; returns the tokens generated."""
        from dovetail.core.request import SamplingParams

        params = [
            SamplingParams(
                temperature=temperature,
                max_tokens=sample.output_len,
                ignore_eos=True,
                detokenize=detokenize,
            )
            for sample in samples
        ]
        prompts = [{"prompt_token_ids": sample.token_ids} for sample in samples]
        outputs: list[RequestOutput] = self.llm.generate(prompts, params, use_tqdm=show)
        return sum(len(part.token_ids) for output in outputs for part in output.outputs)

    def roofline(self) -> Roofline | None:
        """The bound of the model on this device, measured now; None, said in a line, without one.

        Nothing may be running.
        """
        from dovetail.core.bench.roofline import Roofline, step_cost
        from dovetail.core.errors import OutOfMemoryError, UnsupportedError

        config = self.llm.config.runner_config()
        try:
            rates = self.llm.platform.rates(config.dtype)
            return Roofline(cost=step_cost(config, self.meter.plan()), rates=rates)
        except (UnsupportedError, OutOfMemoryError) as error:
            note(f"No roofline: {error}")
            return None


def start_offline(config: EngineConfig, *, with_tokenizer: bool) -> Offline:
    """Load the model that ``config`` names."""
    from dovetail import LLM
    from dovetail.core.bench.steps import MeteredRunner
    from dovetail.core.config.checkpoint import read_facts

    facts = read_facts(config)
    tokenizer = None
    if with_tokenizer:
        from dovetail.core.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(facts.tokenizer_path, trust_remote_code=config.trust_remote_code)
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    llm = LLM(**settings)
    meter = MeteredRunner(llm.core.runner)
    llm.core.runner = meter
    return Offline(llm=llm, vocab_size=facts.vocab_size, tokenizer=tokenizer, meter=meter)
