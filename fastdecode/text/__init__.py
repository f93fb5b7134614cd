"""Between text and tokens: the tokenizer and its chat template, prompts that come in, and text that goes out."""
