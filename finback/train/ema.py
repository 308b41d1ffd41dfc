"""An exponential moving average of the weights in host memory (V3 section 3.2.3), updated while the next step computes.

The parameters do not change between two optimizer updates. So nothing has to be snapshotted: a thread reads them during the
next forward and backward pass, and the loop calls `wait` before it changes them again. Each update sees exactly the
weights of one step, in order.

The arithmetic is numpy's, on one thread: torch's would start a second team of threads that fights with the step's own.
"""

import threading
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_BLOCK = 2**18  # elements averaged at once: the scratch space, and what stays in the cache


class MovingAverage:
    """average += (1 - decay) * (parameter - average), once per `start`. `tensors` are fp32 on the CPU, under the parameters' names.

    Between `start` and `wait` the parameters must not change and `tensors` must not be read.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.tensors = {
            name: parameter.detach().to("cpu", torch.float32, copy=True).contiguous() for name, parameter in parameters.items()
        }
        self._parameters = dict(parameters)
        self._scratch = np.empty(_BLOCK, dtype=np.float32)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Begin to average the parameters as they are now."""
        self.wait()
        done = _record_event(self._parameters)
        self._thread = threading.Thread(target=self._update, args=(done,), name="moving-average")
        self._thread.start()

    def wait(self) -> None:
        """Return when the update that was started has ended; an error inside it is raised here."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _update(self, done: "torch.cuda.Event | None") -> None:
        try:
            if done is None:
                self._average()
            else:
                # A stream of its own: on the step's stream the copies would queue behind the next forward pass.
                device = next(iter(self._parameters.values())).device
                with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
                    torch.cuda.current_stream().wait_event(done)
                    self._average()
        except BaseException as error:  # carried over to the loop's thread, which raises it in `wait`
            self._failure = error

    @torch.no_grad()
    def _average(self) -> None:
        weight = np.float32(1 - self.decay)
        for name, average in self.tensors.items():
            old = average.view(-1).numpy()
            new = self._parameters[name].detach().to("cpu", torch.float32).reshape(-1).numpy()
            for begin in range(0, old.size, _BLOCK):
                piece = old[begin : begin + _BLOCK]
                difference = self._scratch[: piece.size]
                np.subtract(new[begin : begin + _BLOCK], piece, out=difference)
                np.multiply(difference, weight, out=difference)
                np.add(piece, difference, out=piece)


def _record_event(parameters: Mapping[str, Tensor]) -> "torch.cuda.Event | None":
    """A mark behind the optimizer's kernels, so that the copies wait for them; None on the CPU, where they are done."""
    device = next(iter(parameters.values())).device
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
