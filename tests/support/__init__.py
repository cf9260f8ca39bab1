"""What several tests share beside tests.tiny: small models, numerics in float64, waits of a GPU, finished runs."""
