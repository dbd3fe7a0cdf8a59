"""Reads configurations from YAML, with what they extend and what the command line changes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from recap_fast.config.run import TrainConfig
from recap_fast.config.section import ConfigError, nearest
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.paths import absolute, names_files, shown


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number, as YAML 1.2 does and PyYAML does not."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            break  # SafeLoader's own error says so
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file into a `TrainConfig`.

    Args:
        path: the file.
            Its `extends` may name another, relative to it: keys of the one go over those of the
            other.
        overrides: "a.b=value" strings that replace keys; values are read as YAML. An integer in
            the path indexes a list (data.sources.0.size=100).

    Raises:
        ConfigError: the file is missing or malformed, or its content cannot be run.
    """
    path = Path(path)
    raw = _read_extended(path, ())
    for override in overrides:
        _apply_override(raw, override)
    _resolve_files(raw)
    try:
        # As JSON: pydantic's strict mode then still builds nested dataclasses from mappings.
        return TrainConfig.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        lines = [_describe(raw, item) for item in error.errors()[:8]]
        raise ConfigError(f"{path}: cannot be used\n" + "\n".join(lines)) from None


def _read_extended(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """A file's keys over those of the file that its `extends` names, relative to it."""
    chain = " <- ".join(map(shown, (path, *reversed(extended_by))))
    try:
        if path.resolve() in [file.resolve() for file in extended_by]:
            raise ConfigError(f"{chain}: the file extends itself")
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{chain}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{chain}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{chain}: not a text file in UTF-8") from None
    except ConfigError:
        raise
    except ValueError as error:  # a name with a NUL in it
        raise ConfigError(f"{chain}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{chain}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{chain}: expected a mapping of keys, got {type(raw).__name__}")
    if "extends" not in raw:
        return raw
    base = raw.pop("extends")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{chain}: extends: wanted the name of a file, got {base!r}")
    return merge(_read_extended(path.parent / base, (*extended_by, path)), raw)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key. All else replaces what was there: lists, and an empty mapping
    too, or nothing could be taken out of one."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both and value else value
    return merged


def _resolve_files(raw: dict[str, Any]) -> None:
    """Makes local files and folders absolute, so that a run's config.yaml can be used from
    anywhere."""
    if isinstance(raw.get("run"), str):
        raw["run"] = os.path.expanduser(raw["run"])
    data = raw.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    for source in sources if isinstance(sources, list) else []:
        if not isinstance(source, dict):
            continue
        path, folder = source.get("path"), source.get("image_folder")
        if isinstance(path, list):
            source["path"] = [_resolve(one) for one in path]
        elif path is not None:
            source["path"] = _resolve(path)
        if isinstance(folder, str):
            source["image_folder"] = absolute(folder)


def _resolve(path: Any) -> Any:
    return absolute(path) if isinstance(path, str) and names_files(path) else path


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes the complete configuration, defaults included; `load_config` reads it back equal."""
    data = config.model_dump(mode="json")
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"--set {override}: wanted key=value, e.g. optimizer.learning_rate=1e-5")
    try:
        parsed = yaml.load(value, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: {value!r} is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, list):
            node = node[_list_index(node, part, override)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
    if isinstance(node, list):
        node[_list_index(node, last, override)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise ConfigError(f"--set {override}: {'.'.join(parents)} is a value and has no keys")


def _list_index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--set {override}: {part!r} is not an index below {len(node)}")
    return int(part)


def _describe(raw: Any, error: Any) -> str:
    """One line for one of pydantic's errors: where, what was wanted, what was given."""
    # Union members appear in `loc` as type names; only real keys and indices are kept.
    path: list[str] = []
    node = raw
    for part in error["loc"]:
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        path.append(str(part))
    where = ".".join(path) or "(top level)"
    if error["type"] == "extra_forbidden" or error["type"] == "unexpected_keyword_argument":
        parent = _fields_at(error["loc"][:-1])
        return f"  {where}: unknown key{nearest(str(error['loc'][-1]), parent)}"
    if error["type"] == "missing":
        return f"  {where}: missing"
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    if isinstance(given, dict | list | BaseModel) or error["type"] == "value_error":
        return f"  {where}: {message}" if path else f"  {message}"
    return f"  {where}: {message} (given: {given!r})"


def _fields_at(loc: Sequence[Any]) -> list[str]:
    """Names of the valid keys of the model at a path of pydantic's."""
    model: Any = TrainConfig
    for part in loc:
        fields = getattr(model, "model_fields", {})
        part = next((name for name, field in fields.items() if field.alias == part), part)
        if part not in fields:
            continue
        annotation = fields[part].annotation
        candidates = [annotation, *_flatten(annotation)]
        model = next(
            (c for c in candidates if hasattr(c, "model_fields") or c is PolicyLossConfig), model
        )
    if model is PolicyLossConfig:
        return list(PolicyLossConfig.__dataclass_fields__)
    return [field.alias or name for name, field in model.model_fields.items()]


def _flatten(annotation: Any) -> list[Any]:
    return [inner for arg in get_args(annotation) for inner in [arg, *_flatten(arg)]]
