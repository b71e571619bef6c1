"""What a destination says of an output: its manifest, its provenance, what may be replaced there."""
