"""Proving outputs: what is stored, against what the source or the manifest says.

Shares the reading room and the values with the rest of ptbin, and nothing with the writing room: a
verifier that trusts the writer's own arithmetic proves nothing.
"""
