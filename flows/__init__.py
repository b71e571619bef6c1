"""The Prefect flows (`convert`, `verify`, `restore`, `sync`, `migrate`) and, in `flows.cli`, the commands.

Importing this package imports nothing: the single-file commands must start without Prefect.
"""
