"""What is made once for all tests, as it takes long and nobody changes it."""

from copy import deepcopy

from datasets import Dataset

from hf_clpeft.backbones import backbone, loading
from hf_clpeft.streams.images import to_pixels


def keep_backbone(patch, folder):
    """The backbone of a folder is read and tried out once, and copied a thousand times."""
    build, load, kept = loading._build_on_meta, loading._load_weights, {}

    def build_once(config, source, shape, name):
        if source != folder:
            return build(config, source, shape, name)
        key = shape, config.to_json_string()
        if key not in kept:
            kept[key] = build(config, source, shape, name)
        return kept[key]

    def load_once(source, config, attention, name, **quantized):
        if source != folder or quantized:
            return load(source, config, attention, name, **quantized)
        key = attention, config.to_json_string()
        if key not in kept:
            kept[key] = load(source, config, attention, name)
        return deepcopy(kept[key])

    patch.setattr(loading, "_build_on_meta", build_once)
    patch.setattr(loading, "_load_weights", load_once)


def keep_findings(patch):
    """What was found out about a backbone holds for all of the same modules."""

    def keep(owner, name, shape_of):
        look, kept = getattr(owner, name), {}

        def look_once(model, *shape):
            of = getattr(model, "model", model)
            if not hasattr(of, "config"):  # a test's own module
                return look(model, *shape)
            key = (
                str(of),
                of.config.to_json_string(),
                of.config._attn_implementation,
                of.dtype,
                shape_of(model, *shape),
            )
            if key not in kept:
                kept[key] = look(model, *shape)
            return kept[key]

        patch.setattr(owner, name, look_once)

    keep(backbone, "prompt_obstacle", lambda model, shape: shape)
    keep(backbone, "prefix_obstacle", lambda model, shape: shape)
    keep(backbone.Backbone, "_find_parts", lambda model: model.input_shape)


def keep_images(patch):
    """Images are resized once for the same rows and the same backbone."""
    map_all, kept = Dataset.map, {}

    def map_once(self, function=None, *args, **options):
        if function is not to_pixels:
            return map_all(self, function, *args, **options)
        given = options["fn_kwargs"]
        transform = given["transform"]
        look = type(transform), transform.channels, type(transform.processor), transform.processor.to_json_string()
        key = repr((self._fingerprint, look, {**given, "transform": None}))
        if key not in kept:
            kept[key] = map_all(self, function, *args, **options)
        return kept[key]

    patch.setattr(Dataset, "map", map_once)
