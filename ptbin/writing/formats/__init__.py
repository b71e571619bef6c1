"""The output formats, each a plan: a list of segments."""
