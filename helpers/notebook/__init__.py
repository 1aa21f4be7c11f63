"""What every notebook calls: its run and its records, the claims and their verdicts, exercises that check themselves.

How notebooks are run and stored is the matter of `suite`.
It may import base, text, subjects, activations, dictionaries, evaluation, diffing, figures.
"""
