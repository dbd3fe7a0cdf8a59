"""Checkpoints of one process or several, written while training goes on.

The folder is the one that `recap_fast.training.checkpoint` describes, whatever the number of
processes: a Hugging Face model with the trainer's state in a folder inside. Every process writes
its own shards into the same files (`recap_fast.training.safetensors_writer`), and reads its own
back: a run resumes on another number of processes, and on one.

A save has three parts. Tensors are copied to the host, after which training may go on; a thread
writes them into a folder of a temporary name; and when all processes have theirs on the disk, the
first one renames it. A folder called step-* is therefore complete.

Nothing that is read back was pickled. What `torch.distributed.checkpoint` tells the other
processes of one run about a save (the plan, the errors) is, as all that torch's
`gather_object` sends: it comes from the run's own processes, and never from a file.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from recap_fast.model.folder import STATE, TENSORS, is_checkpoint
from recap_fast.model.lora import ADAPTER_SETTINGS, ADAPTERS_FILE
from recap_fast.model.saved_weights import saved_weights
from recap_fast.training.checkpoint import (
    CheckpointError,
    TrainerState,
    list_checkpoints,
    small_files,
)
from recap_fast.training.distributed import ALONE, World
from recap_fast.training.safetensors_writer import (
    Kind,
    SharedFilesWriter,
    flush,
    lay_out_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recap_fast.data.images import ImageEncoder

logger = logging.getLogger(__name__)

_MODEL, _TRAINER = "model/", "trainer/"


class CheckpointSaver:
    """Saves the checkpoints of a run into step-NNNNNN folders, one at a time.

    Every process calls every method, at the same step and in the same order.

    Args:
        folder: where the checkpoints go.
        model: what is trained, in shards or not.
        images: of a vision-language model; its processor's settings are part of the model.
        keep: how many checkpoints stay.
        world: the processes that save. One without FSDP writes before `start` returns: on a CPU
            its weights would be copied to where they are, and its cores are those that train.
        timeout: seconds that the processes wait for each other in a save.

    Raises:
        CheckpointError: checkpoints could not be written here.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageEncoder | None = None,
        *,
        keep: int,
        world: World = ALONE,
        timeout: float = 600.0,
    ) -> None:
        self._folder, self._model, self._keep, self._world = folder, model, keep, world
        self._files: dict[str, bytes] = {}
        # Now, because a tokenizer must not be used by the thread that writes.
        world.on_main(lambda: self._files.update(small_files(folder, model, tokenizer, images)))
        # Of its own, because the thread that saves and the one that trains exchange at once.
        self._group = None
        if world.mesh is not None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._timeout = timeout
        self._pending: tuple[Path, Future[Any]] | None = None
        self._written: Path | None = None

    def start(self, state: TrainerState) -> Path:
        """Waits for the save before, copies all tensors, and has them written. Returns the folder
        that will be there when `wait` has returned; nothing is done if it is there already.

        Args:
            state: a tensor under a name that several processes give is the same in all of them, or
                in shards.

        Raises:
            CheckpointError: the save before, or this one where it is not done in a thread, cannot
                be written.
        """
        self.wait()
        final = self._folder / f"step-{state.step:06d}"
        if final == self._written:
            return final
        tensors = {_MODEL + name: tensor for name, tensor in saved_weights(self._model).items()}
        tensors |= {_TRAINER + name: tensor for name, tensor in state.tensors.items()}
        save = _Save(final, self._files, state, self._keep)
        writer = SharedFilesWriter(save.staging, save.lay_out, save.finish)
        self._pending = final, self._begin(tensors, writer)
        if self._group is None:
            self.wait()
        return final

    def _begin(self, tensors: dict[str, Tensor], writer: SharedFilesWriter) -> Future[Any]:
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        if self._group is not None:
            future = dcp.async_save(
                tensors,
                storage_writer=writer,
                planner=planner,
                process_group=self._group,
            )
            assert isinstance(future, Future)
            return future
        future = Future()
        try:
            with _alone():
                dcp.save(tensors, storage_writer=writer, planner=planner, no_dist=True)
            future.set_result(None)
        except CheckpointException as error:
            future.set_exception(error)
        return future

    def wait(self, timeout: float | None = None) -> None:
        """Waits until the save under way, if any, is complete in all processes.

        Args:
            timeout: seconds to wait at most; the saver's by default.

        Raises:
            CheckpointError: it cannot be written, or is not yet after `timeout`; in all processes,
                with the same text. What was there before is there still.
        """
        if self._pending is None:
            return
        final, future = self._pending
        seconds = self._timeout if timeout is None else timeout
        late = wait_for([future], seconds).not_done
        # What one process alone has seen must not lead it another way than the rest.
        if self._world.any(bool(late)):
            raise _shared(f"{final}: not yet written after {seconds:g} s of waiting")
        self._pending = None
        error = future.exception()
        said = self._world.gather({}, None if error is None else _why(error, self._world))
        why = next((text for _, text in said if text is not None), None)
        if why is None:
            self._written = final
            return
        if self._world.is_main:
            shutil.rmtree(_staging(final), ignore_errors=True)
        raise _shared(f"{final}: cannot be written: {why}") from error

    def settle(self) -> None:
        """Like `wait`, if the save under way has ended in every process; else does nothing.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self._pending is not None and not self._world.any(not self._pending[1].done()):
            self.wait()

    def close(self) -> None:
        """Gives the save under way, if any, its time to end, and logs its error. The other
        processes need not be there any more."""
        if self._pending is not None:
            final, future = self._pending
            if wait_for([future], self._timeout).done and (error := future.exception()):
                why = _why(error, self._world)
                self._world.log_once(logger, logging.ERROR, f"{final}: cannot be written: {why}")


class _Save:
    """What the first process does for one checkpoint beside writing its shards."""

    def __init__(
        self, final: Path, files: Mapping[str, bytes], state: TrainerState, keep: int
    ) -> None:
        self._final, self._files, self._keep = final, files, keep
        self._content = json.dumps({"step": state.step, "data": state.data})
        self.staging = _staging(final)

    def lay_out(self, kinds: Mapping[str, Kind]) -> dict[str, tuple[str, str]]:
        """Makes the folder with its small files; see `SharedFilesWriter`."""
        for old in self._final.parent.glob(".step-*.tmp"):  # of a run that was killed as it saved
            shutil.rmtree(old, ignore_errors=True)
        (self.staging / STATE).parent.mkdir(parents=True)
        for name, data in self._files.items():
            (self.staging / name).parent.mkdir(exist_ok=True)
            (self.staging / name).write_bytes(data)
        weights = {
            key.removeprefix(_MODEL): kind for key, kind in kinds.items() if key.startswith(_MODEL)
        }
        if ADAPTER_SETTINGS in self._files:
            files = dict.fromkeys(weights, ADAPTERS_FILE)
        else:
            files = lay_out_weights(self.staging, weights)
        # The trainer's state is one file, which nothing uploads.
        state = [key.removeprefix(_TRAINER) for key in kinds if key.startswith(_TRAINER)]
        return {_MODEL + name: (file, name) for name, file in files.items()} | {
            _TRAINER + name: (str(TENSORS), name) for name in state
        }

    def finish(self) -> None:
        """Gives the folder its name, and removes the oldest checkpoints."""
        (self.staging / STATE).write_text(self._content, encoding="utf-8")
        flush([*self.staging.rglob("*"), self.staging])
        if is_checkpoint(self._final):  # of the very same step, by an earlier run
            shutil.rmtree(self.staging)
        else:
            os.replace(self.staging, self._final)
            flush([self._final.parent])
        for old in list_checkpoints(self._final.parent)[: -self._keep]:
            shutil.rmtree(old)


def _staging(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


@contextmanager
def _alone() -> Iterator[None]:
    """Without the warning of `torch.distributed.checkpoint` that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _shared(text: str) -> CheckpointError:
    """An error that every process raises."""
    error = CheckpointError(text)
    error.is_shared = True
    return error


def _why(error: BaseException, world: World) -> str:
    """The first error of a save, and the process that it happened in."""
    rank = world.rank
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items(), key=lambda item: item[0])
    if not isinstance(error, Exception):
        raise error  # Ctrl-C
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if world.size == 1 else f"rank {rank}: {text}"
