"""Code that the helper of python_chat.py writes: short functions under any name, and ways to do
things. What each is asked for is said in several wordings, the last of which is for validation."""

from dataclasses import dataclass
from functools import lru_cache

# --------------------------------------------------------------------------------------------------
# Functions


@dataclass(frozen=True)
class Function:
    """A function that can be asked for. {f} and {x} in the code are its name and its argument."""

    purposes: tuple[str, ...]  # what it does, behind "a function that"
    name: str
    arguments: tuple[str, ...]  # names that {x} may have
    code: str
    calls: tuple[str, ...]  # "arguments -> value" of calls that try it


NAMES = """
solve compute helper my_function run process convert do_it check work calc answer func go make get
apply result transform handle build find_it f g
""".split()  # that a function may be given
ARGUMENTS = {
    "NUMBERS": ("numbers", "values", "items", "data"),
    "TEXTS": ("text", "string", "s", "word"),
    "NUMBER": ("n", "number", "x"),
    "LISTS": ("items", "values", "elements", "data"),
    "PATHS": ("path", "filename"),
    "MAPPINGS": ("mapping", "d", "table"),
    "PEOPLE": ("name", "person"),
    "YEARS": ("year",),
}
# Wordings, its name and argument, its body, and calls with their values.
FUNCTIONS = """
returns the largest number of a list
finds the biggest number in a list
gives the maximum of a list
: largest(NUMBERS)
return max({x})
[3, 1, 2] -> 3; [5] -> 5

returns the smallest number of a list
finds the minimum of a list
gives the lowest number in a list
: smallest(NUMBERS)
return min({x})
[3, 1, 2] -> 1; [5] -> 5

adds up the numbers of a list
returns the sum of a list
computes the total of a list of numbers
: total(NUMBERS)
return sum({x})
[1, 2, 3] -> 6; [] -> 0

returns the average of a list
computes the mean of a list of numbers
gives the average value of numbers
: average(NUMBERS)
return sum({x}) / len({x})
[1, 2, 3] -> 2.0; [4] -> 4.0

returns the product of a list
multiplies all numbers of a list
gives the product of the numbers in a list
: product(NUMBERS)
result = 1
for number in {x}:
    result *= number
return result
[2, 3, 4] -> 24; [] -> 1

reverses a string
returns a string backwards
turns a text around
: reverse(TEXTS)
return {x}[::-1]
'abc' -> 'cba'; '' -> ''

reverses a list
returns a list in reverse order
turns a list around
: reverse_list(LISTS)
return {x}[::-1]
[1, 2, 3] -> [3, 2, 1]; [] -> []

tells whether a number is even
checks if a number is even
returns True for even numbers
: is_even(NUMBER)
return {x} % 2 == 0
4 -> True; 7 -> False

tells whether a number is odd
checks if a number is odd
returns True for odd numbers
: is_odd(NUMBER)
return {x} % 2 == 1
4 -> False; 7 -> True

tells whether a number is prime
checks if a number is prime
returns True for prime numbers
: is_prime(NUMBER)
if {x} < 2:
    return False
for i in range(2, int({x} ** 0.5) + 1):
    if {x} % i == 0:
        return False
return True
7 -> True; 9 -> False; 1 -> False

computes the factorial of a number
returns n factorial
gives the factorial of n
: factorial(NUMBER)
result = 1
for i in range(2, {x} + 1):
    result *= i
return result
5 -> 120; 0 -> 1

returns the nth Fibonacci number
computes Fibonacci numbers
gives a number of the Fibonacci sequence
: fibonacci(NUMBER)
a, b = 0, 1
for _ in range({x}):
    a, b = b, a + b
return a
10 -> 55; 0 -> 0

counts the vowels of a string
returns the number of vowels in a text
tells how many vowels a word has
: count_vowels(TEXTS)
return sum(letter in 'aeiou' for letter in {x}.lower())
'Apple' -> 2; 'xyz' -> 0

counts the words of a text
returns the number of words in a string
tells how many words a sentence has
: count_words(TEXTS)
return len({x}.split())
'a bc d' -> 3; '' -> 0

counts how often each word is in a text
counts word frequencies
returns how many times every word occurs
: word_counts(TEXTS)
counts = {}
for word in {x}.split():
    counts[word] = counts.get(word, 0) + 1
return counts
'a b a' -> {'a': 2, 'b': 1}

counts how often each letter is in a string
counts the letters of a word
returns letter frequencies
: letter_counts(TEXTS)
counts = {}
for letter in {x}:
    counts[letter] = counts.get(letter, 0) + 1
return counts
'aba' -> {'a': 2, 'b': 1}

tells whether a word is a palindrome
checks if a string is a palindrome
returns True for palindromes
: is_palindrome(TEXTS)
return {x} == {x}[::-1]
'anna' -> True; 'ab' -> False

removes duplicates from a list
returns a list without duplicates
keeps each item of a list once
: unique(LISTS)
return list(dict.fromkeys({x}))
[1, 2, 1] -> [1, 2]; [] -> []

flattens a list of lists
joins the lists of a list
makes one list of nested lists
: flatten(LISTS)
return [item for inner in {x} for item in inner]
[[1], [2, 3]] -> [1, 2, 3]

returns the even numbers of a list
keeps only even numbers
filters the even numbers from a list
: evens(NUMBERS)
return [number for number in {x} if number % 2 == 0]
[1, 2, 4] -> [2, 4]

returns the squares of a list of numbers
squares every number of a list
gives the square of each number
: squares(NUMBERS)
return [number * number for number in {x}]
[1, 2, 3] -> [1, 4, 9]

doubles every number of a list
returns each number times two
multiplies all numbers of a list by two
: double(NUMBERS)
return [number * 2 for number in {x}]
[1, 2] -> [2, 4]

returns the longest word of a text
finds the longest word in a sentence
gives the longest word of a string
: longest_word(TEXTS)
return max({x}.split(), key=len)
'a bcd ef' -> 'bcd'

sorts words by their length
sorts a list of strings by length
orders words from short to long
: by_length(LISTS)
return sorted({x}, key=len)
['abc', 'a'] -> ['a', 'abc']

converts Celsius to Fahrenheit
turns degrees Celsius into Fahrenheit
changes a Celsius temperature to Fahrenheit
: to_fahrenheit(NUMBER)
return {x} * 9 / 5 + 32
100 -> 212.0; 0 -> 32.0

capitalizes every word of a text
makes the first letter of each word upper case
puts a text in title case
: capitalize_words(TEXTS)
return ' '.join(word.capitalize() for word in {x}.split())
'ab cd' -> 'Ab Cd'

returns the digits of a number
splits a number into its digits
lists the digits of a number
: digits(NUMBER)
return [int(digit) for digit in str({x})]
123 -> [1, 2, 3]

sums the digits of a number
returns the sum of a number's digits
adds up all digits of a number
: digit_sum(NUMBER)
return sum(int(digit) for digit in str({x}))
123 -> 6

returns the divisors of a number
finds all divisors of a number
lists the numbers that divide n
: divisors(NUMBER)
return [i for i in range(1, {x} + 1) if {x} % i == 0]
6 -> [1, 2, 3, 6]

reads a file and returns its lines
returns the lines of a file
gives a list of the lines in a text file
: read_lines(PATHS)
with open({x}, encoding='utf-8') as file:
    return file.read().splitlines()

counts the lines of a file
returns the number of lines in a file
tells how many lines a text file has
: count_lines(PATHS)
with open({x}, encoding='utf-8') as file:
    return sum(1 for _ in file)

swaps the keys and values of a dict
inverts a dictionary
returns a dict with values as keys
: invert(MAPPINGS)
return {value: key for key, value in {x}.items()}
{'a': 1} -> {1: 'a'}

returns the key with the largest value of a dict
finds the key with the highest value
gives the key whose value is greatest
: best_key(MAPPINGS)
return max({x}, key={x}.get)
{'a': 1, 'b': 2} -> 'b'

says hello to a name
greets a person by name
returns a greeting for somebody
: greet(PEOPLE)
return f'Hello, {{x}}!'
'Ann' -> 'Hello, Ann!'

tells whether a year is a leap year
checks for leap years
returns True for a leap year
: is_leap_year(YEARS)
return {x} % 4 == 0 and ({x} % 100 != 0 or {x} % 400 == 0)
2024 -> True; 1900 -> False; 2000 -> True
"""


@lru_cache(1)
def functions():
    """[Function] of the blocks above."""
    parsed = []
    for block in FUNCTIONS.strip().split("\n\n"):
        wordings, _, rest = block.partition("\n: ")
        head, *body = rest.split("\n")
        name, _, arguments = head.removesuffix(")").partition("(")
        calls = ()
        if " -> " in body[-1]:
            calls = tuple(body.pop().split("; "))
        code = "\n".join(["def {f}({x}):", *(f"    {line}" for line in body)])
        purposes = tuple(wordings.split("\n"))
        parsed.append(Function(purposes, name, ARGUMENTS[arguments], code, calls))
    return parsed


def write_function(function, name, argument):
    """The code of a Function under this name, with this name of its argument."""
    return function.code.replace("{f}", name).replace("{x}", argument)


def checks_of(function, name):
    """The statements that try it under a name, or "" where it has no calls."""
    lines = []
    for call in function.calls:
        given, _, value = call.partition(" -> ")
        lines.append(f"assert {name}({given}) == {value}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Ways to do things: wordings, and behind them, indented, the code

WAYS = """
sort a list/put a list in order/order the items of a list:
    sorted(items)
sort a list in descending order/sort a list from large to small/sort backwards:
    sorted(items, reverse=True)
sort a dict by its values/order a dictionary by value:
    sorted(d.items(), key=lambda pair: pair[1])
reverse a list/turn a list around/get a list backwards:
    items[::-1]
reverse a string/turn a string around/get a string backwards:
    text[::-1]
get the length of a list/count the items of a list/know how many items a list has:
    len(items)
get the length of a string/count the characters of a string/find out how long a text is:
    len(text)
add an item to a list/append to a list/put something at the end of a list:
    items.append(4)
remove an item from a list/delete a value from a list/take an item out of a list:
    items.remove(2)
remove the last item of a list/pop from a list/drop the last element of a list:
    items.pop()
get the last item of a list/access the last element of a list/see the end of a list:
    items[-1]
get the first item of a list/access the first element of a list/see the start of a list:
    items[0]
join two lists/concatenate lists/put two lists together:
    items + other
remove duplicates from a list/get the unique items of a list/drop repeated items:
    list(dict.fromkeys(items))
count how often an item is in a list/count occurrences in a list:
    items.count(2)
count all items of a list/count how often each item occurs/get frequencies:
    from collections import Counter
    Counter(items)
find the index of an item/get the position of an item in a list/know where an item is:
    items.index(2)
check whether an item is in a list/test if a list contains a value/see if a value is in a list:
    2 in items
copy a list/make a copy of a list/duplicate a list:
    items.copy()
make a list of numbers/create a list from 0 to 9/get the numbers below 10:
    list(range(10))
make an empty list/create an empty list:
    items = []
make an empty dict/create an empty dictionary:
    d = {}
make an empty set/create an empty set:
    seen = set()
loop over a list/iterate over a list/go through a list:
    for item in items:
        print(item)
loop over a list with its index/get the index in a loop/enumerate a list:
    for i, item in enumerate(items):
        print(i, item)
loop over two lists at once/iterate over two lists together:
    for a, b in zip(items, other):
        print(a, b)
loop over a dict/iterate over a dictionary/go through a dict:
    for key, value in d.items():
        print(key, value)
loop ten times/repeat something ten times/do something 10 times:
    for i in range(10):
        print(i)
get the largest number of a list/find the maximum/find the biggest number:
    max(numbers)
get the smallest number of a list/find the minimum/find the lowest number:
    min(numbers)
add up numbers/sum a list/get the total of a list:
    sum(numbers)
get the average of numbers/compute the mean/calculate an average:
    sum(numbers) / len(numbers)
round a number/round to two digits/round a float:
    round(3.14159, 2)
get a random number/draw a random integer/make a random number:
    import random
    random.randint(1, 10)
choose a random item/pick a random element of a list:
    import random
    random.choice(items)
shuffle a list/mix a list randomly/put a list in random order:
    import random
    random.shuffle(items)
get the square root of a number/compute a square root/take a root:
    import math
    math.sqrt(16)
split a string/cut a string into words/get the words of a text:
    text.split()
split a string at commas/split by comma/cut a text at commas:
    text.split(',')
join strings/concatenate a list of strings/make one string of many:
    ', '.join(words)
make a string upper case/convert to uppercase/write a text in capitals:
    text.upper()
make a string lower case/convert to lowercase/write a text in small letters:
    text.lower()
replace part of a string/substitute text in a string/change a word in a string:
    text.replace('a', 'b')
strip whitespace/remove spaces around a string/trim a string:
    text.strip()
check whether a string contains another/test for a substring/see if a word is in a text:
    'a' in text
check how a string starts/test the start of a string/see if a text begins with a word:
    text.startswith('a')
format a string/put a variable into a string/use an f-string:
    f'{name} is {age}'
convert a string to an int/turn a string into a number/parse an integer:
    int('42')
convert a number to a string/turn a number into text/make a string of a number:
    str(42)
convert a string to a float/parse a float/turn text into a decimal number:
    float('1.5')
convert a list to a set/make a set of a list:
    set(items)
convert a list to a tuple/make a tuple of a list:
    tuple(items)
convert a string to a list/get the characters of a string/split a string into letters:
    list(text)
read a file/get the text of a file/load a text file:
    with open('notes.txt') as file:
        text = file.read()
write a file/save text to a file/write text into a file:
    with open('notes.txt', 'w') as file:
        file.write(text)
append to a file/add a line to a file/write at the end of a file:
    with open('notes.txt', 'a') as file:
        file.write('more')
read a file line by line/loop over the lines of a file/go through a file:
    with open('notes.txt') as file:
        for line in file:
            print(line)
check whether a file exists/test if a file is there/see if a path exists:
    import os
    os.path.exists('notes.txt')
list the files of a folder/get the files in a directory/see what is in a folder:
    import os
    os.listdir('.')
make a folder/create a directory/make a new directory:
    import os
    os.makedirs('new', exist_ok=True)
join paths/build a path/put two paths together:
    import os
    os.path.join('home', 'notes.txt')
get the current directory/find the working directory/know which folder I am in:
    import os
    os.getcwd()
read JSON/parse JSON/load a JSON string:
    import json
    json.loads('[1, 2]')
write JSON/make JSON/convert a dict to JSON:
    import json
    json.dumps(d)
get the current time/know what time it is/get the date and time:
    from datetime import datetime
    datetime.now()
get today's date/know the date of today/get the current date:
    from datetime import date
    date.today()
wait a second/sleep/pause a program:
    import time
    time.sleep(1)
measure time/time my code/see how long code takes:
    import time
    start = time.perf_counter()
    print(time.perf_counter() - start)
get a value from a dict/look up a key/read from a dictionary:
    d['a']
get a value or a default from a dict/look up a key that may be missing:
    d.get('z', 0)
add a key to a dict/set a value in a dict/put something into a dictionary:
    d['b'] = 2
delete a key from a dict/remove a key from a dictionary:
    del d['a']
check whether a key is in a dict/test for a key/see if a dict has a key:
    'a' in d
merge two dicts/join dictionaries/combine two dicts:
    d | {'b': 2}
get the keys of a dict/list the keys of a dictionary:
    list(d)
get the values of a dict/list the values of a dictionary:
    list(d.values())
swap two variables/exchange two values/switch two variables:
    a, b = b, a
define a function/write a function/make a function:
    def double(x):
        return 2 * x
define a class/write a class/make a class:
    class Dog:
        def __init__(self, name):
            self.name = name
catch an exception/handle an error/use try and except:
    try:
        int('x')
    except ValueError:
        print('no number')
raise an exception/raise an error/signal an error:
    raise ValueError('what is wrong')
import a module/use a module/load a module:
    import math
print something/show text on the screen/write output:
    print('hello')
ask the user for input/read input/get text from the user:
    name = input('Name: ')
write a comment/comment a line/add a comment:
    # a comment
make a list comprehension/use a comprehension/build a list in one line:
    [x * x for x in range(10)]
filter a list/select items of a list/keep only some items:
    [x for x in items if x > 1]
apply a function to a list/change every item of a list/map over a list:
    [x + 1 for x in items]
flatten a list of lists/flatten a nested list/make one list of lists:
    [x for inner in rows for x in inner]
get the type of an object/find out the type of a value/know what type something is:
    type(items)
check the type of an object/test whether something is an int:
    isinstance(3, int)
run a command/start a program/call a shell command:
    import subprocess
    subprocess.run(['ls'])
get command line arguments/read the arguments of a script:
    import sys
    sys.argv[1:]
stop a program/exit a script/quit Python:
    import sys
    sys.exit()
find numbers in a text/search with a regular expression/use a regex:
    import re
    re.findall('[0-9]+', text)
replace with a regular expression/substitute a pattern:
    import re
    re.sub('[0-9]', '#', text)
cache a function/memoize a function/remember results:
    from functools import cache
make a dataclass/write a dataclass/use dataclasses:
    from dataclasses import dataclass
make a default dict/use a defaultdict/group items:
    from collections import defaultdict
    groups = defaultdict(list)
divide without a rest/do integer division/divide and round down:
    7 // 2
get the rest of a division/compute a remainder/use modulo:
    7 % 3
raise a number to a power/compute a power/square a number:
    2 ** 3
install a package/install a library/get a package:
    python -m pip install NAME
make a virtual environment/create a venv/set up an environment:
    python -m venv env
"""


@lru_cache(1)
def ways():
    """[(wordings, code)] of the block above."""
    parsed = []
    for line in WAYS.strip().split("\n"):
        if line.startswith("    "):
            parsed[-1][1].append(line[4:])
        else:
            parsed.append((line.removesuffix(":").split("/"), []))
    return [(wordings, "\n".join(lines)) for wordings, lines in parsed]
