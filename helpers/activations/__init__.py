"""A residual stream harvested into shuffled batches: of one model, of a pair, or with planted directions.

What is learnt from them lives in `dictionaries`.
It may import base, text, subjects.
"""
