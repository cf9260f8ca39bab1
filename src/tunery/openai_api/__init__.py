"""What OpenAI's API says, once: for `tunery serve`, which speaks it, and for hosted models, which are spoken to."""
