"""Instructions that a program can verify: IFEval (Zhou et al. 2023, table 1), each as its published
code defines it, but for what that asks of language libraries: sentences, words in capitals and
languages are found by the plain rules below.

An instruction is a function of a text and of the arguments that a row's `kwargs` have for it, by
the names of the data set; it returns whether the text follows it.
"""

from __future__ import annotations

import inspect
import json
import re
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any

from barelm.run import UserError

if TYPE_CHECKING:
    pass

# Scripts, by the first word of their letters' Unicode names, and the languages written in them.
SCRIPTS = {
    "CYRILLIC": "ru uk bg", "ARABIC": "ar fa ur", "DEVANAGARI": "hi mr ne", "HANGUL": "ko",
    "CJK": "zh ja", "HIRAGANA": "ja", "KATAKANA": "ja", "HEBREW": "he", "THAI": "th", "GREEK": "el",
    "BENGALI": "bn", "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn", "GUJARATI": "gu",
    "GURMUKHI": "pa", "MALAYALAM": "ml",
}  # fmt: skip
COMMON_WORDS = {  # of languages in the Latin script
    "en": "the and of to is in that it for you with this are was",
    "es": "el los las y en una es por con para su más del como",
    "fr": "le les et des un une est dans pour que sur pas vous je",
    "de": "der die das und ist nicht ein eine zu mit den von auf ich",
    "it": "il di che è un una per non della con sono gli del anche",
    "pt": "o os as e do da em um uma não para com são você",
    "pl": "i w na nie się z że do jest to jak od po są",
    "vi": "và của là có không các được trong một cho người với tôi bạn",
    "sw": "na ya wa kwa ni za katika la kama hii cha watu yake kuwa",
    "fi": "ja on ei että se oli ovat hän mutta kun tai myös joka mitä",
}


# --------------------------------------------------------------------------------------------------
# Verdicts


def judge_ifeval(row: dict, texts: list[str]) -> dict:
    """The four published accuracies of an answer: of the prompt as a whole, and (a list) of each of
    its instructions, strict and loose."""
    strict, loose = ifeval_verdicts(row, texts[0])
    return {
        "prompt_level_strict_acc": all(strict),
        "inst_level_strict_acc": strict,
        "prompt_level_loose_acc": all(loose),
        "inst_level_loose_acc": loose,
    }


def ifeval_verdicts(row: dict, text: str) -> tuple[list[bool], list[bool]]:
    """Two lists with a boolean for each instruction of {prompt, instruction_id_list, kwargs}:
    strict, and loose (also without the first line, the last, both, and asterisks; section 2.2)."""
    lines = text.split("\n")
    # Without "Sure, here it is:", without "Hope this helps!", without either; without Markdown.
    forms = [text]
    for fewer in (lines[1:], lines[:-1], lines[1:-1]):
        forms.append("\n".join(fewer).strip())
    forms += [form.replace("*", "") for form in forms]
    strict = []
    loose = []
    for name, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        strict.append(follows(name, kwargs, text))
        loose.append(any(follows(name, kwargs, form) for form in forms))
    return strict, loose


def follows(instruction_id: str, kwargs: dict, text: str) -> bool:
    """Whether a text follows one instruction ("group:name"); an empty text follows none. Of kwargs
    the instruction takes what it has a name for: rows have those of all others too, as null."""
    if instruction_id not in INSTRUCTIONS:
        raise UserError(f"{instruction_id}: not one of IFEval's instructions")
    instruction: Any = INSTRUCTIONS[instruction_id]
    try:
        names = list(inspect.signature(instruction).parameters)[1:]  # but for the text
        arguments = {name: kwargs[name] for name in names}
        followed = instruction(text, **arguments)
    except (AttributeError, TypeError, KeyError) as error:  # missing, null, or no relation
        raise UserError(f"{instruction_id}: kwargs {kwargs}: {error}") from None
    return bool(followed) and bool(text.strip())


# --------------------------------------------------------------------------------------------------
# What the instructions count


def count(pattern: str, text: str, flags: int = re.IGNORECASE) -> int:
    return len(re.findall(pattern, text, flags))


def holds(number: int, relation: str, limit: int) -> bool:
    """Whether a number stands in the relation, one of IFEval's two, to the limit."""
    return {"less than": number < limit, "at least": number >= limit}[relation]


def languages(text: str) -> list[str]:
    """The codes of the languages that a text may be in: those of the script of most of its letters
    (Russian is not told from Bulgarian); in the Latin script, the one with most common words."""
    letters = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    if not letters:
        return []
    script = letters.most_common(1)[0][0]
    if script != "LATIN":
        return SCRIPTS.get(script, "").split()
    words = Counter(re.findall(r"\w+", text.lower()))
    hits = {}
    for code, common in COMMON_WORDS.items():
        hits[code] = sum(words[word] for word in common.split())
    most = max(hits.values())
    return [code for code in hits if hits[code] == most > 0]


def count_sentences(text: str) -> int:
    """A sentence ends with . ! or ? before space and no small letter, but for titles, initials."""
    if not text.strip():
        return 0
    ends = r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\b[A-Z]\.)(?<=[.!?])[\"'”’)\]*]*\s+(?![a-z])"
    return len(re.split(ends, text.strip()))


def divide(text: str, divider: str) -> list[str]:
    """The texts between dividers, the first and the last only if there is something in them."""
    parts = [part.strip() for part in text.split(divider)]
    if len(parts) > 1 and not parts[-1]:
        parts.pop()
    if not parts[0]:
        parts.pop(0)
    return parts


# --------------------------------------------------------------------------------------------------
# The instructions, in the order of table 1


# Keywords. Case makes no difference, and they may stand within words, but for forbidden ones.


def existence(text: str, keywords: list[str]) -> bool:
    for word in keywords:
        if not count(re.escape(word), text):
            return False
    return True


def keyword_frequency(text: str, keyword: str, relation: str, frequency: int) -> bool:
    return holds(count(re.escape(keyword.strip()), text), relation, frequency)


def no_forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    for word in forbidden_words:
        if count(rf"\b{re.escape(word)}\b", text):
            return False
    return True


def letter_frequency(text: str, letter: str, let_relation: str, let_frequency: int) -> bool:
    return holds(text.lower().count(letter.lower()), let_relation, let_frequency)


# Language


def response_language(text: str, language: str) -> bool:
    return language in languages(text)


# Length


def number_of_sentences(text: str, relation: str, num_sentences: int) -> bool:
    return holds(count_sentences(text), relation, num_sentences)


def number_of_paragraphs(text: str, num_paragraphs: int) -> bool:
    paragraphs = divide(text, "***")
    return all(paragraphs) and len(paragraphs) == num_paragraphs


def number_of_words(text: str, relation: str, num_words: int) -> bool:
    return holds(count(r"\w+", text), relation, num_words)


def nth_paragraph_first_word(
    text: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """Paragraphs are divided by empty lines; the word is compared without what it is quoted in."""
    paragraphs = text.split("\n\n")
    n_filled = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    word = None
    # The n-th of all, empty ones among them, is what the published code looks at, too.
    if nth_paragraph <= n_filled:
        words = paragraphs[nth_paragraph - 1].split()
        if words:
            word = re.split("[.,?!'\"]", words[0].lstrip("'\"").lower())[0]
    return n_filled == num_paragraphs and word == first_word.lower()


# Content


def number_of_placeholders(text: str, num_placeholders: int) -> bool:
    return count(r"\[.*?\]", text) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> int:
    """Of these two markers the letters count, however they are spaced; others stand as they are."""
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = spaced.get(postscript_marker, re.escape(postscript_marker.strip()))
    return count(pattern, text)


# Format, as Markdown has it


def number_of_bullets(text: str, num_bullets: int) -> bool:
    stars = count(r"^\s*\*[^*].*$", text, re.MULTILINE)  # a second one would begin bold text
    dashes = count(r"^\s*-.*$", text, re.MULTILINE)
    return stars + dashes == num_bullets


def constrained_response(text: str) -> bool:
    answers = ["My answer is yes.", "My answer is no.", "My answer is maybe."]
    return any(answer in text for answer in answers)


def number_of_highlights(text: str, num_highlights: int) -> bool:
    """*one* and **two** asterisks; the latter count as the former, too, where they hold text."""
    highlights = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(part.strip("*").strip()) for part in highlights) >= num_highlights


def number_of_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    # In this spelling of its letters (0: no flags), with a number behind it.
    return count(rf"{re.escape(section_spliter.strip())}\s?\d", text, 0) >= num_sections


def json_format(text: str) -> bool:
    """JSON, with or without Markdown's fence around it."""
    try:
        json.loads(re.sub(r"^```(json)?|```$", "", text.strip(), flags=re.IGNORECASE))
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    return any(part.strip("<>").strip() for part in re.findall(r"<<[^\n]+>>", text))


# Combinations, beginnings and ends


def two_responses(text: str) -> bool:
    responses = divide(text, "******")
    different = set(responses) - {""}
    return len(responses) == 2 and len(different) == 2


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    # What is quoted as a whole ends before the mark.
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> object:
    return re.fullmatch('".*"', text.strip(), re.DOTALL)


# Case and punctuation


def capital_word_frequency(text: str, capital_relation: str, capital_frequency: int) -> bool:
    n_capital = 0
    for word in re.findall(r"\w+(?:[-.]\w+)*", text):  # a word with its hyphens
        n_capital += word.isupper()
    return holds(n_capital, capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper() and "en" in languages(text)


def english_lowercase(text: str) -> bool:
    return text.islower() and "en" in languages(text)


def no_comma(text: str) -> bool:
    return "," not in text


INSTRUCTIONS = {
    "keywords:existence": existence,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": no_forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_of_sentences,
    "length_constraints:number_paragraphs": number_of_paragraphs,
    "length_constraints:number_words": number_of_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_of_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_of_bullets,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_of_highlights,
    "detectable_format:multiple_sections": number_of_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
