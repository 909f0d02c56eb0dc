"""Strict YAML: documents into checked parameters, and errors that name file, line, key, rule and what is allowed.

Validation is pydantic's; what is ours is only where an error is. Used for policies, fleets and experiments alike.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Final, get_type_hints

import pydantic
import yaml

from replay.errors import InputError

YAML_MAX_BYTES: Final = 1 << 20
_STRICT: Final = pydantic.ConfigDict(extra="forbid", strict=True)
Lines = dict[tuple[str | int, ...], int]  # key path -> line, for errors


def read_bounded(path: Path) -> str:
    """A text file of at most 1 MiB; one clear error where it is missing, no text or too large."""
    try:
        with path.open("rb") as file:
            raw = file.read(YAML_MAX_BYTES + 1)
        if len(raw) > YAML_MAX_BYTES:
            raise InputError("is too large", where=str(path), rule="at most 1 MiB", fix="check that it is the file you meant")
        return raw.decode()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path), fix="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError("is not UTF-8 text", where=str(path), fix="save it as UTF-8") from error


def parse_yaml(text: str, where: str) -> tuple[Any, Lines]:
    """The document and the line of every key in it, so that a later error can point at its place."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        raise InputError(
            f"is not YAML: {getattr(error, 'problem', None) or error}", where=place, fix="check indents, quotes and brackets there"
        ) from error
    lines: Lines = {}

    def walk(node: yaml.Node, path: tuple[str | int, ...], depth: int) -> None:
        if depth > 50:
            raise InputError("nests too deep", where=where, rule="at most 50 levels")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                lines[(*path, key.value)] = key.start_mark.line + 1
                walk(value, (*path, key.value), depth + 1)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                lines[(*path, i)] = value.start_mark.line + 1
                walk(value, (*path, i), depth + 1)

    if node is not None:
        walk(node, (), 0)
    return document, lines


def place(where: str, lines: Lines, path: tuple[str | int, ...]) -> str:
    """``file.yaml:7 autoscaler.target``: the nearest line known for that key."""
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    key = ".".join(str(part) for part in path)
    return " ".join(part for part in (f"{where}:{line}" if line else where, key) if part)


@functools.cache
def model(cls: type) -> type[pydantic.BaseModel]:
    """A strict model of one class's parameters: its init fields, so that a policy's state never becomes a key."""
    hints = get_type_hints(cls)
    fields: dict[str, Any] = {f.name: (hints[f.name], f.default) for f in dataclasses.fields(cls) if f.init}
    return pydantic.create_model(cls.__name__, __config__=_STRICT, __doc__=cls.__doc__, **fields)


def parameters(cls: type, given: Any, where: str, lines: Lines, path: tuple[str | int, ...]) -> dict[str, Any]:
    """The parameters of ``cls`` with its defaults filled in, checked by type and then by its own ``__post_init__``."""
    checked = model(cls)
    try:
        filled = checked.model_validate(given).model_dump()
        cls(**filled)
    except InputError as error:
        at = place(where, lines, (*path, error.where) if error.where else path)
        raise InputError(error.what, where=at, rule=error.rule, fix=error.fix) from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        at = place(where, lines, (*path, *first["loc"]))
        if first["type"] == "extra_forbidden":
            raise InputError("unknown key", where=at, rule=f"one of {', '.join(checked.model_fields) or 'none'}") from error
        raise InputError(f"is {first['input']!r}", where=at, rule=first["msg"]) from error
    return filled
