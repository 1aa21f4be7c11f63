"""Dictionaries that others have published, read as ours: their files, their conventions, and files that others read.

What a dictionary is lives in `dictionaries`; what it is worth is measured elsewhere, by the same code as for our own.
It may import base, text, subjects, activations, dictionaries.
"""
