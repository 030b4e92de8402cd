"""``kd-det results``: what benchmarks have left, shown again, joined or compared."""
from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from kd_det.cli.common import add_force_option, amount, path, print_tables

if TYPE_CHECKING:
    from rich.console import Console

ACTIONS = ('show', 'merge', 'compare', 'schema')


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('action', choices=ACTIONS,
                        help='show the tables again; merge the results of one pair on the same data: more seeds, more '
                        'methods; compare two methods, or two files, seed by seed; print the schema of results.json')
    parser.add_argument('files', nargs='*', type=path, metavar='FILE',
                        help='results.json, or the work dir that has it; to show, suite.json too')
    parser.add_argument('--markdown', action='store_true', help='show: as results.md has them')
    parser.add_argument('--out', type=path, metavar='DIR', help='merge: folder for the joint results')
    parser.add_argument('--variants', nargs='+', default=(), metavar='METHOD',
                        help='compare: the two of one file, the second with the first; or those of both files (all '
                        'that both have)')
    parser.add_argument('--size', type=amount, default=1.0, metavar='POINTS',
                        help='compare: the difference of which to tell how many seeds it needs (1)')
    parser.add_argument('--json', type=path, metavar='FILE', help='compare: write what was found to this file')
    add_force_option(parser)


def run(options: Namespace) -> int:
    from kd_det.compat.console import PlainConsole
    from kd_det.config import ConfigurationError
    from kd_det.study.records import make_schema
    console = PlainConsole(highlight=False)
    for name, action in (('markdown', 'show'), ('out', 'merge'), ('variants', 'compare'), ('json', 'compare')):
        if getattr(options, name) and options.action != action:
            raise ConfigurationError(f'--{name} is of kd-det results {action}, not of {options.action}.')
    if options.action == 'schema':
        print(json.dumps(make_schema(), indent=2))
    elif not options.files:
        raise ConfigurationError(f'kd-det results {options.action}: expected results.json, or a work dir that has it.')
    elif options.action == 'show':
        _show(console, options)
    elif options.action == 'merge':
        _merge(console, options)
    else:
        _compare(console, options)
    return 0


def _show(console: Console, options: Namespace) -> None:
    from kd_det.study.records import read_results
    from kd_det.study.results import format_markdown
    from kd_det.study.suite import SUITE_FILE, format_suite, is_suite, read_suite
    for file in options.files:
        if is_suite(file) or file.name == SUITE_FILE:
            suite = read_suite(file)
            tables, markdown = suite.tabulate(), format_suite(suite)
        else:
            found = read_results(file)
            tables, markdown = found.tabulate(), format_markdown(found.results)
        if options.markdown:
            print(markdown, end='')
        else:
            print_tables(console, tables)


def _merge(console: Console, options: Namespace) -> None:
    from kd_det.config import ConfigurationError
    from kd_det.study.comparison import merge_results
    if options.out is None:
        raise ConfigurationError('kd-det results merge: expected --out DIR, the folder for the joint results.')
    result = merge_results(options.files, options.out, options.force)
    print_tables(console, result.tabulate())
    console.print(f"Saved {', '.join(map(str, result.files))}.", soft_wrap=True)


def _compare(console: Console, options: Namespace) -> None:
    from kd_det.compat.writing import refuse_to_replace, write_whole
    from kd_det.study.comparison import compare_results
    if options.json:
        refuse_to_replace(options.json, lambda content: b'"needed"' in content, 'a comparison', options.force)
    found = compare_results(options.files, options.variants, options.size)
    print_tables(console, [found.tabulate()])
    if options.json:
        write_whole(options.json, json.dumps(found.to_dict(), indent=2) + '\n')
