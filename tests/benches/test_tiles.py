import json

from tiles import write_tiles


def entry(capability, rows, size):
    return {"capability": capability, "rows": rows, "tiles": {"out": size}}


def test_new_sizes_replace_those_of_the_same_device_and_work(tmp_path):
    path = tmp_path / "tiles.json"
    write_tiles(path, [entry(90, 16, 1), entry(90, 32, 2)])
    write_tiles(path, [entry(80, 16, 3), entry(90, 32, 4)])
    assert json.loads(path.read_text()) == [entry(90, 16, 1), entry(90, 32, 4), entry(80, 16, 3)]
