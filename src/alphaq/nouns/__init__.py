"""The nouns: frozen records that the stages hand to one another."""
