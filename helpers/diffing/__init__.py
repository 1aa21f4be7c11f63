"""What differs between two models: norms, Latent Scaling, causal patching, reading, steering, and who finds it.

Training a crosscoder lives in `dictionaries`.
It may import base, text, subjects, activations, dictionaries, evaluation.
"""
