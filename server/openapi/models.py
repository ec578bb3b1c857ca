"""The served models as the API's description needs them."""

from __future__ import annotations

from collections.abc import Mapping

from cobatch.engines.base import Signature
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Core
from cobatch.server.openapi import examples


class Described:
    """The served models as the description needs them: all their names, and those that are loaded."""

    def __init__(self, core: Core) -> None:
        self.names = list(core.models)
        self.all: list[Model] = list(core.models.values())
        self.loaded: list[Model] = [model for model in self.all if model.batcher is not None]
        self.signatures: Mapping[str, Signature] = {
            model.name: model.engine_worker.engine.signature for model in self.loaded
        }
        # By model the inputs that a request must have: the masks of what is padded are made where missing.
        self.required = {model.name: [spec.name for spec in model.decoder.required] for model in self.loaded}

    @property
    def shown(self) -> Model | None:
        """The model that examples of answers are of."""
        return next((one for one in self.loaded if examples.has_example(self.signatures[one.name])), None)
