"""The cache: what it was made from, what it stores, its shards, and reading them."""
