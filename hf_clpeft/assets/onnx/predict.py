"""Classifies pictures with the model in this folder. It needs numpy, pillow and onnxruntime.

    python predict.py one.jpg two.png

or, in Python, `Classifier("folder")([image])`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Classifier:
    """The model in a folder."""

    def __init__(self, folder: str | Path = ".") -> None:
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.processing = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        self.labels = [config["id2label"][str(number)] for number in range(len(config["id2label"]))]
        self.experts = config["hf_clpeft"]["experts"]
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self.channels = self.session.get_inputs()[0].shape[1]

    def __call__(self, images: list[Image.Image], top_k: int = 1) -> list[dict[str, Any]]:
        """The likeliest classes of images with their scores, and the expert that judged each, if there are several."""
        pixels = np.stack([prepare(image, self.processing)[: self.channels] for image in images])
        logits, *expert = self.session.run(None, {"pixel_values": pixels})
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        found: list[dict[str, Any]] = []
        for row in scores:
            best = np.argsort(-row)[:top_k]
            found.append({"classes": {self.labels[number]: float(row[number]) for number in best}})
        for answer, number in zip(found, expert[0] if expert else [], strict=False):
            answer["expert"] = self.experts[number]
        return found


def prepare(image: Image.Image, processing: dict[str, Any]) -> np.ndarray:
    """The input of the model for one image, of shape `(3, height, width)`."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:  # clear places become white
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if processing.get("do_resize", True):
        image = image.resize(_size(image, processing["size"]), processing.get("resample", 2))
    if processing.get("do_center_crop"):
        height, width = processing["crop_size"]["height"], processing["crop_size"]["width"]
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    values = np.asarray(image, dtype=np.float32)
    if processing.get("do_rescale", True):
        values = values * np.float32(processing.get("rescale_factor", 1 / 255))
    if processing.get("do_normalize", True):
        values = (values - np.float32(processing["image_mean"])) / np.float32(processing["image_std"])
    return values.transpose(2, 0, 1)


def _size(image: Image.Image, size: dict[str, int]) -> tuple[int, int]:
    if "shortest_edge" not in size:
        return size["width"], size["height"]
    short = min(image.size)
    width, height = (int(size["shortest_edge"] * side / short) for side in image.size)
    return width, height


if __name__ == "__main__":
    classifier, bad = Classifier(Path(__file__).parent), 0
    for name in sys.argv[1:]:
        try:
            with Image.open(name) as picture:
                found = classifier([picture], top_k=3)[0]
        except Exception as error:  # of the many that damaged files cause
            print(f"error: {name} cannot be read: {' '.join(str(error).split())}", file=sys.stderr)
            bad += 1
        else:
            print(name, json.dumps(found, ensure_ascii=False))
    sys.exit(bool(bad))
