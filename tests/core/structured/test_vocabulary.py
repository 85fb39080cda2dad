"""Tokens as bytes, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dovetail.core.errors import RequestError
from dovetail.core.structured.backend import Backend
from dovetail.core.structured.lru import ByteLru
from dovetail.core.structured.vocabulary import encoder, read_vocabulary
from dovetail.core.tokenizer import Tokenizer, load_tokenizer
from tests.core.tokenizer import folders

KINDS: list[Callable[[Path], Path]] = [
    folders.gpt2,
    folders.gpt_neox,
    folders.qwen2,
    folders.llama3,
    folders.llama2,
    folders.mistral,
    folders.gemma,
]
TEXT = '{"naïve key": ["a  b", "漢字", "😀", 12.5, null], "code": "def f(x):\\n\\treturn x"}'


def ends_of(tokenizer: Tokenizer) -> list[int]:
    assert tokenizer.eos_token_id is not None
    return [tokenizer.eos_token_id]


@pytest.mark.parametrize("make", KINDS)
def test_random_answers_read_back_as_what_the_grammar_says(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(make(tmp_path))
    width = tokenizer.vocab_size + 37
    backend = Backend(read_vocabulary(tokenizer, width, ends_of(tokenizer)), encoder(tokenizer))
    schema = '{"type":"object","properties":{"é k":{"type":"string","maxLength":6},"n":{"enum":'
    schema += '["a b","漢字","😀"]}},"required":["é k","n"],"additionalProperties":false}'
    start = backend.compile('{"grammars":[{"json_schema":' + schema + "}]}")
    bits = np.zeros((1, -(-width // 32)), np.int32)
    prompt = tokenizer.encode("x = ")
    for seed in range(5):
        rng, matcher = np.random.default_rng(seed), start.deep_copy()
        out: list[int] = []
        while not matcher.is_stopped():
            backend.fill([(matcher, 0, [])], bits)
            tokens = np.flatnonzero(np.unpackbits(bits[0].view(np.uint8), bitorder="little"))
            assert len(tokens) and tokens[-1] < tokenizer.vocab_size
            out.append(int(rng.choice(tokens)))
            assert not tokenizer.special_token_ids & set(out[:-1])
            assert matcher.consume_token(out[-1]), matcher.get_error()
        out = [token for token in out if token not in ends_of(tokenizer)]
        stream = tokenizer.new_stream(prompt)
        shown = stream.step(out) + stream.flush()
        assert shown == b"".join(tokenizer.token_bytes(t) for t in out).decode()
        assert '"é k"' in shown and shown.endswith("}")


@pytest.mark.parametrize("make", KINDS)
def test_what_a_tokenizer_writes_fits_the_grammar(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(make(tmp_path))
    vocabulary = read_vocabulary(tokenizer, tokenizer.vocab_size, ends_of(tokenizer))
    encode = encoder(tokenizer)
    backend = Backend(vocabulary, encode)
    ids = backend.tokenizer.tokenize_str(TEXT)
    assert b"".join(vocabulary.tokens[i] for i in ids) == TEXT.encode()
    assert len(ids) < len(TEXT.encode()), "tokens are longer than bytes"


def test_logits_may_be_narrower_than_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folders.gpt2(tmp_path))
    vocabulary = read_vocabulary(tokenizer, 300, [5, 400])
    assert len(vocabulary.tokens) == 300 and vocabulary.ends == [5]
    assert max(vocabulary.special) < 300


@pytest.mark.parametrize("make", [folders.bert, folders.word_piece])
def test_tokens_that_depend_on_their_neighbours_are_refused(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(make(tmp_path))
    with pytest.raises(RequestError, match="not possible with this model's tokenizer"):
        read_vocabulary(tokenizer, tokenizer.vocab_size, [0])


def test_the_cache_keeps_what_was_used_last() -> None:
    cache: ByteLru[str] = ByteLru(10)
    for key in (b"a", b"b"):
        cache.put(key, key.decode(), 4)
    assert cache.get(b"a") == "a"
    cache.put(b"c", "c", 4)
    assert [cache.get(key) for key in (b"a", b"b", b"c")] == ["a", None, "c"]
    cache.put(b"c", "d", 6)
    assert cache.get(b"c") == "d" and len(cache) == 2
    cache.put(b"e", "e", 11)
    assert cache.get(b"e") is None and len(cache) == 0
    cache.drop(b"nothing")
