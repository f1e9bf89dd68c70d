"""Files of strangers, mutated at random: a clear error or a whole model, never a crash and never half a model."""

import copy
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_trainer, pattern_dataset, vouch
from hypothesis import HealthCheck, given, settings, strategies as st

from hf_clpeft import BackboneError, ConfigError, ContinualModel, ExpertError, TaskStream, l2p, s_lora, s_lora_mix
from hf_clpeft.streams import StreamError, cache_images
from hf_clpeft.streams.locate import load_source
from hf_clpeft.streams.task import split_of


pytestmark = pytest.mark.usefixtures("shallow")
EXAMPLES = int(os.environ.get("HF_CLPEFT_FUZZ", 60))  # for each method
DOCUMENTED = (BackboneError, ConfigError, ExpertError, OSError)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@pytest.fixture(
    scope="module", params=[s_lora(k=2), s_lora_mix(mix=2), l2p(pool_size=2, top_n=1)], ids=lambda m: m.name
)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.name)
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    make_trainer(request.param, folder, num_train_epochs=1).learn_stream(stream)
    return folder


def mutate_json(path: Path, data) -> None:
    """Changes, adds or takes away one value somewhere inside."""
    root = json.loads(path.read_text())
    place, steps = root, data.draw(st.integers(0, 4))
    for _ in range(steps):
        inside = [
            value for value in (place.values() if isinstance(place, dict) else place) if isinstance(value, dict | list)
        ]
        inside = [value for value in inside if value]
        if not inside:
            break
        place = data.draw(st.sampled_from(inside))
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    key = data.draw(st.sampled_from(keys))
    action = data.draw(st.sampled_from(["set", "set", "set", "remove", "rename"]))
    if action == "set":
        place[key] = data.draw(JSON_VALUES)
    elif action == "remove" or isinstance(place, list):
        del place[key]
    else:
        place[data.draw(st.text(max_size=12))] = place.pop(key)
    path.write_text(json.dumps(root))


def mutate_bytes(path: Path, data) -> None:
    """Cuts, repeats or overwrites a stretch of bytes, mostly in the header, where the structure is."""
    content = bytearray(path.read_bytes())
    end = data.draw(st.sampled_from([min(400, len(content)), len(content)]))
    start = data.draw(st.integers(0, end - 1))
    length = data.draw(st.integers(1, 16))
    action = data.draw(st.sampled_from(["overwrite", "cut", "insert", "truncate"]))
    if action == "overwrite":
        content[start : start + length] = data.draw(st.binary(min_size=length, max_size=length))
    elif action == "cut":
        del content[start : start + length]
    elif action == "insert":
        content[start:start] = data.draw(st.binary(min_size=1, max_size=length))
    else:
        del content[start:]
    path.write_bytes(bytes(content))


fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="HF_CLPEFT_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@fuzzed
@given(data=st.data())
def test_a_mutated_model_is_refused_or_whole(folder, backbone, data):
    work = Path(shutil.copytree(folder, "mutated", dirs_exist_ok=True))
    files = sorted(path for path in work.rglob("*") if path.suffix in (".json", ".safetensors"))
    path = data.draw(st.sampled_from(files))
    if path.suffix == ".json" and data.draw(st.booleans()):
        mutate_json(path, data)
    else:
        mutate_bytes(path, data)
    if path.name != "config.json" and data.draw(st.booleans()):
        vouch(work)  # as whoever forges a model would
    try:
        model = ContinualModel.from_pretrained(work, backbone=copy.deepcopy(backbone))
    except DOCUMENTED:
        return
    with torch.no_grad():
        output = model(torch.zeros(2, 3, 32, 32))
    assert output.logits.shape == (2, len(model.config.classes))
    assert model.config.expert_names == model.bank.names
    model.save_pretrained("again", overwrite=True)  # what the example before was


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "train.parquet"
    pattern_dataset()["train"].to_parquet(path)
    return path


PICTURES = st.none() | st.binary(max_size=64)
LABELS = st.none() | st.integers(-3, 7) | st.integers(-(2**63), 2**63 - 1)


@fuzzed
@given(data=st.data())
def test_mutated_rows_are_refused_or_left_out(parquet, backbone, data):
    table = pq.read_table(parquet)
    rows = table.to_pylist()
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.sampled_from(rows))
        if data.draw(st.booleans()):
            row["label"] = data.draw(LABELS)
        elif not (row["image"] and row["image"]["bytes"]) or data.draw(st.booleans()):
            row["image"] = data.draw(
                st.none() | st.fixed_dictionaries({"bytes": PICTURES, "path": st.none() | st.text(max_size=8)})
            )
        else:
            picture = bytearray(row["image"]["bytes"])
            picture[data.draw(st.integers(0, len(picture) - 1))] ^= data.draw(st.integers(1, 255))
            row["image"]["bytes"] = bytes(picture)
    path = Path("rows", "train.parquet")
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    streaming = data.draw(st.booleans())
    try:
        source = load_source("rows", "train", streaming=streaming)
        for classes in (source.class_names[:2], source.class_names[2:]):
            images = cache_images(split_of(source, classes), backbone.transform, max_bad_images=3)
            assert set(images.labels.tolist()) <= {0, 1} and len(images.__getitems__([0])["pixels"])
    except StreamError:
        return
