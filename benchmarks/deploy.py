"""What is left of a student on the way to a device: in integers, with half its operations, in four bits.

Usage: python -m benchmarks.deploy STUDENT TEACHER CHECKPOINT [--seeds 0 1 2] [--method fgd] [--json FILE]

Each student is distilled, and then quantised after training, and in a training with and without distillation; pruned,
and then fine-tuned or distilled; trained in four bits, with and without distillation. Integers of eight bits are
measured on the exported file, run by onnxruntime, four bits in PyTorch's simulation. What is finished in the work dir
is not done again.
"""
from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from kd_det import distill, evaluate, export, prune, quantize, train
from kd_det.compat.writing import write_whole
from kd_det.config.files import load_config, student_config
from kd_det.study.results import paired_difference

MAP = 'coco/bbox_mAP'
COMPARED = (('int8 after training', 'float'), ('int8 aware', 'float'), ('int8 aware, distilled', 'float'),
            ('int8 aware, distilled', 'int8 after training'), ('int8 aware, distilled', 'int8 aware'),
            ('pruned, distilled', 'pruned, fine-tuned'), ('pruned, distilled', 'float'),
            ('4 bits, distilled', '4 bits'), ('4 bits, distilled', 'float'))


PARTS = ('int8', 'pruned', '4 bits')


class Seed:
    """All that is made of one student.

    Args:
        options: Of the command line.
        number: The seed.
    """

    def __init__(self, options: Namespace, number: int) -> None:
        self.options, self.number, self.folder = options, number, options.work_dir / f'seed{number}'
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / 'record.json'
        self.record = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def once(self, name: str, make: Callable[[], dict]) -> dict:
        """What a step leaves: paths, sizes and mAP in points."""
        if name not in self.record:
            print(f'seed {self.number}: {name}', flush=True)
            self.record[name] = make()
            write_whole(self.file, json.dumps(self.record, indent=1))
        return self.record[name]

    def test(self, config: str, file: Path) -> float:
        found = evaluate(config, file, work_dir=self.folder / f'{file.stem}_test').metrics
        return 100 * found.get(MAP, 0.0)  # the metric has none where nothing is found

    def train(self, name: str, make: Callable[..., object], **settings: object) -> dict:
        """A training, and the mAP at its end as it was validated."""
        run = make(work_dir=self.folder / name.replace(', ', '_').replace(' ', '_'), seed=self.number, check_images=0,
                   **settings)
        return dict(config=str(run.config), checkpoint=str(run.checkpoint), map=100 * run.metrics[MAP])

    def export(self, name: str, trained: dict) -> dict:
        file = self.folder / f'{name}.onnx'
        exported = export(trained['config'], trained['checkpoint'], file, images=self.options.images, force=True)
        return dict(map=self.test(trained['config'], file), bytes=exported.bytes,
                    expected_map=exported.comparison.expected_map, exported_map=exported.comparison.map)

    def distil(self, name: str, student: object, method: str, **settings: object) -> dict:
        return self.train(name, distill, student=student, teacher=self.options.teacher,
                          checkpoint=self.options.checkpoint, method=method,
                          **{'inherit': (), **settings})

    def pair(self, name: str) -> list[tuple[str, str]]:
        """The names of a training without distillation and of one with it, and their methods."""
        return [(name, 'none'), (f'{name}, distilled', self.options.method)]

    def run(self) -> None:
        """Does all that is not yet done."""
        options, data = self.options, dict(data_root=self.options.data_root)
        float_ = self.once('float, training', lambda: self.distil(
            'float', options.student, options.method, inherit='auto', epochs=options.epochs, **data))
        self.once('float', lambda: self.export('float', float_))
        plain = student_config(load_config(float_['config']))
        rate = plain.optim_wrapper.optimizer.lr

        def learn(bits: int, method: str, epochs: int) -> dict:
            return self.distil(f'{bits}_{method}', plain, method, quantize=bits, epochs=epochs, options={
                'load_from': float_['checkpoint'], 'optim_wrapper.optimizer.lr': rate * options.learning_rate})

        def calibrate() -> dict:
            file = self.folder / 'calibrated.onnx'
            quantized = quantize(float_['config'], float_['checkpoint'], file, calibrate=options.calibrate, force=True)
            return dict(map=self.test(float_['config'], file), bytes=quantized.bytes,
                        ranges=quantized.chosen.ranges, float_predictors=quantized.chosen.float_predictors)

        if 'int8' in options.parts:
            self.once('int8 after training', calibrate)
        for name, method in self.pair('int8 aware') if 'int8' in options.parts else ():
            trained = self.once(f'{name}, training', lambda method=method: learn(8, method, options.quantized_epochs))
            self.once(name, lambda method=method, trained=trained: self.export(f'int8_{method}', trained))

        def cut() -> dict:
            made = prune(float_['config'], float_['checkpoint'], self.folder / 'pruned.pth', options.macs,
                         importance=options.importance, seed=self.number, evaluation=False, force=True)
            before, after = made.macs
            return dict(config=str(made.config), checkpoint=str(made.checkpoint), share=after / before,
                        map=self.test(str(made.config), made.checkpoint))

        if 'pruned' in options.parts:
            pruned = self.once('pruned', cut)
            self.once('pruned, fine-tuned', lambda: self.train('tuned', train, config=pruned['config']))
            self.once('pruned, distilled', lambda: self.distil('pruned', pruned['config'], options.method))
        for name, method in self.pair('4 bits') if '4 bits' in options.parts else ():
            self.once(name, lambda method=method: learn(4, method, 2 * options.quantized_epochs))


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('student')
    parser.add_argument('teacher')
    parser.add_argument('checkpoint')
    parser.add_argument('--data-root')
    parser.add_argument('--method', default='fgd')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS,
                        help='what is done beside the float student')
    parser.add_argument('--epochs', type=int, help="of the float student and of pruned ones (the config's own)")
    parser.add_argument('--quantized-epochs', type=int, default=3, help='in eight bits, in four twice as many (3)')
    parser.add_argument('--learning-rate', type=float, default=0.1,
                        help="in integers, as a share of the config's (0.1)")
    parser.add_argument('--macs', type=float, default=0.5)
    parser.add_argument('--importance', default='taylor', help='by which channels are chosen (taylor)')
    parser.add_argument('--calibrate', type=int, default=64)
    parser.add_argument('--images', type=int, default=32, help='that exports are compared on')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/deploy'))
    parser.add_argument('--json', type=Path)
    options = parser.parse_args()
    seeds = [Seed(options, number) for number in options.seeds]
    for seed in seeds:
        seed.run()
    names = sorted(dict.fromkeys(name for seed in seeds for name in seed.record), key=lambda name: ', training' in name)
    values = {name: {seed.number: seed.record[name]['map'] for seed in seeds if name in seed.record} for name in names}
    for name, by_seed in values.items():
        print(f"{name:28}{'  '.join(f'{value:5.1f}' for value in by_seed.values())}")
    differences = []
    for name, baseline in COMPARED:
        found = paired_difference(values.get(baseline, {}), values.get(name, {}))
        if found is None:
            continue
        differences.append(dict(of=name, against=baseline, mean=found.mean, interval=found.interval))
        print(f'{name} against {baseline}: {found}')
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
                    if key not in ('work_dir', 'json', 'data_root', 'checkpoint')}
        kept = [{name: {key: value for key, value in each.items() if key not in ('config', 'checkpoint')}
                 for name, each in seed.record.items()} for seed in seeds]
        write_whole(options.json, json.dumps(dict(settings=settings, seeds=kept, differences=differences), indent=1))


if __name__ == '__main__':
    main()
