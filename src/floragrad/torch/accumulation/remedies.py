"""Remedies that error messages name, in the terms of the user's training loop."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Remedies:
    """Remedies that the errors and warnings of an accumulator name.

    Attributes:
        backward: The call that folds gradients.
        step: The call that updates the parameters.
        clip: The call that clips gradients that are not in ``.grad``.
        drop: The call that drops a window.
        close: The call that removes the hooks.
    """

    backward: str = (
        "call accumulator.backward(loss), or run the backward pass inside `with accumulator.micro_batch():`; "
        "accumulator.close() gives the model back"
    )
    step: str = "call accumulator.step() alone"
    clip: str = "call accumulator.clip_grad_norm_(max_norm), or construct the accumulator with release=False"
    drop: str = "zero_grad() drops the window"
    close: str = (
        "close() that one first, or use it as a context manager; where only the traceback of an error "
        "still holds it, GradientAccumulator.close_all(model) closes it"
    )
