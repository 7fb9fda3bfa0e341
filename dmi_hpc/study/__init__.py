"""Many trainings of one recipe: seeds, folds, learning curves, and what they say together."""
