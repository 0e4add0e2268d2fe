"""Laws of ideal scaling, and of data against model parallelism."""

from __future__ import annotations

from collections.abc import Callable

from memsim.estimate import Estimate
from memsim.laws.comparison import same
from refimpl.registry import Case, law

Model = Callable[..., Estimate]
Comparing = Callable[..., tuple[Estimate, Estimate]]


@law("cost.ideal_scaling")
def device_time_is_conserved(f: Model, case: Case, _close: object) -> None:
    """Devices times time is the time on one device."""
    spent = case.call(f).total * case.kwargs["devices"]
    same(spent, case.kwargs["device_seconds"], "device-seconds")


@law("cost.ideal_scaling")
def twice_the_devices_halve_the_time(f: Model, case: Case, _close: object) -> None:
    """Doubling the devices halves the time."""
    doubled = case.replace(devices=2 * case.kwargs["devices"]).call(f).total
    same(2 * doubled, case.call(f).total, "time of twice the devices, doubled")


@law("cost.data_vs_model_parallel")
def both_train_one_model(f: Comparing, case: Case, _close: object) -> None:
    """Data parallelism holds a copy on each rank, model parallelism one copy on all of them."""
    data, model = case.call(f)
    ranks = case.kwargs["ranks"]
    same((data["copies"], model["copies"]), (ranks, 1), "copies")
    same(model["memory"] * ranks, data["memory"], "memory of all model-parallel ranks")


@law("cost.data_vs_model_parallel")
def only_model_parallel_traffic_grows_with_batch(f: Comparing, case: Case, _close: object) -> None:
    """Activations travel in model parallelism, gradients in data parallelism."""
    data, model = case.call(f)
    more_data, more_model = case.replace(batch=2 * case.kwargs["batch"]).call(f)
    same(more_data["communication"], data["communication"], "data-parallel traffic of twice the batch")
    same(more_model["communication"], 2 * model["communication"], "model-parallel traffic of twice the batch")
