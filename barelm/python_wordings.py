"""How people ask the helper of python_chat.py, and what it says where no docstring does.

Of each block the lines behind the one of dashes are for validation alone. {x} is what is asked
about."""

from functools import lru_cache

WORDINGS = {
    "what": """
what does {x} do?
what is {x}?
what is {x} for?
explain {x}
tell me about {x}
{x}?
{x}
describe {x}
help on {x}
can you explain {x}?
I want to know what {x} does
do you know {x}?
how does {x} work?
what's {x}?
what does {x} mean?
what do I use {x} for?
when do I use {x}?
--
could you tell me what {x} does?
please explain to me what {x} is
what is the purpose of {x}?
""",
    "signature": """
what is the signature of {x}?
what are the arguments of {x}?
which arguments does {x} take?
how do I call {x}?
what parameters does {x} have?
signature of {x}
show me the signature of {x}
what do I pass to {x}?
--
which parameters does {x} take?
tell me the arguments of {x}
""",
    "example": """
show an example of {x}
give me an example of {x}
example of {x}
can you show {x} in use?
how do I use {x}?
show me {x}
an example for {x}, please
--
can I see an example of {x}?
please give an example of {x}
""",
    "where": """
which module has {x}?
where is {x}?
in which module is {x}?
how do I import {x}?
what do I import for {x}?
where do I find {x}?
--
which module is {x} in?
where can I find {x}?
""",
    "base": """
what is the base class of {x}?
which exception is {x} a kind of?
what does {x} inherit from?
parent class of {x}
--
which class does {x} inherit from?
""",
    "value": """
what is {x}?
what does {x} give?
what does {x} return?
{x}
{x}
{x} = ?
compute {x}
evaluate {x}
what do I get for {x}?
what is the result of {x}?
what is the value of {x}?
result of {x}
>>> {x}
--
what does {x} evaluate to?
tell me the value of {x}
please compute {x}
""",
    "function": """
write a function that {x}
write a Python function that {x}
a function that {x}
can you write a function that {x}?
I need a function that {x}
show me a function that {x}
give me code that {x}
how do I write a function that {x}?
code for a function that {x}
--
please write me a function that {x}
could you make a function that {x}?
""",
    "way": """
how do I {x}?
how to {x}
how can I {x}?
how do you {x}?
how do I {x} in Python?
what is the way to {x}?
I want to {x}
show me how to {x}
{x}
how would I {x}?
can you {x}?
--
what is the best way to {x}?
tell me how to {x}
how does one {x}?
""",
}
# What follows an answer about a name, and is about the same name.
FOLLOW = {
    "signature": """
and its signature?
what are its arguments?
how do I call it?
which arguments does it take?
its parameters?
--
and what arguments does it take?
""",
    "example": """
show an example
an example?
can you give an example?
and an example?
show me how it is used
--
do you have an example?
""",
    "where": """
which module is it in?
how do I import it?
where is it?
--
and where do I find it?
""",
    "what": """
and what does it do?
what is it for?
what does it do?
--
can you say what it does?
""",
}
RENAME = """
call it {x}
name it {x}
rename it to {x}
can you call it {x}?
--
please name it {x} instead
"""
USE = """
show an example
an example?
how do I use it?
what does it give?
can you give an example?
--
do you have an example?
"""

# Word: what is said of it, in our own words.
KEYWORDS = """
and: True where both sides are true; else the first that is false.
as: Gives another name to what is imported, opened by `with`, or caught by `except`.
assert: Raises an `AssertionError` where a condition is false.
async: Makes a function a coroutine.
await: Waits for a coroutine inside an `async` function.
break: Leaves the innermost loop.
class: Defines a class.
continue: Goes on with the next turn of the innermost loop.
def: Defines a function.
del: Removes a name, or an item of a list or dict.
elif: Another condition, tried where those before it were false.
else: What is done where no condition was true, or where a loop was not broken.
except: What is done where an exception of this kind was raised.
finally: What is done at the end of a `try`, whatever happened.
for: A loop over the items of an iterable.
from: Imports names from a module, as in `from math import pi`.
global: Says that a name in a function is the module's.
if: Does something where a condition is true.
import: Loads a module and gives it a name.
in: True where an item is in a container; in a `for`, what the loop goes over.
is: True where both sides are the same object.
lambda: A small function without a name, of one expression.
nonlocal: Says that a name is the enclosing function's.
not: True where its operand is false.
or: The first side that is true; else the last.
pass: Does nothing, where a statement is needed.
raise: Raises an exception.
return: Ends a function and gives its value.
try: Runs statements whose exceptions are handled by `except`.
while: A loop that goes on as long as a condition is true.
with: Opens a context manager and closes it at the end of the block.
yield: Gives a value out of a generator, which goes on there the next time.
True: The bool for what is true; it equals 1.
False: The bool for what is false; it equals 0.
None: The value that stands for no value; there is one such object.
==: True where both sides are equal.
!=: True where both sides are not equal.
//: Division rounded down: `7 // 2` is 3.
%: The rest of a division: `7 % 3` is 1.
**: Power: `2 ** 3` is 8.
:=: Assigns to a name inside an expression.
@: Applies a decorator; between matrices, their product.
"""

CONCEPTS = """
a list: A list holds items in order and can be changed: `[1, 2, 3]`.
a tuple: A tuple holds items in order and cannot be changed: `(1, 2)`.
a dict|a dictionary: A dict maps keys to values: `{'a': 1}`.
a set: A set holds different items without an order: `{1, 2}`.
a string: A string is text in quotes: `'hello'`.
an integer: An integer is a whole number of any size, of type `int`.
a float: A float is a number with a fraction, such as `1.5`.
a boolean|a bool: A bool is `True` or `False`.
a variable: A variable is a name for an object: `x = 3`.
a function: A function is code with a name and parameters that gives a value: `def f(x): return x`.
a class: A class is a type that you define; its instances share its methods.
an object: An object is a value with a type; everything in Python is one.
a method: A method is a function of a class, called on an instance: `'a'.upper()`.
a module: A module is a file of Python code that others import.
a package: A package is a folder of modules.
a decorator: A decorator is a function that takes a function and gives another: `@cache`.
a generator: A generator is a function with `yield`, which gives its values one at a time.
an iterator: An iterator gives its next item each time that `next` is called.
an iterable: An iterable is what a `for` loop can go over: a list, a string, a file.
an exception: An exception is an error that is raised, and that `except` can catch.
a lambda: A lambda is a small function without a name: `lambda x: x + 1`.
a list comprehension|a comprehension: A comprehension builds a list in a line: `[x * x for x in y]`.
a context manager: A context manager sets something up and tears it down; `with` opens it.
an f-string: An f-string has expressions in braces: `f'{name} is {age}'`.
a docstring: A docstring is the text at the start of a function that says what it does.
a slice: A slice is a part of a sequence: `items[1:3]`.
recursion: Recursion is a function that calls itself.
a loop: A loop repeats statements: `for` over items, `while` by a condition.
a virtual environment: A virtual environment is a folder with its own packages: `python -m venv x`.
pip: pip installs packages: `python -m pip install NAME`.
the REPL: The REPL is the prompt `>>>`, where Python evaluates what you type.
the GIL: The GIL is a lock that lets one thread run Python code at a time.
a byte string|bytes: Bytes hold numbers from 0 to 255: `b'abc'`.
a namespace: A namespace maps names to objects, such as a module's or a function's.
a keyword argument: A keyword argument is passed by its name: `f(x=1)`.
a default argument: A default argument is a value taken where none is passed: `def f(x=1)`.
inheritance: Inheritance lets a class take over the methods of another: `class B(A)`.
mutable: Mutable objects can be changed: lists, dicts and sets are.
immutable: Immutable objects cannot be changed: numbers, strings and tuples are.
type hints|a type hint: A type hint says what type a value has: `def f(x: int) -> str`.
PEP 8: PEP 8 is the style guide for Python code.
indentation: Indentation, four spaces, says which statements belong to a block.
a comment: A comment begins with `#`; Python skips it.
an operator: An operator computes with its operands, as `+` does in `1 + 2`.
unpacking: Unpacking gives the items of a sequence to several names: `a, b = pair`.
a regular expression|regex: A regular expression is a pattern of text; the module `re` finds it.
"""

TALK = [
    ("hi|hello|hey|good morning|hello there|hi there|good evening|greetings|hey there",
     "Hello! Ask me something about Python."),
    ("how are you?|how are you doing?|how is it going?|are you well?|how do you do?",
     "I am a small program and always well. What would you like to know about Python?"),
    ("who are you?|what are you?|what is your name?|are you a bot?|are you human?|introduce "
     "yourself|are you an AI?|tell me about yourself|what kind of model are you?",
     "I am a small language model that knows Python's standard library a little."),
    ("what can you do?|help|what do you know?|how can you help me?|what can I ask you?|can you "
     "help me?|what are you good at?|I need help|what should I ask?",
     "I can say what a name such as `len` or `os.path.join` does, show its arguments or an "
     "example, work out small expressions, and write short functions."),
    ("who made you?|where do you come from?|who trained you?|how were you made?|how were you "
     "trained?|how old are you?",
     "I was trained in a few minutes, from scratch, on what Python says of itself."),
    ("thanks|thank you|thank you very much|thanks a lot|great, thanks|ok, thanks|thx|nice, thank "
     "you|that helps|perfect, thanks",
     "You are welcome!"),
    ("bye|goodbye|see you|good night|that is all|bye bye|see you later|I am done",
     "Goodbye!"),
    ("ok|good|great|nice|cool|I see|interesting|well done|wow|awesome|right|fine|yes",
     "Good. What else would you like to know?"),
    ("that is wrong|no|you are wrong|that is not right|are you sure?|really?|I do not believe it",
     "I may be wrong: I am a small model. Try it in Python, which knows."),
    ("what is Python?|tell me about Python|what is python|explain Python|is Python hard?",
     "Python is a programming language that is easy to read. Its standard library has modules "
     "for files, text, dates, numbers and much more."),
    ("tell me a joke|do you know a joke?|make me laugh|say something funny",
     "Why do programmers like dark mode? Light attracts bugs."),
]  # fmt: skip
DONT_KNOW = "I do not know that. I only know a little of Python's standard library."
UNKNOWN_NAME = "I do not know `{x}`. I only know a part of Python's standard library."
# Questions for which it is no help, and what fills them; of each the last two are for validation.
AWAY = """
what is the capital of {place}?
what is the weather in {place}?
where is {place}?
how do I get to {place}?
how many people live in {place}?
who is the president of {place}?
tell me about the history of {place}
what language do they speak in {place}?
how far is {place}?
who was {person}?
who is {person}?
when was {person} born?
what did {person} do?
tell me about {person}
what do you think of {person}?
how do I cook {food}?
what is a good recipe for {food}?
is {food} healthy?
do you like {food}?
how many calories has {food}?
where can I buy {food}?
write a poem about {thing}
write a story about {thing}
sing a song about {thing}
what is {thing}?
why is {thing} important?
tell me about {thing}
explain {thing}
what do you think about {thing}?
how does {thing} work?
translate {thing} into German
how do you say {thing} in French?
who won the {sport} game?
what are the rules of {sport}?
do you play {sport}?
who is the best {sport} player?
what is the meaning of life?
what should I do today?
what time is it?
what day is it?
I feel {mood}
I am {mood}
I am so {mood} today
why am I {mood}?
can you book a flight to {place}?
can you order {food}?
recommend a book about {thing}
recommend a film
what is your favourite colour?
do you love me?
do you have feelings?
what is the news?
should I buy stocks?
how much does a car cost?
how do I lose weight?
how do I learn English?
how do I program in {language}?
how do I write a loop in {language}?
what is {language}?
is {language} better than Python?
write a program in {language}
--
which is the largest city of {place}?
what did {person} write?
how long do I boil {food}?
give me a summary of {thing}
how do I become good at {sport}?
convert this to {language}
"""
FILLING = {
    "place": """France Germany Japan Italy Spain London Paris Berlin Tokyo India China Brazil
Canada Mexico Egypt Rome Madrid Moscow Sweden Norway Africa Texas -- Portugal Vienna""",
    "person": """Einstein Shakespeare Napoleon Mozart Newton Darwin Picasso Caesar Obama Lincoln
Gandhi Beethoven Plato Cleopatra Goethe Tesla -- Bach Galileo""",
    "food": """pasta rice bread soup pizza cake potatoes fish chicken eggs salad cheese chocolate
beans coffee tea -- pancakes noodles""",
    "thing": """love music physics the moon the sea war peace money art history football climate
chemistry gravity the sun dinosaurs cats dogs flowers friendship time travel economics biology
philosophy religion psychology electricity democracy winter -- astronomy the ocean""",
    "sport": "football tennis chess basketball hockey golf cricket rugby -- baseball volleyball",
    "mood": "sad happy tired bored angry hungry lonely sick nervous -- sleepy worried",
    "language": "Java C++ Rust JavaScript Go Ruby Perl Haskell PHP Swift -- Kotlin Fortran",
}
PHRASES = ["the moon", "the sea", "the sun", "time travel", "the ocean"]
# Names that are not in the standard library, or are there and not among the facts.
FOREIGN = """
numpy.array numpy.zeros numpy.dot pandas.DataFrame pandas.read_csv requests.get requests.post
torch.tensor torch.nn.Linear matplotlib.pyplot.plot flask.Flask django.db.models scipy.stats
sklearn.svm tensorflow.keras pytest.fixture yaml.safe_load bs4.BeautifulSoup PIL.Image tqdm.tqdm
"""
MADE_UP = """
frob twist blend spin shake glue scan merge_all flip_all guess invent paint smooth fetch_all melt
bounce tangle polish wiggle squash stretch repair vanish borrow hide juggle upload cook sing crush
"""


@lru_cache(None)
def wordings(block: str, held_out: bool) -> list[str]:
    """The lines of a block before, or with held_out behind, its line of dashes."""
    train, _, validation = block.strip().partition("\n--\n")
    return (validation if held_out else train).split("\n")


@lru_cache(None)
def filling(kind: str, held_out: bool) -> list[str]:
    train, _, validation = " ".join(FILLING[kind].split()).partition(" -- ")
    text = validation if held_out else train
    for phrase in PHRASES:
        text = text.replace(phrase, phrase.replace(" ", "_"))
    return [part.replace("_", " ") for part in text.split()]
