"""Speculative decoding against none: tokens per second of one model, in turn.

    python benchmarks/speculation.py [--model DIR] [--draft DIR] [--batches 1 16] [--rounds 5]

The prompts are Python source, for the bundled model: ``repetitive`` ones say the same few lines
again and again, ``plain`` ones are different files. Every round asks the same, so suffix decoding
with its memory on has seen the answers. Greedy, end-of-text ignored. Every round runs each method
once, one after the other; the table gives medians and the ratio to none, round by
round. Answers must be the same in float32, and the script stops if they are not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from dovetail import LLM, SamplingParams

FUNCTION = """
def total_{0}(values):
    result_{0} = 0
    for value in values:
        if value is not None:
            result_{0} += value
    return result_{0}
"""


def repetitive(count: int) -> list[str]:
    """Several functions of one shape, again and again."""
    return [FUNCTION.format(chr(97 + i)) * 4 for i in range(count)]


def plain(count: int) -> list[str]:
    """Beginnings of modules of the standard library."""
    folder = Path(statistics.__file__).parent
    files = sorted(f for f in folder.glob("*.py") if f.stat().st_size > 8000)
    return [f.read_text(encoding="utf-8")[2000:3000] for f in files[:count]]


def measure(llm: LLM, prompts: list[str], params: SamplingParams) -> tuple[float, list[list[int]]]:
    """Tokens per second, and the tokens."""
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = [output.outputs[0].token_ids for output in outputs]
    return sum(map(len, tokens)) / seconds, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--draft", default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    methods = {
        "none": {},
        "ngram": {"method": "ngram"},
        "suffix": {"method": "suffix", "memory_tokens": 0},
        "suffix, asked before": {"method": "suffix"},
    }
    if args.draft:
        methods["draft model"] = {"model": args.draft}
    engines = {
        name: LLM(
            args.model,
            device=args.device,
            dtype=args.dtype,
            max_model_len=2048,
            enable_prefix_caching=False,
            speculative_config=config,
        )
        for name, config in methods.items()
    }
    params = SamplingParams(temperature=0.0, max_tokens=args.new_tokens, ignore_eos=True)
    print("| prompts | batch | method | tokens/s | ratio | accepted | tokens per step and row |")
    print("|---|---|---|---|---|---|---|")
    for kind, make in (("repetitive", repetitive), ("plain", plain)):
        for batch in args.batches:
            compare(engines, kind, make(batch), params, args.rounds)


def compare(
    engines: dict[str, LLM], kind: str, prompts: list[str], params: SamplingParams, rounds: int
) -> None:
    """One row of the table for each method."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    before = {name: llm.stats for name, llm in engines.items()}
    answers = {}
    for number in range(rounds + 1):
        for name, llm in engines.items():
            rate, answers[name] = measure(llm, prompts, params)
            if number:
                rates[name].append(rate)
    for name, llm in engines.items():
        if answers[name] != answers["none"]:
            print(f"{name}: answers differ from those without drafts", file=sys.stderr)
        now, old = llm.stats, before[name]
        drafts = now.num_draft_tokens - old.num_draft_tokens
        right = now.num_accepted_tokens - old.num_accepted_tokens
        steps = now.num_steps - old.num_steps
        tokens = (now.num_generation_tokens - old.num_generation_tokens) / len(prompts)
        ratios = [a / b for a, b in zip(rates[name], rates["none"], strict=True)]
        print(
            f"| {kind} | {len(prompts)} | {name} | {statistics.median(rates[name]):.0f}"
            f" | {statistics.median(ratios):.2f}"
            f" | {f'{100 * right / drafts:.0f} %' if drafts else '-'} | {tokens / steps:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
