"""Base models: finding, loading, number format, memory, attention over flattened rows."""
