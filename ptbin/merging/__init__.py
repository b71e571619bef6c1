"""Making one tensor of the pieces that several files hold: pure planning over values, nothing is opened.

`coverage` proves that boxes fill a shape, `tiles` turns boxes into places, `replicas` are pieces that must
be equal.
"""
