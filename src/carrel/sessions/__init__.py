"""The heart: sessions and their turns, from a prompt to its end and through every accident between."""
