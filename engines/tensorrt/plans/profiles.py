"""Optimization profiles: the shapes that a plan is built for, parsed and checked.

TensorRT's own checks come late and without reasons: `set_shape` accepts any tensor name, min > opt only makes
`bool(profile)` False, and a smallest batch of 0 is accepted.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from cobatch.engines.errors import EngineLoadError

Shape = tuple[int, ...]
# An input's min, opt and max shape, batch axis first.
Range = tuple[Shape, Shape, Shape]
Profile = dict[str, Range]

_SHAPE = r"\d+(?:x\d+)*"
_RANGE = rf"({_SHAPE})/({_SHAPE})/({_SHAPE})"
_BATCH = re.compile(r"(\d+)/(\d+)/(\d+)\Z")
_INPUT = re.compile(rf"(.+?):{_RANGE}(?:,|\Z)")
SPEC_HELP = "MIN/OPT/MAX rows (1/8/64), or INPUT:MIN/OPT/MAX shapes with commas (ids:1x16/8x64/64x512,…)"
_WORDS = ("min", "opt", "max")


def make_profiles(
    specs: Sequence[str], inputs: Mapping[str, Shape], max_batch_size: int, opt_batch_size: int | None
) -> list[Profile]:
    """Return a profile for each spec, or one from the batch sizes; none if every axis of `inputs` is fixed.

    `inputs`: each input's shape, -1 for a dynamic axis. Raises EngineLoadError.
    """
    dynamic = {name: shape for name, shape in inputs.items() if -1 in shape}
    if not dynamic:
        if specs:
            raise EngineLoadError("every axis of the model's inputs is fixed: --profile is not possible")
        return []
    best = max_batch_size if opt_batch_size is None else opt_batch_size
    if not 1 <= best <= max_batch_size:
        raise EngineLoadError(
            f"opt batch size {best} is not within 1 and the max batch size {max_batch_size}"
        )
    profiles = [_parse(spec, dynamic) for spec in specs] or [_from_rows(dynamic, (1, best, max_batch_size))]
    for profile, spec in zip(profiles, specs or [""], strict=True):
        _check(profile, inputs, dynamic, f"profile {spec!r}: " if spec else "")
    return profiles


def largest_batch(profiles: Sequence[Profile]) -> int | None:
    """Return the largest batch that a profile accepts; None without profiles."""
    return max((r[2][0] for profile in profiles for r in profile.values()), default=None)


def as_spec(profile: Profile) -> str:
    """Format a profile as a spec."""
    return ",".join(
        f"{name}:{'/'.join('x'.join(map(str, shape)) for shape in ranges)}"
        for name, ranges in profile.items()
    )


def _parse(spec: str, dynamic: Mapping[str, Shape]) -> Profile:
    rows = _BATCH.match(spec)
    if rows:
        return _from_rows(dynamic, (int(rows[1]), int(rows[2]), int(rows[3])))
    profile: Profile = {}
    at = 0
    while at < len(spec) and (found := _INPUT.match(spec, at)):
        name, low, best, high = found.groups()
        if name in profile:
            raise EngineLoadError(f"profile {spec!r}: input {name!r} is given twice")
        profile[name] = (_shape(low), _shape(best), _shape(high))
        at = found.end()
    if at < len(spec) or not profile or spec.endswith(","):
        raise EngineLoadError(f"profile {spec!r}: expected {SPEC_HELP}")
    return profile


def _shape(text: str) -> Shape:
    return tuple(int(size) for size in text.split("x"))


def _from_rows(dynamic: Mapping[str, Shape], rows: tuple[int, int, int]) -> Profile:
    """Return the profile of min, opt and max rows; any other dynamic axis needs a spec."""
    profile: Profile = {}
    for name, shape in dynamic.items():
        open_axes = [axis for axis, size in enumerate(shape) if size < 0 and axis > 0]
        if open_axes:
            axes = f"axis {open_axes[0]}" if len(open_axes) == 1 else f"axes {_listed(open_axes)}"
            example = "/".join("x".join("N" if size < 0 else str(size) for size in shape) for _ in _WORDS)
            raise EngineLoadError(
                f"input {name!r} {_shown(shape)} is dynamic in {axes} too, not only in the batch: "
                f"set the range with --profile {name}:{example}"
            )
        low, best, high = ((count, *shape[1:]) for count in rows)
        profile[name] = (low, best, high)
    return profile


def _check(profile: Profile, inputs: Mapping[str, Shape], dynamic: Mapping[str, Shape], where: str) -> None:
    for name, ranges in profile.items():
        if name not in inputs:
            near = difflib.get_close_matches(name, inputs, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {_listed(map(repr, inputs))}"
            raise EngineLoadError(f"{where}the model has no input {name!r}; {hint}")
        _check_range(name, inputs[name], ranges, where)
    missing = [name for name in dynamic if name not in profile]
    if missing:
        raise EngineLoadError(f"{where}input {missing[0]!r} {_shown(dynamic[missing[0]])} is missing")


def _check_range(name: str, shape: Shape, ranges: Range, where: str) -> None:
    for word, given in zip(_WORDS, ranges, strict=True):
        if len(given) != len(shape):
            raise EngineLoadError(
                f"{where}{word} of input {name!r} has {len(given)} axes, but the model's is {_shown(shape)}"
            )
    for axis, size in enumerate(shape):
        low, best, high = (given[axis] for given in ranges)
        if size >= 0 and not low == best == high == size:
            raise EngineLoadError(
                f"{where}axis {axis} of input {name!r} is fixed at {size}, not {low}/{best}/{high}"
            )
        if not low <= best <= high:
            raise EngineLoadError(
                f"{where}axis {axis} of input {name!r}: min {low}, opt {best}, max {high} "
                "are not in ascending order"
            )
        if low < 1 and size < 0:
            raise EngineLoadError(f"{where}axis {axis} of input {name!r}: min must be at least 1")


def _shown(shape: Shape) -> str:
    return f"[{', '.join('?' if size < 0 else str(size) for size in shape)}]"


def _listed(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)
