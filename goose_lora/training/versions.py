"""The versions of software that a run notes, in its lineage and in its checkpoints."""

import importlib.metadata
import platform

# Packages whose versions are noted.
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "goose-lora")


def versions() -> dict[str, str]:
    """Return the versions of Python and of those ``PACKAGES`` that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # such as this one, used from a folder
            continue
    return found
