"""One file that is measured in a process of its own: ``python -m kd_det.deploy.worker``.

It reads requests from its input, a JSON object a line, and answers each likewise: ``load`` opens a file, ``run`` times
some runs, ``count`` counts multiplications. Between them it waits, and uses no processor. It ends with its input.
"""
from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from kd_det.config import ConfigurationError
from kd_det.deploy.runtime import OPENVINO, ModelInfo, open_model

WARM_UP = 3  # runs after loading that do not count; runtimes settle on their buffers there


class Runner:
    """A file that is open, with an image of noise to run it on.

    Args:
        file: ``.onnx``, ``.xml``; or for PyTorch a plain student's checkpoint with its config beside it.
        runtime: ``'onnxruntime'``, ``'openvino'`` or ``'torch'``.
        threads: How many it may use.
        size: Height and width of the image, where the file leaves them open.

    Raises:
        ConfigurationError: It can not be run, or takes another size, or its size is not known.
    """

    def __init__(self, file: str, runtime: str, threads: int, size: list[int] | None) -> None:
        self.file, self.runtime = Path(file), runtime
        given = (size[0], size[1]) if size else None
        _import_runtime(runtime)
        self.memory = dict(before=read_memory()['VmRSS'])
        if runtime == 'torch':
            self.size, channels, self._run = _open_student(self.file, threads, given)
            self.precision, dtype = 'float32', 'uint8'
        else:
            model = open_model(self.file, runtime, threads)
            self.size, self.precision = find_image_size(model.info, self.file, given), model.info.precision
            channels, dtype, self._run = len(model.info.mean), model.info.dtype, model
        noise = np.random.default_rng(0).integers(0, 256, (1, channels, *self.size))
        self.image = noise.astype(dtype)
        gc.collect()
        self.memory['loaded'] = read_memory()['VmRSS']
        self.time(WARM_UP)

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON can hold it."""
        parts = [self.file, self.file.with_suffix('.bin')] if self.file.suffix == OPENVINO else [self.file]
        return dict(size=self.size, precision=self.precision, bytes=sum(part.stat().st_size for part in parts))

    def time(self, runs: int) -> list[float]:
        """Milliseconds of each of so many runs."""
        found = []
        for _ in range(runs):
            start = perf_counter()
            self._run(self.image)
            found.append(1000 * (perf_counter() - start))
        return found

    def measure_memory(self) -> dict[str, int | None]:
        """Bytes of this process: before the file was opened, after that, and at most until now."""
        return dict(self.memory, peak=read_memory()['VmHWM'])

    def count(self) -> int:
        """Multiplications, each with its addition, of one run: of convolutions and matrix products."""
        if self.runtime == 'torch':
            from torch.utils.flop_counter import FlopCounterMode
            with FlopCounterMode(display=False) as counter:
                self._run(self.image)
            return counter.get_total_flops() // 2
        return (count_onnx if self.runtime == 'onnxruntime' else count_openvino)(self.file, self.image)


def find_image_size(info: ModelInfo, file: Path, given: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the image that a file is measured on.

    Raises:
        ConfigurationError: It takes another one than is given, or any, and nothing says which.
    """
    if info.size and given and info.size != given:
        raise ConfigurationError(f"'{file}' takes images of {info.size[0]} × {info.size[1]}: leave --size out, or "
                                 'export it with --dynamic size.')
    size = info.size or given or info.resize
    if size is None:
        raise ConfigurationError(f"'{file}' takes images of any size: give --size HEIGHT WIDTH.")
    return size


def read_memory() -> dict[str, int | None]:
    """Bytes of this process that are in memory, ``VmRSS``, and the most that were, ``VmHWM``; None but on Linux.

    ``getrusage`` would tell what the process had before it became this program, too.
    """
    found: dict[str, int | None] = dict(VmRSS=None, VmHWM=None)
    try:
        lines = Path('/proc/self/status').read_text(encoding='ascii', errors='replace').splitlines()
    except OSError:
        return found
    for line in lines:
        key, _, value = line.partition(':')
        if key in found:
            found[key] = 1024 * int(value.split()[0])
    return found


def _import_runtime(runtime: str) -> None:
    """Imports what runs files, so that its memory is not taken for theirs."""
    if runtime == 'onnxruntime':
        import onnxruntime  # noqa: F401
    elif runtime == 'openvino':
        import openvino  # noqa: F401
    else:
        import kd_det.deploy.checkpoint
        import kd_det.deploy.export
        import kd_det.registry
        kd_det.registry.enter_scope('mmdet')


def _open_student(file: Path, threads: int, size: tuple[int, int] | None
                  ) -> tuple[tuple[int, int], int, Callable[[np.ndarray], Any]]:
    """A plain student as a graph that PyTorch runs: the size of its image, the number of channels, and the function."""
    import torch

    from kd_det.config.options import resolve_config
    from kd_det.deploy.checking import build_dataset
    from kd_det.deploy.checkpoint import load_student
    from kd_det.deploy.export import find_size
    from kd_det.deploy.graph import DetectorGraph
    plain, detector, _ = load_student(resolve_config(file.with_suffix('.py')), file)
    torch.set_num_threads(threads)
    graph = DetectorGraph(detector)
    size = size or find_size(plain, graph.divisor, build_dataset(plain))

    @torch.inference_mode()
    def run(image: np.ndarray) -> Any:
        return graph(torch.from_numpy(image))

    return size, graph.image_channels, run


def multiply(kind: str, first: Iterable[int], second: Iterable[int], out: Iterable[int], transposed: bool = False
             ) -> int:
    """Multiplications of an operator.

    Args:
        kind: ``'convolution'``, ``'transposed convolution'`` or ``'product'``.
        first: Shape of its first input.
        second: Of the other: a convolution's weight, without what makes groups.
        out: Of its output.
        transposed: The first matrix of a product is.
    """
    first, second, out = list(map(int, first)), list(map(int, second)), list(map(int, out))
    if kind == 'convolution':  # of each cell of the output
        return int(np.prod(out, dtype=np.int64) * np.prod(second[1:], dtype=np.int64))
    if kind == 'transposed convolution':  # of each cell of the input
        return int(np.prod(first, dtype=np.int64) * np.prod(second[1:], dtype=np.int64))
    return int(np.prod(out, dtype=np.int64) * (first[-2 if transposed else -1] if first else 1))


def count_onnx(file: Path, image: np.ndarray) -> int:
    """See :meth:`Runner.count`; shapes are those of a run, for parts of a graph depend on what it finds."""
    import onnx
    import onnxruntime
    kinds = dict(Conv='convolution', ConvTranspose='transposed convolution', Gemm='product', MatMul='product')
    model = onnx.load(file)
    nodes = [node for node in model.graph.node if node.op_type in kinds]
    names = {name for node in nodes for name in (*node.input[:2], node.output[0])}
    shapes = {name: f'shape {index}' for index, name in enumerate(sorted(names))}
    for name, shape in shapes.items():
        model.graph.node.append(onnx.helper.make_node('Shape', [name], [shape]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(shape, onnx.TensorProto.INT64, [None]))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    found = dict(zip(shapes, session.run(list(shapes.values()), {session.get_inputs()[0].name: image})))
    return sum(multiply(kinds[node.op_type], found[node.input[0]], found[node.input[1]], found[node.output[0]],
                        any(each.name == 'transA' and each.i for each in node.attribute)) for node in nodes)


def count_openvino(file: Path, image: np.ndarray) -> int:
    """See :func:`count_onnx`."""
    import openvino
    from openvino import opset8
    kinds = dict(Convolution='convolution', GroupConvolution='convolution',
                 ConvolutionBackpropData='transposed convolution',
                 GroupConvolutionBackpropData='transposed convolution', MatMul='product')
    core = openvino.Core()
    model = core.read_model(file)
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() in kinds]
    shapes = [opset8.shape_of(place) for node in nodes
              for place in (node.input_value(0), node.input_value(1), node.output(0))]
    model.add_results([opset8.result(shape) for shape in shapes])
    results = list(core.compile_model(model, 'CPU').create_infer_request().infer([image]).values())[-len(shapes):]
    total = 0
    for node, first, second, out in zip(nodes, results[::3], results[1::3], results[2::3]):
        kind = node.get_type_name()
        weight = second[1:] if kind.startswith('Group') else second  # the number of groups stands before
        total += multiply(kinds[kind], first, weight, out, kind == 'MatMul' and node.get_attributes()['transpose_a'])
    return total


def main() -> int:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), 'w', encoding='utf-8')
    os.dup2(2, 1)  # what libraries print is no answer
    runner = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request['do'] == 'load':
                runner = Runner(*(request[key] for key in ('file', 'runtime', 'threads', 'size')))
                answer = runner.describe()
            elif request['do'] == 'run':
                answer = dict(times=runner.time(request['runs'] + 1)[1:])  # caches hold what ran last
            else:
                answer = dict(memory=runner.measure_memory(), macs=runner.count())
        except (ConfigurationError, ModuleNotFoundError) as error:
            answer = dict(error=str(error), lacks=getattr(error, 'name', None))
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
