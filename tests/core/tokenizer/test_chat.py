"""Chat templates, against the transformers library's ``apply_chat_template``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dovetail.core.errors import CheckpointError, RequestError
from dovetail.core.tokenizer import load_tokenizer
from dovetail.core.tokenizer.chat import ChatTemplates
from dovetail.core.tokenizer.files import TokenizerFiles
from tests.core.tokenizer.folders import llama3

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\nTools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}{{ "\\n" }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
        {{- '<think>' + message.reasoning_content + '</think>\\n' }}
    {%- endif %}
    {{- message.content if message.content is string else '' }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function.name + ' ' + (call.function.arguments | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if loop.index > 50 %}{% break %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {%- if message.role == 'assistant' %}
            {%- generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}
        {%- else %}
            {{- message['content'] | trim + eos_token }}
        {%- endif %}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}
        {%- endfor %}{{ eos_token }}
    {%- endif %}
{%- endfor %}
{%- for document in documents or [] %}[{{ document.title }}: {{ document['text'] }}]{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant!') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- set is_first = loop.first and system_message is defined %}
        {{- '[INST] ' + (system_message + '\\n\\n' if is_first else '') }}
        {{- message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
PARTS_ONLY = """\
{% for message in messages %}{{ message.role }}: {% for part in message.content %}
{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}

{% endfor %}"""
DATA = (
    """{{ messages | tojson(indent=1) }}{{ dict(a=1, b='<&>') | tojson }}{{ messages | length }}"""
)

SYSTEM = {"role": "system", "content": "Be brief & <kind>."}
USER = {"role": "user", "content": " Grüezi 👋, what's up?\n"}
BOT = {"role": "assistant", "content": "Not much.  "}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "é": "'\"<"}},
}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, "ü"], "y": None}}}
CASES: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
    (CHATML, [USER], {}),
    (CHATML, [SYSTEM, USER, BOT, USER], {"add_generation_prompt": False}),
    (CHATML, [SYSTEM, USER], {"tools": [TOOL], "enable_thinking": False}),
    (CHATML, [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], {}),
    (CHATML, [USER, {**BOT, "reasoning": "hmm"}], {}),
    (CHATML, [USER, BOT], {"continue_final_message": True, "add_generation_prompt": False}),
    (CHATML, [USER], {"tools": []}),
    (LLAMA3, [SYSTEM, USER, BOT, USER], {}),
    (LLAMA3, [SYSTEM, USER], {"documents": [{"title": "t", "text": "x"}]}),
    (LLAMA3, [{"role": "user", "content": [{"type": "text", "text": " a "}]}, BOT], {}),
    (LLAMA3, [USER, BOT], {"continue_final_message": True, "add_generation_prompt": False}),
    (
        LLAMA3,
        [USER, {"role": "assistant", "content": [{"type": "text", "text": "so "}, {"type": "x"}]}],
        {"continue_final_message": True, "add_generation_prompt": False},
    ),
    (MISTRAL, [SYSTEM, USER, BOT, USER], {}),
    (MISTRAL, [USER, BOT], {"continue_final_message": True, "add_generation_prompt": False}),
    (
        PARTS_ONLY,
        [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image"}]}],
        {},
    ),
    (DATA, [SYSTEM, {**USER, "name": None, "more": [1.5, True, {"k": ()}]}], {}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama3(tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(folder))


def render(template: str, messages: list[Any], **arguments: Any) -> str:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplates({"default": template}, names).render(messages, **arguments)


@pytest.mark.parametrize(("template", "messages", "arguments"), CASES)
def test_as_transformers(
    folder: Path, theirs: Any, template: str, messages: list[Any], arguments: dict[str, Any]
) -> None:
    arguments = {"add_generation_prompt": True, **arguments}
    before = json.dumps(messages)
    expected = theirs.apply_chat_template(
        messages, chat_template=template, tokenize=False, **arguments
    )
    own = {"enable_thinking"} & arguments.keys()
    kwargs = {name: arguments.pop(name) for name in own}
    ours = load_tokenizer(folder)
    text = ours.apply_chat_template(
        messages, chat_template=template, template_kwargs=kwargs, **arguments
    )
    assert text == expected
    assert json.dumps(messages) == before


def test_the_template_speaks_for_itself() -> None:
    with pytest.raises(RequestError, match="Conversation roles must alternate user/assistant!"):
        render(MISTRAL, [BOT, BOT])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content.nothing.more }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% set ns = namespace(_x=1) %}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("a\n{% if %}", "line 2"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
    ],
)
def test_a_failing_template_is_the_requests_error(template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        render(template, [USER])
    assert caught.value.param in ("messages", "chat_template")


def test_no_template_says_what_to_do() -> None:
    with pytest.raises(RequestError, match=r"/v1/completions.*--chat-template FILE"):
        ChatTemplates({}, {}).render([USER])


def test_nothing_to_say() -> None:
    with pytest.raises(RequestError, match="at least one message"):
        render(CHATML, [])


def test_open_and_new_turn_exclude_each_other() -> None:
    with pytest.raises(RequestError, match="add_generation_prompt"):
        render(CHATML, [USER], continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "last"),
    [
        (CHATML, {"role": "assistant"}),
        (LLAMA3, {"role": "assistant", "content": []}),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", BOT),
        ("{{ messages[-1].content[-24:] }}", {"role": "user", "content": "long enough"}),
    ],
)
def test_a_message_that_is_not_there_cannot_be_continued(template: str, last: Any) -> None:
    with pytest.raises(RequestError, match="continue_final_message"):
        render(template, [USER, last], continue_final_message=True, add_generation_prompt=False)


PARTS = [{"type": "text", "text": "one"}, "two", {"type": "input_text", "text": "three"}]


def test_parts_become_text_for_templates_that_want_text() -> None:
    text = render(MISTRAL, [{"role": "user", "content": PARTS}])
    assert text == "<s>[INST] one\ntwo\nthree [/INST]"


def test_text_becomes_a_part_for_templates_that_want_parts() -> None:
    assert render(PARTS_ONLY, [USER]) == "user: " + USER["content"] + "\n"


def test_other_parts_are_refused_by_name() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(RequestError, match="image_url") as caught:
        render(MISTRAL, [USER, BOT, {"role": "user", "content": [PARTS[0], image]}])
    assert caught.value.param == "messages.2.content.1"


@pytest.mark.parametrize("message", ["hi", 3, None, ["role"]])
def test_a_message_must_be_an_object(message: Any) -> None:
    with pytest.raises(RequestError) as caught:
        render(MISTRAL, [USER, message])
    assert caught.value.param == "messages.1"


def test_arguments_of_calls_are_objects_for_templates() -> None:
    as_text = {"type": "function", "function": {"name": "f", "arguments": '{"x": "ü"}'}}
    text = render(CHATML, [USER, {"role": "assistant", "tool_calls": [as_text]}])
    assert '<tool_call>f {"x": "ü"}' in text
    concatenating = "{{ '<' + messages[1].tool_calls[0].function.arguments + '>' }}"
    messages = [USER, {"role": "assistant", "tool_calls": [as_text]}]
    assert render(concatenating, messages) == '<{"x": "ü"}>'
    broken = {"function": {"name": "f", "arguments": "{not json"}}
    assert "{not json" in render(CHATML, [{"role": "assistant", "tool_calls": [broken]}])


def test_objects_with_model_dump_are_messages_too() -> None:
    class Message(dict):  # type: ignore[type-arg]
        pass

    class Part:
        def model_dump(self) -> dict[str, str]:
            return {"type": "text", "text": "dumped"}

    content = [Part()]
    assert "dumped" in render(MISTRAL, [Message(role="user", content=content)])
    assert "<object>" in render(DATA, [{"role": "user", "content": object()}])


def test_deep_nesting_is_an_error_and_no_crash() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(RequestError, match="nested"):
        render(DATA, [{"role": "user", "content": nested}])


def test_templates_by_name() -> None:
    several = ChatTemplates({"default": "d", "tool_use": "t", "rag": "r"}, {})
    assert several.render([USER]) == "d"
    assert several.render([USER], tools=[TOOL]) == "t"
    assert several.render([USER], chat_template="rag") == "r"
    assert several.render([USER], chat_template="{{ messages[0].role }}") == "user"
    with pytest.raises(RequestError, match="name one of a, b"):
        ChatTemplates({"a": "", "b": ""}, {}).render([USER])


def test_template_kwargs_replace_special_tokens_but_not_the_messages() -> None:
    kwargs = {"eos_token": "!", "messages": [], "tools": "x"}
    template = "{{ messages | length }}{{ eos_token }}{{ tools }}"
    assert render(template, [USER], template_kwargs=kwargs) == "1!None"


def test_time_is_available() -> None:
    assert len(render("{{ strftime_now('%Y-%m-%d') }}", [USER])) == 10


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"tokenizer_config.json": {"chat_template": "c"}}, {"default": "c"}),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "r"}]}},
            {"rag": "r"},
        ),
        ({"chat_template.json": {"chat_template": "j"}}, {"default": "j"}),
        (
            {
                "chat_template.jinja": "f",
                "additional_chat_templates/rag.jinja": "r",
                "tokenizer_config.json": {"chat_template": "c"},
                "chat_template.json": {"chat_template": "j"},
            },
            {"default": "f", "rag": "r"},
        ),
    ],
)
def test_where_templates_are_found(
    tmp_path: Path, files: dict[str, Any], expected: dict[str, str]
) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert TokenizerFiles.read(tmp_path).chat_templates() == expected


@pytest.mark.parametrize("template", [3, ["x"], [{"name": "a"}], {"a": None}, [{"template": "t"}]])
def test_a_template_must_be_text(tmp_path: Path, template: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match="chat template"):
        TokenizerFiles.read(tmp_path).chat_templates()
