"""How XLA compiles the tests' programs. Nothing here imports jax, which reads its flags once, when it is imported."""

from importlib.metadata import version

# Tests compile hundreds of small programs and run each a few times: without optimisation they compile three times as
# fast. What is computed is the same, and equal to its reference within the same tolerances.
FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
# Tests that measure time or memory compile as users do (tests/optimised.py).
OPTIMISED: dict[str, str | bool] = {"xla_backend_optimization_level": "3"}
if version("jaxlib").startswith("0.10."):  # flags come and go, and XLA aborts over what it does not know
    FAST["xla_cpu_use_fusion_emitters"] = "false"
    FAST["xla_cpu_parallel_codegen_split_count"] = "1"  # workers keep all cores busy without more threads in each
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True
