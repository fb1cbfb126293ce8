"""A model at work on texts: it continues them, and says how well it predicts them.

Read `decoder` (the caches, and one step), then `generator` (the window), `sampling` (the next
token), `stream` (its text) and `scoring`. Nothing here knows of files or of a command line.
"""
