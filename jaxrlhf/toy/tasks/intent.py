"""Intent: what a customer of a bank wants, one of six labels. The best accuracy is 1.

A message is an opening, a phrase that shows its intent, and an ending. Test messages combine them in ways that no
training message does.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, words_of

INTENTS = {
    "balance": ("how much money do i have", "what is my balance", "show me my account total", "how much is left"),
    "transfer": ("send money to my brother", "move money to my savings", "pay my friend", "transfer to an account"),
    "lost_card": ("i lost my card", "my card was stolen", "i can not find my card", "somebody took my card"),
    "new_card": ("i want a new card", "please order a card for me", "my card is old", "my card will expire soon"),
    "limit": ("raise my limit", "i need to spend more a day", "what is the most i can spend", "lower my limit"),
    "hours": ("when do you open", "are you open on sunday", "when does the office close", "what are your hours"),
}  # fmt: skip
OPENINGS = ("hello ,", "hi ,", "good morning ,", "good evening ,", "excuse me ,", "please help ,", "dear team ,", "")
ENDINGS = (". thank you", ". it is urgent", "now", "today", "again", "as soon as possible", ". i am in a hurry", "")


def draw(rng: Random) -> Row:
    intent = pick(rng, tuple(INTENTS))
    parts = (pick(rng, OPENINGS), pick(rng, INTENTS[intent]), pick(rng, ENDINGS))
    return {"prompt": " ".join(part for part in parts if part) + " =>", "response": intent, "label": intent}


TASK = Task(
    draw,
    words_of(*(phrase for phrases in INTENTS.values() for phrase in phrases), *OPENINGS, *ENDINGS, *INTENTS, "=>"),
)
