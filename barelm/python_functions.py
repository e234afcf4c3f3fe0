"""Short functions that the helper of python_chat.py writes, under any name. What each is for stands
there in several wordings, the last of which is for validation alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


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
def functions() -> list[Function]:
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


def write_function(function: Function, name: str, argument: str) -> str:
    """The code of a Function under this name, with this name of its argument."""
    return function.code.replace("{f}", name).replace("{x}", argument)


def checks_of(function: Function, name: str) -> str:
    """The statements that try it under a name, or "" where it has no calls."""
    lines = []
    for call in function.calls:
        given, _, value = call.partition(" -> ")
        lines.append(f"assert {name}({given}) == {value}")
    return "\n".join(lines)
