# ruff: noqa: E501 (sentences are easier to compare on one line each)
"""barelm/clean.py, the steps that clean and filter one document: every limit from both sides, and
nasty inputs."""

import dataclasses
import random
import sys
import time
import unicodedata
from collections import Counter

import pytest

import prepare
from barelm import clean as f
from barelm.run import UserError


def reason(step, text, *settings):
    """Why `step` rejects the text, or None."""
    try:
        step(text, *settings)
    except f.Reject as error:
        return error.args[0]


def words(n, seed=0, length=5):
    """n different pseudo-words of this length."""
    rng = random.Random(seed)
    found = {}
    while len(found) < n:
        found["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length))] = 1
    return list(found)


def good(n=200, line=10):
    """Text that passes every filter: different words, with two stop words, in sentences."""
    text = ["the", "and", *words(n - 2)]
    lines = [" ".join(text[i : i + line]) + "." for i in range(0, n, line)]
    return "\n".join(s.capitalize() for s in lines).replace("The ", "the ", 1)


def crossed(step, inside, outside, expected, *settings):
    assert reason(step, inside, *settings) is None
    assert reason(step, outside, *settings) == expected


# HTML


@pytest.mark.parametrize(
    "page, expected",
    [
        ("<p>one<p>two", "one\n\ntwo"),
        ("<p>a  b\n c</p>", "a b c"),
        ("<b>bo</b>ld <i> it</i>", "bold it"),
        ("a<br>b<br/>c<br><br>d", "a\nb\nc\n\nd"),
        ("&lt;p&gt; &amp;amp; caf&eacute;&#33; &#x2014;", "<p> &amp; café! —"),
        ("<ul><li>a<li>b<ul><li>c</ul></ul>d", "- a\n- b\n- c\n\nd"),
        ("<ul><li><p>a</p><p>b</p></li><li></li><li><p>c</li></ul>", "- a\nb\n- c"),
        ("<table><tr><th>x<th>y<tr><td><p>1</p></td><td></td><td>3</table>", "x | y\n1 |  | 3"),
        ("x<pre>\n  if a:\n\n\n      b  c\n</pre>y", "x\n\n  if a:\n\n\n      b  c\n\ny"),
        ("<pre><span>  </span>a <b>b</b></pre>", "  a b"),
        ("<h1>Head<a href=#h>¶</a></h1>t", "Head\n\nt"),
        ("<pre>│\xa0 x</pre>", "│\xa0 x"),
        ("\ufeff<pre>\r\na\r\n  b\rc&#13;&#10;d&#xD;e\x85f</pre>", "a\n  b\nc\nd\ne\x85f"),
        ("<div>a<div role='navigation'><div>b</div>c</div>d</div>", "a\n\nd"),
        ("<head><title>T</title><style>p{}</style><p>x", "x"),
        ("<script>if (a<b) '<p>no</p>'</script>x<noscript>n</noscript>", "x"),
        ("<div><nav>menu</div>text", "text"),  # the end of the outer element closes the inner one
        ("<nav><b>a</p></b>menu</nav>text", "text"),
        ("<header>site</header><article><header>title</header>x</article>", "title\n\nx"),
        ("a<!-- <p>b --> c<![if IE]>d<![endif]>e<!x>f<?php g ?>h", "a cdefh"),
        ("<form>f<button>b</button></form><svg><text>s</text></svg>x</svg></nav>", "x"),
        ("<ul><li>a<li></ul>b<nav><ul><li>menu</ul></nav>c", "- a\n\nb\n\nc"),
        ("<p title='a > b' class=c>x<a href=y/>z</a>", "xz"),
        ("x &#" + "9" * 5000 + "; &#0065;", "x \ufffd A"),
        ("a \n b<nav><pre> x</nav>", "a b"),
        ("", ""),
        ("<", "<"),
    ],
)
def test_html(page, expected):
    assert f.html_to_text(page) == expected


def test_html_of_any_kind_is_read_without_an_error():
    rng = random.Random(0)
    parts = (
        "<p> </p> <pre> </pre> <nav </nav> <![foo[ <!-- --> <! </ < > & &#x; &#1114112; <td> <li> "
    )
    parts = [
        *parts.split(" "),
        " ",
        "\n",
        "x",
        "<tr>",
        "\0",
        "\ud800",
        "<script>",
        "</script>",
        "'",
    ]
    for _ in range(3000):
        page = "".join(rng.choices(parts, k=rng.randrange(40)))
        assert isinstance(f.html_to_text(page), str)
    n = 20_000
    assert f.html_to_text("<div>" * n + "x" + "</div>" * n) == "x"


def growth(function, text, n):
    """How much more of a processor's time a text of eight times the length takes (which neither a
    slow nor a busy machine changes): 8, where the work grows with the length; 64, with its square."""
    best = []
    for length in (n, 8 * n):
        seconds = []
        for _ in range(3):
            start = time.process_time()
            function(text(length))
            seconds.append(time.process_time() - start)
        best.append(min(seconds))
    return best[1] / max(best[0], 1e-3)  # the clock's steps are no work


PAGES = {
    "nested": lambda n: "<div>" * n + "x" + "</div>" * n,
    "crossed": lambda n: "<div>" * n + "</b>" * n,
    "lists": lambda n: "<ul><li>" * n + "y",
}
UNENDED = ("<!", "<a", "<a ", "<a href='", "<!--", "&", "<pre>\n", "<![foo[")


@pytest.mark.parametrize("page", [*PAGES, *UNENDED])
def test_the_work_on_a_page_grows_with_its_length(page):
    text = PAGES.get(page, lambda n: page * n)
    assert growth(f.html_to_text, text, 4000) < 30


def test_html_only_where_the_name_says_so_or_it_is_asked_for():
    page = "<p>x</p>"
    for name in ("a.html", "a.HTM", "b.xhtml"):
        assert f.clean_html(page, {"path": name}, None) == "x"
    assert f.clean_html(page, {"url": "http://a.org/b.html?q=1"}, None) == "x"
    assert f.clean_html(page, {"path": "a.txt"}, None) == f.clean_html(page, {}, None) == page
    assert f.clean_html(page, {}, True) == "x"
    assert f.clean_html(page, {"path": "a.html"}, False) == page


# Characters


@pytest.mark.parametrize(
    "text, expected",
    [
        ("e\u0301", "é"),
        ("a\r\nb\rc\x0bd\u2028e\x85f", "a\nb\nc\nd\ne\nf"),
        ("\ufeffa\u200bb\u061c\xadc\u202ed\x00\x1b\x7f\x9fe", "abcde"),
        ("a\tb\n", "a\tb\n"),
        ("e\u200b\u0301", "é"),  # composed after what stood between is gone
        ("می\u200cخواهم 👩\u200d💻", "می\u200cخواهم 👩\u200d💻"),
    ],
)
def test_unicode(text, expected):
    cleaned = f.clean_unicode(text)
    assert cleaned == expected == f.clean_unicode(cleaned)
    cleaned.encode()


def test_symbols(monkeypatch):
    """Character by character, by Unicode's tables as Python has them."""
    all_but_emoji = "control,private,box,shapes,dingbats"
    blocks = [(0x2500, 0x25FF), (0x2600, 0x27BF), (0x2800, 0x28FF), (0xFFFD, 0xFFFD)]
    for code in [*range(0x3000), *range(0xD7FC, 0x10000, 7), *range(0x1F000, 0x1FB00), 0x10FFFF]:
        char = chr(code)
        if "\ud800" <= char <= "\udfff":
            continue
        control = unicodedata.category(char) == "Cc" and char not in "\t\n\v\f\r\x85"
        dropped = control or unicodedata.category(char) == "Co"
        dropped |= any(low <= code <= high for low, high in blocks)
        if unicodedata.category(char) != "Cn":  # its tables may be older than regex's
            expected = "ab" if dropped else f"a{char}b"
            assert f.drop_symbols(f"a{char}b", all_but_emoji) == expected, hex(code)
    for text, expected in [
        ("┌──┐\n│ab│\n└──┘", "\nab\n"),
        ("\x1b[1;31mred\x1b[0m\x07 \ue000x\U000f0000\ufffdy", "red xy"),
        ("★ ✓ done ▓▒░ ■□ ⠋⠙ wait", "  done    wait"),
        ("1️⃣ 👍🏽 👩\u200d💻 🇩🇪 🏴\U000e0067\U000e0062\U000e007f ❤️ ⚡ ok", "1       ok"),
        ("© ® ™ → ½ € § № 1*2#3 «x» … – हिन्दी می\u200cخواهم ñ 中文", None),
    ]:
        assert f.drop_symbols(text, True) == (text if expected is None else expected)
    assert f.drop_symbols("─★👍\x07", "box, emoji") == "★\x07"
    monkeypatch.setattr(prepare, "clean_symbols", "box, emoji")
    monkeypatch.setattr(prepare, "steps", "html,unicode,length")
    assert prepare.asked_steps() == ["html", "unicode", "symbols", "length"]
    monkeypatch.setattr(prepare, "clean_symbols", "runes")
    with pytest.raises(UserError, match="clean_symbols=runes: expected true, or some of"):
        prepare.check_settings()


def test_whitespace():
    text = "\n\n a \t b\xa0c  \n \n\n\nd\ne "
    assert f.clean_whitespace(text) == "a b c\n\nd\ne"


def test_length():
    crossed(f.check_length, "x" * 20, "x" * 19, "length: under min_chars", 20, 30)
    crossed(f.check_length, "x" * 30, "x" * 31, "length: over max_chars", 20, 30)


# Gopher


def one_line(n, length=5):
    return " ".join(["the", "and", *words(n - 2, length=length)])


QUALITY = [  # just inside of the limit, just outside
    (one_line(50), one_line(49), "fewer than 50 words"),
    ("the and " + "abcde " * 99_998, "the and " + "abcde " * 99_999, "more than 100,000 words"),
    ("the to " + "aaa " * 97 + "bbbb", "the to " + "aaa " * 98, "words too short"),
    (
        " ".join(["the", "to", "a" * 15, *["b" * 10] * 97]),  # a mean of 9.9
        " ".join(["the", "to", "a" * 26, *["b" * 10] * 97]),  # a mean of 10.01
        "words too long",
    ),
    ("#x " * 10 + one_line(90), "#x " * 11 + one_line(89), "too many hashes"),
    ("a... " * 10 + one_line(90), "a… " * 11 + one_line(89), "too many ellipses"),
    ("- x\n" * 9 + one_line(60), "• x\n" * 10 + one_line(60), "too many bullet lines"),
    (
        one_line(60) + "\nx" * 6 + "\nx..." * 3,
        one_line(60) + "\nx" * 6 + "\nx…" * 4,
        "too many lines that end in an ellipsis",
    ),
    (one_line(80) + " 1234" * 20, one_line(79) + " 1234" * 21, "too few words with a letter"),
    ("the and " + "abcde " * 60, "the The " + "abcde " * 60, "too few stop words"),
]


@pytest.mark.parametrize("inside, outside, expected", QUALITY)
def test_gopher_quality(inside, outside, expected):
    crossed(f.check_gopher_quality, inside, outside, f"gopher: {expected}")


def naive_repetition(text):
    """The verdict by the definitions, with nothing spared: quadratic and plain."""

    def share_of_repeats(parts, by_chars):
        again = [part for i, part in enumerate(parts) if part in parts[:i]]
        return sum(map(len, again)) / len(text) if by_chars else len(again) / len(parts)

    paragraphs = [p.lstrip("\n") for p in text.strip().split("\n\n") if p.strip("\n")]
    lines = [line for line in text.split("\n") if line]
    for kind, parts in ("paragraph", paragraphs), ("line", lines):
        if share_of_repeats(parts, False) > 0.3:
            return f"gopher: duplicate {kind}s"
        if share_of_repeats(parts, True) > 0.2:
            return f"gopher: characters in duplicate {kind}s"
    tokens = text.split()
    for n, limit in (2, 0.20), (3, 0.18), (4, 0.16):
        grams = [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        if grams:
            best = grams[0]
            for gram in grams:
                best = gram if grams.count(gram) > grams.count(best) else best
            if len(best) * grams.count(best) / len(text) > limit:
                return f"gopher: top {n}-gram"
    for n, limit in (5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10):
        known, chars, i = [], 0, 0
        while i + n <= len(tokens):
            gram = tokens[i : i + n]
            if gram in known:
                chars += sum(len(token) for token in gram)
                i += n
            else:
                known.append(gram)
                i += 1
        if chars / len(text) > limit:
            return f"gopher: duplicate {n}-grams"
    return None


def test_gopher_repetition_is_the_naive_one_on_random_texts():
    rng, verdicts = random.Random(1), Counter()
    for _ in range(400):
        vocabulary = words(rng.choice([3, 20, 200]), seed=rng.random(), length=rng.randint(3, 9))
        text = rng.choices(vocabulary, k=rng.randint(1, 160))
        for _ in range(rng.randrange(5)):  # repeat a piece of it, of some length, somewhere
            i, n, j = (rng.randrange(len(text)), rng.randint(3, 14), rng.randrange(len(text)))
            text[j:j] = text[i : i + n]
        for _ in range(rng.randrange(10)):
            text.insert(rng.randrange(len(text)), rng.choice(["\n", "\n\n"]))
        text = " ".join(text).replace(" \n", "\n").replace("\n ", "\n").strip()
        found = reason(f.check_gopher_repetition, text)
        assert found == naive_repetition(text), text
        verdicts[found] += 1
    assert verdicts[None] > 20 and len(verdicts) > 8, verdicts  # most rules had their turn


def padded(repeat, times, total, between=" "):
    """`repeat` so many times among different words, `total` characters."""
    rest = " ".join(words(total, length=7))
    text = between.join(f"{repeat}{between}{w}" for w in words(times, 5, 3)) + between
    return text + rest[: total - len(text)]


@pytest.mark.parametrize("n, limit", [(2, 0.20), (3, 0.18), (4, 0.16)])
def test_gopher_top_n_gram_limits(n, limit):
    repeat, times = " ".join(words(n, 7)), 4
    size = len(repeat) * times / limit
    for total, expected in ((size + 3, None), (size - 3, f"gopher: top {n}-gram")):
        text = padded(repeat, times, round(total))
        assert reason(f.check_gopher_repetition, text) == expected


@pytest.mark.parametrize(
    "n, limit", [(5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)]
)
def test_gopher_duplicate_n_gram_limits(n, limit):
    repeats = [" ".join(words(n, seed, 6)) for seed in range(20)]  # each stands there twice
    size = 20 * n * 6 / limit
    for total, expected in ((size + 3, None), (size - 3, f"gopher: duplicate {n}-grams")):
        between = words(40, 21, 3)
        text = " ".join(f"{r} {w}" for r, w in zip(repeats * 2, between)) + " "
        text = (text + " ".join(words(1500, 22, 7)))[: round(total)]
        assert reason(f.check_gopher_repetition, text) == expected


@pytest.mark.parametrize("kind, between", [("paragraph", "\n\n"), ("line", "\n")])
def test_gopher_duplicate_lines_and_paragraphs(kind, between):
    different = words(70, length=30)
    inside, outside = ["ab"] * 31 + different[:69], ["ab"] * 32 + different[:68]  # 30 and 31 again
    join = lambda parts: between.join(random.Random(0).sample(parts, len(parts)))
    crossed(f.check_gopher_repetition, join(inside), join(outside), f"gopher: duplicate {kind}s")
    long = " ".join(words(33, 2))  # 197 characters once again, of 975 and 995
    limit = f"gopher: characters in duplicate {kind}s"
    inside, outside = (
        between.join([long, long, *words(50, length=40)])[:size] for size in (995, 975)
    )
    assert reason(f.check_gopher_repetition, outside) == limit
    assert reason(f.check_gopher_repetition, inside) != limit


def test_gopher_repetition_of_next_to_nothing():
    assert reason(f.check_gopher_repetition, "") is None
    assert reason(f.check_gopher_repetition, "a b") == "gopher: top 2-gram"


# C4 and FineWeb


def test_c4():
    keep = "\n".join(f"This is sentence {i}." for i in "abcde")
    crossed(f.check_c4, keep, keep[:-22], "c4: fewer than 5 sentences")
    assert reason(f.check_c4, "One is here. Two is here! Three, too? Four. And five") is None
    assert reason(f.check_c4, keep + "\nIt says Lorem Ipsum dolor") == "c4: lorem ipsum"
    assert reason(f.check_c4, keep + "\nint main() { return") == "c4: curly bracket"
    dropped = ["Two words", "Please enable Javascript here", "See our Privacy Policy now"]
    dropped += ["This site uses cookies, too", "a long " + "x" * 1001]
    for line in dropped:
        assert f.check_c4(f"{line}\n{keep}") == keep
    kept = ["a long " + "x" * 1000, "Now three words", "The cookies are useful and private"]
    for line in kept:
        assert f.check_c4(f"{line}\n{keep}") == f"{line}\n{keep}"
    cited = f.check_c4(f"As known[12] so [edit]\n\n\n\n{keep}")
    assert cited == f"As known so \n\n{keep}"


def lines(*groups):
    """Lines of 10 words: (how many, what each ends in)."""
    pool = iter(words(4000))
    return "\n".join(
        " ".join(next(pool) for _ in range(10)) + end for n, end in groups for _ in range(n)
    )


def test_fineweb():
    crossed(
        f.check_fineweb,
        lines((12, "."), (88, ",")),
        lines((11, "."), (89, ",")),
        "fineweb: too few lines end in punctuation",
    )
    for end in ("!", "?", '"', "。", "؟", "”"):
        assert reason(f.check_fineweb, lines((12, end), (88, ""))) is None
    short, less = (
        "\n".join(f"{w} b c d e f".ljust(n, "x") for w in words(67, 3)) for n in (30, 31)
    )
    long = "\n" + "\n".join(f"{w} ab cd ef gh ij kl mn op qr st uv." for w in words(33, 4))
    reason_short = "fineweb: too many short lines"
    crossed(f.check_fineweb, short + long, short + "\nab cd ef gh." + long, reason_short)
    assert reason(f.check_fineweb, less + "\nab cd ef gh." + long) is None
    line = "a b c d e f g h i " * 2 + "."
    rest = lines((13, "."))
    texts = [f"{line}\n{line}\n{rest}"[: len(line) * n] for n in (11, 9)]
    crossed(f.check_fineweb, *texts, "fineweb: characters in duplicate lines")
    three, four = ("\n".join(w + " x" * n + "x" * 30 + "." for w in words(30)) for n in (2, 3))
    crossed(f.check_fineweb, four, three, "fineweb: too few words a line")
    assert reason(f.check_fineweb, four.replace("\n", "\n\n")) is None  # blank lines do not count
    assert reason(f.check_fineweb, " \n") == "fineweb: no text"


def settings(**changes):
    """The Cleaning of prepare.py's defaults."""
    return dataclasses.replace(prepare.cleaning_settings(), **changes)


def test_a_good_text_passes_everything_unchanged():
    text = good()
    assert len(f.STEPS) == 13 and list(f.STEPS)[:2] == ["html", "unicode"]
    for name in f.STEPS:
        if name not in ("language", "perplexity"):  # which want a model
            assert f.apply_step(name, text, {"path": "a.txt"}, settings()) == text


def test_each_step_gets_its_settings(tmp_path):
    (tmp_path / "list").write_text("word\n")
    record = {"url": "http://a.org/"}
    step = lambda name, text, **changes: f.apply_step(name, text, record, settings(**changes))
    assert step("html", "<p>x</p>") == "<p>x</p>"
    assert step("html", "<p>x</p>", html_documents=True) == "x"
    assert step("symbols", "★─", clean_symbols="box") == "★"
    assert step("symbols", "★─x") == "x"  # asked for by name: all of them
    assert step("length", "x", min_chars=1) == "x"
    for changes in ({"min_chars": 3}, {"min_chars": 0, "max_chars": 1}):
        with pytest.raises(f.Reject, match="length"):
            step("length", "xx", **changes)
    with pytest.raises(f.Reject, match="blocklist: word"):
        step("blocklist", "a word", blocklist=str(tmp_path / "list"))
    with pytest.raises(UserError, match="needs --perplexity_model=FOLDER"):
        step("perplexity", "text")


# Languages

SENTENCES = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft begabt.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met het verstand.",
    "sv": "Alla människor är födda fria och lika i värde och rättigheter. De har utrustats med förnuft och det är bra.",
    "da": "Alle mennesker er født frie og lige i værdighed og rettigheder. De er udstyret med fornuft og samvittighed, og de bør handle mod hverandre af hjertet.",
    "no": "Alle mennesker er født frie og med samme menneskeverd og menneskerettigheter. De er utstyrt med fornuft, og det har ikke noe å si hvor de kommer fra.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón, deben comportarse los unos con los otros.",
    "ca": "Tots els éssers humans neixen lliures i iguals en dignitat i en drets. Són dotats de raó i de consciència, i els cal amb això una conducta fraternal.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. São dotados de razão e não devem ser tratados com desprezo.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e di coscienza e non devono che agire con la fratellanza.",
    "ro": "Toate ființele umane se nasc libere și egale în demnitate și în drepturi. Ele sunt înzestrate cu rațiune și trebuie să se comporte unele față de altele.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem i sumieniem.",
    "cs": "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Jsou nadáni rozumem a svědomím a mají spolu jednat v duchu bratrství.",
    "sk": "Všetci ľudia sa rodia slobodní a sebe rovní, čo sa týka ich dôstojnosti a práv. Sú obdarení rozumom a majú navzájom jednať v bratskom duchu, ktorý je dobrý.",
    "hr": "Sva ljudska bića rađaju se slobodna i jednaka u dostojanstvu i pravima. Ona su obdarena razumom i sviješću i trebaju jedna prema drugima postupati u duhu bratstva, što nije lako.",
    "hu": "Minden emberi lény szabadon születik és egyenlő méltósága és joga van. Az emberek, ésszel és lelkiismerettel bírván, egymással szemben testvéri szellemben kell hogy viseltessenek.",
    "fi": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu järki ja omatunto, ja heidän on toimittava toisiaan kohtaan veljeyden hengessä.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler.",
    "id": "Semua orang dilahirkan merdeka dan mempunyai martabat dan hak yang sama. Mereka dikaruniai akal dan hati nurani dan hendaknya bergaul dengan satu sama lain dalam persaudaraan.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi. Mọi con người đều được tạo hóa ban cho lý trí và lương tâm.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны поступать в отношении друг друга в духе братства.",
    "uk": "Всі люди народжуються вільними і рівними у своїй гідності та правах. Вони наділені розумом і совістю і повинні діяти у відношенні один до одного в дусі братерства.",
    "be": "Усе людзі нараджаюцца свабоднымі і роўнымі ў сваёй годнасці і правах. Яны надзелены розумам і сумленнем і павінны ставіцца адзін да аднаго ў духу брацтва.",
    "bg": "Всички хора се раждат свободни и равни по достойнство и права. Те са надарени с разум и съвест и следва да се отнасят помежду си в дух на братство.",
    "mk": "Сите човечки суштества се раѓаат слободни и еднакви по достоинство и права. Тие се обдарени со разум и совест и треба да се однесуваат еден кон друг во духот на братството.",
    "sr": "Сва људска бића рађају се слободна и једнака у достојанству и правима. Она су обдарена разумом и свешћу и треба једни према другима да поступају у духу братства.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "he": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "ar": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم بعضا بروح الإخاء في كل ذلك.",
    "fa": "تمام افراد بشر آزاد به دنیا می آیند و از لحاظ حیثیت و حقوق با هم برابرند. همه دارای عقل و وجدان هستند و باید نسبت به یکدیگر با روح برادری رفتار کنند.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_languages(code):
    pytest.importorskip("py3langid")
    best, score, rivals = f.guess_language(SENTENCES[code])
    assert code in (best, *rivals) and 0 < score < 1.001
    assert len(rivals) < 4
    assert reason(f.check_language, SENTENCES[code], code, 0.0) is None
    for other in {"en", "de", "ja", "ru"} - {code, *rivals}:
        assert reason(f.check_language, SENTENCES[code], other, 0.0) == f"language: {best}"


def test_language_of_too_little_and_its_score():
    for text in ("", "12 34 56", "the and of"):  # before a model is asked
        assert f.guess_language(text) == ("unknown", 0, [])
        assert reason(f.check_language, text, "en", 0.0) == "language: unknown"
    pytest.importorskip("py3langid")
    for code in ("en", "de"):
        assert f.guess_language(SENTENCES[code])[1] > 0.85
    text = SENTENCES["en"] + SENTENCES["el"] * 3  # the Greek letters are more
    assert f.guess_language(text)[0] == "el"
    score = f.guess_language(text)[1]
    for least, expected in ((score - 0.01, None), (score + 0.01, "language: under language_score")):
        assert reason(f.check_language, text, "el", least) == expected


def test_the_language_needs_a_library_that_is_named_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)  # as if it were not there
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    monkeypatch.setattr(prepare, "steps", "html,language")
    f.language_model.cache_clear()
    with pytest.raises(UserError) as error:
        prepare.check_settings()
    assert str(error.value) == "the step language needs py3langid: pip install py3langid"


# Blocklist and personal data


def test_blocklist(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(
        "\ufeff# ours\n #\n\nbad.org\nhttps://www.example.com/ads\nViagra\nfree  money\nc++\n"
        "#was.org\nfine.org/#!/ads\n"
    )
    text = "A pleasant text."
    assert reason(f.check_blocklist, text + " viagra", "http://bad.org/", None) is None  # no list
    why = lambda text, url=None: reason(f.check_blocklist, text, url, str(path))
    for url in (
        "http://bad.org",
        "https://a.b.BAD.org:80/x",
        "bad.org/p?q",
        "//u@www.bad.org",
        "http://bad.org?u=a@b",
    ):
        assert why(text, url) == "blocklist: URL"
    for url in ("http://example.com/ads/1", "https://example.com/adsense"):
        assert why(text, url) == "blocklist: URL"
    for url in ("http://notbad.org", "http://bad.org.uk/", "http://a.com/bad.org", None, ""):
        assert why(text, url) is None
    assert why(text, "https://fine.org/#!/ads/1") == "blocklist: URL"
    for url in ("https://example.com/", "https://a.example.com/ads", "fine.org/", "was.org"):
        assert why(text, url) is None
    assert why(text + " #", "data:" + "a." * 500_000) is None
    assert why("Buy VIAGRA!") == "blocklist: word"
    assert why("Get free\nmoney.") == "blocklist: phrase"
    assert why("In C++, say") == "blocklist: phrase"
    for fine in ("Viagras", "free moneys", "carefree money", "C + c", "the letter c"):
        assert why(fine) is None


PERSONAL = {
    "<email>": "a@b.co Ann.Lee+x@mail.example.com mailto:a-b_c@x-y.org jürgen@müller.de",
    "<ip>": "8.8.8.80 http://93.184.216.34/ ip=151.101.1.69 2a00:1450:4001:81b::200e 2606:4700::1111",
    "<phone>": "+15551234567 +442079460958 (555)234-5678 555-234-5678 1-555-234-5678 555.234.5678",
}
PHRASES = {
    "<phone>": ["+1 (555) 234-5678", "+33 1 23 45 67 89", "+49 (0)30 1234567", "+44 20 7946 0958",
                "(555) 234-5678", "+91 98765 43210"],
    }  # fmt: skip
IMPERSONAL = """
git@github.com:a/b  image@2x.png  @name  a@b  user@localhost  pkg@1.2.3  @app.route
127.0.0.1  10.1.2.3  192.168.1.77  255.255.255.0  224.0.0.251  169.254.77.1  1.2.3.4  999.1.1.1
version 93.184.216.34  v93.184.216.34  release: 40.50.60.70  ==93.184.216.34  lib-93.184.216.34
Name/93.184.216.34  1.3.6.1.4.1.99  93.184.216.34.5  std::vector  a::b  fe80::1  2001:db8::1  12:34:56
00:1a:2b:3c:4d:5e  2024-01-15  15.01.2024  978-3-16-148410-0  0-306-40615-2  1234567890  555-1234
3.14159265358979  +1.23456789012  +0100  2024-01-15T10:00:00+02:00  123-45-6789  x=5552345678
@@ -12345,67 +12345,68 @@  +1 0 0 1 0 1 0 0 1 0  100-200-3000  555-234-56789  0x5552345678  1-2-3-4
"""


def test_personal_data_is_replaced():
    for mark, cases in PERSONAL.items():
        for case in cases.split() + ["(" + cases.split()[0] + ").", cases.split()[1] + "?"]:
            found = f.clean_pii(f"So {case} it is")
            assert found.count("<") == found.count(mark) == 1, found
            assert not any(c.isdigit() for c in found), found
    for case in PHRASES["<phone>"]:
        assert f.clean_pii(f"Call {case}.") == "Call <phone>."
    assert f.clean_pii("at 93.184.216.34, port 80") == "at <ip>, port 80"
    assert f.clean_pii("a@b.co, <ip> c@d.co 93.184.216.34") == "<email>, <ip> <email> <ip>"


@pytest.mark.parametrize("case", [c for r in IMPERSONAL.split("\n") for c in r.split("  ") if c])
def test_what_looks_like_personal_data_stays(case):
    assert f.clean_pii(f"So {case} it is") == f"So {case} it is"


PIECES = ("a", "1", "1.", "a@", "a.", "+1", "+1 ", "(2", "2a00:", "555-", "a@b.")


@pytest.mark.parametrize("piece", PIECES)
def test_the_work_of_the_patterns_grows_with_the_text(piece):
    assert growth(f.clean_pii, lambda n: piece * n + "!", 12_000) < 30


def test_the_work_on_an_address_grows_with_its_length():
    assert growth(f.bare_url, lambda n: "/" * n + "x", 40_000) < 30
