"""Line reader: units of any size read each line of a file once, in order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data.preparation.documents import lines_before
from megatron_lite.data.preparation.lines import read_lines
from megatron_lite.data.preparation.sources import Source, Unit, plan_units


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"x")), max_size=20), st.integers(1, 40))
def test_units_read_each_line_once(tmp_path_factory, lines, unit_bytes):
    path = tmp_path_factory.mktemp("lines") / "file"
    path.write_bytes(b"\n".join(lines))
    source = Source(str(path), "text", path.stat().st_size, 0)
    read = []
    for unit in plan_units([source], unit_bytes):
        found = list(read_lines(unit, ["text"]))
        assert [line.number for line in found] == list(range(1, len(found) + 1))
        assert lines_before(unit) == len(read)
        read += [line.content.rstrip(b"\n") for line in found]
    assert read == (lines[:-1] if lines and not lines[-1] else lines)


def test_units_depend_on_file_sizes_only():
    text = [Source("a", "text", 10, 0), Source("b", "gzip", 25, 0), Source("c", "text", 4, 0)]
    units = plan_units(text, unit_bytes=4)
    assert [(unit.source.path, unit.start, unit.end) for unit in units] == [
        ("a", 0, 4),
        ("a", 4, 8),
        ("a", 8, 10),
        ("b", 0, 25),
        ("c", 0, 4),
    ]
    assert [unit.number for unit in units] == [0, 1, 2, 3, 4]
    assert plan_units(text, unit_bytes=4, limit=5) == units[:2]
    assert len(plan_units([Source("a", "text", 900 << 30, 0)])) == 3600
    assert plan_units([Source("a", "text", 0, 0)]) == []
    assert isinstance(units[0], Unit)
