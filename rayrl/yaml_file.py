"""YAML, of which a key that is written twice is refused: the last would count, without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_yaml(file: Path) -> Any:
    """What a YAML file holds; None for an empty one.

    ValueError, in one line with the file's name, for what is not YAML and for a key that a mapping
    has twice, with its lines.
    """
    try:
        return parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not YAML: {error}") from None


def parse_yaml(text: str, name: str) -> Any:
    """:func:`read_yaml` of a text, called ``name``."""
    try:
        _check_once(yaml.compose(text, Loader=yaml.SafeLoader), name, "", set())
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: not YAML: {' '.join(str(error).split())}") from None


def _check_once(node: yaml.Node | None, name: str, prefix: str, seen: set[int]) -> None:
    """ValueError where a mapping in ``node`` has a key twice; ``prefix`` leads to it."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return  # an alias may lead back to where it stands
    seen.add(id(node))
    if not isinstance(node, yaml.MappingNode):
        for item in node.value:
            _check_once(item, name, prefix, seen)
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # which nothing here takes as a key
        dotted, line = f"{prefix}{key.value}", key.start_mark.line + 1
        # A text and a number are two keys, and what is merged counts however often.
        same = (key.tag, key.value)
        if same in lines and not key.tag.endswith(":merge"):
            raise ValueError(
                f"{name}: {dotted} is there twice, in lines {lines[same]} and {line}, and only one "
                "of them would count: want one"
            )
        lines[same] = line
        _check_once(value, name, f"{dotted}.", seen)
