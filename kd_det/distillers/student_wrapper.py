"""A module that looks like the student within it, and holds the distillation terms beside it."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmengine.model import BaseModel
from torch import Tensor, nn

from kd_det.distillers.quantization import Quantizer

# The only children that a plain student lacks.
TERMS, QUANTIZER, PEERS, GUIDES = OWN = 'distill_terms', 'distill_quantizer', 'distill_peers', 'distill_guides'


class StudentWrapper(BaseModel):
    """Shows a detector's children, parameters, buffers and attributes as its own, under the same names.

    The terms are one child more, and so are a quantizer, further learners and what of guides learns, because optimizer
    and data-parallel training must see their weights; ``state_dict`` leaves them out. Prediction is the detector's own,
    but within :meth:`predicting_as`.

    Args:
        detector: The student.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__(data_preprocessor=detector.data_preprocessor)
        self.__dict__['student'] = detector  # past nn.Module.__setattr__: its weights are registered only once
        self.__dict__['predictor'] = None
        self._parameters, self._buffers = detector._parameters, detector._buffers
        self._non_persistent_buffers_set = detector._non_persistent_buffers_set
        self._modules.update(detector._modules)
        self._modules[TERMS] = nn.ModuleDict()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if 'student' not in self.__dict__:
                raise
            return getattr(self.__dict__['student'], name)

    @property
    def terms(self) -> nn.ModuleDict:
        """The distillation terms by name; those with a weight."""
        return self._modules[TERMS]

    @property
    def quantizer(self) -> Quantizer | None:
        """What rounds the student's weights and activations; None where it is trained as float."""
        return self._modules.get(QUANTIZER)

    @property
    def peers(self) -> list[nn.Module]:
        """The learners beside the student, plain detectors."""
        return list(self._modules.get(PEERS, ()))

    @property
    def learning_guides(self) -> nn.ModuleDict:
        """What of guides learns, by the index of the guide."""
        return self._modules.get(GUIDES, nn.ModuleDict())

    @contextmanager
    def predicting_as(self, predictor: Callable) -> Iterator[None]:
        """Within, another detector predicts in the student's place: a peer, or an ensemble."""
        self.__dict__['predictor'] = predictor
        try:
            yield
        finally:
            self.__dict__['predictor'] = None

    def train(self, mode: bool = True) -> StudentWrapper:
        self.training = mode
        self.student.train(mode)
        for own in (TERMS, PEERS, GUIDES):
            if own in self._modules:
                self._modules[own].train(mode)
        if self.quantizer is not None:
            self.quantizer.train(mode)
            self.quantizer.freeze_statistics()
        return self

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'):
        """As the student's; only ``mode='loss'`` distils."""
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        return (self.predictor or self.student)(inputs, data_samples, mode=mode)

    def state_dict(self, *args, destination=None, prefix: str = '', keep_vars: bool = False):
        """The plain student's state dict."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for entries in (state, getattr(state, '_metadata', {})):
            for key in [key for key in entries if f'{key}.'.startswith(tuple(f'{prefix}{own}.' for own in OWN))]:
                del entries[key]
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # A plain student's weights are complete: what is stored apart keeps its own.
        for own in filter(self._modules.get, OWN):
            for key, value in self._modules[own].state_dict(prefix=f'{prefix}{own}.').items():
                state_dict.setdefault(key, value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
