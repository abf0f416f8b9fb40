"""One phrase of each kind, in English and German, drawn from a reproducible stream."""

import datetime
import decimal as dec
import functools
import random
import re
from collections.abc import Sequence

from triform.runtime import lazy

# Only when phrases are drawn, once on a machine: they are kept.
num2words = lazy.Module("num2words")
babel = lazy.Module("babel")
dates, lists = lazy.Module("babel.dates"), lazy.Module("babel.lists")
numbers, units = lazy.Module("babel.numbers"), lazy.Module("babel.units")

Pair = tuple[str, str]
LOCALES = ("en", "de")

FIRST_DAY = datetime.date(1990, 1, 1)
DAYS = (datetime.date(2036, 1, 1) - FIRST_DAY).days


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CURRENCIES = _names("USD EUR GBP JPY CHF CAD AUD INR SEK PLN BRL MXN")

# Units whose English names one German unit, in the long and the short form.
UNITS = _names(
    "length-kilometer length-meter length-centimeter length-millimeter length-mile "
    "length-inch mass-kilogram mass-gram mass-milligram mass-pound "
    "temperature-celsius temperature-fahrenheit area-square-kilometer "
    "area-square-meter area-hectare area-acre volume-cubic-meter volume-milliliter "
    "speed-kilometer-per-hour speed-meter-per-second energy-kilowatt-hour "
    "energy-kilocalorie power-kilowatt power-megawatt power-horsepower "
    "frequency-megahertz frequency-gigahertz electric-volt digital-megabyte "
    "digital-gigabyte digital-terabyte duration-hour duration-minute duration-second "
    "duration-day duration-week duration-month duration-year"
)
LIST_STYLES = ("standard", "standard", "or")
DURATIONS = _names("year month week day hour minute second")

# Reserved codes, groupings, and places too rarely named to be worth learning.
UNUSUAL_TERRITORIES = _names(
    "AC AI AQ AS AX BL BQ BV CC CP CQ CX DG EA EH EU EZ FO GF GG GP GS GU HK HM IC IM "
    "IO JE MF MO MP MQ MS NC NF NU PF PM PN PS QO RE SH SX TA TC TF TK UM UN VG VI WF "
    "XA XB YT ZZ"
)
LANGUAGES = _names(
    "af am ar az be bg bn bo bs ca cs cy da de el en eo es et eu fa fi fr ga gl gu he "
    "hi hr hu hy id is it ja ka kk km kn ko ku ky la lb lo lt lv mk ml mn mr ms mt my "
    "ne nl no pa pl ps pt ro ru sa sd si sk sl so sq sr sv sw ta te tg th ti tk tr tt "
    "uk ur uz vi yi yo zh zu"
)


class Draw:
    """A stream of choices that is the same on every machine and Python version.

    Only `random.random()` is used: the one method whose sequence Python promises to
    keep, and string seeds do not depend on PYTHONHASHSEED.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        return int(self._random() * bound)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def of(self, choices: Sequence):
        """One of the choices."""
        return choices[self.below(len(choices))]

    def some(self, choices: Sequence, count: int) -> list:
        """That many different choices, in random order."""
        picked: list = []
        while len(picked) < count:
            if (choice := self.of(choices)) not in picked:
                picked.append(choice)
        return picked

    def number(self, digits: int) -> int:
        """A positive number of up to `digits` digits, every length equally likely."""
        low = 10 ** self.below(digits)
        return self.between(low, 10 * low - 1)


def plain(text: str) -> str:
    """Without the no-break spaces (U+00A0, U+202F) that CLDR uses here and there."""
    return text.replace("\u00a0", " ").replace("\u202f", " ")


def _both(write, *args, **options) -> Pair:
    english, german = (plain(write(*args, locale=x, **options)) for x in LOCALES)
    return english, german


def _joined(style: str, parts: Sequence[Pair]) -> Pair:
    english, german = (
        lists.format_list([part[i] for part in parts], style=style, locale=locale)
        for i, locale in enumerate(LOCALES)
    )
    return english, german


# Dates and times ------------------------------------------------------------------


def _day(draw: Draw) -> datetime.date:
    return FIRST_DAY + datetime.timedelta(days=draw.below(DAYS))


def date(draw: Draw) -> Pair:
    """May 7, 2003: with and without weekday, in full, abbreviated, in digits."""
    day, form = _day(draw), draw.below(6)
    # Not 'medium': in English it equals 'long' in May, in German it never does.
    if form < 3:
        return _both(dates.format_date, day, format=("full", "long", "short")[form])
    if form == 3:
        return _both(_skeleton, day, skeleton="yMMMEd")
    if form == 4:
        return _both(_skeleton, day, skeleton="yMd")
    return _joined_day(day) if draw.below(2) else _both(_skeleton, day, skeleton="yMEd")


def _skeleton(day: datetime.date, skeleton: str, locale: str) -> str:
    return dates.format_skeleton(skeleton, day, locale=locale)


def _joined_day(day: datetime.date) -> Pair:
    """Wednesday, May 7: the full date without its year."""
    english, german = _both(dates.format_date, day, format="full")
    return english.removesuffix(f", {day.year}"), german.removesuffix(f" {day.year}")


def _month_day(draw: Draw) -> Pair:
    return _both(_skeleton, _day(draw), skeleton="MMMMd")


def month(draw: Draw) -> Pair:
    """May 2003, May 7, 2nd quarter 2003."""
    day = _day(draw)
    return _both(_skeleton, day, skeleton=draw.of(("yMMMM", "MMMMd", "yQQQQ")))


def _clock(draw: Draw) -> datetime.time:
    return datetime.time(draw.below(24), draw.below(60), draw.below(60))


def time(draw: Draw) -> Pair:
    """3:05 PM, with seconds two times out of three."""
    style = draw.of(("short", "medium", "medium"))
    return _both(dates.format_time, _clock(draw), format=style)


def date_time(draw: Draw) -> Pair:
    """Date and time in CLDR's pattern for the two."""
    style, day, clock = draw.of(("full", "long", "short")), _day(draw), _clock(draw)

    def write(locale: str) -> str:
        # Babel's format_datetime ties the two lengths; a long time has a time zone.
        pattern = str(dates.get_datetime_format(style, locale=locale))
        return (
            pattern.replace("'", "")
            .replace("{0}", dates.format_time(clock, "short", locale=locale))
            .replace("{1}", dates.format_date(day, style, locale=locale))
        )

    return _both(write)


# Numbers --------------------------------------------------------------------------


def words(draw: Draw) -> Pair:
    """A number below one million in words; one German word below a million."""
    number = draw.number(6)
    english, german = (num2words.num2words(number, lang=x) for x in LOCALES)
    return english, german


def is_compound(german: str) -> bool:
    """Whether a German phrase is one number in words."""
    return re.fullmatch(_NUMBER_WORD, german) is not None


_NUMBER_WORD = (
    "(null|eins?|eine|zwei|zwan|drei|vier|fünf|sech|sechs|sieb|sieben|acht|neun|zehn|"
    "elf|zwölf|zig|ßig|und|hundert|tausend)+"
)


def _decimal(draw: Draw, digits: int, places: int) -> dec.Decimal:
    """Up to so many digits before the point and exactly so many places after it.

    Never a trailing zero, which formats would drop.
    """
    value = draw.number(digits) * 10**places
    if places:
        value += draw.below(10 ** (places - 1)) * 10 + draw.between(1, 9)
    return dec.Decimal(value).scaleb(-places)


def decimal(draw: Draw) -> Pair:
    """1,234.5, up to seven digits and three places, one in ten negative."""
    value = _decimal(draw, 7, draw.below(4))
    return _both(numbers.format_decimal, -value if draw.below(10) == 0 else value)


def percent(draw: Draw) -> Pair:
    """12.5%."""
    value = _decimal(draw, 3, draw.below(3))
    return _both(_percent, value / 100)


def _percent(value: dec.Decimal, locale: str) -> str:
    # The locale's own pattern, which rounds to whole per cents.
    pattern = babel.Locale.parse(locale).percent_formats[None].pattern
    return numbers.format_percent(value, pattern.replace("0", "0.##"), locale=locale)


def money(draw: Draw) -> Pair:
    """$1,234.50 or 12 US dollars."""
    code = draw.of(CURRENCIES)
    if draw.below(2):
        value = _decimal(draw, 5, 2 * draw.below(2))
        return _both(numbers.format_currency, value, currency=code)
    return _both(_named_money, draw.number(5), code=code)


def _named_money(value: int, code: str, locale: str) -> str:
    name = numbers.get_currency_name(code, count=value, locale=locale)
    return f"{numbers.format_decimal(value, locale=locale)} {name}"


def compact(draw: Draw) -> Pair:
    """12.3 thousand, 5 million; the short forms differ too much to be learnt."""
    value = _decimal(draw, 3, draw.below(2))
    # 1 million, the only singular, would be seen once or never.
    value = max(value, dec.Decimal("1.1")) * 10 ** draw.of((3, 6, 9, 12))
    return _both(
        numbers.format_compact_decimal, value, format_type="long", fraction_digits=1
    )


# Units and durations --------------------------------------------------------------


def unit(draw: Draw) -> Pair:
    """12.5 kilometers or 12.5 km."""
    name, value = draw.of(UNITS), _decimal(draw, 4, draw.below(2))
    # Short forms of times are abbreviated words; of all else, mostly the same symbol.
    short = not name.startswith("duration") and value != 1 and draw.below(2)
    return _unit(value, name, "short" if short else "long")


def _unit(value: int | dec.Decimal, name: str, style: str = "long") -> Pair:
    return _both(units.format_unit, value, measurement_unit=name, length=style)


def quantities(draw: Draw) -> Pair:
    """1 acre, 12 volts, and 3 euros: where the singulars, too few alone, are learnt."""
    items = [_quantity(draw, name) for name in draw.some(UNITS + CURRENCIES, 2)]
    if draw.below(2):
        items.append(_quantity(draw, draw.of(CURRENCIES)))
    return _joined(draw.of(LIST_STYLES), items)


def _quantity(draw: Draw, name: str) -> Pair:
    value = 1 if draw.below(3) == 0 else draw.number(3)
    if name in CURRENCIES:
        return _both(_named_money, value, code=name)
    return _unit(value, name)


def duration(draw: Draw) -> Pair:
    """3 hours, 5 minutes (or three such); in 3 days; 3 days ago."""
    if draw.below(3):
        first = draw.below(len(DURATIONS) - 1)
        names = DURATIONS[first : first + draw.between(2, 3)]
        parts = [
            _unit(1 if draw.below(6) == 0 else draw.between(2, 59), f"duration-{name}")
            for name in names
        ]
        # CLDR's style for compound units, which Babel has in German for two only.
        return _joined("unit" if len(parts) == 2 else "standard", parts)
    name, count = draw.of(DURATIONS), draw.between(1, 200)
    seconds = dict(dates.TIMEDELTA_UNITS)[name] * count * draw.of((-1, 1))
    return _both(
        dates.format_timedelta,
        datetime.timedelta(seconds=seconds),
        granularity=name,
        # Never carries into a larger unit.
        threshold=10**9,
        add_direction=True,
    )


# Names and lists ------------------------------------------------------------------


@functools.cache
def _territories() -> list[Pair]:
    english, german = (babel.Locale.parse(x).territories for x in LOCALES)
    codes = sorted(c for c in english if re.fullmatch("[A-Z]{2}", c) and c in german)
    named = [(english[c], german[c]) for c in codes if c not in UNUSUAL_TERRITORIES]
    # '&' and parentheses belong to the longest names: rare, and no fun in a list.
    return [pair for pair in named if not re.search("[&()]", pair[0] + pair[1])]


@functools.cache
def _languages() -> list[Pair]:
    english, german = (babel.Locale.parse(x).languages for x in LOCALES)
    return [(english[code], german[code]) for code in LANGUAGES]


def _list(draw: Draw, pool: list[Pair], most: int) -> Pair:
    return _joined(draw.of(LIST_STYLES), draw.some(pool, draw.between(2, most)))


def territories(draw: Draw) -> Pair:
    """Germany, France, and Chile."""
    return _list(draw, _territories(), 5)


def languages(draw: Draw) -> Pair:
    """German, French, or Spanish."""
    return _list(draw, _languages(), 4)


def mixed(draw: Draw) -> Pair:
    """Two to four phrases of different kinds, none with a comma of its own."""
    kinds = draw.some(_ITEMS, draw.between(2, 4))
    return _joined(draw.of(LIST_STYLES), [k(draw) for k in kinds])


_ITEMS = (
    lambda draw: draw.of(_territories()),
    lambda draw: draw.of(_languages()),
    _month_day,
    lambda draw: _both(_skeleton, _day(draw), skeleton="yMMMM"),
    lambda draw: _both(dates.format_time, _clock(draw), format="short"),
    lambda draw: _quantity(draw, draw.of(UNITS)),
    lambda draw: _both(_percent, _decimal(draw, 2, draw.below(2)) / 100),
    lambda draw: _quantity(draw, draw.of(CURRENCIES)),
)
