"""What this machine has. Measures, decides nothing."""
