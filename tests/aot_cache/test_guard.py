"""Compilations are counted, and forbidden for every thread of a process."""

import subprocess
import sys
import textwrap

import jax
import numpy as np

from aot_cache.guard import CompileCounter


def test_counts_a_compilation_and_no_cached_call():
    function = jax.jit(lambda x: x * np.float32(3))
    argument = np.ones(3, np.float32)
    with CompileCounter() as counter:
        function(argument)
        assert counter.events()["backend_compile_duration"] == 1
        first = counter.count()
        assert first >= 3
        function(argument)
        assert counter.count() == first
    function(np.ones(4, np.float32))
    assert counter.count() == first


def test_forbidden_in_other_threads_too():
    program = """
        import threading, jax, numpy as np
        from aot_cache.guard import CompileCounter, forbid_compilation
        counter = CompileCounter()
        forbid_compilation()
        caught = []
        def work():
            try:
                jax.jit(lambda x: x + 1)(np.ones(2))
            except RuntimeError as error:
                caught.append(str(error))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert "no_tracing" in caught[0], caught
        assert counter.count() == 0
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
