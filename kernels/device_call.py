"""A call whose operands lie on a GPU, or are sent there: from arrays to a plan's DeviceArrays, and back to arrays.

operation.py comes here for whatever is not the CPU's; the `Operation` is handed over, since its plans are kept there.
"""

from collections.abc import Callable

from tilewise.kernels import settings
from tilewise.kernels.device_arrays import DeviceArray, device_view, host_place, is_on_device, overlap
from tilewise.kernels.device_replay import Recorded, Recorder, bytes_of
from tilewise.kernels.dispatch import implementation_module

_current_settings = settings.current.get
_ONCE, _NEVER = object(), object()  # of a signature: it was called once; it cannot be done again


def call(operation, operands: tuple, options: tuple, out, kind):
    """The operation on a GPU's arrays: nothing is copied but what is not contiguous, or not aligned as it wants.

    kind: of the options.
    """
    plan, views, target = _planned(operation, operands, options, out, kind)
    return _run(operation, plan, views, target, out)


def call_again(operation, library, operands: tuple, options: tuple, out, kind):
    """The operation as device_replay.py has it, recorded the second time; NotImplemented where that is not for these
    arrays. library: of the first one."""
    arrays, pointers = operands if out is None else (*operands, out), []
    signature = library.signature(arrays, pointers)
    if signature is None:
        return NotImplemented
    key = (_current_settings(), kind, len(arrays), *signature)
    known = operation.recorded.get(key)
    if type(known) is Recorded and not (out is not None and known.overlaps(pointers)):
        result = known.run(pointers)
        return result if out is None else out
    plan, views, target = _planned(operation, operands, options, out, kind)
    if known is not _ONCE:
        operation.recorded.setdefault(key, _ONCE)
        return _run(operation, plan, views, target, out)
    given = views if target is None else (*views, target)
    recorder = Recorder(next(v.place for v in given if v is not None), len(given))
    traced = [None if v is None else recorder.operand(v, i) for i, v in enumerate(given)]
    result = _run(operation, plan, tuple(traced[: len(views)]), None if target is None else traced[-1], out)
    again = Recorded(recorder, library, result, bytes_of(given), target is not None) if recorder.repeatable else _NEVER
    operation.recorded[key] = again
    return result


def _planned(operation, operands: tuple, options: tuple, out, kind) -> tuple:
    """The operation's plan, views of the operands, and of `out`."""
    views = tuple(
        None if o is None else _view(operation, name, o) for name, o in zip(operation.operands, operands, strict=True)
    )
    target = None if out is None else _view(operation, "out", out)
    present = [(name, view) for name, view in zip(operation.operands, views, strict=True) if view is not None]
    for name, view in [*present, *([] if target is None else [("out", target)])]:
        if view.place is not present[0][1].place:
            raise TypeError(f"{operation.name}: {present[0][0]} and {name} must be of one kind, on one device")
    plan = operation.device_plan(views, options, kind)
    if target is not None:
        _check_out(operation, plan.problem, views, target)
    return plan, views, target


def run_from_host(backend: str, run: Callable, changed: tuple[int, ...], values: Callable | None, *operands, out=None):
    """A GPU's function for host arrays: copied there, and the results back."""
    if values is not None:
        values(*operands)
    place = host_place(backend)
    views = [None if a is None else place.copy_in(a) for a in operands]
    result = run(*views)
    for i in changed:
        view = views[i]
        if view is not None:
            place.copy_out(view, operands[i])
    if isinstance(result, tuple):
        return tuple(None if r is None else place.copy_out(r) for r in result)
    return place.copy_out(result, out)


def _view(operation, name: str, value) -> DeviceArray:
    if not is_on_device(value):
        raise TypeError(f"{operation.name}: {name} lies on the host and others on the GPU; copy it there first")
    return device_view(operation.name, name, value)


def _run(operation, plan, views: tuple, target: DeviceArray | None, out):
    copying = implementation_module(plan.backend, "copying")
    unbatched = plan.problem.unbatched
    changed = operation.mutates if operation.mutates and operation.mutates_when(plan.problem) else ()
    operands = [None if v is None else copying.contiguous(v, operation.alignment) for v in views]
    if target is None and not changed and not unbatched:  # most calls: nothing to put back, nothing to reshape
        return _wrapped(plan.run(*operands))
    lifted = [o.reshape(1, *o.shape) if o is not None and i in unbatched else o for i, o in enumerate(operands)]
    result = plan.run(*lifted)
    for i in changed:
        used, given = operands[i], views[i]
        if used is not None and used is not given:
            copying.copy_strided(used, given)
    results = list(result) if isinstance(result, tuple) else [result]
    if unbatched:
        some = plan.problem.unbatched_results if isinstance(result, tuple) else (0,)
        results = [r.reshape(*r.shape[1:]) if i in some and r is not None else r for i, r in enumerate(results)]
    if target is not None and results[0] is not None:  # a first result is never absent
        copying.copy_strided(results[0], target)
        return out
    return _wrapped(tuple(results) if isinstance(result, tuple) else results[0])


def _wrapped(result):
    """Device arrays, one or a tuple with absent ones, as their libraries' arrays."""
    if isinstance(result, tuple):
        return tuple(None if r is None else r.place.wrap(r) for r in result)
    return result.place.wrap(result)


def _check_out(operation, problem, views: tuple, target: DeviceArray):
    assert problem.out is not None
    shape, dtype = problem.out
    if target.shape != shape or target.dtype != dtype:
        raise ValueError(
            f"{operation.name}: out must have shape {shape} and dtype {dtype}, "
            f"got shape {target.shape} and dtype {target.dtype}"
        )
    for i, (name, view) in enumerate(zip(operation.operands, views, strict=True)):
        if view is not None and overlap(view, target) and i not in operation.in_place:
            raise ValueError(f"{operation.name}: out overlaps {name}")
