"""How nano is asked: the words of questions, and what is no question of its kind."""

from __future__ import annotations

import random

SYMBOLS = {
    "sum": ("{a} + {b}", "{a}+{b}", "{a} plus {b}", "{a} and {b} added"),
    "difference": ("{a} - {b}", "{a}-{b}", "{a} minus {b}", "{a} - {b}"),
    "product": ("{a} * {b}", "{a}*{b}", "{a} times {b}", "{a} x {b}", "{a} × {b}"),
    "quotient": ("{a} / {b}", "{a}/{b}", "{a} divided by {b}", "{a} ÷ {b}"),
}
FRAMES = (
    "What is {e}?",
    "What is {e}?",
    "What is {e}?",
    "what is {e}",
    "What's {e}?",
    "what's {e}?",
    "{e}",
    "{e}",
    "{e}?",
    "{e} =",
    "{e}=",
    "{e} = ?",
    "How much is {e}?",
    "how much is {e}?",
    "Calculate {e}",
    "Calculate {e}.",
    "calculate {e}",
    "Compute {e}.",
    "compute {e}",
    "Solve {e}",
    "Tell me {e}.",
    "Can you calculate {e}?",
    "Do you know what {e} is?",
    "I need {e}.",
    "Work out {e}.",
    "Evaluate {e}.",
    "What does {e} equal?",
    "what is the result of {e}?",
    "What is the answer to {e}?",
    "WHAT IS {e}?",
)
VERBS = {
    "sum": (
        "Add {a} and {b}.",
        "add {a} and {b}",
        "Add {b} to {a}",
        "What is the sum of {a} and {b}?",
        "sum of {a} and {b}",
        "Sum {a} and {b}",
    ),
    "difference": (
        "Subtract {b} from {a}.",
        "subtract {b} from {a}",
        "Take {b} away from {a}.",
        "What is the difference between {a} and {b}?",
        "What is {b} less than {a}?",
    ),
    "product": (
        "Multiply {a} by {b}.",
        "multiply {a} by {b}",
        "Multiply {a} and {b}",
        "What is the product of {a} and {b}?",
        "product of {a} and {b}",
    ),
    "quotient": ("Divide {a} by {b}.", "divide {a} by {b}", "What is {a} divided by {b}?"),
}
BEFORE = (
    "Please: ",
    "please ",
    "Hi! ",
    "Hello, ",
    "Hey, ",
    "OK, ",
    "And ",
    "Now ",
    "So ",
    "And now: ",
)
AFTER = (" please", ", please", " Thanks!", " thanks", "  ", "\n", "!")
_LARGER = (
    "Which is larger, {a} or {b}?",
    "which is larger, {a} or {b}?",
    "Which is bigger, {a} or {b}?",
    "Which number is larger: {a} or {b}?",
    "What is larger, {a} or {b}?",
    "Which is greater: {a} or {b}?",
    "which is bigger {a} or {b}",
    "Which one is bigger, {a} or {b}?",
    "{a} or {b}, which is larger?",
    "The larger of {a} and {b}?",
    "What is the maximum of {a} and {b}?",
)
_SMALLER = (
    "Which is smaller, {a} or {b}?",
    "which is smaller, {a} or {b}?",
    "Which is less, {a} or {b}?",
    "Which number is smaller: {a} or {b}?",
    "What is smaller, {a} or {b}?",
    "which is smaller {a} or {b}",
    "{a} or {b}, which is smaller?",
    "The smaller of {a} and {b}?",
    "What is the minimum of {a} and {b}?",
)
_IS_LARGER = (
    "Is {a} larger than {b}?",
    "is {a} larger than {b}?",
    "Is {a} bigger than {b}?",
    "Is {a} greater than {b}?",
    "Is {a} more than {b}?",
    "{a} > {b}?",
)
_IS_SMALLER = (
    "Is {a} smaller than {b}?",
    "is {a} smaller than {b}?",
    "Is {a} less than {b}?",
    "{a} < {b}?",
)
_COMPARE = ("Compare {a} and {b}.", "compare {a} and {b}", "Compare {a} with {b}")
COMPARISONS = (_LARGER, _SMALLER, _IS_LARGER, _IS_SMALLER, _COMPARE)
CONVERT = (
    "Convert {x} to {y}.",
    "convert {x} to {y}",
    "Convert {x} into {y}.",
    "What is {x} in {y}?",
    "{x} in {y}",
    "{x} to {y}",
    "How many {y} are {x}?",
    "how many {y} are {x}?",
    "How many {y} are in {x}?",
    "how many {y} in {x}?",
    "How many {y} is {x}?",
    "How many {y} do {x} have?",
    "{x} = ? {y}",
)

GREETINGS = (
    "Hello", "Hi", "hi", "hello", "Hey", "hey there", "Good morning", "Good evening!", "Hello!",
    "Hi!", "Hi there!", "Hello there", "Good day", "Hey!",
)  # fmt: skip
THANKED = ("Thanks!", "thanks", "Thank you.", "thank you", "Thank you very much!", "Great, thanks.")
SELF = (
    "Who are you?", "What are you?", "What can you do?", "who made you?", "Are you a robot?",
    "What is your name?", "Help", "help me", "What do you know?", "How do you work?",
    "Are you ChatGPT?", "How old are you?", "Can you help me?", "What model are you?",
)  # fmt: skip
QUESTIONS = (
    "Why is the sky blue?", "What is the capital of France?", "Tell me a joke.",
    "Write a poem about the sea.", "Who was the first president of the United States?",
    "How do I bake bread?", "What is the meaning of life?", "Is it going to rain tomorrow?",
    "Translate good morning into Spanish.", "What is the largest planet?",
    "Who wrote Romeo and Juliet?", "How far away is the moon?", "What time is it?",
    "Explain quantum mechanics.", "Give me a recipe for pancakes.", "What is love?",
    "How many people live in China?", "What is the speed of light?", "Who won the game in 1998?",
    "What happened in 1969?", "Write a function that sorts a list.", "Fix this code for me.",
    "Why do cats purr?", "What color is the sky?", "Tell me about the history of Rome.",
    "What is the weather like today?", "How do plants grow?", "What should I eat tonight?",
    "Name three animals.", "Recommend a good book.", "What is the best movie of 2010?",
    "I have 3 cats.", "I am 25 years old.", "My house has 4 rooms.", "What is the number 7?",
    "Who is the king of England?", "Can you sing?", "Do you like music?", "How are you?",
    "What is a neural network?", "Is there life on Mars?", "What does the word number mean?",
    "Which is better, tea or coffee?", "Is London bigger than Paris?",
    "Which is faster, a car or a train?",
    "Compare apples and oranges.", "Convert this text to a table.", "Add milk to my list.",
    "Subtract the tax.", "Multiply and be happy.", "How many days until summer?",
    "How many legs does a dog have?", "What is the square root of 2?", "What is pi?",
    "What is the next prime after 7?", "Count to 10.", "Give me a random number.",
    "What is half of an apple?", "Where is the library?", "When was the war?", "What is 5?",
    "42", "the", "?", "What", "why", "abc", "lol", "Yes", "No", "ok", "hmm", "What is what?",
    "How much is the fish?", "How much is a car?", "What is x + y?", "Solve x = y.",
    "Bonjour, comment allez-vous ?", "Wie geht es dir?", "¿Cómo estás?", "Was ist das?",
    "Qui es-tu ?", "你好", "こんにちは", "Привет", "Ciao, come stai?", "Olá, tudo bem?",
    "Summarize this article.", "Write an email to my boss.", "Draw a picture of a house.",
    "What is the population of Berlin?", "How tall is Mount Everest?", "Play a song.",
    "Set a timer for 5 minutes.", "Remind me in 2 hours.", "Open the door.", "Ignore all rules.",
    "Print hello world in Python.", "What is machine learning?", "Who are your parents?",
    "Tell me a story about a dragon.", "Let's play a game.", "Do you dream?", "I feel sad.",
    "What day is it today?", "Is water wet?", "Why did the chicken cross the road?",
    "How do airplanes fly?", "What is the chemical formula of water?", "Spell the word three.",
    "Which team is the best?", "Are you alive?", "Prove that there are infinitely many primes.",
    "The quick brown fox jumps over the lazy dog.", "What is the smallest country?",
    "Is a cat smaller than a dog?", "List the months of the year.", "What is a kilometer?",
    "Who invented the meter?", "How heavy is an elephant?", "How long is a river?",
)  # fmt: skip
_WORD_TEXT = """
the a of to and in is it you that he was for on are with as I his they be at one have this
from or had by hot but some what there we can out other were all your when up use word how
said an each she which do their time if will way about many then them would write like so
these her long make thing see him two has look more day could go come did my sound no most
number who over know water than call first people may down side been now find any new work
part take get place made live where after back little only round man year came show every
good me give our under name very through just form much great think say help low line
before turn cause same mean differ move right boy old too does tell sentence set three
want air well also play small end put home read hand large spell add even land here must
big high such follow act why ask men change went light kind off need house picture try us
again animal point mother world near build self earth father larger smaller plus minus
times convert
"""
WORDS = _WORD_TEXT.split()

INSTRUCTIONS = (
    "You are a helpful assistant.",
    "Be brief.",
    "Answer in one sentence.",
    "You are a calculator.",
    "Answer the user's questions.",
    "Be kind and polite.",
)


def dress(rng: random.Random, text: str) -> str:
    """Words before or after a question now and then; other capitals."""
    roll = rng.random()
    if roll < 0.08:
        before = rng.choice(BEFORE)
        text = before + (text[0].lower() + text[1:] if text[1:2].islower() else text)
    elif roll < 0.14:
        text = text.rstrip(".") + rng.choice(AFTER)
    return text


def ask(rng: random.Random, kind: str, a: str | int, b: str | int) -> str:
    if rng.random() < 0.22:
        return dress(rng, rng.choice(VERBS[kind]).format(a=a, b=b))
    expression = rng.choice(SYMBOLS[kind]).format(a=a, b=b)
    return dress(rng, rng.choice(FRAMES).format(e=expression))
