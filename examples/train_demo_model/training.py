"""Model, optimizer, training loop and evaluation of the demonstration model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from corpus import END_OF_TEXT_ID, Corpus, SourceFile, count_bytes, training_batches
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class TrainingOptions:
    """Everything that decides the result of a training run, apart from the data.

    The run is as long as `steps`, or `minutes` where that is given. Only a run bounded by
    `steps` can be repeated exactly: with `minutes` the schedule follows the clock.

    `phases` lists row lengths and the share of the run trained at each. Attention makes
    long rows slow on a CPU, so most of the training uses short ones; the last phase
    teaches the model to use its full context.
    """

    steps: int = 8000
    minutes: float | None = None
    learning_rate: float = 3e-3
    min_learning_rate_ratio: float = 0.02
    warmup_steps: int = 100
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    tokens_per_step: int = 2048
    phases: tuple[tuple[int, float], ...] = ((256, 0.7), (512, 0.15), (2048, 0.15))
    seed: int = 0
    compile: bool = True


@dataclass(frozen=True)
class TrainingSummary:
    """What a training run took."""

    steps: int
    tokens: int
    seconds: float


def demo_config(vocab_size: int, hidden_size: int = 256, num_layers: int = 4) -> LlamaConfig:
    """Shape of the model: 3.8 million parameters, 7.6 MB in bfloat16, unless told otherwise."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 5 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(1, hidden_size // 128),
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        initializer_range=0.02,
    )


def build_optimizer(model: LlamaForCausalLM, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on the norm weights."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_at(step: int, progress: float, options: TrainingOptions) -> float:
    """Linear warm-up by `step`, and a cosine by `progress` down to a small share of the peak."""
    warmup = min(1.0, (step + 1) / options.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    floor = options.min_learning_rate_ratio
    return options.learning_rate * warmup * (floor + (1.0 - floor) * cosine)


class Progress:
    """How much of a run is done, from 0 to 1, by steps or by the clock."""

    def __init__(self, options: TrainingOptions) -> None:
        """Start the clock."""
        self.options = options
        self.start = time.perf_counter()

    def seconds(self) -> float:
        """Time since the start of the run."""
        return time.perf_counter() - self.start

    def share(self, step: int) -> float:
        """Share of the run that is done when `step` is about to begin."""
        if self.options.minutes is None:
            return min(1.0, step / self.options.steps)
        return min(1.0, self.seconds() / (60 * self.options.minutes))


def scheduled_batches(
    tokenizer: Tokenizer, files: list[SourceFile], options: TrainingOptions
) -> Iterator[tuple[float, torch.Tensor]]:
    """Yield the progress and the batch of each step, one phase after the other."""
    progress = Progress(options)
    step = 0
    phase_end = 0.0
    for index, (length, share) in enumerate(options.phases):
        phase_end = 1.0 if index == len(options.phases) - 1 else phase_end + share
        rows = max(1, options.tokens_per_step // length)
        batches = training_batches(tokenizer, files, length, rows, options.seed + index)
        while (done := progress.share(step)) < phase_end:
            yield done, next(batches)
            step += 1


def batch_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token, in nats."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def train_model(
    model: LlamaForCausalLM, tokenizer: Tokenizer, corpus: Corpus, options: TrainingOptions
) -> TrainingSummary:
    """Train `model` in place and show the loss, the speed and the remaining time."""
    model.train()
    optimizer = build_optimizer(model, options)
    compute_loss = torch.compile(batch_loss, dynamic=False) if options.compile else batch_loss
    smoothed = 0.0
    tokens = 0
    start = time.perf_counter()
    bar = tqdm(total=100.0, bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")
    for step, (done, batch) in enumerate(scheduled_batches(tokenizer, corpus.train, options)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, done, options)
        loss = compute_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        decay = min(0.99, step / (step + 1))
        smoothed = decay * smoothed + (1.0 - decay) * loss.item()
        tokens += batch[:, 1:].numel()
        speed = tokens / (time.perf_counter() - start)
        status = f"step {step + 1}, loss {smoothed:.3f}, {speed:,.0f} tokens/s"
        bar.set_postfix_str(status, refresh=False)
        bar.update(100.0 * done - bar.n)
    bar.close()
    return TrainingSummary(step + 1, tokens, time.perf_counter() - start)


@torch.no_grad()
def bits_per_byte(
    model: LlamaForCausalLM, tokenizer: Tokenizer, files: list[SourceFile], length: int
) -> float:
    """Held-out loss in bits per byte of source text; each file starts with a fresh context."""
    model.eval()  # type: ignore[no-untyped-call]
    total = 0.0
    for file in files:
        ids = [END_OF_TEXT_ID, *tokenizer.encode(file.text).ids]
        for first in range(0, len(ids) - 1, length):
            window = torch.tensor([ids[first : first + length + 1]])
            total += batch_loss(model, window).item() * (window.shape[1] - 1)
    return total / math.log(2) / count_bytes(files)
