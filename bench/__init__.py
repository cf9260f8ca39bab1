"""Benchmarks: tunery against its peers, its scaling, and a GPU. `make bench` runs them."""
