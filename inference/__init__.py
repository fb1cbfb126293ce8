"""A model at work on texts: it continues them, and says how well it predicts them.

Read `generator` first, then `scoring`. Nothing here knows of files or of a command line.
"""
