"""Convert the accepted forms of examples into one: a prompt, and a completion to learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names for the roles of chat templates."""

HELP = "`messages`, `prompt` and `completion`, `instruction` and `output`, or `text`"

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]


class Example(NamedTuple):
    """An example, whatever its original form.

    Attributes:
        prompt: Text or messages; may be empty.
        completion: The text or messages that follow: a text is learned in full, of messages only the assistant's.
        tools: JSON schemas of the tools that the messages may call.
    """

    prompt: str | Messages
    completion: str | Messages
    tools: list[Any] | None = None


def form_of(columns: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that hold the example, the first of `FORMS` that is complete; () if none is."""
    names = set(columns)
    return next((form for form in FORMS if names.issuperset(form)), ())


def to_example(row: Row, form: tuple[str, ...]) -> Example:
    """Convert a row.

    Args:
        row: Values by column.
        form: One of `FORMS`.

    Raises:
        ValueError: A column doesn't hold what its form needs; the message says which.
    """
    return FORMS[form](row)


def _text(row: Row) -> Example:
    return Example("", _string(row, "text"))


def _pair(row: Row) -> Example:
    if isinstance(row["completion"], list):
        prompt = row["prompt"]
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(row, "prompt")
        return Example(before, _learned(_messages(row, "completion"), "completion"), _tools(row))
    if isinstance(row["prompt"], list):
        answer = {"role": "assistant", "content": _string(row, "completion")}
        return Example(_messages(row, "prompt"), [answer], _tools(row))
    return Example(_string(row, "prompt"), _string(row, "completion"))


def _instruction(row: Row) -> Example:
    parts = [_string(row, "instruction"), row.get("input") or ""]
    question = "\n\n".join(str(part) for part in parts if part)
    answer = {"role": "assistant", "content": _string(row, "output")}
    return Example([{"role": "user", "content": question}], [answer])


def _chat(column: str) -> Callable[[Row], Example]:
    return lambda row: Example([], _learned(_messages(row, column), column), _tools(row))


FORMS: dict[tuple[str, ...], Callable[[Row], Example]] = {
    ("messages",): _chat("messages"),
    ("conversations",): _chat("conversations"),
    ("prompt", "completion"): _pair,
    ("instruction", "output"): _instruction,
    ("text",): _text,
}


def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"no text in the column `{column}`")
    return value


def _messages(row: Row, column: str) -> Messages:
    value = row.get(column)
    if not isinstance(value, list):
        raise ValueError(f"no list of messages in the column `{column}`")
    return [_message(message, column) for message in value]


def _message(message: Any, column: str) -> dict[str, Any]:
    # A table gives every message the keys of all messages: drop keys without a value.
    fields = _without_nulls(message) if isinstance(message, dict) else {}
    if "from" in fields:
        fields = {"role": fields["from"], "content": fields.get("value")}
    fields["role"] = ROLES.get(fields.get("role", ""), fields.get("role"))
    content = fields.setdefault("content", "" if len(fields) > 1 else None)  # A call of a tool needs no text.
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        fields["content"] = content = "".join(part["text"] for part in content)
    if not isinstance(fields["role"], str) or not isinstance(content, str):
        raise ValueError(f"a message without `role` and `content` as text in the column `{column}`")
    return fields


def _learned(messages: Messages, column: str) -> Messages:
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"no message with the role `assistant` in the column `{column}`")
    return messages


def _tools(row: Row) -> list[Any] | None:
    tools = row.get("tools")
    return _without_nulls(json.loads(tools) if isinstance(tools, str) and tools else tools) or None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
