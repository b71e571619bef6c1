"""The Prefect flows (`convert`, `verify`, `restore`, `sync`, `migrate`) and, in `flows.cli`, the command line.

Importing this package imports nothing: the single-file commands must start without Prefect.
"""
