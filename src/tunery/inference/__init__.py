"""Generation, alone and for many requests and adapters at once."""
