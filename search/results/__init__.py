"""From a finished search to networks that can be used: refined, as an ensemble, as a recipe."""
