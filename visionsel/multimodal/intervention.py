"""Interventions: what a model looks at is changed while a context is open.

    with FastV(keep=0.25)(model) as pruned:
        out = model.generate(**inputs)
    print(pruned.report())

An intervention is a small frozen dataclass of its hyperparameters. Calling it on a model gives a context
manager; when it ends, also by an exception, the model is what it was. Several compose, by nesting or with
`Stack`.
"""

import ast
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from visionsel.multimodal.session import Session, open_session

__all__ = ["Intervention", "Stack", "method_name", "parse"]


@dataclass(frozen=True)
class Intervention(ABC):
    """Base of all interventions; a subclass has fields and `attach`."""

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[Any]:
        """Change the model for the length of a `with` block.

        Args:
            model: a vision-language model of transformers with its head.

        Yields:
            what the intervention tells about its work.

        Raises:
            ValueError: for a model of no supported family, or one that the hyperparameters do not fit.
            NotImplementedError: for what this intervention cannot do on this model.
        """
        with open_session(model) as session, self.attach(session) as handle:
            yield handle

    @abstractmethod
    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Check against the model and put the hooks on; they end with the context."""


class Stack(Intervention):
    """Several interventions as one: `with Stack(DivPrune(keep=0.5), FastV(layer=2))(model) as (div, fast):
    ...`.

    They are entered in the order given, and left in the reverse.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import DivPrune, FastV, Stack
        >>> with Stack(DivPrune(keep=0.5), FastV(keep=0.5, layer=1))(model) as (div, fast):
        ...     answer = model.generate(**inputs)
        >>> div.report().visual_tokens
        (32.0, 16.0, 16.0, 16.0)
    """

    def __init__(self, *interventions: Intervention) -> None:
        for one in interventions:
            if not isinstance(one, Intervention):
                raise TypeError(
                    f"Stack takes interventions such as FastV(keep=0.5), got {type(one).__name__}"
                    + ("; call it first to make one" if isinstance(one, type) else "")
                )
        object.__setattr__(self, "interventions", interventions)

    def __repr__(self) -> str:
        return f"Stack({', '.join(map(repr, self.interventions))})"  # type: ignore[attr-defined]

    @contextmanager
    def attach(self, session: Session) -> Iterator[Any]:
        """All of them; yields their handles in a tuple."""
        with ExitStack() as stack:
            interventions: tuple[Intervention, ...] = self.interventions  # type: ignore[attr-defined]
            yield tuple(stack.enter_context(one.attach(session)) for one in interventions)


def parse(text: str, kinds: Sequence[type[Intervention]]) -> Intervention:
    """An intervention from a line of text: `"fastv:keep=0.25,layer=2"`.

    Args:
        text: the name of a method, as its file is called, and its hyperparameters as Python literals; those
            that are text need no quotes, which a shell takes away. Where a method has presets,
            `preset=NAME` takes one, and further hyperparameters replace its own.
        kinds: the methods to choose from.

    Raises:
        ValueError: for an unknown method or hyperparameter, or a value that is no literal.

    Examples:
        >>> from visionsel.multimodal import PRUNERS
        >>> from visionsel.multimodal.intervention import parse
        >>> parse("fastv:keep=0.25,layer=1", PRUNERS)
        FastV(keep=0.25, layer=1)
    """
    name, _, rest = text.partition(":")
    known = {method_name(kind): kind for kind in kinds}
    kind = known.get(name.strip().lower())
    if kind is None:
        raise ValueError(f"no method is called {name!r}; there are {', '.join(known)}")
    names = [field.name for field in fields(kind)]
    texts = {field.name for field in fields(kind) if field.type in (str, "str")}
    presets: Any = getattr(kind, "preset", None)
    if presets is not None:
        names.append("preset")
        texts.add("preset")

    def value(word: ast.keyword) -> Any:
        if word.arg in texts and isinstance(word.value, ast.Name):
            return word.value.id
        return ast.literal_eval(word.value)

    try:
        call = ast.parse(f"f({rest})", mode="eval").body
        assert isinstance(call, ast.Call)
        arguments = {str(word.arg): value(word) for word in call.keywords}
    except (SyntaxError, ValueError):
        arguments, call = {}, None
    if call is None or call.args or not set(arguments) <= set(names):
        raise ValueError(f"cannot read {text!r}: write {name}:NAME=VALUE,... with {', '.join(names)}")
    try:
        if "preset" in arguments and presets is not None:
            made: Intervention = replace(presets(arguments.pop("preset")), **arguments)
            return made
        return kind(**arguments)
    except TypeError as error:  # a hyperparameter without a default, or of another type
        raise ValueError(f"cannot make {name} of {text!r}: {error}") from error


def method_name(kind: type[Intervention]) -> str:
    """What a method is called in text: the name of its file."""
    return kind.__module__.rpartition(".")[2]
