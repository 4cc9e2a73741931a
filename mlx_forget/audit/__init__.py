"""What did a model forget? Two checkpoints and some text in; losses, places and weights before and after out."""
