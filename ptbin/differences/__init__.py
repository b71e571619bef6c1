"""What differs between two sets of weights: `ptbin.diff` and the values it returns.

Knows how to read and never writes. Shares no code with the writing side.
"""
