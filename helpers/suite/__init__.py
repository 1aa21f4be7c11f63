"""The machinery around the notebooks: run them, store them, and write the pages made of them.

No science: nothing here is imported by another room or by a notebook.
It may import all other rooms.
"""
