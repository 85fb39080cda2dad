"""What quantizing costs: the perplexity of text, quantized over not quantized.

    python benchmarks/perplexity.py docs/*.md
    python benchmarks/perplexity.py --model FOLDER --dtype bfloat16 --scheme int4 TEXT.txt

The first tokens of every file are a text of their own. Figures of a model that knows the kind of
text mean more than those of one that does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dovetail.core.config.schema import EngineConfig
from dovetail.core.demo import demo_model_path
from dovetail.core.engine.build import build_engine, ignore_progress
from dovetail.core.request import Request, SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
SCHEMES = ("int8", "int4")


def read_texts(model: Path, files: Sequence[Path], length: int) -> list[list[int]]:
    """The first ``length`` tokens of each file, by the model's tokenizer."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [tokenizer.encode(file.read_text(encoding="utf-8")).ids[:length] for file in files]


def perplexity(
    model: Path, texts: Sequence[Sequence[int]], scheme: str | None, device: str, dtype: str
) -> float:
    """Of all tokens but the first of each text."""
    config = EngineConfig.from_kwargs(model=str(model), dtype=dtype, quantization=scheme)
    core = build_engine(config, device, ignore_progress).core
    for number, text in enumerate(texts, 1):
        core.add(
            Request(
                id=number,
                prompt_token_ids=list(text),
                params=PARAMS,
                stop_token_ids=[],
                seed=0,
                arrival_time=float(number),
            )
        )
    logprobs: list[float] = []
    while core.has_work():
        for update in core.step():
            if update.error is not None:
                raise RuntimeError(update.error)
            logprobs += [place.logprobs[0] for place in update.prompt_logprobs or ()]
    core.close()
    wanted = sum(len(text) - 1 for text in texts)
    if len(logprobs) != wanted:
        raise RuntimeError(f"{len(logprobs)} tokens have a log-probability, of {wanted}")
    return float(np.exp(-np.mean(logprobs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, default=demo_model_path(), help="a folder")
    parser.add_argument("--scheme", action="append", help=f"default: {' and '.join(SCHEMES)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each file")
    args = parser.parse_args()
    texts = read_texts(args.model, args.files, args.length)
    rest = (args.device, args.dtype)
    plain = perplexity(args.model, texts, None, *rest)
    print(f"{sum(map(len, texts)):,} tokens, {args.dtype} on {args.device}: {plain:.3f}")
    for scheme in args.scheme or SCHEMES:
        found = perplexity(args.model, texts, scheme, *rest)
        print(f"{scheme:8} {found:.3f}  {found / plain - 1:+.2%}", flush=True)


if __name__ == "__main__":
    main()
