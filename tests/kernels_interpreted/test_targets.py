"""What launchers know of a device, and how deep they make a loop's pipeline by it."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sibo_triton.kernels import targets
from sibo_triton.kernels.targets import IN_FLIGHT, KNOWN, STAND_IN, Target, target_of


@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("bytes_of_stage", [4096, 10240, 18432, 36864, 65536])
@pytest.mark.parametrize("programs", [1, 2])
def test_pipelines_are_as_deep_as_needed_and_as_fits(target, bytes_of_stage, programs):
    stages = target.stages(2, bytes_of_stage, programs)
    if target.hip:
        assert stages == 2
    if stages > 2:
        assert 2 * stages * bytes_of_stage <= target.shared_memory
        assert (stages - 2) * programs * bytes_of_stage < IN_FLIGHT, "one less would do"
    elif not target.hip:
        enough = programs * bytes_of_stage >= IN_FLIGHT
        assert enough or 2 * 3 * bytes_of_stage > target.shared_memory


def test_deeper_on_a_target_with_more_shared_memory():
    assert [KNOWN[name].stages(3, 18432, 1) for name in ("sm_90", "sm_120", "gfx942")] == [4, 3, 3]


@pytest.mark.parametrize(
    ("hip", "expected"), [(None, Target("cuda", 90, 1000, 132)), ("7", Target("hip", 0, 1000, 132))]
)
def test_a_device_is_asked_once(hip, expected, monkeypatch):
    asked = []

    def properties(index):
        asked.append(index)
        return {"max_shared_mem": 1000, "multiprocessor_count": 132}

    utils = SimpleNamespace(get_device_properties=properties)
    monkeypatch.setattr(targets, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    targets._of_gpu.cache_clear()
    try:
        assert [target_of(torch.device("cuda", 3)) for _ in range(2)] == [expected] * 2 and asked == [3]
    finally:
        targets._of_gpu.cache_clear()
    assert target_of(torch.device("cpu")) == STAND_IN
