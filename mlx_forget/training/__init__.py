"""One run: from a configuration to all that it is, through the only training loop, to its record."""
