"""The device memory of each stage of a run, and the check that a prompt fits before it runs.

All programs of a run are compiled before the first one starts. By then, what the device holds at
each stage is known: the stage's arguments, its temporaries and its results. The largest of them is
known before that, and before any image is decoded: the cache.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from bsjax.checks import argument
from bsjax.errors import CapacityError
from bsjax.models.collectives import CONTEXT, TENSOR
from bsjax.models.sharding import WeightBytes, sharded_shapes, size_along
from bsjax.runtime.chunks import CacheLayout
from bsjax.runtime.inputs import ModelInputs, Placed, describe_images
from bsjax.runtime.processes import argument_of_least, least_of_all, spans_processes
from bsjax.runtime.programs import Programs, Stage, size_in_bytes


def check_cache_memory(
    prompt: ModelInputs | Placed, programs: Programs, layout: CacheLayout, available: int | None
) -> None:
    """Rejects a prompt whose cache alone does not fit.

    Args:
      prompt: the prompt, whose images need not have been read.
      programs: the programs of the model; none is compiled.
      layout: the shape of the cache.
      available: free bytes on the device, with the weights already loaded; None if unknown.

    Raises:
      CapacityError: the message says how much memory is needed, how much is available, and how to
        need less.
    """
    needed = _cache_bytes(programs, layout)
    if available is not None and needed > available:
        template = prompt.template
        raise CapacityError(
            f"The prompt of {template.tokens} tokens ({describe_images(template)}) needs "
            f"{_gib(needed)} of device memory for its cache, in addition to the weights and to "
            f"what runs, but only {_gib(available)} are available{_where(programs.mesh)}. "
            f"{prompt.how_to_shorten}{_larger_mesh(programs, needed, needed, available)}"
        )


def _cache_bytes(programs: Programs, layout: CacheLayout) -> int:
    """On each device."""
    language_model = programs.module.language_model
    cache = jax.eval_shape(lambda: language_model.empty_cache(*layout))
    return size_in_bytes(sharded_shapes(cache, programs.mesh))


def check_memory(
    inputs: ModelInputs,
    stages: Sequence[Stage],
    available: int | None,
    programs: Programs | None = None,
    layout: CacheLayout | None = None,
) -> None:
    """Rejects a prompt that does not fit, before any of its programs runs.

    Args:
      inputs: the inputs of the prompt.
      stages: all stages of the run.
      available: free bytes on the device, with the weights already loaded; None if unknown.
      programs: the programs of the model, if a mesh of more devices may be proposed.
      layout: the shape of the cache.

    Raises:
      CapacityError: the message says how much memory is needed, at which stage, how much is
        available, and how to need less.
    """
    worst = max(stages, key=lambda stage: stage.peak)
    if available is not None and worst.peak > available:
        where = larger = ""
        if programs is not None and layout is not None:
            where = _where(programs.mesh)
            cache = _cache_bytes(programs, layout)
            larger = _larger_mesh(programs, cache, worst.peak, available)
        raise CapacityError(
            f"The prompt of {inputs.tokens} tokens ({describe_images(inputs.template)}) needs "
            f"{_gib(worst.peak)} of device memory in addition to the weights (the peak is in "
            f"{worst.name}), but only {_gib(available)} are available{where}. "
            f"{inputs.how_to_shorten}{larger}"
        )


def _where(mesh: Mesh | None) -> str:
    """Which device has the least memory, in words; nothing if there is only one."""
    if mesh is None or mesh.size == 1:
        return ""
    free = {device.id: _bytes_available_on(device) or 0 for device in mesh.local_devices}
    tightest = min(free, key=lambda device: free[device])
    if spans_processes(mesh):
        tightest = argument_of_least(tightest, free[tightest])
    kind = next(device.device_kind for device in mesh.devices.flat if device.id == tightest)
    return f" on device {tightest} ({kind})"


def _larger_mesh(programs: Programs, cache: int, peak: int, available: int) -> str:
    """Which mesh a prompt would fit, in words; nothing if devices share their memory."""
    if jax.devices()[0].platform == "cpu":
        return ""
    sizes = mesh_that_fits(programs, cache, peak, available)
    if sizes is None:
        return ""
    context, tensor = sizes
    return (
        f" Or use {context * tensor} such devices, on which it would fit by estimate: "
        f"{argument('context')} {context}, {argument('tensor')} {tensor}."
    )


def mesh_that_fits(
    programs: Programs, cache: int, peak: int, available: int
) -> tuple[int, int] | None:
    """The smallest mesh of devices like these that a run fits, by estimate.

    Weights of the language model are divided along `TENSOR`, the cache along both axes; what else
    the run takes stays as it is.

    Args:
      programs: the programs of the model.
      cache: bytes of the cache on each device.
      peak: bytes that the run needs on each device, in addition to the weights.
      available: free bytes on each device.

    Returns:
      Devices along `CONTEXT` and `TENSOR`; None if no mesh of up to 64 devices would do.
    """
    context, tensor = (size_along(programs.mesh, axis) for axis in (CONTEXT, TENSOR))
    text: Any = programs.module.language_model
    sizes = (
        text.layers.self_attn.q_heads,
        text.layers.mlp.gate_proj.out_features,
        text.embed_tokens.num_embeddings,
    )
    weights = WeightBytes.of(programs.parameters)
    memory = available + weights.all
    for power in range(1, 7):
        for tensor_power in range(power + 1):
            wider, longer = 2**tensor_power, 2 ** (power - tensor_power)
            if wider < tensor or longer < context or wider * longer <= context * tensor:
                continue
            if any(size % wider for size in sizes):
                continue
            # Beyond the number of key heads, they are repeated.
            heads = min(wider, text.kv_heads) // min(tensor, text.kv_heads)
            of_cache = cache * context // (longer * max(1, heads))
            if weights.on(wider / tensor) + of_cache + peak - cache <= memory:
                return longer, wider
    return None


def check_host_memory(inputs: ModelInputs, needed: int, available: int | None) -> None:
    """Rejects a prompt whose logits do not fit into the host's memory.

    Args:
      inputs: the inputs of the prompt.
      needed: number of bytes needed.
      available: free bytes on the host; None if unknown.

    Raises:
      CapacityError: the message says how much memory is needed, how much is available, and how to
        need less.
    """
    if available is not None and needed > available:
        raise CapacityError(
            f"The logits of {inputs.tokens} tokens ({describe_images(inputs.template)}) need "
            f"{_gib(needed)} of the host's memory, but only {_gib(available)} are available. "
            f"{inputs.how_to_shorten}"
        )


def bytes_available(mesh: Mesh | None = None) -> int | None:
    """Free bytes on the device that has the least; None if unknown.

    Args:
      mesh: the devices; None for the default one.
    """
    devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    of_devices = [_bytes_available_on(device) for device in devices]
    known = [available for available in of_devices if available is not None]
    least = None
    if len(known) == len(of_devices):
        # The devices of a CPU share its memory.
        shared_by = len(known) if devices[0].platform == "cpu" else 1
        least = min(known) // shared_by
    return least_of_all(least, mesh)


def _bytes_available_on(device: Any) -> int | None:
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return host_bytes_available() if device.platform == "cpu" else None


def host_bytes_available() -> int | None:
    """Free memory of the host, in bytes; None if unknown."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
        return 1024 * int(meminfo.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
