"""/docs: the server's addresses as a page to read, made of /openapi.json. It runs no script, and
loads nothing from elsewhere."""

from __future__ import annotations

import json
from html import escape

# --------------------------------------------------------------------------------------------------


def reference_page(document: dict) -> str:
    """The page of an OpenAPI document."""
    sections = []
    links = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            name = operation["operationId"]
            label = f"{method.upper()} {path}"
            links.append(f'<li><a href="#{escape(name)}">{escape(label)}</a></li>')
            sections.append(section(name, label, operation))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>barelm: the server's addresses</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="page/style.css">
<link rel="stylesheet" href="page/reference.css">
</head>
<body class="reference">
<header><h1>barelm</h1><p>the server's addresses, as <a href="openapi.json">openapi.json</a></p>
</header>
<nav><ul>{"".join(links)}</ul></nav>
<main>{"".join(sections)}</main>
</body>
</html>
"""


def section(name: str, label: str, operation: dict) -> str:
    """An address: what it does, what it takes and what it answers."""
    parts = [f"<h2><code>{escape(label)}</code></h2>", f"<p>{escape(operation['summary'])}.</p>"]
    rows = []  # those that must be there first
    optional = []
    for one in operation.get("parameters", []):
        rows.append(row(one["name"], one["schema"], one["required"]))
    unchanged = []
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    for field, field_schema in schema.get("properties", {}).items():
        if field_schema.get("x-unchanged"):
            unchanged.append(f"<code>{escape(field)}</code> {escape(kind(field_schema))}")
        elif field in schema["required"]:
            rows.append(row(field, field_schema, True))
        else:
            optional.append(row(field, field_schema, False))
    rows += optional
    if rows:
        head = "<tr><th>field</th><th>what it may be</th><th>what it does</th></tr>"
        parts.append(f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>")
    if unchanged:
        summary = "<summary>accepted where it changes nothing</summary>"
        parts.append(f"<details>{summary}<p>{', '.join(unchanged)}</p></details>")
    answers = " or ".join(operation["responses"]["200"]["content"])
    parts.append(f'<p class="note">It answers {escape(answers)}.</p>')
    return f'<section id="{escape(name)}">{"".join(parts)}</section>'


def row(name: str, schema: dict, required: bool) -> str:
    words = kind(schema)
    if required:
        words += ", required"
    what = schema.get("description", "")
    cells = [f"<code>{escape(name)}</code>", escape(words), escape(what)]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def kind(schema: dict) -> str:
    """A schema in words: its type, limits and default."""
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"] if value is not None)
    if "const" in schema:
        return json.dumps(schema["const"])
    if "anyOf" in schema:
        kinds = [kind(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    words = schema.get("type", "any")
    if isinstance(words, list):
        words = words[0]
    if words == "array" and "items" in schema:
        words = f"list of {kind(schema['items'])}"
    if "minimum" in schema:
        words += f" from {schema['minimum']} to {schema['maximum']}"
    if "default" in schema:
        words += f", default {json.dumps(schema['default'])}"
    return words
