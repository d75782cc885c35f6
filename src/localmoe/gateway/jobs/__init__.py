"""Requests that are answered later: asynchronous ones, and batches."""
