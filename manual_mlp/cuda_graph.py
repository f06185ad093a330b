"""Launch calls on fixed memory: on CUDA as one graph, elsewhere one by one."""

from collections.abc import Callable

import torch


class Launch:
    """Calls on fixed memory. On CUDA the first call runs them, the second captures them, the later ones replay.

    `calls` must keep the rules of torch.cuda.graph: it reads and writes tensors that stay where they are, takes every
    number that changes from one of them, and asks the device for nothing. The first call is the warm-up. It runs on the
    capture's stream, where the libraries then make their handles and workspaces. It is a real call, so no step is done
    twice. Dropout draws from the device's default generator, which every capture registers. Each graph has its own pool
    of memory. "thread_local": CUDA calls in other threads, such as a DataLoader that pins memory, are no error.
    """

    def __init__(self, calls: Callable[[], None], device: torch.device) -> None:
        self.calls, self.device = calls, device
        self.stream: torch.cuda.Stream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif self.device.type != "cuda":
            self.calls()
        elif self.stream is None:
            self._warm_up()
        else:
            graph = torch.cuda.CUDAGraph()
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                self.calls()
            self.graph = graph
            graph.replay()

    def _warm_up(self) -> None:
        self.stream = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.calls()
        current.wait_stream(self.stream)
