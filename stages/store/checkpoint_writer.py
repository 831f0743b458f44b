"""Write the checkpoints of a stage while it goes on training: the state is copied, and a thread writes the copy.

1. At most one checkpoint is on its way. The next one waits for it, before its state is copied.
2. Each rank writes its own part. The threads agree in a group of their own, so that no message of theirs meets one of
   training. The manifest comes last, from rank 0, when all parts are there: a checkpoint is whole or invisible.
3. What goes wrong in the thread is raised in the main thread: before the next update or checkpoint, or at the end.
4. A process that is killed loses the checkpoint on its way. The one before is there: it goes when this one is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from threading import Thread

import torch

from dmdr import distributed
from stages.store.checkpoints import Checkpoints
from stages.store.locks import AWAITED

Tensors = dict[str, torch.Tensor]


class CheckpointWriter:
    """Writes checkpoints in a thread. All ranks make one, and call the same methods for the same steps."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints, self._side = checkpoints, distributed.SideGroup()
        self._copy = Copy()
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def begin(
        self,
        step: int,
        tensors: Tensors,
        info: Mapping[str, object],
        *,
        apart: Collection[int] = (),
        then: Callable[[], object] = lambda: None,
    ) -> None:
        """Copy the tensors, then save them as `Checkpoints.save` does, and do `then`, while the caller goes on.

        info: nobody changes it any more.

        Raises:
            as `wait`, of the checkpoint before.
        """
        self.wait()
        self._copy.take(tensors)

        def write() -> None:
            try:
                copied = self._copy.read()
                self._checkpoints.save(step, copied, info, apart=apart, gather=self._side.all_gather)
                then()
            except BaseException as error:  # the main thread raises it
                self._error = error

        self._thread = Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises as `wait`, if a checkpoint could not be written; does not wait for one on its way."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint on its way is whole.

        Raises:
            StoreError: the store failed, here or on another rank.
            Stopped, ConfigError: another copy of the stage has taken over, or another run its address.
        """
        if self._thread is None:
            return
        with distributed.WAIT.behind(self._side):
            AWAITED.join(self._thread)
        error, self._thread, self._error = self._error, None, None
        self._copy.free()
        if error is not None:
            raise error


class Copy:
    """A copy of tensors in the memory of the host.

    Those of a GPU are copied into pinned memory, in order with what the GPU does before and after; the caller does not
    wait for it. Pinned memory takes long to get, so it is used again.
    """

    def __init__(self) -> None:
        self._tensors: Tensors = {}
        self._event: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, tensors: Tensors) -> None:
        """Copy the tensors as they are now."""
        before, self._tensors = self._tensors, {}
        for name, tensor in tensors.items():
            copy = before.pop(name, None)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._tensors[name] = copy.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensors:
        """The copied tensors, when all are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors

    def free(self) -> None:
        """Let go of the memory that is not pinned."""
        self._tensors = {name: copy for name, copy in self._tensors.items() if copy.is_pinned()}
