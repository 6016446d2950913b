"""Predicts what every device does, searches for the best layout, and audits the prediction against the compiler.

    from moejax import planner

    cluster = planner.Cluster("mine", planner.get_device("h100"), hosts=2, devices_per_host=8)
    choice = planner.find_plan(planner.Request(model, cluster, seq_len=4096, batch_size=32))
    print(choice.best.layout, choice.best.memory, choice.best.time)

Start reading at `work` (the language), then `program` (what a step costs), `memory`, `time` and `search`. `trace`
counts the same from the program itself, without devices.
"""

from moejax.layout import DoesNotFitError
from moejax.planner.costs import Assumptions
from moejax.planner.hardware import DEVICES, Cluster, Constant, Device, Link, get_device, load_calibration
from moejax.planner.memory import Memory, predict_memory
from moejax.planner.predict import Prediction, predict_layout
from moejax.planner.search import Choice, Request, default_batch_size, find_plan
from moejax.planner.time import StepTime, predict_time

__all__ = [
    "DEVICES",
    "Assumptions",
    "Choice",
    "Cluster",
    "Constant",
    "Device",
    "DoesNotFitError",
    "Link",
    "Memory",
    "Prediction",
    "Request",
    "StepTime",
    "default_batch_size",
    "find_plan",
    "get_device",
    "load_calibration",
    "predict_layout",
    "predict_memory",
    "predict_time",
]
