"""What acts on the texts, vectors or scores of a frozen model; each folder below is one slot."""
