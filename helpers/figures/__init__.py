"""What a reader sees: one look for all figures, the plots, and the pages of latents.

Nothing is measured here, and no figure is written to disk.
It may import base, text, subjects, activations, dictionaries, evaluation, diffing.
"""
