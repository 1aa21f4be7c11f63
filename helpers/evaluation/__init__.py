"""What an autoencoder of one model is worth: downstream loss, probes, explanations, ablations, scaling laws.

Two models side by side are the matter of `diffing`.
It may import base, text, subjects, activations, dictionaries.
"""
