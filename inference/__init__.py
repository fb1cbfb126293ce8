"""Inference: a model continues texts, and is scored on them.

Read `generator` (KV caches, window, sampling), `stream` (tokens to text) and `scoring` (bits per
byte). Nothing here knows of files or of a command line.
"""
