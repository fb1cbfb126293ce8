"""A model on disk. Read `checkpoint` first: the folder, and the three layouts that it may have.

`safetensors` holds the weights of ours and of `gpt2`, Hugging Face's; `gpt_burn` has its own file.
`folders` writes them whole or not at all, `hub` fetches them by name. Nothing here knows of
training.
"""

from models.checkpoint import find_tokenizer, load

__all__ = ["find_tokenizer", "load"]
