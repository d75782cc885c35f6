"""Answers and embeddings that were computed before: in memory, in Redis, on disk."""
