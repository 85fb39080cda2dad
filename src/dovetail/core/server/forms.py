"""The form that a client asks of the answer, in any of the spellings that clients use for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from dovetail.core.constraint import StructuredOutputsParams
from dovetail.core.errors import RequestError
from dovetail.core.request import SamplingParams
from dovetail.core.server.parse import check_depth
from dovetail.core.server.protocol import GenerationRequest

__all__ = ["Form", "in_clients_words", "requested_form", "with_form"]

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "grammar": "grammar",
}
"""vLLM's older fields and those of llama.cpp's server, by the field of ours that they mean."""
_FORMATS = 'one of {"type": "text"}, {"type": "json_object"} and {"type": "json_schema", ...}'


class Form(NamedTuple):
    """What the answer must look like, and which field of the request said so."""

    params: StructuredOutputsParams
    field: str


def requested_form(
    request: GenerationRequest, depth: int, forced: Form | None = None
) -> Form | None:
    """The one form that is asked for; None if the answer may have any.

    Args:
        request: Already decoded.
        depth: How deeply a schema may be nested.
        forced: What a forced tool call asks for.

    Raises:
        RequestError: A form cannot be read, or there are several; names the field.
    """
    forms = [*_forms(request, depth), *([forced] if forced else [])]
    if len(forms) > 1:
        names = " and ".join(form.field for form in forms)
        raise RequestError(f"{names} exclude each other.", param=forms[1].field)
    return forms[0] if forms else None


def with_form(params: SamplingParams, form: Form | None) -> SamplingParams:
    """The parameters with the form in them."""
    if form is None:
        return params
    return msgspec.structs.replace(params, structured_outputs=form.params)


def in_clients_words(error: RequestError, field: str) -> RequestError:
    """An error about ``structured_outputs`` as one about the field that the client did send."""
    param = error.param or ""
    if not field or not param.startswith("structured_outputs"):
        return error
    return RequestError(str(error).replace(param, field, 1), param=field, code=error.code)


def _forms(request: GenerationRequest, depth: int) -> Iterator[Form]:
    for name in ("response_format", "structured_outputs", *_GUIDED):
        value = getattr(request, name)
        if value is None:
            continue
        check_depth(value, depth, name)
        try:
            params = _read(name, value)
        except RequestError as error:
            raise in_clients_words(error, name) from None
        if params is not None:
            yield Form(params, name)


def _read(name: str, value: Any) -> StructuredOutputsParams | None:
    if name in _GUIDED:
        return StructuredOutputsParams(**{_GUIDED[name]: value})
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be an object.", param=name)
    if name == "structured_outputs":
        return StructuredOutputsParams.of(value) if value else None
    return _response_format(value)


def _response_format(value: dict[str, Any]) -> StructuredOutputsParams | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")
        if schema is None:
            return StructuredOutputsParams(json_object=True)
        return StructuredOutputsParams(json=_schema(schema, "response_format.schema"))
    if kind == "json_schema":
        described = value.get("json_schema")
        param = "response_format.json_schema"
        if not isinstance(described, dict):
            raise RequestError(f"{param} must be an object.", param=param)
        return StructuredOutputsParams(json=_schema(described.get("schema"), f"{param}.schema"))
    raise RequestError(f"response_format must be {_FORMATS}.", param="response_format.type")


def _schema(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{param} must be a JSON schema.", param=param)
    return value
