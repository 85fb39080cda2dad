from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from dovetail.core.tokenizer import load_tokenizer
from dovetail.core.tokenizer.base import DecodeStream
from dovetail.core.tokenizer.fast import FastTokenizer
from dovetail.core.tokenizer.files import TokenizerFiles
from dovetail.core.tokenizer.pieces import byte_rule
from dovetail.core.tokenizer.stream import WindowStream
from tests.core.tokenizer.folders import FOLDERS, TEXTS, special, write

PLACES = st.lists(st.integers(0, 1000), max_size=12)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FastTokenizer]:
    folders = {name: make(tmp_path_factory.mktemp(name)) for name, make in FOLDERS.items()}
    return {name: FastTokenizer(TokenizerFiles.read(path)) for name, path in folders.items()}


def cut(ids: list[int], places: list[int]) -> list[list[int]]:
    ends = sorted({0, len(ids), *(place % (len(ids) + 1) for place in places)})
    return [ids[a:b] for a, b in pairwise(ends)]


def stream_text(stream: DecodeStream, pieces: list[list[int]]) -> str:
    shown = [stream.step(piece) for piece in pieces]
    return "".join(shown) + stream.flush()


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_pieces_of_a_text_make_up_the_whole(
    tokenizers: dict[str, FastTokenizer], name: str, skip: bool, size: int
) -> None:
    tokenizer = tokenizers[name]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        stream = tokenizer.new_stream(skip_special_tokens=skip)
        pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
        streamed = stream_text(stream, pieces)
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        if tokenizer._clean_up:  # Spaces before what is not known yet cannot be taken out.
            streamed, whole = streamed.replace(" ", ""), whole.replace(" ", "")
        assert streamed == whole


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama3"])
@settings(deadline=None, max_examples=150)
@given(data=st.data(), skip=st.booleans(), places=PLACES)
def test_any_bytes_at_any_split(
    tokenizers: dict[str, FastTokenizer], name: str, data: Any, skip: bool, places: list[int]
) -> None:
    tokenizer = tokenizers[name]
    # The first 256 tokens are single bytes, so most of these sequences are no UTF-8.
    ids = data.draw(st.lists(st.one_of(st.integers(0, 255), st.integers(0, tokenizer.vocab_size))))
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    for pieces in ([ids], [[i] for i in ids], cut(ids, places)):
        stream = tokenizer.new_stream(skip_special_tokens=skip)
        assert stream_text(stream, pieces) == whole


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=12), PLACES)
def test_bytes_become_text_as_in_the_library(raw: bytes, places: list[int]) -> None:
    tokenizer = BYTES
    ids = list(raw)
    stream = tokenizer.new_stream()
    assert stream_text(stream, cut(ids, places)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma", "llama2-no-space"])
@settings(deadline=None, max_examples=150)
@given(
    text=st.text(max_size=30), ids=st.lists(st.integers(0, 560)), skip=st.booleans(), places=PLACES
)
def test_byte_fallback(
    tokenizers: dict[str, FastTokenizer],
    name: str,
    text: str,
    ids: list[int],
    skip: bool,
    places: list[int],
) -> None:
    """As the whole, but that one invalid byte does not spoil the characters next to it."""
    tokenizer = tokenizers[name]
    ids = [*tokenizer.encode(text), *ids]
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    texts = {
        stream_text(tokenizer.new_stream(skip_special_tokens=skip), pieces)
        for pieces in ([ids], [[i] for i in ids], cut(ids, places))
    }
    assert len(texts) == 1
    if "\ufffd" not in whole:
        assert texts == {whole}
    valid = tokenizer.encode(text)
    stream = tokenizer.new_stream(skip_special_tokens=skip)
    assert stream_text(stream, cut(valid, places)) == tokenizer.decode(
        valid, skip_special_tokens=skip
    )


def test_an_invalid_byte_does_not_spoil_its_neighbours(
    tokenizers: dict[str, FastTokenizer],
) -> None:
    tokenizer = tokenizers["llama2"]
    ids = [
        tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode() + b"\xe4\xbd"
    ]
    stream = tokenizer.new_stream()
    assert [stream.step([i]) for i in ids] == ["", "", "你", "", ""]
    assert stream.flush() == "\ufffd\ufffd"
    assert tokenizer.decode(ids) == "\ufffd" * 5


@pytest.mark.parametrize("name", FOLDERS)
def test_the_prompt_decides_about_the_leading_space(
    tokenizers: dict[str, FastTokenizer], name: str
) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("the quick fox 日本 the dog", add_special_tokens=False)
    for split in range(len(ids) + 1):
        before = tokenizer.new_stream().step(ids[:split])
        stream = tokenizer.new_stream(ids[:split])
        text = stream_text(stream, [[i] for i in ids[split:]])
        assert before + text == tokenizer.decode(ids), split


def test_a_prompt_of_special_tokens_is_no_text(tokenizers: dict[str, FastTokenizer]) -> None:
    tokenizer = tokenizers["llama2"]
    prompt, answer = tokenizer.encode(""), tokenizer.encode("the dog", add_special_tokens=False)
    assert prompt == [1]
    assert stream_text(tokenizer.new_stream(prompt), [answer]) == "the dog"
    assert (
        stream_text(tokenizer.new_stream(prompt, skip_special_tokens=False), [answer]) == " the dog"
    )


def test_no_unfinished_character_is_shown(tokenizers: dict[str, FastTokenizer]) -> None:
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode("日本語 👨‍👩‍👧‍👦 สวัสดี")
        stream = tokenizer.new_stream()
        for token_id in ids:
            assert "\ufffd" not in stream.step([token_id])


@pytest.mark.parametrize("name", ["llama3", "llama2", "word_piece"])
def test_time_is_linear(tokenizers: dict[str, FastTokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    eos = tokenizer.eos_token_id
    assert eos is not None
    stream = tokenizer.new_stream([5])
    start = time.process_time()
    for token_id in (eos, 200, tokenizer.vocab_size + 5):
        for _ in range(10_000):
            stream.step([token_id])
    assert time.process_time() - start < 3


@settings(deadline=None)
@given(st.text(max_size=20), st.text(max_size=40), st.integers(1, 6))
def test_window_stream_follows_any_decoder(prompt: str, text: str, size: int) -> None:
    """Tokens are groups of bytes here, decoded by the simplest of decoders."""
    raw = (prompt + text).encode()

    def decode(ids: list[int]) -> str:
        return b"".join(raw[i * size : (i + 1) * size] for i in ids).decode(errors="replace")

    num_prompt = len(prompt.encode()) // size
    ids = list(range(-(-len(raw) // size)))
    stream = WindowStream(decode, frozenset(), ids[:num_prompt])
    before = decode(ids[:num_prompt]).rstrip("\ufffd")
    # A prompt may end inside a character, which then belongs to what follows.
    if "\ufffd" not in prompt + text:
        assert before + stream_text(stream, [[i] for i in ids[num_prompt:]]) == prompt + text


def test_window_stream_gets_over_invalid_bytes() -> None:
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    stream = WindowStream(decode)
    text = stream_text(stream, [[i] for i in b"ab" + b"\xff" * 100 + b"cd"])
    assert text.startswith("ab\ufffd")
    assert text.endswith("\ufffdcd")
    assert set(text) == set("ab\ufffdcd")


def test_unusual_decoders_have_no_byte_rule() -> None:
    strip_right = {"type": "Strip", "content": " ", "start": 0, "stop": 1}
    usual = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    assert byte_rule({"type": "Sequence", "decoders": usual}) is not None
    assert byte_rule({"type": "Sequence", "decoders": [*usual, strip_right]}) is None
    assert byte_rule({"type": "Sequence", "decoders": usual[1:]}) is None
    other = [{"type": "Replace", "pattern": {"String": "▁"}, "content": "_"}, *usual[1:]]
    assert byte_rule({"type": "Sequence", "decoders": other}) is None
    assert byte_rule({"type": "WordPiece", "prefix": "##", "cleanup": True}) is None
    assert byte_rule(None) is None


def _bytes_only() -> FastTokenizer:
    """A tokenizer whose 256 tokens are the bytes."""
    import tempfile
    from pathlib import Path

    from dovetail.core.tokenizer.pieces import _ALPHABET

    backend = Tokenizer(models.BPE(vocab=dict(_ALPHABET), merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([special("<end>")])
    with tempfile.TemporaryDirectory() as folder:
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        tokenizer = load_tokenizer(write(Path(folder), backend, config, "llama"))
    assert isinstance(tokenizer, FastTokenizer)
    return tokenizer


BYTES = _bytes_only()
