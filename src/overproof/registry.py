"""Names of methods, attacks, models and data sets; their options are read from the builder's keyword-only signature."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_type_hints

from overproof.errors import UnknownNameError, UsageError

_FRACTION = re.compile(r"^\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*/\s*([\d.]+(?:e[-+]?\d+)?)\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Option:
    """One keyword-only argument of a builder."""

    name: str
    annotation: Any
    default: Any

    @property
    def type_name(self) -> str:
        """The annotation as a reader would write it."""
        return getattr(self.annotation, "__name__", None) or str(self.annotation).replace("typing.", "")


@dataclass(frozen=True)
class Entry:
    """A registered builder: `target` is the builder, or "module:attribute" that is imported when first needed."""

    name: str
    target: str | Callable[..., Any]
    summary: str = ""
    paper: str = ""
    url: str = ""
    tags: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """The builder itself."""
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        builder: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return builder

    def options(self) -> dict[str, Option]:
        """The builder's keyword-only arguments by name."""
        builder = self.load()
        # A dataclass inherits fields whose annotations only make sense where they were written; get_type_hints looks there.
        source = builder.__init__ if inspect.isclass(builder) and not is_dataclass(builder) else builder
        hints = get_type_hints(source)
        parameters = inspect.signature(builder).parameters.values()
        named = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        return {p.name: Option(p.name, hints.get(p.name, Any), p.default) for p in named}

    def positional(self) -> tuple[str, ...]:
        """Names of the builder's positional arguments ("student", "teacher", ...)."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return tuple(p.name for p in inspect.signature(self.load()).parameters.values() if p.kind in kinds)

    def check(self, options: dict[str, Any], kind: str = "entry") -> dict[str, Any]:
        """`options` converted to the annotated types.

        Raises:
            UsageError: an option is unknown, of the wrong type, or required and absent.
        """
        known = self.options()
        for name in options:
            if name not in known:
                raise UnknownNameError(f"option of {kind} {self.name!r}:", name, known)
        for option in known.values():
            if option.default is inspect.Parameter.empty and option.name not in options:
                raise UsageError(f"{kind} {self.name!r} needs the option {option.name!r} ({option.type_name}).")
        return {k: convert(v, known[k].annotation, f"{kind} {self.name!r}, option {k!r}") for k, v in options.items()}


def convert(value: Any, annotation: Any, place: str) -> Any:
    """`value` as the annotated type; fractions such as "8/255" become exact quotients.

    Raises:
        UsageError: the value does not fit; the message names place, value and wanted type.
    """
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    if isinstance(value, str) and (match := _FRACTION.match(value)) and annotation is not str:
        if float(match[2]) == 0:
            raise UsageError(f"{place}: {value!r} divides by zero.")
        value = float(match[1]) / float(match[2])
    if annotation in (inspect.Parameter.empty, Any):
        return value
    try:
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:  # the annotation brings its own configuration (a dataclass, a model)
            adapter = TypeAdapter(annotation)
        return adapter.validate_python(value)
    except ValidationError as error:
        wanted = getattr(annotation, "__name__", None) or str(annotation)
        raise UsageError(f"{place}: {value!r} is not valid ({error.errors()[0]['msg']}); expected {wanted}.") from None


class Registry:
    """A table of named builders of one kind.

    Args:
        kind: what an entry is called in messages ("method").
        group: entry-point group through which other packages add entries ("overproof.methods"); each entry point
            names a module, or a callable without arguments, that registers when loaded.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._entries: dict[str, Entry] = {}
        self._discovered = False

    def add(self, name: str, target: str | Callable[..., Any], **about: Any) -> None:
        """Register `target` under `name`; `about` are the other fields of `Entry`.

        Raises:
            UsageError: the name is taken by another builder.
        """
        known = self._entries.get(name)
        if known is not None and _identity(known.target) != _identity(target):
            raise UsageError(f"The {self.kind} name {name!r} is taken by {known.target}; choose another name.")
        self._entries[name] = Entry(name, target, **about)

    def register(self, name: str, **about: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator form of `add`; the summary defaults to the docstring's first line."""

        def decorate(builder: Callable[..., Any]) -> Callable[..., Any]:
            about.setdefault("summary", (inspect.getdoc(builder) or "").partition("\n")[0])
            self.add(name, builder, **about)
            return builder

        return decorate

    def get(self, name: str) -> Entry:
        """The entry called `name`.

        Raises:
            UnknownNameError: no such entry; offers the nearest names.
        """
        if name not in self._entries:
            self._discover()
        if name not in self._entries:
            hint = f"`overproof list {self.kind}s` shows all." if self.kind != "data" else "`overproof list data` shows all."
            raise UnknownNameError(self.kind, name, self._entries, hint)
        return self._entries[name]

    def create(self, name: str, *args: Any, **options: Any) -> Any:
        """Build entry `name` with positional `args` and checked keyword `options`."""
        entry = self.get(name)
        return entry.load()(*args, **entry.check(options, self.kind))

    def names(self) -> list[str]:
        """All names, sorted."""
        self._discover()
        return sorted(self._entries)

    def entries(self) -> Iterable[Entry]:
        """All entries, by name."""
        return [self._entries[name] for name in self.names()]

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        for point in entry_points(group=self.group):
            try:
                loaded = point.load()
                if callable(loaded):
                    loaded()
            except Exception as error:  # a broken plug-in must not take the toolkit down with it
                warnings.warn(f"The plug-in {point.value!r} ({self.group}) could not be loaded: {error}", stacklevel=2)


def _identity(target: str | Callable[..., Any]) -> str:
    """Running a notebook cell again makes another object of the same name, which may replace the first."""
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


def load_plugin(path: str | Path) -> None:
    """Run the Python file `path`, which registers its methods, attacks, models or data sets.

    Raises:
        UsageError: no such file, or the file fails.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"--plugin {path}: no such file.")
    name = f"overproof_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--plugin {path}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"--plugin {path}: running it failed with {type(error).__name__}: {error}") from error
