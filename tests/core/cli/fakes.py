"""An engine without a model: it answers with the words of the prompt, backwards."""

import asyncio

from dovetail.core.engine.api import (
    CompletionDelta,
    EngineStats,
    EngineStatus,
    ModelInfo,
    RequestDelta,
)
from dovetail.core.request import CompletionOutput, RequestOutput, SamplingParams


class FakeTokenizer:
    """Each character is a token."""

    def __init__(self, template=None):
        self.chat_template = template

    def encode(self, text, *, add_special_tokens=True):
        return [ord(c) for c in text]

    def apply_chat_template(self, messages, *, chat_template=None):
        turns = [f"<{m['role']}>{m['content']}" for m in messages]
        return (chat_template or "") + "".join(turns) + "<assistant>"


class FakeEngine:
    """Implements as much of ``EngineClient`` as the commands use."""

    def __init__(self, *, delay=0.0, template=None, failure=None, **info):
        self.tokenizer = FakeTokenizer(template)
        self.delay = delay
        self.failure = failure
        self.closed = False
        self.aborted = 0
        self.asked = []
        self.stats = EngineStats()
        self.status = EngineStatus(state="loading", reason="loading weights 50%")
        self.banner = {"device": "a fake, 1 core", "model": "none", "memory": "none at all"}
        defaults = {
            "name": "fake",
            "path": "/fake",
            "vocab_size": 128,
            "max_model_len": 64,
            "eos_token_ids": [0],
            "default_params": SamplingParams(),
        }
        self.info = ModelInfo(**{**defaults, **info})

    async def wait_ready(self):
        await asyncio.sleep(0.01)
        if self.failure is not None:
            raise self.failure
        self.status = EngineStatus(state="ready")

    def check_open(self, **_):
        pass

    async def stream(self, prompt, params, **_):
        self.asked.append((prompt, params))
        words = [chr(i) for i in reversed(prompt.token_ids)]
        try:
            for position, word in enumerate(words):
                await asyncio.sleep(self.delay)
                last = position == len(words) - 1
                yield RequestDelta(
                    completions=[
                        CompletionDelta(
                            index=0,
                            text=word,
                            token_ids=[ord(word)],
                            finish_reason="stop" if last else None,
                        )
                    ],
                    finished=last,
                    num_prompt_tokens=len(prompt.token_ids),
                )
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted += 1
            raise

    async def generate(self, prompt, params, **_):
        self.asked.append((prompt, params))
        text = (prompt.text or "")[::-1]
        for finished in (False, True):
            await asyncio.sleep(0.001 * len(text))
            yield RequestOutput(
                request_id="r",
                prompt=prompt.text,
                prompt_token_ids=prompt.token_ids,
                outputs=[
                    CompletionOutput(
                        index=i,
                        text=text,
                        token_ids=prompt.token_ids,
                        finish_reason="length" if finished else None,
                    )
                    for i in range(params.n)
                ],
                finished=finished,
            )

    async def drain(self, timeout):
        self.status = EngineStatus(state="draining")

    async def close(self):
        self.closed = True
