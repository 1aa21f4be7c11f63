"""The language models under study: load them, read or replace their residual stream, pair them, train them.

No autoencoder is known here.
It may import base, text.
"""
