"""What a model samples of itself, as it trains or into a store, and what its reference says of such rows."""
