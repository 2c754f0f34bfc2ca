"""`backend="triton"`: in the interpreter, without a GPU, and with a JAX that has no Pallas."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax import BackendError, BlockMask
from bsjax.attention import backend_reason, backends, decode_attention, resolve_backend
from bsjax.gpu.configurations import compiling_for
from bsjax.runtime.sizes import most_parts
from tests.support.decode_cases import random_arrays as random_decode_arrays
from tests.support.pallas import needs_pallas
from tests.support.parity import torch
from tests.support.paths import ROOT
from tests.support.prefill_cases import EVERY_CATEGORY, RAGGED, SHORT, random_arrays
from tests.support.triton_interpreter import compiles_triton, interpreted, require_triton

require_triton()
needs_torch = pytest.mark.skipif(torch is None, reason="Triton's interpreter needs torch")
MASK = BlockMask(RAGGED, EVERY_CATEGORY, 32, 32)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("mesh", [None, (2, 1)], ids=["one device", "rows of two devices"])
def test_outputs_and_gradients_are_those_of_the_xla_backend(mesh):
    mask = BlockMask(SHORT, ["INTRA_IMAGE_SINK", "DENSE"], 32, 32, gradients=True)
    q, k, v = random_arrays(SHORT.tokens, 2, 1, 64, "float32")
    found, wanted = (
        interpreted("tests.support.triton_functions:outputs_and_gradients", q, k, v, mask, *options)
        for options in (("triton", mesh), ("xla",))
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
@needs_torch
def test_outputs_and_gradients_under_vmap():
    mask = BlockMask(RAGGED, ["SINK"], 32, 32, gradients=True)
    arrays = [
        jnp.stack([each, 2 * each]) for each in random_arrays(RAGGED.tokens, 1, 1, 16, "float32")
    ]
    found, wanted = (
        interpreted("tests.support.triton_functions:outputs_and_gradients", *arrays, mask, backend)
        for backend in ("triton", "xla")
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
@needs_torch
def test_decoding_is_that_of_the_xla_backend():
    arrays = random_decode_arrays([9, 0], 9, 4, 2, 64, "float32", own=True, layer=1)
    options = {"scale": 0.125, "return_lse": True}
    found = interpreted("bsjax.attention:decode_attention", *arrays, backend="triton", **options)
    wanted = decode_attention(*arrays, backend="xla", **options)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6, rtol=3e-6)


def test_without_a_gpu_it_is_refused_with_what_to_do():
    q, k, v = random_arrays(RAGGED.tokens, 4, 2, 64, "float32")
    with pytest.raises(BackendError, match="needs an NVIDIA GPU, and JAX has found none"):
        bsjax.sparse_attention(q, k, v, MASK, backend="triton")
    arrays = random_decode_arrays([9], 9, 4, 2, 64, "float32", own=False, layer=0)
    with pytest.raises(BackendError, match="use backend='xla'"):
        decode_attention(*arrays, scale=1.0, backend="triton")


def test_what_the_kernel_cannot_do_is_refused():
    from bsjax.triton.configurations import default_blocks
    from bsjax.triton.decode import decode_attention as triton_decode
    from bsjax.triton.prefill import prefill_attention

    schedule = MASK.schedule
    q, k, v = random_arrays(RAGGED.tokens, 4, 2, 512, "float32")
    with pytest.raises(BackendError, match="up to 256, got 512"):
        prefill_attention(q, k, v, schedule, jnp.arange(4), scale=1.0)
    with pytest.raises(BackendError, match="not in float64"):
        default_blocks(64, "float64", sparse=True)
    q, k, v = random_arrays(RAGGED.tokens, 4, 2, 64, "float32")
    odd = BlockMask(RAGGED, EVERY_CATEGORY, 32, 24).schedule
    with pytest.raises(BackendError, match="power of two of at least 16, got 24"):
        prefill_attention(q, k, v, odd, jnp.arange(4), scale=1.0)
    with pytest.raises(BackendError, match="up to 256, got 512"):
        triton_decode(
            *random_decode_arrays([9], 9, 4, 2, 512, "float32", own=False, layer=0), scale=1.0
        )


@pytest.mark.parametrize(
    ("gpu", "pallas", "problem", "chosen", "reason"),
    [
        (False, True, None, "xla", "no GPU"),
        (True, True, None, "pallas", "JAX has it"),
        (True, False, None, "triton", "no Pallas for Triton any more"),
        (True, False, "It is too old.", "xla", "It is too old."),
    ],
)
def test_auto_takes_pallas_while_jax_has_it(monkeypatch, gpu, pallas, problem, chosen, reason):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu" if gpu else "cpu")
    monkeypatch.setattr(backends, "_has_pallas", lambda: pallas)
    monkeypatch.setattr(backends, "triton_problem", lambda: problem)
    with compiling_for("sm_90"):
        assert resolve_backend("auto") == chosen
        assert reason in backend_reason(chosen) and backend_reason(chosen).startswith("auto")
        assert backend_reason("reference").startswith(f"asked for; auto is {chosen}")


@needs_pallas
@needs_pallas
@needs_pallas
def test_versions_that_do_not_fit_are_a_problem_and_leave_gradients_to_xla(monkeypatch):
    from bsjax.triton import launch
    from tools.triton_kernels import kernel_names

    mask = BlockMask(SHORT, ["SINK"], 32, 32, gradients=True)
    q = jax.ShapeDtypeStruct((SHORT.tokens, 1, 64), jnp.float32)

    def kernels_of_gradients():
        def loss(q):
            return bsjax.sparse_attention(q, q, q, mask, backend="pallas").sum()

        with compiling_for("sm_90"):
            return kernel_names(jax.grad(loss), (q,))

    if compiles_triton():
        assert backends.triton_problem() is None
        assert kernels_of_gradients() == ["query_gradients", "key_gradients"]
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(launch, "_VERSION", (0, 3, 1))
    monkeypatch.setattr(launch.triton, "__version__", "3.9.0")
    assert backends.triton_problem() is None
    monkeypatch.setattr(launch.triton, "__version__", "3.7.1")
    assert "found 3.7.1" in str(backends.triton_problem())
    jax.clear_caches()
    assert kernels_of_gradients() == []
    monkeypatch.setattr(launch, "_VERSION", (0, 4, 1))
    assert backends.triton_problem() is None
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert "JAX 0.11.0 passes too few" in str(backends.triton_problem())


def test_long_tiles_of_text_rows_are_split_for_both_kernels():
    parts = {name: most_parts(name, "bfloat16") for name in backends.BACKENDS}
    assert parts["pallas"] == parts["triton"] > 0 == parts["xla"]


@pytest.mark.slow
def test_a_jax_without_pallas_for_triton_imports_and_runs():
    """And without jax-triton, the backend is refused with what to install."""
    code = """if True:
        import sys
        class Hidden:
            def find_spec(self, name, path=None, target=None):
                if name == "jax.experimental.pallas.triton" or name.split(".")[0] == hidden:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        hidden = None
        sys.meta_path.insert(0, Hidden())
        import jax, jax.numpy as jnp, bsjax
        from bsjax.attention import resolve_backend
        from bsjax.gpu.configurations import compiling_for
        from tests.support.triton_interpreter import compiles_triton
        template = bsjax.Template.from_segments([bsjax.Text(50), bsjax.Image(70)])
        mask = bsjax.BlockMask(template, ["sink"])
        q = jnp.ones((120, 1, 64))
        assert jnp.allclose(bsjax.sparse_attention(q, q, q, mask), 1, atol=1e-5)
        def refusal(backend):
            try:
                bsjax.sparse_attention(q, q, q, mask, backend=backend)
            except bsjax.BackendError as error:
                return str(error)
        assert "choose backend='triton'" in refusal("pallas")
        on_cpu = jax.default_backend
        with compiling_for("sm_90"):
            jax.default_backend = lambda: "gpu"
            hidden = "jax_triton"
            assert resolve_backend("auto") == "xla"
            assert "pip install" in refusal("triton")
            hidden = None
            assert resolve_backend("auto") == ("triton" if compiles_triton() else "xla")
            jax.default_backend = on_cpu
        from tools.gpu_targets import lowered
        attend = lambda q, mask: bsjax.sparse_attention(q, q, q, mask, backend="triton")
        with compiling_for("sm_90"):
            try:
                text = lowered(attend, (q, mask), "h200").as_text()
            except bsjax.BackendError as error:
                assert not compiles_triton() and "needs Triton 3.9 or newer" in str(error)
            else:
                assert "triton_kernel_call" in text
    """
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
