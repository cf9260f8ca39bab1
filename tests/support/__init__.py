"""What several tests share: small models, numerics in float64, waits of a GPU, finished runs."""
