"""Text of users in pictures: no formulas, and in a font that has its signs."""
from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import FrozenSet, List, Sequence, Set, Tuple, Union

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from mmengine.logging import MMLogger

# Fonts that show boxes for everything, and those of formulas, whose signs stand at places of others.
NO_TEXT = ('Last', '.Last', 'cm', 'STIXNon', 'STIXSize')


def literal(text: str) -> str:
    """A text that matplotlib takes for no formula: of two dollars it would make one, or an error."""
    return text.replace('$', r'\$')


def save_figure(figure: Figure, file: Union[str, Path], **settings) -> None:
    """Saves a figure as pixels, each text in fonts that have its signs; what no installed font has is spelt out.

    Args:
        figure: The figure; changed.
        file: Where to.
        **settings: As ``Figure.savefig`` takes them.
    """
    for text in figure.findobj(Text):
        missing = _missing(text.get_text(), text.get_fontproperties())
        if missing:
            families, unknown = _fonts_with(missing)
            text.set_fontfamily([*text.get_fontfamily(), *families])
            text.set_text(_spelt_out(text.get_text(), unknown))
    figure.savefig(file, **settings)


def names_to_draw(names: Sequence[str]) -> Tuple[str, ...]:
    """Names as somebody else's matplotlib code can draw them, which knows one font and no more.

    Where the default font lacks signs, one that has all becomes the default of this process; else they are spelt out.
    """
    every = ''.join(names)
    missing = _missing(every, FontProperties(family=['sans-serif']))
    if missing:
        families, left = _fonts_with(missing | {ord(sign) for sign in every if not sign.isspace()} | set(range(33, 127)))
        if len(families) == 1 and not left:
            matplotlib.rcParams['font.sans-serif'] = [*families, *matplotlib.rcParams['font.sans-serif']]
        else:
            names = [_spelt_out(name, missing) for name in names]
    return tuple(map(literal, names))


def _missing(text: str, font: FontProperties) -> FrozenSet[int]:
    """The code points of a text that a font lacks."""
    signs = {ord(sign) for sign in text if not sign.isspace()}
    return frozenset(signs - _signs_of(font_manager.findfont(font)))


@lru_cache(maxsize=None)
def _signs_of(file: str) -> Set[int]:
    try:
        return set(font_manager.get_font(file).get_charmap())
    except (OSError, RuntimeError):  # not one that matplotlib can read
        return set()


@lru_cache(maxsize=None)
def _fonts_with(signs: FrozenSet[int]) -> Tuple[List[str], FrozenSet[int]]:
    """Installed fonts that together have as many of these code points as can be, the fewest; and those left over."""
    listed = {entry.fname for entry in font_manager.fontManager.ttflist}
    for file in set(font_manager.findSystemFonts()) - listed:  # installed since matplotlib made its list
        try:
            font_manager.fontManager.addfont(file)
        except (OSError, RuntimeError):
            continue
    upright = [entry for entry in font_manager.fontManager.ttflist
               if entry.style == 'normal' and not entry.name.startswith(NO_TEXT)]
    families, left = [], set(signs)
    while left:
        best = max(upright, key=lambda entry: (len(left & _signs_of(entry.fname)), -len(entry.name)), default=None)
        if best is None or not left & _signs_of(best.fname):
            break
        families.append(best.name)
        left -= _signs_of(best.fname)
    if left:  # told once, as the answer is kept
        signs = ''.join(map(chr, sorted(left)))
        MMLogger.get_current_instance().warning(
            f'No installed font has {signs}: pictures show {_spelt_out(signs, frozenset(left))} instead. Install one '
            'that has, such as Noto Sans CJK.')
    return families, frozenset(left)


def _spelt_out(text: str, signs: FrozenSet[int]) -> str:
    return ''.join(sign.encode('ascii', 'backslashreplace').decode() if ord(sign) in signs else sign for sign in text)
