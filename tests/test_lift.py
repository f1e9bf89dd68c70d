"""The measurement of random features: one look at the images for all routers, one file in and a table out."""

import csv
import sys

import lift
import pytest

from hf_clpeft import ConfigError


CONFIG = """
options: {views: 2, test_views: 2, view_kind: crop, query_layers: [-6, -5, -4, -3, -2, -1], num_train_epochs: 1}
benchmarks:
  digits: {num_tasks: 2, max_train_samples_per_task: 60, max_test_samples_per_task: 30}
methods:
  slda_pp: {}
"""


@pytest.mark.parametrize("old, new", [("[-6, -5, -4, -3, -2, -1]", "[-2, -1]"), ("slda_pp", "slda")])
def test_features_of_other_layers_or_methods_are_refused_before_any_is_computed(tmp_path, monkeypatch, old, new):
    config = tmp_path / "other.yaml"
    config.write_text(CONFIG.replace(old, new))
    monkeypatch.setattr(sys, "argv", ["lift.py", "--config", str(config), "--output_dir", str(tmp_path / "out")])
    monkeypatch.setattr(lift, "measure", None)
    with pytest.raises(ConfigError, match="must be slda_pp with 6 query_layers"):
        lift.main()


def test_every_router_learns_from_the_same_images_and_nothing_is_measured_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(lift, "LIFT", 200)
    config, results = tmp_path / "tiny.yaml", tmp_path / "lift.csv"
    config.write_text(CONFIG)
    words = ["--config", str(config), "--backbone", "hf-clpeft/vit-tiny-glyphs", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["lift.py", *words, "--output_dir", str(tmp_path / "out")])
    lift.main()
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["method"], int(row["training_images"])) for row in rows} == {
        (method, count) for method in ("slda_pp", "klda", "layup", "ranpac") for count in (30, 60, 120)
    }
    assert len(rows) == 12 and all(float(row["average_accuracy"]) > 0.6 for row in rows)
    written = results.read_text()
    monkeypatch.setattr(lift, "measure", None)
    lift.main()
    assert results.read_text() == written
