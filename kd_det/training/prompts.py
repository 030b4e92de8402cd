"""What terms learn of a frozen teacher before training: FreeKD's prompts, by the teacher's own loss."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, broadcast_object_list, is_main_process
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn

from kd_det.compat.process import preserved_randomness
from kd_det.compat.writing import write_whole
from kd_det.config.detectors import TeacherError
from kd_det.config.files import ConfigurationError
from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.distillers.supervision import read_supervision
from kd_det.teachers import Teacher
from kd_det.teachers.judging import in_training, make_own_sample, sum_losses
from kd_det.training.finiteness import find_common_seed, find_sampler

REPORTS = 5  # lines of the log by which is told how far it is


def learn_prompts(runner: Runner, distiller: DetectionDistiller) -> None:
    """Lets each term that has prompts learn them on its frozen teacher, unless that is done.

    They are kept in the work dir, ``<term>_prompts.pt``, with a hash of all that they depend on: the teacher's
    weights, the term's arguments, the training data and the seed. A run that goes on has them from its checkpoint, and
    must have the teacher on which they were learnt. All ranks learn the same ones, from the whole batch. Random numbers
    are afterwards what they were.

    Args:
        runner: Of the training, with its data set.
        distiller: Its guides are started, and classes are matched.

    Raises:
        ConfigurationError: The teacher is no frozen detector, its classes are not known, or its heads do not read the
            tap.
        TeacherError: The teacher can not compute its own loss, or it is not finite; or the prompts of the checkpoint
            that is resumed were learnt on another.
    """
    for name, term in distiller.terms.items():
        if not term.learns_beforehand:
            continue
        teacher = distiller.build_teachers()[term.teacher_index]
        if term.prompted:
            if term.prompted_by not in ('', teacher.fingerprint()):
                raise TeacherError(f'model.distill.{name}: the prompts in the checkpoint that is resumed were learnt '
                                   'on another teacher: the weights of this one are not the same. A resumed run goes '
                                   'on as the interrupted one would have: give it the teacher that that one had, or '
                                   'begin anew without --resume.')
            continue
        if not isinstance(teacher, Teacher) or teacher.has_student_labels:  # the student's own average is not frozen
            raise ConfigurationError(f'model.distill.{name}: its prompts are learnt by the own loss of a frozen '
                                     f'detector, which {teacher.described} is not. Give it a detector as teacher.')
        counts = teacher.num_classes, distiller.class_sets.student_count
        if term.teacher_index not in distiller.class_sets.matches and None not in counts and counts[0] != counts[1]:
            raise ConfigurationError(f'model.distill.{name}: its prompts are learnt by the ground truth, but the '
                                     f'teacher tells {counts[0]} classes apart, the student {counts[1]}, and which are '
                                     "the same is not known. Name the teacher's, by label, with teacher.classes=[…].")
        file = Path(runner.work_dir) / f'{name}_prompts.pt'
        identity = _identify(runner, teacher, term)
        kept = [_read(file, identity) if is_main_process() else None]
        broadcast_object_list(kept)
        prompts = kept[0]
        if prompts is None:
            with preserved_randomness():
                prompts = _Lessons(runner, distiller, name, teacher).learn()
            if is_main_process():
                content = BytesIO()
                torch.save(dict(identity=identity, prompts=prompts), content)
                write_whole(file, content.getvalue())
        runner.logger.info(f"{name}: the prompts {'learnt on the teacher are kept in' if kept[0] is None else 'of'} "
                           f"'{file}'{'' if kept[0] is None else ' are taken'}.")
        for own, learnt in zip(term.prompts, prompts):
            own.copy_(learnt)
        term.prompted.fill_(True)
        term.prompted_by = teacher.fingerprint()


def _identify(runner: Runner, teacher: Teacher, term: Any) -> str:
    """Hashes all that the prompts of a term depend on."""
    data = {key: runner.cfg.get(key) for key in ('train_dataloader', 'train_dataset')}
    settings = [term.number, term.iterations, term.rate, term.teacher_path, [pair.teacher_level for pair in term.pairs]]
    question = [teacher.fingerprint(), settings, data, runner.seed, runner.world_size]
    return hashlib.sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()


def _read(file: Path, identity: str) -> list[Tensor] | None:
    """The prompts of a file, where they are those that would be learnt."""
    if not file.is_file():
        return None
    kept = torch.load(file, map_location='cpu', weights_only=True)
    return kept['prompts'] if kept['identity'] == identity else None


class _Lessons:
    """Learns the prompts of a term.

    Args:
        runner: Of the training.
        distiller: Its distiller.
        name: Of the term.
        teacher: The frozen detector.
    """

    def __init__(self, runner: Runner, distiller: DetectionDistiller, name: str, teacher: Teacher) -> None:
        self.runner, self.distiller, self.teacher, self.name = runner, distiller, teacher, name
        self.term: Any = distiller.terms[name]

    def learn(self) -> list[Tensor]:
        """Learns them; the same on all ranks."""
        logger, term = self.runner.logger, self.term
        logger.info(f'{self.name}: {term.number} prompts for each scale learn on the teacher, {term.iterations} '
                    'iterations.')
        set_random_seed(self.runner.seed % 2**32)
        prompts = [each.detach().clone().requires_grad_() for each in term.prompts]
        start = [[each.detach().cpu() for each in prompts]]
        broadcast_object_list(start)
        with torch.no_grad():
            for each, of_first in zip(prompts, start[0]):
                each.copy_(of_first)
        optimizer = torch.optim.Adam(prompts, term.rate)
        every = max(1, term.iterations // REPORTS)
        for iteration, batch in zip(range(1, term.iterations + 1), self._iterate_batches()):
            loss, alike = self._compute_loss(batch, prompts)
            optimizer.zero_grad()
            (loss + alike).backward()
            for each in prompts:
                all_reduce(each.grad, 'mean')
            optimizer.step()
            if iteration % every == 0 or iteration == term.iterations:
                if not all(bool(each.isfinite().all()) for each in prompts):
                    raise TeacherError(f'{self.name}: the own loss of the teacher on the training data is not finite. '
                                       f'{self.teacher.advise_on_overflow()}')
                logger.info(f"{self.name}: {iteration} of {term.iterations}, the teacher's loss "
                            f'{loss.item():.3f}, likeness of the masks {alike.item():.3f}')
        return [each.detach().cpu() for each in prompts]

    def _iterate_batches(self) -> Iterator[Any]:
        """The batches of the training data, in an order of their own, again and again."""
        config = dict(self.runner.cfg.train_dataloader, dataset=self.runner.train_dataloader.dataset,
                      persistent_workers=False)
        loader, epoch = self.runner.build_dataloader(config, seed=find_common_seed(self.runner)), 0
        while True:
            if hasattr(find_sampler(loader), 'set_epoch'):
                find_sampler(loader).set_epoch(epoch)
            yield from loader
            epoch += 1

    def _compute_loss(self, batch: Any, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The teacher's own loss on what the prompts leave of its features, and how alike their masks are."""
        data = self.distiller.data_preprocessor(batch, True)
        images, supervision = data['inputs'], read_supervision(data['data_samples'])
        own_images = self.teacher.bridge(images, [tuple(each.img_shape[:2]) for each in supervision.samples])
        labels = self.distiller.class_sets.find_own_labels(supervision.labels, self.term.teacher_index)
        # Of none all, for its head asks the other ranks as often as theirs ask it.
        rows = supervision.labelled_rows or list(range(len(own_images)))
        samples = [make_own_sample(supervision.samples[row], None if labels is None else labels[row], own_images,
                                   self.teacher.scale) for row in rows]
        nothing = torch.stack([each.sum() for each in prompts]).sum() * 0  # for a level that no head reads
        model = self.teacher.model
        self.teacher.start_engine()
        try:
            with in_training(model), self._prompted(model, prompts) as alike:
                loss = sum_losses(model.loss(own_images[rows], samples))
        except (TypeError, AttributeError, KeyError) as error:
            raise TeacherError(f'{self.name}: a {type(model).__name__} can not compute its own loss on the ground '
                               f'truth of this data ({error}), by which its prompts are learnt.') from error
        if not loss.requires_grad:
            raise ConfigurationError(f"model.distill.{self.name}.tap: the teacher's loss does not depend on its "
                                     f"'{self.term.teacher_path}', so no prompts can be learnt there. Tap 'neck'.")
        weight = float(any(supervision.labelled))
        return weight * loss + nothing, weight * alike[0]

    @contextmanager
    def _prompted(self, model: nn.Module, prompts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Within, the tapped module puts out what the prompts leave; yields a list for how alike their masks are."""
        alike: list[Tensor] = []

        def replace(module: nn.Module, given: Any, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
            prompted, similarity = self.term.prompt(levels, prompts)
            alike.append(similarity)
            return tuple(prompted)

        handle = model.get_submodule(self.term.teacher_path).register_forward_hook(replace)
        try:
            yield alike
        finally:
            handle.remove()
