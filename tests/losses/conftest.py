"""Pairs for the terms that compare outputs of heads."""
import copy

import pytest
import torch


@pytest.fixture
def parts_of(batch):
    """Runs one training step of a distiller; returns the parts of its only term, and its loss with the gradient."""

    def run(model, data=None):
        data = model.data_preprocessor(copy.deepcopy(data or batch()), True)
        losses = model.loss(**data)
        name, = model.terms
        return {key[len(f'distill/{name}_'):]: value for key, value in losses.items() if key.startswith('distill/')}, \
            losses[f'loss_{name}']

    return run


@pytest.fixture
def pupil_of_itself(distiller):
    """Makes a distiller whose student has the teacher's weights and BatchNorm statistics, and computes as it does."""

    def make(config: dict, **term):
        model = distiller(config, config, distill=dict(term=term))
        state = model.student.state_dict()
        model.build_teachers()[0].model.load_state_dict({key: value.clone() for key, value in state.items()})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return model

    return make
