"""What commands print and write: names come from strangers."""

import io
import os
import sys
import warnings
from pathlib import Path

import pytest

from hf_clpeft.cli.rows import Format, write_rows
from hf_clpeft.cli.sorting import Sorter, check_folder
from hf_clpeft.config.errors import OptionError, errors_in_one_line
from hf_clpeft.reports.plots import plot_report


def test_names_of_strangers_stay_in_their_place(tmp_path, capsys):
    Path("a.png").write_bytes(b"x")
    labels = ["../../up", "/etc", "a/b", "a_b", "A_b", "", "..", "con", "C:\\x", "not recognised", "=1+1", "x" * 300]
    sorter = Sorter(tmp_path / "sorted", labels)
    placed = [sorter.copy(Path("a.png"), label) for label in [*labels, None]]
    assert {path.parent.parent for path in placed} == {tmp_path / "sorted"}
    assert len({path.parent.name.casefold() for path in placed}) == len(labels) + 1
    row = {"image": "-a.png", "label": "=HYPERLINK(1)", "score": -1.0, "classes": {"@x": 0.5}}
    write_rows([row], Format.csv, {})
    assert capsys.readouterr().out.splitlines()[1] == "'-a.png,'=HYPERLINK(1),-1.0,'@x,0.5"


def test_a_picture_that_is_there_is_not_copied_again(tmp_path):
    for place, content in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        Path(place).mkdir()
        Path(place, "0.png").write_bytes(content)
    for _ in range(2):  # two runs
        sorter = Sorter(tmp_path / "sorted", ["cat"])
        placed = [sorter.copy(Path(place, "0.png"), "cat") for place in "abc"]
        assert [path.name for path in placed] == ["0.png", "0 2.png", "0.png"]
    assert [path.read_bytes() for path in placed] == [b"x", b"y", b"x"]
    assert len(list((tmp_path / "sorted" / "cat").iterdir())) == 2
    for place in ("a/0.png", "a/0.png/deeper"):
        with pytest.raises(OptionError, match="a/0.png is a file, not a folder"):
            check_folder(Path(place))
    check_folder(Path("a/new/deeper"))


@pytest.mark.parametrize("rows, lines", [([], 1), ([{"image": "a.png", "classes": {"cat": 0.5}}], 2)])
def test_a_table_of_no_rows_has_its_columns(rows, lines, capsys):
    write_rows(rows, Format.csv, {}, {"image": None, "classes": {"cat": None}})
    written = capsys.readouterr().out.splitlines()
    assert written[0] == "image,classes 1,classes 1 value" and len(written) == lines


@pytest.mark.parametrize("flush, by_click", [(True, False), (False, False), (True, True)])
def test_a_reader_that_has_seen_enough_is_no_error(flush, by_click, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as ended, errors_in_one_line():
            try:
                print("a line", flush=flush)
            except BrokenPipeError:
                if by_click:
                    sys.exit(1)
                raise
    assert ended.value.code == 141 and not capsys.readouterr().err


@pytest.mark.parametrize("title", ["gelb 黄", "🐦"])
def test_signs_that_no_font_has_are_drawn_without_a_warning(title):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_report([[0.9]], [], [title], [], io.BytesIO(), title)
