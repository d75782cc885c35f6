"""The native engine: scheduler, paged cache, step loop, and the process it runs in."""
