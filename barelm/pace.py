"""How fast a run goes, and how long it will still take."""

import time


class TimeLeft:
    """The seconds that a run will still take, by the pace of this process's loop until now, its
    validations and saves included: what was before the loop, and another part of the run, count
    nothing. The first step, which is slow, counts no more once there are a few."""

    def __init__(self, progress: float) -> None:
        """progress: of the run, 0 to 1, where the loop begins."""
        self.begin = (time.monotonic(), progress)
        self.n_steps = 0

    def __call__(self, progress: float) -> float:
        """The seconds left after a step."""
        self.n_steps += 1
        now = time.monotonic()
        if self.n_steps == 1:
            self.after_first = (now, progress)
        begin, first = self.begin if self.n_steps < 4 else self.after_first
        if progress <= first:  # nothing that could be told from
            return 0.0
        return (now - begin) * (1 - progress) / (progress - first)


def step_words(dt: float) -> str:
    """How long a step of dt seconds takes, as a line of progress has it."""
    if dt < 1:
        return f"{1 / dt:.1f} steps/s" if dt > 0 else ""
    return f"{dt:.{1 if dt < 100 else 0}f} s/step"
