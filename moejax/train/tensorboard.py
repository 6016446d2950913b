"""Writes TensorBoard's event files without a queue or a thread, so that a full disk is an error where it is met.

`tensorboardX.SummaryWriter` writes in a thread that ends at the first error; ten events later its queue is full, and
the training waits forever. Its protocol buffers and checksum are used here, and records are appended whole.
"""

from __future__ import annotations

import pathlib
import socket
import struct
import time
from collections.abc import Mapping, Sequence

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from moejax.train.files import AppendOnlyFile
from moejax.train.load_image import encode_png


class EventFile:
    """A new event file in `directory`, which is made if it is not there.

    Args:
      directory: TensorBoard's log directory.
      first_step: the first step that will be written; TensorBoard hides what earlier files have from there on.
    """

    def __init__(self, directory: pathlib.Path, *, first_step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()  # to the nanosecond: two runs may start within a second
        self.file = AppendOnlyFile(directory / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}")
        start = SessionLog(status=SessionLog.START)
        for event in (Event(file_version="brain.Event:2"), Event(step=first_step, session_log=start)):
            self.file.append(_framed(event))

    def scalars(self, step: int, values: Mapping[str, float]) -> bytes:
        """Returns a record of these figures, for `file`."""
        return _record(step, [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])

    def picture(self, step: int, tag: str, image_HWC: np.ndarray) -> bytes:
        """Returns a record of this picture, uint8 [H, W, 3], for `file`."""
        height, width, _ = image_HWC.shape
        png = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encode_png(image_HWC))
        return _record(step, [Summary.Value(tag=tag, image=png)])


def _record(step: int, values: Sequence[Summary.Value]) -> bytes:
    return _framed(Event(step=step, summary=Summary(value=values)))


def _framed(event: Event) -> bytes:
    """Returns the event as a TFRecord: length, its checksum, the data, its checksum; little-endian."""
    event.wall_time = time.time()
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
