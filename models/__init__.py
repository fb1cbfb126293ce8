"""Models on disk. Read `checkpoint` first: a folder in one of three formats.

Our format and Hugging Face's, `gpt2`, store weights in `safetensors`; `gpt_burn` has a file format
of its own. `folders` replaces folders atomically, `hub` downloads models by name. Nothing here
knows of training.
"""
