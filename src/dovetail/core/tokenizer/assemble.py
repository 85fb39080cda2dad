"""Builds the tokenizer of a folder with ``tokenizer.json`` as the transformers library would.

What is done is what ``AutoTokenizer.from_pretrained`` of transformers 5.23 does, in its order;
where that is not known, ``UnknownLayoutError`` says so and the library itself has to be used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeAlias

from tokenizers import AddedToken, Tokenizer

from dovetail.core.errors import CheckpointError
from dovetail.core.tokenizer.class_names import AS_IN_FILE, class_name
from dovetail.core.tokenizer.files import TokenizerFiles
from dovetail.core.tokenizer.layouts import LAYOUTS, Layout, UnknownLayoutError

__all__ = ["Assembled", "assemble"]

Token: TypeAlias = str | AddedToken

_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_NOT_FOLLOWED = (
    "auto_map",
    "fast_tokenizer_files",
    "fix_mistral_regex",
    "init_inputs",
    "split_special_tokens",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)
"""Settings of ``tokenizer_config.json`` that are left to the transformers library."""


@dataclass(frozen=True)
class Assembled:
    """A tokenizer as its folder describes it."""

    backend: Tokenizer
    named: dict[str, str]
    """Special tokens by name, such as ``eos_token``."""
    special_tokens: list[str]
    """The named ones, then further ones, without repeats."""
    clean_up: bool
    """Whether decoded text loses spaces before punctuation."""


def assemble(files: TokenizerFiles) -> Assembled:
    """Read ``tokenizer.json`` and apply what the other files say.

    Raises:
        UnknownLayoutError: Something here is left to the transformers library; says what.
        CheckpointError: ``tokenizer.json`` cannot be read.
    """
    for key in _NOT_FOLLOWED:
        if files.config.get(key):
            raise UnknownLayoutError(f"tokenizer_config.json sets {key}")
    try:
        return _assemble(files)
    except (AttributeError, TypeError, ValueError) as error:
        raise UnknownLayoutError(f"a setting has an unusual form: {error}") from error


def _assemble(files: TokenizerFiles) -> Assembled:
    content = files.tokenizer_json.read_bytes()
    layout = _layout(files, has_byte_level=b'"ByteLevel"' in content)
    try:
        backend = Tokenizer.from_buffer(content)
    except Exception as error:
        raise CheckpointError(f"{files.tokenizer_json}: {error}") from error
    in_file = backend.get_added_tokens_decoder()
    settings, declared = _settings(files, in_file)
    _rebuild(backend, layout, settings, declared, in_file)
    settings = {**layout.special_tokens, **settings}
    if backend.padding and layout is LAYOUTS[AS_IN_FILE]:
        settings.setdefault("pad_token", backend.padding["pad_token"])
    named, more = _special_tokens(settings)
    _add(backend, declared, [*named.values(), *more], named.values())
    names = {name: _content(token) for name, token in named.items()}
    specials = list(dict.fromkeys([*names.values(), *map(_content, more)]))
    if layout.add_all_special:
        backend.add_tokens([AddedToken(token, special=True) for token in specials])
    if layout.finish is not None:
        layout.finish(backend, names)
    backend.no_truncation()
    backend.no_padding()
    is_bpe = type(backend.model).__name__ == "BPE"
    clean_up = bool(settings.get("clean_up_tokenization_spaces")) and not is_bpe
    return Assembled(backend, names, specials, clean_up)


def _layout(files: TokenizerFiles, has_byte_level: bool) -> Layout:
    name = class_name(files.config, files.model, has_byte_level)
    if name is None:
        raise UnknownLayoutError("tokenizer_config.json names no tokenizer_class")
    if name not in LAYOUTS:
        raise UnknownLayoutError(f"the class {name} is not described here")
    if (files.folder / "tekken.json").exists() and find_spec("mistral_common"):
        raise UnknownLayoutError("there is a tekken.json, and mistral-common to read it")
    return LAYOUTS[name]


def _settings(
    files: TokenizerFiles, in_file: dict[int, AddedToken]
) -> tuple[dict[str, Any], dict[int, AddedToken]]:
    """The settings, with special tokens in one form, and the added tokens they declare."""
    settings = _revive(files.config)
    if not settings.get("extra_special_tokens") and "additional_special_tokens" in settings:
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    if "added_tokens_decoder" in settings:
        declared = _declared(settings["added_tokens_decoder"])
    else:
        declared = in_file
        settings |= _special_tokens_map(files)
        known = {token.content: token_id for token_id, token in in_file.items()}
        if not files.added_tokens.items() <= known.items():
            raise UnknownLayoutError("added_tokens.json has tokens that tokenizer.json has not")
    by_content = {token.content: token for token in declared.values()}
    for name in _NAMES:
        token = settings.get(name)
        if isinstance(token, (str, AddedToken)):
            settings[name] = by_content.get(_content(token), token)
        elif token is not None:
            raise UnknownLayoutError(f"{name} is neither text nor an AddedToken")
    return settings, declared


def _declared(entries: dict[str, Any]) -> dict[int, AddedToken]:
    try:
        return {
            int(token_id): token if isinstance(token, AddedToken) else AddedToken(**token)
            for token_id, token in entries.items()
        }
    except (TypeError, ValueError) as error:
        raise UnknownLayoutError(f"added_tokens_decoder: {error}") from error


def _special_tokens_map(files: TokenizerFiles) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in files.special_tokens_map.items():
        if name == "extra_special_tokens":
            raise UnknownLayoutError("special_tokens_map.json has extra_special_tokens")
        if isinstance(value, dict):
            flags = {k: v for k, v in value.items() if k not in ("special", "__type")}
            value = AddedToken(**flags, special=True)
        found[name] = value
    return found


def _revive(value: Any) -> Any:
    """``value`` with every serialised ``AddedToken`` made one again."""
    if isinstance(value, dict):
        if value.get("__type") == "AddedToken":
            return AddedToken(**{k: v for k, v in value.items() if k != "__type"})
        return {key: _revive(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_revive(item) for item in value]
    return value


def _rebuild(
    backend: Tokenizer,
    layout: Layout,
    settings: dict[str, Any],
    declared: dict[int, AddedToken],
    in_file: dict[int, AddedToken],
) -> None:
    """Replace the parts that the class does not take from the file."""
    if layout.model is None:
        return
    model = backend.model
    if not isinstance(model, layout.model):
        raise UnknownLayoutError(f"tokenizer.json holds a {type(model).__name__} model")
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    if type(model).__name__ == "BPE" and any(getattr(model, name) for name in affixes):
        raise UnknownLayoutError("tokenizer.json marks word parts")
    if {i: repr(t) for i, t in declared.items()} != {i: repr(t) for i, t in in_file.items()}:
        raise UnknownLayoutError("tokenizer_config.json and tokenizer.json add other tokens")
    names = {_content(settings[name]) for name in _NAMES if settings.get(name) is not None}
    if any(token.content in names and not token.special for token in in_file.values()):
        raise UnknownLayoutError("a named special token is not marked as special")
    layout.build(backend, settings)


def _special_tokens(settings: dict[str, Any]) -> tuple[dict[str, Token], list[Token]]:
    """Special tokens by name, and further ones."""
    extra = settings.get("extra_special_tokens")
    more = settings.get("additional_special_tokens")
    if extra is not None and not isinstance(extra, dict):
        more = extra
    own = {k: v for k, v in settings.items() if k.endswith("_token") and k not in _NAMES}
    texts = {k: v for k, v in own.items() if isinstance(v, str)}
    texts |= extra if isinstance(extra, dict) else {}
    named: dict[str, Any] = {name: settings.get(name) for name in _NAMES}
    named |= {k: v for k, v in own.items() if isinstance(v, AddedToken)}
    named |= texts or settings.get("model_specific_special_tokens") or {}
    named = {name: token for name, token in named.items() if token is not None}
    more = more or []
    if not all(isinstance(token, (str, AddedToken)) for token in (*named.values(), *more)):
        raise UnknownLayoutError("a special token is neither text nor an AddedToken")
    return named, list(more)


def _add(
    backend: Tokenizer,
    declared: dict[int, AddedToken],
    special: Iterable[Token],
    named: Iterable[Token],
) -> None:
    """Add the tokens that ``tokenizer.json`` lacks, or has otherwise."""
    present = backend.get_added_tokens_decoder().values()
    as_present = {repr(token) for token in present}
    new: list[Token] = [t for _, t in sorted(declared.items()) if repr(t) not in as_present]
    known = {_content(token) for token in (*present, *new)}
    for token in special:
        if _content(token) not in known and token not in new:
            new.append(token)
    added = [AddedToken(t, special=True) if isinstance(t, str) else t for t in new]
    names = {_content(token) for token in named}
    for token in added:
        if token.content in names:
            token.special = True
    backend.add_tokens(added)


def _content(token: Token) -> str:
    return token if isinstance(token, str) else token.content
