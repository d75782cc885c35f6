"""Which of a model's engines answers a request, and what happens when one fails."""
