"""What earlier runs left in DEST and what it tells: run records, what failed and since when, status, metrics.

`records` reads run records, `failures` remembers what was not converted and what of it was acknowledged,
`status` compares SOURCE with DEST without a run, `metrics` writes OpenMetrics text. Nothing here converts.
"""
