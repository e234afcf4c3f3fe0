"""Ways to do things in Python, as the helper of python_chat.py knows them: wordings with a slash
between them, and below, indented, the code. The last of several is for validation alone."""

from functools import lru_cache

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
def ways() -> list[tuple]:
    """[(wordings, code)] of the block above."""
    parsed = []
    for line in WAYS.strip().split("\n"):
        if line.startswith("    "):
            parsed[-1][1].append(line[4:])
        else:
            parsed.append((line.removesuffix(":").split("/"), []))
    return [(wordings, "\n".join(lines)) for wordings, lines in parsed]
