"""What every other room stands on: files written in one step, intervals over seeds, products in 16 bits.

No model, no text and no notebook is known here.
It imports no other room.
"""
