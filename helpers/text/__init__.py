"""What language models read: documents and their tokens, labels of tokens, dialogues with planted behaviours.

No model runs here.
It may import base.
"""
