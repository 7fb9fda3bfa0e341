"""Random forests, the method to beat of most systems on compounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dmi_hpc.tasks.base import Array, Fields


class Forest:
    """A forest of regression on what `features` makes of n rows, (n, f); or, of a target that is 0 or
    1, of classification that gives the probability of 1."""

    def __init__(
        self,
        features: Callable[[Fields], Array],
        trees: int,
        *,
        classes: bool = False,
        share: float = 1.0,
    ) -> None:
        """share: of the features that a split of a regression looks at."""
        self.features, self.trees, self.classes, self.share = features, trees, classes, share

    def __call__(self, train: Fields, target: Array, test: Fields) -> Array:
        from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

        inputs, wanted = self.features(train), self.features(test)
        if self.classes:
            voters = RandomForestClassifier(self.trees, n_jobs=-1, random_state=0)
            return np.asarray(voters.fit(inputs, target > 0).predict_proba(wanted)[:, 1])
        forest = RandomForestRegressor(
            self.trees, max_features=self.share, n_jobs=-1, random_state=0
        )
        return np.asarray(forest.fit(inputs, target).predict(wanted))
