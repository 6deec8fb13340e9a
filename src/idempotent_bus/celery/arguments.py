"""A task's arguments as the body of its message: by their names, however the caller gave them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ..errors import ConfigurationError, InvalidBody

__all__ = ["TRANSACTION_NAMES", "Arguments"]

#: The parameters by which a task with an inbox takes its transaction. They are never part of a message.
TRANSACTION_NAMES: Final = ("connection", "session")
_POSITIONAL: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Arguments:
    """The parameters of one task's function, without `self` and without the transaction.

    transactional: a parameter named `connection` or `session` is the transaction's. Raises ConfigurationError for a
    function whose calls could not be read.
    """

    def __init__(self, run: Callable[..., Any], *, bound: bool, transactional: bool) -> None:
        try:
            parameters = list(inspect.signature(run).parameters.values())
        except (TypeError, ValueError) as error:
            raise ConfigurationError("a guarded task must be a function whose parameters can be read") from error
        if bound:
            parameters = parameters[1:]
        taken = [one.name for one in parameters if transactional and one.name in TRANSACTION_NAMES]
        #: The name of the parameter that takes the transaction; None: there is none.
        self.transaction: str | None = taken[0] if taken else None
        if len(taken) > 1:
            raise ConfigurationError("a task takes its transaction as `connection` or as `session`, not as both")
        self._signature = inspect.Signature([one for one in parameters if one.name not in taken])
        # The way of nearly all tasks: plain parameters, for which no Signature need be bound.
        plain = all(one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for one in self._signature.parameters.values())
        self._names: tuple[str, ...] | None = tuple(self._signature.parameters) if plain else None
        self._needed = frozenset(
            one.name for one in self._signature.parameters.values() if one.default is inspect.Parameter.empty
        )

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by their names; what was left to its default is left out.

        Not the defaults: a release that changes one would make a copy look like another body. Raises InvalidBody if the
        function cannot be called so.
        """
        names = self._names
        if names is not None and len(args) <= len(names):
            body = dict(zip(names, args, strict=False))
            given = len(body)
            body.update(kwargs)
            if len(body) == given + len(kwargs) and self._needed <= body.keys() and body.keys() <= set(names):
                return body
        try:
            return dict(self._signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise InvalidBody(f"the task cannot be called with these arguments: {error}") from error

    def check(self, *args: Any, **kwargs: Any) -> None:
        """As the function's own head: raises TypeError for a call that it would refuse, but for the transaction."""
        self._signature.bind(*args, **kwargs)
