"""Convert the accepted forms of examples into one: a prompt, and a completion to learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hf_jd.groups import is_missing

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
        task: The value of the task column, if there is one.
    """

    prompt: str | Messages
    completion: str | Messages
    tools: list[Any] | None = None
    task: Any = None


def to_examples(
    rows: Sequence[Row], task_column: str | None, source: str = "The data"
) -> Iterator[tuple[int, Example]]:
    """Convert rows, and yield each with its number.

    Args:
        rows: A list, or a `Dataset`.
        task_column: The column with each row's task, if any.
        source: Names the rows in errors.

    Raises:
        ValueError: A column is missing; or, after the last row, a row has no text to learn or no task.
    """
    columns = getattr(rows, "column_names", None) or dict.fromkeys(name for row in rows for name in row)
    listed = ", ".join(f"`{name}`" for name in columns)
    convert = next((convert for form, convert in FORMS.items() if set(form).issubset(columns)), None)
    if convert is None:
        advice = " Preferences are for `hf-jd dpo`." if {"chosen", "rejected"}.issubset(columns) else ""
        raise ValueError(f"{source} has nothing to learn from: it needs the columns {HELP}, and has {listed}.{advice}")
    if task_column and task_column not in columns:
        raise ValueError(
            f"{source} has no column `{task_column}`; its columns are {listed}. Choose the column of tasks with "
            "--task_column (or --jd_group_column)."
        )
    refused: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        try:
            example = convert(row)._replace(task=row.get(task_column) if task_column else None)
            if task_column and is_missing(example.task):
                raise ValueError(f"no value in the column `{task_column}`")
        except ValueError as error:
            refused.setdefault(str(error), []).append(number)
        else:
            yield number, example
    for complaint, numbers in refused.items():
        more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
        place = f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:5]))}{more}"
        raise ValueError(f"{source} has {complaint} of {place}: fill it in, or leave out such rows.")


def _pair(row: Row) -> Example:
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Example(_string(row, "prompt"), _string(row, "completion"))
    if isinstance(prompt, str):
        row = {**row, "prompt": [{"role": "user", "content": prompt}]}
    if isinstance(completion, str):
        row = {**row, "completion": [{"role": "assistant", "content": completion}]}
    return Example(_messages(row, "prompt"), _learned(row, "completion"), _tools(row))


def _instruction(row: Row) -> Example:
    parts = [_string(row, "instruction"), row.get("input") or ""]
    question = "\n\n".join(str(part) for part in parts if part)
    answer = {"role": "assistant", "content": _string(row, "output")}
    return Example([{"role": "user", "content": question}], [answer])


# An example has the first of these forms whose columns are all there.
FORMS: dict[tuple[str, ...], Callable[[Row], Example]] = {
    ("messages",): lambda row: Example([], _learned(row, "messages"), _tools(row)),
    ("conversations",): lambda row: Example([], _learned(row, "conversations"), _tools(row)),
    ("prompt", "completion"): _pair,
    ("instruction", "output"): _instruction,
    ("text",): lambda row: Example("", _string(row, "text")),
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


def _learned(row: Row, column: str) -> Messages:
    messages = _messages(row, column)
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
