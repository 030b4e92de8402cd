"""The whole way from a teacher to a file on a device: distil, prune, distil, quantise with distillation, measure."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from mmengine.config import Config

from kd_det.compat.console import TextTable
from kd_det.compat.writing import locked_folder, write_whole
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Names, Parts, Positive, Ratio, Seed, Size, declared
from kd_det.config.choices import AUTO
from kd_det.config.files import load_config, student_config
from kd_det.config.options import resolve_config
from kd_det.deploy.checkpoint import load_student
from kd_det.deploy.export import export
from kd_det.deploy.latency import Latencies, measure_latency
from kd_det.deploy.pruning import ImportanceChoice, PartialShare, prune
from kd_det.deploy.quantization import quantize
from kd_det.study.chain import Chain, Run
from kd_det.study.identity import hash_model, hash_weights
from kd_det.study.report.page import COLOURS, Ink, apply_style, prepare_compression, render, render_svg
from kd_det.study.runs import read_json
from kd_det.training.runs import distill, evaluate

RECORD, PAGE, MAP = 'compression.json', 'report.html', 'coco/bbox_mAP'


@dataclass(frozen=True)
class Stage:
    """A detector on the way, and its file.

    Attributes:
        name: What was done last: ``'distilled'``, ``'pruned'``, ``'pruned, distilled'``, ``'quantised'`` (after
            training) or ``'quantised, distilled'``.
        config: Of the detector.
        checkpoint: Its weights.
        file: Its file, ``.onnx``, which was compared with it; on that all else is measured.
        parameters: How many it has.
        metrics: Of the file, by the config's own evaluator.
        agreement: The detector's mAP in points on the images on which it was compared, and the file's; None without
            validation data.
    """
    name: str
    config: Path
    checkpoint: Path
    file: Path
    parameters: int
    metrics: dict[str, float]
    agreement: tuple[float | None, float | None]

    def format_scores(self) -> list[str]:
        """Its mAP and AP50 in points; of nothing found the metric has none."""
        return [f'{100 * self.metrics.get(f"{MAP}{suffix}", 0.0):.1f}' for suffix in ('', '_50')]

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Stage:
        """Reads what :meth:`to_dict` made."""
        paths = {key: Path(values[key]) for key in ('config', 'checkpoint', 'file')}
        return cls(**{**values, **paths, 'agreement': tuple(values['agreement'])})


@dataclass(frozen=True)
class Compression:
    """What became of a student on the way to the device.

    Attributes:
        folder: Holds all of it, with ``report.html``.
        stages: The detectors, in order.
        latencies: Of their files, in each runtime, beside each other; None while it has not finished.
    """
    folder: Path
    stages: tuple[Stage, ...]
    latencies: Latencies | None

    @property
    def file(self) -> Path:
        """The last file, which goes to the device."""
        return self.stages[-1].file

    def tabulate(self) -> TextTable:
        """Makes a table with a row for each stage."""
        if self.latencies is None:
            return TextTable('Compressed', ('stage', 'mAP', 'AP50', 'M parameters'), [
                (stage.name, *stage.format_scores(), f'{stage.parameters / 1e6:.3f}') for stage in self.stages],
                'It has not finished: this is what has.')
        runtimes = self.runtimes
        measured = [(each, median(each.times)) for each in self.latencies.files]
        first = {runtime: next(time for each, time in measured if each.runtime == runtime) for runtime in runtimes}
        rows = []
        for stage in self.stages:
            own = {each.runtime: (each, time) for each, time in measured if each.file == stage.file}
            found, _ = next(iter(own.values()))
            rows.append((stage.name, *stage.format_scores(), f'{found.macs / 1e9:.3f}',
                         f'{stage.parameters / 1e6:.3f}', f'{found.bytes / 2**20:.2f}',
                         *(f'{own[runtime][1]:.2f} ({own[runtime][1] / first[runtime]:.2f})' for runtime in runtimes)))
        threads = self.latencies.threads
        return TextTable('Compressed', ('stage', 'mAP', 'AP50', 'GMACs', 'M parameters', 'MiB',
                                        *(f'ms, {runtime}' for runtime in runtimes)), rows,
                         f"Of each file; {threads} thread{'s' if threads > 1 else ''}, {self.latencies.processor}. "
                         'In brackets: the share of the first one.')

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        return dict(folder=str(self.folder), stages=[stage.to_dict() for stage in self.stages],
                    latencies=self.latencies and self.latencies.to_dict())

    def _repr_html_(self) -> str:
        return self.tabulate().to_html()

    @property
    def runtimes(self) -> list[str]:
        """In which latency was measured."""
        return list(dict.fromkeys(each.runtime for each in self.latencies.files)) if self.latencies else []

    def prepare_page(self) -> dict[str, Any]:
        """What a page shows of it, see :func:`~kd_det.study.report.page.render`."""
        return prepare_compression(self.folder.resolve().name, self.tabulate(), _plot(self) if self.latencies else '')


def is_compression(folder: Path) -> bool:
    """Whether a folder is one of :func:`compress`."""
    return (folder / RECORD).is_file()


def read_compression(folder: Path) -> Compression:
    """Reads what :func:`compress` left, be it finished or not.

    Raises:
        ConfigurationError: The record can not be read.
    """
    record = read_json(folder / RECORD)
    try:
        stages = tuple(map(Stage.from_dict, record['stages'].values()))
        latencies = Latencies.from_dict(record['latencies']) if 'latencies' in record else None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"'{folder / RECORD}' can not be read: it is not as kd-det compress writes it "
                                 f'({type(error).__name__}: {error}).') from error
    if not stages:
        raise ConfigurationError(f"'{folder}': no stage of the compression has finished.")
    measured = {each.file for each in latencies.files} if latencies else set()
    return Compression(folder, stages, latencies if all(stage.file in measured for stage in stages) else None)


@declared
def compress(student: str | Path | Config, teacher: str | Path, checkpoint: str | Path, out: str | Path, *,
             method: str = 'fgd', macs: PartialShare | None = None, importance: ImportanceChoice = AUTO,
             int8: bool = False, epochs: Count | None = None, quantized_epochs: Count | None = None,
             learning_rate: Positive = 0.1, calibrate: Count = 64, inherit: Parts = 'auto',
             balance: Ratio | None = None, seed: Seed = 0, size: Size | None = None,
             runtimes: Names = ('onnxruntime', 'openvino'), threads: Count = 1, runs: Count = 50,
             data_root: str | None = None, options: dict[str, Any] | None = None, log: Callable[[str], None] = print
             ) -> Compression:
    """Goes the whole way from a teacher to a file on a device, and measures each stage on its own file.

    The student is distilled; with ``macs`` it is pruned to that share of its operations and distilled again; with
    ``int8`` it is quantised after training, and beside that trained as it computes in integers, with distillation. A
    stage that is finished is not done again, and a training that was ended goes on.

    Args:
        student: The student's config, as :func:`~kd_det.training.runs.distill` takes it.
        teacher: The teacher's config.
        checkpoint: The teacher's weights.
        out: The folder for all of it.
        method: By which it is distilled, each time.
        macs: The share of multiply-accumulate operations that pruning leaves.
        importance: Which channels it takes first, see :func:`~kd_det.deploy.pruning.prune`.
        int8: Quantise.
        epochs: Of each distillation of the float student; the config's own by default.
        quantized_epochs: Of that in integers; a quarter of the others by default.
        learning_rate: Of that, as a share of the config's.
        calibrate: Images on which ranges of activations are found, where they are found after training.
        inherit: What the student starts from, see :func:`~kd_det.training.runs.distill`.
        balance: See there.
        seed: Of all trainings.
        size: Height and width of the image of the files; by default such that every image of the test pipeline fits.
        runtimes: In which latencies are measured.
        threads: How many each may use there.
        runs: Of each file that count.
        data_root: Folder of the data, in place of the config's.
        options: Settings that override the config of each distillation, by dotted key.
        log: Given a line on what is being done.

    Raises:
        ConfigurationError: See the functions of each stage.
        WritingError: The folder holds a compression of other settings.
    """
    out, config, options = Path(out), resolve_config(student, data_root), options or {}
    optimizer = config.optim_wrapper.optimizer
    if int8 and not (config.train_cfg.get('max_epochs') and optimizer.get('lr')):
        raise ConfigurationError('int8: a training in integers takes a share of the epochs and of the learning rate of '
                                 "the student's config: expected train_cfg.max_epochs and optim_wrapper.optimizer.lr.")
    teaching = dict(teacher=teacher, checkpoint=checkpoint, method=method, seed=seed, balance=balance)
    settings = dict(student=config.pretty_text, macs=macs, importance=importance, int8=int8, epochs=epochs,
                    quantized_epochs=quantized_epochs, learning_rate=learning_rate, calibrate=calibrate,
                    inherit=inherit, size=size, options=options,
                    **{**teaching, 'teacher': hash_model(teacher), 'checkpoint': hash_weights(str(checkpoint))})
    with locked_folder(out):
        chain = _Compressing(out, settings, size, log)
        run = chain.distill('distilled', config, inherit=inherit, epochs=epochs, options=options, **teaching)
        chain.measure('distilled', run)
        if macs is not None:
            pruned = chain.once('pruned', lambda: chain.prune(*run, macs, importance, seed))
            chain.measure('pruned', pruned)
            run = chain.distill('pruned, distilled', load_config(pruned[0]), inherit=(), epochs=epochs,
                                options=options, **teaching)
            chain.measure('pruned, distilled', run)
        if int8:
            chain.measure('quantised', run, partial(quantize, calibrate=calibrate))
            trained = load_config(run[0])
            rate = trained.optim_wrapper.optimizer.lr * learning_rate
            count = quantized_epochs or max(1, round(trained.train_cfg.max_epochs / 4))
            run = chain.distill('quantised, distilled', student_config(trained), inherit=(), quantize=8, epochs=count,
                                options={**options, 'load_from': str(run[1]), 'optim_wrapper.optimizer.lr': rate},
                                **teaching)
            chain.measure('quantised, distilled', run)
        stages = tuple(chain.stages.values())
        log('latencies …')
        latencies = measure_latency([stage.file for stage in stages], runtimes=runtimes, threads=threads, runs=runs)
        result = Compression(out, stages, latencies)
        chain.record['latencies'] = latencies.to_dict()
        chain.save()
        write_whole(out / PAGE, render([], [result.prepare_page()]))
    return result


class _Compressing(Chain):
    """What is finished of a compression.

    Args:
        out: The folder.
        settings: All that the result depends on.
        size: Of the files' image.
        log: Given a line on what is being done.

    Raises:
        WritingError: The folder holds a compression of other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any], size: tuple[int, int] | None, log: Callable[[str], None]
                 ) -> None:
        super().__init__(out, RECORD, settings, 'a compression', log)
        self.size = size
        self.stages = {name: Stage.from_dict(each) for name, each in self.record['stages'].items()}

    def distill(self, name: str, student: Config, **arguments: Any) -> Run:
        return self.train(name, self.out / _name_file(name), partial(distill, student, **arguments))

    def prune(self, config: Path, checkpoint: Path, macs: float, importance: str, seed: int) -> Run:
        """Prunes, and tells how channels were chosen."""
        pruned = prune(config, checkpoint, self.out / 'pruned.pth', macs, importance=importance, seed=seed,
                       evaluation=False, force=True)
        why = pruned.note.splitlines()[:-1]  # the last: it was not evaluated
        self.log('\n'.join([f'Channels were chosen by {pruned.importance}.', *why]))
        return pruned.config, pruned.checkpoint

    def measure(self, name: str, run: Run, write: Callable[..., Any] = export) -> None:
        """Writes the file of a stage, and evaluates it, once."""
        stage = self.stages.get(name)
        if stage is not None and stage.checkpoint == run[1] and stage.file.is_file():
            return
        self.log(f'{name}: file and evaluation …')
        config, file = load_config(run[0]), self.out / f'{_name_file(name)}.onnx'
        written = write(config, run[1], file, size=self.size, force=True)
        comparison = written.chosen.comparison if write is not export else written.comparison
        metrics = evaluate(config, file, work_dir=self.out / f'{_name_file(name)}_test').metrics
        parameters = sum(each.numel() for each in load_student(config, run[1])[1].parameters())
        self.stages[name] = Stage(name, *run, file, parameters, metrics, (comparison.expected_map, comparison.map))
        self.record['stages'][name] = self.stages[name].to_dict()
        self.save()


def _name_file(stage: str) -> str:
    return stage.replace(', ', '_')


def _plot(result: Compression) -> str:
    """MAP against milliseconds, beside each other for each runtime."""
    title = 'mAP against latency'
    files = {stage.file: stage for stage in result.stages}
    runtimes = result.runtimes
    with apply_style(title, [Ink(colour) for colour in COLOURS]):
        figure = Figure((5 * len(runtimes), 3.6), layout='constrained')
        plots = figure.subplots(1, len(runtimes), sharey=True, squeeze=False)[0]
        for axes, runtime in zip(plots, runtimes):
            axes.set(title=runtime, xlabel='ms an image', ylabel='mAP')
            for each in result.latencies.files:
                if each.runtime == runtime:
                    stage = files[each.file]
                    axes.plot([median(each.times)], [100 * stage.metrics.get(MAP, 0.0)], 'o', label=stage.name)
            axes.grid(alpha=0.5)
            axes.margins(0.15)
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
        plots[-1].legend(frameon=False, loc='lower left')
        return render_svg(figure, title)
