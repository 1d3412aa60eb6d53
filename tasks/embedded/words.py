"""Word lists that the families of the embedded suite share.

The lists are small on purpose: a model that sees two million tokens must see each word often.
"""


def listed(text: str) -> list[str]:
    """The words of a text, in order."""
    return text.split()


NAMES = listed("anna ben carl dora emma finn gina hugo ivan julia kate leo mia nina otto paul")
COLORS = listed("red blue green black white yellow brown pink")
PLACES = listed("garden kitchen school park market station library forest hotel office")
CITIES = listed("rome paris london berlin madrid oslo cairo tokyo delhi lima")
JOBS = listed("cook teacher doctor farmer singer painter driver baker pilot nurse")
DRINKS = listed("tea coffee milk juice water cocoa lemonade cider")

# Kind to its members.
KINDS = {
    "animal": listed("cat dog horse cow"),
    "vehicle": listed("car bus bike boat"),
    "furniture": listed("table chair bed desk"),
    "clothing": listed("hat coat shirt scarf"),
    "tool": listed("hammer saw knife brush"),
}
NOUNS = [noun for nouns in KINDS.values() for noun in nouns]
KIND_OF = {noun: kind for kind, nouns in KINDS.items() for noun in nouns}

# Each state and its opposite; any of them can be said of any of the nouns.
OPPOSITES = [
    ("big", "small"),
    ("old", "new"),
    ("clean", "dirty"),
    ("wet", "dry"),
    ("warm", "cold"),
]
OPPOSITE_OF = {a: b for a, b in OPPOSITES} | {b: a for a, b in OPPOSITES}
STATES = list(OPPOSITE_OF)

TOPICS = {
    "sport": listed("goal coach team ball player tennis football race stadium referee"),
    "food": listed("soup bread cheese salad dinner recipe sugar rice lunch oven"),
    "music": listed("guitar piano concert melody choir violin drummer opera rhythm band"),
    "travel": listed("airport passport luggage flight ticket map tourist journey hostel border"),
    "weather": listed("rain snow storm wind cloud thunder fog sunshine ice rainbow"),
}
