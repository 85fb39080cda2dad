"""Help texts: the short one, the whole one, and what a search finds."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Collection, Iterable

__all__ = ["brief_help", "full_help", "search_help"]

_WIDTH = 96


def brief_help(parser: argparse.ArgumentParser, folded: Collection[str]) -> str:
    """Own flags in full, the groups ``folded`` as a list of names, and how to see more."""
    parts = _head(parser)
    for title, actions in _groups(parser):
        if title not in folded:
            parts.append(_section(parser, title, actions))
            continue
        names = textwrap.fill(
            "  ".join(_name(action) for action in actions),
            _WIDTH,
            initial_indent="  ",
            subsequent_indent="  ",
            break_on_hyphens=False,
        )
        parts.append(f"{title}:\n{names}\n")
    if folded:
        parts.append(
            f"`{parser.prog} --help=WORD` explains what has to do with a word, such as"
            " --help=memory;\n--help=all explains everything.\n"
        )
    return "\n".join(parts)


def full_help(parser: argparse.ArgumentParser) -> str:
    """Everything."""
    sections = [_section(parser, title, actions) for title, actions in _groups(parser)]
    return "\n".join(_head(parser) + sections)


def search_help(parser: argparse.ArgumentParser, word: str) -> str:
    """The groups whose title, and the flags whose name or help, hold the word."""
    needle = word.lower().strip("-").replace("_", "-")
    parts = []
    for title, actions in _groups(parser):
        if needle in title.lower():
            found = actions
        else:
            found = [a for a in actions if needle in _searchable(a)]
        if found:
            parts.append(_section(parser, title, found))
    if not parts:
        titles = ", ".join(title for title, _ in _groups(parser))
        return f"Nothing about {word!r}. The groups are: {titles}.\n"
    return "\n".join(parts)


class _Formatter(argparse.HelpFormatter):
    """Names the value once, however many names the flag has, and shortens --no- flags."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            shown = [flag for flag in action.option_strings if not flag.startswith("--no-")]
            return ", ".join("--[no-]" + flag.removeprefix("--") for flag in shown)
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


def _head(parser: argparse.ArgumentParser) -> list[str]:
    positionals = [a for a in parser._actions if not a.option_strings]
    words = [parser.prog, "[flags]", *(_usage_of(a) for a in positionals)]
    return [
        "usage: " + " ".join(words) + "\n",
        textwrap.fill(parser.description or "", _WIDTH) + "\n",
    ]


def _usage_of(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    return {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [...]"}.get(
        str(action.nargs), name
    )


def _groups(parser: argparse.ArgumentParser) -> Iterable[tuple[str, list[argparse.Action]]]:
    """Titles with their shown flags; the arguments without a flag first."""
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if a.help is not argparse.SUPPRESS]
        if shown:
            title = {"options": "flags", "positional arguments": "arguments"}
            yield title.get(group.title or "", group.title or ""), shown


def _section(
    parser: argparse.ArgumentParser, title: str, actions: Iterable[argparse.Action]
) -> str:
    formatter = _Formatter(parser.prog, max_help_position=30, width=_WIDTH)
    formatter.start_section(title)
    formatter.add_arguments(actions)
    formatter.end_section()
    return formatter.format_help()


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar)


def _searchable(action: argparse.Action) -> str:
    names = " ".join([*action.option_strings, action.dest.replace("_", "-")])
    return f"{names} {action.help or ''}".lower()
