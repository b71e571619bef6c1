"""The way back: weights into a `.pt`, as a state dict or in a module that the caller's code builds.

This package's `build` and `check` are run as processes of their own and import torch and, named by the
caller, foreign code; `restore` imports neither. Nothing of a checkpoint's own code runs here either.
"""

from ptbin.restoring.restore import RestoreOptions, restore

__all__ = ["RestoreOptions", "restore"]
