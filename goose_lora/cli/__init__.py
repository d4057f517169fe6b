"""Words to runs: parser, process, stages and the commands of ``goose-lora``."""

import logging

import lazy_loader

# When bitsandbytes is imported it says that a kernel could be faster. Recipes import this room
# before it.
for _name in ("bitsandbytes", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)

# The names are in __init__.pyi, and each is loaded when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
