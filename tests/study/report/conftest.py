"""A study as the first stage of a report hands it to the second, made up."""
import base64
import io

import numpy as np
import pytest
from PIL import Image

from kd_det.study.report.summary import state_differences, write_verdict
from kd_det.study.results import COSTS, METRICS, summarize, variant_rows
from kd_det.training.pictures import map_uri


def _photograph(random, width: int, height: int) -> str:
    """A JPEG about as large as a photograph's: smooth shapes and some noise."""
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    coarse = coarse.resize((width, height), Image.BICUBIC)
    noisy = np.clip(np.asarray(coarse) + random.normal(0, 6, (height, width, 1)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, 'JPEG', quality=80)
    return f'data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'


def entry(variant: str, seed: int, points: float) -> dict:
    """A finished run as results.json holds it."""
    return dict(variant=variant, seed=seed, status='finished', metrics={name: points / 100 for name in METRICS},
                parameters=10**6, flops=10**9, seconds_per_iteration=0.1, peak_memory=2**30, peak_device_memory=None)


@pytest.fixture
def synthetic_study():
    """Makes a study: three seeds of the plain student and of distilled ones, with boxes and maps on some images."""

    def make(images: int = 2, methods=('fgd', '<b>"kd" & co</b>'), width: int = 96, height: int = 64,
             name: str = 'made up') -> dict:
        random = np.random.default_rng(0)
        variants = ['none', *methods]
        entries = [entry(variant, seed, 30 + 4 * index + 0.5 * seed * index + seed)
                   for index, variant in enumerate(variants) for seed in range(3)]
        summary = summarize(entries)
        results = dict(teacher=None, runs=entries, summary=summary, fidelity={})
        curve = {epoch: float(epoch) for epoch in range(1, 9)}
        boxes = [[4.0, 4.0, 40.0, 30.0, 0, 0.9], [50.0, 10.0, 80.0, 60.0, 1, 0.4], [0.0, 0.0, 9.0, 9.0, 1, 0.1]]
        maps = [[dict(stride=stride, low=0.0, high=1.0,
                      source=map_uri(random.random((height // stride, width // stride))))
                 for stride in (4, 8, 16, 32)] for _ in range(4)]
        looks = dict(attention=maps[0], **{f'fgd: mask_{index}': each for index, each in enumerate(maps[1:])})
        return dict(
            name=name, plain='none', variants=variants, notes=['A note.'],
            verdict=write_verdict(state_differences(summary)), beyond='', lengths={},
            statements=[dict(each, beyond=None) for each in state_differences(summary)], fidelity={},
            provenance=dict(command='kd-det benchmark', versions=dict(torch='2')),
            table=dict(columns=['method', 'seeds', *METRICS.values(), 'Δ mAP', *COSTS], rows=variant_rows(results)),
            curves={'validation mAP': {variant: [curve, curve] for variant in variants}},
            terms={method: dict(task={'loss_cls': [curve]}, policy=dict(weights={}, score={}), terms=dict(
                fgd=dict(loss=[curve], parts={'relation': [curve]}, pull=[curve],
                         unweighted_pull=[curve]))) for method in methods},
            per_class={method: [dict(name='cat', ap=40.0, difference=2.0, interval=(1.0, 3.0), verdict='gain'),
                                dict(name='dog', ap=30.0, difference=-1.0, interval=None,
                                     verdict='one seed, no statement')]
                       for method in methods},
            precision={variant: {'50': np.linspace(1, 0, 101).tolist(), '75': np.linspace(1, 0, 101).tolist()}
                       for variant in ('teacher', *variants)},
            classes=('cat', 'dog'), palette=((220, 40, 60), (0, 130, 200)), validation_images=images,
            images=[dict(name=f'{index}.jpg', width=width, height=height, source=_photograph(random, width, height),
                         truth=[box[:5] for box in boxes[:2]],
                         boxes={variant: boxes for variant in ('teacher', *variants)})
                    for index in range(images)],
            maps={variant: [looks] * images for variant in ('teacher', *variants)})

    return make
