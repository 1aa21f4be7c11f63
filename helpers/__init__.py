"""From TopK to Crosscoders: what the notebooks share."""
