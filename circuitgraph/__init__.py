"""The whole graph of computation of a transformer.

The public names are listed in `__init__.pyi`. Each is imported when it is first used, so that
`import circuitgraph` takes no time.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
