"""What we know of the target model: its shape, its tokenizer, three of its tensors."""
