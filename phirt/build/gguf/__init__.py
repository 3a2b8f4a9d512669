"""GGUF files: a header walk that trusts nothing, and the checkpoint and tokenizer inside.

The third-party package that is also called ``gguf`` serves constants and dequantization. It
never opens the file: its reader allocates what the file claims.
"""
