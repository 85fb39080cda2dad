"""The way from bytes to a checked struct."""

from __future__ import annotations

import logging

import pytest

from dovetail.core.errors import RequestError
from dovetail.core.server.parse import UnknownFields, check_depth, decode
from dovetail.core.server.protocol import ChatCompletionRequest, CompletionRequest


def refusal(body: str | bytes, kind: type = CompletionRequest) -> RequestError:
    data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    with pytest.raises(RequestError) as found:
        decode(data, kind)
    return found.value


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ("{}", "prompt", "prompt is required."),
        ('{"prompt": null}', "prompt", "prompt: expected text or list, got null."),
        ('{"prompt": "x", "n": "2"}', "n", "n: expected integer, got text."),
        ('{"prompt": "x", "n": true}', "n", "n: expected integer, got boolean."),
        ('{"prompt": "x", "n": 1.5}', "n", "n: expected integer, got number."),
        ('{"prompt": ["x", {}]}', "prompt.1", "prompt.1: expected integer or text or list"),
        ('{"prompt": [[1, "x"]]}', "prompt.0.1", "prompt.0.1: expected integer, got text."),
        ('{"prompt": "x", "logit_bias": {"1": "x"}}', "logit_bias", "expected number, got text"),
        ('{"prompt": "x", "logit_bias": {"x": 1}}', "logit_bias", "expected integer, got text"),
        ('{"prompt": "x", "temperature": 1e400}', "temperature", "Number out of range"),
        ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", "seed", "Integer value out of range"),
        ("[]", None, "The body must be a JSON object: expected object, got list."),
    ],
)
def test_a_wrong_field_is_named_by_its_path(body: str, param: str | None, message: str) -> None:
    error = refusal(body)
    assert error.param == param
    assert message in str(error)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"messages": [{"content": "x"}]}', "messages.0.role"),
        ('{"messages": [{"role": "user", "content": 1}]}', "messages.0.content"),
        ('{"messages": [{"role": "user", "content": [{"text": 1}]}]}', "messages.0.content.0.text"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "messages.0.role"),
        ('{"messages": {}}', "messages"),
    ],
)
def test_a_wrong_message_is_named_by_its_path(body: str, param: str) -> None:
    assert refusal(body, ChatCompletionRequest).param == param


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "{'prompt': 'x'}",
        '{"prompt": "x"} trailing',
        '{"prompt": "x", "temperature": NaN}',
        '{"prompt": "x", "temperature": Infinity}',
        '{"prompt": "\\ud800"}',
        '{"prompt": "\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "x", "other": "\xff"}',
        b'{"prompt": "x", "\xff": 1}',
        b"\xef\xbb\xbf{}",
        '{"prompt": "x", "other": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"prompt": ' + "[" * 100_000,
        "[" * 5000 + "]" * 5000,
    ],
)
def test_what_is_not_json_is_refused(body: str | bytes) -> None:
    assert len(str(refusal(body))) < 200


def test_null_means_absent_in_every_optional_field() -> None:
    for kind, required in (
        (CompletionRequest, '"prompt":"x"'),
        (ChatCompletionRequest, '"messages":[]'),
    ):
        names = [f for f in kind.__struct_fields__ if f not in ("prompt", "messages")]
        nulls = ",".join(f'"{name}":null' for name in names)
        empty = decode(f"{{{required}}}".encode(), kind)
        assert decode(f"{{{required},{nulls}}}".encode(), kind) == empty


def test_unknown_fields_are_reported_once_and_boundedly(caplog: pytest.LogCaptureFixture) -> None:
    unknown = UnknownFields(capacity=3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            decode(b'{"prompt": "x", "temprature": 1, "user": "me"}', CompletionRequest, unknown)
    assert [r.message for r in caplog.records] == [
        "Unknown request field 'temprature' is ignored; is it misspelt?"
    ]
    with caplog.at_level(logging.WARNING):
        for i in range(50):
            decode(f'{{"prompt": "x", "a{i}\\n": 1}}'.encode(), CompletionRequest, unknown)
    assert len(caplog.records) == 3
    assert "\n" not in caplog.text.replace("\nWARNING", "").strip("\n")


def test_depth_of_free_form_fields_is_bounded() -> None:
    deep: object = 1
    for _ in range(10):
        deep = {"a": [deep]}
    check_depth(deep, 21, "tools")
    with pytest.raises(RequestError, match="tools is nested deeper than 20 levels"):
        check_depth(deep, 20, "tools")
