"""Tuning on request, with a timer that a test can foretell: an interpreted kernel's time means nothing."""

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from inputs import BF16, FP32, randn
from triton.runtime.errors import OutOfResources

from sibo_triton.kernels import autotune
from sibo_triton.kernels import up as up_module
from sibo_triton.kernels.autotune import neighbours
from sibo_triton.kernels.down import down_siblings
from sibo_triton.kernels.down_input_gradient import down_input_gradient
from sibo_triton.kernels.down_weight_gradient import down_weight_gradient
from sibo_triton.kernels.few_rows import low_rank_siblings
from sibo_triton.kernels.siblings import DownGradients, DownProjection, UpGradients, UpProjection
from sibo_triton.kernels.targets import STAND_IN
from sibo_triton.kernels.up import add_up, plan, up
from sibo_triton.kernels.up_backward import up_backward_siblings

CONFIG = {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 2}


@pytest.fixture
def tuning(monkeypatch):
    """Tuning is on; the n-th trial takes as long as the list's n-th number, 9 beyond it, or does not fit if None."""
    times = []
    trials = []

    def timer(trial):
        trials.append(trial())
        seconds = times[len(trials) - 1] if len(trials) <= len(times) else 9.0
        if seconds is None:
            raise OutOfResources(2**18, 2**16, "shared memory")
        return seconds

    monkeypatch.setattr(autotune, "ENABLED", True)
    monkeypatch.setattr(autotune, "timer", timer)
    monkeypatch.setattr(autotune, "_fastest", {})
    return times, trials


def test_neighbours_differ_in_one_thing_and_come_after_the_default():
    all_of = neighbours(CONFIG, "BM")
    assert all_of[0] == CONFIG and len(all_of) == 8
    assert all(sum(one[name] != CONFIG[name] for name in CONFIG) == 1 for one in all_of[1:])
    assert {one["BM"] for one in all_of} == {32, 64, 128} and {one["BM"] for one in neighbours(CONFIG)} == {64}
    assert min(one["num_stages"] for one in neighbours(CONFIG | {"num_stages": 1})) == 1


def test_the_fastest_that_fits_is_kept(tuning):
    times, trials = tuning
    times += [3.0, None, 2.0, 1.0, None]
    tried = []
    chosen = [autotune.tuned(("a kernel", 1), CONFIG, tried.append) for _ in range(3)]
    assert chosen == [neighbours(CONFIG)[3]] * 3 and tried == neighbours(CONFIG) and len(trials) == len(tried)
    assert autotune.tuned(("a kernel", 2), CONFIG, tried.append) == CONFIG, "all alike: the default"


def test_what_nothing_fits_is_an_error(tuning):
    times, _ = tuning
    times += [None] * 20
    with pytest.raises(OutOfResources):
        autotune.tuned(("a kernel",), CONFIG, lambda config: None)


def test_nothing_is_timed_unless_asked_for(tuning, monkeypatch):
    monkeypatch.setattr(autotune, "ENABLED", False)
    assert autotune.tuned(("a kernel",), CONFIG, pytest.fail) is CONFIG
    monkeypatch.setattr(autotune, "ENABLED", True)
    monkeypatch.setattr(autotune, "timer", None)
    assert autotune.tuned(("a kernel",), CONFIG, pytest.fail) is CONFIG


def test_a_launch_takes_the_choice_for_its_class_of_shapes(tuning, monkeypatch):
    times, trials = tuning
    configs, kernel = [], up_module.up_kernel

    class Recorded:
        def __getitem__(self, grid):
            return lambda **arguments: configs.append(arguments["BM"]) or kernel[grid](**arguments)

    monkeypatch.setattr(up_module, "up_kernel", Recorded())
    lora_b = randn(40, 4, FP32)
    count = len(neighbours(plan(4, FP32, FP32, STAND_IN).config, "BM"))
    times += [5.0] * (count - 1) + [1.0]  # the most rows
    for rows, tuned in ((65, True), (100, False), (65, False), (200, True)):
        configs.clear()
        t = torch.randn(rows, 4)
        torch.testing.assert_close(up(t, lora_b, 2.0, FP32), 2 * t @ lora_b.T)
        assert len(configs) == (count + 1 if tuned else 1)
        assert rows == 200 or configs[-1] == 128
    assert len(trials) == 2 * count


def test_every_launcher_can_be_tuned_and_repeats_bitwise(tuning):
    """Whichever configuration wins."""
    times, trials = tuning
    x, h0, grad_y, base = (randn(150, 70, BF16) for _ in range(4))
    lora_a, lora_b, t = randn(4, 70, BF16), randn(70, 4, BF16), torch.randn(150, 4)

    def launches():
        pair = [DownGradients(t, lora_a, BF16, lambda_) for lambda_ in (0.5, 0.1)]
        up = UpGradients(grad_y, t, lora_b, 2.0)
        return [
            down_siblings(x, [DownProjection(lora_a, 0.5), DownProjection(lora_a, 0.1)], h0)[1][0],
            add_up(base, t, lora_b, 2.0),
            *low_rank_siblings(x, [DownProjection(lora_a, 0.5)], [UpProjection(lora_b, 2.0)], h0, BF16),
            *up_backward_siblings([up])[0][:2],
            up_backward_siblings([up._replace(wants_u=False)])[0][1],
            *down_weight_gradient(pair, x, h0),
            down_input_gradient(pair, dtype=BF16, base=base)[0],
        ]

    first = launches()
    tried = len(trials)
    assert tried > 20 and all(map(torch.equal, launches(), first)) and len(trials) == tried
    autotune.ENABLED = False
    for tuned, default in zip(first, launches(), strict=True):
        torch.testing.assert_close(tuned, default, rtol=1e-2, atol=1e-5)


def test_another_value_of_the_variable_is_refused(monkeypatch):
    monkeypatch.setenv(autotune.VARIABLE, "true")
    with pytest.raises(ValueError, match="SIBO_TRITON_AUTOTUNE='true': set it to 1"):
        importlib.reload(autotune)
