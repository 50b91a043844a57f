"""Configuration is frozen data: TOML on disk, pydantic in memory, dotted overrides on the command line."""

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from isotach.errors import UserError


class Config(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error rather than a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _only_switches(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false, which pydantic would take for the numbers 1 and 0."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"got {str(value).lower()}, but this key is no switch; give its value")
        return value

    @classmethod
    def keys(cls) -> list[str]:
        """The keys a table of this configuration may have."""
        return list(cls.model_fields)


C = TypeVar("C", bound=Config)


def load(cls: type[C], path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> C:
    """Read a TOML file, apply `table.key=value` overrides in order, validate.

    Raises UserError for a missing or malformed file, an unknown key (naming the nearest one) or a wrong type.
    """
    data = read(path)
    for override in overrides:
        set_dotted(data, override)
    return parse(cls, data, who=str(path))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of a TOML file; UserError where there is none or it is not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: expected a TOML file, found none; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: expected a TOML file, got a folder; name the file inside it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected TOML, got something else ({error}); mend that place") from None


def parse(cls: type[C], data: Mapping[str, Any], *, who: str) -> C:
    """Validate `data` as `cls`; the first fault becomes one UserError sentence that names the key."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise UserError(sentence(cls, who, error)) from None


def dumps(config: Config) -> str:
    """TOML text that `load` reads back to an equal configuration; unset optional keys are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def set_dotted(data: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` to nested tables; the value is TOML, and bare words are strings."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"override {override!r}: expected table.key=value, such as train.lr=3e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if text.lstrip()[:1] in ("[", "{"):
            raise UserError(
                f"override {override!r}: expected a TOML list or table; quote it for the shell, as in '{key}=[\"a\"]'"
            ) from None
        value = text
    table = data
    for name in path[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"override {override!r}: {name} is a value, not a table; name a key inside a table")
    table[path[-1]] = value


def nearest(word: str, candidates: Iterable[str]) -> str:
    """'; did you mean X?' for a mistyped name, or the list of valid ones."""
    candidates = sorted(candidates)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"valid: {', '.join(candidates)}"


def sentence(cls: type[Config], who: str, error: ValidationError) -> str:
    """The first fault as one sentence that names the key, and the nearest valid one where it is unknown."""
    first: Any = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        *path, name = location
        moved = [f"{table}.{name}" for table in cls.model_fields if name in _keys(cls, [table])]
        hint = f"did you mean {moved[0]}?" if moved else nearest(name, _keys(cls, path))
        return f"{who}: unknown key {'.'.join(location)}; {hint}"
    # Of a union, pydantic also names the member that it tried.
    location = [part for part in location if part.isidentifier() or part.isdecimal()]
    key = ".".join(location) or "the configuration"
    if first["type"] == "missing":
        return f"{who}: {key} is required; add it"
    if first["type"] == "value_error":
        return ": ".join([who, *([key] if location else []), str(first["ctx"]["error"])])
    got = "a table" if isinstance(first["input"], dict) else repr(first["input"])
    if first["type"] == "model_type":
        return f"{who}: {key}: expected a table, got {got}; write its keys below [{key}]"
    message = (first["msg"][0].lower() + first["msg"][1:]).replace("tuple", "list")
    return f"{who}: {key}: {message}; got {got}"


def _keys(cls: type[Config], path: list[str]) -> list[str]:
    """Valid keys of the table at `path`; [] where the path leaves the declared schema."""
    table: Any = cls
    for name in path:
        field = table.model_fields.get(name) if _is_config(table) else None
        table = field.annotation if field is not None else None
    return table.keys() if _is_config(table) else []


def _is_config(table: Any) -> bool:
    return isinstance(table, type) and issubclass(table, Config)
