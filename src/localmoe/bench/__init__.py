"""Measures this machine and its models: `localmoe bench`."""
