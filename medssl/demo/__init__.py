"""A procedural patient archive and the whole path of medssl taken on it."""
