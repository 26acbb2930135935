import json
import threading
import time

import pytest

from elastic_jax.phases import Phase, Phases


def test_phases_overlap_and_are_told_in_the_order_they_began():
    phases = Phases()
    second_began = threading.Event()

    def second() -> None:
        with phases.measure("second", nbytes=3_000_000):
            second_began.set()
            time.sleep(0.02)

    with phases.measure("first"):
        thread = threading.Thread(target=second)
        thread.start()
        second_began.wait()
    thread.join()
    with phases.measure("third"):
        pass
    phases.finish()
    told = json.loads(json.dumps(phases.to_json()))
    assert list(told) == ["first", "second", "third", "total"]
    assert told["second"]["start"] <= told["first"]["end"] + 0.001
    assert phases["second"].end - phases["second"].start >= 0.02
    assert phases["total"].start == 0
    assert phases["total"].end >= phases["third"].end >= phases["third"].start >= phases["second"].end


def test_a_rate_is_of_bytes_in_a_phase_s_own_time():
    assert Phase(1.0, 3.0, 5_000_000_000).to_json() == {
        "start": 1.0,
        "end": 3.0,
        "seconds": 2.0,
        "bytes": 5_000_000_000,
        "gb_per_second": 2.5,
    }
    assert Phase(1.0, 3.0, None).to_json() == {"start": 1.0, "end": 3.0, "seconds": 2.0}


def test_what_failed_is_not_told():
    phases = Phases()
    with pytest.raises(ValueError, match="no"), phases.measure("first"):
        raise ValueError("no")
    assert phases.to_json() == {}
