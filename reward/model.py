def vocabulary_of(tokenizer): return None
