"""Task boundaries detected from the images themselves, by conformal change-point detection."""

from typing import NamedTuple

import numpy as np

from ..config.errors import ConfigError


BETS = np.linspace(0.05, 0.95, 19)  # exponents of the power bets
ONSET_BET = 2  # index of the bet that dates the onset of the drift; it gains on p-values below 0.15


class Drift(NamedTuple):
    """A detected task boundary.

    Args:
        after (`int`): Number of images of the last update consumed until detection.
        since (`int`): Estimated number of images in the new task so far, the `after`-th included.
    """

    after: int
    since: int


class DriftDetector:
    """Detects a change in the distribution of the images of a task, with a guaranteed rate of false alarms.

    The first images of a task are its reference set: k-means centres are fitted to one half, and the other half
    calibrates the distances to the nearest centre. Each further image gets a conformal p-value, the rank of its
    distance among all so far, and the Shiryaev-Roberts procedure bets against uniform p-values. While images are
    exchangeable, the mean number of images before a false alarm is at least `false_alarm_every`.

    Args:
        reference_size (`int`, *optional*, defaults to 100): Number of images in the reference set.
        false_alarm_every (`int`, *optional*, defaults to 10,000): See above. Larger values detect drift later.
        k (`int`, *optional*, defaults to 5): Number of k-means centres.
        seed (`int`, *optional*, defaults to 0): Seed of k-means and of the tie-breaking.

    Source: Vovk et al., "Retrain or not retrain: conformal test martingales for change-point detection", arXiv
    2102.10439; power bets: Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", section 8.2.

    Example:

    ```py
    >>> import numpy as np
    >>> from hf_clpeft.streams.drift import DriftDetector

    >>> rng = np.random.default_rng(0)
    >>> before, after = (rng.normal(0, 1, (300, 8)) + 5 * np.eye(8)[i] for i in (0, 1))
    >>> detector = DriftDetector()
    >>> detector.update(before) is None, detector.update(after).since < 10
    (True, True)

    ```
    """

    def __init__(self, reference_size: int = 100, false_alarm_every: int = 10_000, k: int = 5, seed: int = 0):
        if reference_size < 4 * k:
            raise ConfigError(f"reference_size={reference_size} must be at least four times k={k}.")
        if false_alarm_every < 2:
            raise ConfigError(f"false_alarm_every={false_alarm_every} must be 2 or more.")
        self.reference_size, self.false_alarm_every, self.k, self.seed = reference_size, false_alarm_every, k, seed
        self.reset()

    def reset(self) -> None:
        """Resets the state: the next image is the first of a new task."""
        self._rng = np.random.default_rng(self.seed)
        self._reference: list[np.ndarray] = []
        self._centres = None
        self._distances: list[float] = []  # sorted
        self._statistics = np.zeros(len(BETS))
        self._cusum, self._since = 1.0, 0

    def update(self, features: np.ndarray) -> Drift | None:
        """Processes further images.

        Args:
            features (array of shape `(images, hidden_size)`): Query features in order of arrival.

        Returns:
            [`Drift`] or `None`: The task boundary, if one is detected; call [`~DriftDetector.reset`] next.
        """
        features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        for number, row in enumerate(features, start=1):
            if self._centres is None:
                self._reference.append(row)
                if len(self._reference) == self.reference_size:
                    self._fit()
                continue
            distance = self._distance(row)
            smaller = np.searchsorted(self._distances, distance, side="left")
            not_larger = np.searchsorted(self._distances, distance, side="right")
            larger, same = len(self._distances) - not_larger, not_larger - smaller
            p = (larger + self._rng.uniform() * (same + 1)) / (len(self._distances) + 1)
            self._distances.insert(int(not_larger), distance)
            bets = BETS * max(p, 1e-12) ** (BETS - 1)
            self._statistics = (self._statistics + 1) * bets
            # The onset of the drift is estimated by CUSUM: where this bet last began to gain.
            self._cusum = max(self._cusum, 1) * bets[ONSET_BET]
            self._since = self._since + 1 if self._cusum > 1 else 0
            if self._statistics.mean() >= self.false_alarm_every:
                return Drift(number, self._since)
        return None

    def _fit(self) -> None:
        from sklearn.cluster import KMeans

        reference = self._rng.permutation(np.stack(self._reference))
        fitted, rest = np.split(reference, [len(reference) // 2])
        self._centres = KMeans(self.k, n_init=3, random_state=self.seed).fit(fitted).cluster_centers_
        self._distances = sorted(self._distance(row) for row in rest)
        self._reference = []

    def _distance(self, row: np.ndarray) -> float:
        return float(np.linalg.norm(self._centres - row, axis=1).min())
