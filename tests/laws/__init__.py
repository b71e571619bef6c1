"""The law of accounting, held over whatever can be saved.

    law     what must hold of one file: everything written is taken, or named as left out, or refused
    trees   Hypothesis: random checkpoints of modules, mappings, tensors of all kinds, and what lies beside

PTBIN_LAW_EXAMPLES sets how many examples each property draws; the suite's own number keeps it below half a
minute.
"""
