"""Which files are one checkpoint, and which files go along with it."""
