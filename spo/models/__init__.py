"""What a checkpoint holds: the model, its head, its tokenizer."""
