"""Texts, and the ids that tokenizers make of them.

Read `texts` (what a path holds), then `ids` (encoded once, kept on disk). Nothing here knows of
training or of a model.
"""
