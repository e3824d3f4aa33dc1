"""vLLM's own hidden-states connector without CUDA, for servers on a CPU: same files, same names, same locks.

Imported by the server's process, never by ours. vLLM's copies through a CUDA stream; here the copy is a plain one.
"""

from pathlib import Path

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as example


class _Done:
    """An event that has happened."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class CpuHiddenStatesConnector(example.ExampleHiddenStatesConnector):
    """``ExampleHiddenStatesConnector`` of vLLM 0.32, its asynchronous copy replaced."""

    def _submit_async_write(self, pending: example.PendingSave) -> None:
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        inside = torch.arange(self._block_size)
        slots = (inside.reshape(1, -1) + blocks.reshape(-1, 1) * self._block_size).flatten()
        hidden = example.extract_from_kv_cache(self._kv_cache, slots, pending.token_ids.shape[0]).clone()
        Path(pending.filename).parent.mkdir(parents=True, exist_ok=True)
        tensors = {"hidden_states": hidden, "token_ids": pending.token_ids.clone()}
        lock = self._lock_fds.pop(pending.req_id, None)
        self._req_copy_events[pending.req_id] = _Done()
        future = self._executor.submit(self._write_tensors, tensors, _Done(), pending.filename, lock)
        self._req_futures[pending.req_id] = future
        future.add_done_callback(lambda done: self._on_write_done(pending.req_id, done))
