"""The decode loop and all it needs. Knows token ids and logits, never text."""
