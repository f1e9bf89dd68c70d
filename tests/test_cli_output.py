"""What commands print and write: names come from strangers."""

from pathlib import Path

from hf_clpeft.cli.rows import Format, write_rows
from hf_clpeft.cli.sorting import Sorter


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
