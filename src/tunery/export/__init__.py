"""What a run becomes elsewhere: the model card."""
