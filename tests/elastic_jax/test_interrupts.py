import os
import signal

from elastic_jax.interrupts import interruptible


def test_control_c_is_noted_and_ends_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
    assert signal.getsignal(signal.SIGINT) is before
