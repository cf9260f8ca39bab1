"""Base models: finding, loading, dtype, memory, attention over packed sequences."""
