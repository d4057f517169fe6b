"""One frozen base and its roles: load, adapt, run, merge, check."""

import lazy_loader

# The names are in __init__.pyi, and each is loaded when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
