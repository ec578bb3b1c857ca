"""A forest of scikit-learn that tells irises apart, trained when it is loaded; a real one would load a file.

cobatch serve examples/python_models/scikit_learn.py:Irises --instances 2
"""

import numpy as np
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier


class Irises:
    """The probability of each kind, and the name of the likeliest, for four lengths in centimetres."""

    def load(self) -> None:
        """Train, and declare inputs and outputs."""
        irises = load_iris()
        self.forest = RandomForestClassifier(random_state=0).fit(irises.data, irises.target)
        self.names = irises.target_names
        self.inputs = {"lengths": ("FP32", [-1, irises.data.shape[1]])}
        self.outputs = {"probabilities": ("FP64", [-1, len(self.names)]), "name": ("BYTES", [-1])}

    def predict(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs of a batch."""
        probabilities = self.forest.predict_proba(batch["lengths"])
        return {"probabilities": probabilities, "name": self.names[probabilities.argmax(1)]}
