"""Prompts of the project's own, templates filled with topics: enough for a first draft from a fresh clone, no data needed.

For a draft that is to be used, give `--prompts` of what its users ask.
"""

from __future__ import annotations

import random

from _prompts import Prompt

TOPICS = """bicycles; volcanoes; the history of tea; solar panels; chess openings; bread baking; the human heart; black holes;
beekeeping; public libraries; the water cycle; electric cars; learning a language; houseplants; the Roman Empire; jazz music;
time management; vaccines; the stock market; coral reefs; job interviews; photography; the printing press; healthy breakfasts;
mountain hiking; machine learning; recycling; the moon landing; knitting; renewable energy; dog training; the Great Wall of China;
budgeting; earthquakes; poetry; operating systems; sleep; the French Revolution; gardening in small spaces; swimming;
the internet; cheese making; wild birds; city planning; first aid; origami; ancient Egypt; running a marathon; coffee;
climate and weather; museums; board games; the solar system; video calls; fairy tales; databases; friendship; rivers""".replace(
    "\n", " "
).split("; ")

TEMPLATES = {
    "chat": [
        "Write a short, friendly message to a friend who has just become interested in {topic}.",
        "Give me five practical tips about {topic}.",
        "Write a short story for children in which {topic} plays a part.",
        "I have to give a talk about {topic}. Suggest an outline.",
        "Explain {topic} to a ten-year-old.",
    ],
    "qa": [
        "What are the most important facts about {topic}?",
        "What are common misunderstandings about {topic}, and what is true?",
        "What are the advantages and disadvantages of {topic}?",
        "How has our view of {topic} changed over the last hundred years?",
    ],
    "code": [
        "Write a Python class that stores notes about {topic}, with methods to add, search and print them.",
        "Write a Python function that counts how often words about {topic} occur in a text, with an example.",
        "Write a small HTML page about {topic} with a heading, a list and a table.",
    ],
    "summarization": [
        "Summarize in three sentences what a beginner should know about {topic}.",
        "Write a paragraph of about 100 words about {topic}, then summarize it in one sentence.",
    ],
    "translation": [
        "Write three simple sentences about {topic} in English and translate each of them into German.",
        "Translate into French: I read a good book about {topic} last week.",
    ],
    "math": [
        "{name} buys {a} books about {topic} for {b} dollars each and pays with {c} dollars. How much change is that? Explain.",
        "A course about {topic} has {a} lessons of {b} minutes. How many hours is that in all? Show your steps.",
        "A club for {topic} has {c} members. A quarter leave, then {a} new ones join. How many members are there now?",
    ],
}
NAMES = ["Anna", "Ben", "Chen", "Dora", "Emil", "Farid"]


def template_prompts(seed: int = 0) -> list[Prompt]:
    """Every template with every topic."""
    numbers = random.Random(seed)
    prompts = []
    for task, templates in TEMPLATES.items():
        for kind, template in enumerate(templates):
            for place, topic in enumerate(TOPICS):
                a, b = numbers.randint(3, 19), numbers.randint(4, 60)
                fields = {"name": numbers.choice(NAMES), "a": a, "b": b, "c": 4 * numbers.randint(a * b // 4 + 1, 400)}
                text = template.format(topic=topic, **fields)
                messages = [{"role": "user", "content": text}]
                prompts.append(Prompt(f"own-{task}-{kind}-{place}", task, messages, "confu_hf examples", "Apache-2.0"))
    return prompts
