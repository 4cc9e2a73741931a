"""From text to batches: sources, tokenizer, the Arrow token store, the mixture, and the rows of batch k."""
