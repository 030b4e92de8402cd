"""``kd-det generations``: a student, and generations of it, each of which learns from the one before."""
from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from kd_det.cli.common import (
    add_config_options,
    add_force_option,
    add_weight_options,
    amount,
    count,
    inherited_parts,
    path,
    print_tables,
    read_options,
    seed,
)
from kd_det.config.choices import FAMILIES, TREATMENTS


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('student', metavar='STUDENT', help="config of the student, or 'mmdet::folder/file.py'")
    parser.add_argument('--generations', type=count, default=3, metavar='N',
                        help='how many learn from the one before (3); generation 0, without a teacher, is beside them')
    parser.add_argument('--method', default='kd', help='by which, see kd-det methods (kd)')
    parser.add_argument('--treatment', choices=TREATMENTS, default='none',
                        help="of what the teacher says of classes: weigh by its largest probability (cwtm), or let its "
                        'others change places (dkpp)')
    parser.add_argument('--checkpoint', metavar='FILE', help='the weights of generation 0, in place of its training')
    parser.add_argument('--work-dir', type=path, metavar='DIR',
                        help='folder for all of it (work_dirs/STUDENT_generations); what is finished there is not done '
                        'again')
    parser.add_argument('--epochs', type=count, metavar='N', help="of each training (the config's own)")
    parser.add_argument('--task-weight', type=amount, default=1.0, metavar='WEIGHT',
                        help='of the loss on the ground truth, where there is a teacher (1)')
    parser.add_argument('--inherit', nargs='+', default=['none'], metavar='PART',
                        help="parts that start from the teacher's weights; none by default")
    parser.add_argument('--family', choices=FAMILIES, default='',
                        help="whose published weights to use (told by the student's heads by default)")
    parser.add_argument('--seed', type=seed, default=0, metavar='N',
                        help='of generation 0; that of generation k is by k higher (0)')
    parser.add_argument('--json', type=path, metavar='FILE', help='write the result to this file')
    add_force_option(parser)
    add_weight_options(parser)
    add_config_options(parser)


def run(options: Namespace) -> int:
    from kd_det.compat.console import PlainConsole
    from kd_det.compat.writing import refuse_to_replace, write_whole
    from kd_det.study.generations import generations
    if options.json:
        refuse_to_replace(options.json, lambda content: b'"ensemble"' in content, 'the result of generations',
                          options.force)
    result = generations(options.student, generations=options.generations, method=options.method,
                         treatment=options.treatment, checkpoint=options.checkpoint, work_dir=options.work_dir,
                         epochs=options.epochs, task_weight=options.task_weight,
                         inherit=inherited_parts(options),
                         balance=options.balance, family=options.family, seed=options.seed,
                         data_root=options.data_root, options=read_options(options.cfg_options))
    print_tables(PlainConsole(), [result.tabulate()])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.json, json.dumps(result.to_dict(), indent=2) + '\n')
    return 0
