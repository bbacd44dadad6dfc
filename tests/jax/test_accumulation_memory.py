"""What the compiler holds for a step is less by the gradients, and more by the sketches: nothing is run."""

from dataclasses import replace

import pytest

from benchmarks.jax_memory import MANY, Job, compiled_pair, predicted_difference

pytestmark = pytest.mark.usefixtures("unoptimized")  # bytes are assigned before LLVM sees a program
JOB = Job()


def test_a_window_in_one_program() -> None:
    """Within 5% of the gradient tree less its sketches, scheduled for the fewest bytes, as accelerators are."""
    exact, ours = compiled_pair(JOB, "microbatch", "memory")
    assert predicted_difference(JOB) > 3.4 * 10e6
    assert exact - ours == pytest.approx(predicted_difference(JOB), rel=0.05)


@pytest.mark.slow
def test_a_micro_batch_in_a_program() -> None:
    """The same where activations take more than the last gradient and the updates, which a branch holds."""
    job = replace(JOB, sequences=MANY * JOB.sequences)
    exact, ours = compiled_pair(job, "multi_steps", "memory")
    assert exact - ours == pytest.approx(predicted_difference(job), rel=0.05)
