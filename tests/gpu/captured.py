"""A step as a CUDA graph."""

import torch


class Captured:
    """A step as a CUDA graph; on the CPU, run anew into the tensors of the first run."""

    def __init__(self, step, device: str):
        self.step, self.graph = step, None
        if device == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles what is not compiled: a capture may not
                step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.results = step()
        else:
            self.results = step()

    def replay(self) -> dict:
        if self.graph is not None:
            self.graph.replay()
        else:
            for name, result in self.step().items():
                self.results[name].copy_(result)
        return self.results
