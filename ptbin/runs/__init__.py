"""A run over a whole store: what becomes of each checkpoint, and what the run leaves in DEST.

`outcomes` are what a step says of one thing, `tally` counts them, `remembering` knows earlier runs' failures,
`record` makes run.json, SHA256SUMS and the report, `result` is what the caller gets. `directories` carries a
plan out in threads of this process; the flows do the same on Prefect.
"""
