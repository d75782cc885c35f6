"""Products, attention and norms: one typed function each."""
