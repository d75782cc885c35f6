"""LocalMoE serves Mixture-of-Experts language models on hardware they do not fit in."""

__version__ = "0.1.0"
