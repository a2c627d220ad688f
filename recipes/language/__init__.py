"""A language model: a GPT on text or on files of tokens."""
