"""Base vs. tuned: loss, label scores, generation, overlap scores, the report."""
