"""Which tests know which file of the core, the fastest and nearest first; `mutation/mutants.py` and `make near` use it.

    python tests/near.py src/anybatch/_scaling/clock.py     # runs them

A name is a file of tests: `clock` is tests/test_clock.py, `distributed/ddp` is tests/distributed/test_ddp.py.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Each file of the core, below src/anybatch.
NEAR = {
    "_branch/branch.py": "branch",
    "_branch/critical.py": "branch",
    "_gradients/adam_metric.py": "metric pretended distributed/metric",
    "_gradients/autograd.py": "waiting peek gather pretended",
    "_gradients/consecutive.py": "scenarios",
    "_gradients/deepspeed.py": "distributed/deepspeed",
    "_gradients/engine.py": "wrappers distributed/scenarios distributed/trust distributed/ddp distributed/fsdp",
    "_gradients/euclidean.py": "waiting weights",
    "_gradients/finite.py": "real_loops",
    "_gradients/experts.py": "distributed/experts",
    "_gradients/fingerprint.py": "trust gates distributed/scenarios distributed/trust distributed/fsdp",
    "_gradients/fsdp.py": "wrappers distributed/scenarios distributed/trust distributed/fsdp distributed/metric",
    "_gradients/hooks.py": "gather distributed/scenarios distributed/trust distributed/ddp distributed/fsdp",
    "_gradients/join.py": "distributed/routes distributed/ddp",
    "_gradients/layers.py": "layers distributed/layers",
    "_gradients/norms.py": "norms",
    "_gradients/parameters.py": "several_optimizers gather",
    "_gradients/pipeline.py": "distributed/pipelines",
    "_gradients/probe.py": "gather metric layers",
    "_gradients/reduce.py": "weights distributed/scenarios distributed/trust distributed/routes distributed/ddp",
    "_gradients/forward_hook.py": "sizes",
    "_gradients/sizes.py": "sizes first_hour weights",
    "_gradients/steps.py": "several_optimizers trust",
    "_gradients/summed.py": "trust",
    "_gradients/window.py": "metric weights",
    "_gradients/window_norms.py": "gather every metric layers",
    "_scaling/batch.py": "batch",
    "_scaling/clock.py": "clock",
    "_scaling/families.py": "optimizers maps distributed/zero",
    "_scaling/fit.py": "first_hour",
    "_scaling/hyperparameters.py": "momentum optimizers distributed/zero",
    "_scaling/moments.py": "laws",
    "_scaling/momentum.py": "momentum",
    "_scaling/preview.py": "schedules",
    "_scaling/rules.py": "rules",
    "_scaling/schedules.py": "schedules",
    "_scaling/wrappers.py": "wrappers torchtitan",
    "_controller/accumulation.py": "batch_controller states wrong_types accumulation",
    "_controller/assembly.py": "controller layers metric distributed/settings",
    "_controller/attach.py": "controller first_hour wrong_types",
    "_controller/controller.py": "controller peek waiting distributed/trust distributed/routes distributed/checkpoint",
    "_controller/diagnostics.py": "first_hour",
    "_controller/ending.py": "ending",
    "_controller/gain_estimator.py": "laws",
    "_controller/loops.py": "first_hour",
    "_controller/run_state.py": "record distributed/scenarios distributed/trust distributed/ddp",
    "_controller/settings.py": "controller distributed/settings",
    "_controller/state.py": "states distributed/checkpoint",
    "_controller/state_in_optimizer.py": "carried",
    "_controller/step_hooks.py": "peek distributed/scenarios distributed/trust distributed/routes",
    "_ema/decay.py": "ema_clock wrong_types",
    "_ema/foreign.py": "ema_foreign",
    "_ema/importers.py": "ema_import states",
    "_ema/lerp.py": "ema_model",
    "_ema/model_ema.py": "ema_model distributed/ema_sharded",
    "_ema/offload.py": "ema_model",
    "_ema/state.py": "states distributed/ema_sharded",
    "_ema/tensors.py": "ema_model ema_changes distributed/ema_sharded",
}
# After those of the file, those that know its package.
PACKAGE = {
    "_gradients": "gather waiting trust norms scenarios accumulation",
    "_scaling": "rules batch clock laws momentum schedules scenarios",
    "_controller": "controller first_hour several_optimizers trust scenarios gates",
    "_ema": "ema ema_clock ema_changes ema_import ema_model",
    "_branch": "branch",
}


def paths(names):
    """The files of tests, as pytest takes them."""
    return [str(Path("tests", name).with_name(f"test_{Path(name).name}.py")) for name in names]


def of_one_process(file):
    """The files of tests for a file of the core: its own first, then those of its package."""
    names = dict.fromkeys(f"{NEAR[file]} {PACKAGE[Path(file).parts[0]]}".split())
    return paths(name for name in names if "/" not in name)


def of_several_ranks(file):
    """Those of its own that start several processes."""
    return paths(name for name in NEAR[file].split() if "/" in name)


def main():
    import pytest

    (asked,) = sys.argv[1:] or [""]
    file = asked.removeprefix("src/anybatch/")
    if file not in NEAR:
        sys.exit(
            f"FILE={asked or '...'} is not in the table of tests/near.py. Its files: src/anybatch/{{{','.join(NEAR)}}}"
        )
    os.chdir(ROOT)
    sys.exit(pytest.main(["-q", "--durations=5", *of_one_process(file), *of_several_ranks(file)]))


if __name__ == "__main__":
    main()
