"""The whole graph of computation of a transformer.

The public names are listed in `__init__.pyi`. Each is imported when it is first used, so that
`import circuitgraph` takes no time. Its docstring then gets a section on its parameters.
"""

from typing import Any

import lazy_loader

from .helptext import add_parameters

__version__ = "0.1.0"
_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    value = _load(name)
    add_parameters(value)
    return value
