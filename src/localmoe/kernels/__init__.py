"""A decoder's operations, each prepared with its weights and then called; see `base`."""
