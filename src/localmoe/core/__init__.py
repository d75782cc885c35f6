"""What every other package speaks: requests, chunks, shapes, plans, events, errors. No torch, no I/O."""
