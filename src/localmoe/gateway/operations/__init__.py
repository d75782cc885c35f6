"""What operators ask and change: models, settings, health, where experts are."""
