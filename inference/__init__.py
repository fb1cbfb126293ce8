"""A model at work on texts: it continues them, and says how well it predicts them.

Read `generator` (one step with its caches, and the window), then `sampling` (the next token),
`stream` (its text) and `scoring`. Nothing here knows of files or of a command line.
"""
