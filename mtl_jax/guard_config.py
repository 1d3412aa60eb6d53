"""The values that say what a run does where its loss is not finite or jumps."""

import dataclasses

from mtl_jax.errors import UserError, suggest

_WAYS = ("stop", "skip", "roll_back")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What counts as a bad loss, and what happens then (docs/reliability.md).

    Attributes:
      on_bad_loss: "stop" ends the run, earlier checkpoints untouched; "skip" leaves the update out,
        so that parameters, optimizer and method stay as they were; "roll_back" goes back to a
        checkpoint and on from there with other data.
      spike_factor: a loss above so many times the median of the last `spike_window` good ones is
        bad; 0: only one that is not finite, or whose gradient is not.
      spike_window: steps; the loss of step n is compared with those up to n - 2, and with none
        before so many are there.
      max_skips: updates left out in a row before the run stops; with "skip".
      roll_back_steps: go back by at least so many steps, to the newest checkpoint that is so old,
        or the oldest one there is; with "roll_back".
      max_roll_backs: in the whole run, before it stops; with "roll_back".
    """

    on_bad_loss: str = "stop"
    spike_factor: float = 0.0
    spike_window: int = 50
    max_skips: int = 10
    roll_back_steps: int = 1
    max_roll_backs: int = 3

    def __post_init__(self) -> None:
        if self.on_bad_loss not in _WAYS:
            raise UserError(
                f"Guard.on_bad_loss must be {', '.join(map(repr, _WAYS))}, not "
                f"{self.on_bad_loss!r}.{suggest(self.on_bad_loss, _WAYS)}"
            )
        if not (self.spike_factor == 0 or self.spike_factor > 1):
            raise UserError(
                f"Guard.spike_factor must be 0 or greater than 1, not {self.spike_factor}."
            )
        for name, way in (
            *(("spike_window", ""), ("max_skips", "skip")),
            *(("roll_back_steps", "roll_back"), ("max_roll_backs", "roll_back")),
        ):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"Guard.{name} must be at least 1, not {value}.")
            default = type(self).__dataclass_fields__[name].default
            if way and self.on_bad_loss != way and value != default:
                raise UserError(f"Guard.{name} is set, but it needs Guard.on_bad_loss = {way!r}.")
        if not self.spike_factor and self.spike_window != 50:
            raise UserError("Guard.spike_window is set, but it needs Guard.spike_factor.")
