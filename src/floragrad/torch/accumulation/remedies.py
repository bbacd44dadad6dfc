"""Remedies in the words of the loop that a user has written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Remedies:
    """What errors and warnings of an accumulator tell the user to do.

    Attributes:
        backward: How gradients come into a window.
        step: What updates the parameters.
        clip: What clips gradients that are not in ``.grad``.
        drop: What drops a window.
        close: What removes the hooks.
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
