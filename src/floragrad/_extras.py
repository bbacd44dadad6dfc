"""Import of optional dependencies."""

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or raise an error that names the extra of floragrad that installs it.

    Args:
        module: The module to import, for example ``"torch"``.
        extra: The extra of this distribution that names it, for example ``"torch"``.

    Raises:
        ImportError: ``module`` itself is not installed. Any other error inside it is raised unchanged.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f"{module} is not installed, and this part of floragrad needs it: pip install 'floragrad[{extra}]'",
            name=error.name,
        ) from error
