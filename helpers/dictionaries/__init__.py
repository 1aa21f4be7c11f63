"""Autoencoders and crosscoders: their parts, their fast training, their quality, and many of them kept on disk.

What a latent means or does to the language model is asked in `evaluation` and `diffing`.
It may import base, text, subjects, activations.
"""
