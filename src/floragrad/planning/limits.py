"""The largest batch, sequence and rank that still fit a device, found by bisection."""

from collections.abc import Callable


def largest_that_fits(peak: Callable[[int], int], room: int, start: int, most: int) -> int:
    """The largest number from 1 to ``most`` whose peak is within ``room``; 0 if none is.

    Bisection that guesses by the line through the two nearest numbers known: memory grows with little curvature, so
    that a few peaks are enough. Every third guess is the middle, which bounds their number by the logarithm.

    Args:
        peak: The peak of a number, which does not fall as the number grows.
        room: Bytes that there are.
        start: The number to begin with.
        most: The largest number that makes sense.

    Example:
        >>> largest_that_fits(lambda batch: 100 + 7 * batch, room=1000, start=1, most=10_000)
        128
    """
    known: dict[int, int] = {}
    fitting, failing = 0, most + 1
    guess = min(max(start, 1), most)
    while failing - fitting > 1:
        known[guess] = peak(guess)
        if known[guess] <= room:
            fitting = guess
        else:
            failing = guess
        guess = _next_guess(known, room, fitting, failing)
    return fitting


def _next_guess(known: dict[int, int], room: int, fitting: int, failing: int) -> int:
    """A number between one that fits and one that does not: by the line through what is known, or the middle."""
    middle = (fitting + failing) // 2
    if failing not in known:
        middle = min(middle, 2 * fitting)  # nothing is known up there: do not jump into it
    if fitting not in known:
        middle = min(middle, failing // 2)
    by_line = middle
    nearest = sorted(known, key=lambda number: abs(known[number] - room))[:2]
    if len(nearest) == 2 and len(known) % 3:
        low, high = sorted(nearest)
        rise = known[high] - known[low]
        if rise > 0:
            by_line = low + (room - known[low]) * (high - low) // rise
    return min(max(by_line, fitting + 1), failing - 1)
