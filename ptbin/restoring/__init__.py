"""The way back: weights into a `.pt`, as a state dict or in a module that the caller's code builds.

`build` and `check` are run as separate, isolated processes, and import torch and, named by the caller,
foreign code; `filling`, `saving`, `snapshot`, `fitting` and `user_code` are parts of these two. The other
modules run in the caller's process and import neither. Nothing of a checkpoint's own code runs anywhere. This
module imports nothing, so that the processes begin soon.
"""
