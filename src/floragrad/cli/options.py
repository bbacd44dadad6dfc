"""Options of the command line, each declared once: as a field of a dataclass, made by :func:`option`.

The field's type, default and metadata are all there is to say. Typer's options, the checks of values, the defaults of a
run and the tables of ``docs/options.md`` are generated from them.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from math import inf, isfinite
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from floragrad.cli.errors import UserError

if TYPE_CHECKING:
    import typer

T = TypeVar("T")
LARGEST_INTEGER: Final = 2**31 - 1
"""Largest value of a C int, which torch, numpy and the Trainer take everywhere."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """Declaration of one option.

    Attributes:
        name: The field's name, and the option's with dashes for underscores unless ``flag`` is given.
        annotation: The field's type.
        help: One sentence or two.
        panel: Heading of ``--help`` under which the option stands.
        default: Value where none is given; ``MISSING`` where ``derive`` or nothing says it.
        derive: Function of all values that were given, by name, that returns the default.
        shown: Default in words; empty for none. By default the value itself.
        metavar: Placeholder of the value; by default the type's, or the choices.
        choices: Allowed values.
        minimum: Smallest allowed number.
        above: Number that the value must exceed.
        maximum: Largest allowed number; of whole numbers :data:`LARGEST_INTEGER` by default.
        flag: Name on the command line.
        negatable: Whether a switch has a ``--no-`` form too, which differs from leaving it out.
        argument: Whether it is a positional argument.
        parse: Reader of a value of another type; raises ValueError.
        example: List with commas, where the option takes one.
        needs: Options without which it has no effect.
        requires: Values of another option, by its name, of which it needs one.
        keyword: Argument of ``Flora`` or its accumulator (see ``needs``) that takes the value.
    """

    name: str
    annotation: Any
    help: str
    panel: str
    default: Any = MISSING
    derive: Callable[[Mapping[str, Any]], Any] | None = None
    shown: str | None = None
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    minimum: int | float | None = None
    above: float | None = None
    maximum: int | float | None = None
    flag: str | None = None
    negatable: bool = False
    argument: bool = False
    parse: Callable[[str], Any] | None = None
    example: str | None = None
    needs: tuple[str, ...] = ()
    requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keyword: str | None = None

    @property
    def kind(self) -> type:
        """Type of the value, or of each of several."""
        annotation = self.annotation
        for outer in (Union, UnionType, tuple):
            annotation = get_args(annotation)[0] if get_origin(annotation) is outer else annotation
        return kinds(annotation)[0]

    @property
    def flags(self) -> str:
        """Name on the command line, with its negative where there is one."""
        name = self.flag or option_name(self.name)
        return f"{name}/--no-{name[2:]}" if self.negatable else name

    @property
    def placeholder(self) -> str:
        """Placeholder of the value in ``--help``; empty for a switch."""
        if self.metavar is not None or self.kind is bool:
            return self.metavar or ""
        return "|".join(self.choices) or {int: "INTEGER", float: "NUMBER"}.get(self.kind, "NAME")

    @property
    def words(self) -> str:
        """Default in words; empty where there is none."""
        if self.shown is not None or self.default in (MISSING, None, ()):
            return self.shown or ""
        if isinstance(self.default, bool):
            name = self.name.replace("_", "-")
            return (name if self.default else f"no-{name}") if self.negatable else ""
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def fault(self, name: str, value: Any) -> str | None:
        """Return why a value, or a part of a tuple, is not allowed, with the allowed ones; None where it is."""
        for part in value if isinstance(value, tuple) else (value,):
            if self.choices and part not in self.choices:
                return f"{name} {part!r} is unknown: choose one of {', '.join(self.choices)}"
            allowed = self._allowed(part) if self.kind in (int, float) else None
            if allowed is not None:
                return f"{name} is {part}: give a {allowed}"
        return None

    def _allowed(self, value: Any) -> str | None:
        """Return which numbers are allowed where this is none of them."""
        least = -inf if self.minimum is None else self.minimum
        if self.kind is int:
            most = LARGEST_INTEGER if self.maximum is None else self.maximum
            whole = isinstance(value, int) and not isinstance(value, bool)
            if least == -inf or (whole and least <= value <= most):
                return None
            limit = f" and at most {most}" if self.maximum is not None or (whole and value > most) else ""
            return f"whole number of at least {least}{limit}"
        above = -inf if self.above is None else self.above
        if least == above:
            return None
        if not isfinite(value) or value < least or value <= above:
            return f"number of {least} or more" if self.above is None else f"number above {above:g}"
        if self.maximum is not None and value > self.maximum:
            return f"number of at most {self.maximum:g}"
        return None

    def read(self, value: Any) -> Any:
        """Convert the value that typer has read to the field's type."""
        if self.example is None:
            return tuple(value) if isinstance(value, list) else value
        wrong = UserError(f"{self.flags} {value!r} cannot be read: give a list with commas, like {self.example}")
        try:
            values = tuple(self.kind(part.strip()) for part in value.split(",") if part.strip())
        except ValueError as error:
            raise wrong from error
        if not values:
            raise wrong
        return values


def option(help: str, panel: str, *, default: Any = MISSING, **more: Any) -> Any:
    """Declare a field of a dataclass as an option. See the attributes of :class:`Option` for the arguments."""
    return field(default=default, metadata={"option": {"help": help, "panel": panel, **more}})


def options_of(*sources: Any) -> dict[str, Option]:
    """Return the options that dataclasses declare, by name."""
    return {
        each.name: Option(name=each.name, annotation=types[each.name], default=each.default, **each.metadata["option"])
        for source, types in ((source, get_type_hints(source)) for source in sources)
        for each in dataclasses.fields(source)
        if "option" in each.metadata
    }


def option_name(name: str) -> str:
    """Return the command-line option that sets a field."""
    return "--" + name.replace("_", "-")


def kinds(annotation: Any) -> tuple[type, ...]:
    """Return the types of the values that an annotation allows."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return tuple(kind for part in get_args(annotation) for kind in kinds(part))
    if origin is Literal:
        return (str,)
    return (float, int) if annotation is float else (origin or annotation,)


def needing(options: Mapping[str, Option], needed: str) -> list[Option]:
    """Return the options that have no effect without another one."""
    return [each for each in options.values() if needed in each.needs]


def check_values(options: Mapping[str, Option], values: Mapping[str, Any]) -> None:
    """Refuse values that are not allowed; None is."""
    for name, each in options.items():
        fault = each.fault(each.flags.partition("/")[0], values[name]) if values.get(name) is not None else None
        if fault is not None:
            raise UserError(fault)


def check_requirements(options: Mapping[str, Option], given: Mapping[str, Any]) -> None:
    """Refuse options beside values of others with which they have no effect."""
    for each in options.values():
        for other, values in each.requires.items():
            chosen = given.get(other, options[other].default)
            if each.name in given and chosen not in values:
                raise UserError(
                    f"{option_name(each.name)} belongs to {option_name(other)} {_listed(values)}, and this is "
                    f"{chosen}: leave it out"
                )


def _listed(values: tuple[str, ...]) -> str:
    """Return values in words: ``"lm"``, ``"lm and vision"``, ``"lm, seq2seq and vision"``."""
    return " and ".join(filter(None, (", ".join(values[:-1]), values[-1])))


def take(source: Callable[..., T], given: Mapping[str, Any]) -> T:
    """Construct a dataclass from those of the given values that are fields of it."""
    return source(**{name: given[name] for name in options_of(source) if name in given})


def command(
    app: "typer.Typer", options: Mapping[str, Option], *, help: str, epilog: str
) -> Callable[[Callable[[dict[str, Any]], None]], Callable[[dict[str, Any]], None]]:
    """Register a function as a command of typer's. It gets the values of the options that were given, by name.

    Args:
        app: Where to.
        options: The command's options.
        help: Description of the command.
        epilog: Examples.
    """

    def register(run: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
        def call(**values: Any) -> None:
            run({name: options[name].read(value) for name, value in values.items() if value not in (None, [])})

        parameters = [_parameter(each) for each in options.values()]
        call.__annotations__ = {each.name: each.annotation for each in parameters}
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        app.command(run.__name__, help=help, epilog=epilog)(call)
        return run

    return register


def _parameter(option: Option) -> inspect.Parameter:
    """Return the parameter from which typer makes the option: None by default."""
    import typer

    parse = {int: _reader(int, "a whole number"), float: _reader(float, "a number")}.get(option.kind, option.parse)

    def parser(value: str) -> Any:
        try:
            return parse(value)  # type: ignore[misc]
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    several = kinds(option.annotation)[0] is tuple
    kind: Any = option.kind
    if several:
        kind = str if option.example is not None else list[str]
    settings: dict[str, Any] = {
        "help": option.help,
        "show_default": option.words or False,
        "metavar": option.placeholder or None,
        "parser": parser if parse is not None and not several else None,
    }
    made: Any
    if option.argument:
        made = typer.Argument(**settings)
    else:
        made = typer.Option(option.flags, rich_help_panel=option.panel, **settings)
        kind = kind | None
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if option.argument else None,
        annotation=Annotated[kind, made],
    )


def _reader(kind: type, words: str) -> Callable[[str], Any]:
    def read(value: str) -> Any:
        try:
            return kind(value)
        except ValueError as error:
            raise ValueError(f"{value!r} is not {words}") from error

    return read
