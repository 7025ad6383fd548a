"""Text environments over small vocabularies, one file each: the game, an imperfect expert, and its demonstrations."""
