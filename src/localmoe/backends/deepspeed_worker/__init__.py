"""A worker that drives DeepSpeed, in DeepSpeed's own environment.

Of ours it imports `core` and its own settings only: what the rest needs is not there.
`python -m localmoe.backends.deepspeed_worker` is rank 0, which talks with the client (`core/messages.py`), decides
each step, and starts the other ranks (`follow.py`).
"""
