"""How much everybody may ask for."""
