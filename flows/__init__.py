"""The Prefect flows (`convert`, `verify`) and, in `flows.cli`, the command line over them.

Importing this package imports nothing: the single-file commands must start without Prefect.
"""
