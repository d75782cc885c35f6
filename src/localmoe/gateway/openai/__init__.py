"""OpenAI's chat and text completions, and its list of models."""
