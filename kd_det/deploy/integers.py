"""Integers in an exported file: those that a student was trained for, or those that calibration finds."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mmengine.config import Config
from torch import nn

from kd_det.config import ConfigurationError
from kd_det.config.files import find_quantization
from kd_det.deploy.runtime import SECTION
from kd_det.training.runs import restore_quantizer

if TYPE_CHECKING:
    import onnx

LARGEST = 2**31 - 1  # of the integers of biases


def quantize_as_trained(config: Config, checkpoint: str | Path, detector: nn.Module) -> bool:
    """Lets a student compute in integers, where it was trained to, see :func:`~kd_det.training.runs.restore_quantizer`.

    Args:
        config: Of the run that wrote the checkpoint.
        checkpoint: A file.
        detector: The plain student with its weights, in eval mode; changed where ``model.quantize`` says so.

    Returns:
        Whether it does.

    Raises:
        ConfigurationError: No runtime computes with so few bits, or the checkpoint has no ranges.
    """
    settings = find_quantization(config)
    if settings is None:
        return False
    if settings.get('bits', 8) != 8:
        raise ConfigurationError(f"model.quantize.bits={settings['bits']} is a simulation: no runtime computes with so "
                                 'few. For the float student: --cfg-options model.quantize=None.')
    if not restore_quantizer(settings, checkpoint, detector):
        raise ConfigurationError(f"'{checkpoint}' holds no ranges: it was not trained with model.quantize. For the "
                                 'float student: --cfg-options model.quantize=None.')
    return True


def store_integers(file: Path) -> None:
    """Has a graph hold the integers of what it would round when it is loaded: weights of 8 bits, biases of 32.

    An exporter writes a rounded weight as float with QuantizeLinear and DequantizeLinear behind it, and leaves a bias
    float, though runtimes fuse a layer into one of integers only with a bias of integers.

    Args:
        file: Changed.
    """
    import onnx
    from onnx import helper, numpy_helper
    model = onnx.load(file)
    graph, constants = model.graph, {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in list(graph.node):
        value = _compute_constant(node, constants)
        if value is not None:
            constants[node.output[0]] = value
            graph.node.remove(node)

    outer = {name for node in graph.node for each in node.attribute if each.HasField('g')
             for inner in each.g.node for name in inner.input}  # what a branch of the graph reads from outside of it
    kept = {name: constants[name] for name in outer & constants.keys()}

    def keep(array: np.ndarray) -> str:
        """The name of a constant; of equal ones, as of a layer that runs on every level, the same."""
        content = array.dtype.str.encode() + str(array.shape).encode() + array.tobytes()
        name = f'constant_{hashlib.sha256(content).hexdigest()[:16]}'
        kept[name] = constants[name] = array
        return name

    names: dict[str, str] = {}
    for node in list(graph.node):
        for index, name in enumerate(node.input):
            if name in constants:
                node.input[index] = names[name] = names.get(name) or keep(constants[name])
    for node in [each for each in graph.node if each.op_type == 'QuantizeLinear' and each.input[0] in constants]:
        names[node.output[0]] = keep(_quantize(node, *(constants[name] for name in node.input)))
        graph.node.remove(node)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)

    makers = {name: node for node in graph.node for name in node.output}
    biases: dict[tuple[str, ...], Any] = {}
    for node in graph.node:
        scales = [makers[name].input[1] for name in node.input[:2] if name in makers
                  and makers[name].op_type == 'DequantizeLinear'] if node.op_type in ('Conv', 'Gemm') else []
        if len(scales) < 2 or len(node.input) < 3 or node.input[2] not in constants:
            continue
        scale = np.asarray(constants[scales[0]] * constants[scales[1]], np.float32)
        bias = np.clip(np.round(constants[node.input[2]] / scale.astype(np.float64)), -LARGEST, LARGEST)
        inputs = (keep(bias.astype(np.int32)), keep(scale), keep(np.zeros(scale.shape, np.int32)))
        if inputs not in biases:
            biases[inputs] = helper.make_node('DequantizeLinear', inputs, [f'{inputs[0]}_{inputs[1]}'], axis=0)
        node.input[2] = biases[inputs].output[0]
    nodes = [*biases.values(), *graph.node]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input} | {each.name for each in graph.output} | outer
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in kept.items() if name in used)
    onnx.save(model, file)


def _compute_constant(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> np.ndarray | None:
    """What a node puts out that reads nothing but constants; of the few kinds that stand before rounding."""
    from onnx import helper, numpy_helper
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    if node.op_type == 'Constant' and 'value' in attributes:
        return numpy_helper.to_array(attributes['value'])
    if node.op_type not in ('Identity', 'Cast') or node.input[0] not in constants:
        return None
    value = constants[node.input[0]]
    return value if node.op_type == 'Identity' else value.astype(helper.tensor_dtype_to_np_dtype(attributes['to']))


def _quantize(node: onnx.NodeProto, values: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """The integers that a QuantizeLinear makes of constants."""
    axis = next((each.i for each in node.attribute if each.name == 'axis'), 1)
    shape = [-1 if index == axis and scale.ndim else 1 for index in range(values.ndim)]
    limits = np.iinfo(zero.dtype)
    integers = np.round(values / scale.reshape(shape)) + zero.reshape(shape)
    return np.clip(integers, limits.min, limits.max).astype(zero.dtype)


def copy_metadata(source: Path, target: Path, **changes: Any) -> None:
    """Lets a file say of itself what another does, but for some fields."""
    import onnx
    model, said = onnx.load(target), onnx.load(source)
    del model.metadata_props[:]
    for each in said.metadata_props:
        entry = model.metadata_props.add()
        entry.key, entry.value = each.key, each.value
        name = each.key.removeprefix(f'{SECTION}.')
        if name in changes:
            entry.value = json.dumps(changes[name])
    model.producer_name, model.producer_version = said.producer_name, said.producer_version
    onnx.save(model, target)
