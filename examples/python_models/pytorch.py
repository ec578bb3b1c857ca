"""A network of PyTorch, on the GPU of its instance if there is one.

pip install torch, then: cobatch serve examples/python_models/pytorch.py:Network --max-batch-size 32
"""

import numpy as np
import torch


class Network:
    """Two layers with weights that are drawn; a real one would load them."""

    inputs = {"x": ("FP32", [-1, 16])}
    outputs = {"y": ("FP32", [-1, 4])}

    def load(self, device: int) -> None:
        """Make the network on this device."""
        torch.manual_seed(0)
        self.device = f"cuda:{device}" if torch.cuda.is_available() else "cpu"
        layers = [torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)]
        self.network = torch.nn.Sequential(*layers).to(self.device).eval()

    def predict(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs of a batch."""
        with torch.inference_mode():
            x = torch.from_numpy(batch["x"]).to(self.device)
            return {"y": self.network(x).cpu().numpy()}
