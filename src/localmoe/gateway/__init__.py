"""The HTTP service: OpenAI-compatible APIs over any `core.protocols.Generator`. No torch."""
