"""What the running Python says of itself: names of its standard library with the first sentence of
their docstrings, their signatures, and examples whose results it computes.

Nothing here is downloaded, and little is written by hand: an example's code is, its result is not.
Another version of Python has other docstrings, and so other facts.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType
    from typing import Any

# Whose public functions and classes are taken. Behind a colon: only these names.
MODULES = """
argparse: ArgumentParser Namespace FileType
base64: b64encode b64decode b32encode b32decode b16encode b16decode urlsafe_b64encode
bisect
calendar: isleap leapdays monthrange month weekday timegm
collections
contextlib: closing contextmanager suppress redirect_stdout nullcontext ExitStack chdir
copy: copy deepcopy replace
csv: reader writer DictReader DictWriter Sniffer
dataclasses: dataclass field fields asdict astuple replace is_dataclass make_dataclass
datetime: date datetime time timedelta timezone
decimal: Decimal getcontext localcontext
difflib: get_close_matches unified_diff ndiff SequenceMatcher context_diff
enum: Enum IntEnum Flag auto unique
fractions: Fraction
functools
getpass: getpass getuser
glob
gzip: open compress decompress
hashlib: md5 sha1 sha256 sha512 blake2b pbkdf2_hmac scrypt
heapq
html
inspect: getsource signature getmembers isfunction isclass getdoc getfile ismodule
io: StringIO BytesIO TextIOWrapper BufferedReader
itertools
json: dump dumps load loads
logging: basicConfig getLogger debug info warning error critical exception FileHandler disable
math
operator: add sub mul itemgetter attrgetter methodcaller contains neg truediv floordiv mod not_
os: listdir mkdir makedirs remove rename replace rmdir getcwd chdir walk getenv cpu_count getpid
os: scandir stat system urandom path symlink chmod kill fsync removedirs renames unlink access
os.path
pathlib: Path PurePath
pickle: dump dumps load loads
platform: system machine python_version release node platform processor
pprint
queue: Queue LifoQueue PriorityQueue SimpleQueue
random
re
secrets: token_hex token_bytes token_urlsafe choice randbelow compare_digest
shlex: split quote join
shutil
statistics
string: Template capwords Formatter
struct: pack unpack calcsize iter_unpack
subprocess: run Popen call check_call check_output getoutput CompletedProcess
sys: exit getsizeof getrecursionlimit setrecursionlimit exc_info intern getrefcount
sys: getdefaultencoding
tempfile: NamedTemporaryFile TemporaryDirectory mkdtemp mkstemp gettempdir TemporaryFile
textwrap
threading: Thread Lock Event Timer Semaphore Barrier Condition RLock current_thread active_count
time: time sleep perf_counter monotonic strftime strptime localtime gmtime process_time ctime
timeit: timeit repeat Timer default_timer
traceback: print_exc format_exc print_stack extract_tb
types: SimpleNamespace MappingProxyType
unicodedata: name lookup category normalize numeric
urllib.parse: urlparse urlencode quote unquote urljoin parse_qs urlsplit quote_plus
uuid: uuid1 uuid3 uuid4 uuid5 UUID
warnings: warn filterwarnings simplefilter catch_warnings
weakref: ref proxy WeakKeyDictionary WeakValueDictionary WeakSet finalize
zipfile: ZipFile is_zipfile ZipInfo
zlib: compress decompress crc32 adler32
"""
# Classes whose methods are facts, too.
CLASSES = """
str list dict set tuple int float
collections.Counter collections.deque
pathlib.Path datetime.date datetime.datetime
"""
LONGEST = 104  # characters of a first sentence: a longer one is no fact here
# A docstring's own line with the signature: "S.count(sub[, start]) -> int".
SIGNATURE = re.compile(r"^[\w.]+\(.*?\)\s*(-+>\s*|$)")

# name: code, the lines of which " ; " divides. The last is an expression, whose value is shown.
EXAMPLES = """
abs: abs(-3)
all: all([True, False, True])
any: any([False, False, True])
bin: bin(5)
bool: bool([])
chr: chr(97)
dict: dict(a=1, b=2)
divmod: divmod(17, 5)
enumerate: list(enumerate('ab'))
filter: list(filter(str.isdigit, 'a1b2'))
float: float('1.5')
frozenset: frozenset([1, 2]) == {1, 2}
hex: hex(255)
int: int('42') + 1
isinstance: isinstance(3, int)
len: len('hello')
list: list('abc')
map: list(map(str.upper, ['a', 'b']))
max: max([3, 1, 2])
min: min([3, 1, 2])
oct: oct(8)
ord: ord('a')
pow: pow(2, 10)
range: list(range(2, 8, 2))
repr: repr('a')
reversed: list(reversed([1, 2, 3]))
round: round(3.14159, 2)
set: sorted(set([1, 2, 2, 3]))
sorted: sorted([3, 1, 2])
str: str(42)
sum: sum([1, 2, 3])
tuple: tuple([1, 2])
type: type(3)
zip: list(zip([1, 2], 'ab'))
str.capitalize: 'hello world'.capitalize()
str.center: 'ab'.center(6, '*')
str.count: 'banana'.count('a')
str.endswith: 'notes.txt'.endswith('.txt')
str.find: 'hello'.find('l')
str.format: '{} and {}'.format('salt', 'pepper')
str.index: 'hello'.index('e')
str.isalpha: 'abc1'.isalpha()
str.isdigit: '123'.isdigit()
str.islower: 'abc'.islower()
str.isspace: '  '.isspace()
str.isupper: 'ABC'.isupper()
str.join: ', '.join(['a', 'b', 'c'])
str.ljust: 'ab'.ljust(4, '.')
str.lower: 'HELLO'.lower()
str.lstrip: '  hi'.lstrip()
str.partition: 'key=value'.partition('=')
str.replace: 'banana'.replace('a', 'o')
str.rjust: 'ab'.rjust(4, '.')
str.rstrip: 'hi  '.rstrip()
str.split: 'a b c'.split()
str.splitlines: 'one\\ntwo'.splitlines()
str.startswith: 'hello'.startswith('he')
str.strip: '  hi  '.strip()
str.swapcase: 'Hello'.swapcase()
str.title: 'hello world'.title()
str.upper: 'hello'.upper()
str.zfill: '7'.zfill(3)
list.append: items = [1, 2] ; items.append(3) ; items
list.clear: items = [1, 2] ; items.clear() ; items
list.copy: items = [1, 2] ; other = items.copy() ; other
list.count: [1, 2, 1].count(1)
list.extend: items = [1] ; items.extend([2, 3]) ; items
list.index: ['a', 'b', 'c'].index('b')
list.insert: items = ['a', 'c'] ; items.insert(1, 'b') ; items
list.pop: items = [1, 2, 3] ; last = items.pop() ; items
list.remove: items = [1, 2, 3] ; items.remove(2) ; items
list.reverse: items = [1, 2, 3] ; items.reverse() ; items
list.sort: items = [3, 1, 2] ; items.sort() ; items
dict.get: ages = {'ann': 30} ; ages.get('bob', 0)
dict.items: list({'a': 1, 'b': 2}.items())
dict.keys: list({'a': 1, 'b': 2}.keys())
dict.pop: ages = {'ann': 30} ; ages.pop('ann')
dict.setdefault: groups = {} ; groups.setdefault('a', []).append(1) ; groups
dict.update: ages = {'ann': 30} ; ages.update(bob=25) ; ages
dict.values: list({'a': 1, 'b': 2}.values())
set.add: seen = {1} ; seen.add(2) ; seen
set.difference: {1, 2, 3}.difference({2})
set.discard: seen = {1, 2} ; seen.discard(2) ; seen
set.intersection: {1, 2, 3}.intersection({2, 3, 4})
set.issubset: {1, 2}.issubset({1, 2, 3})
set.union: {1, 2}.union({2, 3})
bisect.bisect: bisect.bisect([1, 3, 5], 4)
calendar.isleap: calendar.isleap(2024)
collections.Counter: collections.Counter('banana')['a']
collections.Counter.most_common: collections.Counter('banana').most_common(1)
collections.OrderedDict: list(collections.OrderedDict(a=1, b=2))
collections.defaultdict: counts = collections.defaultdict(int) ; counts['a'] += 1 ; counts['a']
collections.deque: list(collections.deque([1, 2, 3], maxlen=2))
copy.deepcopy: rows = [[1], [2]] ; other = copy.deepcopy(rows) ; other
datetime.date: datetime.date(2024, 2, 29).isoformat()
datetime.timedelta: datetime.timedelta(hours=2).total_seconds()
difflib.get_close_matches: difflib.get_close_matches('appel', ['apple', 'pear'])
fractions.Fraction: fractions.Fraction(1, 3) + fractions.Fraction(1, 6)
functools.reduce: functools.reduce(lambda a, b: a * b, [1, 2, 3, 4])
hashlib.sha256: len(hashlib.sha256(b'hello').hexdigest())
heapq.nlargest: heapq.nlargest(2, [5, 1, 8, 3])
heapq.nsmallest: heapq.nsmallest(2, [5, 1, 8, 3])
html.escape: html.escape('a < b')
itertools.accumulate: list(itertools.accumulate([1, 2, 3]))
itertools.chain: list(itertools.chain([1, 2], [3]))
itertools.combinations: list(itertools.combinations('abc', 2))
itertools.islice: list(itertools.islice('abcdef', 3))
itertools.permutations: len(list(itertools.permutations('abc')))
itertools.product: list(itertools.product('ab', [1, 2]))
itertools.repeat: list(itertools.repeat(0, 3))
json.dumps: json.dumps({'a': [1, 2]})
json.loads: json.loads('[1, 2, 3]')
math.ceil: math.ceil(2.1)
math.comb: math.comb(5, 2)
math.factorial: math.factorial(5)
math.floor: math.floor(2.9)
math.gcd: math.gcd(12, 18)
math.isclose: math.isclose(0.1 + 0.2, 0.3)
math.prod: math.prod([2, 3, 4])
math.sqrt: math.sqrt(16)
operator.itemgetter: sorted(['b2', 'a1'], key=operator.itemgetter(1))
os.path.basename: os.path.basename('/home/ann/notes.txt')
os.path.dirname: os.path.dirname('/home/ann/notes.txt')
os.path.join: os.path.join('home', 'ann')
os.path.splitext: os.path.splitext('notes.txt')
pathlib.Path: pathlib.PurePosixPath('notes.txt').suffix
re.findall: re.findall('[0-9]+', 'a1b22')
re.split: re.split('[,;]', 'a,b;c')
re.sub: re.sub('[0-9]', '#', 'a1b2')
shlex.split: shlex.split('cp "a b" c')
statistics.mean: statistics.mean([1, 2, 3, 4])
statistics.median: statistics.median([3, 1, 2])
statistics.mode: statistics.mode('banana')
textwrap.dedent: textwrap.dedent('  a')
textwrap.shorten: textwrap.shorten('one two three', 10, placeholder='...')
urllib.parse.quote: urllib.parse.quote('a b')
zlib.crc32: zlib.crc32(b'hello')
"""

# Of names whose docstrings begin with too much, or too little.
OWN_WORDS = """
anext: Return the next item of an asynchronous iterator.
breakpoint: Stop in the debugger at this place.
bytearray: A mutable sequence of numbers from 0 to 255.
bytes: An immutable sequence of numbers from 0 to 255.
dict: A new dict, empty or of pairs or keyword arguments.
dir: Return a list of the names in an object, or in the current scope.
exit: Leave Python.
filter: Iterate over those items for which a function is true.
frozenset: A set that cannot be changed.
getattr: Return the attribute of an object with this name.
issubclass: Return whether a class is a subclass of another.
iter: Return an iterator over an object.
map: Apply a function to every item of an iterable.
max: Return the largest item of an iterable, or of several arguments.
min: Return the smallest item of an iterable, or of several arguments.
open: Open a file and return it.
pow: Return a number to a power: pow(2, 3) is 8.
property: A decorator that makes a method an attribute.
range: A sequence of integers from start, inclusive, to stop, exclusive.
set: A new set, empty or of the items of an iterable.
sum: Return the sum of the items of an iterable, plus a start value.
super: The parent class of an object, to call its methods.
type: Return the type of an object.
zip: Iterate over the items of several iterables side by side.
calendar.monthrange: Return the weekday of a month's first day, and its number of days.
collections.ChainMap: Several dicts in a row, looked up as one.
collections.deque.count: Return how often a value is in the deque.
collections.deque.index: Return the first index of a value.
collections.deque.insert: Insert an item before an index.
collections.deque.remove: Remove the first occurrence of a value.
collections.deque.reverse: Reverse the deque in place.
contextlib.contextmanager: A decorator that makes a generator a context manager.
csv.DictReader: Iterate over the rows of a CSV file, each a dict by the names of the columns.
csv.DictWriter: Write dicts to a CSV file as rows.
csv.reader: Iterate over the rows of a CSV file, each a list of strings.
csv.writer: Write rows to a CSV file.
datetime.date.strftime: Return the date as a string by a format.
datetime.date.today: Return the date of today.
datetime.date: A date: year, month and day.
datetime.datetime: A date with a time of day.
dict.clear: Remove all items from the dict.
dict.copy: Return a shallow copy of the dict.
dict.items: A view of the dict's (key, value) pairs.
dict.keys: A view of the dict's keys.
dict.pop: Remove a key and return its value, or the default where it is not there.
dict.popitem: Remove and return the last (key, value) pair.
dict.update: Take over the items of another dict.
dict.values: A view of the dict's values.
enum.Enum: A class whose attributes are a fixed set of named values.
functools.cached_property: A decorator for a property that is computed once for each instance.
functools.partial: A new function with some arguments of another already given.
functools.reduce: Apply a function of two arguments to the items, from left to right, to one value.
html.unescape: Turn character references such as &gt; into their characters.
itertools.chain: Iterate over the items of several iterables, one after another.
itertools.zip_longest: Like zip, but as long as the longest; missing values are filled.
json.dump: Write Python objects to a file as JSON.
json.dumps: Turn Python objects into a JSON string.
json.load: Read a file with a JSON document as Python objects.
json.loads: Turn a JSON string into Python objects.
list.reverse: Reverse the list in place.
math.factorial: The product of the whole numbers from 1 to n.
os.path.realpath: The path without symbolic links.
pathlib.Path.glob: Iterate over the files below this path that match a pattern.
pathlib.Path.rglob: Iterate over the files below this path, at any depth, that match a pattern.
random.getrandbits: Return an integer of k random bits.
random.random: A random float from 0 to 1, without 1.
random.uniform: A random float between two numbers.
re.match: Match a pattern at the start of a string; a Match, or None.
re.search: Find the first place in a string that matches a pattern; a Match, or None.
re.split: Split a string where a pattern matches.
re.sub: Replace what a pattern matches in a string.
shutil.which: The path of a program, or None where there is none.
str.count: Return how often a substring is in the string.
str.find: Return where a substring begins, or -1 where there is none.
str.index: Return where a substring begins, or raise a ValueError.
str.rfind: Return where a substring begins for the last time, or -1.
str.rindex: Return where a substring begins for the last time, or raise a ValueError.
string.capwords: Capitalize each word of a string.
time.localtime: The local time as year, month, day, hour and so on.
time.time: Return the seconds since 1970 as a float.
urllib.parse.quote: Replace special characters in a string by %xx.
"""


@dataclass(frozen=True)
class Fact:
    """What is known of a name."""

    name: str  # with its module or class: os.path.join, str.upper
    module: str  # that has it, or "" for what needs no import
    summary: str  # the first sentence of its docstring
    signature: str = ""  # as one writes a call, or "" where Python knows none
    example: str = ""  # as the REPL shows it, with its result
    base: str = ""  # of an exception: the class above it

    @property
    def short(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]


def first_sentence(docstring: str | None) -> str:
    """The first sentence of a docstring, or "" where there is none of a fact's length."""
    lines = inspect.cleandoc(docstring or "").split("\n")
    given = ""  # what a first line with the signature says that the call gives
    while lines and (not lines[0].strip() or SIGNATURE.match(lines[0])):
        given = given or SIGNATURE.sub("", lines[0]).rpartition("-- ")[2]
        lines = lines[1:]
    paragraph = "\n".join(lines).partition("\n\n")[0]
    text = " ".join(paragraph.split())
    if len(given.split()) > 2 and not text.startswith("Return"):
        text = given
    text = text.rpartition("-> ")[2]  # "string, format -> new datetime parsed from a string"
    text = re.split(r"(?<=[\w)`'\"]\.)\s+(?=[A-Z(])", text)[0].strip()
    is_whole = text.count("(") == text.count(")") and text[-1:] not in ":,"
    is_whole = is_whole and text != "An enumeration." and "self." not in text[:-1]
    if not 12 <= len(text) <= LONGEST or not text.isascii() or not is_whole:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!" else f"{text}."


def signature_of(name: str, value: Any) -> str:
    """`name(a, b=1)`, or "" where Python does not say or it is long."""
    try:
        text = str(inspect.signature(value))
    except (ValueError, TypeError):
        return ""
    text = f"{name}{re.sub(r'^[(](self|cls)(, /)?(, )?', '(', text)}"
    is_plain = len(text) <= 64 and "<" not in text and " at 0x" not in text
    return text if is_plain else ""


@lru_cache(None)
def pairs_of(block: str) -> list[tuple[str, str]]:
    """[(key, text)] of the lines `key: text` of a block, the keys up to the last colon there."""
    pairs = []
    for line in block.strip().splitlines():
        key, _, text = line.partition(": ")
        pairs.append((key, text))
    return pairs


@lru_cache(1)
def modules() -> dict[str, ModuleType]:
    """{name: module} of all that are asked about."""
    by_name = {}
    for line in MODULES.split("\n") + ["pathlib"]:
        name = line.partition(":")[0].strip()
        if name:
            by_name[name] = importlib.import_module(name)
    return by_name


def show_example(code: str) -> str:
    """Lines of code as the REPL shows them, with the value of the last."""
    *statements, expression = code.split(" ; ")
    names = {name.partition(".")[0]: module for name, module in modules().items()}
    names |= {"os": modules()["os"], "urllib": importlib.import_module("urllib")}
    for statement in statements:
        exec(statement, names)
    lines = [f">>> {line}" for line in [*statements, expression]]
    return "\n".join([*lines, repr(eval(expression, names))])


def public_names() -> Iterator[tuple]:
    """Yield (name with its module, module, object) of what the blocks above name."""
    for short, value in sorted(vars(builtins).items()):
        if not short.startswith("_") and callable(value) and not is_warning(value):
            yield short, "", value
    for line in MODULES.strip().split("\n"):
        module_name, _, chosen = line.partition(":")
        module = modules()[module_name]
        everything = getattr(module, "__all__", None) or dir(module)
        for short in chosen.split() or sorted(everything):
            value = getattr(module, short, None)
            if callable(value) and not short.startswith("_"):
                yield f"{module_name}.{short}", module_name, value
    for class_name in CLASSES.split():
        module_name, _, short = class_name.rpartition(".")
        owner = modules()[module_name] if module_name else builtins
        for method, value in sorted(vars(getattr(owner, short)).items()):
            if not method.startswith("_") and callable(value):
                yield f"{class_name}.{method}", module_name, getattr(getattr(owner, short), method)


def is_warning(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Warning)


@lru_cache(1)
def facts() -> list[Fact]:
    """[Fact] of the running Python, in a fixed order, each name once."""
    examples = dict(pairs_of(EXAMPLES))
    own_words = dict(pairs_of(OWN_WORDS))
    by_name = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is deprecated
        for name, module, value in public_names():
            summary = own_words.get(name) or first_sentence(getattr(value, "__doc__", None))
            if not summary or name in by_name:
                continue
            base = ""
            signature = signature_of(name, value)
            if isinstance(value, type) and issubclass(value, BaseException) and not module:
                base = value.__bases__[0].__name__
                signature = ""
            example = show_example(examples[name]) if name in examples else ""
            by_name[name] = Fact(name, module, summary, signature, example, base)
    return list(by_name.values())
