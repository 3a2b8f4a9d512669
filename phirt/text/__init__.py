"""Between token ids and text: tokenizer, chat template, detokenizer, stop strings."""
