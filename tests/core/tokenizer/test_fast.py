"""The fast path against the transformers library's ``AutoTokenizer``."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dovetail.core.tokenizer import load_tokenizer
from dovetail.core.tokenizer.fast import FastTokenizer
from tests.core.tokenizer.folders import FOLDERS, TEXTS


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[FastTokenizer, Any]:
    folder: Path = FOLDERS[request.param](tmp_path_factory.mktemp(request.param))
    ours = load_tokenizer(folder)
    assert isinstance(ours, FastTokenizer)
    return ours, AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encode(pair: tuple[FastTokenizer, Any], add_special_tokens: bool) -> None:
    ours, theirs = pair
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=add_special_tokens)
        assert ours.encode(text, add_special_tokens=add_special_tokens) == expected, text


@pytest.mark.parametrize("skip", [True, False])
def test_decode(pair: tuple[FastTokenizer, Any], skip: bool) -> None:
    ours, theirs = pair
    rng = random.Random(0)
    cases = [theirs.encode(text) for text in TEXTS]
    cases += [[rng.randrange(ours.vocab_size + 3) for _ in range(20)] for _ in range(50)]
    for ids in cases:
        expected = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip_special_tokens=skip) == expected, ids


def test_special_tokens(pair: tuple[FastTokenizer, Any]) -> None:
    ours, theirs = pair
    assert ours.eos_token_id == theirs.eos_token_id
    names = ("bos_token", "eos_token", "pad_token")
    assert [getattr(ours, n) for n in names] == [getattr(theirs, n) for n in names]
    assert ours.special_tokens == theirs.all_special_tokens
    assert ours.vocab_size == len(theirs)
    added = {i: repr(token) for i, token in theirs.added_tokens_decoder.items()}
    assert {i: repr(t) for i, t in ours._backend.get_added_tokens_decoder().items()} == added


def test_tokens_of_a_text_make_up_its_bytes(pair: tuple[FastTokenizer, Any]) -> None:
    ours, _ = pair
    if ours._rule is None:
        pytest.skip("no table of bytes")
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        joined = b"".join(ours.token_bytes(i) for i in ids).decode()
        whole = ours.decode(ids, skip_special_tokens=False)
        assert joined.lstrip(" ") == whole.lstrip(" ")
        for token_id in ids:
            assert ours.token_text(token_id) == ours.token_bytes(token_id).decode(errors="replace")


def test_surrogates_do_no_harm(pair: tuple[FastTokenizer, Any]) -> None:
    ours, _ = pair
    assert ours.encode("a\ud83d\ude00b") == ours.encode("a😀b")
    assert ours.encode("a\ud83db") == ours.encode("a\ufffdb")


def test_ids_outside_the_vocabulary_have_no_text(pair: tuple[FastTokenizer, Any]) -> None:
    ours, _ = pair
    for token_id in (ours.vocab_size + 10, 1 << 31, 1 << 40, -1):
        assert ours.token_bytes(token_id) == b""
        assert ours.token_text(token_id) == ""
