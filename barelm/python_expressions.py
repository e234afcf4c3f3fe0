"""Small expressions, drawn at random, whose values Python itself gives. Nothing is evaluated that
was not written here."""

import random
from typing import Any

WORDS = """
apple pear plum cherry lemon melon grape peach mango olive bread butter milk honey sugar salt
water river lake ocean island beach forest tree leaf flower grass stone sand cloud rain snow wind
storm winter summer spring autumn morning night light dark moon star planet earth paper pencil book
letter word line page story music piano guitar drum song dance color red blue green black white
house door window table chair garden street city village road bridge train car bike boat plane bird
cat dog horse sheep fish mouse lion tiger bear wolf python hello world test data file name value
""".split()


def word(rng: random.Random) -> str:
    return rng.choice(WORDS)


def digits(rng: random.Random, least: int = 2, most: int = 5) -> list[int]:
    return [rng.randrange(10) for _ in range(rng.randint(least, most))]


def letters(rng: random.Random, most: int = 6) -> str:
    return "".join(rng.choices("abcdexyz", k=rng.randint(2, most)))


def arithmetic(rng: random.Random) -> str:
    sign = rng.choice(["+", "-", "*", "//", "%", "+", "-"])
    most = {"+": 30, "-": 30, "*": 11, "//": 30, "%": 30}[sign]  # what can be learned in minutes
    second = rng.randrange(1, 10) if sign in ("//", "%") else rng.randrange(most)
    return f"{rng.randrange(most)} {sign} {second}"


def power(rng: random.Random) -> str:
    return f"{rng.randrange(1, 11)} ** {rng.randrange(4)}"


def comparison(rng: random.Random) -> str:
    sign = rng.choice(["<", ">", "<=", ">=", "==", "!="])
    return f"{rng.randrange(20)} {sign} {rng.randrange(20)}"


def logic(rng: random.Random) -> str:
    first, second = rng.choices(["True", "False", "not True", "not False"], k=2)
    return f"{first} {rng.choice(['and', 'or'])} {second}"


def over_numbers(rng: random.Random) -> str:
    function = rng.choice(["sorted", "max", "min", "len", "sum", "sorted", "set"])
    numbers = digits(rng, 2, 4 if function == "sum" else 6)
    if function == "set":
        return f"sorted(set({numbers}))"
    return f"{function}({numbers})"


def of_list(rng: random.Random) -> str:
    numbers = digits(rng, 3, 6)
    n = len(numbers)
    start = rng.randrange(n)
    stop = rng.randint(start, n)
    forms = [f"[{start}]", f"[{start}:{stop}]", f"[:{stop}]", f"[{start}:]", "[::-1]", "[-1]"]
    forms += [f".count({rng.choice(numbers)})", f" + {digits(rng, 1, 3)}"]
    forms += [f".index({rng.choice(numbers)})"]
    return f"{numbers}{rng.choice(forms)}"


def membership(rng: random.Random) -> str:
    return f"{rng.randrange(10)} in {digits(rng, 2, 5)}"


def ranges(rng: random.Random) -> str:
    start = rng.randrange(6)
    stop = start + rng.randint(1, 7)
    inside = rng.choice([f"{stop - start}", f"{start}, {stop}", f"{start}, {stop}, 2"])
    return f"list(range({inside}))"


def comprehension(rng: random.Random) -> str:
    each = rng.choice(["x * 2", "x + 1", "x * x", "x - 1"])
    source = rng.choice([f"range({rng.randint(2, 5)})", str(digits(rng, 2, 4))])
    condition = rng.choice(["", "", " if x > 2", " if x % 2 == 0"])
    return f"[{each} for x in {source}{condition}]"


def of_text(rng: random.Random) -> str:
    text = rng.choice([word(rng), word(rng), letters(rng)])
    n = len(text)
    start = rng.randrange(n)
    stop = rng.randint(start + 1, n)
    letter = rng.choice(text)
    forms = [".upper()", ".upper()", ".capitalize()", ".title()", "[::-1]", f"[{start}]", "[0]"]
    forms += [f"[{start}:{stop}]", f"[:{stop}]", "[-1]", f".count('{letter}')"]
    forms += [f".find('{letter}')", f".startswith('{letter}')", f".endswith('{letter}')"]
    forms += [f".replace('{letter}', '{rng.choice('aeiou')}')", f" * {rng.randint(2, 3)}"]
    return f"'{text}'{rng.choice(forms)}"


def lower(rng: random.Random) -> str:
    text = rng.choice([word(rng).upper(), word(rng).title()])
    return f"'{text}'.{rng.choice(['lower', 'swapcase', 'islower', 'isupper'])}()"


def around_text(rng: random.Random) -> str:
    text = rng.choice([word(rng), word(rng), letters(rng)])
    function = rng.choice(["len", "len", "list", "sorted", "set"])
    if function == "set":
        return f"len(set('{text}'))"
    return f"{function}('{text}')"


def words_together(rng: random.Random) -> str:
    words = [word(rng) for _ in range(rng.randint(2, 3))]
    sign = rng.choice(["-", ", ", " ", "+", "/"])
    forms = [f"'{sign}'.join({words})", f"{sign.join(words)!r}.split({sign!r})"]
    forms += [f"{words[0]!r} + {words[1]!r}", f"sorted({words})", f"{' '.join(words)!r}.split()"]
    forms += [f"len({words})", f"{words[0]!r} in {words}", f"{' '.join(words)!r}.title()"]
    return rng.choice(forms)


def of_dict(rng: random.Random) -> str:
    keys = rng.sample(["a", "b", "c", "x", "y", word(rng)], rng.randint(1, 3))
    mapping = {key: rng.randrange(20) for key in keys}
    key = rng.choice(keys)
    forms = [f"{mapping}[{key!r}]", f"{mapping}.get({key!r})", f"{mapping}.get('z', 0)"]
    forms += [f"list({mapping})", f"len({mapping})", f"list({mapping}.values())"]
    forms += [f"{key!r} in {mapping}", f"sorted({mapping}.items())"]
    return rng.choice(forms)


def conversion(rng: random.Random) -> str:
    n = rng.randrange(100)
    forms = [f"int('{n}')", f"str({n})", f"float({n})", f"int({n}.{rng.randrange(10)})"]
    forms += [f"bool({rng.choice([0, n, '[]', '[0]', repr(''), repr('a'), 'None'])})"]
    forms += [f"type({rng.choice([n, f'{n}.5', repr(word(rng)), '[1]', 'True', 'None'])}).__name__"]
    forms += [f"round({n}.{rng.randrange(1000):03d}, {rng.randint(1, 2)})", f"abs(-{n})"]
    forms += [f"{n} / {rng.choice([2, 4, 5])}", f"divmod({n}, {rng.randint(2, 9)})"]
    forms += [f"bin({n % 16})"]
    return rng.choice(forms)


def failing(rng: random.Random) -> str:
    n = rng.randrange(10)
    text = word(rng)
    forms = [f"int('{text}')", f"{digits(rng, 1, 3)}[{n + 4}]", f"{n} / 0", f"{n} % 0", f"{n} // 0"]
    forms += [f"'{text}' + {n}", f"{n} + '{text}'", f"{{'a': {n}}}['{text}']", f"len({n})"]
    forms += [f"'{text}'[{n + 8}]", f"{text}_{n}", f"{n}.5.upper()", f"[].pop({n})", "max([])"]
    forms += [f"{digits(rng, 2, 3)}.index({n + 10})", f"None + {n}", f"float('{text}')"]
    forms += [f"'{text}'.append('{rng.choice(text)}')", f"(1, 2)[{n + 3}]", f"sum({n})"]
    return rng.choice(forms)


EXPRESSIONS = {  # {kind: function that draws one}, a kind twice as often where it is there twice
    "arithmetic": [arithmetic, arithmetic, power],
    "logic": [comparison, logic, membership],
    "lists": [over_numbers, over_numbers, of_list, of_list, ranges, comprehension],
    "text": [of_text, of_text, lower, around_text, words_together],
    "dicts": [of_dict],
    "conversion": [conversion],
    "errors": [failing],
}


def draw_expression(kind: str, seed: Any) -> str:
    """An expression of a kind, by a seed or a random.Random."""
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    return rng.choice(EXPRESSIONS[kind])(rng)


def value_of(expression: str) -> str:
    """What Python says of an expression that this file wrote: its value, or what it raises."""
    try:
        return f"`{eval(expression, {})!r}`"
    except Exception as error:
        return f"It raises `{type(error).__name__}`: {error}"
