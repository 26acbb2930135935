"""Whether the kernels' sizes were measured on a kind of device; on others they are estimates, and users are told."""

from aot_cache.target import Device, Target
from elastic_jax.step import StepConfig

_MEASURE = {
    "integer dot": "python benches/integer_dot.py --tiles elastic_jax/kernels/integer_dot_tiles.json",
    "decode": "python benches/decode_tiles.py",
}
"""What measures sizes and adds them to those of other devices; docs/targets.md explains it."""


def unmeasured(step: StepConfig, device: Device) -> str | None:
    """What to tell somebody who compiles a step for a device whose compute capability nobody has measured; else None.

    Args:
        step: its names of implementations say which kernels are used.
        device: the device, which may be absent.
    """
    if device.platform != "gpu" or (step.dot, step.decode) == ("xla", "xla"):
        return None
    from elastic_jax.kernels import decode_cuda, integer_dot_pallas

    capability = Target.of(device).facts["compute_capability"]
    number = round(10 * float(capability))
    measured = {
        "integer dot": (step.dot == "pallas", integer_dot_pallas.measured_tiles()),
        "decode": (step.decode == "cuda", decode_cuda.measured_tiles()),
    }
    missing = [name for name, (used, table) in measured.items() if used and number not in {key[0] for key in table}]
    if not missing:
        return None
    commands = "; ".join(_MEASURE[name] for name in missing)
    return (
        f"{device.device_kind}: no sizes of the kernels ({', '.join(missing)}) were measured on compute capability "
        f"{capability}, so usual ones are used: results are the same, speed may not be the best. To measure them, in a "
        f"clone of elastic-jax on such a device: {commands}; then compile again"
    )
