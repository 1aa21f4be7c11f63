"""From TopK to Crosscoders: what the notebooks share, in rooms. A room imports only those above it.

base           files, intervals, products in 16 bits
text           documents, labels, dialogues
subjects       the language models under study
activations    residual streams, harvested into batches
dictionaries   autoencoders and crosscoders, and their training
published      dictionaries of others, read and written
evaluation     what an autoencoder of one model is worth
diffing        what differs between two models
figures        what a reader sees
notebook       what every notebook calls
suite          running, storing and listing the notebooks
"""
