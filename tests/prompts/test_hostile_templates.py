"""Rendering ends soon whatever a chat template does; a failure is one line that names it."""

import time

import pytest
from transformers import AutoTokenizer

from bsjax.errors import MessageError
from bsjax.prompts import rendering
from bsjax.prompts.rendering import rendered
from tests.support.paths import ROOT

FOLDER = ROOT / "examples" / "tiny-qwen2.5-vl"
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
LOOP = "{% for a in range(99999) %}"
DOUBLED = "{% set n = namespace(x=VALUE) %}{% for a in range(99) %}{% set n.x = NEXT %}{% endfor %}"
NESTED = DOUBLED.replace("VALUE", "[1]").replace("NEXT", "[n.x, n.x]")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOP * 4 + "{% endfor %}" * 4, "longer than"),
        ("{{ 10 ** (10 ** 10) }}", "longer than"),
        ("{% set x = 10 ** (10 ** 9) %}", "longer than"),
        (NESTED + "{{ n.x == [n.x] }}{{ n.x | string }}", "longer than|memory"),
        ("{{ 'x' * 10**10 }}", "memory"),
        ("{{ ([1] * 10**10) | length }}", "memory"),
        ("{{ '%9999999999d' % 1 }}", "memory|result too"),
        ("{{ 'a' | center(10**10) }}", "memory"),
        ("{{ 'a'.ljust(10**10) }}", "memory"),
        ("{{ '{:>9999999999}'.format(1) }}", "memory"),
        ("{{ [1] | batch(10**10, 0) | list }}", "memory"),
        ("{{ [1] | slice(10**10) | list }}", "longer than|memory"),
        (DOUBLED.replace("VALUE", "'x'").replace("NEXT", "n.x ~ n.x"), "longer than|memory"),
        (DOUBLED.replace("VALUE", "'x'").replace("NEXT", "n.x + n.x"), "longer than|memory"),
        ("{% set s = 'x' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 40, "longer than|memory"),
        (LOOP + "{{ 'x' * 1000 }}{% endfor %}", "more than 1,200,000 characters"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself"),
        ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "calls itself"),
        ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "calls itself|ended the process"),
        ("{{ range(10**10) | list }}", "Range too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 10.0 ** 1000 }}", "out of range|too large"),
        ("{{ 'a' + 1 }}", "concatenate"),
        ("{{ messages[9].role }}", "no element 9"),
        ("{{ messages.__class__() }}", "unsafe"),
        ("{{ namespace(_a=1) }}", "underscore"),
        ("{{ raise_exception('roles\nmust alternate') }}", "roles must alternate"),
        ("\n\n{% for %}", "line 3: Expected an expression"),
        ("{{ unknown() }}", "'unknown' is undefined"),
        ("{# nothing #}", "to nothing"),
        (r"{{ 'a\ud800' }}", "half of a surrogate pair"),
        ("{% include 'config.json' %}", "no loader"),
    ],
)
def test_templates_fail_in_one_line_that_names_them(tokenizer, template, reason, monkeypatch):
    monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.5)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    start = time.monotonic()
    with pytest.raises(MessageError, match=reason) as caught:
        rendered(tokenizer, MESSAGES)
    assert time.monotonic() - start < 10
    assert str(FOLDER) in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_next_template_renders(tokenizer, monkeypatch):
    expected = rendered(tokenizer, MESSAGES)
    with monkeypatch.context() as context:
        context.setattr(rendering, "RENDER_SECONDS", 0.2)
        context.setattr(tokenizer, "chat_template", "{{ 10 ** (10 ** 10) }}")
        with pytest.raises(MessageError):
            rendered(tokenizer, MESSAGES)
    assert rendered(tokenizer, MESSAGES) == expected


RICH = [
    {"role": "system", "content": "Be brief & <b>\u00fc</b>.", "name": None},
    *MESSAGES,
    {
        "role": "assistant",
        "content": "",
        "reasoning": "hm",
        "tool_calls": [{"function": {"name": "f", "arguments": {"b": [1, 2.5, True, None]}}}],
    },
]


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ messages }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ eos_token }}",
        "{{ messages | tojson(indent=2, sort_keys=true) }}{{ messages | tojson }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% endfor %}",
        "{% set n = namespace(a=1, self=2) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ n.self }}",
        "{{ dict(a=1) }}{{ dict.fromkeys([1, 2], 3) }}{{ strftime_now('%Y') }}",
        "a\n  {% generation %}\n  {{ messages[0].content }}\n{% endgeneration %}\n b\n",
        "{%- for m in messages -%}\n {{ m.thinking | default('-') | trim }}\n{%- endfor %}",
        "{{ messages | map(attribute='role') | join(',') | upper }}{{ range(5) | list }}",
        "{{ messages[0].content | e }}{{ messages[0].content.replace('b', '') }}{{ 7 // 2 }}",
    ],
)
def test_templates_render_as_in_transformers(tokenizer, template, monkeypatch):
    if template is not None:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    assert rendered(tokenizer, RICH) == tokenizer.apply_chat_template(
        RICH, tokenize=False, add_generation_prompt=True
    )
