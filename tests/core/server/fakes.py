"""An engine and a tokenizer of a few lines, which show everything that the server does to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar

from dovetail.core.engine.api import (
    CompletionDelta,
    EngineState,
    EngineStats,
    EngineStatus,
    ModelInfo,
    RequestDelta,
)
from dovetail.core.errors import OverloadedError, RequestError
from dovetail.core.request import (
    Logprob,
    PromptTokens,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)

BOS, EOS = 256, 257
VOCAB = 300


class ByteTokenizer:
    """One token per UTF-8 byte; the model's logits are wider than the vocabulary."""

    eos_token_id: int | None = EOS
    bos_token: str | None = "<s>"
    eos_token: str | None = "</s>"
    pad_token: str | None = None
    special_tokens: ClassVar[list[str]] = ["<s>", "</s>"]
    special_token_ids = frozenset({BOS, EOS})
    vocab_size = 258
    chat_template: str | None = "{{ messages }}"

    def __init__(self) -> None:
        self.conversations: list[dict[str, Any]] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(
            self.token_bytes(i) for i in ids if i < 256 or not skip_special_tokens
        ).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return {BOS: b"<s>", EOS: b"</s>"}.get(token_id, b"")

    def new_stream(self, prompt_token_ids: Sequence[int] = (), **_: Any) -> Any:
        raise NotImplementedError

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> str | list[int]:
        self.conversations.append({"messages": list(messages), **options})
        if self.chat_template is None:
            raise RequestError("no chat template", param="messages", code="no_chat_template")
        lines = [f"{m['role']}: {_text(m['content'])}\n" for m in messages]
        return "".join(lines) + ("assistant:" if options["add_generation_prompt"] else "")


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


class FakeEngine:
    """Says the letters of ``text`` one by one, over and over, up to ``max_tokens``."""

    def __init__(
        self,
        *,
        text: str = "abcdefghij",
        step_s: float = 0.0,
        max_model_len: int = 4096,
        state: EngineState = "ready",
        reason: str = "",
    ) -> None:
        self.text = text
        self.step_s = step_s
        self.tokenizer: Any = ByteTokenizer()
        self.info = ModelInfo(
            name="org/model",
            path="/models/secret-place/model",
            vocab_size=VOCAB,
            max_model_len=max_model_len,
            eos_token_ids=[EOS],
            default_params=SamplingParams(temperature=0.5, top_k=7),
        )
        self.status = EngineStatus(state=state, reason=reason)
        self.stats = EngineStats(num_running=3, num_blocks=10, num_free_blocks=4, block_size=16)
        self.calls: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.running = 0
        self.most_running = 0
        self.fail_at: dict[int, Exception] = {}
        self.silent_first_s = 0.0
        self.finish_reason = "length"
        self.closed = False
        self.full: OverloadedError | None = None
        self.drained_with: float | None = None

    def check_open(self, *, num_sequences: int = 1, num_tokens: int = 1) -> None:
        if self.full is not None:
            raise self.full

    def set_state(self, state: EngineState, reason: str = "") -> None:
        self.status = EngineStatus(state=state, reason=reason)

    async def stream(
        self, prompt: PromptTokens, params: SamplingParams, **labels: Any
    ) -> AsyncIterator[RequestDelta]:
        self.calls.append({"prompt": prompt, "params": params, **labels})
        if self.status.state == "draining":
            raise OverloadedError("draining", status=503)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        done = False
        try:
            await asyncio.sleep(self.silent_first_s)
            for step in range(params.max_tokens or 0):
                await asyncio.sleep(self.step_s)
                if step in self.fail_at:
                    raise self.fail_at[step]
                yield self._delta(prompt, params, step)
            done = True
        finally:
            self.running -= 1
            if not done:
                self.aborted.append(labels["request_id"])

    def _delta(self, prompt: PromptTokens, params: SamplingParams, step: int) -> RequestDelta:
        last = step + 1 == params.max_tokens
        token = ord(self.text[step % len(self.text)])
        row = None if params.logprobs is None else [candidates(token, params.logprobs)]
        scores: list[TokenLogprobs | None] | None = None
        if step == 0 and params.prompt_logprobs is not None:
            rest = prompt.token_ids[1:]
            scores = [None, *(candidates(t, params.prompt_logprobs) for t in rest)]
        return RequestDelta(
            completions=[
                CompletionDelta(
                    index=i,
                    text=chr(token),
                    token_ids=[token],
                    logprobs=row,
                    finish_reason=self.finish_reason if last else None,
                )
                for i in range(params.n)
            ],
            finished=last,
            num_prompt_tokens=len(prompt.token_ids),
            num_cached_tokens=2,
            prompt_logprobs=scores,
        )

    async def generate(
        self, prompt: PromptTokens, params: SamplingParams, **labels: Any
    ) -> AsyncIterator[RequestOutput]:
        raise NotImplementedError
        yield

    async def drain(self, timeout: float) -> None:
        self.drained_with = timeout
        self.set_state("draining")
        async with asyncio.timeout(timeout):
            while self.running:
                await asyncio.sleep(0.005)

    async def close(self) -> None:
        self.closed = True


def candidates(token: int, num: int) -> TokenLogprobs:
    """The token at rank 2, behind a rival; the last of the others has no chance at all."""
    chosen = {token: Logprob(logprob=-1.0, rank=2 if num else 1)}
    ranks = [r for r in range(1, num + 2) if r != 2][: max(num, 0)]
    rivals = {
        (token + r) % 256: Logprob(logprob=-0.5 * r if r < 3 else float("-inf"), rank=r)
        for r in ranks
    }
    return chosen | rivals
