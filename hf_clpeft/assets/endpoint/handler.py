"""Serves the model of this repo on Hugging Face Inference Endpoints.

A request is an image, or JSON: `{"inputs": image, "parameters": {"top_k": 3, "reject_rate": 0.05}}`, in which an image
is a base64 string, and `inputs` may be a list of them. Paths and addresses are not opened.
"""

import base64
import binascii
from typing import Any

import PIL.Image

from hf_clpeft import ConfigError, ContinualModel, Prediction
from hf_clpeft.backbones.pictures import PictureError, open_image
from hf_clpeft.prediction import best_device


PARAMETERS = {"top_k", "reject_rate"}
MOST_PICTURES = 64  # of a request


class EndpointHandler:
    """Called by the toolkit of Inference Endpoints.

    Args:
        path (`str`): Folder of the model.
    """

    def __init__(self, path: str = "") -> None:
        self.model = ContinualModel.from_pretrained(path or ".").to(best_device())

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Answers a request.

        Returns:
            `list[dict]`: For one image, its likeliest classes: `label`, `score`, and the `expert` and `typicality`
            of the image; `label` is `None` if it looks like nothing that was learnt. For a list, one such list each.

        Raises:
            `ValueError`: The request is not as above, or an image cannot be read; the message says why.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ConfigError("A request has 'inputs', an image or a list of images, and may have 'parameters'.")
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict) or not PARAMETERS.issuperset(parameters):
            raise ConfigError(f"'parameters' is a dictionary that may have {' and '.join(sorted(PARAMETERS))}.")
        inputs = data["inputs"]
        several = inputs if isinstance(inputs, list) else [inputs]
        if not 1 <= len(several) <= MOST_PICTURES:
            raise ConfigError(f"A request has from 1 to {MOST_PICTURES} images, and not {len(several)}.")
        try:
            images = [_decode(image, f"inputs[{number}]") for number, image in enumerate(several)]
        except PictureError as error:
            raise ConfigError(str(error)) from error
        answers = [_rows(found) for found in self.model.predict(images, **{"top_k": 5, **parameters})]
        return answers if isinstance(inputs, list) else answers[0]


def _decode(image: Any, name: str) -> PIL.Image.Image:
    if isinstance(image, str):
        _, _, content = image.rpartition("base64,")  # of a data URL
        try:
            image = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError):
            raise PictureError(f"{name} is a text, and not an image in base64.") from None
    if not isinstance(image, bytes | PIL.Image.Image):
        raise PictureError(f"{name} is of type {type(image).__name__}; send an image, or one in base64.")
    return open_image(image, name)


def _rows(found: Prediction) -> list[dict[str, Any]]:
    more = {"expert": found.expert, "typicality": found.typicality}
    if found.label is None:
        return [{"label": None, "score": found.score, **more}]
    return [{"label": label, "score": score, **more} for label, score in found.classes.items()]
