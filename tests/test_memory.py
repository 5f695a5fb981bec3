"""`keep_memory`: whether the pages of freed memory stay with the process."""

import platform
import subprocess
import sys

import pytest

import braidax as bx

# Page faults of a call that makes 48 MB, after the calls in which the heap grows.
FAULTS = """
import resource, jax, jax.numpy as jnp, braidax as bx
assert not {keep} or bx.keep_memory()
add, numbers = jax.jit(lambda x: x + 1), jnp.ones(12_000_000)
for call in range(50):
    if call == 40:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    add(numbers).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_a_call_takes_no_fresh_pages():
    def faults(keep):
        command = [sys.executable, "-c", FAULTS.format(keep=keep)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults(False) > 5_000  # 11,719 pages of 4 KB hold the result
    assert faults(True) < 100


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert bx.keep_memory() is False
