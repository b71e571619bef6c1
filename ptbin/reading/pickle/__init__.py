"""Pickles, run symbolically: nothing is imported, nothing is called; and the verdict on what they name."""
